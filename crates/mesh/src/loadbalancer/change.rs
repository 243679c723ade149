//! Changes to a service: what a frame, a slice or a part of another cluster does to its groups.
//!
//! In: the calls of [`LoadBalancer`]. Out: groups with changed candidates, queued for the next drain.

use std::{collections::BTreeSet, sync::Arc};

use isthmus_bpf_abi::service_flag;
use isthmus_model::{Algorithm, ClusterName, ServiceName};

use super::{
    LoadBalancer,
    contribute::contribute,
    exposed::FrontendRecord,
    group::Group,
    order::Order,
    record::{GroupPort, LocalFrame, Part, Service, SliceRecord},
};
use crate::Family;

impl LoadBalancer {
    pub(super) fn note_cluster(&mut self, cluster: u16, name: &ClusterName) {
        if self.names.get(&cluster) != Some(name) {
            self.names.insert(cluster, name.clone());
            self.reorder();
        }
    }

    pub(super) fn service_entry(&mut self, name: &ServiceName) -> u32 {
        if let Some(&at) = self.service_index.get(name) {
            return at;
        }
        let at = self.services.insert(Service::new(name.clone()));
        self.service_index.insert(name.clone(), at);
        at
    }

    pub(super) fn tidy(&mut self, at: u32) {
        if self.services[at].tidy()
            && let Some(gone) = self.services.remove(at)
        {
            self.service_index.remove(&gone.name);
        }
    }

    pub(super) fn enqueue(&mut self, at: u32) {
        let group = &mut self.groups[at];
        if !group.queued {
            group.queued = true;
            self.queue.push(at);
        }
    }

    /// The slice at `place` of a part is new, or replaced `old`; without a place, `old` is gone.
    pub(super) fn on_slice(
        &mut self,
        at: u32,
        cluster: u16,
        old: Option<&SliceRecord>,
        place: Option<usize>,
    ) {
        let service = &self.services[at];
        let Some(part) = service.part(cluster) else { return };
        if !service.eligible(part, self.context.local) {
            return;
        }
        let new = place.and_then(|place| part.slices.get(place));
        for &number in &service.groups {
            let group = &mut self.groups[number];
            if !group.filled {
                continue;
            }
            contribute(&self.context, &self.pools, service, group, cluster, old, new);
            if group.has_changes() && !group.queued {
                group.queued = true;
                self.queue.push(number);
            }
        }
    }

    pub(super) fn set_remote_frame(&mut self, at: u32, cluster: u16, remote: Option<(bool, bool)>) {
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
    pub(super) fn toggle_part(&mut self, at: u32, cluster: u16, on: bool) {
        let service = &self.services[at];
        let Some(part) = service.part(cluster) else { return };
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
                contribute(&self.context, &self.pools, service, group, cluster, old, new);
            }
            if group.has_changes() && !group.queued {
                group.queued = true;
                self.queue.push(number);
            }
        }
    }

    pub(super) fn set_local_frame(&mut self, at: u32, new: Option<Box<LocalFrame>>) {
        // Groups nobody asks for go first, so that what follows concerns those that stay.
        let gone = self.split_groups(at, &self.wanted_frontends(new.as_deref()));
        let old = std::mem::replace(&mut self.services[at].local, new);
        let is_global = |frame: &Option<Box<LocalFrame>>| frame.as_ref().is_some_and(|frame| frame.global);
        let (was_global, now_global) = (is_global(&old), is_global(&self.services[at].local));
        if was_global != now_global {
            let shared =
                |part: &&Part| part.cluster != self.context.local && part.remote == Some((true, true));
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

    /// Leaves a service the groups that these frontends need; returns the others.
    pub(super) fn split_groups(&mut self, at: u32, wanted: &[FrontendRecord]) -> Vec<u32> {
        let ports: BTreeSet<GroupPort> = wanted.iter().map(|frontend| frontend.group).collect();
        let (kept, gone) = self.services[at]
            .groups
            .iter()
            .partition(|number| ports.contains(&self.groups[**number].port));
        self.services[at].groups = kept;
        gone
    }

    /// Copies what the frame says about all backends into the groups.
    pub(super) fn describe_groups(&mut self, at: u32) {
        let service = &self.services[at];
        let Some(frame) = &service.local else { return };
        let flags = if frame.global { service_flag::GLOBAL } else { 0 };
        let order = Order::new(self.context.local, frame.affinity, &frame.preference, &self.names);
        let order = Arc::new(order);
        let wants_table = match frame.algorithm {
            Algorithm::Unspecified => self.maglev.by_default,
            Algorithm::Random => false,
            Algorithm::Maglev => true,
        };
        for &number in &service.groups {
            let group = &mut self.groups[number];
            group.set_order(&self.context, &order);
            group.flags = flags;
            group.affinity_seconds = frame.affinity_seconds;
            group.slow_start_seconds = frame.preference.slow_start_seconds;
            group.wants_table = wants_table && self.maglev.table_size > 0;
            if !group.queued {
                group.queued = true;
                self.queue.push(number);
            }
        }
        for number in service.groups.clone() {
            self.drop_stale_ghosts(number);
        }
    }

    /// A cluster has another name than before: tiers may mean other clusters.
    pub(super) fn reorder(&mut self) {
        let named: Vec<u32> = self
            .services
            .iter()
            .filter(|(_, service)| {
                let frame = service.local.as_deref();
                frame.is_some_and(|frame| !frame.preference.tiers.is_empty())
            })
            .map(|(at, _)| at)
            .collect();
        for at in named {
            self.describe_groups(at);
        }
    }

    /// A new group of a service. The next drain fills it: by then more slices may be there, and all go in at once.
    pub(super) fn add_group(&mut self, at: u32, port: GroupPort) -> u32 {
        let number = self.groups.insert(Group::new(Some(at), port, at + 1));
        self.services[at].groups.push(number);
        self.enqueue(number);
        number
    }

    /// Hands all eligible slices to a new group.
    pub(super) fn fill_group(&mut self, number: u32) {
        let group = &mut self.groups[number];
        group.filled = true;
        let Some(at) = group.service else { return };
        let service = &self.services[at];
        let parts = || {
            service
                .parts
                .iter()
                .filter(|part| service.eligible(part, self.context.local))
        };
        let port = group.port;
        let joins = |slice: &&SliceRecord| port.number_in(self.pools.ports(slice.ports)).is_some();
        let endpoints = parts()
            .flat_map(|part| &part.slices)
            .filter(joins)
            .flat_map(|slice| &slice.endpoints);
        let of_family = endpoints.filter(|endpoint| Family::of(&endpoint.address) == port.family);
        group.candidates.reserve(&self.context.hasher, of_family.count());
        for part in parts() {
            for slice in &part.slices {
                contribute(
                    &self.context,
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
