//! Cluster name, cluster ID and the size of the mesh.
//!
//! Rules: Cilium's `pkg/clustermesh/types/option.go`. A name is 1 to 32 of `a-z 0-9 -` and begins and ends alphanumeric;
//! an ID is 1 to 255 or 511, by the mesh's `max-connected-clusters`.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

/// How many clusters the mesh may have; the same in every cluster of a mesh. Decides how identity numbers are split.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum MaxConnectedClusters {
    /// 255 clusters, 65,536 identities each.
    #[default]
    C255,
    /// 511 clusters, 32,768 identities each.
    C511,
}

impl MaxConnectedClusters {
    /// The number itself: 255 or 511.
    pub const fn number(self) -> u16 {
        match self {
            Self::C255 => 255,
            Self::C511 => 511,
        }
    }

    /// How many low bits of an identity are the cluster's own.
    pub const fn identity_shift(self) -> u32 {
        match self {
            Self::C255 => 16,
            Self::C511 => 15,
        }
    }
}

/// `max-connected-clusters` was neither 255 nor 511.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("max-connected-clusters is {0:?}; it takes 255 or 511, the same in every cluster of the mesh")]
pub struct MaxConnectedClustersError(String);

impl FromStr for MaxConnectedClusters {
    type Err = MaxConnectedClustersError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "255" => Ok(Self::C255),
            "511" => Ok(Self::C511),
            other => Err(MaxConnectedClustersError(other.to_owned())),
        }
    }
}

impl fmt::Display for MaxConnectedClusters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.number().fmt(f)
    }
}

/// A cluster's number in the mesh, 1 to 511. (0 means "no mesh" to Cilium and is no `ClusterId`.)
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ClusterId(u16);

/// A number that cannot be a cluster's ID.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("cluster ID {got} is out of range; it takes 1 to {max}")]
pub struct ClusterIdError {
    got: String,
    max: u16,
}

impl ClusterId {
    /// Checks `id` against the size of the mesh.
    pub fn new(id: u32, max: MaxConnectedClusters) -> Result<Self, ClusterIdError> {
        match u16::try_from(id) {
            Ok(id) if id >= 1 && id <= max.number() => Ok(Self(id)),
            _ => Err(ClusterIdError {
                got: id.to_string(),
                max: max.number(),
            }),
        }
    }

    /// The number.
    pub const fn get(self) -> u16 {
        self.0
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for ClusterId {
    type Err = ClusterIdError;

    /// Accepts the widest range; check again with [`ClusterId::new`] where the mesh's size is known.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let max = MaxConnectedClusters::C511;
        let id = text.parse::<u32>().map_err(|_| ClusterIdError {
            got: format!("{text:?}"),
            max: max.number(),
        })?;
        Self::new(id, max)
    }
}

/// A cluster's name. Cheap to clone.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ClusterName(Arc<str>);

/// A text that cannot be a cluster's name.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "cluster name {0:?} is invalid; it takes 1 to 32 characters of a-z, 0-9 and '-', the first and last alphanumeric"
)]
pub struct ClusterNameError(String);

impl ClusterName {
    /// Longest name, in bytes.
    pub const MAX_LEN: usize = 32;

    /// Checks `name`.
    pub fn new(name: &str) -> Result<Self, ClusterNameError> {
        let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let bytes = name.as_bytes();
        let valid = bytes.len() <= Self::MAX_LEN
            && bytes.first().is_some_and(alphanumeric)
            && bytes.last().is_some_and(alphanumeric)
            && bytes.iter().all(|byte| alphanumeric(byte) || *byte == b'-');
        if valid {
            Ok(Self(name.into()))
        } else {
            Err(ClusterNameError(name.chars().take(64).collect()))
        }
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for ClusterName {
    type Err = ClusterNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::new(text)
    }
}

impl TryFrom<String> for ClusterName {
    type Error = ClusterNameError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::new(&text)
    }
}

impl From<ClusterName> for String {
    fn from(name: ClusterName) -> Self {
        name.as_str().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_rule() {
        let longest = "a".repeat(32);
        for name in ["a", "a-b", "0", longest.as_str()] {
            assert!(ClusterName::new(name).is_ok(), "{name}");
        }
        let long = "a".repeat(33);
        for name in ["", "-a", "a-", "A", "a_b", "a/b", "ä", long.as_str()] {
            assert!(ClusterName::new(name).is_err(), "{name}");
        }
    }

    #[test]
    fn ids_follow_the_size_of_the_mesh() {
        use MaxConnectedClusters::{C255, C511};
        for (id, max, ok) in [
            (0, C255, false),
            (1, C255, true),
            (255, C255, true),
            (256, C255, false),
            (511, C511, true),
            (512, C511, false),
            (65_537, C511, false),
        ] {
            assert_eq!(ClusterId::new(id, max).is_ok(), ok, "{id} of {max}");
        }
    }
}
