//! What every daemon needs around its work: flags, logs, metrics, an admin endpoint, health, shutdown, backoff.
//!
//! In: flags and signals. Out: log lines on standard error, an HTTP endpoint for probes and metrics, a cancellation token.
//! Nothing here knows Kubernetes, etcd or BPF. [`backoff`] is pure; time and randomness come in as arguments.

pub mod admin;
pub mod backoff;
pub mod command_line;
pub mod health;
pub mod metrics;
pub mod shutdown;
pub mod telemetry;

pub use backoff::Backoff;
pub use health::{Health, State};
pub use metrics::Metrics;
pub use tokio_util::sync::CancellationToken;
