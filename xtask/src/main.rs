//! Project chores: `cargo xtask codegen | bpf | tidy | bench NAME`.

mod bpf;
mod codegen;
mod sources;
mod tiers;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Project chores")]
struct Args {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Make the Rust code of the .proto files.
    Codegen {
        /// Fail if the committed code differs, and write nothing.
        #[arg(long)]
        check: bool,
    },
    /// Build the BPF programs alone and print where the object is.
    Bpf,
    /// Check what the compiler does not: tiers, headers, sizes, unfinished marks, generated code.
    Tidy,
    /// Run a benchmark beside its peer (release build). Without a name, lists them.
    Bench {
        /// Which one.
        name: Option<String>,
        /// One JSON line a figure and nothing else.
        #[arg(long)]
        json: bool,
        /// Passed on, for example `-- --changes 50`.
        #[arg(last = true)]
        rest: Vec<String>,
    },
}

fn main() -> anyhow::Result<()> {
    match Args::parse().chore {
        Chore::Codegen { check } => codegen::run(&root(), check),
        Chore::Bpf => bpf::build(&root()).map(|object| println!("{}", object.display())),
        Chore::Tidy => tidy(),
        Chore::Bench { name, json, rest } => bench(name, json, rest),
    }
}

/// The workspace's folder.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn tidy() -> anyhow::Result<()> {
    let mut found = tiers::check(&root())?;
    found.extend(sources::check(&root())?);
    if let Err(error) = codegen::run(&root(), true) {
        found.push(format!("{error:#}"));
    }
    for problem in &found {
        eprintln!("tidy: {problem}");
    }
    if found.is_empty() {
        Ok(())
    } else {
        bail!("{} problems", found.len())
    }
}

fn bench(name: Option<String>, json: bool, rest: Vec<String>) -> anyhow::Result<()> {
    // The failover benchmark starts the daemons, so they are built alike.
    let mut cargo = Command::new(env!("CARGO"));
    // What cargo tells this program about itself would make build scripts of others (ring's) run anew, and all above them.
    for (name, _) in std::env::vars_os() {
        let told = name
            .to_str()
            .is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST"));
        if told {
            cargo.env_remove(name);
        }
    }
    let build = cargo
        .current_dir(root())
        .args(["build", "--release", "--quiet", "--workspace", "--bins"])
        .status()
        .context("cannot run cargo build")?;
    if !build.success() {
        bail!("the release build failed");
    }
    let mut run = Command::new(root().join("target/release/isthmus-bench"));
    run.args(name).args(json.then_some("--json")).args(rest);
    let status = run.status().context("cannot run target/release/isthmus-bench")?;
    if status.success() {
        Ok(())
    } else {
        bail!("the benchmark failed")
    }
}
