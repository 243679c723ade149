//! `isthmus sandbox demo`: builds a sandbox of its own, runs the demo, and removes it, also after a failure.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;

use super::{say, up};
use crate::{SandboxClient, demo, teardown};

#[derive(Clone, Debug, Args)]
#[command(after_help = "Example:
  isthmus sandbox demo

Takes about two minutes. The last line is one JSON object; the exit code is not 0 when an expectation failed.")]
pub struct DemoArgs {
    /// The name of the sandbox that is built and removed.
    #[arg(long, default_value = "demo")]
    name: String,
    /// Leave the sandbox as it is at the end.
    #[arg(long)]
    keep: bool,
    /// The directory with Isthmus' binaries; the one of this program when it is not named.
    #[arg(long)]
    bin_dir: Option<PathBuf>,
}

pub async fn run(args: DemoArgs, state_root: &Path) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(
        nix::unistd::geteuid().is_root(),
        "a sandbox belongs to root: run this as root (sudo)"
    );
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    if teardown::down(state_root, &args.name).await? {
        say(&format!("removed what was left of sandbox `{}`", args.name))?;
    }
    let code = up::run(
        up::UpArgs::of_demo(args.name.clone(), args.bin_dir.clone()),
        state_root,
    )
    .await?;
    if code != ExitCode::SUCCESS {
        return Ok(code);
    }
    let client = SandboxClient::open_in(state_root, &args.name)?;
    let outcome = tokio::select! {
        outcome = demo::run(&client, &program) => outcome,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
    };
    if args.keep {
        say(&format!(
            "the sandbox stays; remove it with `isthmus sandbox down --name {}`",
            args.name
        ))?;
    } else {
        teardown::down(state_root, &args.name)
            .await
            .context("removing the sandbox")?;
    }
    outcome.map(|()| ExitCode::SUCCESS)
}
