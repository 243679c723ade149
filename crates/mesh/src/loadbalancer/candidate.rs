//! A backend that somebody names, and what decides about it.

use hashbrown::DefaultHashBuilder;
use isthmus_bpf_abi::Address;

use super::select::{Class, Tier};
use crate::indexed::Keyed;

/// [`Candidate::slot`] of a backend without one.
pub(super) const NO_SLOT: u32 = u32::MAX;
/// What decides about a backend and is not its own.
#[derive(Clone, Copy)]
pub(crate) struct Context<'a> {
    pub(crate) local: u16,
    /// Clusters that do not answer, ascending.
    pub(crate) quarantined: &'a [u16],
    pub(crate) hasher: &'a DefaultHashBuilder,
}

impl Context<'_> {
    pub(super) fn quarantined(&self, cluster: u16) -> bool {
        cluster != self.local && self.quarantined.binary_search(&cluster).is_ok()
    }

    pub(crate) fn tier(&self, cluster: u16, class: Class) -> Option<Tier> {
        Tier::of(cluster == self.local, self.quarantined(cluster), class)
    }
}

/// What a contribution, or the best of several, says about a backend.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct View {
    pub(crate) cluster: u16,
    pub(crate) class: Class,
    pub(crate) zone: u8,
    /// More than one cluster names it.
    pub(crate) conflict: bool,
}

/// A backend that somebody names, usable or not.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    pub(crate) address: Address,
    /// Number in the backend map, 0 if it is not there.
    pub(crate) id: u32,
    pub(super) slot: u32,
    pub(crate) port: u16,
    pub(crate) cluster: u16,
    /// How many slices name it.
    pub(super) contributions: u32,
    pub(super) class: Class,
    pub(super) zone: u8,
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
    pub(crate) const fn is(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    pub(super) const fn set(&mut self, flag: u8, on: bool) {
        self.flags = if on { self.flags | flag } else { self.flags & !flag };
    }

    /// Whether it belongs into the backend map.
    pub(super) const fn alive(&self) -> bool {
        self.is(GHOST) || self.is(HELD) || !matches!(self.class, Class::Unusable)
    }

    pub(crate) const fn has_slot(&self) -> bool {
        self.slot != NO_SLOT
    }

    pub(crate) const fn class(&self) -> Class {
        self.class
    }

    pub(crate) const fn is_written(&self) -> bool {
        self.is(WRITTEN)
    }
}
