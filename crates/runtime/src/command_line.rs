//! Flags every daemon has, and exit codes: 0 done, 1 failed, 64 a flag is wrong (`EX_USAGE`).

use std::{fmt::Display, process::ExitCode};

use clap::Parser;

use crate::telemetry::LogFormat;

/// Exit code for a wrong flag or flag value.
pub const EXIT_USAGE: u8 = 64;

/// Log flags, the same in every daemon.
#[derive(Clone, Debug, clap::Args)]
pub struct LogArgs {
    /// How log lines look.
    #[arg(long, env = "ISTHMUS_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Least severe level that is logged: error, warn, info, debug, trace, or a filter such as `info,isthmus_mesh=debug`.
    #[arg(long, env = "ISTHMUS_LOG_LEVEL", default_value = "info")]
    pub log_level: String,
}

/// Parses the command line; on a mistake prints one message and exits with [`EXIT_USAGE`].
pub fn parse<T: Parser>() -> T {
    T::try_parse().unwrap_or_else(|error| {
        let help = matches!(
            error.kind(),
            clap::error::ErrorKind::DisplayHelp | clap::error::ErrorKind::DisplayVersion
        );
        // Nothing more can be done if the terminal is gone.
        let _ = error.print();
        std::process::exit(if help { 0 } else { EXIT_USAGE.into() });
    })
}

/// Reports that a flag's value is wrong, where clap could not know.
#[derive(Debug, thiserror::Error)]
#[error("--{flag} is {got:?}: {why}")]
pub struct FlagError {
    /// Flag without dashes.
    pub flag: &'static str,
    /// What it was given.
    pub got: String,
    /// What is wrong and what it takes.
    pub why: String,
}

impl FlagError {
    /// A flag error from any displayable reason.
    pub fn new(flag: &'static str, got: impl Display, why: impl Display) -> Self {
        Self {
            flag,
            got: got.to_string(),
            why: why.to_string(),
        }
    }
}

/// Turns a binary's result into its exit code, with the whole chain of causes on standard error.
pub fn exit_code(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            if error.downcast_ref::<FlagError>().is_some() {
                ExitCode::from(EXIT_USAGE)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}
