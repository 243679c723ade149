//! `cargo xtask bpf`: builds the BPF programs alone and says with what, for those who work on them.
//!
//! In: `bpf-programs/`. Out: the path of the object. The build itself is `crates/datapath/build/toolchain.rs`, the
//! one that `cargo build` runs.

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};

#[path = "../../crates/datapath/build/toolchain.rs"]
mod toolchain;

/// Builds below `<root>/target/bpf-programs`, the folder that cargo's builds of the workspace share. `root` is the
/// workspace's.
pub fn build(root: &Path) -> Result<PathBuf> {
    let found = toolchain::find().map_err(|message| anyhow!(message))?;
    println!("building with {}", found.description);
    found
        .build(&root.join("bpf-programs"), &root.join("target/bpf-programs"))
        .map_err(|message| anyhow!(message))
}
