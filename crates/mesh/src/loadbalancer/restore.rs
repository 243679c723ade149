//! Restart: what an earlier agent left in the maps becomes backends and frontends that wait to be named again.
//!
//! In: a dump of the maps. Out: frontends with their slots in place, and backends that keep their numbers ("ghosts").
//! A ghost takes traffic until a source names it (then it is like any other) or until its cluster's tables are listed in
//! full without it. A frontend waits in the same way for the local cluster's tables. One that its source names as unusable
//! goes too, unless nothing else is left and a source that may name a better one is not listed in full: then it stays as
//! the last resort, since a frontend without backends is certainly worse than one with a doubtful backend.
//!
//! Entries that no lookup can reach, or that no planner of ours wrote (another family or protocol than the frontend's,
//! numbers out of range), are not kept: the first plan removes or rewrites them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use hashbrown::HashMap;
use isthmus_bpf_abi::{
    Backend, MaglevChunk, MaglevKey, PROTO_TCP, PROTO_UDP, SCOPE_INTERNAL, ServiceKey, ServiceValue,
    SourceRangeKey, service_flag,
};
use isthmus_model::Protocol;

use super::{
    LoadBalancer,
    frontend::Frontend,
    group::Group,
    record::{GroupPort, Reach},
    table::{Table, chunks_of},
};
use crate::{Family, LbDump};

/// Port name of a group that no service has: no text has this number.
const NO_NAME: u32 = u32::MAX;
/// Failure domains of restored groups; those of services are lower.
const DOMAIN_RESTORED: u32 = 1 << 31;
/// Flags of slot 0 that frontends of a group have in common.
const GROUP_FLAGS: u16 = service_flag::GLOBAL | service_flag::AFFINITY;

/// What restoring looks things up in.
struct Found {
    services: BTreeMap<ServiceKey, ServiceValue>,
    backends: BTreeMap<u32, Backend>,
    /// Chunks of Maglev tables, by service number.
    tables: BTreeMap<u32, BTreeMap<u32, Arc<MaglevChunk>>>,
    /// Source ranges, by service number.
    ranges: BTreeMap<u32, Vec<SourceRangeKey>>,
    /// The group that has a backend's number.
    owner: HashMap<u32, u32>,
    by_slots: BTreeMap<GroupLook, u32>,
}

/// Frontends that look alike share a group: slots, protocol, family, flags, seconds of affinity, whether there is a table.
type GroupLook = (Vec<u32>, u8, Family, u16, u32, bool);

impl LoadBalancer {
    /// Takes over the maps' contents. To be called once, before any event.
    ///
    /// # Panics
    /// If events came before.
    pub fn restore(&mut self, dump: &LbDump) {
        assert!(
            self.services.len() == 0 && self.frontends.len() == 0,
            "restore comes before the first event"
        );
        let mut found = Found {
            services: dump.services.iter().copied().collect(),
            backends: dump.backends.iter().copied().collect(),
            tables: BTreeMap::new(),
            ranges: BTreeMap::new(),
            owner: HashMap::new(),
            by_slots: BTreeMap::new(),
        };
        for (key, chunk) in &dump.maglev {
            let chunks = found.tables.entry(key.service_id).or_default();
            chunks.insert(key.chunk, Arc::clone(chunk));
        }
        for key in &dump.source_ranges {
            found.ranges.entry(key.service_id).or_default().push(*key);
        }
        // No number of the dump is given out anew before its entry is gone.
        for id in found.backends.keys() {
            self.backend_ids.reserve(*id);
        }
        let keys: Vec<ServiceKey> = found.services.keys().copied().collect();
        for key in keys.iter().filter(|key| key.slot == 0 && well_formed(key)) {
            self.restore_frontend(*key, &mut found);
        }
        self.debris = keys.into_iter().filter(|key| !self.reaches(key)).collect();
        self.range_debris = found.ranges.into_values().flatten().collect();
        self.table_debris = found
            .tables
            .iter()
            .flat_map(|(service_id, chunks)| {
                chunks.keys().map(|chunk| MaglevKey {
                    service_id: *service_id,
                    chunk: *chunk,
                })
            })
            .collect();
        let (backends, owner) = (found.backends, found.owner);
        // Descending, so that the lowest number of a backend is taken first.
        for (id, backend) in backends.iter().rev().filter(|(id, _)| !owner.contains_key(*id)) {
            let what = (backend.address, u16::from_be_bytes(backend.port), backend.proto);
            let usable = self.backend_ids.is_live(*id) && backend.pad == 0;
            if usable {
                self.loose
                    .entry(what)
                    .or_default()
                    .push((*id, backend.cluster_id));
            } else {
                self.spare.push((*id, 0));
            }
        }
        self.backend_ids.start_after_live();
        self.service_ids.start_after_live();
    }

    /// Whether a restored frontend accounts for this entry.
    fn reaches(&self, key: &ServiceKey) -> bool {
        let frontend =
            self.frontend_index
                .get(&(key.address, u16::from_be_bytes(key.port), key.proto, key.scope));
        well_formed(key)
            && frontend.is_some_and(|number| {
                self.frontends[*number]
                    .written
                    .is_some_and(|value| key.slot <= value.count)
            })
    }

    fn restore_frontend(&mut self, key: ServiceKey, found: &mut Found) {
        let Some(value) = found.services.get(&key).copied() else {
            return;
        };
        let family = Family::of(&key.address);
        let fits = |backend: &Backend| backend.proto == key.proto && Family::of(&backend.address) == family;
        let mut exact = true;
        let mut ids = Vec::new();
        for slot in 1..=value.count {
            let entry = found.services.get(&key.at_slot(slot));
            exact &= entry.is_some_and(|entry| entry.service_id == value.service_id);
            let id = entry.map(|entry| entry.backend_id);
            match id.filter(|id| found.backends.get(id).is_some_and(fits) && self.backend_ids.is_live(*id)) {
                Some(id) => ids.push(id),
                None => exact = false,
            }
        }
        let service_id = if self.service_ids.reserve(value.service_id) {
            value.service_id
        } else {
            exact = false;
            self.service_ids.allocate().unwrap_or(0)
        };
        let mine = service_id == value.service_id;
        let table = self.restore_table(&value, mine, &ids, found);
        exact &= table.is_some() == (value.flags & service_flag::MAGLEV != 0);
        let flags = value.flags & GROUP_FLAGS;
        let affinity = match flags & service_flag::AFFINITY {
            0 => 0,
            _ => value.affinity_seconds(),
        };
        let look = (ids.clone(), key.proto, family, flags, affinity, table.is_some());
        let group = match found.by_slots.get(&look) {
            Some(group) if !ids.is_empty() => *group,
            _ => {
                let (group, kept) = self.restore_group(key, family, &ids, found);
                exact &= kept;
                found.by_slots.insert(look, group);
                group
            }
        };
        let restored = &mut self.groups[group];
        let domain = restored.domain;
        restored.flags = flags & !service_flag::AFFINITY;
        restored.affinity_seconds = affinity;
        let mut frontend = Frontend::new(
            (key.address, u16::from_be_bytes(key.port), key.proto, key.scope),
            service_id,
        );
        if let Some(table) = table {
            restored.wants_table = true;
            exact &= restored.table.as_ref().is_none_or(|known| *known == table);
            restored.table.get_or_insert(table);
            frontend.table_chunks = chunks_of(self.maglev.table_size);
            self.table_chunks += frontend.table_chunks;
        }
        frontend.group = Some(group);
        frontend.flags = value.flags & !(GROUP_FLAGS | service_flag::MAGLEV);
        frontend.written = Some(value);
        if mine {
            frontend.written_ranges = found.ranges.remove(&service_id).unwrap_or_default();
            frontend.written_ranges.sort_unstable();
        }
        frontend.fresh = !exact;
        frontend.domain = domain;
        frontend.restored = true;
        let number = self.frontends.insert(frontend);
        self.frontend_index.insert(self.frontends[number].key, number);
        self.groups[group].frontends.push(number);
        if !exact {
            self.enqueue(group);
        }
    }

    /// The Maglev table of a frontend, if it is whole and names its backends alone. Chunks that are left in `found` go.
    fn restore_table(
        &self,
        value: &ServiceValue,
        mine: bool,
        ids: &[u32],
        found: &mut Found,
    ) -> Option<Table> {
        if value.flags & service_flag::MAGLEV == 0 || !mine {
            return None;
        }
        let chunks = found.tables.get(&value.service_id)?;
        let numbered = (0..).zip(chunks.keys()).all(|(want, got)| want == *got);
        let ids: BTreeSet<u32> = ids.iter().copied().collect();
        let chunks: Vec<_> = chunks.values().cloned().collect();
        let table = Table::restore(self.maglev.table_size, chunks, |id| ids.contains(&id));
        let table = table.filter(|_| numbered)?;
        found.tables.remove(&value.service_id);
        Some(table)
    }

    /// A group of ghosts. The second value is false if some of the numbers are another group's.
    fn restore_group(
        &mut self,
        key: ServiceKey,
        family: Family,
        ids: &[u32],
        found: &mut Found,
    ) -> (u32, bool) {
        let protocol = if key.proto == PROTO_TCP {
            Protocol::Tcp
        } else {
            Protocol::Udp
        };
        let port = GroupPort {
            name: NO_NAME,
            protocol,
            family,
            reach: Reach::All,
        };
        let number = self.groups.insert(Group::new(None, port, 0));
        let context = &self.context;
        let group = &mut self.groups[number];
        group.domain = DOMAIN_RESTORED | number;
        let mut kept = true;
        let mut seen = BTreeSet::new();
        for id in ids {
            let Some(backend) = found.backends.get(id) else {
                kept = false;
                continue;
            };
            if !seen.insert(*id) {
                kept &= group.add_ghost_slot(context, backend);
                continue;
            }
            let own = *found.owner.entry(*id).or_insert(number) == number;
            let added = group.add_ghost(context, backend, if own { *id } else { 0 });
            if own && !added {
                // A second number for the same backend.
                found.owner.remove(id);
            }
            kept &= own && added;
        }
        (number, kept)
    }
}

/// Whether a planner of ours can have written this key.
fn well_formed(key: &ServiceKey) -> bool {
    matches!(key.proto, PROTO_TCP | PROTO_UDP) && key.scope <= SCOPE_INTERNAL && key.pad == [0; 2]
}
