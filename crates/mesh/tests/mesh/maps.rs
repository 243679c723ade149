//! Simulated BPF maps, and the lookups that programs make in them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use isthmus_bpf_abi::{
    Address, Backend, IpcacheKey, IpcacheValue, MAGLEV_CHUNK, MaglevChunk, MaglevKey, ServiceKey,
    ServiceValue, SourceRangeKey, service_flag,
};
use isthmus_mesh::{LbDump, MapOp, Plan};

/// Address and port (network order) of a backend.
pub type Target = (Address, [u8; 2]);

#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Maps {
    pub services: BTreeMap<ServiceKey, ServiceValue>,
    pub backends: BTreeMap<u32, Backend>,
    pub ipcache: BTreeMap<IpcacheKey, IpcacheValue>,
    pub maglev: BTreeMap<MaglevKey, Arc<MaglevChunk>>,
    pub ranges: BTreeSet<SourceRangeKey>,
}

/// Entries of Maglev tables in these tests.
pub const TABLE_SIZE: u32 = 251;

/// What the slots of a frontend resolve to; `None` for a slot that resolves to nothing.
pub type Lookup = Vec<Option<Target>>;

impl Maps {
    pub fn of(dump: &LbDump) -> Self {
        Self {
            services: dump.services.iter().copied().collect(),
            backends: dump.backends.iter().copied().collect(),
            ipcache: BTreeMap::new(),
            maglev: dump.maglev.iter().cloned().collect(),
            ranges: dump.source_ranges.iter().copied().collect(),
        }
    }

    pub fn dump(&self) -> LbDump {
        LbDump {
            services: self.services.iter().map(|(key, value)| (*key, *value)).collect(),
            backends: self
                .backends
                .iter()
                .map(|(id, backend)| (*id, *backend))
                .collect(),
            maglev: self.maglev.clone().into_iter().collect(),
            source_ranges: self.ranges.iter().copied().collect(),
        }
    }

    pub fn apply(&mut self, op: &MapOp) {
        match op.clone() {
            MapOp::ServicePut(key, value) => drop(self.services.insert(key, value)),
            MapOp::ServiceDelete(key) => drop(self.services.remove(&key)),
            MapOp::BackendPut(id, backend) => {
                let old = self.backends.insert(id, backend);
                let target = |backend: Backend| (backend.address, backend.port, backend.proto);
                assert!(
                    old.is_none_or(|old| target(old) == target(backend)),
                    "number {id} was given to another backend while it was live"
                );
            }
            MapOp::BackendDelete(id) => drop(self.backends.remove(&id)),
            MapOp::MaglevPut(key, chunk) => drop(self.maglev.insert(key, chunk)),
            MapOp::MaglevDelete(key) => drop(self.maglev.remove(&key)),
            MapOp::SourceRangePut(key) => drop(self.ranges.insert(key)),
            MapOp::SourceRangeDelete(key) => drop(self.ranges.remove(&key)),
            MapOp::IpcachePut(key, value) => drop(self.ipcache.insert(key, value)),
            MapOp::IpcacheDelete(key) => drop(self.ipcache.remove(&key)),
            MapOp::EndpointPut(..) | MapOp::EndpointDelete(..) => panic!("the merge writes no endpoints"),
        }
    }

    pub fn lookups(&self) -> BTreeMap<ServiceKey, Lookup> {
        let frontends = self.services.iter().filter(|(key, _)| key.slot == 0);
        frontends
            .map(|(key, value)| (*key, self.lookup(*key, value.count)))
            .collect()
    }

    fn lookup(&self, key: ServiceKey, count: u16) -> Lookup {
        let resolve = |slot| {
            let backend = self
                .backends
                .get(&self.services.get(&key.at_slot(slot))?.backend_id)?;
            Some((backend.address, backend.port))
        };
        (1..=count).map(resolve).collect()
    }

    /// What the entries of a frontend's Maglev table resolve to, if it has one.
    pub fn table(&self, key: &ServiceKey) -> Option<Lookup> {
        let frontend = self.services.get(key)?;
        let resolve = |entry: u32| {
            let key = MaglevKey {
                service_id: frontend.service_id,
                chunk: entry / MAGLEV_CHUNK,
            };
            let id = self.maglev.get(&key)?.backend_ids[(entry % MAGLEV_CHUNK) as usize];
            let backend = self.backends.get(&id)?;
            Some((backend.address, backend.port))
        };
        (frontend.flags & service_flag::MAGLEV != 0).then(|| (0..TABLE_SIZE).map(resolve).collect())
    }

    /// Prefixes that may ask a frontend; `None` if everybody may.
    pub fn allowed(&self, key: &ServiceKey) -> Option<BTreeSet<(u32, Address)>> {
        let frontend = self.services.get(key)?;
        let mine = self
            .ranges
            .iter()
            .filter(|range| range.service_id == frontend.service_id);
        (frontend.flags & service_flag::SOURCE_RANGES != 0)
            .then(|| mine.map(|range| (range.prefix_len, range.address)).collect())
    }

    /// Applies a plan step by step; after each step every lookup must resolve to a backend of before or after.
    /// Frontends that had misses before may have them until the plan is through.
    /// The same holds for Maglev tables; and whoever may ask at a step may ask before or after.
    pub fn apply_checked(&mut self, plan: &Plan) {
        assert_eq!(plan.ops.len(), plan.domains.len());
        let before = self.lookups();
        let mut end = self.clone();
        plan.ops.iter().for_each(|op| end.apply(op));
        let after = end.lookups();
        let targets = |lookups: &BTreeMap<ServiceKey, Lookup>, key: &ServiceKey| -> BTreeSet<Target> {
            lookups
                .get(key)
                .into_iter()
                .flatten()
                .flatten()
                .copied()
                .collect()
        };
        let start = self.clone();
        let mut phase = 0;
        for op in &plan.ops {
            assert!(op.phase() >= phase, "phases ascend: {op:?}");
            phase = op.phase();
            self.apply(op);
            // Only what the operation touches can have changed; still, all is looked up.
            let now = self.lookups();
            for (key, lookup) in &now {
                if before.get(key).is_some_and(|lookup| lookup.contains(&None)) {
                    continue;
                }
                let (old, new) = (targets(&before, key), targets(&after, key));
                for (slot, target) in lookup.iter().enumerate() {
                    let Some(target) = target else {
                        panic!("slot {} of {key:?} misses after {op:?}", slot + 1)
                    };
                    assert!(
                        old.contains(target) || new.contains(target),
                        "{key:?} names a stranger after {op:?}"
                    );
                }
                for target in self.table(key).into_iter().flatten() {
                    let Some(target) = target else {
                        panic!("the table of {key:?} misses after {op:?}")
                    };
                    assert!(
                        old.contains(&target) || new.contains(&target),
                        "the table of {key:?} names a stranger after {op:?}"
                    );
                }
                self.check_ranges(key, &start, &end, op);
            }
            for (key, lookup) in &before {
                if after.get(key).is_some_and(|after| !after.is_empty()) && !lookup.is_empty() {
                    assert!(
                        now.get(key).is_some_and(|now| !now.is_empty()),
                        "{key:?} had backends before and has after, but none after {op:?}"
                    );
                }
            }
        }
        assert!(
            self.lookups().values().flatten().all(Option::is_some),
            "a lookup misses after the plan"
        );
    }

    fn check_ranges(&self, key: &ServiceKey, start: &Self, end: &Self, op: &MapOp) {
        let sides: Vec<_> = [start, end]
            .into_iter()
            .filter(|maps| maps.services.contains_key(key))
            .map(|maps| maps.allowed(key))
            .collect();
        if sides.contains(&None) {
            return;
        }
        let known: BTreeSet<_> = sides.into_iter().flatten().flatten().collect();
        let now = self.allowed(key);
        assert!(
            now.is_some_and(|now| now.is_subset(&known)),
            "{key:?} may be asked by strangers after {op:?}"
        );
    }
}
