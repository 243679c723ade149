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
//! whole TTL again after a restart, as with etcd; if the disk fails, the process ends rather than show what may not last.
//! The state holds keys and values a second time, beside the readers' store: this is for small clusters.

pub mod check;
pub mod file;
mod refusal;
mod select;
pub mod state;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use isthmus_runtime::{CancellationToken, Health, State as HealthState};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};

use crate::{
    metrics::EmbeddedMetrics,
    shared::Shared,
    store::{Relist, SourceChange, Store, SubId},
};
use file::{CommitError, File, Opened};
pub use refusal::Refusal;
pub use state::{Answer, Command};
use state::{DiskWrite, Effects, Loaded, Retention, State};

/// Name of this part in the health register.
const PART: &str = "store";
/// Calls that wait; more wait outside.
const QUEUE_LEN: usize = 1024;
/// Calls that share a flush.
const GROUP_LEN: usize = 512;
/// Bytes of writes after which a group takes no further call.
const GROUP_BYTES: usize = 8 * 1024 * 1024;
/// How often old history is looked for.
const COMPACTION_INTERVAL: Duration = Duration::from_secs(30);
/// Shortest TTL of a lease in seconds, which etcd derives from its election timeout.
const TTL_MIN: i64 = 2;

/// How long the past is kept.
#[derive(Clone, Copy, Debug)]
pub struct HistoryKept {
    /// By count and bytes,
    pub retention: Retention,
    /// and by age.
    pub age: Duration,
}

impl Default for HistoryKept {
    fn default() -> Self {
        Self {
            retention: Retention {
                revisions: 50_000,
                bytes: 64 * 1024 * 1024,
            },
            age: Duration::from_secs(3600),
        }
    }
}

/// Why a call has no answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum CallError {
    /// It is refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
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

/// To a command.
type Reply = Result<Answer, Refusal>;

/// Everything that is asked of the task.
enum Ask {
    Do(Command, oneshot::Sender<Reply>),
    KeepAlive(i64, oneshot::Sender<Option<i64>>),
    Lease(i64, oneshot::Sender<Option<LeaseInfo>>),
    Leases(oneshot::Sender<Vec<i64>>),
}

/// Handle of the store's task. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Embedded {
    asks: mpsc::Sender<Ask>,
}

impl Embedded {
    /// Does `command`; when this returns it is on disk and readers see it.
    pub async fn call(&self, command: Command) -> Result<Answer, CallError> {
        Ok(self.ask(|reply| Ask::Do(command, reply)).await??)
    }

    /// Gives a lease its whole TTL again and returns that in seconds; `None` = there is no such lease.
    pub async fn keep_alive(&self, id: i64) -> Result<Option<i64>, CallError> {
        self.ask(|reply| Ask::KeepAlive(id, reply)).await
    }

    /// A lease, if there is one.
    pub async fn lease(&self, id: i64) -> Result<Option<LeaseInfo>, CallError> {
        self.ask(|reply| Ask::Lease(id, reply)).await
    }

    /// All leases.
    pub async fn leases(&self) -> Result<Vec<i64>, CallError> {
        self.ask(Ask::Leases).await
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

/// The task, which runs until it is told to stop or the disk fails.
pub struct Task {
    file: Arc<File>,
    state: State,
    shared: Shared,
    asks: mpsc::Receiver<Ask>,
    metrics: EmbeddedMetrics,
    kept: HistoryKept,
    /// When leases end.
    ends: BTreeMap<i64, Instant>,
    /// Revisions at times, oldest first: what was reached before the age is forgotten.
    marks: VecDeque<(Instant, i64)>,
}

/// Shows readers what is stored, and makes the task that takes writes.
pub fn start(
    opened: Opened,
    shared: Shared,
    health: &Health,
    metrics: EmbeddedMetrics,
    kept: HistoryKept,
) -> (Embedded, Task) {
    let Opened {
        file,
        history,
        loaded: Loaded { state, base, later },
    } = opened;
    shared.update(|store| show_loaded(store, history, &state, base, later));
    tracing::info!(revision = state.revision(), "serving the embedded store");
    health.set(PART, HealthState::Ok("serving".to_owned()));
    let (sender, asks) = mpsc::channel(QUEUE_LEN);
    let now = Instant::now();
    let ends = state.leases().map(|(id, ttl)| (id, end(now, ttl))).collect();
    let task = Task {
        file: Arc::new(file),
        state,
        shared,
        asks,
        metrics,
        kept,
        ends,
        marks: VecDeque::new(),
    };
    (Embedded { asks: sender }, task)
}

/// Until when a lease with this TTL lasts from `now` on. Longer ones than a century do not matter.
fn end(now: Instant, ttl: i64) -> Instant {
    const CENTURY: u64 = 3_155_760_000;
    now + Duration::from_secs(u64::try_from(ttl).unwrap_or_default().min(CENTURY))
}

fn show_loaded(
    store: &mut Store,
    history: u64,
    state: &State,
    base: Vec<SourceChange>,
    later: Vec<SourceChange>,
) {
    let list = Relist {
        cluster_id: history,
        revision: state.compacted(),
        new_history: false,
        changes: base,
        present: None,
    };
    store.relist(&SubId::Own, list);
    store.apply(&SubId::Own, state.revision(), later);
}

/// Writes that share a flush, and what follows when they are on disk.
#[derive(Default)]
struct Group {
    writes: Vec<DiskWrite>,
    bytes: usize,
    changes: Vec<SourceChange>,
    compacted: Option<i64>,
    replies: Vec<(oneshot::Sender<Reply>, Reply)>,
}

impl Group {
    fn take(&mut self, effects: Effects) {
        let bytes = |write: &DiskWrite| match write {
            DiskWrite::Append(_, event) => event.kv.as_ref().map_or(0, |kv| kv.key.len() + kv.value.len()),
            _ => 0,
        };
        self.bytes += effects.writes.iter().map(bytes).sum::<usize>();
        self.writes.extend(effects.writes);
        self.changes.extend(effects.changes);
        self.compacted = effects.compacted.or(self.compacted);
    }
}

impl Task {
    /// Runs until `shutdown`, or until the disk fails.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), CommitError> {
        let mut compaction = interval(COMPACTION_INTERVAL.min(self.kept.age));
        compaction.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let mut group = Group::default();
            let next_end = self.ends.values().min().copied();
            let expiry = async {
                match next_end {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                ask = self.asks.recv() => match ask {
                    Some(ask) => self.on_ask(ask, &mut group),
                    None => return Ok(()),
                },
                () = expiry => self.expire(Instant::now(), &mut group),
                _ = compaction.tick() => self.compact(Instant::now(), &mut group),
            }
            // What came while the last group was flushed goes into this one.
            while group.replies.len() < GROUP_LEN && group.bytes < GROUP_BYTES {
                let Ok(ask) = self.asks.try_recv() else { break };
                self.on_ask(ask, &mut group);
            }
            self.finish(group).await?;
        }
    }

    fn on_ask(&mut self, ask: Ask, group: &mut Group) {
        let now = Instant::now();
        // Who asked and went away needs no answer.
        match ask {
            Ask::Do(command, reply) => {
                let result = self.apply(&command, now, group);
                group.replies.push((reply, result));
            }
            Ask::KeepAlive(id, reply) => {
                let ttl = self.state.lease(id).map(|(ttl, _)| ttl);
                if let Some(ttl) = ttl {
                    self.ends.insert(id, end(now, ttl));
                }
                let _ = reply.send(ttl);
            }
            Ask::Lease(id, reply) => {
                let lease = self.state.lease(id).map(|(ttl, keys)| {
                    let left = self.ends.get(&id).map(|end| end.duration_since(now));
                    LeaseInfo {
                        left: left.map_or(0, |left| left.as_secs_f64().ceil() as i64),
                        ttl,
                        keys,
                    }
                });
                let _ = reply.send(lease);
            }
            Ask::Leases(reply) => {
                let _ = reply.send(self.state.leases().map(|(id, _)| id).collect());
            }
        }
    }

    fn apply(&mut self, command: &Command, now: Instant, group: &mut Group) -> Result<Answer, Refusal> {
        let (answer, effects) = self.state.apply(command)?;
        match command {
            Command::Grant { id, ttl } => {
                self.ends.insert(*id, end(now, *ttl));
            }
            Command::Revoke(id) => {
                self.ends.remove(id);
            }
            _ => {}
        }
        group.take(effects);
        Ok(answer)
    }

    fn expire(&mut self, now: Instant, group: &mut Group) {
        let ended = self.ends.iter().filter(|(_, end)| **end <= now);
        for id in ended.map(|(id, _)| *id).collect::<Vec<_>>() {
            tracing::info!(lease = id, "a lease ended; its keys are deleted");
            if self.apply(&Command::Revoke(id), now, group).is_err() {
                self.ends.remove(&id);
            }
        }
    }

    fn compact(&mut self, now: Instant, group: &mut Group) {
        let mut aged = 0;
        while let Some((at, revision)) = self.marks.front()
            && now.duration_since(*at) >= self.kept.age
        {
            aged = *revision;
            self.marks.pop_front();
        }
        if self
            .marks
            .back()
            .is_none_or(|(_, revision)| *revision < self.state.revision())
        {
            self.marks.push_back((now, self.state.revision()));
        }
        if let Some(at) = self.state.compaction_due(self.kept.retention, aged) {
            // Refused only for revisions that are gone or to come, and this is neither.
            let _ = self.apply(&Command::Compact(at), now, group);
        }
    }

    /// To disk, then to readers, then to those who asked.
    async fn finish(&self, group: Group) -> Result<(), CommitError> {
        let Group {
            writes,
            changes,
            compacted,
            replies,
            ..
        } = group;
        if !writes.is_empty() {
            self.metrics.writes.inc_by(writes.len() as u64);
            self.metrics.flushes.inc();
            let file = self.file.clone();
            let commit = tokio::task::spawn_blocking(move || file.commit(&writes));
            // A panic in there is a broken invariant of the file: it ends this task too, and nothing more is acknowledged.
            commit
                .await
                .unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))?;
        }
        if !changes.is_empty() || compacted.is_some() {
            self.shared.update(|store| {
                store.apply(&SubId::Own, self.state.revision(), changes);
                if let Some(at) = compacted {
                    store.compact(&SubId::Own, at);
                }
            });
        }
        self.metrics.revision.set(self.state.revision());
        self.metrics.compacted.set(self.state.compacted());
        for (reply, result) in replies {
            let _ = reply.send(result);
        }
        Ok(())
    }
}
