//! Logs: tracing to standard error, as text or JSON, and the names of fields that several crates log.

use tracing_subscriber::EnvFilter;

/// Field names, the same in every crate.
pub mod field {
    /// Cluster name.
    pub const CLUSTER: &str = "cluster";
    /// Kvstore key.
    pub const KEY: &str = "key";
    /// Why an object was refused.
    pub const REASON: &str = "reason";
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The level or filter does not parse, or logging was set up before.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// `--log-level` does not parse.
    #[error(
        "log level {level:?} is not valid; it takes error, warn, info, debug, trace or a filter like info,isthmus_mesh=debug"
    )]
    Level {
        /// What it was given.
        level: String,
        /// Why not.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// Set up twice.
    #[error("logging is set up already")]
    Twice(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Sets logging up for the process.
pub fn init(format: LogFormat, level: &str) -> Result<(), TelemetryError> {
    let filter = EnvFilter::builder()
        .parse(level)
        .map_err(|source| TelemetryError::Level {
            level: level.to_owned(),
            source,
        })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().try_init(),
    }
    .map_err(TelemetryError::Twice)
}
