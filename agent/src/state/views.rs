//! The state as people see it: read-only questions, for status, tables and metrics.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use isthmus_mesh::{Ipcache, LoadBalancer, Routes};
use isthmus_model::{ClusterId, ClusterName, Labels, Node, NumericIdentity};
use isthmus_wire::{keys::Kind, status::RemoteStatus};

use super::{Identity, LocalTables, State};
use crate::{decode::Refusals, probe::NodeKey, sources::ConfigRefusal};

/// A cluster of the mesh.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ClusterView {
    /// Its name.
    pub name: ClusterName,
    /// Its ID.
    pub id: ClusterId,
    /// The own one.
    pub own: bool,
    /// Read through frames and slices.
    pub slices: bool,
    /// Listed in full.
    pub synced: bool,
    /// Everything listed was written to the maps once.
    pub applied: bool,
    /// Kinds that are not listed yet, with whether their canary is missing.
    pub missing: Vec<(Kind, bool)>,
}

/// A remote cluster: what the mirror says, and how far this node is.
#[derive(Clone, Debug)]
pub struct RemoteView {
    /// Its name.
    pub name: ClusterName,
    /// This node's view; `None` while its config is not known.
    pub cluster: Option<ClusterView>,
    /// The mirror's word; `None` if it says nothing about it.
    pub status: Option<RemoteStatus>,
    /// Why its config is refused.
    pub refused: Option<ConfigRefusal>,
    /// Its config is missing although it is still mirrored.
    pub config_gone: bool,
    /// Nodes known here.
    pub nodes: usize,
}

impl RemoteView {
    /// Whether the mirror has a connection to it. Mirrors that say nothing are trusted.
    pub fn is_connected(&self) -> bool {
        self.status.as_ref().is_none_or(|status| status.connected)
    }

    /// Whether a node that starts waits for it: it answers, or the first try to reach it is not over. A mirror that began
    /// a moment ago has not reached anybody yet.
    pub fn is_awaited(&self) -> bool {
        let tried = self.status.as_ref().is_some_and(|status| status.num_failures > 0);
        self.refused.is_none() && (self.is_connected() || !tried)
    }

    /// Connected, alive, accepted, listed in full, and written to this node's maps.
    pub fn is_ready(&self) -> bool {
        let mirrored = self
            .status
            .as_ref()
            .is_none_or(|status| status.connected && status.ready && !status.stale);
        mirrored && !self.config_gone && self.refused.is_none() && self.is_applied()
    }

    /// Everything of it was written to this node's maps once.
    pub fn is_applied(&self) -> bool {
        self.cluster.as_ref().is_some_and(|cluster| cluster.applied)
    }

    /// Services that it shares, by the mirror's count.
    pub fn services(&self) -> u64 {
        let objects = |kind: &str| {
            let status = self.status.as_ref()?;
            status.objects.get(kind).copied()
        };
        match self.cluster.as_ref().is_some_and(|cluster| cluster.slices) {
            true => objects("frames"),
            false => objects("services"),
        }
        .unwrap_or(0)
    }

    /// Why it is not ready, or "ready".
    pub fn summary(&self) -> String {
        if let Some(refusal) = &self.refused {
            return refusal.to_string();
        }
        if let Some(status) = &self.status {
            if !status.status.is_empty() {
                return status.status.clone();
            }
            if !status.connected {
                return "not connected".to_owned();
            }
        }
        let Some(cluster) = &self.cluster else {
            return "waiting for its cluster config".to_owned();
        };
        if let Some((kind, canary)) = cluster.missing.first() {
            let what = if *canary {
                "waiting for the mirror to have all"
            } else {
                "reading"
            };
            return format!("{what} {}", kind_name(*kind));
        }
        if !cluster.applied {
            return "being applied to the datapath of this node".to_owned();
        }
        if self.config_gone {
            return "the mirror began anew and has not reached it yet; what was known stays".to_owned();
        }
        "ready".to_owned()
    }
}

/// A node with what the agent makes of it.
#[derive(Clone, Debug)]
pub struct NodeView<'a> {
    /// The object.
    pub node: &'a Node,
    /// It is this node.
    pub own: bool,
}

/// A kind's name for people.
pub fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Nodes => "nodes",
        Kind::Ip => "address entries",
        Kind::Identities => "identities",
        Kind::Services | Kind::Frames => "services",
        Kind::Slices => "slices",
    }
}

impl State {
    /// Which cluster and node this is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The merge of services.
    pub fn lb(&self) -> &LoadBalancer {
        &self.lb
    }

    /// Services of the own cluster that are global.
    pub fn global_services(&self) -> usize {
        self.global.len()
    }

    /// The merge of addresses.
    pub fn ipcache(&self) -> &Ipcache {
        &self.ipcache
    }

    /// The merge of routes.
    pub fn routes(&self) -> &Routes {
        &self.routes
    }

    /// This node.
    pub fn local(&self) -> &LocalTables {
        &self.local
    }

    /// Identities with their labels.
    pub fn identities(&self) -> &BTreeMap<NumericIdentity, Labels> {
        &self.identities
    }

    /// Refused objects.
    pub fn refusals(&self) -> &Refusals {
        &self.refusals
    }

    /// How often the own cluster's heartbeat was seen to change.
    pub fn heartbeats(&self) -> u64 {
        self.heartbeats
    }

    /// All nodes, by cluster and name.
    pub fn nodes(&self) -> impl Iterator<Item = NodeView<'_>> {
        self.nodes.iter().map(|((cluster, name), node)| NodeView {
            node,
            own: *cluster == self.identity.cluster && *name == self.identity.node,
        })
    }

    /// Clusters that joined, by name.
    pub fn clusters(&self) -> impl Iterator<Item = ClusterView> + '_ {
        self.sources.clusters().map(|(name, cluster)| ClusterView {
            name: name.clone(),
            id: cluster.id,
            own: *name == self.identity.cluster,
            slices: cluster.slices,
            synced: cluster.is_synced(),
            applied: self.applied.contains(name),
            missing: cluster.missing().collect(),
        })
    }

    /// Whether all clusters of the mesh are known.
    pub fn is_listed(&self) -> bool {
        self.sources.is_listed()
    }

    /// The own cluster, once its config is there.
    pub fn own(&self) -> Option<ClusterView> {
        self.clusters().find(|cluster| cluster.own)
    }

    /// Why the own cluster's config is refused.
    pub fn own_refused(&self) -> Option<&ConfigRefusal> {
        self.sources.refused().get(&self.identity.cluster)
    }

    /// Every remote cluster that anything is known of, by name.
    pub fn remotes(&self) -> Vec<RemoteView> {
        let mut clusters: BTreeMap<ClusterName, ClusterView> = self
            .clusters()
            .filter(|cluster| !cluster.own)
            .map(|cluster| (cluster.name.clone(), cluster))
            .collect();
        let names: BTreeSet<ClusterName> = clusters
            .keys()
            .chain(self.statuses.keys())
            .chain(self.sources.refused().keys())
            .filter(|name| **name != self.identity.cluster)
            .cloned()
            .collect();
        let mut nodes = BTreeMap::<&ClusterName, usize>::new();
        for (cluster, _) in self.nodes.keys() {
            *nodes.entry(cluster).or_default() += 1;
        }
        names
            .into_iter()
            .map(|name| RemoteView {
                cluster: clusters.remove(&name),
                status: self.statuses.get(&name).cloned(),
                refused: self.sources.refused().get(&name).cloned(),
                config_gone: self.sources.is_config_gone(&name),
                nodes: nodes.get(&name).copied().unwrap_or(0),
                name,
            })
            .collect()
    }

    /// Router addresses of all other nodes that this node can reach from its own: what to probe.
    pub fn probe_targets(&self) -> BTreeMap<NodeKey, IpAddr> {
        let Some(Ok(local)) = self.local.node() else {
            return BTreeMap::new();
        };
        let router = |node: &Node| {
            let computed = node.alloc_cidrs().filter_map(Node::router_ip_of);
            let mut all = node.router_ips.iter().copied().chain(computed);
            all.find(|ip| local.router_ip(ip.is_ipv4()).is_some())
        };
        self.nodes()
            .filter(|view| !view.own)
            .filter_map(|view| {
                let key = NodeKey {
                    cluster: view.node.cluster.clone(),
                    node: view.node.name.clone(),
                };
                Some((key, router(view.node)?))
            })
            .collect()
    }

    /// Where the datapath should send packets for a node: its tunnel endpoint.
    pub fn tunnel_endpoint(&self, key: &NodeKey) -> Option<IpAddr> {
        let node = self.nodes.get(&(key.cluster.clone(), key.node.clone()))?;
        node.tunnel_endpoint()
    }
}
