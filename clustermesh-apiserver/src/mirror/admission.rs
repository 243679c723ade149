//! Whether a remote cluster may take part, from its cluster config. Pure.

use std::collections::BTreeMap;

use isthmus_model::{ClusterId, ClusterName, MaxConnectedClusters};
use isthmus_wire::{ClusterConfig, Refusal, keys::Scope};

/// IDs in use, each by one cluster.
#[derive(Debug)]
pub struct ClusterIds {
    own: ClusterId,
    taken: BTreeMap<ClusterId, ClusterName>,
}

impl ClusterIds {
    /// Only `own` is taken.
    pub fn new(own: ClusterId) -> Self {
        Self {
            own,
            taken: BTreeMap::new(),
        }
    }

    /// Takes `id` for `cluster`; it keeps what it has already.
    fn take(&mut self, id: ClusterId, cluster: &ClusterName) -> Result<(), NotAdmitted> {
        if id == self.own {
            return Err(NotAdmitted::OwnId(id));
        }
        match self.taken.get(&id) {
            Some(other) if other != cluster => Err(NotAdmitted::DuplicateId(id, other.clone())),
            _ => {
                self.taken.insert(id, cluster.clone());
                Ok(())
            }
        }
    }

    /// Gives up what `cluster` has taken.
    pub fn release(&mut self, cluster: &ClusterName) {
        self.taken.retain(|_, other| other != cluster);
    }
}

/// Why a remote cluster may not take part. It is asked again when its config or the others change.
#[derive(Debug, thiserror::Error)]
pub enum NotAdmitted {
    /// There is no cluster config.
    #[error(
        "the remote cluster publishes no cluster config; is its clustermesh-apiserver connected to its etcd?"
    )]
    NoConfig,
    /// It does not decode, or its ID is out of range.
    #[error("the remote cluster's config is not valid: {0}")]
    Config(#[source] Refusal),
    /// It has our ID.
    #[error("the remote cluster has ID {0}, which is this cluster's own; IDs must be unique in the mesh")]
    OwnId(ClusterId),
    /// It has another remote cluster's ID.
    #[error("the remote cluster has ID {0}, which is cluster {1}'s; IDs must be unique in the mesh")]
    DuplicateId(ClusterId, ClusterName),
    /// It is configured for a mesh of another size, so its identities mean something else.
    #[error(
        "the remote cluster has max-connected-clusters {got}, this one {want}; it must be the same in the whole mesh"
    )]
    MeshSize {
        /// What it says.
        got: u32,
        /// What we have.
        want: u16,
    },
}

/// A remote cluster that may take part.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Admitted {
    /// Its ID.
    pub id: ClusterId,
    /// It publishes frames and slices.
    pub slices: bool,
    /// Where its objects are: state, or a cache if what we read is itself a mirror.
    pub scope: Scope,
    /// A kind is complete only when its canary is there.
    pub canaries: bool,
    /// The config that is published for it here.
    pub mirrored: ClusterConfig,
}

/// Judges `config` (the key's value, if there is one) of `cluster`, and takes its ID if it is admitted.
pub fn admit(
    cluster: &ClusterName,
    config: Option<&[u8]>,
    max: MaxConnectedClusters,
    ids: &mut ClusterIds,
) -> Result<Admitted, NotAdmitted> {
    let config = ClusterConfig::decode(config.ok_or(NotAdmitted::NoConfig)?).map_err(NotAdmitted::Config)?;
    let theirs = match config.capabilities.max_connected_clusters {
        // Older releases knew one size only.
        0 => MaxConnectedClusters::C255.number().into(),
        number => number,
    };
    if theirs != u32::from(max.number()) {
        return Err(NotAdmitted::MeshSize {
            got: theirs,
            want: max.number(),
        });
    }
    let id = config.cluster_id(max).map_err(NotAdmitted::Config)?;
    ids.take(id, cluster)?;
    Ok(Admitted {
        id,
        slices: config.has_slices(),
        scope: if config.capabilities.cached {
            Scope::Cache
        } else {
            Scope::State
        },
        canaries: config.capabilities.synced_canaries,
        mirrored: config.mirrored(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_unique_and_sizes_agree() {
        let max = MaxConnectedClusters::C255;
        let id = |id| ClusterId::new(id, max).unwrap();
        let name = |name: &str| ClusterName::new(name).unwrap();
        let mut ids = ClusterIds::new(id(1));
        let mut check = |cluster: &str, config: &str| {
            admit(&name(cluster), Some(config.as_bytes()), max, &mut ids)
                .map(|admitted| admitted.id.get())
                .map_err(|error| error.to_string())
        };
        assert!(check("c2", r#"{"id":1}"#).unwrap_err().contains("own"));
        assert_eq!(
            check("c2", r#"{"id":2,"capabilities":{"maxConnectedClusters":255}}"#),
            Ok(2)
        );
        assert_eq!(check("c2", r#"{"id":2}"#), Ok(2), "it may keep its own");
        assert!(check("c3", r#"{"id":2}"#).unwrap_err().contains("cluster c2's"));
        assert!(
            check("c3", r#"{"id":3,"capabilities":{"maxConnectedClusters":511}}"#)
                .unwrap_err()
                .contains("511")
        );
        for bad in [r#"{"id":0}"#, r#"{"id":256}"#, "{}", "", "{\"id\":-1}"] {
            assert!(check("c3", bad).unwrap_err().contains("not valid"), "{bad}");
        }
        ids.release(&name("c2"));
        let admitted = admit(
            &name("c3"),
            Some(br#"{"id":2,"capabilities":{"cached":true,"syncedCanaries":true}}"#),
            max,
            &mut ids,
        );
        let admitted = admitted.unwrap();
        assert_eq!(
            (admitted.scope, admitted.canaries, admitted.slices),
            (Scope::Cache, true, false)
        );
        assert!(matches!(
            admit(&name("c4"), None, max, &mut ids),
            Err(NotAdmitted::NoConfig)
        ));
    }
}
