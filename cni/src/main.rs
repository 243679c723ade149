//! Reads environment and standard input, runs, prints, exits: 0, or 1 with an error object on standard output.

use std::{
    io::{Read, Write},
    process::ExitCode,
};

use clap::Parser;
use isthmus_cni::{
    Outcome, config,
    failure::{CniError, Code},
    request::Environment,
    version::CniVersion,
};

/// The CNI plugin of Isthmus. A container runtime calls it, with CNI_COMMAND (ADD, DEL, CHECK, STATUS, GC, VERSION) and
/// the other CNI_ variables set and the network configuration on standard input.
#[derive(Parser)]
#[command(
    name = "isthmus-cni",
    version,
    after_help = "Example of a network configuration, /etc/cni/net.d/05-isthmus.conflist:\n\n  \
        {\"cniVersion\": \"1.1.0\", \"name\": \"isthmus\", \"plugins\": [\n    \
        {\"type\": \"isthmus-cni\", \"agentSocket\": \"/var/run/isthmus/agent.sock\"}]}\n\n\
        By hand:\n\n  echo '{\"cniVersion\": \"1.1.0\", \"name\": \"isthmus\"}' | CNI_COMMAND=STATUS isthmus-cni"
)]
struct Args {}

fn main() -> ExitCode {
    let Args {} = isthmus_runtime::command_line::parse();
    let environment = Environment::of_process();
    if environment.command.is_none() {
        eprintln!(
            "isthmus-cni {}: CNI plugin, supports {}; see --help",
            env!("CARGO_PKG_VERSION"),
            CniVersion::list()
        );
    }
    let mut stdin = Vec::new();
    // One byte more than is allowed tells that it is too long.
    let read = std::io::stdin()
        .lock()
        .take(config::CONFIG_LEN_MAX as u64 + 1)
        .read_to_end(&mut stdin);
    let outcome = match read {
        Ok(_) => isthmus_cni::run(&environment, &stdin),
        Err(error) => {
            let error = CniError::new(Code::Io, format!("cannot read standard input: {error}"));
            Outcome {
                stdout: error.to_json(CniVersion::CURRENT),
                success: false,
            }
        }
    };
    match std::io::stdout().write_all(outcome.stdout.as_bytes()) {
        Ok(()) if outcome.success => ExitCode::SUCCESS,
        Ok(()) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("isthmus-cni: cannot write to standard output: {error}");
            ExitCode::FAILURE
        }
    }
}
