//! Keeps an etcd's content as desired: writes what differs, deletes what is owned and no longer wanted, and does so again
//! when the etcd comes back empty or somebody else changed a key.
//!
//! In: desired keys and values, any time, connected or not. Out: transactions of at most 128 operations.
//!
//! Invariants: nothing is written before the scopes were listed once; an unchanged value is never written; keys are deleted
//! only below a prefix given to [`Writer::prune`]; the canaries (`cilium/synced/...`) of a round go last. Keys carry no
//! lease: what was published stays while the writer is away, and the age of the heartbeat tells readers that it is.

mod content;
mod worker;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use isthmus_runtime::CancellationToken;
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
};

use crate::{config::EtcdConfig, connect::Options, plan::Limits};
use content::Content;

/// How a [`Writer`] works.
#[derive(Clone, Debug)]
pub struct WriterOptions {
    /// Prefixes, each ending in `/`, that hold every key this writer will ever write. They are listed and watched, so they
    /// should hold little else. Must not overlap.
    pub scopes: Vec<String>,
    /// How often `cilium/.heartbeat` is written while connected and listed; at most 30 s for Cilium's readers. `None` = never.
    pub heartbeat: Option<Duration>,
    /// Size of transactions and values.
    pub limits: Limits,
    /// Connection.
    pub connection: Options,
}

impl WriterOptions {
    /// Defaults for `scopes`: a heartbeat every 10 s.
    pub fn new(scopes: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            scopes: scopes.into_iter().map(Into::into).collect(),
            heartbeat: Some(Duration::from_secs(10)),
            limits: Limits::default(),
            connection: Options::default(),
        }
    }
}

/// How a writer is doing.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct WriterStatus {
    /// The connection stands.
    pub connected: bool,
    /// All scopes were listed once, so that writing has begun.
    pub listed: bool,
    /// Keys that are known to differ from what is desired.
    pub pending: usize,
    /// Desired keys that are not written because their value is too large for etcd.
    pub refused: usize,
    /// Operations written since the start.
    pub writes: u64,
    /// Failed transactions and lost connections since the start.
    pub failures: u64,
    /// The last failure, empty if none.
    pub last_error: String,
}

/// A key as the store holds it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Stored {
    /// The whole key.
    pub key: Bytes,
    /// Its value.
    pub value: Bytes,
}

/// Handle of a running writer. Cheap to clone; the writer runs until its token is cancelled.
#[derive(Clone)]
pub struct Writer {
    shared: Arc<Shared>,
}

struct Shared {
    content: Mutex<Content>,
    /// Something is desired that was not before.
    wake: Notify,
    status: watch::Sender<WriterStatus>,
    /// Everything desired up to this generation is in the store.
    settled: watch::Sender<u64>,
}

impl Shared {
    fn content(&self) -> MutexGuard<'_, Content> {
        // No code panics while it holds the lock, except on a broken invariant, which ends the task that did.
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Writer {
    /// Starts a writer to the etcd of `config`. It connects, lists, writes and retries by itself until `shutdown`.
    pub fn start(
        config: EtcdConfig,
        options: WriterOptions,
        shutdown: CancellationToken,
    ) -> (Self, JoinHandle<()>) {
        let shared = Arc::new(Shared {
            content: Mutex::new(Content::new(options.scopes.clone())),
            wake: Notify::new(),
            status: watch::Sender::new(WriterStatus::default()),
            settled: watch::Sender::new(0),
        });
        let task = tokio::spawn(worker::run(shared.clone(), config, options, shutdown));
        (Self { shared }, task)
    }

    /// From now on `key` shall hold `value`. A key outside the scopes is a programming error: it is logged and ignored.
    pub fn put(&self, key: impl Into<Bytes>, value: impl Into<Bytes>) {
        if self.shared.content().put(key.into(), value.into()) {
            self.shared.wake.notify_one();
        }
    }

    /// From now on `key` is not desired. It is deleted if it lies below a pruned prefix, or was put by this writer.
    pub fn delete(&self, key: &[u8]) {
        if self.shared.content().delete(key) {
            self.shared.wake.notify_one();
        }
    }

    /// The source of everything under `prefix` is known in full: from now on keys there that are not desired are deleted.
    pub fn prune(&self, prefix: &str) {
        self.shared.content().prune(prefix);
        self.shared.wake.notify_one();
    }

    /// Resolves when the scopes were listed once, so that [`stored`](Self::stored) shows what an earlier process left.
    /// Also resolves when the writer stops.
    pub async fn listed(&self) {
        let mut status = self.shared.status.subscribe();
        // An error means that the sender is gone, which `self` rules out.
        let _ = status.wait_for(|status| status.listed).await;
    }

    /// What the store holds under `prefix`, by key, as far as it is known.
    pub fn stored(&self, prefix: &str) -> Vec<Stored> {
        self.shared.content().stored(prefix.as_bytes())
    }

    /// Resolves when everything that was desired at the time of the call is in the store (or refused for its size).
    pub async fn flush(&self) {
        let generation = self.shared.content().generation();
        let mut settled = self.shared.settled.subscribe();
        let _ = settled.wait_for(|settled| *settled >= generation).await;
    }

    /// How the writer is doing now.
    pub fn status(&self) -> WriterStatus {
        self.shared.status.borrow().clone()
    }

    /// Follows the status.
    pub fn watch_status(&self) -> watch::Receiver<WriterStatus> {
        self.shared.status.subscribe()
    }
}
