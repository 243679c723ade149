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

/// What one more reader that is told something adds to the time between two rounds of wake-ups: a few times what it costs to
/// wake it and to write to its connection, so that rounds leave most of a machine to others however many readers there are.
const PACE_PER_READER: Duration = Duration::from_micros(40);
/// Rounds are never further apart.
const PACE_MAX: Duration = Duration::from_millis(50);
/// Rounds this close are not held apart: the timer is not finer.
const PACE_MIN: Duration = Duration::from_millis(1);

/// The store and its wake-up. Cheap to clone.
///
/// Readers are woken in rounds. A change after a quiet time begins one at once; changes during the pause that follows it wake
/// readers together when the pause is over, and so leave in one message to each.
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
    /// A round will begin when the pause is over.
    waits: bool,
    /// Readers that were told something in the round before the last one, which may not have come to its end.
    told_before: usize,
}

/// The pause after a round of so many wake-ups.
fn pace(readers: usize) -> Duration {
    let pause = PACE_PER_READER.saturating_mul(u32::try_from(readers).unwrap_or(u32::MAX));
    if pause < PACE_MIN {
        Duration::ZERO
    } else {
        pause.min(PACE_MAX)
    }
}

impl Rounds {
    /// Asks for a round, when `told` readers were told something since the last one began. `None` = one that begins later will
    /// do; else when it begins, for which the caller has to care.
    fn ask(&mut self, now: Instant, told: usize) -> Option<Instant> {
        if self.waits {
            return None;
        }
        let pause = pace(told.max(self.told_before));
        let at = self.last.map_or(now, |last| now.max(last + pause));
        self.waits = at > now;
        self.last = Some(at);
        Some(at)
    }

    /// A round begins, `told` readers after the last one.
    fn begin(&mut self, told: usize) {
        self.waits = false;
        self.told_before = told;
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

    /// Changes the store and wakes everyone who waits, if anything changed: at once, or when the present pause is over.
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
        assert_eq!(pace(0), Duration::ZERO);
        assert_eq!(pace(20), Duration::ZERO);
        assert_eq!(pace(500), Duration::from_millis(20));
        assert_eq!(pace(usize::MAX), PACE_MAX);
    }

    proptest! {
        #[test]
        fn every_change_is_in_a_round_that_begins_within_the_pause(changes in proptest::collection::vec((0u64..40_000, 0usize..1500), 1..60)) {
            let (mut rounds, mut now) = (Rounds::default(), Instant::now());
            // When rounds began, and how many readers each told.
            let mut begun: Vec<(Instant, usize)> = vec![];
            let mut waiting: Option<Instant> = None;
            for (gap, told) in changes {
                now += Duration::from_micros(gap);
                let last = begun.last().map_or(0, |(_, told)| *told);
                if let Some(at) = waiting.take_if(|at| *at <= now) {
                    rounds.begin(last);
                    begun.push((at, told));
                }
                let last = begun.last().map_or(0, |(_, told)| *told);
                match rounds.ask(now, last) {
                    None => prop_assert!(waiting.is_some()),
                    Some(at) if at > now => waiting = Some(at),
                    Some(at) => {
                        rounds.begin(last);
                        begun.push((at, told));
                    }
                }
                prop_assert!(waiting.unwrap_or(now) <= now + PACE_MAX);
            }
            prop_assert!(begun.windows(2).all(|pair| pair[1].0 - pair[0].0 >= pace(pair[0].1)));
        }
    }

    #[test]
    fn a_round_that_has_hardly_begun_holds_as_long_as_the_one_before() {
        let (mut rounds, begin) = (Rounds::default(), Instant::now());
        rounds.begin(500);
        assert_eq!(rounds.ask(begin, 500), Some(begin));
        rounds.begin(500);
        // Three of them have taken theirs yet.
        let at = rounds.ask(begin + Duration::from_millis(1), 3);
        assert_eq!(at, Some(begin + Duration::from_millis(20)));
        rounds.begin(3);
        assert_eq!(
            rounds.ask(begin + Duration::from_millis(21), 3),
            Some(begin + Duration::from_millis(21))
        );
    }
}
