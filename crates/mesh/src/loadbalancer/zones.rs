//! Numbers of zones on this node, and of sets of zones that hints name.
//!
//! Bounds: 255 of each; what comes later counts as unknown, or as without a hint. Numbers are never freed: a mesh has few.

use std::collections::BTreeMap;

/// See the module.
#[derive(Clone, Debug, Default)]
pub(crate) struct Zones {
    names: Vec<Box<str>>,
    numbers: BTreeMap<Box<str>, u8>,
    sets: Vec<Box<[u8]>>,
    set_numbers: BTreeMap<Box<[u8]>, u8>,
    /// This node's zone, 0 if unknown.
    own: u8,
}

impl Zones {
    /// The number of a zone, 0 for none.
    pub(crate) fn number(&mut self, zone: &str) -> u8 {
        if zone.is_empty() {
            return 0;
        }
        if let Some(number) = self.numbers.get(zone) {
            return *number;
        }
        let Ok(number) = u8::try_from(self.names.len() + 1) else {
            return 0;
        };
        self.names.push(zone.into());
        self.numbers.insert(zone.into(), number);
        number
    }

    /// The number of a set of zones, 0 for none.
    pub(crate) fn set_number(&mut self, zones: &[Box<str>]) -> u8 {
        if zones.is_empty() {
            return 0;
        }
        let mut set: Vec<u8> = zones.iter().map(|zone| self.number(zone)).collect();
        set.sort_unstable();
        set.dedup();
        if let Some(number) = self.set_numbers.get(set.as_slice()) {
            return *number;
        }
        let Ok(number) = u8::try_from(self.sets.len() + 1) else {
            return 0;
        };
        self.sets.push(set.clone().into());
        self.set_numbers.insert(set.into(), number);
        number
    }

    /// The name behind a number.
    pub(crate) fn name(&self, number: u8) -> &str {
        let at = usize::from(number).checked_sub(1);
        at.and_then(|at| self.names.get(at)).map_or("", |zone| zone)
    }

    /// Says in which zone this node is; true if that is new.
    pub(crate) fn set_own(&mut self, zone: &str) -> bool {
        let own = self.number(zone);
        std::mem::replace(&mut self.own, own) != own
    }

    /// Whether a set has this node's zone.
    pub(crate) fn is_for_here(&self, set: u8) -> bool {
        let at = usize::from(set).checked_sub(1);
        let set = at.and_then(|at| self.sets.get(at));
        self.own != 0 && set.is_some_and(|set| set.contains(&self.own))
    }
}
