//! How old the past is. Pure: time is an argument, a duration since any fixed moment.
//!
//! In: a look at a revision now and then. Out: the newest revision that was there longer ago than an age. As many marks as there
//! were looks within the age, and nothing for each revision.

use std::{collections::VecDeque, time::Duration};

use super::Store;

/// Revisions at times, by which the age of the past is known.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ages {
    /// Oldest first.
    marks: VecDeque<(Duration, i64)>,
}

impl Ages {
    /// Takes a look, `now`, at `revision`. Returns the newest revision that is known to have been the present one at least
    /// `age` ago, or 0: what was replaced before it is too old.
    pub(crate) fn look(&mut self, now: Duration, revision: i64, age: Duration) -> i64 {
        if self.marks.back().is_none_or(|(_, last)| *last < revision) {
            self.marks.push_back((now, revision));
        }
        let mut aged = 0;
        while let Some((_, revision)) = self.marks.pop_front_if(|(at, _)| now.saturating_sub(*at) >= age) {
            aged = revision;
        }
        aged
    }
}

impl Store {
    /// Takes a look at the time, and forgets what is older than [`HistoryLimits::age`](super::HistoryLimits::age) of its view.
    /// Who calls this every so often keeps history for at most so much longer.
    pub fn forget_aged(&mut self, now: Duration) {
        let (own, remote) = (self.limits.age, self.remote_limits.age);
        self.merged.forget_aged(now, own);
        for (id, sub) in &mut self.subs {
            let age = if *id == super::SubId::Own { own } else { remote };
            sub.history.forget_aged(now, age);
        }
    }
}

#[cfg(test)]
mod tests {
    use isthmus_model::ClusterName;
    use isthmus_tls::rights::KeyRange;
    use proptest::prelude::*;

    use super::{
        super::{HistoryLimits, Next, Relist, SourceChange, SubId, WatchStart},
        *,
    };

    const HOUR: Duration = Duration::from_secs(3600);

    proptest! {
        #[test]
        fn what_is_too_old_is_known_within_a_look(age in 1u64..7200, looks in proptest::collection::vec((1u64..120, 0i64..50), 1..300)) {
            let age = Duration::from_secs(age);
            let mut ages = Ages::default();
            let (mut now, mut revision, mut aged) = (Duration::ZERO, 1, 0);
            let mut seen: Vec<(Duration, i64)> = vec![];
            for (gap, writes) in looks {
                now += Duration::from_secs(gap);
                revision += writes;
                seen.push((now, revision));
                aged = ages.look(now, revision, age).max(aged);
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
        let (mut ages, hour) = (Ages::default(), Duration::from_secs(3600));
        for (second, revision, aged) in [
            (0, 100, 0),
            (1800, 200, 0),
            (3599, 300, 0),
            (3600, 300, 100),
            (5399, 300, 0),
            (7200, 300, 300),
        ] {
            assert_eq!(
                ages.look(Duration::from_secs(second), revision, hour),
                aged,
                "{second}"
            );
        }
    }

    /// A store that keeps an hour, at revision `revision`.
    fn store(revision: i64) -> Store {
        let limits = HistoryLimits::default();
        let mut store = Store::new(ClusterName::new("c1").unwrap(), 5, limits, limits);
        let list = Relist {
            cluster_id: 9,
            revision,
            new_history: false,
            changes: vec![],
            present: None,
        };
        store.relist(&SubId::Own, list);
        store
    }

    fn put(store: &mut Store, key: &'static str, revision: i64) {
        let put = SourceChange::Put {
            key: key.into(),
            value: "v".into(),
            create_revision: revision,
            mod_revision: revision,
            version: 1,
        };
        store.apply(&SubId::Own, revision, vec![put]);
    }

    fn watch(key: &'static str, start_revision: i64) -> WatchStart {
        WatchStart {
            range: KeyRange::from_etcd(key.as_bytes(), b""),
            start_revision,
            no_put: false,
            no_delete: false,
            prev_kv: false,
        }
    }

    #[test]
    fn changes_are_forgotten_for_their_age_and_who_has_seen_all_goes_on() {
        let (a, b) = ("cilium/state/a", "cilium/state/b");
        let mut store = store(10);
        let (mut idle, _) = store.watch(watch(b, 0));
        let (mut slow, _) = store.watch(watch(a, 0));
        put(&mut store, a, 11);
        put(&mut store, a, 12);
        assert!(store.next(&mut idle).is_none());
        // The source's other keys move on: all up to 90 is known, and nothing of it is for anyone here.
        store.apply(&SubId::Own, 90, vec![]);
        store.forget_aged(Duration::ZERO);
        put(&mut store, a, 91);
        assert!(store.next(&mut idle).is_none());
        store.forget_aged(HOUR - Duration::from_secs(1));
        let resumed = |store: &Store, from| {
            let (mut cursor, _) = store.watch(watch(a, from));
            store.next(&mut cursor)
        };
        assert!(matches!(resumed(&store, 11), Some(Next::Events { events, .. }) if events.len() == 3));
        store.forget_aged(HOUR);
        let Some(Next::Compacted { compact_revision, .. }) = resumed(&store, 11) else {
            panic!("the first change is an hour old");
        };
        assert_eq!(compact_revision, 12);
        assert!(matches!(resumed(&store, 12), Some(Next::Events { events, .. }) if events.len() == 2));
        assert!(matches!(store.next(&mut slow), Some(Next::Compacted { .. })));
        // However long nothing happens.
        for hour in 2..50 {
            store.forget_aged(HOUR * hour);
        }
        put(&mut store, b, 100);
        assert!(matches!(store.next(&mut idle), Some(Next::Events { events, .. }) if events.len() == 1));
        assert!(resumed(&store, 92).is_none());
    }
}
