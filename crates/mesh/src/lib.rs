//! Merges clusters into desired state and plans ordered map operations.
//!
//! In: frames, slices, nodes and address entries of every cluster, as typed events; which clusters answer; which sources are
//! listed in full; a dump of the maps at start. Out: [`Plan`]s, map operations in an order that is safe to stop anywhere.
//!
//! Invariants:
//! - No I/O, no clock, no async, no logging. Same events in the same order, same output.
//! - Whatever the order of events, the same tables end up in the same maps (numbers of services, backends and zones apart).
//! - Every prefix of a plan leaves every lookup with a backend of the old or of the new desired state.
//! - Nothing that was restored goes away before every source that it may belong to is listed in full.
//!
//! Never: etcd keys, JSON, Kubernetes objects, syscalls. Rules are Cilium's where it has them
//! (`pkg/clustermesh/loadbalancer`, `pkg/ipcache`, `pkg/node/manager`).

mod address;
mod ids;
mod indexed;
mod intern;
pub mod ipcache;
pub mod loadbalancer;
pub mod maglev;
mod mix;
pub mod op;
pub mod reach;
pub mod reconcile;
pub mod routes;
mod slab;
pub mod source;

pub use address::{Family, to_address, to_ip};
pub use ids::IdAllocator;
pub use ipcache::Ipcache;
pub use loadbalancer::LoadBalancer;
pub use maglev::MaglevConfig;
pub use op::{LbDump, MapOp, Plan};
pub use reach::Reach;
pub use reconcile::Reconciler;
pub use routes::{Route, RouteOp, Routes};
pub use source::{Source, SourceTable};
