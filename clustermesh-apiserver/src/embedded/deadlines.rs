//! When leases end, and which part of the past is too old to keep. Pure: the time is an argument.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
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

/// Revisions at times, by which the age of the past is known. As many as there are looks within the age.
#[derive(Clone, Debug)]
pub(super) struct Ages {
    age: Duration,
    /// Oldest first.
    marks: VecDeque<(Instant, i64)>,
}

impl Ages {
    /// The past is kept for `age`.
    pub(super) fn new(age: Duration) -> Self {
        Self {
            age,
            marks: VecDeque::new(),
        }
    }

    /// Takes a look, `now`, at `revision`. Returns the newest revision that is known to have been the present one at least the
    /// age ago, or 0: what was replaced before it is too old.
    pub(super) fn look(&mut self, now: Instant, revision: i64) -> i64 {
        if self.marks.back().is_none_or(|(_, last)| *last < revision) {
            self.marks.push_back((now, revision));
        }
        let mut aged = 0;
        while let Some((_, revision)) = self
            .marks
            .pop_front_if(|(at, _)| now.saturating_duration_since(*at) >= self.age)
        {
            aged = revision;
        }
        aged
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

        #[test]
        fn what_is_too_old_is_known_within_a_look(age in 1u64..7200, looks in proptest::collection::vec((1u64..120, 0i64..50), 1..300)) {
            let age = Duration::from_secs(age);
            let mut ages = Ages::new(age);
            let begin = Instant::now();
            let (mut now, mut revision, mut aged) = (begin, 1, 0);
            let mut seen: Vec<(Instant, i64)> = vec![];
            for (gap, writes) in looks {
                now += Duration::from_secs(gap);
                revision += writes;
                seen.push((now, revision));
                aged = ages.look(now, revision).max(aged);
                // The newest look that is old enough, or the first one at its revision.
                let want = seen.iter().rev().find(|(_, revision)| {
                    let first = seen.iter().find(|(_, other)| other == revision);
                    first.is_some_and(|(at, _)| now - *at >= age)
                });
                prop_assert_eq!(aged, want.map_or(0, |(_, revision)| *revision));
                prop_assert!(ages.marks.len() <= seen.iter().filter(|(at, _)| now - *at < age).count() + 1);
            }
        }
    }

    #[test]
    fn an_hour_is_an_hour() {
        let (mut ages, now) = (Ages::new(Duration::from_secs(3600)), Instant::now());
        assert_eq!(ages.look(now, 100), 0);
        assert_eq!(ages.look(now + Duration::from_secs(1800), 200), 0);
        assert_eq!(ages.look(now + Duration::from_secs(3599), 300), 0);
        assert_eq!(ages.look(now + Duration::from_secs(3600), 300), 100);
        assert_eq!(ages.look(now + Duration::from_secs(5399), 300), 0);
        assert_eq!(ages.look(now + Duration::from_secs(7200), 300), 300);
    }

    #[test]
    fn the_longest_lease_can_be_kept() {
        let (mut ends, now) = (Ends::default(), Instant::now());
        ends.set(1, now, i64::MAX);
        assert!(ends.left(1, now) > 1_000_000_000);
        ends.keep(&BTreeMap::from([(2, 10)]), now);
        assert_eq!((ends.left(1, now), ends.left(2, now)), (0, 10));
    }
}
