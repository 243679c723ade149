//! Logs, metrics, admin endpoint, shutdown, backoff.
