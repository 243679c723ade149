//! Serves a cluster's state to other clusters and mirrors theirs.

pub mod store;
