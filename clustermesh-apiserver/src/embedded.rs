//! The embedded store: the own cluster's state in a local file, for a small cluster without an etcd.
//!
//! In: writes of the local operator, as etcd's calls ([`server`](crate::server) lets nobody else write). Out: changes for the
//! [`store`](crate::store) that all readers are served from, and answers.
//!
//! ```text
//!  calls ──► queue ──► group ──► state.apply (pure) ──► file, flushed once ──► readers' store ──► answers
//! ```
//!
//! Invariants: nothing is answered or shown to readers before it is on disk; calls that wait together share one flush; the
//! history's identity (etcd's cluster ID) and its revisions outlive the process, so that readers resume; leases get their
//! whole TTL again after a restart, as with etcd; when the disk fails, writes are refused and reads go on until it takes writes
//! again. Keys and values are there once: the readers' store shares the bytes.

pub mod check;
mod content;
mod deadlines;
mod disk;
pub mod file;
pub mod quota;
mod refusal;
mod select;
pub mod state;
mod task;
#[cfg(test)]
mod tests;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use isthmus_runtime::Health;
use tokio::sync::{mpsc, oneshot};

use crate::{metrics::EmbeddedMetrics, shared::Shared, store::HistoryLimits};
use file::Opened;
pub use refusal::Refusal;
pub(crate) use select::holds_for;
use state::Retention;
pub use state::{Answer, Command};
pub use task::{StoreError, Task};

/// Calls that wait; more wait outside.
const QUEUE_LEN: usize = 1024;
/// Shortest TTL of a lease in seconds, which etcd derives from its election timeout.
const TTL_MIN: i64 = 2;

/// How much the store may hold.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The past, by count and bytes,
    pub retention: Retention,
    /// and by age.
    pub age: Duration,
    /// Bytes of all, the past included, beyond which nothing is added.
    pub quota_bytes: u64,
    /// Bytes that the file may be larger than a few times what is in it, before it is written anew.
    pub slack_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            retention: Retention {
                revisions: 50_000,
                bytes: 64 * 1024 * 1024,
            },
            age: HistoryLimits::AGE,
            quota_bytes: quota::DEFAULT,
            slack_bytes: 16 * 1024 * 1024,
        }
    }
}

/// Why a call has no answer.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum CallError {
    /// It is refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The disk does not take it. Whether it was written before that was noticed is not known.
    #[error("etcdserver: the store's disk does not take writes: {0}")]
    Disk(Arc<str>),
    /// The store stops. Whether the call was done is not known.
    #[error("etcdserver: server stopped")]
    Stopped,
}

/// What is known about a lease.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct LeaseInfo {
    /// Seconds left.
    pub left: i64,
    /// Seconds in all.
    pub ttl: i64,
    /// Its keys.
    pub keys: Vec<Bytes>,
}

/// Who waits for an answer.
type Asker<T> = oneshot::Sender<Result<T, CallError>>;

/// Everything that is asked of the task.
enum Ask {
    Do(Command, Asker<Answer>),
    KeepAlive(i64, Asker<Option<i64>>),
    Lease(i64, Asker<Option<LeaseInfo>>),
    Leases(Asker<Vec<i64>>),
}

/// How much room there is; told by the task.
#[derive(Debug, Default)]
struct Standing {
    /// A write was refused for lack of it, and none was taken since.
    full: AtomicBool,
    bytes: AtomicU64,
    file_bytes: AtomicU64,
}

/// Handle of the store's task. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Embedded {
    asks: mpsc::Sender<Ask>,
    standing: Arc<Standing>,
}

impl Embedded {
    /// Does `command`; when this returns it is on disk and readers see it.
    pub async fn call(&self, command: Command) -> Result<Answer, CallError> {
        self.ask(|reply| Ask::Do(command, reply)).await?
    }

    /// Gives a lease its whole TTL again and returns that in seconds; `None` = there is no such lease.
    pub async fn keep_alive(&self, id: i64) -> Result<Option<i64>, CallError> {
        self.ask(|reply| Ask::KeepAlive(id, reply)).await?
    }

    /// A lease, if there is one.
    pub async fn lease(&self, id: i64) -> Result<Option<LeaseInfo>, CallError> {
        self.ask(|reply| Ask::Lease(id, reply)).await?
    }

    /// All leases.
    pub async fn leases(&self) -> Result<Vec<i64>, CallError> {
        self.ask(Ask::Leases).await?
    }

    /// Whether the last write that needed room was refused for lack of it: etcd's alarm NOSPACE.
    pub fn is_full(&self) -> bool {
        self.standing.full.load(Ordering::Relaxed)
    }

    /// Forgets that there was no room, until the next write finds out.
    pub fn disarm(&self) {
        self.standing.full.store(false, Ordering::Relaxed);
    }

    /// Bytes of the file, and of what is in it.
    pub fn sizes(&self) -> (u64, u64) {
        let size = |bytes: &AtomicU64| bytes.load(Ordering::Relaxed);
        (size(&self.standing.file_bytes), size(&self.standing.bytes))
    }

    async fn ask<T>(&self, ask: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Result<T, CallError> {
        let (reply, answer) = oneshot::channel();
        let sent = self.asks.send(ask(reply)).await;
        sent.map_err(|_| CallError::Stopped)?;
        answer.await.map_err(|_| CallError::Stopped)
    }
}

/// The TTL that a lease gets for one that was asked for, in seconds.
pub fn granted_ttl(asked: i64) -> i64 {
    asked.max(TTL_MIN)
}

/// Shows readers what is stored, and makes the task that takes writes.
pub fn start(
    opened: Opened,
    shared: Shared,
    health: &Health,
    metrics: EmbeddedMetrics,
    limits: Limits,
) -> (Embedded, Task) {
    let (sender, asks) = mpsc::channel(QUEUE_LEN);
    let standing = Arc::<Standing>::default();
    let embedded = Embedded {
        asks: sender,
        standing: standing.clone(),
    };
    let task = task::new(opened, shared, health.clone(), metrics, limits, asks, standing);
    (embedded, task)
}
