//! The store as tasks share it: one writer at a time, many readers, and a wake-up that carries no data.

use std::{
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{runtime::Handle, sync::watch, time::Instant};

use crate::store::Store;

/// What one more reader that is told something adds to the time for which changes are gathered: somewhat more than it costs to
/// wake it and to write to its connection, so that rounds leave most of a machine to others however many readers there are.
const GATHER_PER_READER: Duration = Duration::from_micros(24);
/// Changes wait no longer than this; twice as long while there are many.
const GATHER_MAX: Duration = Duration::from_millis(25);
/// Those that would wait less do not: the timer is not finer.
const GATHER_MIN: Duration = Duration::from_millis(1);
/// More changes than this in one round are many. Then a round costs little beside what is in it, and it is the sum of rounds
/// that counts.
const MANY: usize = 8;

/// The store and its wake-up. Cheap to clone.
///
/// Readers are woken in rounds. A change after a quiet time begins one at once; one that comes soon after a round waits, and
/// the changes that come meanwhile go with it and so leave in one message to each reader.
#[derive(Clone, Debug)]
pub struct Shared {
    store: Arc<RwLock<Store>>,
    changed: Arc<watch::Sender<i64>>,
    rounds: Arc<Mutex<Rounds>>,
    /// Readers that were told something since the last round began.
    told: Arc<AtomicUsize>,
}

#[derive(Debug, Default)]
struct Rounds {
    last: Option<Instant>,
    /// A round will begin when changes were gathered for long enough.
    waits: bool,
    /// Changes that go into the next round, and went into the last one.
    changes: usize,
    changes_before: usize,
    /// Readers that were told something in the round before the last one, which may not have come to its end.
    told_before: usize,
}

/// For how long changes are gathered that soon follow a round of so many wake-ups and changes.
fn gather(readers: usize, changes: usize) -> Duration {
    let time = GATHER_PER_READER.saturating_mul(u32::try_from(readers).unwrap_or(u32::MAX));
    if time < GATHER_MIN {
        Duration::ZERO
    } else {
        time.min(GATHER_MAX) * if changes > MANY { 2 } else { 1 }
    }
}

impl Rounds {
    /// Asks for a round, when `told` readers were told something since the last one began. `None` = one that begins later will
    /// do; else when it begins, for which the caller has to care.
    fn ask(&mut self, now: Instant, told: usize) -> Option<Instant> {
        self.changes += 1;
        if self.waits {
            return None;
        }
        let time = gather(told.max(self.told_before), self.changes_before);
        let soon = self
            .last
            .is_some_and(|last| now.saturating_duration_since(last) < time);
        let at = if soon { now + time } else { now };
        self.waits = soon;
        self.last = Some(at);
        Some(at)
    }

    /// A round begins, `told` readers after the last one.
    fn begin(&mut self, told: usize) {
        self.waits = false;
        self.told_before = told;
        self.changes_before = std::mem::take(&mut self.changes);
    }
}

impl Shared {
    /// Shares `store`.
    pub fn new(store: Store) -> Self {
        let (changed, _) = watch::channel(store.merged_revision());
        Self {
            store: Arc::new(RwLock::new(store)),
            changed: Arc::new(changed),
            rounds: Arc::default(),
            told: Arc::default(),
        }
    }

    /// Reads. The lock is held as long as `read` runs; no reader may wait for anything meanwhile.
    pub fn read<T>(&self, read: impl FnOnce(&Store) -> T) -> T {
        // The store's changes do not panic half-way, short of a broken invariant that ends the writing task.
        read(&self.store.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes the store and wakes everyone who waits, if anything changed: at once, or a little later together with others.
    pub fn update<T>(&self, update: impl FnOnce(&mut Store) -> T) -> T {
        let (result, revision) = {
            let mut store = self.store.write().unwrap_or_else(PoisonError::into_inner);
            (update(&mut store), store.merged_revision())
        };
        if *self.changed.borrow() != revision {
            self.wake();
        }
        result
    }

    fn wake(&self) {
        let now = Instant::now();
        let at = self.rounds().ask(now, self.told.load(Ordering::Relaxed));
        match (at, Handle::try_current()) {
            (None, _) => {}
            (Some(at), Ok(runtime)) if at > now => {
                let shared = self.clone();
                runtime.spawn(async move {
                    tokio::time::sleep_until(at).await;
                    shared.begin_round();
                });
            }
            // Without a runtime there is nobody to wake.
            (Some(_), _) => self.begin_round(),
        }
    }

    /// Wakes everyone who waits, though nothing changed.
    pub fn wake_all(&self) {
        self.changed.send_modify(|_| ());
    }

    fn begin_round(&self) {
        // First: a change from here on asks for a round of its own.
        self.rounds().begin(self.told.swap(0, Ordering::Relaxed));
        let revision = self.read(Store::merged_revision);
        self.changed.send_if_modified(|seen| {
            let changed = *seen < revision;
            *seen = revision.max(*seen);
            changed
        });
    }

    fn rounds(&self) -> std::sync::MutexGuard<'_, Rounds> {
        self.rounds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A reader is told something, for the first time since it was woken. Who only looks costs little, and who takes nothing
    /// holds nobody up.
    pub fn tells(&self) {
        self.told.fetch_add(1, Ordering::Relaxed);
    }

    /// Wakes whenever the merged revision moved.
    pub fn changes(&self) -> watch::Receiver<i64> {
        self.changed.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn few_readers_are_woken_at_once_and_many_soon() {
        assert_eq!(gather(0, 1), Duration::ZERO);
        assert_eq!(gather(40, 100), Duration::ZERO);
        assert_eq!(gather(500, 2), Duration::from_millis(12));
        assert_eq!(gather(500, 40), Duration::from_millis(24));
        assert_eq!(gather(usize::MAX, usize::MAX), GATHER_MAX * 2);
    }

    proptest! {
        #[test]
        fn every_change_is_in_a_round_that_begins_in_time_and_rounds_keep_apart(changes in proptest::collection::vec((0u64..40_000, 0usize..1500), 1..60)) {
            let (mut rounds, mut now) = (Rounds::default(), Instant::now());
            // When rounds began, how many readers each told, and with how many changes.
            let mut begun: Vec<(Instant, usize, usize)> = vec![];
            let mut waiting: Option<Instant> = None;
            let mut gathered = 0;
            for (gap, told) in changes {
                now += Duration::from_micros(gap);
                let last = |begun: &[(Instant, usize, usize)]| begun.last().map_or(0, |(_, told, _)| *told);
                if let Some(at) = waiting.take_if(|at| *at <= now) {
                    rounds.begin(last(&begun));
                    begun.push((at, told, std::mem::take(&mut gathered)));
                }
                gathered += 1;
                match rounds.ask(now, last(&begun)) {
                    None => prop_assert!(waiting.is_some()),
                    Some(at) if at > now => waiting = Some(at),
                    Some(at) => {
                        rounds.begin(last(&begun));
                        begun.push((at, told, std::mem::take(&mut gathered)));
                    }
                }
                prop_assert!(waiting.unwrap_or(now) <= now + GATHER_MAX * 2);
            }
            for pair in begun.windows(2) {
                let (at, told, changes) = pair[0];
                prop_assert!(pair[1].0 - at >= gather(told, changes), "{pair:?}");
            }
        }
    }

    #[test]
    fn a_steady_stream_is_gathered_in_twos_and_waits_no_longer_than_for_that() {
        let (mut rounds, begin) = (Rounds::default(), Instant::now());
        let mut waiting: Option<Instant> = None;
        let mut sizes = vec![];
        for number in 0..100 {
            let now = begin + Duration::from_millis(10 * number);
            if waiting.take_if(|at| *at <= now).is_some() {
                sizes.push(rounds.changes);
                rounds.begin(500);
            }
            if let Some(at) = rounds.ask(now, 500) {
                assert!(at - now <= Duration::from_millis(12));
                waiting = (at > now).then_some(at);
                if waiting.is_none() {
                    rounds.begin(500);
                }
            }
        }
        assert!(
            sizes.len() > 40 && sizes.iter().all(|changes| *changes == 2),
            "{sizes:?}"
        );
    }

    #[test]
    fn a_round_that_has_hardly_begun_counts_like_the_one_before() {
        let (mut rounds, begin) = (Rounds::default(), Instant::now());
        let at = |ms| Some(begin + Duration::from_millis(ms));
        assert_eq!(rounds.ask(begin, 500), at(0));
        rounds.begin(500);
        // Three of them have taken theirs yet.
        assert_eq!(rounds.ask(begin + Duration::from_millis(1), 3), at(13));
        rounds.begin(3);
        assert_eq!(rounds.ask(begin + Duration::from_millis(14), 3), at(14));
    }
}
