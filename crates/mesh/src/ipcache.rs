//! Merges what all clusters say about addresses into the desired ipcache, and plans the map writes for what changed.
//!
//! In: address entries and nodes of every cluster, the node's own addresses, which sources are listed in full.
//! Out: [plans](crate::Plan) of independent operations, puts before deletes.
//!
//! Rules, Cilium's (`pkg/ipcache`, `pkg/node/manager`):
//! - A node's internal and external addresses have identity remote-node, the own node's host, and no tunnel endpoint.
//! - A node's router and health addresses are behind its tunnel endpoint.
//! - A node's pod CIDRs are fallback entries with identity world behind its tunnel endpoint, so that a pod whose own
//!   entry is still on its way can be reached; not for the own node.
//! - An address entry is behind its host, or direct if that is this node.
//! - Of two clusters that name one prefix the local one wins, else the one with the lower ID; within a cluster its nodes
//!   before its address entries.
//!
//! What policy and flows need of an entry (names, named ports) is not kept here: a prefix costs about 50 bytes.

mod node;
mod output;
mod prefix;

use std::{collections::BTreeSet, net::IpAddr};

use hashbrown::{DefaultHashBuilder, HashMap};
use isthmus_bpf_abi::{Address, IpcacheKey, IpcacheValue, ipcache_flag};
use isthmus_model::{ClusterId, IpEntry, MaxConnectedClusters, NumericIdentity};

pub use self::output::IpcacheView;
use self::{node::NodeRecord, prefix::Prefix};
use crate::{
    address::to_address,
    indexed::{Indexed, Keyed},
    intern::Interner,
    slab::Slab,
    source::{Source, SourceTable, Sync},
};

/// What a contribution is, in order of precedence within a cluster.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Kind {
    /// A node's own address.
    Node,
    /// An address of a node inside the pod network: router, health.
    Tunnel,
    /// A node's pod CIDR.
    Cidr,
    /// An address entry.
    Entry,
}

/// One source's word about a prefix.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Contribution {
    /// [`Kind::Entry`]: the host's address, interned, 0 if none. Else the node.
    peer: u32,
    identity: u32,
    cluster: u16,
    key: u8,
    kind: Kind,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    prefix: Prefix,
    flags: u8,
    /// The one that counts. The others are in `Ipcache::more`.
    first: Contribution,
}

/// The map has it.
const WRITTEN: u8 = 1;
/// Listed in `Ipcache::dirty`.
const DIRTY: u8 = 2;
/// Nobody names it any more.
const GONE: u8 = 4;

impl Keyed for Entry {
    type Key = Prefix;

    fn key(&self) -> Prefix {
        self.prefix
    }
}

/// The merge of addresses. See the module.
#[derive(Debug)]
pub struct Ipcache {
    local: u16,
    max: MaxConnectedClusters,
    own_node: Box<str>,
    /// As given by `set_own_addresses`, and as in the own node's object.
    own_addresses: [BTreeSet<Address>; 2],
    hasher: DefaultHashBuilder,
    entries: Indexed<Entry>,
    more: HashMap<Prefix, Vec<Contribution>>,
    hosts: Interner<Address>,
    nodes: Slab<NodeRecord>,
    node_index: HashMap<(u16, Box<str>), u32>,
    dirty: Vec<u32>,
    /// In the map and not named by a source yet.
    restored: HashMap<Prefix, IpcacheValue>,
    /// Restored ones to delete.
    stale: Vec<IpcacheKey>,
    sync: Sync,
}

impl Ipcache {
    /// A merge for the node `own_node` of cluster `local`, with empty tables and, until `restore`, an empty map.
    pub fn new(local: ClusterId, max: MaxConnectedClusters, own_node: &str) -> Self {
        Self {
            local: local.get(),
            max,
            own_node: own_node.into(),
            own_addresses: [BTreeSet::new(), BTreeSet::new()],
            hasher: DefaultHashBuilder::default(),
            entries: Indexed::new(),
            more: HashMap::new(),
            hosts: Interner::new(),
            nodes: Slab::new(),
            node_index: HashMap::new(),
            dirty: Vec::new(),
            restored: HashMap::new(),
            stale: Vec::new(),
            sync: Sync::new(&[SourceTable::Nodes, SourceTable::IpEntries]),
        }
    }

    /// Takes over the map's contents. To be called once, before any event.
    ///
    /// # Panics
    /// If events came before.
    pub fn restore(&mut self, dump: &[(IpcacheKey, IpcacheValue)]) {
        assert!(self.entries.len() == 0, "restore comes before the first event");
        for (key, value) in dump {
            match Prefix::of_key(key) {
                Some(prefix) => drop(self.restored.insert(prefix, *value)),
                None => self.stale.push(*key),
            }
        }
    }

    /// The node's own addresses: what they host is not tunnelled. Those of the own node's object are added to them.
    pub fn set_own_addresses(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        self.set_own(0, addresses.into_iter().map(to_address).collect());
    }

    fn set_own(&mut self, which: usize, addresses: BTreeSet<Address>) {
        if addresses != self.own_addresses[which] {
            self.own_addresses[which] = addresses;
            for at in self.entries.live() {
                self.mark(at);
            }
        }
    }

    // === tables ===

    /// Adds or replaces an entry of `cluster`.
    pub fn upsert_entry(&mut self, cluster: ClusterId, entry: &IpEntry) {
        let peer = entry.host_ip.map_or(0, |ip| {
            self.hosts.acquire(&to_address(ip), || to_address(ip)).0 + 1
        });
        let contribution = Contribution {
            peer,
            identity: entry.identity.0,
            cluster: cluster.get(),
            key: entry.encryption_key,
            kind: Kind::Entry,
        };
        self.put(Prefix::of_net(entry.prefix), contribution);
    }

    /// Removes an entry of `cluster`. Unknown ones are ignored.
    pub fn delete_entry(&mut self, cluster: ClusterId, prefix: ipnet::IpNet) {
        let of = cluster.get();
        self.take(Prefix::of_net(prefix), |other| {
            other.cluster == of && other.kind == Kind::Entry
        });
    }

    /// Drains a cluster that left the mesh. Not for lost connections. The local cluster cannot leave; that is ignored.
    pub fn cluster_removed(&mut self, cluster: ClusterId) {
        if cluster.get() == self.local {
            return;
        }
        let of = cluster.get();
        for at in self.entries.live() {
            let prefix = self.entries[at].prefix;
            while self.take(prefix, |other| other.cluster == of) {}
        }
        let gone: Vec<u32> = self
            .nodes
            .iter()
            .filter(|(_, node)| node.cluster == of)
            .map(|(at, _)| at)
            .collect();
        for at in gone {
            if let Some(node) = self.nodes.remove(at) {
                self.node_index.remove(&(of, node.name));
            }
        }
        self.sync.on_removed(of);
        self.prune();
    }

    // === what is known about clusters ===

    /// Says that the list of clusters is complete: whatever was restored of others is stale. `clusters` without or with
    /// the local one.
    pub fn clusters_listed(&mut self, clusters: impl IntoIterator<Item = ClusterId>) {
        let local = self.local;
        self.sync
            .on_clusters(clusters.into_iter().map(ClusterId::get).chain([local]));
        self.prune();
    }

    /// Says that a table was listed in full, once. Other tables than nodes and address entries are ignored.
    pub fn source_synced(&mut self, source: Source) {
        if self.sync.on_synced(source) {
            self.prune();
        }
    }

    /// Whether this very address is known, an endpoint's or a node's: a source names it, or it was restored and no source has
    /// left it out yet. Not: that it lies in a node's range.
    pub fn knows(&self, address: IpAddr) -> bool {
        let prefix = Prefix::of_net(address.into());
        let found = self.entries.find(&self.hasher, prefix);
        found.is_some_and(|at| self.entries[at].flags & GONE == 0) || self.restored.contains_key(&prefix)
    }

    /// Whether every cluster is known and listed in full: nothing restored is left that no source named.
    pub fn prune_ready(&self) -> bool {
        self.sync.all_complete()
    }

    fn prune(&mut self) {
        let (sync, local, max) = (&self.sync, self.local, self.max);
        let stale = self.restored.extract_if(|_, value| {
            // Whose entry it can be: the local cluster's, a remote one's by identity, else any remote one's.
            if value.flags & ipcache_flag::REMOTE_CLUSTER == 0 {
                return sync.complete(local);
            }
            match NumericIdentity(value.identity).cluster(max) {
                Some(cluster) => sync.complete(cluster.get()),
                None => sync.all_complete(),
            }
        });
        let mut stale: Vec<IpcacheKey> = stale.map(|(prefix, _)| prefix.to_key()).collect();
        stale.sort_unstable();
        self.stale.append(&mut stale);
    }

    // === contributions ===

    fn put(&mut self, prefix: Prefix, new: Contribution) {
        let Some(at) = self.entries.find(&self.hasher, prefix) else {
            let at = self.entries.insert(
                &self.hasher,
                Entry {
                    prefix,
                    flags: 0,
                    first: new,
                },
            );
            // The first word about a restored entry: it may say what the map has already.
            match self.restored.remove(&prefix) {
                Some(value) => {
                    self.entries[at].flags = WRITTEN;
                    if self.value(&new) != value {
                        self.mark(at);
                    }
                }
                None => self.mark(at),
            }
            return;
        };
        let entry = &mut self.entries[at];
        if entry.flags & GONE != 0 {
            entry.flags &= !GONE;
            entry.first = new;
            self.mark(at);
            return;
        }
        if same_source(&entry.first, &new) {
            let old = std::mem::replace(&mut entry.first, new);
            if old != new {
                self.mark(at);
            }
            self.release(&old);
            return;
        }
        let first = entry.first;
        let others = self.more.entry(prefix).or_default();
        let old = match others.iter_mut().find(|other| same_source(other, &new)) {
            Some(other) => Some(std::mem::replace(other, new)),
            None => {
                others.push(new);
                None
            }
        };
        if let Some(old) = old {
            self.release(&old);
        }
        if self.rank(&new) < self.rank(&first) {
            if let Some(others) = self.more.get_mut(&prefix) {
                others.retain(|other| *other != new);
                others.push(first);
            }
            self.entries[at].first = new;
            self.mark(at);
        }
    }

    /// Removes the contribution that satisfies `which`; false if there is none.
    fn take(&mut self, prefix: Prefix, which: impl Fn(&Contribution) -> bool) -> bool {
        let Some(at) = self.entries.find(&self.hasher, prefix) else {
            return false;
        };
        let entry = self.entries[at];
        if entry.flags & GONE != 0 {
            return false;
        }
        let mut others = self.more.remove(&prefix).unwrap_or_default();
        let taken = if which(&entry.first) {
            let next = (0..others.len()).min_by(|a, b| self.rank(&others[*a]).cmp(&self.rank(&others[*b])));
            match next {
                Some(next) => self.entries[at].first = others.swap_remove(next),
                None => self.entries[at].flags |= GONE,
            }
            self.mark(at);
            Some(entry.first)
        } else {
            others
                .iter()
                .position(which)
                .map(|place| others.swap_remove(place))
        };
        if !others.is_empty() {
            self.more.insert(prefix, others);
        }
        if let Some(taken) = &taken {
            self.release(taken);
        }
        taken.is_some()
    }

    fn release(&mut self, contribution: &Contribution) {
        if contribution.kind == Kind::Entry && contribution.peer != 0 {
            self.hosts.release(contribution.peer - 1);
        }
    }

    /// Lower is better. Nodes of one cluster with one address are ordered by name.
    fn rank(&self, of: &Contribution) -> (bool, u16, Kind, &str) {
        let name = match of.kind {
            Kind::Entry => "",
            _ => self.nodes.get(of.peer).map_or("", |node| &node.name),
        };
        (of.cluster != self.local, of.cluster, of.kind, name)
    }

    fn mark(&mut self, at: u32) {
        let entry = &mut self.entries[at];
        if entry.flags & DIRTY == 0 {
            entry.flags |= DIRTY;
            self.dirty.push(at);
        }
    }

    fn value(&self, of: &Contribution) -> IpcacheValue {
        let flags = if of.cluster == self.local {
            0
        } else {
            ipcache_flag::REMOTE_CLUSTER
        };
        let endpoint = match of.kind {
            Kind::Node => None,
            Kind::Tunnel | Kind::Cidr => self
                .nodes
                .get(of.peer)
                .filter(|node| !node.own)
                .and_then(|node| node.tunnel),
            Kind::Entry if of.peer == 0 => None,
            Kind::Entry => Some(*self.hosts.resolve(of.peer - 1)),
        };
        match endpoint {
            Some(endpoint) if !self.own_addresses.iter().any(|own| own.contains(&endpoint)) => {
                IpcacheValue::tunnel(of.identity, endpoint, of.key, flags)
            }
            _ => IpcacheValue::direct(of.identity, flags),
        }
    }
}

/// Whether one replaces the other.
fn same_source(a: &Contribution, b: &Contribution) -> bool {
    a.cluster == b.cluster && a.kind == b.kind && (a.kind == Kind::Entry || a.peer == b.peer)
}
