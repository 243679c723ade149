//! Protobuf: etcd's v3 subset and the agent's local API.
//!
//! The code in `gen` is made from the `.proto` files by `cargo xtask codegen` and committed, so that a build needs no protoc
//! for it; a check fails when the two differ.

/// Metadata of a call whose sender knows that a server may hold several sources, each under its own cluster ID, and wants to
/// see those. Whoever does not say so is shown one ID on everything.
pub const COMPOSITE: &str = "isthmus-composite";

#[allow(missing_docs, clippy::all, rustdoc::all)]
#[rustfmt::skip]
#[path = "gen/etcdserverpb.rs"]
/// etcd's requests, responses and services.
pub mod etcdserverpb;

#[allow(missing_docs, clippy::all, rustdoc::all)]
#[rustfmt::skip]
#[path = "gen/mvccpb.rs"]
/// etcd's key-value messages.
pub mod mvccpb;

#[allow(missing_docs, clippy::all, rustdoc::all)]
#[rustfmt::skip]
#[path = "gen/isthmus.agent.v1.rs"]
/// The agent's local API.
pub mod agent;
