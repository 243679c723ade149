//! The loop around the state: takes in what happens, drains plans, has them applied, and answers questions.
//!
//! ```text
//!     upstream updates, endpoints, probe verdicts  ->  State  ->  Plan  ->  Reconciler  ->  batch  ->  datapath thread
//!                                                        ^                      ^______ results ______|
//!     questions of the API, once a second: health, metrics
//! ```
//!
//! One task owns the state, so nothing is locked. It never waits for the kernel: one batch at a time is applied on a
//! blocking thread, while events go on to be taken in and coalesce in the state; what arrived meanwhile is the next round.
//! No timer is on the way from an event to the map.
//!
//! Bounds: a batch has at most [`BATCH_MAX`] operations, a round at most [`IPCACHE_ROUND_MAX`] of the ipcache's, so that a
//! service's change waits for one batch or so even while a large cluster is being read; queues are bounded, and a full one
//! holds its sender back.

mod events;
mod full_pass;

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use isthmus_bpf_abi::EndpointKey;
use isthmus_datapath::{ApplyReport, Datapath, MapError, OpError};
use isthmus_kvstore::{Feed, Feeds, Update};
use isthmus_mesh::{MapOp, Reach, Reconciler, loadbalancer::Departed, op::Object, reconcile::RetryConfig};
use isthmus_runtime::{CancellationToken, Health};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};

pub use full_pass::dump;

use crate::{
    endpoints::keeper::{EndpointList, Network, chain},
    metrics::{AgentMetrics, MapOpLabels},
    network::RemoteCidrs,
    node::LocalNode,
    open_flows::Inbox,
    prober::{ClusterData, ProbeTargets, Verdicts},
    state::{Event, FeedChange, MapDump},
    status::{self, Facts},
};

/// Most operations of one call to the datapath: some milliseconds.
const BATCH_MAX: usize = 4096;
/// Most ipcache operations of one round.
const IPCACHE_ROUND_MAX: usize = 8192;
/// Most updates that are taken in before the next plan.
const UPDATES_MAX: usize = 256;
/// Least time between two looks for what is due again.
const RETRY_SPACING: Duration = Duration::from_millis(50);
/// Questions that wait at most.
pub const QUESTIONS_MAX: usize = 64;

type Question = Box<dyn FnOnce(&Facts, Duration) + Send>;

/// Asks the loop.
#[derive(Clone, Debug)]
pub struct Handle(mpsc::Sender<Question>);

impl Handle {
    /// A handle, and the end that goes into [`Inputs`].
    pub fn new() -> (Self, mpsc::Receiver<Question>) {
        let (sender, receiver) = mpsc::channel(QUESTIONS_MAX);
        (Self(sender), receiver)
    }

    /// Runs `look` on what is known now, and the time since the start. `None`: the agent is stopping.
    pub async fn read<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Facts, Duration) -> T + Send + 'static,
    ) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        let question: Question = Box::new(move |facts, now| {
            // Who asked may have gone.
            let _ = reply.send(look(facts, now));
        });
        self.0.send(question).await.ok()?;
        answer.await.ok()
    }
}

/// What the loop listens to.
pub struct Inputs {
    /// The upstream.
    pub updates: mpsc::Receiver<Update>,
    /// Local endpoints.
    pub endpoints: mpsc::Receiver<(EndpointList, oneshot::Sender<()>)>,
    /// Questions.
    pub questions: mpsc::Receiver<Question>,
    /// Devices and routes.
    pub network: watch::Receiver<Network>,
    /// Probes of nodes.
    pub verdicts: watch::Receiver<Verdicts>,
    /// Probes of remote clusters.
    pub clusters: watch::Receiver<ClusterData>,
}

/// Who hears from the loop.
pub struct Outputs {
    /// What to follow.
    pub feeds: Feeds,
    /// This node.
    pub node: watch::Sender<Result<LocalNode, String>>,
    /// Other nodes' pod CIDRs.
    pub cidrs: watch::Sender<Arc<RemoteCidrs>>,
    /// Whom to probe.
    pub targets: watch::Sender<ProbeTargets>,
    /// Whether pods may start here, or why not.
    pub pods: watch::Sender<Result<(), String>>,
    /// Readiness.
    pub health: Health,
    /// Backends that left; `None` if their open flows are left alone.
    pub open_flows: Option<Inbox>,
    /// Metrics.
    pub metrics: AgentMetrics,
}

struct Applied {
    ops: Vec<MapOp>,
    report: ApplyReport,
    took: Duration,
}

/// The loop's own state.
pub struct Rounds {
    facts: Facts,
    datapath: Arc<Datapath>,
    outputs: Outputs,
    started: Instant,
    reconciler: Reconciler,
    revision: u64,
    batch: Option<JoinHandle<Applied>>,
    round_open: bool,
    /// When the first event came that the open round, or the next one, answers.
    round_since: Option<Instant>,
    next_since: Option<Instant>,
    /// Full pass under way, and what rounds wrote meanwhile.
    compare: Option<JoinHandle<Result<MapDump, MapError>>>,
    written: BTreeSet<Object>,
    /// Calls that wait until the endpoints map is written, with the round that does it.
    waiting: Vec<(u64, oneshot::Sender<()>)>,
    endpoints_dirty: bool,
    failed_endpoints: BTreeSet<EndpointKey>,
    reach: Reach,
    clusters: ClusterData,
    counters: crate::housekeeping::Counters,
    retried_at: Duration,
    /// Backends that leave with the open round.
    departed: Departed,
}

impl Rounds {
    /// Begins with what the maps hold.
    pub fn new(
        facts: Facts,
        datapath: Arc<Datapath>,
        outputs: Outputs,
        reach: Reach,
        started: Instant,
    ) -> Self {
        Self {
            facts,
            datapath,
            outputs,
            reconciler: Reconciler::new(
                RetryConfig {
                    full_pass_interval: Duration::from_secs(180),
                    ..RetryConfig::default()
                },
                started.elapsed(),
            ),
            started,
            revision: 0,
            batch: None,
            round_open: false,
            round_since: None,
            next_since: None,
            compare: None,
            written: BTreeSet::new(),
            waiting: vec![],
            endpoints_dirty: false,
            failed_endpoints: BTreeSet::new(),
            reach,
            clusters: Arc::from([]),
            counters: Default::default(),
            retried_at: Duration::ZERO,
            departed: Departed::default(),
        }
    }

    /// Works until `shutdown`. What is being applied then is finished; nothing is removed.
    pub async fn run(mut self, mut inputs: Inputs, shutdown: CancellationToken) -> anyhow::Result<()> {
        let first = self.facts.state.first_feeds();
        self.change_feeds(first);
        let mut second = tokio::time::interval(Duration::from_secs(1));
        second.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            self.advance();
            let wake = tokio::time::Instant::from_std(self.started + self.wake_at());
            tokio::select! {
                () = shutdown.cancelled() => break,
                applied = finished(&mut self.batch) => self.on_applied(applied?),
                dump = finished(&mut self.compare) => self.on_dump(dump?),
                update = inputs.updates.recv() => match update {
                    None => break,
                    Some(update) => {
                        self.on_update(update);
                        for _ in 1..UPDATES_MAX {
                            let Ok(update) = inputs.updates.try_recv() else { break };
                            self.on_update(update);
                        }
                    }
                },
                message = inputs.endpoints.recv() => match message {
                    None => break,
                    Some((list, done)) => {
                        self.on(Event::Endpoints(list));
                        self.endpoints_dirty = true;
                        // The next round to begin writes it; a round that is open now does not.
                        self.waiting.push((self.revision + 1, done));
                    }
                },
                question = inputs.questions.recv() => match question {
                    None => break,
                    Some(question) => question(&self.facts, self.started.elapsed()),
                },
                changed = inputs.network.changed() => {
                    if changed.is_err() { break }
                    self.facts.network = inputs.network.borrow_and_update().clone();
                }
                changed = inputs.verdicts.changed() => {
                    if changed.is_err() { break }
                    let verdicts = inputs.verdicts.borrow_and_update().clone();
                    self.on_verdicts(&verdicts);
                }
                changed = inputs.clusters.changed() => {
                    if changed.is_err() { break }
                    self.clusters = inputs.clusters.borrow_and_update().clone();
                    self.judge();
                }
                _ = second.tick() => self.every_second(),
                () = tokio::time::sleep_until(wake), if self.batch.is_none() && self.compare.is_none() => {}
            }
        }
        if let Some(batch) = self.batch.take() {
            batch.await?;
        }
        Ok(())
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// When to look for retries or a full pass. A full pass that is due but waits for retries must not keep the loop busy.
    fn wake_at(&self) -> Duration {
        self.reconciler.wake_at().max(self.retried_at + RETRY_SPACING)
    }

    // === events in ===

    fn on(&mut self, event: Event<'_>) {
        let before = self.facts.state.has_changes();
        let changes = self.facts.state.on(event);
        if !before && self.facts.state.has_changes() {
            self.next_since = Some(Instant::now());
        }
        self.change_feeds(changes);
    }

    fn change_feeds(&mut self, changes: Vec<FeedChange>) {
        for change in changes {
            match change {
                FeedChange::Add {
                    name,
                    prefix,
                    value_len_max,
                } => {
                    let feed = Feed::prefix(&prefix, value_len_max);
                    self.outputs.feeds.add(Feed { name, ..feed });
                }
                FeedChange::Remove(name) => {
                    self.facts.upstream.refused_feeds.remove(&*name);
                    self.outputs.feeds.remove(&name);
                }
            }
        }
    }

    // === rounds out ===

    /// Starts the next batch, round or full pass, if nothing is being applied.
    fn advance(&mut self) {
        if self.batch.is_some() {
            return;
        }
        loop {
            if let Some(ops) = self.reconciler.next_batch(BATCH_MAX) {
                self.apply(ops);
                return;
            }
            if self.round_open {
                self.end_round();
            }
            let now = self.now();
            let due = now >= self.wake_at() && !self.reconciler.full_pass_due(now);
            if due {
                self.retried_at = now;
            }
            if self.facts.state.has_changes() || self.endpoints_dirty || due {
                self.begin_round(now);
                continue;
            }
            self.settle(now);
            if self.reconciler.full_pass_due(now) && self.compare.is_none() {
                self.written.clear();
                let datapath = Arc::clone(&self.datapath);
                self.compare = Some(tokio::task::spawn_blocking(move || dump(&datapath)));
            }
            return;
        }
    }

    /// Everything known is in the maps, or was tried.
    fn settle(&mut self, now: Duration) {
        self.facts.state.on_settled();
        if !self.facts.remotes_passed && status::remotes_pass(&self.facts, now) {
            self.facts.remotes_passed = true;
            self.report(now);
        }
    }

    fn begin_round(&mut self, now: Duration) {
        let plan = self.facts.state.drain(IPCACHE_ROUND_MAX);
        self.departed.merge(&self.facts.state.take_departed());
        self.endpoints_dirty = false;
        self.revision += 1;
        self.round_since = self.next_since.take();
        if self.facts.state.has_changes() {
            self.next_since = Some(Instant::now());
        }
        if self.compare.is_some() {
            self.written.extend(plan.ops.iter().map(MapOp::object));
        }
        self.reconciler.begin(now, plan, self.revision);
        self.round_open = true;
    }

    fn apply(&mut self, ops: Vec<MapOp>) {
        if self.compare.is_some() {
            self.written.extend(ops.iter().map(MapOp::object));
        }
        let datapath = Arc::clone(&self.datapath);
        self.batch = Some(tokio::task::spawn_blocking(move || {
            let began = Instant::now();
            let report = datapath.apply(&ops);
            Applied {
                ops,
                report,
                took: began.elapsed(),
            }
        }));
    }

    fn on_applied(&mut self, applied: Applied) {
        let metrics = &self.outputs.metrics;
        metrics.round_seconds.observe(applied.took.as_secs_f64());
        let results: Vec<Result<(), String>> = (0..applied.ops.len())
            .map(|index| match applied.report.error(index) {
                None => Ok(()),
                Some(error) => Err(chain(error)),
            })
            .collect();
        for (index, op) in applied.ops.iter().enumerate() {
            let outcome = match applied.report.error(index) {
                None => "ok",
                Some(OpError::Withheld) => "withheld",
                Some(_) => "failed",
            };
            if let Object::Endpoint(key) = op.object() {
                if outcome == "ok" {
                    self.failed_endpoints.remove(&key);
                } else {
                    self.failed_endpoints.insert(key);
                }
            }
            self.counters.count(op, outcome);
        }
        for ((map, action, outcome), count) in self.counters.take_ops() {
            let labels = MapOpLabels { map, action, outcome };
            metrics.map_ops.get_or_create(&labels).inc_by(count);
        }
        if let Some(error) = results.iter().find_map(|result| result.as_ref().err()) {
            tracing::warn!(
                error,
                failed = applied.report.failed.len(),
                "map operations failed; trying again"
            );
        }
        self.reconciler.complete(self.started.elapsed(), &results);
        self.facts.progress = self.reconciler.progress();
    }

    fn end_round(&mut self) {
        self.round_open = false;
        self.facts.progress = self.reconciler.progress();
        // Not before: who connects anew must not meet them again.
        let departed = std::mem::take(&mut self.departed);
        if let Some(inbox) = &self.outputs.open_flows
            && !departed.is_empty()
        {
            inbox.add(&departed);
        }
        if let Some(since) = self.round_since.take() {
            self.outputs
                .metrics
                .propagation_seconds
                .observe(since.elapsed().as_secs_f64());
        }
        if self.failed_endpoints.is_empty() {
            let revision = self.revision;
            for (_, done) in self.waiting.extract_if(.., |(wanted, _)| *wanted <= revision) {
                // Who asked may have given up.
                let _ = done.send(());
            }
        }
    }

    // === once a second ===

    fn every_second(&mut self) {
        let now = self.now();
        if status::remotes_pass(&self.facts, now) {
            self.facts.remotes_passed = true;
        }
        self.judge();
        let before = self.facts.state.has_changes();
        self.facts.state.advance(now);
        if !before && self.facts.state.has_changes() {
            self.next_since = Some(Instant::now());
        }
        self.report(now);
        self.counters.export(&self.facts, &self.outputs.metrics, now);
    }

    fn report(&self, now: Duration) {
        for subsystem in status::subsystems(&self.facts, now) {
            self.outputs.health.set(subsystem.name, subsystem.health);
        }
        let pods = status::pods_pass(&self.facts, now);
        self.outputs.pods.send_if_modified(|before| {
            let changed = *before != pods;
            *before = pods;
            changed
        });
    }
}

/// Waits for a job, if there is one; it is taken out when it is done.
async fn finished<T>(job: &mut Option<JoinHandle<T>>) -> Result<T, tokio::task::JoinError> {
    match job {
        None => std::future::pending().await,
        Some(handle) => {
            let result = handle.await;
            *job = None;
            result
        }
    }
}
