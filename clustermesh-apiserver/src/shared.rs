//! The store as tasks share it: one writer at a time, many readers, and a wake-up that carries no data.

use std::{
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Duration,
};

use tokio::{runtime::Handle, sync::watch, time::Instant};

use crate::store::Store;

/// What one more waiting reader adds to the time between two rounds of wake-ups: a few times what it costs to wake it and to
/// write to its connection, so that rounds leave most of a machine to others however many readers there are.
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
}

#[derive(Debug, Default)]
struct Rounds {
    last: Option<Instant>,
    /// A round will begin when the pause is over.
    waits: bool,
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
    /// Asks for a round. `None` = one that begins later will do; else when it begins, for which the caller has to care.
    fn ask(&mut self, now: Instant, pause: Duration) -> Option<Instant> {
        if self.waits {
            return None;
        }
        let at = self.last.map_or(now, |last| now.max(last + pause));
        self.waits = at > now;
        self.last = Some(at);
        Some(at)
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
            self.wake(revision);
        }
        result
    }

    fn wake(&self, revision: i64) {
        let now = Instant::now();
        let pause = pace(self.changed.receiver_count());
        let at = self.rounds().ask(now, pause);
        match (at, Handle::try_current()) {
            (None, _) => {}
            (Some(at), Ok(runtime)) if at > now => {
                let shared = self.clone();
                runtime.spawn(async move {
                    tokio::time::sleep_until(at).await;
                    // First: a change from here on asks for a round of its own.
                    shared.rounds().waits = false;
                    shared.begin_round(shared.read(Store::merged_revision));
                });
            }
            // Without a runtime there is nobody to wake.
            (Some(_), _) => {
                self.rounds().waits = false;
                self.begin_round(revision);
            }
        }
    }

    /// Wakes everyone who waits, though nothing changed.
    pub fn wake_all(&self) {
        self.changed.send_modify(|_| ());
    }

    fn begin_round(&self, revision: i64) {
        self.changed.send_if_modified(|seen| {
            let changed = *seen < revision;
            *seen = revision.max(*seen);
            changed
        });
    }

    fn rounds(&self) -> std::sync::MutexGuard<'_, Rounds> {
        self.rounds.lock().unwrap_or_else(PoisonError::into_inner)
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
        fn every_change_is_in_a_round_that_begins_within_the_pause(gaps in proptest::collection::vec(0u64..40_000, 1..60), pause in 0u64..50_000) {
            let pause = Duration::from_micros(pause);
            let (mut rounds, mut now) = (Rounds::default(), Instant::now());
            let mut begun: Vec<Instant> = vec![];
            let mut waiting: Option<Instant> = None;
            for gap in gaps {
                now += Duration::from_micros(gap);
                if let Some(at) = waiting.take_if(|at| *at <= now) {
                    rounds.waits = false;
                    begun.push(at);
                }
                match rounds.ask(now, pause) {
                    None => prop_assert!(waiting.is_some()),
                    Some(at) if at > now => waiting = Some(at),
                    Some(at) => begun.push(at),
                }
                let next = waiting.unwrap_or(now);
                prop_assert!(next <= now + pause);
            }
            prop_assert!(begun.windows(2).all(|pair| pair[1] - pair[0] >= pause));
        }
    }
}
