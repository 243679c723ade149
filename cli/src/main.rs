//! Parses arguments, runs, exits.

use std::process::ExitCode;

use isthmus_cli::args::Args;

fn main() -> ExitCode {
    let args: Args = isthmus_runtime::command_line::parse();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start the event loop: {error}");
            return ExitCode::FAILURE;
        }
    };
    runtime.block_on(isthmus_cli::run(args)).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
