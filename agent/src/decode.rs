//! From keys and values of the kvstore to typed objects, and what to do with those that are refused.
//!
//! In: bytes, and the source that they came from. Out: objects, or a [`Refusal`]. Pure.
//!
//! Invariant: a refused object is counted by cluster and reason, logged once per object and otherwise ignored; what was
//! known of it before stays.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use isthmus_model::{
    ClusterId, ClusterName, IdentityRange, IpEntry, Labels, Node, NumericIdentity, ServiceFrame, ServiceName,
    Slice,
};
use isthmus_wire::{
    Refusal, identity, ip,
    keys::{self, Kind, Scope},
    node, service, slice,
};

/// Where objects of one kind of one cluster come from.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Source {
    /// The cluster.
    pub cluster: ClusterName,
    /// Its ID.
    pub cluster_id: ClusterId,
    /// What they are.
    pub kind: Kind,
    /// Under which prefix.
    pub scope: Scope,
}

impl Source {
    /// The prefix of its keys. Empty for a scope that the kind does not have, which no [`Source`] of ours names.
    pub fn prefix(&self) -> String {
        self.kind.prefix(self.scope, &self.cluster).unwrap_or_default()
    }
}

/// An object.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// A node.
    Node(Node),
    /// What an address means.
    Ip(IpEntry),
    /// An identity's labels.
    Identity(NumericIdentity, Labels),
    /// A service without its endpoints.
    Frame(ServiceFrame),
    /// Some endpoints of a service.
    Slice(Slice),
    /// A whole service in Cilium's form: replaces the frame and all slices.
    Service(ServiceFrame, Vec<Slice>),
}

/// Names an object.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum ObjectName {
    /// A node's name.
    Node(String),
    /// An address or prefix.
    Ip(IpNet),
    /// An identity.
    Identity(NumericIdentity),
    /// A frame, or a whole service in Cilium's form.
    Service(ServiceName),
    /// A slice.
    Slice(ServiceName, Box<str>),
}

/// Reads the name in `key`.
pub fn object_name(source: &Source, key: &[u8]) -> Result<ObjectName, Refusal> {
    let suffix = keys::suffix(key, &source.prefix())?;
    let foreign = || Refusal::ForeignKey {
        key: suffix.chars().take(128).collect(),
        prefix: source.prefix(),
    };
    Ok(match source.kind {
        Kind::Nodes if suffix.contains('/') => return Err(foreign()),
        Kind::Nodes => ObjectName::Node(suffix.to_owned()),
        Kind::Ip => {
            let single = suffix.parse::<std::net::IpAddr>().map(IpNet::from);
            ObjectName::Ip(single.or_else(|_| suffix.parse()).map_err(|_| foreign())?)
        }
        Kind::Identities => ObjectName::Identity(keys::parse_identity(suffix)?),
        Kind::Services | Kind::Frames => ObjectName::Service(keys::parse_service(suffix)?),
        Kind::Slices => {
            let (service, slice) = keys::parse_slice(suffix)?;
            ObjectName::Slice(service, slice.into())
        }
    })
}

/// Reads an object.
pub fn object(source: &Source, range: IdentityRange, key: &[u8], value: &[u8]) -> Result<Object, Refusal> {
    let prefix = source.prefix();
    let suffix = keys::suffix(key, &prefix)?;
    let (cluster, id) = (&source.cluster, source.cluster_id);
    Ok(match source.kind {
        Kind::Nodes => Object::Node(node::decode(suffix, value, cluster, id)?),
        Kind::Ip => Object::Ip(ip::decode(suffix, value, range)?),
        Kind::Identities => {
            let number = keys::parse_identity(suffix)?;
            Object::Identity(number, identity::decode(number, value, cluster, range)?)
        }
        Kind::Services => {
            let (frame, slices) = service::decode(suffix, value, cluster, id)?;
            Object::Service(frame, slices)
        }
        Kind::Frames => Object::Frame(slice::decode_frame(suffix, value, cluster, id)?),
        Kind::Slices => Object::Slice(slice::decode_slice(suffix, value, cluster, id)?),
    })
}

/// Refused objects: how many, why, and which ones were told of.
#[derive(Debug, Default)]
pub struct Refusals {
    counts: BTreeMap<(ClusterName, &'static str), u64>,
    told: BTreeSet<Vec<u8>>,
}

impl Refusals {
    /// Most keys that are remembered as told. Beyond, they may be told again: forgetting all bounds memory and still
    /// keeps a flood to one line per key and round trip through this many others.
    const TOLD_MAX: usize = 10_000;

    /// Counts a refusal. True: it is the first of this key, so tell of it.
    pub fn count(&mut self, cluster: &ClusterName, key: &[u8], refusal: &Refusal) -> bool {
        *self
            .counts
            .entry((cluster.clone(), refusal.reason()))
            .or_default() += 1;
        if self.told.len() >= Self::TOLD_MAX {
            self.told.clear();
        }
        self.told.insert(key.iter().copied().take(512).collect())
    }

    /// An object of this key was accepted, or is gone: its next refusal is news.
    pub fn settle(&mut self, key: &[u8]) {
        if !self.told.is_empty() {
            self.told.remove(&key[..key.len().min(512)]);
        }
    }

    /// How many were refused, by cluster and reason.
    pub fn counts(&self) -> impl Iterator<Item = (&ClusterName, &'static str, u64)> {
        self.counts
            .iter()
            .map(|((cluster, reason), count)| (cluster, *reason, *count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use isthmus_model::MaxConnectedClusters;
    use proptest::prelude::*;

    fn source(kind: Kind) -> Source {
        Source {
            cluster: ClusterName::new("c2").unwrap(),
            cluster_id: ClusterId::new(2, MaxConnectedClusters::C255).unwrap(),
            kind,
            scope: Scope::Cache,
        }
    }

    #[test]
    fn keys_become_names() {
        let name = |kind, key: &str| object_name(&source(kind), key.as_bytes()).ok();
        let service = ServiceName::new("ns", "a").unwrap();
        assert_eq!(
            name(Kind::Nodes, "cilium/cache/nodes/v1/c2/n1"),
            Some(ObjectName::Node("n1".into()))
        );
        assert_eq!(name(Kind::Nodes, "cilium/cache/nodes/v1/c2/a/b"), None);
        assert_eq!(name(Kind::Nodes, "cilium/cache/nodes/v1/c20/n1"), None);
        for (text, prefix) in [
            ("10.2.0.1", "10.2.0.1/32"),
            ("10.2.0.0/16", "10.2.0.0/16"),
            ("fd00::1", "fd00::1/128"),
        ] {
            assert_eq!(
                name(Kind::Ip, &format!("cilium/cache/ip/v1/c2/{text}")),
                Some(ObjectName::Ip(prefix.parse().unwrap()))
            );
        }
        assert_eq!(
            name(Kind::Identities, "cilium/cache/identities/v1/c2/id/131082"),
            Some(ObjectName::Identity(NumericIdentity(131_082)))
        );
        assert_eq!(
            name(Kind::Slices, "isthmus/cache/slices/v1/c2/ns/a/s-1"),
            Some(ObjectName::Slice(service.clone(), "s-1".into()))
        );
        assert_eq!(
            name(Kind::Frames, "isthmus/cache/services/v1/c2/ns/a"),
            Some(ObjectName::Service(service))
        );
    }

    #[test]
    fn a_refused_object_is_told_of_once_until_it_was_good() {
        let mut refusals = Refusals::default();
        let cluster = ClusterName::new("c2").unwrap();
        let refusal = Refusal::Missing("IP");
        assert!(refusals.count(&cluster, b"k", &refusal));
        assert!(!refusals.count(&cluster, b"k", &refusal));
        refusals.settle(b"k");
        assert!(refusals.count(&cluster, b"k", &refusal));
        assert_eq!(
            refusals.counts().collect::<Vec<_>>(),
            [(&cluster, "missing_field", 3)]
        );
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(key in ".{0,60}", value in proptest::collection::vec(any::<u8>(), 0..60)) {
            let range = IdentityRange::of(
                ClusterId::new(2, MaxConnectedClusters::C255).unwrap(),
                MaxConnectedClusters::C255,
            );
            for kind in Kind::ALL {
                let source = source(kind);
                let key = format!("{}{key}", source.prefix());
                let _ = object_name(&source, key.as_bytes());
                let _ = object(&source, range, key.as_bytes(), &value);
            }
        }
    }
}
