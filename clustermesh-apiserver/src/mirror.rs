//! Mirrors remote clusters under the cache prefixes: one task and one connection for each configured cluster.
//!
//! In: a directory with a file for each cluster, looked at every second; the remote clusters' API servers. Out: their objects
//! in the store, each checked here and nowhere else, and a status for each cluster.
//!
//! Invariants: a remote cluster that goes away keeps its objects; only the removal of its file drains them, and a file that
//! is there but does not read is not removed. Each configured cluster has a status before anybody is served: agents take one
//! without for removed. A refused object changes nothing but a counter.

pub mod admission;
pub mod directory;
pub mod grants;
pub mod progress;
pub mod readiness;
pub mod remote;
pub mod translate;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use isthmus_kvstore::{EtcdConfig, Options, Pace, Update, follow};
use isthmus_model::{ClusterId, ClusterName, MaxConnectedClusters};
use isthmus_runtime::{CancellationToken, Health};
use isthmus_wire::{keys::REMOTE_STATUS, status::RemoteStatus};
use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
    time::Instant,
};

use crate::{metrics::MirrorMetrics, shared::Shared};
use admission::ClusterIds;
use grants::Grants;
use readiness::{Board, ReadyTimeouts};
use remote::Remote;

/// Name of the mirror in the health register.
pub const PART: &str = "mirror";

/// How often the directory is looked at.
const SCAN_INTERVAL: Duration = Duration::from_secs(1);
/// Looks in a row that must miss a file before it counts as removed: a directory is not replaced in one step.
const MISSES_MAX: u32 = 2;
/// How often statuses are written while something changes.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);
/// Updates taken in one go.
const BATCH_MAX: usize = 64;

/// Delay after the first failed connection to a remote cluster. Long enough for 250 clusters whose upstream went away at the
/// same moment not to come back in the same one; it doubles with each more.
const RETRY_BASE: Duration = Duration::from_secs(1);
/// Connections to remote clusters that may begin at once, and the time in which one more may.
const CONNECTS: (u32, Duration) = (25, Duration::from_millis(4));
/// Lists of a remote cluster that may begin at once (each connection has a handful of feeds), and the time in which one more may.
const LISTS: (u32, Duration) = (64, Duration::from_secs(2));

/// What the mirror needs to know.
#[derive(Clone, Debug)]
pub struct MirrorConfig {
    /// Own cluster.
    pub cluster: ClusterName,
    /// Own ID.
    pub cluster_id: ClusterId,
    /// Size of the mesh.
    pub max: MaxConnectedClusters,
    /// Directory of cluster files.
    pub directory: PathBuf,
    /// Connections to remote clusters.
    pub connection: Options,
    /// How long readiness waits for remote clusters.
    pub ready: ReadyTimeouts,
}

/// What a remote cluster's file says.
#[derive(Clone, Debug, PartialEq)]
struct RemoteFile {
    etcd: EtcdConfig,
    grants: Grants,
}

impl RemoteFile {
    fn parse(text: &str) -> Result<Self, String> {
        Ok(Self {
            etcd: EtcdConfig::parse(text).map_err(|error| chain(&error))?,
            grants: Grants::parse(text).map_err(|error| chain(&error))?,
        })
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

struct Running {
    text: String,
    config: watch::Sender<RemoteFile>,
    /// Its file was missed at the last look.
    leaving: watch::Sender<bool>,
    /// What is wrong with its file now; empty if nothing is.
    complaint: watch::Sender<String>,
    removed: CancellationToken,
    task: JoinHandle<()>,
}

/// Runs until `shutdown`. State stays as it is then: a restart is not a removal. `looked` hears of the first look at the
/// directory that succeeded, when every cluster that has a file has a status.
pub async fn run(
    config: MirrorConfig,
    shared: Shared,
    metrics: MirrorMetrics,
    health: Health,
    looked: oneshot::Sender<()>,
    shutdown: CancellationToken,
) {
    let mut looked = Some(looked);
    let mut config = config;
    config.connection.retry_base = config.connection.retry_base.max(RETRY_BASE);
    config.connection.connects = Some(Pace::new(CONNECTS.0, CONNECTS.1));
    let board = Board::default();
    let standings = board.subscribe();
    let mut mirror = Mirror {
        board: Arc::new(board),
        ids: Arc::new(Mutex::new(ClusterIds::new(config.cluster_id))),
        config,
        shared,
        metrics,
        shutdown,
        running: BTreeMap::new(),
        unusable: BTreeSet::new(),
        misses: BTreeMap::new(),
        complaints: BTreeMap::new(),
    };
    loop {
        if mirror.scan().await
            && let Some(looked) = looked.take()
        {
            // Who waited may be gone: then the process ends.
            let _ = looked.send(());
            let (ready, shutdown) = (mirror.config.ready, mirror.shutdown.clone());
            tokio::spawn(readiness::watch(
                PART,
                standings.clone(),
                ready,
                health.clone(),
                shutdown,
            ));
        }
        tokio::select! {
            () = mirror.shutdown.cancelled() => break,
            () = tokio::time::sleep(SCAN_INTERVAL) => {}
        }
    }
    for (_, remote) in mirror.running {
        // A panic there was reported when it happened; nothing is left to save.
        let _ = remote.task.await;
    }
}

struct Mirror {
    board: Arc<Board>,
    config: MirrorConfig,
    shared: Shared,
    ids: Arc<Mutex<ClusterIds>>,
    metrics: MirrorMetrics,
    shutdown: CancellationToken,
    running: BTreeMap<ClusterName, Running>,
    /// Clusters with a file that was never usable: they have a status and nothing else.
    unusable: BTreeSet<ClusterName>,
    /// Clusters whose file was missing, and for how many looks.
    misses: BTreeMap<ClusterName, u32>,
    /// By file name, so that each is logged once.
    complaints: BTreeMap<String, String>,
}

impl Mirror {
    /// Brings what runs into line with the directory. False if it cannot be read.
    async fn scan(&mut self) -> bool {
        let directory = &self.config.directory;
        let scan = directory::scan(directory, &self.config.cluster);
        let readable = scan.is_ok();
        let complaints = match scan {
            // A failing directory changes nothing: an unmounted volume is not the removal of every cluster.
            Err(error) => {
                let complaint = format!("cannot read it: {error}");
                BTreeMap::from([(directory.display().to_string(), complaint)])
            }
            Ok(scan) => self.on_scan(scan).await,
        };
        for (file, complaint) in &complaints {
            if self.complaints.get(file) != Some(complaint) {
                tracing::warn!(
                    file,
                    complaint,
                    "cluster file is not usable; keeping what was configured"
                );
            }
        }
        self.complaints = complaints;
        self.metrics.remote_clusters.set(self.running.len() as i64);
        readable
    }

    async fn on_scan(&mut self, scan: directory::Scan) -> BTreeMap<String, String> {
        let mut complaints = scan.complaints;
        self.remove_missing(|name| scan.files.contains_key(name) || scan.others.contains(name))
            .await;
        for (name, text) in scan.files {
            match RemoteFile::parse(&text) {
                Ok(file) => self.set(name, text, file),
                Err(complaint) => {
                    self.complain(&name, &complaint);
                    complaints.insert(name.to_string(), complaint);
                }
            }
        }
        for name in scan.others {
            if self.running.contains_key(&name) || self.unusable.contains(&name) {
                let complaint = "it names no endpoints, or cannot be read";
                self.complain(&name, complaint);
                complaints.insert(name.to_string(), complaint.to_owned());
            }
        }
        complaints
    }

    /// Tells agents that a cluster's file is not usable. What was configured before goes on.
    fn complain(&mut self, name: &ClusterName, complaint: &str) {
        let text = format!("its file in --clustermesh-config is not usable: {complaint}");
        match self.running.get(name) {
            Some(running) => {
                running.complaint.send_if_modified(|before| {
                    let changed = *before != text;
                    *before = text;
                    changed
                });
            }
            None => {
                self.unusable.insert(name.clone());
                let status = RemoteStatus {
                    name: name.to_string(),
                    status: text,
                    ..Default::default()
                };
                let key = format!("{REMOTE_STATUS}{name}");
                self.shared
                    .update(|store| store.put_local(key.into(), status.encode().into()));
            }
        }
    }

    async fn remove_missing(&mut self, there: impl Fn(&ClusterName) -> bool) {
        self.misses.retain(|name, _| !there(name));
        for name in self.running.keys().chain(&self.unusable) {
            if !there(name) {
                *self.misses.entry(name.clone()).or_default() += 1;
            }
        }
        for (name, running) in &self.running {
            let missed = self.misses.contains_key(name);
            running
                .leaving
                .send_if_modified(|leaving| std::mem::replace(leaving, missed) != missed);
        }
        let gone: Vec<ClusterName> = self
            .misses
            .extract_if(.., |_, misses| *misses >= MISSES_MAX)
            .map(|(name, _)| name)
            .collect();
        for name in gone {
            if self.unusable.remove(&name) {
                let key = format!("{REMOTE_STATUS}{name}");
                self.shared.update(|store| store.delete_local(key.as_bytes()));
            }
            if let Some(gone) = self.running.remove(&name) {
                tracing::info!(cluster = %name, "the cluster's file is gone; removing its state");
                gone.removed.cancel();
                // It drains what it mirrored, which waits for nothing.
                let _ = gone.task.await;
                self.metrics.forget(name.as_str());
                self.board.send_if_modified(|board| board.remove(&name).is_some());
            }
        }
    }

    /// Takes out the cluster's task if it has ended without having been told to, which only a panic makes it. What it mirrored
    /// stays, and another one goes on from there.
    fn take_out_dead(&mut self, name: &ClusterName) {
        let dead = |running: &Running| running.task.is_finished() && !self.shutdown.is_cancelled();
        if self.running.get(name).is_some_and(dead) {
            tracing::error!(cluster = %name, "mirroring ended in a panic; beginning again with what is known");
            self.running.remove(name);
        }
    }

    fn set(&mut self, name: ClusterName, text: String, file: RemoteFile) {
        self.take_out_dead(&name);
        if let Some(known) = self.running.get_mut(&name) {
            known.complaint.send_if_modified(|before| {
                let changed = !before.is_empty();
                before.clear();
                changed
            });
            if known.text != text {
                tracing::info!(cluster = %name, "the cluster's file changed");
                known.text = text;
                known
                    .config
                    .send_if_modified(|before| std::mem::replace(before, file.clone()) != file);
            }
            return;
        }
        tracing::info!(cluster = %name, "mirroring a remote cluster");
        let remote = Remote::new(name.clone(), self.config.max, file.grants.clone());
        let (config, receiver) = watch::channel(file);
        let (leaving, leaves) = watch::channel(false);
        let (complaint, complaints) = watch::channel(String::new());
        let removed = CancellationToken::new();
        let mut task = Task {
            remote,
            name: name.clone(),
            board: self.board.clone(),
            ready: self.config.ready,
            begun: Instant::now(),
            shared: self.shared.clone(),
            ids: self.ids.clone(),
            metrics: self.metrics.clone(),
            connection: Options {
                lists: Some(Pace::new(LISTS.0, LISTS.1)),
                ..self.config.connection.clone()
            },
            removed: removed.clone(),
            shutdown: self.shutdown.clone(),
        };
        // Here, not in the task: the look is over when each cluster has a status.
        task.with(|remote, store, ids| remote.start(store, ids));
        self.unusable.remove(&name);
        let task = tokio::spawn(task.run(receiver, complaints, leaves));
        let running = Running {
            text,
            config,
            leaving,
            complaint,
            removed,
            task,
        };
        self.running.insert(name, running);
    }
}

struct Task {
    remote: Remote,
    name: ClusterName,
    board: Arc<Board>,
    ready: ReadyTimeouts,
    begun: Instant,
    shared: Shared,
    ids: Arc<Mutex<ClusterIds>>,
    metrics: MirrorMetrics,
    connection: Options,
    removed: CancellationToken,
    shutdown: CancellationToken,
}

impl Task {
    async fn run(
        mut self,
        mut config: watch::Receiver<RemoteFile>,
        mut complaints: watch::Receiver<String>,
        mut leaves: watch::Receiver<bool>,
    ) {
        let mut ticker = tokio::time::interval(STATUS_INTERVAL);
        ticker.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let stop = self.shutdown.child_token();
            let mut etcd = config.borrow_and_update().etcd.clone();
            let mut follow = follow(
                etcd.clone(),
                self.connection.clone(),
                self.remote.feeds(),
                stop.clone(),
            );
            let feeds = follow.feeds.clone();
            loop {
                let changes = tokio::select! {
                    () = self.shutdown.cancelled() => return,
                    () = self.removed.cancelled() => {
                        stop.cancel();
                        self.with(|remote, store, ids| remote.drain(store, ids));
                        return;
                    }
                    changed = config.changed() => match changed {
                        Ok(()) => {
                            let file = config.borrow_and_update().clone();
                            let changes = self.with(|remote, store, _| remote.set_grants(store, file.grants, now_ms()));
                            if file.etcd != etcd {
                                self.with(|remote, store, _| remote.on_reconfigured(store, now_ms()));
                                follow.set_upstream(file.etcd.clone());
                                etcd = file.etcd;
                            }
                            changes
                        }
                        // The directory task ends only with the process.
                        Err(_) => return,
                    },
                    changed = leaves.changed() => {
                        if changed.is_err() {
                            return;
                        }
                        let leaving = *leaves.borrow_and_update();
                        self.with(|remote, store, _| remote.on_leaving(store, leaving, now_ms()));
                        Vec::new()
                    }
                    changed = complaints.changed() => {
                        if changed.is_err() {
                            return;
                        }
                        let complaint = complaints.borrow_and_update().clone();
                        self.with(|remote, store, _| remote.on_complaint(store, complaint, now_ms()));
                        Vec::new()
                    }
                    _ = ticker.tick() => self.with(|remote, store, ids| remote.on_tick(store, ids, now_ms())),
                    update = follow.updates.recv() => match update {
                        None => {
                            self.on_reader_lost().await;
                            break;
                        }
                        Some(update) => {
                            let mut updates = vec![update];
                            while updates.len() < BATCH_MAX && let Ok(update) = follow.updates.try_recv() {
                                updates.push(update);
                            }
                            let now = now_ms();
                            self.with(|remote, store, ids| {
                                updates.into_iter().flat_map(|update| remote.on(store, ids, update, now)).collect()
                            })
                        }
                    },
                };
                for change in changes {
                    match change {
                        remote::FeedChange::Add(feed) => feeds.add(feed),
                        remote::FeedChange::Remove(name) => feeds.remove(&name),
                    }
                }
            }
            stop.cancel();
        }
    }

    /// The reader ends with `shutdown` only, unless it has a bug: then another one goes on, and the status says so meanwhile.
    async fn on_reader_lost(&mut self) {
        if self.shutdown.is_cancelled() {
            return;
        }
        let error = "its reader has ended without a reason; starting another one".to_owned();
        let update = Update::Disconnected {
            error,
            retry_in: SCAN_INTERVAL,
        };
        self.with(|remote, store, ids| remote.on(store, ids, update, now_ms()));
        tokio::select! {
            () = self.shutdown.cancelled() => {}
            () = tokio::time::sleep(SCAN_INTERVAL) => {}
        }
    }

    fn with<T>(
        &mut self,
        act: impl FnOnce(&mut Remote, &mut crate::store::Store, &mut ClusterIds) -> T,
    ) -> T {
        let (remote, ids) = (&mut self.remote, &self.ids);
        let result = self.shared.update(|store| {
            // Held only while the store's lock is held, by every task in this order.
            let mut ids = ids.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            act(remote, store, &mut ids)
        });
        self.remote.export(&self.metrics, now_ms());
        let standing = readiness::standing(self.remote.status(), self.begun.elapsed(), self.ready);
        self.board.send_if_modified(|board| {
            let changed = board.get(&self.name) != Some(&standing);
            if changed {
                board.insert(self.name.clone(), standing);
            }
            changed
        });
        result
    }
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
