//! Makes the Rust code in `proto/src/gen` from the `.proto` files, with a compiler written in Rust: no protoc needed.

use std::{fs, path::Path};

use anyhow::{Context, bail};

const PROTOS: [&str; 3] = ["etcd/kv.proto", "etcd/rpc.proto", "isthmus/agent.proto"];
/// Not compiled to code here (its messages are derived in crates/wire), but it must stay valid.
const CHECKED_ONLY: [&str; 1] = ["isthmus/slice.proto"];
const GENERATED: [&str; 3] = ["mvccpb.rs", "etcdserverpb.rs", "isthmus.agent.v1.rs"];

/// Writes the generated code, or with `check` fails if the committed code differs from it.
pub fn run(root: &Path, check: bool) -> anyhow::Result<()> {
    let protos = root.join("proto");
    protox::compile(CHECKED_ONLY, [&protos]).context("proto/isthmus/slice.proto does not compile")?;
    let descriptors = protox::compile(PROTOS, [&protos]).context("the .proto files do not compile")?;
    let fresh = root.join("target/codegen");
    fs::create_dir_all(&fresh).with_context(|| format!("cannot create {}", fresh.display()))?;
    tonic_prost_build::configure()
        .bytes(".")
        .btree_map(".")
        .out_dir(&fresh)
        .compile_fds(descriptors)
        .context("cannot generate the services")?;
    let committed = protos.join("src/gen");
    fs::create_dir_all(&committed)?;
    for name in GENERATED {
        let new = fs::read(fresh.join(name)).with_context(|| format!("{name} was not generated"))?;
        let old = fs::read(committed.join(name)).unwrap_or_default();
        match (old == new, check) {
            (true, _) => {}
            (false, true) => {
                bail!("proto/src/gen/{name} differs from its .proto files; run `cargo xtask codegen`")
            }
            (false, false) => {
                fs::write(committed.join(name), new).with_context(|| format!("cannot write {name}"))?
            }
        }
    }
    Ok(())
}
