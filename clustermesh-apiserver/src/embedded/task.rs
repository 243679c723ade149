//! The task that owns the embedded store: one call after the other, a flush for those that wait together.
//!
//! Invariants: nothing is answered or shown to readers before it is on disk; what a failed flush held is answered with an
//! error, and the state is read anew before anything else is written.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use isthmus_proto::etcdserverpb::{RangeRequest, RangeResponse};
use isthmus_runtime::{CancellationToken, Health, State as HealthState};
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};

use super::{
    Answer, Ask, Asker, CallError, Command, LeaseInfo, Limits, Refusal, Standing,
    deadlines::Ends,
    disk::{Disk, Happened},
    file::{OpenError, Opened},
    quota,
    state::{DiskWrite, Effects, Loaded, Past, State},
};
use crate::{
    metrics::EmbeddedMetrics,
    shared::Shared,
    store::{Ages, Relist, Route, SourceChange, Store, SubId},
};

/// Name of this part in the health register.
const PART: &str = "store";
/// Calls that share a flush.
const GROUP_LEN: usize = 512;
/// Bytes of writes after which a group takes no further call.
const GROUP_BYTES: usize = 8 * 1024 * 1024;
/// How often old history is looked for.
const COMPACTION_INTERVAL: Duration = Duration::from_secs(30);
/// A file may be so many times as large as what is in it, and as much larger as [`Limits::slack_bytes`].
const SLACK_FACTOR: u64 = 4;

/// Why the task has ended.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk failed, and what is there now cannot be used.
    #[error("the store cannot be used any more")]
    Unusable(#[from] OpenError),
    /// The disk failed, and what is there now is not what was acknowledged.
    #[error(
        "the disk has lost what it had acknowledged: the store is at revision {found} and was at {served}; restart, and the \
         operator writes what is missing"
    )]
    Behind {
        /// Revision that was found.
        found: i64,
        /// Revision that readers have seen.
        served: i64,
    },
    /// The disk failed, and now another store is in its place.
    #[error("another store has taken the place of this one; each server needs a --data-dir of its own")]
    Replaced,
}

/// The task, which runs until it is told to stop or the disk fails for good.
pub struct Task {
    disk: Disk,
    history: u64,
    state: State,
    shared: Shared,
    health: Health,
    asks: mpsc::Receiver<Ask>,
    /// Has to wait for the flush of those before it.
    deferred: Option<Ask>,
    metrics: EmbeddedMetrics,
    standing: Arc<Standing>,
    limits: Limits,
    ends: Ends,
    ages: Ages,
    /// Ages count from here.
    begun: Instant,
    /// Why the disk is lost.
    lost: Option<Arc<str>>,
}

/// Shows readers what is stored, and makes the task that takes writes.
pub(super) fn new(
    opened: Opened,
    shared: Shared,
    health: Health,
    metrics: EmbeddedMetrics,
    limits: Limits,
    asks: mpsc::Receiver<Ask>,
    standing: Arc<Standing>,
) -> Task {
    let Opened {
        file,
        history,
        loaded: Loaded { state, base, later },
    } = opened;
    shared.update(|store| show(store, history, &state, base, later));
    tracing::info!(revision = state.revision(), "serving the embedded store");
    let mut ends = Ends::default();
    ends.keep(&state.leases().collect(), Instant::now());
    let task = Task {
        disk: Disk::new(file),
        history,
        state,
        shared,
        health,
        asks,
        deferred: None,
        metrics,
        standing,
        limits,
        ends,
        ages: Ages::default(),
        begun: Instant::now(),
        lost: None,
    };
    task.report();
    task
}

/// What was loaded, for readers. They go on from where they were.
fn show(store: &mut Store, history: u64, state: &State, base: Vec<SourceChange>, later: Vec<SourceChange>) {
    let own = store.status(&SubId::Own).filter(|own| own.listed);
    let seen = own.map(|own| own.revision);
    let compacted = state.compacted().max(0);
    if seen.is_none_or(|seen| seen < compacted) {
        let present = base.iter().map(|change| change.key().to_vec().into()).collect();
        let list = Relist {
            cluster_id: history,
            revision: compacted,
            new_history: false,
            changes: base,
            present: Some(present),
        };
        store.relist(&SubId::Own, list);
    }
    let news = later
        .into_iter()
        .filter(|change| seen.is_none_or(|seen| change.mod_revision() > seen));
    store.apply(&SubId::Own, state.revision(), news.collect());
}

/// Readers' history, for transactions that read there.
struct SharedPast<'s>(&'s Shared);

impl Past for SharedPast<'_> {
    fn range(&self, request: &RangeRequest) -> Result<RangeResponse, Refusal> {
        let own = Route::Sub(SubId::Own);
        let answer = self.0.read(|store| store.range(&own, request));
        Ok(answer?)
    }
}

/// Writes that share a flush, and what follows when they are on disk.
#[derive(Default)]
struct Group {
    writes: Vec<DiskWrite>,
    bytes: usize,
    changes: Vec<SourceChange>,
    compacted: Option<i64>,
    replies: Vec<(Asker<Answer>, Result<Answer, CallError>)>,
}

impl Group {
    fn take(&mut self, effects: Effects) {
        let bytes = |write: &DiskWrite| match write {
            DiskWrite::Append(_, logged) => logged.len(),
            _ => 0,
        };
        self.bytes += effects.writes.iter().map(bytes).sum::<usize>();
        self.writes.extend(effects.writes);
        self.changes.extend(effects.changes);
        self.compacted = effects.compacted.or(self.compacted);
    }
}

impl Task {
    /// Runs until `shutdown`, or until the store is of no use any more.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), StoreError> {
        let every = COMPACTION_INTERVAL
            .min(self.limits.age)
            .max(Duration::from_millis(1));
        let mut compaction = interval(every);
        compaction.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let mut group = Group::default();
            if let Some(ask) = self.deferred.take() {
                self.on_ask(ask, &mut group);
            } else {
                let next_end = self.ends.next().filter(|_| self.disk.is_here());
                let expiry = async {
                    match next_end {
                        Some(at) => sleep_until(at).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    () = shutdown.cancelled() => break,
                    ask = self.asks.recv() => match ask {
                        Some(ask) => self.on_ask(ask, &mut group),
                        None => break,
                    },
                    () = expiry => self.expire(Instant::now(), &mut group),
                    _ = compaction.tick() => self.on_tick(Instant::now(), &mut group),
                    happened = self.disk.happens() => self.on_disk(happened).await?,
                }
            }
            // What came while the last group was flushed goes into this one.
            while self.deferred.is_none() && group.replies.len() < GROUP_LEN && group.bytes < GROUP_BYTES {
                let Ok(ask) = self.asks.try_recv() else { break };
                self.on_ask(ask, &mut group);
            }
            self.finish(group).await;
        }
        self.disk.close().await;
        Ok(())
    }

    fn on_ask(&mut self, ask: Ask, group: &mut Group) {
        let now = Instant::now();
        // What is not flushed is answered to those only who wait for that.
        let waits = match &ask {
            Ask::Do(command, _) => self.state.reads_past(command),
            Ask::KeepAlive(..) | Ask::Lease(..) | Ask::Leases(_) => true,
        };
        if waits && !group.writes.is_empty() {
            self.deferred = Some(ask);
            return;
        }
        // Leases are kept and shown also while the disk is lost: none of them ends then, and who keeps one must not be told that
        // it has none. Who asked and went away needs no answer.
        match ask {
            Ask::Do(command, reply) => {
                let result = match &self.lost {
                    Some(error) => Err(CallError::Disk(error.clone())),
                    None => self.on_command(&command, now, group).map_err(CallError::from),
                };
                group.replies.push((reply, result));
            }
            Ask::KeepAlive(id, reply) => {
                let ttl = self.state.lease(id).map(|(ttl, _)| ttl);
                if let Some(ttl) = ttl {
                    self.ends.set(id, now, ttl);
                }
                let _ = reply.send(Ok(ttl));
            }
            Ask::Lease(id, reply) => {
                let lease = self.state.lease(id).map(|(ttl, keys)| LeaseInfo {
                    left: self.ends.left(id, now),
                    ttl,
                    keys,
                });
                let _ = reply.send(Ok(lease));
            }
            Ask::Leases(reply) => {
                let leases = self.state.leases().map(|(id, _)| id).collect();
                let _ = reply.send(Ok(leases));
            }
        }
    }

    /// A call, if there is room for what it writes. For that, history is given up.
    fn on_command(&mut self, command: &Command, now: Instant, group: &mut Group) -> Result<Answer, Refusal> {
        let cost = quota::cost(command);
        if cost > 0 {
            let fits = |state: &State| state.bytes() as u64 + cost <= self.limits.quota_bytes;
            let mut room = fits(&self.state);
            if !room && self.state.has_history() {
                let revision = self.state.revision();
                tracing::warn!(revision, "the store is at its quota; its history is given up");
                let _ = self.apply(&Command::Compact(revision), now, group);
                room = self.state.bytes() as u64 + cost <= self.limits.quota_bytes;
            }
            if !room {
                self.standing.full.store(true, Ordering::Relaxed);
                return Err(Refusal::NoSpace);
            }
            self.standing.full.store(false, Ordering::Relaxed);
        }
        self.apply(command, now, group)
    }

    fn apply(&mut self, command: &Command, now: Instant, group: &mut Group) -> Result<Answer, Refusal> {
        let (answer, effects) = self.state.apply(command, &SharedPast(&self.shared))?;
        match command {
            Command::Grant { id, ttl } => self.ends.set(*id, now, *ttl),
            Command::Revoke(id) => self.ends.remove(*id),
            _ => {}
        }
        group.take(effects);
        Ok(answer)
    }

    fn expire(&mut self, now: Instant, group: &mut Group) {
        for id in self.ends.ended(now) {
            tracing::info!(lease = id, "a lease ended; its keys are deleted");
            if self.apply(&Command::Revoke(id), now, group).is_err() {
                self.ends.remove(id);
            }
        }
    }

    fn on_tick(&mut self, now: Instant, group: &mut Group) {
        let aged = self.ages.look(
            now.saturating_duration_since(self.begun),
            self.state.revision(),
            self.limits.age,
        );
        if !self.disk.is_here() {
            return;
        }
        if let Some(at) = self.state.compaction_due(self.limits.retention, aged) {
            // Refused only for revisions that are gone or to come, and this is neither.
            let _ = self.apply(&Command::Compact(at), now, group);
        }
        let needed = self.state.bytes() as u64;
        if self.disk.len()
            > needed
                .saturating_mul(SLACK_FACTOR)
                .saturating_add(self.limits.slack_bytes)
        {
            self.disk.rewrite(now);
        }
    }

    async fn on_disk(&mut self, happened: Happened) -> Result<(), StoreError> {
        match happened {
            Happened::Unusable(error) => {
                self.health
                    .set(PART, HealthState::Failed(super::disk::chain(&error)));
                Err(error.into())
            }
            Happened::Found(opened) => {
                let Opened {
                    file,
                    history,
                    loaded: Loaded { state, base, later },
                } = *opened;
                let served = self.shared.read(|store| store.status(&SubId::Own));
                let served = served.map_or(0, |own| own.revision);
                if history != self.history {
                    return Err(StoreError::Replaced);
                }
                if state.revision() < served {
                    let found = state.revision();
                    return Err(StoreError::Behind { found, served });
                }
                self.shared
                    .update(|store| show(store, history, &state, base, later));
                self.ends.keep(&state.leases().collect(), Instant::now());
                self.state = state;
                self.disk.take(file);
                self.lost = None;
                tracing::info!(
                    revision = self.state.revision(),
                    "the store's disk takes writes again"
                );
                self.report();
                Ok(())
            }
            Happened::Copied(copied) => {
                if self.disk.go_on(copied).await {
                    self.metrics.rewrites.inc();
                    tracing::info!(bytes = self.disk.len(), "the store's file was written anew");
                } else if !self.disk.is_here() {
                    self.lose("its copy could not take its place".to_owned());
                }
                self.report();
                Ok(())
            }
        }
    }

    fn lose(&mut self, error: String) {
        tracing::error!(error, "the store's disk does not take writes; reads go on");
        self.metrics.disk_failures.inc();
        self.lost = Some(error.into());
    }

    /// To disk, then to readers, then to those who asked.
    async fn finish(&mut self, group: Group) {
        let Group {
            writes,
            changes,
            compacted,
            replies,
            ..
        } = group;
        if !writes.is_empty() {
            let len = writes.len() as u64;
            if let Err(error) = self.disk.commit(writes).await {
                self.lose(error);
                self.report();
                for (reply, _) in replies {
                    let _ = reply.send(Err(self.disk_error()));
                }
                return;
            }
            self.metrics.writes.inc_by(len);
            self.metrics.flushes.inc();
        }
        if !changes.is_empty() || compacted.is_some() {
            self.shared.update(|store| {
                store.apply(&SubId::Own, self.state.revision(), changes);
                if let Some(at) = compacted {
                    store.compact(&SubId::Own, at);
                }
            });
        }
        self.report();
        for (reply, result) in replies {
            let _ = reply.send(result);
        }
    }

    fn disk_error(&self) -> CallError {
        let error = self.lost.clone().unwrap_or_else(|| Arc::from("unknown"));
        CallError::Disk(error)
    }

    /// Tells how it stands: metrics, health, and what Status answers.
    fn report(&self) {
        let bytes = self.state.bytes() as u64;
        let full = self.standing.full.load(Ordering::Relaxed);
        self.standing.bytes.store(bytes, Ordering::Relaxed);
        if self.disk.is_here() {
            self.metrics.revision.set(self.state.revision());
            self.metrics.compacted.set(self.state.compacted().max(0));
            self.metrics.used_bytes.set(bytes.cast_signed());
            let len = self.disk.len();
            self.standing.file_bytes.store(len, Ordering::Relaxed);
            self.metrics.file_bytes.set(len.cast_signed());
        }
        self.metrics.space_exceeded.set(full.into());
        let health = match &self.lost {
            Some(error) => HealthState::Degraded(format!(
                "writes are refused, reads go on; trying the disk again: {error}"
            )),
            None if full => HealthState::Degraded(format!(
                "{}; writes are refused until keys are deleted or --quota-backend-bytes is raised",
                Refusal::NoSpace
            )),
            None => HealthState::Ok("serving".to_owned()),
        };
        self.health.set(PART, health);
    }
}
