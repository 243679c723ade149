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

use std::collections::BTreeMap;

use hashbrown::HashMap;
use isthmus_bpf_abi::{Backend, PROTO_TCP, PROTO_UDP, SCOPE_EXTERNAL, ServiceKey, ServiceValue};
use isthmus_model::Protocol;

use super::{LoadBalancer, candidate::Context, frontend::Frontend, group::Group, record::GroupPort};
use crate::{Family, LbDump};

/// Port name of a group that no service has: no text has this number.
const NO_NAME: u32 = u32::MAX;
/// Failure domains of restored groups; those of services are lower.
const DOMAIN_RESTORED: u32 = 1 << 31;

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
        let backends: BTreeMap<u32, Backend> = dump.backends.iter().copied().collect();
        let services: BTreeMap<ServiceKey, ServiceValue> = dump.services.iter().copied().collect();
        // No number of the dump is given out anew before its entry is gone.
        for id in backends.keys() {
            self.backend_ids.reserve(*id);
        }
        let mut owner: HashMap<u32, u32> = HashMap::new();
        let mut by_slots: BTreeMap<(Vec<u32>, u8, Family), u32> = BTreeMap::new();
        for (key, value) in &services {
            if key.slot == 0 && well_formed(key) {
                self.restore_frontend(*key, value, &services, &backends, &mut owner, &mut by_slots);
            }
        }
        self.debris = services.into_keys().filter(|key| !self.reaches(key)).collect();
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
        let frontend = self
            .frontend_index
            .get(&(key.address, u16::from_be_bytes(key.port), key.proto));
        well_formed(key)
            && frontend.is_some_and(|number| {
                self.frontends[*number]
                    .written
                    .is_some_and(|(count, _)| key.slot <= count)
            })
    }

    fn restore_frontend(
        &mut self,
        key: ServiceKey,
        value: &ServiceValue,
        services: &BTreeMap<ServiceKey, ServiceValue>,
        backends: &BTreeMap<u32, Backend>,
        owner: &mut HashMap<u32, u32>,
        by_slots: &mut BTreeMap<(Vec<u32>, u8, Family), u32>,
    ) {
        let family = Family::of(&key.address);
        let fits = |backend: &Backend| backend.proto == key.proto && Family::of(&backend.address) == family;
        let mut exact = true;
        let mut ids = Vec::new();
        for slot in 1..=value.count {
            let found = services.get(&key.at_slot(slot));
            exact &= found.is_some_and(|found| found.service_id == value.service_id);
            let id = found.map(|found| found.backend_id);
            match id.filter(|id| backends.get(id).is_some_and(fits) && self.backend_ids.is_live(*id)) {
                Some(id) if !ids.contains(&id) => ids.push(id),
                _ => exact = false,
            }
        }
        let service_id = if self.service_ids.reserve(value.service_id) {
            value.service_id
        } else {
            exact = false;
            self.service_ids.allocate().unwrap_or(0)
        };
        let same = (ids.clone(), key.proto, family);
        let group = match by_slots.get(&same) {
            Some(group) if !ids.is_empty() => *group,
            _ => {
                let (group, kept) = self.restore_group(key, family, &ids, backends, owner);
                exact &= kept;
                by_slots.insert(same, group);
                group
            }
        };
        let domain = self.groups[group].domain;
        self.groups[group].flags = value.flags;
        let number = self.frontends.insert(Frontend {
            key: (key.address, u16::from_be_bytes(key.port), key.proto),
            service_id,
            claims: Vec::new(),
            group: Some(group),
            written: Some((value.count, value.flags)),
            fresh: !exact,
            domain,
            restored: true,
        });
        self.frontend_index.insert(self.frontends[number].key, number);
        self.groups[group].frontends.push(number);
        if !exact {
            self.enqueue(group);
        }
    }

    /// A group of ghosts. The second value is false if some of the numbers are another group's.
    fn restore_group(
        &mut self,
        key: ServiceKey,
        family: Family,
        ids: &[u32],
        backends: &BTreeMap<u32, Backend>,
        owner: &mut HashMap<u32, u32>,
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
        };
        let number = self.groups.insert(Group::new(None, port, 0));
        let context = Context {
            local: self.local,
            quarantined: &self.quarantined,
            hasher: &self.hasher,
        };
        let group = &mut self.groups[number];
        group.domain = DOMAIN_RESTORED | number;
        let mut kept = true;
        for id in ids {
            let own = *owner.entry(*id).or_insert(number) == number;
            let added = backends
                .get(id)
                .is_some_and(|backend| group.add_ghost(context, backend, if own { *id } else { 0 }));
            if own && !added {
                // A second number for the same backend.
                owner.remove(id);
            }
            kept &= own && added;
        }
        (number, kept)
    }
}

/// Whether a planner of ours can have written this key.
fn well_formed(key: &ServiceKey) -> bool {
    matches!(key.proto, PROTO_TCP | PROTO_UDP) && key.scope == SCOPE_EXTERNAL && key.pad == [0; 2]
}
