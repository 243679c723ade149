//! From changed groups to ordered operations, and the full pass that compares with what the maps really hold.
//!
//! Order within a plan, over all groups: backends, slots, frontends (their count), slots past the count, orphaned
//! backends. So whatever prefix is applied: a slot below the count names a backend that is there.

use std::collections::{BTreeMap, BTreeSet};

use isthmus_bpf_abi::{Address, Backend, ServiceKey, ServiceValue};

use super::{LoadBalancer, Loose, candidate::Context};
use crate::{LbDump, MapOp, Plan};

/// Operations by phase.
#[derive(Debug, Default)]
struct Phases {
    backends: Plan,
    slots: Plan,
    frontends: Plan,
    past_count: Plan,
    orphans: Plan,
    /// Numbers that are free once the plan is made; never within it.
    freed_backends: Vec<u32>,
    freed_services: Vec<u32>,
}

impl Phases {
    /// Deletes keys, except those that this very plan writes.
    fn clean_up(&mut self, debris: Vec<ServiceKey>) {
        if debris.is_empty() {
            return;
        }
        let put = |op: &MapOp| match op {
            MapOp::ServicePut(key, _) => Some(*key),
            _ => None,
        };
        let written: BTreeSet<ServiceKey> = self
            .slots
            .ops
            .iter()
            .chain(&self.frontends.ops)
            .filter_map(put)
            .collect();
        for key in debris.into_iter().filter(|key| !written.contains(key)) {
            let phase = if key.slot == 0 {
                &mut self.frontends
            } else {
                &mut self.past_count
            };
            phase.push(MapOp::ServiceDelete(key), 0);
        }
    }
}

impl LoadBalancer {
    /// The operations for everything that changed since the last drain.
    pub fn drain(&mut self) -> Plan {
        let mut phases = Phases::default();
        let mut starved = Vec::new();
        for number in std::mem::take(&mut self.queue) {
            self.groups[number].queued = false;
            if self.groups[number].dead {
                let domain = self.groups[number].domain;
                let ids = self.groups[number].clear_ids();
                orphan(ids, domain, &mut phases);
                self.groups.remove(number);
            } else if self.drain_group(number, &mut phases) {
                starved.push(number);
            }
        }
        for number in std::mem::take(&mut self.unclaimed) {
            self.drain_unclaimed(number, &mut phases);
        }
        for (id, domain) in std::mem::take(&mut self.spare) {
            orphan(vec![id], domain, &mut phases);
        }
        let debris = std::mem::take(&mut self.debris);
        phases.clean_up(debris);
        for id in std::mem::take(&mut phases.freed_backends) {
            self.backend_ids.release(id);
        }
        for id in std::mem::take(&mut phases.freed_services) {
            self.service_ids.release(id);
        }
        // With what was just freed the next drain may go on.
        for number in starved {
            self.enqueue(number);
        }
        let mut plan = phases.backends;
        plan.links = std::mem::take(&mut self.links);
        for mut part in [phases.slots, phases.frontends, phases.past_count, phases.orphans] {
            plan.append(&mut part);
        }
        plan
    }

    /// Whether [`Self::drain`] would look at anything.
    pub fn has_changes(&self) -> bool {
        !(self.queue.is_empty()
            && self.unclaimed.is_empty()
            && self.spare.is_empty()
            && self.debris.is_empty())
    }

    /// True if numbers ran out.
    fn drain_group(&mut self, number: u32, phases: &mut Phases) -> bool {
        if !self.groups[number].filled {
            self.fill_group(number);
            // It is being drained: what goes now needs no other turn.
            self.groups[number].queued = true;
            self.drop_stale_ghosts(number);
            self.groups[number].queued = false;
        }
        let Self {
            groups,
            frontends,
            loose,
            backend_ids,
            ..
        } = self;
        let context = Context {
            local: self.local,
            quarantined: &self.quarantined,
            hasher: &self.hasher,
        };
        let group = &mut groups[number];
        let protocol = group.port.protocol.number();
        let delta = group.settle(context, backend_ids, |address, port| {
            take_loose(loose, (*address, port, protocol))
        });
        let domain = group.domain;
        for (id, backend) in delta.written {
            phases.backends.push(MapOp::BackendPut(id, backend), domain);
        }
        let len = group.slots.len() as u32;
        for &at in &group.frontends {
            let frontend = &mut frontends[at];
            let key = frontend.map_key();
            let mut put_slot = |position: u32| {
                let backend = group.candidates[group.slots[position as usize]].id;
                // In range: a group has at most SLOTS_MAX slots.
                let slot = key.at_slot((position + 1) as u16);
                let value = ServiceValue::slot(frontend.service_id, backend);
                phases.slots.push(MapOp::ServicePut(slot, value), domain);
            };
            if frontend.fresh {
                (0..len).for_each(&mut put_slot);
            } else {
                delta.touched.iter().copied().for_each(&mut put_slot);
            }
            let new = (len as u16, group.flags);
            if frontend.fresh || frontend.written != Some(new) {
                let value = ServiceValue::frontend(frontend.service_id, new.0, new.1);
                phases.frontends.push(MapOp::ServicePut(key, value), domain);
            }
            for slot in new.0..frontend.written.map_or(0, |(count, _)| count) {
                phases
                    .past_count
                    .push(MapOp::ServiceDelete(key.at_slot(slot + 1)), domain);
            }
            frontend.written = Some(new);
            frontend.fresh = false;
            frontend.domain = domain;
        }
        orphan(delta.deleted, domain, phases);
        delta.starved
    }

    fn drain_unclaimed(&mut self, number: u32, phases: &mut Phases) {
        if self
            .frontends
            .get(number)
            .is_none_or(|frontend| frontend.group.is_some())
        {
            return;
        }
        let Some(frontend) = self.frontends.remove(number) else {
            return;
        };
        self.frontend_index.remove(&frontend.key);
        phases.freed_services.push(frontend.service_id);
        let key = frontend.map_key();
        if let Some((count, _)) = frontend.written {
            phases.frontends.push(MapOp::ServiceDelete(key), frontend.domain);
            for slot in 0..count {
                phases
                    .past_count
                    .push(MapOp::ServiceDelete(key.at_slot(slot + 1)), frontend.domain);
            }
        }
    }

    /// What the maps should hold, as of the last drain.
    pub fn desired(&self) -> LbDump {
        let context = Context {
            local: self.local,
            quarantined: &self.quarantined,
            hasher: &self.hasher,
        };
        let mut dump = LbDump::default();
        for (_, group) in self.groups.iter() {
            for at in group.candidates.live() {
                let candidate = &group.candidates[at];
                if candidate.is_written() {
                    dump.backends
                        .push((candidate.id, group.backend(context, candidate)));
                }
            }
            for &at in &group.frontends {
                let frontend = &self.frontends[at];
                let Some((count, flags)) = frontend.written else {
                    continue;
                };
                let key = frontend.map_key();
                dump.services
                    .push((key, ServiceValue::frontend(frontend.service_id, count, flags)));
                for (position, &at) in group.slots.iter().enumerate() {
                    let value = ServiceValue::slot(frontend.service_id, group.candidates[at].id);
                    dump.services.push((key.at_slot((position + 1) as u16), value));
                }
            }
        }
        dump.services.sort_unstable_by_key(|(key, _)| *key);
        dump.backends.sort_unstable_by_key(|(id, _)| *id);
        dump
    }

    /// The full pass: what makes the maps, as dumped, what they should be. Empty when all is well, so what it finds is a
    /// bug or somebody else's doing. To be called right after a drain whose plan was applied.
    ///
    /// Restored backends that no slot named, and that no source has named yet, are left alone.
    pub fn audit(&self, actual: &LbDump) -> Plan {
        let mut desired = self.desired();
        let loose: BTreeSet<u32> = self.loose.values().flatten().map(|(id, _)| *id).collect();
        let kept = actual.backends.iter().filter(|(id, _)| loose.contains(id));
        desired.backends.extend(kept.copied());
        plan_maps(actual, &desired)
    }
}

/// The lowest number that an earlier agent gave to this backend, if one is left over.
fn take_loose(loose: &mut Loose, what: (Address, u16, u8)) -> Option<u32> {
    let ids = loose.get_mut(&what)?;
    let taken = ids.pop();
    if ids.is_empty() {
        loose.remove(&what);
    }
    taken.map(|(id, _)| id)
}

fn orphan(ids: Vec<u32>, domain: u32, phases: &mut Phases) {
    for id in ids {
        phases.orphans.push(MapOp::BackendDelete(id), domain);
        phases.freed_backends.push(id);
    }
}

/// Operations from one content of the two maps to another, in the order of a plan. Walks the union of both.
///
/// If every lookup in `actual` resolves, then so it does after any prefix, to a backend of `actual` or of `desired`.
pub fn plan_maps(actual: &LbDump, desired: &LbDump) -> Plan {
    let services = |dump: &LbDump| {
        dump.services
            .iter()
            .copied()
            .collect::<BTreeMap<ServiceKey, ServiceValue>>()
    };
    let backends = |dump: &LbDump| dump.backends.iter().copied().collect::<BTreeMap<u32, Backend>>();
    let (old_services, new_services) = (services(actual), services(desired));
    let (old_backends, new_backends) = (backends(actual), backends(desired));
    let mut ops = Vec::new();
    for (id, backend) in &new_backends {
        if old_backends.get(id) != Some(backend) {
            ops.push(MapOp::BackendPut(*id, *backend));
        }
    }
    for (key, value) in &new_services {
        if old_services.get(key) != Some(value) {
            ops.push(MapOp::ServicePut(*key, *value));
        }
    }
    let gone = old_services.keys().filter(|key| !new_services.contains_key(*key));
    ops.extend(gone.map(|key| MapOp::ServiceDelete(*key)));
    let gone = old_backends.keys().filter(|id| !new_backends.contains_key(*id));
    ops.extend(gone.map(|id| MapOp::BackendDelete(*id)));
    ops.sort_by_key(MapOp::phase);
    // One domain: the pass is rare and small, and knows nothing of groups.
    let domains = vec![u32::MAX; ops.len()];
    Plan {
        ops,
        domains,
        links: Vec::new(),
    }
}
