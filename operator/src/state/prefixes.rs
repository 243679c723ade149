//! The prefixes under which a cluster's operator writes.

use isthmus_model::ClusterName;
use isthmus_wire::keys::{self, Kind, Scope};

/// Everything an operator publishes; each has a canary.
pub const PUBLISHED: [(Kind, Scope); 8] = [
    (Kind::Identities, Scope::State),
    (Kind::Ip, Scope::State),
    (Kind::Nodes, Scope::State),
    (Kind::Slices, Scope::State),
    (Kind::Slices, Scope::Local),
    (Kind::Frames, Scope::State),
    (Kind::Frames, Scope::Local),
    (Kind::Services, Scope::State),
];

/// The prefixes of one cluster, each with its trailing slash.
#[derive(Clone, Debug)]
pub struct Prefixes {
    pub(super) identities: String,
    pub(super) ip: String,
    pub(super) nodes: String,
    pub(super) slices: String,
    pub(super) slices_local: String,
    pub(super) frames: String,
    pub(super) frames_local: String,
    pub(super) services: String,
}

impl Prefixes {
    /// The prefixes of `cluster`.
    pub fn of(cluster: &ClusterName) -> Self {
        let [
            identities,
            ip,
            nodes,
            slices,
            slices_local,
            frames,
            frames_local,
            services,
        ] = PUBLISHED.map(|(kind, scope)| {
            // Each pair of PUBLISHED exists; a test goes through them.
            kind.prefix(scope, cluster)
                .expect("published kinds have a prefix")
        });
        Self {
            identities,
            ip,
            nodes,
            slices,
            slices_local,
            frames,
            frames_local,
            services,
        }
    }

    /// All of them.
    pub fn all(&self) -> [&str; 8] {
        [
            &self.identities,
            &self.ip,
            &self.nodes,
            &self.slices,
            &self.slices_local,
            &self.frames,
            &self.frames_local,
            &self.services,
        ]
    }

    /// Where identities are.
    pub fn identities(&self) -> &str {
        &self.identities
    }
}

/// The keys of all canaries of `cluster`.
pub fn canaries(cluster: &ClusterName) -> impl Iterator<Item = String> + '_ {
    PUBLISHED
        .into_iter()
        .filter_map(|(kind, scope)| keys::canary(cluster, kind, scope))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_where_readers_look() {
        let cluster = ClusterName::new("c1").unwrap();
        assert_eq!(
            Prefixes::of(&cluster).all(),
            [
                "cilium/state/identities/v1/id/",
                "cilium/state/ip/v1/default/",
                "cilium/state/nodes/v1/c1/",
                "isthmus/state/slices/v1/c1/",
                "isthmus/local/slices/v1/c1/",
                "isthmus/state/services/v1/c1/",
                "isthmus/local/services/v1/c1/",
                "cilium/state/services/v1/c1/",
            ]
        );
        assert_eq!(canaries(&cluster).count(), PUBLISHED.len());
    }
}
