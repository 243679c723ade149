//! Domain values that cannot be wrong: ids, names, labels, addresses, services, nodes.
//!
//! In: raw strings and numbers from flags, Kubernetes and the kvstore. Out: values whose constructors have checked them.
//! Nothing here knows JSON keys, etcd, Kubernetes types or BPF layouts; those live in `wire`, `kvstore`, `k8s` and `bpf-abi`.
//!
//! Invariants: a value that exists is valid; every type has a total order, so that output built from it is deterministic.

pub mod cluster;
pub mod identity;
pub mod ipentry;
pub mod labels;
pub mod node;
pub mod preference;
pub mod service;
pub mod traffic;

pub use cluster::{ClusterId, ClusterIdError, ClusterName, ClusterNameError, MaxConnectedClusters};
pub use identity::{IdentityRange, NumericIdentity};
pub use ipentry::{IpEntry, NamedPort};
pub use labels::{Label, LabelParseError, Labels};
pub use node::Node;
pub use preference::{MinHealthy, Preference, TierCluster, Tiers};
pub use service::{
    Affinity, Protocol, ServiceFrame, ServiceName, ServiceNameError, ServicePort, ServiceType,
    SessionAffinity, Slice, SliceEndpoint, SlicePort,
};
pub use traffic::{Algorithm, Traffic, TrafficPolicy};

/// A position in one etcd's history: etcd's 64-bit store revision. Revisions of different clusters do not compare.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Revision(pub i64);

impl std::fmt::Display for Revision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}
