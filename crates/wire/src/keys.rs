//! Keys: prefixes, how a key is built, and how its parts are read back.
//!
//! Every base prefix has a *state* form, which a cluster's operator writes, and a *cache* form, under which an API server
//! mirrors remote clusters. All cache forms carry the cluster's name; the state forms of ip and identities do not.

use isthmus_model::{ClusterName, NumericIdentity, ServiceName};

use crate::refusal::{Refusal, shorten};

/// Rewritten by the operator at least once a minute; watched as a prefix.
pub const HEARTBEAT: &str = "cilium/.heartbeat";
/// Marks an etcd whose clusters publish a config (looked at by readers of Cilium 1.14 to 1.16).
pub const HAS_CLUSTER_CONFIG: &str = "cilium/.has-cluster-config";
/// Followed by the cluster's name.
pub const CLUSTER_CONFIG: &str = "cilium/cluster-config/";
/// Followed by the cluster's name, a slash and a base prefix.
pub const SYNCED: &str = "cilium/synced/";
/// Followed by a remote cluster's name: the mirror's status, for local agents.
pub const REMOTE_STATUS: &str = "isthmus/status/v1/remotes/";

/// What a key holds.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Kind {
    /// Node JSON.
    Nodes,
    /// IPIdentityPair JSON.
    Ip,
    /// Label strings.
    Identities,
    /// Cilium's ClusterService JSON.
    Services,
    /// Our service frames.
    Frames,
    /// Our endpoint slices.
    Slices,
}

/// Where a kind lives.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Scope {
    /// Written by the cluster's own operator, readable by other clusters.
    State,
    /// Mirror of a remote cluster.
    Cache,
    /// Written by the cluster's own operator for its own agents only.
    Local,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 6] = [
        Self::Nodes,
        Self::Ip,
        Self::Identities,
        Self::Services,
        Self::Frames,
        Self::Slices,
    ];

    /// Base prefix without a trailing slash, as the canaries name it. `None` where the kind has no such scope.
    pub const fn base_prefix(self, scope: Scope) -> Option<&'static str> {
        Some(match (self, scope) {
            (Self::Nodes, Scope::State) => "cilium/state/nodes/v1",
            (Self::Nodes, Scope::Cache) => "cilium/cache/nodes/v1",
            (Self::Ip, Scope::State) => "cilium/state/ip/v1",
            (Self::Ip, Scope::Cache) => "cilium/cache/ip/v1",
            (Self::Identities, Scope::State) => "cilium/state/identities/v1",
            (Self::Identities, Scope::Cache) => "cilium/cache/identities/v1",
            (Self::Services, Scope::State) => "cilium/state/services/v1",
            (Self::Services, Scope::Cache) => "cilium/cache/services/v1",
            (Self::Frames, Scope::State) => "isthmus/state/services/v1",
            (Self::Frames, Scope::Cache) => "isthmus/cache/services/v1",
            (Self::Frames, Scope::Local) => "isthmus/local/services/v1",
            (Self::Slices, Scope::State) => "isthmus/state/slices/v1",
            (Self::Slices, Scope::Cache) => "isthmus/cache/slices/v1",
            (Self::Slices, Scope::Local) => "isthmus/local/slices/v1",
            (_, Scope::Local) => return None,
        })
    }

    /// The prefix that holds all keys of `cluster`, with its trailing slash.
    pub fn prefix(self, scope: Scope, cluster: &ClusterName) -> Option<String> {
        let base = self.base_prefix(scope)?;
        Some(match (self, scope) {
            (Self::Ip, Scope::State) => format!("{base}/default/"),
            (Self::Identities, Scope::State) => format!("{base}/id/"),
            (Self::Identities, Scope::Cache) => format!("{base}/{cluster}/id/"),
            _ => format!("{base}/{cluster}/"),
        })
    }

    /// Largest value of this kind, in bytes.
    pub const fn value_len_max(self) -> usize {
        match self {
            Self::Services => crate::refusal::SERVICE_JSON_LEN_MAX,
            _ => crate::refusal::VALUE_LEN_MAX,
        }
    }
}

/// The canary that says that `cluster` has published everything under `kind`'s base prefix.
pub fn canary(cluster: &ClusterName, kind: Kind, scope: Scope) -> Option<String> {
    Some(format!("{SYNCED}{cluster}/{}", kind.base_prefix(scope)?))
}

/// The key of `cluster`'s config.
pub fn cluster_config(cluster: &ClusterName) -> String {
    format!("{CLUSTER_CONFIG}{cluster}")
}

/// `ns/name` part of a service key.
pub fn service_suffix(name: &ServiceName) -> String {
    format!("{}/{}", name.namespace, name.name)
}

/// `ns/name/slice` part of a slice key.
pub fn slice_suffix(service: &ServiceName, slice: &str) -> String {
    format!("{}/{}/{slice}", service.namespace, service.name)
}

/// The part of `key` after `prefix`, if it is there, short enough, and has no empty, `.` or `..` element.
pub fn suffix<'k>(key: &'k [u8], prefix: &str) -> Result<&'k str, Refusal> {
    let foreign = || Refusal::ForeignKey {
        key: shorten(&String::from_utf8_lossy(key)),
        prefix: prefix.to_owned(),
    };
    if key.len() > crate::refusal::KEY_LEN_MAX {
        return Err(foreign());
    }
    let rest = std::str::from_utf8(key)
        .ok()
        .and_then(|key| key.strip_prefix(prefix))
        .ok_or_else(foreign)?;
    if rest.split('/').any(|element| matches!(element, "" | "." | "..")) {
        return Err(foreign());
    }
    Ok(rest)
}

/// Reads the `ns/name` part of a service key.
pub fn parse_service(suffix: &str) -> Result<ServiceName, Refusal> {
    Ok(suffix.parse::<ServiceName>()?)
}

/// Reads the `ns/name/slice` part of a slice key.
pub fn parse_slice(suffix: &str) -> Result<(ServiceName, &str), Refusal> {
    let mut parts = suffix.splitn(3, '/');
    match (parts.next(), parts.next(), parts.next()) {
        (Some(namespace), Some(name), Some(slice))
            if !slice.is_empty() && slice.len() <= 253 && !slice.contains('/') =>
        {
            Ok((ServiceName::new(namespace, name)?, slice))
        }
        _ => Err(Refusal::malformed("slice key", suffix)),
    }
}

/// Reads the number of an identity key.
pub fn parse_identity(suffix: &str) -> Result<NumericIdentity, Refusal> {
    let digits = !suffix.is_empty() && suffix.len() <= 10 && suffix.bytes().all(|byte| byte.is_ascii_digit());
    let number = digits.then(|| suffix.parse().ok()).flatten();
    number
        .map(NumericIdentity)
        .ok_or_else(|| Refusal::malformed("identity key", suffix))
}

/// The exclusive end of the range of keys that begin with `prefix`; a single zero byte means "to the end" (etcd's rule).
pub fn range_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.last_mut() {
        if *last < 0xff {
            *last += 1;
            return end;
        }
        end.pop();
    }
    vec![0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn c1() -> ClusterName {
        ClusterName::new("c1").unwrap()
    }

    #[test]
    fn range_ends_agree_with_the_vectors() {
        assert_eq!(range_end(HEARTBEAT.as_bytes()), b"cilium/.heartbeau");
        assert_eq!(
            range_end(b"cilium/state/nodes/v1/c1/"),
            b"cilium/state/nodes/v1/c10"
        );
        assert_eq!(range_end(b"\x61\xff"), b"\x62");
        assert_eq!(range_end(b"\xff\xff"), b"\0");
    }

    #[test]
    fn canaries_and_prefixes_agree_with_the_vectors() {
        assert_eq!(
            canary(&c1(), Kind::Services, Scope::State).unwrap(),
            "cilium/synced/c1/cilium/state/services/v1"
        );
        assert_eq!(
            canary(&c1(), Kind::Identities, Scope::Cache).unwrap(),
            "cilium/synced/c1/cilium/cache/identities/v1"
        );
        assert_eq!(
            Kind::Ip.prefix(Scope::State, &c1()).unwrap(),
            "cilium/state/ip/v1/default/"
        );
        assert_eq!(
            Kind::Ip.prefix(Scope::Cache, &c1()).unwrap(),
            "cilium/cache/ip/v1/c1/"
        );
        assert_eq!(
            Kind::Identities.prefix(Scope::Cache, &c1()).unwrap(),
            "cilium/cache/identities/v1/c1/id/"
        );
        assert_eq!(Kind::Nodes.prefix(Scope::Local, &c1()), None);
    }

    #[test]
    fn keys_outside_the_prefix_are_refused() {
        let prefix = "cilium/state/nodes/v1/c1/";
        assert_eq!(suffix(b"cilium/state/nodes/v1/c1/n1", prefix).unwrap(), "n1");
        for key in [
            &b"cilium/state/nodes/v1/c10/n1"[..],
            b"cilium/state/nodes/v1/c1/",
            b"cilium/state/nodes/v1/c1/../x",
            b"cilium/state/nodes/v1/c1/a//b",
            b"\xff",
        ] {
            assert_eq!(suffix(key, prefix).unwrap_err().reason(), "foreign_key");
        }
    }

    #[test]
    fn identity_keys_are_plain_decimal() {
        assert_eq!(parse_identity("65553").unwrap(), NumericIdentity(65_553));
        for text in ["", "+1", "0x1", "-1", "4294967296", "1 "] {
            assert!(parse_identity(text).is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn range_end_bounds_exactly_the_prefix(prefix in proptest::collection::vec(any::<u8>(), 1..6), key in proptest::collection::vec(any::<u8>(), 0..8)) {
            let end = range_end(&prefix);
            let inside = key >= prefix && (end == [0] || key < end);
            prop_assert_eq!(inside, key.starts_with(&prefix));
        }

        #[test]
        fn hostile_keys_never_panic(key in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(rest) = suffix(&key, "") {
                let _ = (parse_slice(rest), parse_service(rest), parse_identity(rest));
            }
        }
    }
}
