//! Cilium's cluster-mesh keyspace, and Isthmus' own keys beside it: keys and values to and from the model, with limits.
//!
//! In: bytes from a kvstore that another party wrote. Out: model values that passed the checks of Cilium's own readers,
//! or an error that says which check failed. The other way round: exactly the bytes that Cilium's readers accept.
//!
//! Invariants: no input panics; no value larger than its limit is decoded; `decode(encode(x)) == x`.
//! Facts are from Cilium's sources (`pkg/kvstore`, `pkg/clustermesh`, `pkg/node`, `pkg/identity`, `pkg/ipcache`).

pub mod config;
pub mod identity;
pub mod ip;
pub mod keys;
pub mod node;
pub mod refusal;
pub mod service;
pub mod slice;
pub mod status;

pub use config::ClusterConfig;
pub use refusal::{Grant, Refusal};

/// Serialises to JSON.
fn json<T: serde::Serialize>(value: &T) -> Vec<u8> {
    // Writing to memory cannot fail, and none of our types has a map with keys that are not text.
    serde_json::to_vec(value).unwrap_or_default()
}
