//! `isthmus-operator`: parses flags, runs, exits.

use std::process::ExitCode;

use isthmus_operator::{Args, Config, Operator};
use isthmus_runtime::{
    command_line::{self, FlagError},
    shutdown, telemetry,
};

fn main() -> ExitCode {
    command_line::exit_code(run(command_line::parse()))
}

#[tokio::main]
async fn run(args: Args) -> anyhow::Result<()> {
    let log = args.log.clone();
    telemetry::init(log.log_format, &log.log_level)
        .map_err(|error| FlagError::new("log-level", &log.log_level, error))?;
    let config = Config::from_args(args)?;
    let shutdown = shutdown::on_signals()?;
    let operator = Operator::build(config, shutdown).await?;
    tracing::info!(admin = %operator.admin_address(), "operator started");
    operator.run().await;
    Ok(())
}
