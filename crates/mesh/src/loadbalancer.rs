//! Merges the services of all clusters into frontends and their backends, and plans the map writes for what changed.
//!
//! In: frames and slices of every cluster, which clusters answer, which sources are listed in full. Out: [plans](crate::Plan).
//! A change touches one service: its tables (`record`), its backend groups (`group`), the selection by tiers and affinity
//! (`order`, `select`), slots by share (`allot`), Maglev tables (`table`). Which open flows end is in `flows`. Where a service can be asked is in `exposed`,
//! frontends and their numbers are in `frontend`, operations in `drain`, restart in `restore`.
//!
//! Invariants: a remote cluster never adds a frontend that the local cluster does not have; an unanswering cluster's
//! backends are used only when nothing else is left; of two clusters that name one address and port the local one owns
//! it, else the one with the lower ID.
//!
//! Numbers of backends are a group's own: two services with the same pod behind them have two entries in the backend
//! map. So every change stays within one service, and each slot that names a backend belongs to that service.
//! A `service_id` is a frontend's own, as in Cilium (its reverse NAT index).

mod allot;
mod candidate;
mod change;
mod contribute;
mod drain;
mod exposed;
mod flows;
mod frontend;
mod group;
mod order;
mod record;
mod restore;
mod select;
mod table;
mod view;
mod zones;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use hashbrown::{DefaultHashBuilder, HashMap};
use isthmus_bpf_abi::{Address, MaglevKey, ServiceKey, SourceRangeKey, maps};
use isthmus_model::{ClusterId, ClusterName, ServiceFrame, ServiceName, Slice};

use self::{
    candidate::Context,
    frontend::{Frontend, FrontendKey},
    group::Group,
    record::{Pools, Service},
    zones::Zones,
};
pub use self::{
    flows::{DEPARTED_MAX, Departed, Destination, Flow, Verdict},
    frontend::FrontendView,
    view::{BackendView, ServiceView, Stats, Unused},
};
use crate::{
    IdAllocator,
    maglev::MaglevConfig,
    slab::Slab,
    source::{Source, SourceTable, Sync},
};

/// Numbers beyond what the maps hold, so that a freed one rests before it is used again.
const ID_LIMIT_FACTOR: u32 = 4;

/// Numbers, each with its cluster, by address, port and protocol.
type Loose = HashMap<(Address, u16, u8), Vec<(u32, u16)>>;

/// The merge of services. See the module.
#[derive(Debug)]
pub struct LoadBalancer {
    context: Context,
    maglev: MaglevConfig,
    names: BTreeMap<u16, ClusterName>,
    /// Where this node's ports are asked for, ascending.
    node_addresses: Vec<Address>,
    pools: Pools,
    services: Slab<Service>,
    service_index: HashMap<ServiceName, u32>,
    groups: Slab<Group>,
    frontends: Slab<Frontend>,
    frontend_index: HashMap<FrontendKey, u32>,
    backend_ids: IdAllocator,
    service_ids: IdAllocator,
    sync: Sync,
    /// Groups in which backends start slowly.
    ramping: BTreeSet<u32>,
    /// Chunks of Maglev tables in the map.
    table_chunks: u32,
    /// Groups with something to drain.
    queue: Vec<u32>,
    /// Frontends that nobody claims any more, still in the map.
    unclaimed: Vec<u32>,
    /// Restored backends that no slot names, by what they are, until a group needs them.
    loose: Loose,
    /// Restored keys that no lookup can reach, or that we did not write: to be deleted by the next drain.
    debris: Vec<ServiceKey>,
    /// The same of Maglev tables and source ranges.
    table_debris: Vec<MaglevKey>,
    range_debris: Vec<SourceRangeKey>,
    /// Failure domains that frontends moved between, or that became one.
    links: Vec<(u32, u32)>,
    /// Numbers to delete from the backend map, each with its failure domain.
    spare: Vec<(u32, u32)>,
    /// Backends that drains saw leave.
    departed: Departed,
}

impl LoadBalancer {
    /// A merge for agents of cluster `local`, with empty tables and, until `restore`, empty maps; on no node and without Maglev
    /// tables.
    pub fn new(local: ClusterId) -> Self {
        let maglev = MaglevConfig {
            table_size: 0,
            ..MaglevConfig::default()
        };
        Self::on_node(local, "", maglev)
    }

    /// The same on the node of this name.
    pub fn on_node(local: ClusterId, node: &str, maglev: MaglevConfig) -> Self {
        let mut pools = Pools::new();
        // Held for ever.
        let node = match node {
            "" => u32::MAX,
            name => pools.texts.acquire(name),
        };
        Self {
            context: Context {
                local: local.get(),
                quarantined: Vec::new(),
                hasher: DefaultHashBuilder::default(),
                zones: Zones::default(),
                node,
                now: Duration::ZERO,
            },
            maglev,
            names: BTreeMap::new(),
            node_addresses: Vec::new(),
            pools,
            services: Slab::new(),
            service_index: HashMap::new(),
            groups: Slab::new(),
            frontends: Slab::new(),
            frontend_index: HashMap::new(),
            backend_ids: IdAllocator::new(maps::BACKENDS_MAX * ID_LIMIT_FACTOR),
            service_ids: IdAllocator::new(maps::SERVICES_MAX * ID_LIMIT_FACTOR),
            sync: Sync::new(&[SourceTable::Frames, SourceTable::Slices]),
            ramping: BTreeSet::new(),
            table_chunks: 0,
            queue: Vec::new(),
            unclaimed: Vec::new(),
            loose: HashMap::new(),
            debris: Vec::new(),
            table_debris: Vec::new(),
            range_debris: Vec::new(),
            links: Vec::new(),
            spare: Vec::new(),
            departed: Departed::default(),
        }
    }

    // === tables ===

    /// Adds or replaces a service's frame.
    pub fn upsert_frame(&mut self, frame: &ServiceFrame) {
        let cluster = frame.cluster_id.get();
        self.note_cluster(cluster, &frame.cluster);
        let at = self.service_entry(&frame.name);
        if cluster != self.context.local {
            self.set_remote_frame(at, cluster, Some((frame.global, frame.global && frame.shared)));
            return;
        }
        let new = self.pools.acquire_frame(frame);
        if self.services[at].local.as_deref() == Some(&new) {
            self.pools.release_frame(&new);
            return;
        }
        self.set_local_frame(at, Some(Box::new(new)));
    }

    /// Removes a service's frame. Unknown ones are ignored.
    pub fn delete_frame(&mut self, cluster: ClusterId, name: &ServiceName) {
        let Some(&at) = self.service_index.get(name) else {
            return;
        };
        if cluster.get() == self.context.local {
            self.set_local_frame(at, None);
        } else {
            self.set_remote_frame(at, cluster.get(), None);
        }
        self.tidy(at);
    }

    /// Adds or replaces a slice.
    pub fn upsert_slice(&mut self, slice: &Slice) {
        let cluster = slice.cluster_id.get();
        self.note_cluster(cluster, &slice.cluster);
        let at = self.service_entry(&slice.service);
        let new = self.pools.acquire_slice(&mut self.context.zones, slice);
        let part = self.services[at].part_entry(cluster);
        let (place, old) = match part.slices.binary_search_by(|known| known.name.cmp(&new.name)) {
            Ok(place) if part.slices[place] == new => {
                self.pools.release_slice(&new);
                return;
            }
            Ok(place) => (place, Some(std::mem::replace(&mut part.slices[place], new))),
            Err(place) => {
                if part.slices.len() == part.slices.capacity() {
                    part.slices.reserve_exact((part.slices.len() / 4).max(1));
                }
                part.slices.insert(place, new);
                (place, None)
            }
        };
        self.on_slice(at, cluster, old.as_ref(), Some(place));
        if let Some(old) = old {
            self.pools.release_slice(&old);
        }
    }

    /// Removes a slice. Unknown ones are ignored.
    pub fn delete_slice(&mut self, cluster: ClusterId, service: &ServiceName, slice: &str) {
        let Some(&at) = self.service_index.get(service) else {
            return;
        };
        let Some(part) = self.services[at].part_mut(cluster.get()) else {
            return;
        };
        let Ok(place) = part.slices.binary_search_by(|known| (*known.name).cmp(slice)) else {
            return;
        };
        let old = part.slices.remove(place);
        self.on_slice(at, cluster.get(), Some(&old), None);
        self.pools.release_slice(&old);
        self.tidy(at);
    }

    /// Drains a cluster that left the mesh: all it said is forgotten. Not for lost connections. The local cluster cannot
    /// leave; that is ignored.
    pub fn cluster_removed(&mut self, cluster: ClusterId) {
        let cluster = cluster.get();
        if cluster == self.context.local {
            return;
        }
        let with: Vec<u32> = self.services.keys().collect();
        for at in with {
            if self.services[at].part(cluster).is_none() {
                continue;
            }
            self.set_remote_frame(at, cluster, None);
            if let Some(part) = self.services[at].part_mut(cluster) {
                let slices = std::mem::take(&mut part.slices);
                slices.iter().for_each(|slice| self.pools.release_slice(slice));
            }
            self.tidy(at);
        }
        self.sync.on_removed(cluster);
        self.context.quarantined.retain(|other| *other != cluster);
        if self.names.remove(&cluster).is_some() {
            self.reorder();
        }
        self.prune();
    }

    // === what is known about clusters ===

    /// Says whether a cluster answers. Backends of one that does not are used only when nothing else is left.
    /// The local cluster always counts as answering.
    pub fn set_cluster_health(&mut self, cluster: ClusterId, healthy: bool) {
        let cluster = cluster.get();
        let before = self.context.clone();
        match (before.quarantined.binary_search(&cluster), healthy) {
            (Ok(place), true) => drop(self.context.quarantined.remove(place)),
            (Err(place), false) if cluster != before.local => {
                self.context.quarantined.insert(place, cluster);
            }
            _ => return,
        }
        for at in self.groups.keys().collect::<Vec<_>>() {
            let group = &mut self.groups[at];
            group.on_health(cluster, &before, &self.context);
            if group.has_changes() {
                self.enqueue(at);
            }
        }
    }

    /// Says in which zone this node is, for topology-aware hints. Empty: unknown, and hints do not count.
    pub fn set_zone(&mut self, zone: &str) {
        if !self.context.zones.set_own(zone) {
            return;
        }
        for at in self.groups.keys().collect::<Vec<_>>() {
            self.groups[at].recount(&self.context);
            self.enqueue(at);
        }
    }

    /// Says the time, since any fixed point: slow starts go on. To be called often enough for their steps to be seen, about
    /// once a second.
    pub fn advance(&mut self, now: Duration) {
        self.context.now = now.max(self.context.now);
        for at in std::mem::take(&mut self.ramping) {
            // Its service may be gone.
            if self.groups.get(at).is_none() {
                continue;
            }
            let changed = self.groups[at].advance(&self.context);
            if self.groups[at].is_ramping() {
                self.ramping.insert(at);
            }
            if changed {
                self.enqueue(at);
            }
        }
    }

    /// Says that the list of clusters is complete: whatever was restored of others is stale. `clusters` without or with
    /// the local one.
    pub fn clusters_listed(&mut self, clusters: impl IntoIterator<Item = ClusterId>) {
        let local = self.context.local;
        self.sync
            .on_clusters(clusters.into_iter().map(ClusterId::get).chain([local]));
        self.prune();
    }

    /// Says that a table was listed in full, once. Other tables than frames and slices are ignored.
    pub fn source_synced(&mut self, source: Source) {
        if self.sync.on_synced(source) {
            self.prune();
        }
    }

    /// Whether every cluster is known and listed in full: nothing restored is left that no source named.
    pub fn prune_ready(&self) -> bool {
        self.sync.all_complete()
    }
}
