//! The border: a remote cluster's key to the key of its mirror, and the checks that its value must pass: those of every
//! reader, and what the receiver grants. Pure.

use std::sync::Arc;

use isthmus_model::{ClusterId, ClusterName, IdentityRange, MaxConnectedClusters};
use isthmus_wire::{
    Refusal, identity, ip,
    keys::{self, Kind, Scope},
    node, service, slice,
};

use super::grants::Grants;

/// One kind of one remote cluster's objects.
#[derive(Clone, Debug)]
pub struct Border {
    kind: Kind,
    cluster: ClusterName,
    id: ClusterId,
    range: IdentityRange,
    grants: Arc<Grants>,
    from: String,
    to: String,
}

impl Border {
    /// For `kind` of `cluster` with `id`, read from `scope`. `None` if the kind has no such scope.
    pub fn new(
        kind: Kind,
        scope: Scope,
        cluster: &ClusterName,
        id: ClusterId,
        max: MaxConnectedClusters,
    ) -> Option<Self> {
        Some(Self {
            kind,
            cluster: cluster.clone(),
            id,
            range: IdentityRange::of(id, max),
            grants: Arc::default(),
            from: kind.prefix(scope, cluster)?,
            to: kind.prefix(Scope::Cache, cluster)?,
        })
    }

    /// The same with what the receiver grants.
    pub fn with_grants(self, grants: Arc<Grants>) -> Self {
        Self { grants, ..self }
    }

    /// The remote cluster's key for the mirror's `key`.
    pub fn source_key(&self, key: &[u8]) -> Result<String, Refusal> {
        Ok(format!("{}{}", self.from, keys::suffix(key, &self.to)?))
    }

    /// The prefix that is read.
    pub fn prefix(&self) -> &str {
        &self.from
    }

    /// The mirror's key for the remote cluster's `key`.
    pub fn translate(&self, key: &[u8]) -> Result<String, Refusal> {
        // An address may be a prefix with its length, which puts a slash into the last part.
        Ok(format!("{}{}", self.to, keys::suffix(key, &self.from)?))
    }

    /// Checks an object as its readers will, and returns the mirror's key.
    pub fn check(&self, key: &[u8], value: &[u8]) -> Result<String, Refusal> {
        let suffix = keys::suffix(key, &self.from)?;
        let grants = &self.grants;
        match self.kind {
            Kind::Nodes => {
                let node = node::decode(suffix, value, &self.cluster, self.id)?;
                grants.node(&node, value)?;
            }
            Kind::Ip => grants.ip(&ip::decode(suffix, value, self.range)?)?,
            Kind::Identities => {
                let number = keys::parse_identity(suffix)?;
                let labels = identity::decode(number, value, &self.cluster, self.range)?;
                grants.identity_labels(number, &labels)?;
            }
            Kind::Services => {
                let (frame, slices) = service::decode(suffix, value, &self.cluster, self.id)?;
                grants.frame(&frame)?;
                slices.iter().try_for_each(|slice| grants.slice(slice))?;
            }
            Kind::Frames => grants.frame(&slice::decode_frame(suffix, value, &self.cluster, self.id)?)?,
            Kind::Slices => grants.slice(&slice::decode_slice(suffix, value, &self.cluster, self.id)?)?,
        }
        Ok(format!("{}{suffix}", self.to))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn border(kind: Kind, scope: Scope) -> Border {
        let max = MaxConnectedClusters::C255;
        let cluster = ClusterName::new("c1").unwrap();
        Border::new(kind, scope, &cluster, ClusterId::new(1, max).unwrap(), max).unwrap()
    }

    #[test]
    fn keys_translate_as_ciliums_do() {
        for (kind, scope, from, to) in [
            (
                Kind::Ip,
                Scope::State,
                "cilium/state/ip/v1/default/10.1.0.21",
                "cilium/cache/ip/v1/c1/10.1.0.21",
            ),
            (
                Kind::Ip,
                Scope::State,
                "cilium/state/ip/v1/default/10.1.0.0/24",
                "cilium/cache/ip/v1/c1/10.1.0.0/24",
            ),
            (
                Kind::Identities,
                Scope::State,
                "cilium/state/identities/v1/id/65553",
                "cilium/cache/identities/v1/c1/id/65553",
            ),
            (
                Kind::Nodes,
                Scope::State,
                "cilium/state/nodes/v1/c1/n1",
                "cilium/cache/nodes/v1/c1/n1",
            ),
            (
                Kind::Services,
                Scope::Cache,
                "cilium/cache/services/v1/c1/a/b",
                "cilium/cache/services/v1/c1/a/b",
            ),
            (
                Kind::Slices,
                Scope::State,
                "isthmus/state/slices/v1/c1/a/b/s",
                "isthmus/cache/slices/v1/c1/a/b/s",
            ),
        ] {
            assert_eq!(border(kind, scope).translate(from.as_bytes()).unwrap(), to);
        }
        let foreign = border(Kind::Nodes, Scope::State).translate(b"cilium/state/nodes/v1/c10/n1");
        assert_eq!(foreign.unwrap_err().reason(), "foreign_key");
    }

    proptest! {
        #[test]
        fn translation_is_one_to_one_and_stays_under_the_mirror(kind in 0..Kind::ALL.len(), a in "[a-c/.]{0,6}", b in "[a-c/.]{0,6}", value in proptest::collection::vec(any::<u8>(), 0..50)) {
            let border = border(Kind::ALL[kind], Scope::State);
            let key = |suffix: &str| format!("{}{suffix}", border.prefix()).into_bytes();
            let (left, right) = (border.translate(&key(&a)), border.translate(&key(&b)));
            if let (Ok(left), Ok(right)) = (left, right) {
                prop_assert_eq!(left == right, a == b);
                prop_assert!(left.starts_with(&border.to));
                prop_assert!(!left.split('/').any(|part| matches!(part, "" | "." | "..")));
            }
            let _ = border.check(&key(&a), &value);
        }
    }
}
