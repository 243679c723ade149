//! A backend that somebody names, and what decides about it.

use std::time::Duration;

use hashbrown::DefaultHashBuilder;
use isthmus_bpf_abi::Address;

use super::{
    order::Order,
    select::{Class, Hint, Tally},
    zones::Zones,
};
use crate::indexed::Keyed;

/// [`Candidate::slot`] of a backend without one.
pub(super) const NO_SLOT: u32 = u32::MAX;

/// Steps of slow start; a backend at the last one has its full share.
pub(crate) const LEVELS: u8 = 8;

/// What decides about a backend and is not its own.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    pub(crate) local: u16,
    /// Clusters that do not answer, ascending.
    pub(crate) quarantined: Vec<u16>,
    pub(crate) hasher: DefaultHashBuilder,
    pub(crate) zones: Zones,
    /// Name of this node, interned.
    pub(crate) node: u32,
    pub(crate) now: Duration,
}

impl Context {
    pub(super) fn quarantined(&self, cluster: u16) -> bool {
        cluster != self.local && self.quarantined.binary_search(&cluster).is_ok()
    }

    /// How a backend counts.
    pub(crate) fn tally(&self, order: &Order, view: &View) -> Tally {
        Tally {
            rank: order.rank(view.cluster),
            quarantined: self.quarantined(view.cluster),
            class: view.class,
            weight: view.weight,
            hint: match (view.cluster == self.local, view.hint) {
                (false, _) => Hint::Foreign,
                (true, 0) => Hint::None,
                (true, hint) if self.zones.is_for_here(hint) => Hint::Here,
                (true, _) => Hint::Elsewhere,
            },
        }
    }
}

/// What a contribution, or the best of several, says about a backend.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct View {
    pub(crate) cluster: u16,
    pub(crate) class: Class,
    pub(crate) zone: u8,
    /// Zones whose clients it should serve: a number of [`Zones`], 0 if there is no hint.
    pub(crate) hint: u8,
    /// 0 if it is not meant to take traffic.
    pub(crate) weight: u16,
    /// More than one cluster names it.
    pub(crate) conflict: bool,
}

/// A backend that somebody names, usable or not.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    pub(crate) address: Address,
    /// Number in the backend map, 0 if it is not there.
    pub(crate) id: u32,
    /// One of its slots.
    pub(super) slot: u32,
    pub(crate) port: u16,
    pub(crate) cluster: u16,
    /// How many slices name it.
    pub(super) contributions: u32,
    /// How many slots it has.
    pub(super) slots: u16,
    pub(crate) weight: u16,
    pub(super) class: Class,
    pub(super) zone: u8,
    pub(super) hint: u8,
    /// How far slow start has got, 1..=[`LEVELS`].
    pub(super) level: u8,
    pub(super) flags: u8,
}

/// Restored from the maps, and no source has named it yet.
pub(super) const GHOST: u8 = 1;
/// The backend map has an entry with `id`.
pub(super) const WRITTEN: u8 = 2;
/// Listed in `Group::dirty`.
pub(super) const DIRTY: u8 = 4;
/// The entry in the backend map may differ.
pub(super) const CHANGED: u8 = 8;
pub(super) const CONFLICT: u8 = 16;
/// Restored, and now named as unusable: the last resort as long as a source that may name a better one is not listed.
pub(super) const HELD: u8 = 32;

impl Keyed for Candidate {
    type Key = (Address, u16);

    fn key(&self) -> Self::Key {
        (self.address, self.port)
    }
}

impl Candidate {
    /// One about which nothing is known.
    pub(super) const fn new(key: (Address, u16), cluster: u16) -> Self {
        Self {
            address: key.0,
            id: 0,
            slot: NO_SLOT,
            port: key.1,
            cluster,
            contributions: 0,
            slots: 0,
            weight: 0,
            class: Class::Unusable,
            zone: 0,
            hint: 0,
            level: LEVELS,
            flags: 0,
        }
    }

    pub(crate) const fn is(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    pub(super) const fn set(&mut self, flag: u8, on: bool) {
        self.flags = if on { self.flags | flag } else { self.flags & !flag };
    }

    pub(crate) const fn view(&self) -> View {
        View {
            cluster: self.cluster,
            class: self.class,
            zone: self.zone,
            hint: self.hint,
            weight: self.weight,
            conflict: self.is(CONFLICT),
        }
    }

    /// Whether it belongs into the backend map.
    pub(super) const fn alive(&self) -> bool {
        self.is(GHOST) || self.is(HELD) || !matches!(self.class, Class::Unusable)
    }

    pub(crate) const fn has_slot(&self) -> bool {
        self.slots != 0
    }

    pub(crate) const fn is_written(&self) -> bool {
        self.is(WRITTEN)
    }
}
