//! From changed entries to operations; the full pass; and entries for people.

use std::{collections::BTreeMap, net::IpAddr};

use isthmus_bpf_abi::{IpcacheKey, IpcacheValue, ipcache_flag};

use super::{Entry, GONE, Ipcache, WRITTEN, prefix::Prefix};
use crate::{MapOp, Plan, address::to_ip};

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

impl Ipcache {
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
        let actual: BTreeMap<_, _> = actual.iter().copied().collect();
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
