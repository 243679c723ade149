//! The cluster config: what a cluster says about itself under `cilium/cluster-config/<c>`.
//!
//! Source: Cilium's `pkg/clustermesh/types/types.go`. The object `isthmus` is ours; Go's JSON ignores it.

use isthmus_model::{ClusterId, MaxConnectedClusters};
use serde::{Deserialize, Serialize};

use crate::refusal::{Refusal, VALUE_LEN_MAX};

/// JSON of a cluster config.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct ClusterConfig {
    /// Cluster ID; 0 or absent is an error for readers.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub id: u32,
    /// What readers may expect.
    #[serde(default)]
    pub capabilities: Capabilities,
    /// Set by Isthmus only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub isthmus: Option<IsthmusCapabilities>,
}

/// JSON of `capabilities`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Capabilities {
    /// Readers wait for `cilium/synced/<c>/...` before they watch a prefix.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub synced_canaries: bool,
    /// The data lives under `cilium/cache`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cached: bool,
    /// 255 or 511.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub max_connected_clusters: u32,
    /// Absent: prefix not supported. False: supported and off. True: on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_exports_enabled: Option<bool>,
}

/// JSON of `isthmus`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct IsthmusCapabilities {
    /// Version of the frames and slices under `isthmus/`; 0 = none, 1 = today's.
    #[serde(default)]
    pub slices: u32,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

impl ClusterConfig {
    /// What our operator writes for its own cluster.
    pub fn of_cluster(id: ClusterId, max: MaxConnectedClusters) -> Self {
        Self {
            id: id.get().into(),
            capabilities: Capabilities {
                synced_canaries: true,
                cached: false,
                max_connected_clusters: max.number().into(),
                service_exports_enabled: None,
            },
            isthmus: Some(IsthmusCapabilities { slices: 1 }),
        }
    }

    /// What a mirror writes for a remote cluster.
    pub fn mirrored(&self) -> Self {
        let mut copy = self.clone();
        copy.capabilities.cached = true;
        copy.capabilities.synced_canaries = true;
        copy
    }

    /// Whether readers should use Isthmus' frames and slices instead of Cilium's service JSON.
    pub fn has_slices(&self) -> bool {
        self.isthmus.as_ref().is_some_and(|isthmus| isthmus.slices >= 1)
    }

    /// The ID, checked against the size of our mesh.
    pub fn cluster_id(&self, max: MaxConnectedClusters) -> Result<ClusterId, Refusal> {
        Ok(ClusterId::new(self.id, max)?)
    }

    /// Reads a config. Unknown fields are ignored, as Cilium does.
    pub fn decode(value: &[u8]) -> Result<Self, Refusal> {
        Refusal::check_len(value, VALUE_LEN_MAX)?;
        serde_json::from_slice(value).map_err(Refusal::Json)
    }

    /// Writes a config.
    pub fn encode(&self) -> Vec<u8> {
        crate::json(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_what_cilium_reads() {
        let config = ClusterConfig {
            isthmus: None,
            ..ClusterConfig::of_cluster(
                ClusterId::new(3, MaxConnectedClusters::C255).unwrap(),
                MaxConnectedClusters::C255,
            )
        };
        let want = r#"{"id":3,"capabilities":{"syncedCanaries":true,"maxConnectedClusters":255}}"#;
        assert_eq!(String::from_utf8(config.encode()).unwrap(), want);
        assert_eq!(ClusterConfig::decode(want.as_bytes()).unwrap(), config);
    }

    #[test]
    fn unknown_fields_are_ignored_and_absent_differs_from_false() {
        let config = ClusterConfig::decode(
            br#"{"id":1,"new":{},"capabilities":{"serviceExportsEnabled":false,"x":1}}"#,
        )
        .unwrap();
        assert_eq!(config.capabilities.service_exports_enabled, Some(false));
        assert!(!config.has_slices());
        assert!(ClusterConfig::decode(b"{").is_err());
        assert!(
            ClusterConfig::decode(b"{}")
                .unwrap()
                .cluster_id(MaxConnectedClusters::C255)
                .is_err()
        );
    }
}
