//! When leases end. Pure: the time is an argument.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use tokio::time::Instant;

/// Longer than this does not matter, and could not be added to an [`Instant`].
const CENTURY: u64 = 3_155_760_000;

/// When leases end.
#[derive(Clone, Debug, Default)]
pub(super) struct Ends {
    by_lease: BTreeMap<i64, Instant>,
    by_time: BTreeSet<(Instant, i64)>,
}

impl Ends {
    /// The lease lasts `ttl` seconds from `now` on.
    pub(super) fn set(&mut self, id: i64, now: Instant, ttl: i64) {
        self.remove(id);
        let seconds = u64::try_from(ttl).unwrap_or_default().min(CENTURY);
        let end = now + Duration::from_secs(seconds);
        self.by_lease.insert(id, end);
        self.by_time.insert((end, id));
    }

    pub(super) fn remove(&mut self, id: i64) {
        if let Some(end) = self.by_lease.remove(&id) {
            self.by_time.remove(&(end, id));
        }
    }

    /// The leases are these, with their TTLs. New ones last from `now` on, known ones as long as they did.
    pub(super) fn keep(&mut self, leases: &BTreeMap<i64, i64>, now: Instant) {
        let gone = self.by_lease.keys().filter(|id| !leases.contains_key(id));
        for id in gone.copied().collect::<Vec<_>>() {
            self.remove(id);
        }
        for (id, ttl) in leases {
            if !self.by_lease.contains_key(id) {
                self.set(*id, now, *ttl);
            }
        }
    }

    /// When the next one ends.
    pub(super) fn next(&self) -> Option<Instant> {
        self.by_time.first().map(|(end, _)| *end)
    }

    /// Those that have ended.
    pub(super) fn ended(&self, now: Instant) -> Vec<i64> {
        let ended = self.by_time.iter().take_while(|(end, _)| *end <= now);
        ended.map(|(_, id)| *id).collect()
    }

    /// Whole seconds left; 0 if there is no such lease.
    pub(super) fn left(&self, id: i64, now: Instant) -> i64 {
        let end = self.by_lease.get(&id);
        let left = end.map_or(0, |end| end.saturating_duration_since(now).as_secs());
        i64::try_from(left).unwrap_or(i64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn leases_end_in_time_and_in_order(steps in proptest::collection::vec((0i64..6, 0i64..20, 0u64..9_000, any::<bool>()), 1..80)) {
            let (mut ends, mut model) = (Ends::default(), BTreeMap::<i64, Instant>::new());
            let mut now = Instant::now();
            for (id, ttl, gap, removes) in steps {
                now += Duration::from_millis(gap);
                if removes {
                    ends.remove(id);
                    model.remove(&id);
                } else {
                    ends.set(id, now, ttl);
                    model.insert(id, now + Duration::from_secs(ttl as u64));
                }
                prop_assert_eq!(ends.next(), model.values().min().copied());
                let mut ended = ends.ended(now);
                ended.sort_unstable();
                let want: Vec<i64> = model.iter().filter(|(_, end)| **end <= now).map(|(id, _)| *id).collect();
                prop_assert_eq!(ended, want);
                let left = model.get(&id).map_or(0, |end| (*end - now).as_secs() as i64);
                prop_assert_eq!(ends.left(id, now), left);
            }
        }
    }
}
