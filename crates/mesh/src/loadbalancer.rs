//! Merges the services of all clusters into frontends and their backends, and plans the map writes for what changed.
//!
//! In: frames and slices of every cluster, which clusters answer, which sources are listed in full. Out: [plans](crate::Plan).
//! A change touches one service: its tables (`record`), its backend groups (`group`), the selection by affinity
//! (`select`). Frontends and their numbers are in `frontend`, operations in `drain`, restart in `restore`.
//!
//! Invariants: a remote cluster never adds a frontend that the local cluster does not have; an unanswering cluster's
//! backends are used only when nothing else is left; of two clusters that name one address and port the local one owns
//! it, else the one with the lower ID.
//!
//! Numbers of backends are a group's own: two services with the same pod behind them have two entries in the backend
//! map. So every change stays within one service, and each slot that names a backend belongs to that service.
//! A `service_id` is a frontend's own, as in Cilium (its reverse NAT index).

mod candidate;
mod contribute;
mod drain;
mod frontend;
mod group;
mod record;
mod restore;
mod select;
mod view;

use std::collections::BTreeMap;

use hashbrown::{DefaultHashBuilder, HashMap};
use isthmus_bpf_abi::{Address, ServiceKey, maps, service_flag};
use isthmus_model::{ClusterId, ClusterName, ServiceFrame, ServiceName, Slice};

use self::{
    candidate::Context,
    contribute::contribute,
    frontend::{Frontend, FrontendKey},
    group::Group,
    record::{GroupPort, LocalFrame, Part, Pools, Service, SliceRecord},
};
pub use self::{
    frontend::FrontendView,
    view::{BackendView, ServiceView, Stats, Unused},
};
use crate::{
    Family, IdAllocator,
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
    local: u16,
    names: BTreeMap<u16, ClusterName>,
    hasher: DefaultHashBuilder,
    pools: Pools,
    services: Slab<Service>,
    service_index: HashMap<ServiceName, u32>,
    groups: Slab<Group>,
    frontends: Slab<Frontend>,
    frontend_index: HashMap<FrontendKey, u32>,
    backend_ids: IdAllocator,
    service_ids: IdAllocator,
    /// Clusters that do not answer, ascending.
    quarantined: Vec<u16>,
    sync: Sync,
    /// Groups with something to drain.
    queue: Vec<u32>,
    /// Frontends that nobody claims any more, still in the map.
    unclaimed: Vec<u32>,
    /// Restored backends that no slot names, by what they are, until a group needs them.
    loose: Loose,
    /// Restored keys that no lookup can reach, or that we did not write: to be deleted by the next drain.
    debris: Vec<ServiceKey>,
    /// Failure domains that frontends moved between, or that became one.
    links: Vec<(u32, u32)>,
    /// Numbers to delete from the backend map, each with its failure domain.
    spare: Vec<(u32, u32)>,
}

impl LoadBalancer {
    /// A merge for agents of cluster `local`, with empty tables and, until `restore`, empty maps.
    pub fn new(local: ClusterId) -> Self {
        Self {
            local: local.get(),
            names: BTreeMap::new(),
            hasher: DefaultHashBuilder::default(),
            pools: Pools::new(),
            services: Slab::new(),
            service_index: HashMap::new(),
            groups: Slab::new(),
            frontends: Slab::new(),
            frontend_index: HashMap::new(),
            backend_ids: IdAllocator::new(maps::BACKENDS_MAX * ID_LIMIT_FACTOR),
            service_ids: IdAllocator::new(maps::SERVICES_MAX * ID_LIMIT_FACTOR),
            quarantined: Vec::new(),
            sync: Sync::new(&[SourceTable::Frames, SourceTable::Slices]),
            queue: Vec::new(),
            unclaimed: Vec::new(),
            loose: HashMap::new(),
            debris: Vec::new(),
            links: Vec::new(),
            spare: Vec::new(),
        }
    }

    // === tables ===

    /// Adds or replaces a service's frame.
    pub fn upsert_frame(&mut self, frame: &ServiceFrame) {
        let cluster = frame.cluster_id.get();
        self.note_cluster(cluster, &frame.cluster);
        let at = self.service_entry(&frame.name);
        if cluster != self.local {
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
        if cluster.get() == self.local {
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
        let new = self.pools.acquire_slice(slice);
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
        if cluster == self.local {
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
        self.quarantined.retain(|other| *other != cluster);
        self.names.remove(&cluster);
        self.prune();
    }

    // === what is known about clusters ===

    /// Says whether a cluster answers. Backends of one that does not are used only when nothing else is left.
    /// The local cluster always counts as answering.
    pub fn set_cluster_health(&mut self, cluster: ClusterId, healthy: bool) {
        let cluster = cluster.get();
        let before = self.quarantined.clone();
        match (before.binary_search(&cluster), healthy) {
            (Ok(place), true) => drop(self.quarantined.remove(place)),
            (Err(place), false) if cluster != self.local => self.quarantined.insert(place, cluster),
            _ => return,
        }
        for at in self.groups.keys().collect::<Vec<_>>() {
            let Self {
                groups,
                hasher,
                local,
                quarantined,
                ..
            } = self;
            let (local, hasher) = (*local, &*hasher);
            let after = Context {
                local,
                quarantined,
                hasher,
            };
            let group = &mut groups[at];
            group.on_health(
                cluster,
                Context {
                    quarantined: &before,
                    ..after
                },
                after,
            );
            if group.has_changes() {
                self.enqueue(at);
            }
        }
    }

    /// Says that the list of clusters is complete: whatever was restored of others is stale. `clusters` without or with
    /// the local one.
    pub fn clusters_listed(&mut self, clusters: impl IntoIterator<Item = ClusterId>) {
        let local = self.local;
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

    // === changes to a service ===

    fn note_cluster(&mut self, cluster: u16, name: &ClusterName) {
        if self.names.get(&cluster) != Some(name) {
            self.names.insert(cluster, name.clone());
        }
    }

    fn service_entry(&mut self, name: &ServiceName) -> u32 {
        if let Some(&at) = self.service_index.get(name) {
            return at;
        }
        let at = self.services.insert(Service::new(name.clone()));
        self.service_index.insert(name.clone(), at);
        at
    }

    fn tidy(&mut self, at: u32) {
        if self.services[at].tidy()
            && let Some(gone) = self.services.remove(at)
        {
            self.service_index.remove(&gone.name);
        }
    }

    fn enqueue(&mut self, at: u32) {
        let group = &mut self.groups[at];
        if !group.queued {
            group.queued = true;
            self.queue.push(at);
        }
    }

    /// The slice at `place` of a part is new, or replaced `old`; without a place, `old` is gone.
    fn on_slice(&mut self, at: u32, cluster: u16, old: Option<&SliceRecord>, place: Option<usize>) {
        let service = &self.services[at];
        let Some(part) = service.part(cluster) else { return };
        if !service.eligible(part, self.local) {
            return;
        }
        let new = place.and_then(|place| part.slices.get(place));
        let context = Context {
            local: self.local,
            quarantined: &self.quarantined,
            hasher: &self.hasher,
        };
        for &number in &service.groups {
            let group = &mut self.groups[number];
            if !group.filled {
                continue;
            }
            contribute(context, &self.pools, service, group, cluster, old, new);
            if group.has_changes() && !group.queued {
                group.queued = true;
                self.queue.push(number);
            }
        }
    }

    fn set_remote_frame(&mut self, at: u32, cluster: u16, remote: Option<(bool, bool)>) {
        let service = &mut self.services[at];
        let (before, after) = {
            let local_global = service.local.as_ref().is_some_and(|frame| frame.global);
            let part = service.part_entry(cluster);
            let before = std::mem::replace(&mut part.remote, remote);
            let usable = |frame| local_global && frame == Some((true, true));
            (usable(before), usable(remote))
        };
        if before != after {
            self.toggle_part(at, cluster, after);
        }
    }

    /// Adds or removes all that a part contributes to its service's groups.
    fn toggle_part(&mut self, at: u32, cluster: u16, on: bool) {
        let service = &self.services[at];
        let Some(part) = service.part(cluster) else { return };
        let context = Context {
            local: self.local,
            quarantined: &self.quarantined,
            hasher: &self.hasher,
        };
        for &number in &service.groups {
            let group = &mut self.groups[number];
            if !group.filled {
                continue;
            }
            for slice in &part.slices {
                let (old, new) = if on {
                    (None, Some(slice))
                } else {
                    (Some(slice), None)
                };
                contribute(context, &self.pools, service, group, cluster, old, new);
            }
            if group.has_changes() && !group.queued {
                group.queued = true;
                self.queue.push(number);
            }
        }
    }

    fn set_local_frame(&mut self, at: u32, new: Option<Box<LocalFrame>>) {
        let wanted = |port: &GroupPort| {
            let frontends = new.iter().flat_map(|frame| &frame.frontends);
            frontends
                .map(|frontend| frontend.group)
                .any(|group| group == *port)
        };
        // Groups nobody asks for go first, so that what follows concerns those that stay.
        let (kept, gone): (Vec<u32>, Vec<u32>) = self.services[at]
            .groups
            .iter()
            .partition(|number| wanted(&self.groups[**number].port));
        self.services[at].groups = kept;

        let old = std::mem::replace(&mut self.services[at].local, new);
        let is_global = |frame: &Option<Box<LocalFrame>>| frame.as_ref().is_some_and(|frame| frame.global);
        let (was_global, now_global) = (is_global(&old), is_global(&self.services[at].local));
        if was_global != now_global {
            let shared = |part: &&Part| part.cluster != self.local && part.remote == Some((true, true));
            let remotes: Vec<u16> = self.services[at]
                .parts
                .iter()
                .filter(shared)
                .map(|part| part.cluster)
                .collect();
            for cluster in remotes {
                self.toggle_part(at, cluster, now_global);
            }
        }
        self.claim_frontends(at);
        for number in gone {
            self.kill_group(number);
        }
        self.describe_groups(at);
        if let Some(old) = old {
            self.pools.release_frame(&old);
        }
    }

    /// Copies what the frame says about all backends into the groups.
    fn describe_groups(&mut self, at: u32) {
        let service = &self.services[at];
        let Some(frame) = &service.local else { return };
        let flags = service_flag::CLUSTER_IP | if frame.global { service_flag::GLOBAL } else { 0 };
        for &number in &service.groups {
            let group = &mut self.groups[number];
            group.affinity = frame.affinity;
            group.flags = flags;
            if !group.queued {
                group.queued = true;
                self.queue.push(number);
            }
        }
        for number in service.groups.clone() {
            self.drop_stale_ghosts(number);
        }
    }

    /// A new group of a service. The next drain fills it: by then more slices may be there, and all go in at once.
    fn add_group(&mut self, at: u32, port: GroupPort) -> u32 {
        let number = self.groups.insert(Group::new(Some(at), port, at + 1));
        self.services[at].groups.push(number);
        self.enqueue(number);
        number
    }

    /// Hands all eligible slices to a new group.
    fn fill_group(&mut self, number: u32) {
        let context = Context {
            local: self.local,
            quarantined: &self.quarantined,
            hasher: &self.hasher,
        };
        let group = &mut self.groups[number];
        group.filled = true;
        let Some(at) = group.service else { return };
        let service = &self.services[at];
        let parts = || {
            service
                .parts
                .iter()
                .filter(|part| service.eligible(part, self.local))
        };
        let port = group.port;
        let joins = |slice: &&SliceRecord| port.number_in(self.pools.ports(slice.ports)).is_some();
        let endpoints = parts()
            .flat_map(|part| &part.slices)
            .filter(joins)
            .flat_map(|slice| &slice.endpoints);
        let of_family = endpoints.filter(|endpoint| Family::of(&endpoint.address) == port.family);
        group.candidates.reserve(context.hasher, of_family.count());
        for part in parts() {
            for slice in &part.slices {
                contribute(
                    context,
                    &self.pools,
                    service,
                    group,
                    part.cluster,
                    None,
                    Some(slice),
                );
            }
        }
    }
}
