//! What a user asks for, checked once.

use std::collections::BTreeSet;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// What to build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The sandbox's name: 1 to 20 of `a-z 0-9 -`.
    pub name: String,
    /// The clusters.
    pub clusters: Vec<ClusterRequest>,
    /// Nodes per cluster: 1 to 9.
    pub nodes: u8,
    /// Whether pods and services have IPv6 addresses beside IPv4 ones.
    pub ipv6: bool,
    /// Whether Isthmus' own components run.
    pub components: bool,
    /// Where each cluster keeps its state.
    pub store: StoreKind,
}

/// Where a cluster's state is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum StoreKind {
    /// In an etcd.
    #[default]
    Etcd,
    /// In a file of its API server.
    Embedded,
}

/// One cluster to build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterRequest {
    /// The cluster name: 1 to 32 of `a-z 0-9 -`.
    pub name: String,
    /// The cluster ID: 1 to 99 in a sandbox, so that all address ranges differ.
    pub id: u16,
}

/// Why a request cannot be built. Each message names the flag, what it got and what it takes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The sandbox's name.
    #[error("--name: got `{0}`; it takes 1 to 20 characters of a-z, 0-9 and -, the first and last not a -")]
    Name(String),
    /// How many clusters.
    #[error("--clusters: got {0}; a sandbox has 1 to {MAX_CLUSTERS} clusters")]
    Clusters(usize),
    /// How many nodes.
    #[error("--nodes: got {0}; a cluster of a sandbox has 1 to {MAX_NODES} nodes")]
    Nodes(u8),
    /// Not `NAME=ID`.
    #[error("--cluster: got `{0}`; it takes NAME=ID, for example east=1")]
    ClusterSyntax(String),
    /// A cluster's name.
    #[error(
        "--cluster: got the name `{0}`; a cluster name has 1 to 32 characters of a-z, 0-9 and -, the first and last not a -"
    )]
    ClusterName(String),
    /// A cluster's ID.
    #[error("--cluster: got the ID {id} for `{name}`; in a sandbox cluster IDs are 1 to {MAX_ID}")]
    ClusterId {
        /// The cluster.
        name: String,
        /// Its ID.
        id: u16,
    },
    /// A name or ID used twice.
    #[error("--cluster: {0} is used twice; names and IDs of clusters must differ")]
    Duplicate(String),
}

/// Limited by the underlay's addresses: ten a cluster.
pub const MAX_CLUSTERS: usize = 20;
/// Limited by the underlay's addresses.
pub const MAX_NODES: u8 = 9;
/// Pods live in 10.ID.0.0/16 and services in 10.(100+ID).0.0/16.
pub const MAX_ID: u16 = 99;

impl Request {
    /// Refuses what cannot be built.
    pub fn check(&self) -> Result<(), RequestError> {
        if !is_label(&self.name, 20) {
            return Err(RequestError::Name(self.name.clone()));
        }
        if self.clusters.is_empty() || self.clusters.len() > MAX_CLUSTERS {
            return Err(RequestError::Clusters(self.clusters.len()));
        }
        if self.nodes == 0 || self.nodes > MAX_NODES {
            return Err(RequestError::Nodes(self.nodes));
        }
        let (mut names, mut ids) = (BTreeSet::new(), BTreeSet::new());
        for ClusterRequest { name, id } in &self.clusters {
            if !is_label(name, 32) {
                return Err(RequestError::ClusterName(name.clone()));
            }
            if *id == 0 || *id > MAX_ID {
                return Err(RequestError::ClusterId {
                    name: name.clone(),
                    id: *id,
                });
            }
            if !names.insert(name) {
                return Err(RequestError::Duplicate(format!("the name `{name}`")));
            }
            if !ids.insert(id) {
                return Err(RequestError::Duplicate(format!("the ID {id}")));
            }
        }
        Ok(())
    }
}

impl ClusterRequest {
    /// `count` clusters with the usual names and IDs: east 1, west 2, north 3, south 4, c5, c6 ...
    pub fn defaults(count: usize) -> Vec<Self> {
        (1..=count)
            .map(|number| Self {
                name: match number {
                    1 => "east".into(),
                    2 => "west".into(),
                    3 => "north".into(),
                    4 => "south".into(),
                    _ => format!("c{number}"),
                },
                id: number as u16,
            })
            .collect()
    }

    /// Reads `NAME=ID`.
    pub fn parse(text: &str) -> Result<Self, RequestError> {
        let refuse = || RequestError::ClusterSyntax(text.into());
        let (name, id) = text.split_once('=').ok_or_else(refuse)?;
        Ok(Self {
            name: name.into(),
            id: id.parse().map_err(|_| refuse())?,
        })
    }
}

/// Whether `text` is a name of at most `max` characters as RFC 1123 labels are.
pub fn is_label(text: &str, max: usize) -> bool {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=max).contains(&text.len())
        && text.chars().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}
