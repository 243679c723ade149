//! Merges what all clusters say about addresses into the desired ipcache, and plans the map writes for what changed.
//!
//! In: address entries and nodes of every cluster, the node's own addresses, which sources are listed in full.
//! Out: [`Plan`]s of independent operations, puts before deletes.
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

mod prefix;

use std::{collections::BTreeSet, net::IpAddr};

use hashbrown::{DefaultHashBuilder, HashMap};
use isthmus_bpf_abi::{Address, IpcacheKey, IpcacheValue, ipcache_flag};
use isthmus_model::{ClusterId, IpEntry, MaxConnectedClusters, Node, NumericIdentity};

use self::prefix::Prefix;
use crate::{
    MapOp, Plan,
    address::{to_address, to_ip},
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

#[derive(Debug)]
struct NodeRecord {
    cluster: u16,
    name: Box<str>,
    tunnel: Option<Address>,
    own: bool,
    prefixes: Vec<(Prefix, Contribution)>,
}

/// An ipcache entry, for people.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct IpcacheView {
    /// Prefix.
    pub prefix: ipnet::IpNet,
    /// Identity.
    pub identity: u32,
    /// Node to tunnel to.
    pub tunnel_endpoint: Option<IpAddr>,
    /// Cluster that says so; `None` if it was restored and no source has named it yet.
    pub cluster_id: Option<u16>,
    /// Other clusters say something else, and lose.
    pub conflict: bool,
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

    /// Adds or replaces a node.
    pub fn upsert_node(&mut self, node: &Node) {
        let cluster = node.cluster_id.get();
        let key = (cluster, Box::from(node.name.as_str()));
        let own = cluster == self.local && *node.name == *self.own_node;
        let at = match self.node_index.get(&key) {
            Some(&at) => at,
            None => {
                let at = self.nodes.insert(NodeRecord {
                    cluster,
                    name: key.1.clone(),
                    tunnel: None,
                    own,
                    prefixes: Vec::new(),
                });
                self.node_index.insert(key, at);
                at
            }
        };
        let tunnel = node.tunnel_endpoint().map(to_address);
        let prefixes = self.node_prefixes(at, node, own);
        let record = &mut self.nodes[at];
        let moved = record.tunnel != tunnel;
        record.tunnel = tunnel;
        let before = std::mem::replace(&mut record.prefixes, prefixes.clone());
        for (prefix, contribution) in &before {
            if !prefixes
                .iter()
                .any(|(other, new)| other == prefix && new.kind == contribution.kind)
            {
                self.take(*prefix, |other| same_source(other, contribution));
            }
        }
        for (prefix, contribution) in prefixes {
            self.put(prefix, contribution);
            if moved && let Some(at) = self.entries.find(&self.hasher, prefix) {
                self.mark(at);
            }
        }
        if own {
            let own = node
                .internal_ips
                .iter()
                .chain(&node.external_ips)
                .copied()
                .map(to_address);
            self.set_own(1, own.collect());
        }
    }

    fn node_prefixes(&self, at: u32, node: &Node, own: bool) -> Vec<(Prefix, Contribution)> {
        let (identity, world) = if own {
            (NumericIdentity::HOST, None)
        } else {
            (NumericIdentity::REMOTE_NODE, Some(NumericIdentity::WORLD))
        };
        let contribution = |kind, identity: NumericIdentity| Contribution {
            peer: at,
            identity: identity.0,
            cluster: node.cluster_id.get(),
            key: node.encryption_key,
            kind,
        };
        let addresses = node.internal_ips.iter().chain(&node.external_ips);
        let mut list: Vec<_> = addresses
            .map(|ip| (Prefix::of_ip(*ip), contribution(Kind::Node, identity)))
            .collect();
        list.extend(
            node.router_ips
                .iter()
                .map(|ip| (Prefix::of_ip(*ip), contribution(Kind::Tunnel, identity))),
        );
        let health = node
            .ipv4_health_ip
            .map(IpAddr::V4)
            .into_iter()
            .chain(node.ipv6_health_ip.map(IpAddr::V6));
        list.extend(health.map(|ip| {
            (
                Prefix::of_ip(ip),
                contribution(Kind::Tunnel, NumericIdentity::HEALTH),
            )
        }));
        if let Some(world) = world {
            list.extend(
                node.alloc_cidrs()
                    .map(|cidr| (Prefix::of_net(cidr), contribution(Kind::Cidr, world))),
            );
        }
        // A node may name an address twice; the first kind counts.
        list.sort_by_key(|(prefix, contribution)| (*prefix, contribution.kind));
        list.dedup_by_key(|(prefix, _)| *prefix);
        list
    }

    /// Removes a node. Unknown ones are ignored.
    pub fn delete_node(&mut self, cluster: ClusterId, name: &str) {
        let Some(at) = self.node_index.remove(&(cluster.get(), Box::from(name))) else {
            return;
        };
        let prefixes = std::mem::take(&mut self.nodes[at].prefixes);
        for (prefix, contribution) in prefixes {
            self.take(prefix, |other| same_source(other, &contribution));
        }
        self.nodes.remove(at);
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

    // === output ===

    /// The operations for everything that changed since the last drain.
    pub fn drain(&mut self) -> Plan {
        self.drain_at_most(usize::MAX)
    }

    /// At most `max` of the operations for what changed; the rest stays for the next call.
    pub fn drain_at_most(&mut self, max: usize) -> Plan {
        let mut puts = Vec::new();
        let mut deletes = Vec::new();
        let count = self.dirty.len().min(max);
        for at in self.dirty.drain(..count).collect::<Vec<_>>() {
            let entry = self.entries[at];
            if entry.flags & GONE == 0 {
                puts.push(MapOp::IpcachePut(entry.prefix.to_key(), self.value(&entry.first)));
                self.entries[at].flags = WRITTEN;
                continue;
            }
            if entry.flags & WRITTEN != 0 {
                deletes.push(MapOp::IpcacheDelete(entry.prefix.to_key()));
            }
            self.entries.remove(&self.hasher, at);
        }
        let stale = self.stale.len().min(max - count);
        deletes.extend(self.stale.drain(..stale).map(MapOp::IpcacheDelete));
        puts.append(&mut deletes);
        Plan::independent(puts)
    }

    /// Whether [`Self::drain`] would return anything.
    pub fn has_changes(&self) -> bool {
        !(self.dirty.is_empty() && self.stale.is_empty())
    }

    /// What the map should hold, as of the last drain; in key order.
    pub fn desired(&self) -> Vec<(IpcacheKey, IpcacheValue)> {
        let mut list: Vec<_> = self
            .restored
            .iter()
            .map(|(prefix, value)| (prefix.to_key(), *value))
            .collect();
        list.extend(self.entries.live().into_iter().map(|at| {
            let entry = &self.entries[at];
            (entry.prefix.to_key(), self.value(&entry.first))
        }));
        list.sort_unstable_by_key(|(key, _)| *key);
        list
    }

    /// The full pass: what makes the map, as dumped, what it should be. To be called right after a drain whose plan was
    /// applied; what it finds is a bug or somebody else's doing.
    pub fn audit(&self, actual: &[(IpcacheKey, IpcacheValue)]) -> Plan {
        let actual: std::collections::BTreeMap<_, _> = actual.iter().copied().collect();
        let desired = self.desired();
        let puts = desired
            .iter()
            .filter(|(key, value)| actual.get(key) != Some(value));
        let mut ops: Vec<MapOp> = puts.map(|(key, value)| MapOp::IpcachePut(*key, *value)).collect();
        let gone = actual
            .keys()
            .filter(|key| desired.binary_search_by_key(key, |(key, _)| key).is_err());
        ops.extend(gone.map(|key| MapOp::IpcacheDelete(*key)));
        Plan::independent(ops)
    }

    /// Entries, in prefix order: walks all, for people.
    pub fn entries(&self) -> Vec<IpcacheView> {
        let tunnel = |value: &IpcacheValue| {
            (value.flags & ipcache_flag::HAS_TUNNEL_ENDPOINT != 0).then(|| to_ip(&value.tunnel_endpoint))
        };
        let mut list: Vec<_> = self
            .restored
            .iter()
            .map(|(prefix, value)| IpcacheView {
                prefix: prefix.to_net(),
                identity: value.identity,
                tunnel_endpoint: tunnel(value),
                cluster_id: None,
                conflict: false,
            })
            .collect();
        for at in self.entries.live() {
            let entry = &self.entries[at];
            if entry.flags & GONE == 0 {
                list.push(IpcacheView {
                    prefix: entry.prefix.to_net(),
                    identity: entry.first.identity,
                    tunnel_endpoint: tunnel(&self.value(&entry.first)),
                    cluster_id: Some(entry.first.cluster),
                    conflict: self.conflicting(entry),
                });
            }
        }
        list.sort_by_key(|view| view.prefix);
        list
    }

    fn conflicting(&self, entry: &Entry) -> bool {
        let others = self.more.get(&entry.prefix);
        others.is_some_and(|others| others.iter().any(|other| other.cluster != entry.first.cluster))
    }

    /// Prefixes that more than one cluster names.
    pub fn conflicts(&self) -> usize {
        let of = |prefix: &Prefix| {
            self.entries
                .find(&self.hasher, *prefix)
                .map(|at| &self.entries[at])
        };
        self.more
            .keys()
            .filter_map(of)
            .filter(|entry| self.conflicting(entry))
            .count()
    }

    /// Prefixes that some source names.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no source names any.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Prefixes restored that no source has named yet.
    pub fn restored(&self) -> usize {
        self.restored.len()
    }
}

/// Whether one replaces the other.
fn same_source(a: &Contribution, b: &Contribution) -> bool {
    a.cluster == b.cluster && a.kind == b.kind && (a.kind == Kind::Entry || a.peer == b.peer)
}
