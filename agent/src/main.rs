//! `isthmus-agent`: parses arguments, runs, exits. Codes: 0 stopped by a signal, 1 failed, 64 a flag is wrong.

use std::process::ExitCode;

use isthmus_agent::{Args, Command};
use isthmus_runtime::{
    command_line::{FlagError, exit_code, parse},
    shutdown, telemetry,
};

fn main() -> ExitCode {
    exit_code(start(parse()))
}

fn start(args: Args) -> anyhow::Result<()> {
    let log = args.log().clone();
    telemetry::init(log.log_format, &log.log_level)
        .map_err(|error| FlagError::new("log-level", &log.log_level, error))?;
    let command = args.into_command()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        match command {
            Command::Run(config) => isthmus_agent::run(*config, shutdown::on_signals()?).await,
            Command::Cleanup(places) => isthmus_agent::cleanup(&places).await,
        }
    })
}
