//! Numbers for label sets: one each, stable over restarts, unused ones freed after a grace period.
//!
//! In: what etcd holds at the start ([`Allocator::restore`]), label sets as pods come and go, the time. Out: numbers, and which
//! identities exist. The only copy that outlives the process is `cilium/state/identities/v1/id/<n>`.
//!
//! Invariants: a label set has one number and a number has one label set for as long as it exists; numbers lie in the
//! cluster's range; a freed number rests before it is handed out again, so that a peer that is behind never takes one workload for
//! another.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use isthmus_model::{ClusterName, IdentityRange, Labels, NumericIdentity};
use isthmus_wire::{Refusal, identity};

/// How long things stay.
#[derive(Clone, Copy, Debug)]
pub struct Retention {
    /// An identity without users is freed after this.
    pub grace: Duration,
    /// A freed number is handed out again after this.
    pub rest: Duration,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            grace: Duration::from_secs(15 * 60),
            rest: Duration::from_secs(60 * 60),
        }
    }
}

/// All identities of one cluster. Times are durations since any fixed moment.
#[derive(Debug)]
pub struct Allocator {
    cluster: ClusterName,
    range: IdentityRange,
    retention: Retention,
    by_labels: BTreeMap<Arc<Labels>, NumericIdentity>,
    by_number: BTreeMap<NumericIdentity, Slot>,
    /// Unused ones by the time since when.
    unused: BTreeSet<(Duration, NumericIdentity)>,
    /// Freed ones and when they were.
    resting: BTreeMap<NumericIdentity, Duration>,
    /// Where the search for a free number begins.
    cursor: u32,
}

#[derive(Debug)]
struct Slot {
    labels: Arc<Labels>,
    users: usize,
    unused_since: Option<Duration>,
}

/// No number is free.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "all {total} identity numbers of this cluster are taken ({used} in use, {resting} resting before they are given out again); \
     let fewer labels count with --labels"
)]
pub struct Exhausted {
    /// Numbers of the range.
    pub total: usize,
    /// Numbers with a label set.
    pub used: usize,
    /// Numbers freed a short while ago.
    pub resting: usize,
}

impl Allocator {
    /// An allocator that knows nothing yet. `seed` decides where the search for free numbers begins: choose it at random, so that a
    /// restart does not hand out the numbers that were freed just before it.
    pub fn new(cluster: ClusterName, range: IdentityRange, retention: Retention, seed: u32) -> Self {
        let numbers = range.numbers();
        let len = numbers.end() - numbers.start() + 1;
        Self {
            cluster,
            range,
            retention,
            by_labels: BTreeMap::new(),
            by_number: BTreeMap::new(),
            unused: BTreeSet::new(),
            resting: BTreeMap::new(),
            cursor: numbers.start() + seed % len,
        }
    }

    /// Takes over an identity from etcd. One that readers would refuse is refused here too, and is free then.
    /// If two numbers have the same labels, the lower one is used and the other one is freed after the grace period.
    pub fn restore(&mut self, number: NumericIdentity, value: &[u8], now: Duration) -> Result<(), Refusal> {
        let labels = Arc::new(identity::decode(number, value, &self.cluster, self.range)?);
        if self.by_number.contains_key(&number) {
            return Ok(());
        }
        let preferred = self.by_labels.entry(labels.clone()).or_insert(number);
        *preferred = number.min(*preferred);
        self.by_number.insert(
            number,
            Slot {
                labels,
                users: 0,
                unused_since: Some(now),
            },
        );
        self.unused.insert((now, number));
        Ok(())
    }

    /// The number of `labels`, for one user more. A new number is allocated if there is none.
    pub fn acquire(&mut self, labels: Labels) -> Result<NumericIdentity, Exhausted> {
        let number = match self.by_labels.get(&labels) {
            Some(number) => *number,
            None => self.allocate(labels)?,
        };
        if let Some(slot) = self.by_number.get_mut(&number) {
            slot.users += 1;
            if let Some(since) = slot.unused_since.take() {
                self.unused.remove(&(since, number));
            }
        }
        Ok(number)
    }

    /// One user less.
    pub fn release(&mut self, number: NumericIdentity, now: Duration) {
        let Some(slot) = self.by_number.get_mut(&number) else {
            return;
        };
        slot.users = slot.users.saturating_sub(1);
        if slot.users == 0 && slot.unused_since.is_none() {
            slot.unused_since = Some(now);
            self.unused.insert((now, number));
        }
    }

    /// Frees what nobody has used for the grace period, and says which numbers that were. Numbers that have rested are free again.
    pub fn collect(&mut self, now: Duration) -> Vec<NumericIdentity> {
        let rest = self.retention.rest;
        self.resting.retain(|_, freed| now.saturating_sub(*freed) < rest);
        let mut freed = vec![];
        while let Some(&(since, number)) = self.unused.first() {
            if now.saturating_sub(since) < self.retention.grace {
                break;
            }
            self.unused.pop_first();
            if let Some(slot) = self.by_number.remove(&number)
                && self.by_labels.get(&slot.labels) == Some(&number)
            {
                self.by_labels.remove(&slot.labels);
            }
            self.resting.insert(number, now);
            freed.push(number);
        }
        freed
    }

    /// The labels of `number`.
    pub fn labels(&self, number: NumericIdentity) -> Option<&Labels> {
        self.by_number.get(&number).map(|slot| &*slot.labels)
    }

    /// All numbers, ascending.
    pub fn numbers(&self) -> impl Iterator<Item = NumericIdentity> + '_ {
        self.by_number.keys().copied()
    }

    /// How many identities there are.
    pub fn len(&self) -> usize {
        self.by_number.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.by_number.is_empty()
    }

    fn allocate(&mut self, labels: Labels) -> Result<NumericIdentity, Exhausted> {
        let numbers = self.range.numbers();
        let (first, last) = (*numbers.start(), *numbers.end());
        let free = |number: &u32| {
            let number = NumericIdentity(*number);
            !self.resting.contains_key(&number) && !self.by_number.contains_key(&number)
        };
        let exhausted = Exhausted {
            total: (last - first + 1) as usize,
            used: self.by_number.len(),
            resting: self.resting.len(),
        };
        // Known without a search, which would be long just when many pods wait.
        if exhausted.used + exhausted.resting >= exhausted.total {
            return Err(exhausted);
        }
        let number = (self.cursor..=last)
            .chain(first..self.cursor)
            .find(free)
            .ok_or(exhausted)?;
        self.cursor = if number == last { first } else { number + 1 };
        let number = NumericIdentity(number);
        let labels = Arc::new(labels);
        self.by_labels.insert(labels.clone(), number);
        self.by_number.insert(
            number,
            Slot {
                labels,
                users: 0,
                unused_since: None,
            },
        );
        Ok(number)
    }
}

#[cfg(test)]
mod tests;
