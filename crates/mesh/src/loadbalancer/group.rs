//! A backend group: the backends that a service's ports of one name, protocol and family share, and the slots they fill.
//!
//! In: contributions, one for each (slice, address) that names a backend. Out: which backends are in the maps, and the
//! slots' order. Every backend that is active or terminating is in the backend map; those selected also have a slot.
//!
//! Invariants: a backend has a slot only if it has a number; see [`slots`] for the rest.

mod slots;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use isthmus_bpf_abi::{Address, Backend, backend_state};

use super::{
    candidate::{CHANGED, CONFLICT, Candidate, Context, DIRTY, GHOST, HELD, NO_SLOT, View, WRITTEN},
    order::Order,
    record::GroupPort,
    select::{Class, Counts, Picked, RankCount},
    table::Table,
};
use crate::{
    IdAllocator,
    indexed::{Indexed, Keyed},
};

/// Slots that a frontend can have.
pub(crate) const SLOTS_MAX: usize = u16::MAX as usize;

/// A change to one backend's contributions, made by one slice.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change {
    Added(View),
    Changed(View),
    Removed,
}

#[derive(Debug)]
pub(crate) struct Group {
    /// `None`: restored, and no local frame has claimed its frontends yet.
    pub(crate) service: Option<u32>,
    pub(crate) port: GroupPort,
    /// In which order clusters are asked.
    pub(crate) order: Arc<Order>,
    /// Flags that its frontends have in common, [`isthmus_bpf_abi::service_flag::MAGLEV`] apart.
    pub(crate) flags: u16,
    /// For how long a client keeps its backend, 0 if it does not.
    pub(crate) affinity_seconds: u32,
    pub(crate) slow_start_seconds: u16,
    /// It should have a Maglev table.
    pub(crate) wants_table: bool,
    /// The table that it has, as of the last drain.
    pub(crate) table: Option<Table>,
    pub(crate) frontends: Vec<u32>,
    pub(crate) candidates: Indexed<Candidate>,
    /// Candidate of slot `index + 1`.
    pub(crate) slots: Vec<u32>,
    pub(crate) ghosts: u32,
    /// Restored backends that are the last resort, see [`HELD`].
    held: u32,
    /// They have slots, as of the last drain.
    last_resort: bool,
    pub(crate) conflicts: u32,
    /// Has its service's slices; else the next drain hands them over.
    pub(crate) filled: bool,
    /// Waits for the next drain.
    pub(crate) queued: bool,
    /// Its service is gone; the next drain takes it out of the maps.
    pub(crate) dead: bool,
    pub(crate) domain: u32,
    /// Candidates beyond [`SLOTS_MAX`], as of the last drain.
    pub(crate) overflow: u32,
    counts: Counts,
    picked: Picked,
    /// Hints of zones hold, as of the last drain.
    hinted: bool,
    /// Some have more slots than one.
    uneven: bool,
    /// What is selected is to be looked at anew, whatever is dirty.
    reselect: bool,
    /// It had active backends at a drain: from now on new ones start slowly, if they should.
    seasoned: bool,
    /// Candidates that start slowly, and since when.
    ramps: Vec<(u32, Duration)>,
    dirty: Vec<u32>,
}

/// What a drain of one group changes in the backend map and the slots.
#[derive(Debug, Default)]
pub(crate) struct Delta {
    /// Slot positions from 0 that name another backend now.
    pub(crate) touched: Vec<u32>,
    pub(crate) written: Vec<(u32, Backend)>,
    pub(crate) deleted: Vec<u32>,
    /// No number was left for some.
    pub(crate) starved: bool,
    /// Who takes traffic, or how much of it, may differ.
    pub(crate) reshared: bool,
    /// Backends that may have left.
    pub(crate) left: Vec<(Address, u16)>,
}

impl Group {
    pub(crate) fn new(service: Option<u32>, port: GroupPort, domain: u32) -> Self {
        Self {
            service,
            port,
            order: Arc::new(Order::flat()),
            flags: 0,
            affinity_seconds: 0,
            slow_start_seconds: 0,
            wants_table: false,
            table: None,
            frontends: Vec::new(),
            candidates: Indexed::new(),
            slots: Vec::new(),
            ghosts: 0,
            held: 0,
            last_resort: false,
            conflicts: 0,
            filled: service.is_none(),
            queued: false,
            dead: false,
            domain,
            overflow: 0,
            counts: Counts::new(),
            picked: Picked::Nothing,
            hinted: false,
            uneven: false,
            reselect: false,
            seasoned: false,
            ramps: Vec::new(),
            dirty: Vec::new(),
        }
    }

    /// Takes a change of the contributions to (address, port). `best` looks at all of them, and is asked only where
    /// several slices name the backend.
    pub(crate) fn apply(
        &mut self,
        context: &Context,
        key: (Address, u16),
        change: Change,
        best: impl FnOnce() -> Option<View>,
    ) {
        let found = self.candidates.find(&context.hasher, key);
        let (at, view) = match (change, found) {
            (Change::Added(view), None) => {
                let at = self.insert(context, key, view.cluster);
                self.candidates[at].contributions = 1;
                (at, Some(view))
            }
            (Change::Added(view), Some(at)) => {
                let candidate = &mut self.candidates[at];
                candidate.contributions += 1;
                (
                    at,
                    if candidate.contributions == 1 {
                        Some(view)
                    } else {
                        best()
                    },
                )
            }
            (Change::Changed(view), Some(at)) => {
                let alone = self.candidates[at].contributions == 1;
                (at, if alone { Some(view) } else { best() })
            }
            (Change::Removed, Some(at)) => {
                let candidate = &mut self.candidates[at];
                candidate.contributions -= 1;
                (
                    at,
                    if candidate.contributions == 0 {
                        None
                    } else {
                        best()
                    },
                )
            }
            (Change::Changed(_) | Change::Removed, None) => {
                unreachable!("a slice changes only what it contributed")
            }
        };
        self.set(context, at, view);
    }

    fn insert(&mut self, context: &Context, key: (Address, u16), cluster: u16) -> u32 {
        self.candidates
            .insert(&context.hasher, Candidate::new(key, cluster))
    }

    /// Sets what is known about a candidate; `None` when nobody says anything.
    fn set(&mut self, context: &Context, at: u32, view: Option<View>) {
        let candidate = &mut self.candidates[at];
        let view = view.unwrap_or(View {
            cluster: candidate.cluster,
            class: Class::Unusable,
            zone: candidate.zone,
            hint: 0,
            weight: 0,
            conflict: false,
        });
        let ghost = candidate.is(GHOST);
        if ghost {
            self.ghosts -= 1;
            candidate.set(GHOST, false);
        } else {
            self.counts.remove(context.tally(&self.order, &candidate.view()));
        }
        self.counts.add(context.tally(&self.order, &view));
        let starts = !ghost
            && !candidate.is(HELD)
            && !matches!(candidate.class, Class::Active)
            && matches!(view.class, Class::Active);
        let ends = !matches!(view.class, Class::Active);
        let reshared = (candidate.weight, candidate.hint) != (view.weight, view.hint);
        self.conflicts -= u32::from(candidate.is(CONFLICT));
        self.conflicts += u32::from(view.conflict);
        candidate.set(CONFLICT, view.conflict);
        let same =
            (candidate.cluster, candidate.class, candidate.zone) == (view.cluster, view.class, view.zone);
        candidate.cluster = view.cluster;
        candidate.class = view.class;
        candidate.zone = view.zone;
        candidate.weight = view.weight;
        candidate.hint = view.hint;
        let unnamed = candidate.contributions == 0;
        let was_held = candidate.is(HELD);
        let hold = (ghost || was_held) && !unnamed && matches!(view.class, Class::Unusable);
        candidate.set(HELD, hold);
        self.held = self.held + u32::from(hold) - u32::from(was_held);
        if !same {
            candidate.set(CHANGED, true);
        }
        // Of one that is of no use, what changed may be that it does not terminate any more, which is not kept here: its flows end.
        let useless = matches!(view.class, Class::Unusable);
        if !same || ghost || was_held || unnamed || reshared || useless {
            self.mark(at);
        }
        if starts {
            self.begin_slowly(context, at);
        } else if ends {
            self.end_slow_start(at);
        }
    }

    fn mark(&mut self, at: u32) {
        let candidate = &mut self.candidates[at];
        if !candidate.is(DIRTY) {
            candidate.set(DIRTY, true);
            self.dirty.push(at);
        }
    }

    /// Whether the next drain has anything to do with backends.
    pub(crate) fn has_changes(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// `cluster` begins or ceases to answer; `before` and `after` differ in that.
    pub(crate) fn on_health(&mut self, cluster: u16, before: &Context, after: &Context) {
        for at in self.candidates.live() {
            let candidate = &mut self.candidates[at];
            if candidate.cluster != cluster {
                continue;
            }
            candidate.set(CHANGED, true);
            if !candidate.is(GHOST) {
                self.counts.remove(before.tally(&self.order, &candidate.view()));
                self.counts.add(after.tally(&self.order, &candidate.view()));
            }
            self.mark(at);
        }
    }

    /// Sets the order of clusters.
    pub(crate) fn set_order(&mut self, context: &Context, order: &Arc<Order>) {
        if self.order != *order {
            self.order = Arc::clone(order);
            self.recount(context);
        }
    }

    /// Counts anew: what a tally depends on has changed.
    pub(crate) fn recount(&mut self, context: &Context) {
        self.counts = Counts::new();
        for at in self.candidates.live() {
            let candidate = &self.candidates[at];
            if !candidate.is(GHOST) {
                self.counts.add(context.tally(&self.order, &candidate.view()));
            }
        }
        self.reselect = true;
    }

    /// Adds a backend found in the maps. `id` 0: it needs a new number. False if the group has it already.
    pub(crate) fn add_ghost(&mut self, context: &Context, backend: &Backend, id: u32) -> bool {
        let key = (backend.address, u16::from_be_bytes(backend.port));
        if self.candidates.find(&context.hasher, key).is_some() {
            return false;
        }
        let at = self.insert(context, key, backend.cluster_id);
        let terminating = backend.state == backend_state::TERMINATING;
        let candidate = &mut self.candidates[at];
        candidate.class = if terminating {
            Class::Terminating
        } else {
            Class::Active
        };
        candidate.zone = backend.zone;
        candidate.weight = 1;
        candidate.id = id;
        candidate.set(GHOST, true);
        candidate.set(WRITTEN, id != 0);
        candidate.set(CHANGED, backend.state == backend_state::QUARANTINED);
        self.ghosts += 1;
        if id == 0 {
            self.mark(at);
        }
        self.give_slot(at);
        true
    }

    /// Gives a ghost another slot; false if it is not there.
    pub(crate) fn add_ghost_slot(&mut self, context: &Context, backend: &Backend) -> bool {
        let key = (backend.address, u16::from_be_bytes(backend.port));
        let Some(at) = self.candidates.find(&context.hasher, key) else {
            return false;
        };
        self.give_slot(at);
        self.uneven = true;
        true
    }

    /// Takes over the ghosts of a restored group. Numbers that are not needed come back, to be deleted from the map.
    /// The second value says whether the slots are now exactly the other group's.
    pub(crate) fn absorb(&mut self, context: &Context, other: &mut Self) -> (Vec<u32>, bool) {
        let mut spare = Vec::new();
        let same_slots = self.slots.is_empty();
        let mut exact = same_slots;
        let live = if same_slots {
            other.slots.clone()
        } else {
            other.candidates.live()
        };
        if same_slots {
            self.uneven |= other.uneven;
            self.table = self.table.take().or(other.table.take());
        }
        let mut known = BTreeMap::new();
        for from in live {
            if let Some(at) = known.get(&from) {
                // A further slot of one that came along.
                if let Some(at) = at {
                    self.give_slot(*at);
                }
                continue;
            }
            known.insert(from, None);
            let ghost = other.candidates[from];
            let at = match self.candidates.find(&context.hasher, ghost.key()) {
                None => {
                    let at = self.insert(context, ghost.key(), ghost.cluster);
                    self.candidates[at] = Candidate {
                        slot: NO_SLOT,
                        slots: 0,
                        ..ghost
                    };
                    self.candidates[at].set(DIRTY, false);
                    self.ghosts += 1;
                    at
                }
                Some(at) if self.candidates[at].id == 0 => {
                    let candidate = &mut self.candidates[at];
                    let same = (candidate.cluster, candidate.class, candidate.zone)
                        == (ghost.cluster, ghost.class, ghost.zone);
                    candidate.id = ghost.id;
                    candidate.set(WRITTEN, ghost.is(WRITTEN));
                    let hold = candidate.contributions > 0 && !candidate.alive();
                    candidate.set(HELD, hold || candidate.is(HELD));
                    self.held += u32::from(hold);
                    candidate.set(CHANGED, ghost.is(CHANGED) || !same);
                    at
                }
                Some(at) => {
                    if ghost.id != 0 {
                        spare.push(ghost.id);
                    }
                    exact = false;
                    self.mark(at);
                    continue;
                }
            };
            self.mark(at);
            if same_slots {
                self.give_slot(at);
                known.insert(from, Some(at));
            }
        }
        other.candidates = Indexed::new();
        other.slots = Vec::new();
        other.dirty = Vec::new();
        other.ghosts = 0;
        (spare, exact)
    }

    /// Drops the ghosts whose cluster satisfies `stale`.
    pub(crate) fn drop_ghosts(&mut self, context: &Context, stale: impl Fn(u16) -> bool) {
        if self.ghosts == 0 {
            return;
        }
        for at in self.candidates.live() {
            let candidate = &self.candidates[at];
            if candidate.is(GHOST) && stale(candidate.cluster) {
                self.set(context, at, None);
            }
        }
    }

    /// Lets the last resort go: every source that may name a better one is listed.
    pub(crate) fn release_held(&mut self) {
        if self.held == 0 {
            return;
        }
        for at in self.candidates.live() {
            if self.candidates[at].is(HELD) {
                self.candidates[at].set(HELD, false);
                self.mark(at);
            }
        }
        self.held = 0;
    }

    /// Brings numbers and slots in line with what is known, and says what changed.
    pub(crate) fn settle(
        &mut self,
        context: &Context,
        ids: &mut IdAllocator,
        mut known_id: impl FnMut(&Address, u16) -> Option<u32>,
    ) -> Delta {
        let dirty = std::mem::take(&mut self.dirty);
        let mut delta = Delta {
            reshared: !dirty.is_empty() || self.reselect,
            ..Delta::default()
        };
        for &at in &dirty {
            let mut candidate = self.candidates[at];
            candidate.set(DIRTY, false);
            if candidate.alive() {
                if candidate.id == 0 {
                    candidate.set(CHANGED, true);
                    match known_id(&candidate.address, candidate.port) {
                        Some(id) => {
                            candidate.id = id;
                            candidate.set(WRITTEN, true);
                        }
                        None => candidate.id = ids.allocate().unwrap_or(0),
                    }
                }
                if candidate.id != 0 && (candidate.is(CHANGED) || !candidate.is(WRITTEN)) {
                    delta
                        .written
                        .push((candidate.id, self.backend(context, &candidate)));
                    candidate.set(CHANGED, false);
                    candidate.set(WRITTEN, true);
                }
            }
            self.candidates[at] = candidate;
            if candidate.alive() && candidate.id == 0 {
                delta.starved = true;
                self.mark(at);
            }
        }
        let picked = self.picked;
        self.settle_slots(context, &dirty, &mut delta.touched);
        delta.left = self.departures(context, &dirty, picked);
        for &at in &dirty {
            let candidate = &mut self.candidates[at];
            if candidate.alive() {
                continue;
            }
            if candidate.id != 0 {
                delta.deleted.push(candidate.id);
                candidate.id = 0;
                candidate.set(WRITTEN, false);
            }
            if candidate.contributions == 0 {
                self.candidates.remove(&context.hasher, at);
            }
        }
        self.seasoned |= self.has_active();
        delta
    }

    /// Who takes traffic, as of the last drain.
    pub(crate) const fn picked(&self) -> Picked {
        self.picked
    }

    /// What the rank that is asked first has.
    pub(crate) fn first_rank(&self) -> RankCount {
        self.counts.rank(0)
    }

    /// Hints of zones hold, as of the last drain.
    pub(crate) const fn hinted(&self) -> bool {
        self.hinted
    }

    /// Gives up all backends: the numbers to delete from the map.
    pub(crate) fn clear_ids(&mut self) -> Vec<u32> {
        let live = self.candidates.live();
        let ids = live
            .into_iter()
            .map(|at| self.candidates[at].id)
            .filter(|id| *id != 0)
            .collect();
        self.candidates = Indexed::new();
        self.slots = Vec::new();
        self.dirty = Vec::new();
        self.ramps = Vec::new();
        self.held = 0;
        ids
    }

    /// The entry of a candidate in the backend map.
    pub(crate) fn backend(&self, context: &Context, candidate: &Candidate) -> Backend {
        let state = if context.quarantined(candidate.cluster) {
            backend_state::QUARANTINED
        } else if candidate.class == Class::Terminating {
            backend_state::TERMINATING
        } else {
            backend_state::ACTIVE
        };
        Backend {
            address: candidate.address,
            port: candidate.port.to_be_bytes(),
            proto: self.port.protocol.number(),
            state,
            cluster_id: candidate.cluster,
            zone: candidate.zone,
            pad: 0,
        }
    }
}
