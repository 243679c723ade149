//! Removes flows that are over from the conntrack table, a bounded step at a time.
//!
//! In: the table, the clock. Out: fewer entries, and numbers. What is over is decided in `bpf-abi` ([`ct_is_expired`]), as the
//! programs see it. Between reading an entry and removing it a packet may bring a flow back to life that had been silent for
//! all of its time: its entry then goes all the same, and the next packet makes it again, with the same backend.
//!
//! The table is an LRU map: without this nothing would overflow, but flows that are over would push out those that live.

use isthmus_bpf_abi::{CtKey, CtValue, ct_is_expired};
use nix::time::{ClockId, clock_gettime};

use crate::{
    Tables,
    map::{MapError, Scan},
};

/// One walk over the table.
#[derive(Debug, Default)]
pub struct Sweep {
    scan: Scan,
    /// Entries seen. A flow has two.
    pub seen: usize,
    /// Entries removed.
    pub removed: usize,
}

impl Sweep {
    /// Whether the walk is at its end.
    pub fn is_over(&self) -> bool {
        self.scan.is_over()
    }

    /// Entries that were left.
    pub fn left(&self) -> usize {
        self.seen.saturating_sub(self.removed)
    }

    /// Looks at the next entries (about 4,096) and removes what is over at `now`, see [`now`].
    pub fn step(&mut self, tables: &Tables, now: u32) -> Result<(), MapError> {
        let entries = tables.ct.scan(&mut self.scan)?;
        self.seen += entries.len();
        let over = expired(&entries, now);
        let mut failures = tables.ct.delete_batch(&over);
        self.removed += over.len() - failures.len();
        match failures.pop() {
            Some((_, error)) => Err(error),
            None => Ok(()),
        }
    }
}

/// Keys of the entries that are over at `now`.
pub fn expired(entries: &[(CtKey, CtValue)], now: u32) -> Vec<CtKey> {
    entries
        .iter()
        .filter(|(key, value)| ct_is_expired(key, value, now))
        .map(|(key, _)| *key)
        .collect()
}

/// Seconds of the clock that the programs read: it stands still while the machine sleeps and never jumps.
pub fn now() -> Result<u32, nix::Error> {
    // The programs' seconds wrap as these do.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map(|time| time.tv_sec() as u32)
}
