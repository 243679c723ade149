//! Why an object from a kvstore was not accepted.

use isthmus_model::{ClusterIdError, ClusterNameError, LabelParseError, ServiceNameError};

/// Largest value of every kind but Cilium's service JSON, in bytes.
pub const VALUE_LEN_MAX: usize = 1024 * 1024;
/// Largest value of Cilium's service JSON, in bytes: one blob holds all backends (787 KiB at 5,000).
pub const SERVICE_JSON_LEN_MAX: usize = 8 * 1024 * 1024;
/// Longest key that is looked at, in bytes.
pub const KEY_LEN_MAX: usize = 4096;

/// Why an object was refused. [`Refusal::reason`] is the label under which it is counted.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Value above the limit.
    #[error("value of {len} bytes is larger than the limit of {limit}")]
    TooLarge {
        /// Its length in bytes.
        len: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// Key that does not belong under the prefix it was found at.
    #[error("key {key:?} does not belong under {prefix:?}")]
    ForeignKey {
        /// The key, shortened.
        key: String,
        /// What was expected.
        prefix: String,
    },
    /// Value that does not decode.
    #[error("value is not valid JSON")]
    Json(#[source] serde_json::Error),
    /// Value that does not decode.
    #[error("value is not valid protobuf")]
    Protobuf(#[source] prost::DecodeError),
    /// Text that is not an address, CIDR or port map.
    #[error("{what} {text:?} is not valid")]
    Malformed {
        /// Which field.
        what: &'static str,
        /// Its text, shortened.
        text: String,
    },
    /// Cluster name in the object is not the cluster it came from.
    #[error("object names cluster {got:?}, but it came from {want:?}")]
    WrongCluster {
        /// What the object says.
        got: String,
        /// Where it came from.
        want: String,
    },
    /// Cluster ID in the object is not the one of the cluster it came from.
    #[error("object carries cluster ID {got}, but the cluster config says {want}")]
    WrongClusterId {
        /// What the object says.
        got: u32,
        /// What the cluster config says.
        want: u32,
    },
    /// Name in the object differs from its key.
    #[error("object is named {got:?}, but its key says {want:?}")]
    WrongName {
        /// What the object says.
        got: String,
        /// What the key says.
        want: String,
    },
    /// Identity outside the cluster's range.
    #[error("identity {0} is outside the cluster's range and not a reserved one")]
    IdentityRange(u32),
    /// Identity without the label that names its cluster.
    #[error("identity lacks the label k8s:io.cilium.k8s.policy.cluster={0}")]
    IdentityCluster(String),
    /// Label string that does not parse.
    #[error("label string does not parse")]
    Labels(#[source] LabelParseError),
    /// Cluster name that is not valid.
    #[error(transparent)]
    ClusterName(#[from] ClusterNameError),
    /// Cluster ID that is not valid.
    #[error(transparent)]
    ClusterId(#[from] ClusterIdError),
    /// Namespace or name that is not valid.
    #[error(transparent)]
    ServiceName(#[from] ServiceNameError),
    /// A field that must be there is empty.
    #[error("required field {0} is empty")]
    Missing(&'static str),
    /// More elements than a list may have.
    #[error("{what} has {len} elements, more than the limit of {limit}")]
    TooMany {
        /// Which list.
        what: &'static str,
        /// Its length.
        len: usize,
        /// The limit.
        limit: usize,
    },
    /// Something that the reader's configuration does not grant to the cluster it came from.
    #[error("{what} {got} is not granted; what this cluster may publish is said by {} under isthmus-accept in its file", grant.field())]
    NotGranted {
        /// Which grant does not cover it.
        grant: Grant,
        /// What it is.
        what: &'static str,
        /// Its text, shortened.
        got: String,
    },
    /// More bytes than the reader's configuration allows the cluster it came from.
    #[error(
        "with it the cluster's objects would be {bytes} bytes, more than the limit of {limit}; see max-bytes under isthmus-accept in its file"
    )]
    TooManyBytes {
        /// Bytes of all its objects with this one.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
}

/// What a reader grants to a remote cluster.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Grant {
    /// Numbers of security identities.
    Identities,
    /// Addresses of pods.
    PodCidrs,
    /// Addresses of nodes.
    NodeCidrs,
    /// Namespaces.
    Namespaces,
    /// Services, by namespace and name.
    Services,
}

impl Grant {
    /// Its name in the configuration.
    pub const fn field(self) -> &'static str {
        match self {
            Self::Identities => "identities",
            Self::PodCidrs => "pod-cidrs",
            Self::NodeCidrs => "node-cidrs",
            Self::Namespaces => "namespaces",
            Self::Services => "services",
        }
    }
}

impl Refusal {
    /// Refuses what a grant does not cover.
    pub fn not_granted(grant: Grant, what: &'static str, got: impl std::fmt::Display) -> Self {
        Self::NotGranted {
            grant,
            what,
            got: shorten(&got.to_string()),
        }
    }

    /// The label under which metrics and status count it.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "too_large",
            Self::ForeignKey { .. } => "foreign_key",
            Self::Json(_) | Self::Protobuf(_) => "malformed",
            Self::Malformed { .. } => "malformed_field",
            Self::WrongCluster { .. } => "wrong_cluster",
            Self::WrongClusterId { .. } => "wrong_cluster_id",
            Self::WrongName { .. } | Self::ServiceName(_) => "wrong_name",
            Self::IdentityRange(_) => "identity_range",
            Self::IdentityCluster(_) => "identity_cluster",
            Self::Labels(_) => "labels",
            Self::ClusterName(_) | Self::ClusterId(_) => "cluster_config",
            Self::Missing(_) => "missing_field",
            Self::TooMany { .. } => "too_many",
            Self::TooManyBytes { .. } => "too_many_bytes",
            Self::NotGranted { grant, .. } => match grant {
                Grant::Identities => "not_granted_identity",
                Grant::PodCidrs | Grant::NodeCidrs => "not_granted_cidr",
                Grant::Namespaces => "not_granted_namespace",
                Grant::Services => "not_granted_service",
            },
        }
    }

    /// Refuses `value` if it is larger than `limit` bytes.
    pub fn check_len(value: &[u8], limit: usize) -> Result<(), Self> {
        if value.len() > limit {
            Err(Self::TooLarge {
                len: value.len(),
                limit,
            })
        } else {
            Ok(())
        }
    }

    pub(crate) fn malformed(what: &'static str, text: &str) -> Self {
        Self::Malformed {
            what,
            text: shorten(text),
        }
    }
}

/// The first 128 characters, for messages.
pub(crate) fn shorten(text: &str) -> String {
    text.chars().take(128).collect()
}
