//! From changed groups to ordered operations, and the full pass that compares with what the maps really hold.
//!
//! Order within a plan, over all groups: backends, source ranges, slots, Maglev tables, frontends (their count and flags), slots
//! past the count, tables and ranges that nobody reads any more, orphaned backends. So whatever prefix is applied: a slot below
//! the count, or an entry of a table that is in use, names a backend that is there; and nobody may ask who neither may before
//! nor after.

use std::collections::{BTreeMap, BTreeSet};

use isthmus_bpf_abi::{
    Address, Backend, MaglevKey, ServiceKey, ServiceValue, SourceRangeKey, maps, service_flag,
};

use super::candidate::Context;
use super::{
    LoadBalancer, Loose,
    frontend::Frontend,
    group::Group,
    table::{Table, chunks_of},
};
use crate::{LbDump, MapOp, Plan, maglev::MaglevConfig};

/// Operations by phase.
#[derive(Debug, Default)]
struct Phases {
    backends: Plan,
    ranges: Plan,
    slots: Plan,
    tables: Plan,
    frontends: Plan,
    past_count: Plan,
    old_tables: Plan,
    old_ranges: Plan,
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

    fn clean_up_tables(&mut self, debris: Vec<MaglevKey>) {
        if debris.is_empty() {
            return;
        }
        let put = |op: &MapOp| match op {
            MapOp::MaglevPut(key, _) => Some(*key),
            _ => None,
        };
        let written: BTreeSet<MaglevKey> = self.tables.ops.iter().filter_map(put).collect();
        for key in debris.into_iter().filter(|key| !written.contains(key)) {
            self.old_tables.push(MapOp::MaglevDelete(key), 0);
        }
    }

    fn clean_up_ranges(&mut self, debris: Vec<SourceRangeKey>) {
        if debris.is_empty() {
            return;
        }
        let put = |op: &MapOp| match op {
            MapOp::SourceRangePut(key) => Some(*key),
            _ => None,
        };
        let written: BTreeSet<SourceRangeKey> = self.ranges.ops.iter().filter_map(put).collect();
        for key in debris.into_iter().filter(|key| !written.contains(key)) {
            self.old_ranges.push(MapOp::SourceRangeDelete(key), 0);
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
        let debris = std::mem::take(&mut self.table_debris);
        phases.clean_up_tables(debris);
        let debris = std::mem::take(&mut self.range_debris);
        phases.clean_up_ranges(debris);
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
        for mut part in [
            phases.ranges,
            phases.slots,
            phases.tables,
            phases.frontends,
            phases.past_count,
            phases.old_tables,
            phases.old_ranges,
            phases.orphans,
        ] {
            plan.append(&mut part);
        }
        plan
    }

    /// Whether [`Self::drain`] would look at anything.
    pub fn has_changes(&self) -> bool {
        !(self.queue.is_empty()
            && self.unclaimed.is_empty()
            && self.spare.is_empty()
            && self.debris.is_empty()
            && self.table_debris.is_empty()
            && self.range_debris.is_empty())
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
            context,
            maglev,
            table_chunks,
            ramping,
            departed,
            ..
        } = self;
        let group = &mut groups[number];
        let protocol = group.port.protocol.number();
        let mut delta = group.settle(context, backend_ids, |address, port| {
            take_loose(loose, (*address, port, protocol))
        });
        for (address, port) in std::mem::take(&mut delta.left) {
            departed.add((address, port, protocol));
        }
        let domain = group.domain;
        if group.is_ramping() {
            ramping.insert(number);
        }
        let changed = if delta.reshared || group.wants_table != group.table.is_some() {
            renew_table(group, context, maglev)
        } else {
            Vec::new()
        };
        for (id, backend) in std::mem::take(&mut delta.written) {
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
            let with_table = write_table(group, frontend, &changed, maglev.table_size, table_chunks, phases);
            let ranges = frontend.range_keys();
            for range in ranges
                .iter()
                .filter(|range| !frontend.written_ranges.contains(range))
            {
                phases.ranges.push(MapOp::SourceRangePut(*range), domain);
            }
            for range in frontend
                .written_ranges
                .iter()
                .filter(|range| !ranges.contains(range))
            {
                phases.old_ranges.push(MapOp::SourceRangeDelete(*range), domain);
            }
            frontend.written_ranges = ranges;
            let value = slot_0(group, frontend, len as u16, with_table);
            if frontend.fresh || frontend.written != Some(value) {
                phases.frontends.push(MapOp::ServicePut(key, value), domain);
            }
            for slot in value.count..frontend.written.map_or(0, |value| value.count) {
                phases
                    .past_count
                    .push(MapOp::ServiceDelete(key.at_slot(slot + 1)), domain);
            }
            frontend.written = Some(value);
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
        let Some(mut frontend) = self.frontends.remove(number) else {
            return;
        };
        self.frontend_index.remove(&frontend.key);
        drop_table(&mut frontend, &mut self.table_chunks, phases);
        for range in &frontend.written_ranges {
            phases
                .old_ranges
                .push(MapOp::SourceRangeDelete(*range), frontend.domain);
        }
        phases.freed_services.push(frontend.service_id);
        let key = frontend.map_key();
        if let Some(ServiceValue { count, .. }) = frontend.written {
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
        let mut dump = LbDump::default();
        for (_, group) in self.groups.iter() {
            for at in group.candidates.live() {
                let candidate = &group.candidates[at];
                if candidate.is_written() {
                    dump.backends
                        .push((candidate.id, group.backend(&self.context, candidate)));
                }
            }
            for &at in &group.frontends {
                let frontend = &self.frontends[at];
                let Some(value) = frontend.written else {
                    continue;
                };
                let key = frontend.map_key();
                dump.services.push((key, value));
                dump.source_ranges.extend(&frontend.written_ranges);
                if let Some(table) = group.table.as_ref().filter(|_| frontend.table_chunks > 0) {
                    let service_id = frontend.service_id;
                    let chunks = (0..).zip(table.chunks());
                    dump.maglev.extend(
                        chunks.map(|(chunk, content)| (MaglevKey { service_id, chunk }, content.clone())),
                    );
                }
                for (position, &at) in group.slots.iter().enumerate() {
                    let value = ServiceValue::slot(frontend.service_id, group.candidates[at].id);
                    dump.services.push((key.at_slot((position + 1) as u16), value));
                }
            }
        }
        dump.services.sort_unstable_by_key(|(key, _)| *key);
        dump.backends.sort_unstable_by_key(|(id, _)| *id);
        dump.maglev.sort_unstable_by_key(|(key, _)| *key);
        dump.source_ranges.sort_unstable();
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

/// Slot 0 of a frontend.
fn slot_0(group: &Group, frontend: &Frontend, count: u16, with_table: bool) -> ServiceValue {
    let table = if with_table { service_flag::MAGLEV } else { 0 };
    let value = ServiceValue::frontend(frontend.service_id, count, group.flags | frontend.flags | table);
    match group.affinity_seconds {
        0 => value,
        seconds => value.with_affinity(seconds),
    }
}

/// Makes a group's Maglev table anew, or gives it up. Returns the chunks that differ.
fn renew_table(group: &mut Group, context: &Context, config: &MaglevConfig) -> Vec<u32> {
    if group.ghosts > 0 && group.wants_table && group.table.as_ref().is_some_and(|table| table.fits(group)) {
        // Restored, and not all is named yet: what it says is still true, and another one would last for a moment only.
        return Vec::new();
    }
    let table = if group.wants_table && config.table_size > 0 {
        Table::build(config, group, &group.ideal_shares(context))
    } else {
        None
    };
    let changed = table
        .as_ref()
        .map_or_else(Vec::new, |table| table.changed(group.table.as_ref()));
    group.table = table;
    changed
}

/// Writes what changed of a frontend's Maglev table, or all of it, or takes it away. Whether it has one then.
fn write_table(
    group: &Group,
    frontend: &mut Frontend,
    changed: &[u32],
    size: u32,
    used: &mut u32,
    phases: &mut Phases,
) -> bool {
    let chunks = chunks_of(size);
    let Some(table) = &group.table else {
        drop_table(frontend, used, phases);
        return false;
    };
    let has = frontend.table_chunks > 0;
    if !has && *used + chunks > maps::MAGLEV_MAX {
        return false;
    }
    let all: Vec<u32>;
    let written = if has && !frontend.fresh {
        changed
    } else {
        all = (0..chunks).collect();
        all.as_slice()
    };
    for chunk in written {
        let key = MaglevKey {
            service_id: frontend.service_id,
            chunk: *chunk,
        };
        // In range: a table has as many chunks as its size says.
        let content = table.chunks()[*chunk as usize].clone();
        phases.tables.push(MapOp::MaglevPut(key, content), group.domain);
    }
    if !has {
        frontend.table_chunks = chunks;
        *used += chunks;
    }
    true
}

/// Takes a frontend's Maglev table out of the map, once nobody reads it.
fn drop_table(frontend: &mut Frontend, used: &mut u32, phases: &mut Phases) {
    *used -= frontend.table_chunks;
    for chunk in 0..std::mem::take(&mut frontend.table_chunks) {
        let key = MaglevKey {
            service_id: frontend.service_id,
            chunk,
        };
        phases.old_tables.push(MapOp::MaglevDelete(key), frontend.domain);
    }
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
    let tables = |dump: &LbDump| dump.maglev.iter().cloned().collect::<BTreeMap<_, _>>();
    let (old_tables, new_tables) = (tables(actual), tables(desired));
    for (key, chunk) in &new_tables {
        if old_tables.get(key) != Some(chunk) {
            ops.push(MapOp::MaglevPut(*key, chunk.clone()));
        }
    }
    let gone = old_tables.keys().filter(|key| !new_tables.contains_key(*key));
    ops.extend(gone.map(|key| MapOp::MaglevDelete(*key)));
    let ranges = |dump: &LbDump| dump.source_ranges.iter().copied().collect::<BTreeSet<_>>();
    let (old_ranges, new_ranges) = (ranges(actual), ranges(desired));
    ops.extend(
        new_ranges
            .difference(&old_ranges)
            .map(|key| MapOp::SourceRangePut(*key)),
    );
    ops.extend(
        old_ranges
            .difference(&new_ranges)
            .map(|key| MapOp::SourceRangeDelete(*key)),
    );
    ops.sort_by_key(MapOp::phase);
    // One domain: the pass is rare and small, and knows nothing of groups.
    let domains = vec![u32::MAX; ops.len()];
    Plan {
        ops,
        domains,
        links: Vec::new(),
    }
}
