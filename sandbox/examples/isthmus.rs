//! `isthmus sandbox` without the rest of the command line tool: for work on the sandbox alone.

use std::process::ExitCode;

use clap::Parser;
use isthmus_sandbox::cli::{SandboxArgs, run};

#[derive(Parser)]
enum Isthmus {
    Sandbox(SandboxArgs),
}

#[tokio::main]
async fn main() -> ExitCode {
    let Isthmus::Sandbox(args) = Isthmus::parse();
    run(args).await.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
