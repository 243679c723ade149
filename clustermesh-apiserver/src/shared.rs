//! The store as tasks share it: one writer at a time, many readers, and a wake-up that carries no data.

use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::watch;

use crate::store::Store;

/// The store and its wake-up. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Shared {
    store: Arc<RwLock<Store>>,
    changed: Arc<watch::Sender<i64>>,
}

impl Shared {
    /// Shares `store`.
    pub fn new(store: Store) -> Self {
        let (changed, _) = watch::channel(store.merged_revision());
        Self {
            store: Arc::new(RwLock::new(store)),
            changed: Arc::new(changed),
        }
    }

    /// Reads. The lock is held as long as `read` runs; no reader may wait for anything meanwhile.
    pub fn read<T>(&self, read: impl FnOnce(&Store) -> T) -> T {
        // The store's changes do not panic half-way, short of a broken invariant that ends the writing task.
        read(&self.store.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes the store and wakes everyone who waits, if anything changed.
    pub fn update<T>(&self, update: impl FnOnce(&mut Store) -> T) -> T {
        let (result, revision) = {
            let mut store = self.store.write().unwrap_or_else(PoisonError::into_inner);
            (update(&mut store), store.merged_revision())
        };
        self.changed.send_if_modified(|seen| {
            let changed = *seen != revision;
            *seen = revision;
            changed
        });
        result
    }

    /// Wakes whenever the merged revision moved.
    pub fn changes(&self) -> watch::Receiver<i64> {
        self.changed.subscribe()
    }
}
