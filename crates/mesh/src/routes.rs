//! The routes that a node needs: other nodes' pod CIDRs, through the tunnel device.
//!
//! In: nodes of every cluster. Out: additions and removals of destinations, additions first. The device, source address
//! and MTU are the same for all routes and belong to who applies them.
//!
//! Rules: of two nodes with one pod CIDR the local cluster's wins, else the lower cluster ID, then the lower name;
//! restored routes go only when every cluster's nodes are listed in full.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use isthmus_model::{ClusterId, Node};

use crate::source::{Source, SourceTable, Sync};

/// A destination behind the tunnel device.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Route {
    /// Pod CIDR of another node.
    pub destination: IpNet,
    /// Cluster of that node.
    pub cluster_id: u16,
    /// Its name.
    pub node: String,
}

/// One change to the routing table.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum RouteOp {
    /// Adds or replaces the route to a destination.
    Add(IpNet),
    /// Removes it; an absent one is no error.
    Remove(IpNet),
}

/// Order of precedence: not local, cluster ID, node name.
type Owner = (bool, u16, Box<str>);

/// The merge of routes. See the module.
#[derive(Debug)]
pub struct Routes {
    local: u16,
    own_node: Box<str>,
    nodes: BTreeMap<Owner, Vec<IpNet>>,
    wanted: BTreeMap<IpNet, BTreeSet<Owner>>,
    installed: BTreeSet<IpNet>,
    changed: BTreeSet<IpNet>,
    restored: BTreeSet<IpNet>,
    sync: Sync,
}

impl Routes {
    /// Routes for the node `own_node` of cluster `local`.
    pub fn new(local: ClusterId, own_node: &str) -> Self {
        Self {
            local: local.get(),
            own_node: own_node.into(),
            nodes: BTreeMap::new(),
            wanted: BTreeMap::new(),
            installed: BTreeSet::new(),
            changed: BTreeSet::new(),
            restored: BTreeSet::new(),
            sync: Sync::new(&[SourceTable::Nodes]),
        }
    }

    /// Takes over the destinations that the tunnel device has routes for. To be called once, before any event.
    pub fn restore(&mut self, destinations: impl IntoIterator<Item = IpNet>) {
        self.installed = destinations.into_iter().map(|net| net.trunc()).collect();
        self.restored = self.installed.clone();
    }

    fn owner(&self, cluster: u16, name: &str) -> Owner {
        (cluster != self.local, cluster, name.into())
    }

    /// Adds or replaces a node.
    pub fn upsert_node(&mut self, node: &Node) {
        let cluster = node.cluster_id.get();
        if cluster == self.local && *node.name == *self.own_node {
            return;
        }
        let owner = self.owner(cluster, &node.name);
        let cidrs: Vec<IpNet> = node.alloc_cidrs().map(|cidr| cidr.trunc()).collect();
        let before = self
            .nodes
            .insert(owner.clone(), cidrs.clone())
            .unwrap_or_default();
        for gone in before.iter().filter(|cidr| !cidrs.contains(cidr)) {
            self.withdraw(*gone, &owner);
        }
        for cidr in cidrs {
            self.restored.remove(&cidr);
            self.wanted.entry(cidr).or_default().insert(owner.clone());
            self.changed.insert(cidr);
        }
    }

    /// Removes a node. Unknown ones are ignored.
    pub fn delete_node(&mut self, cluster: ClusterId, name: &str) {
        let owner = self.owner(cluster.get(), name);
        for cidr in self.nodes.remove(&owner).unwrap_or_default() {
            self.withdraw(cidr, &owner);
        }
    }

    /// Drains a cluster that left the mesh. Not for lost connections.
    pub fn cluster_removed(&mut self, cluster: ClusterId) {
        let of = cluster.get();
        if of == self.local {
            return;
        }
        let gone: Vec<Owner> = self.nodes.keys().filter(|owner| owner.1 == of).cloned().collect();
        for owner in gone {
            for cidr in self.nodes.remove(&owner).unwrap_or_default() {
                self.withdraw(cidr, &owner);
            }
        }
        self.sync.on_removed(of);
        self.prune();
    }

    fn withdraw(&mut self, cidr: IpNet, owner: &Owner) {
        if let Some(owners) = self.wanted.get_mut(&cidr) {
            owners.remove(owner);
            if owners.is_empty() {
                self.wanted.remove(&cidr);
            }
        }
        self.changed.insert(cidr);
    }

    /// Says that the list of clusters is complete.
    pub fn clusters_listed(&mut self, clusters: impl IntoIterator<Item = ClusterId>) {
        let local = self.local;
        self.sync
            .on_clusters(clusters.into_iter().map(ClusterId::get).chain([local]));
        self.prune();
    }

    /// Says that a table was listed in full, once. Other tables than nodes are ignored.
    pub fn source_synced(&mut self, source: Source) {
        if self.sync.on_synced(source) {
            self.prune();
        }
    }

    fn prune(&mut self) {
        if self.sync.all_complete() {
            self.changed.append(&mut self.restored);
        }
    }

    /// What changed since the last drain: additions, then removals.
    pub fn drain(&mut self) -> Vec<RouteOp> {
        let mut ops = Vec::new();
        for cidr in std::mem::take(&mut self.changed) {
            match (self.wanted.contains_key(&cidr), self.installed.contains(&cidr)) {
                (true, false) => {
                    self.installed.insert(cidr);
                    ops.push(RouteOp::Add(cidr));
                }
                (false, true) => {
                    self.installed.remove(&cidr);
                    ops.push(RouteOp::Remove(cidr));
                }
                _ => {}
            }
        }
        ops.sort_unstable();
        ops
    }

    /// The full pass: what makes the device's routes, as listed, what they should be. Restored ones may stay.
    pub fn audit(&self, actual: impl IntoIterator<Item = IpNet>) -> Vec<RouteOp> {
        let actual: BTreeSet<IpNet> = actual.into_iter().collect();
        let missing = self
            .wanted
            .keys()
            .filter(|cidr| !actual.contains(cidr))
            .copied()
            .map(RouteOp::Add);
        let surplus = actual
            .iter()
            .filter(|cidr| !self.wanted.contains_key(cidr) && !self.restored.contains(cidr))
            .copied()
            .map(RouteOp::Remove);
        missing.chain(surplus).collect()
    }

    /// Desired routes, by destination.
    pub fn routes(&self) -> impl Iterator<Item = Route> + '_ {
        self.wanted.iter().filter_map(|(destination, owners)| {
            let (_, cluster_id, node) = owners.first()?;
            Some(Route {
                destination: *destination,
                cluster_id: *cluster_id,
                node: node.to_string(),
            })
        })
    }

    /// Destinations that nodes of more than one cluster have.
    pub fn conflicts(&self) -> usize {
        let clusters =
            |owners: &BTreeSet<Owner>| owners.iter().map(|owner| owner.1).collect::<BTreeSet<_>>().len();
        self.wanted.values().filter(|owners| clusters(owners) > 1).count()
    }
}
