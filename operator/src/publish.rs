//! The loop that publishes: takes in what Kubernetes tells, works out what changed, hands it to the etcd writer.
//!
//! In: watch events, the role in the election. Out: desired keys for the [`Writer`], which alone talks to etcd.
//!
//! A term of leadership goes through phases: read what etcd holds; wait until all kinds are listed; want everything and let the rest
//! be deleted; when all of that is written, write the synced canaries. Invariants: nothing is wanted or deleted before both sides
//! were read in full; a change is handed over in the same turn of the loop as its event, so an idle operator adds no delay, and
//! events that came meanwhile are taken in together; nothing is written after a term has ended.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, SystemTime},
};

use isthmus_kvstore::{EtcdConfig, Writer, rfc3339};
use isthmus_model::ClusterName;
use isthmus_runtime::{CancellationToken, Health, State as HealthState};
use isthmus_wire::{ClusterConfig, keys};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval},
};

use crate::{
    election::{Role, lease::Leadership},
    metrics::{OperatorMetrics, ProblemLabels},
    state::{
        Input, Kind, Settings, State,
        prefixes::{Prefixes, canaries},
    },
    watch::Told,
};
use term::{Phase, Progress, Term};

mod term;

/// Events taken in before what changed is handed over.
const BATCH_LEN_MAX: usize = 256;
/// Status, metrics and clean-up.
const TICK: Duration = Duration::from_secs(1);
/// Identities are looked through every so many ticks.
const COLLECT_TICKS: u32 = 10;
/// A watch that has failed counts as failing for so long, unless an event shows that it works: retries are 15 s apart at most, and a
/// watch that works again may have nothing to tell.
const FAILING_FOR: Duration = Duration::from_secs(45);
/// If nobody is known to lead for so long, this process keeps the heartbeat going.
const HEARTBEAT_AFTER: Duration = Duration::from_secs(5);

/// What the loop needs.
pub struct Publisher {
    /// What to publish.
    pub settings: Settings,
    /// Where to.
    pub etcd: EtcdConfig,
    /// From Kubernetes.
    pub told: mpsc::Receiver<Told>,
    /// From the election.
    pub leadership: watch::Receiver<Leadership>,
    /// Metrics.
    pub metrics: OperatorMetrics,
    /// Health.
    pub health: Health,
}

impl Publisher {
    /// Publishes until `shutdown`. When it returns, nothing is written any more.
    pub async fn run(self, shutdown: CancellationToken) {
        let Self {
            settings,
            etcd,
            mut told,
            mut leadership,
            metrics,
            health,
        } = self;
        let mut run = Run {
            prefixes: Prefixes::of(&settings.cluster.name),
            state: State::new(settings.clone()),
            settings,
            etcd,
            metrics,
            health,
            origin: Instant::now(),
            role: Role::Unknown,
            leaderless_since: Instant::now(),
            failing: BTreeMap::new(),
            exhausted: false,
        };
        let mut term = None;
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut ticks, mut batch) = (0u32, Vec::with_capacity(BATCH_LEN_MAX));
        leadership.mark_changed();
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                changed = leadership.changed() => match changed {
                    Ok(()) => {
                        let now = leadership.borrow_and_update().clone();
                        run.on_leadership(now, &mut term).await;
                    }
                    Err(_) => break,
                },
                progress = Term::progress(&mut term) => run.on_progress(progress, &mut term, &leadership),
                _ = tick.tick() => {
                    ticks = ticks.wrapping_add(1);
                    if ticks.is_multiple_of(COLLECT_TICKS) {
                        run.state.collect(run.origin.elapsed());
                    }
                    run.on_tick(&mut term, told.len());
                }
                count = told.recv_many(&mut batch, BATCH_LEN_MAX) => match count {
                    0 => break,
                    _ => batch.drain(..).for_each(|told| run.on_told(told)),
                },
            }
            run.publish(&mut term);
        }
        run.end(&mut term).await;
    }
}

struct Run {
    settings: Settings,
    prefixes: Prefixes,
    state: State,
    etcd: EtcdConfig,
    metrics: OperatorMetrics,
    health: Health,
    origin: Instant,
    role: Role,
    leaderless_since: Instant,
    /// Kinds whose watch fails, why, and when it last did.
    failing: BTreeMap<Kind, (String, Instant)>,
    exhausted: bool,
}

impl Run {
    fn cluster(&self) -> &ClusterName {
        &self.settings.cluster.name
    }

    /// A term ends with the leadership it belongs to; another one begins with the next.
    async fn on_leadership(&mut self, leadership: Leadership, term: &mut Option<Term>) {
        self.end(term).await;
        self.metrics.leader.set((leadership.role == Role::Leading).into());
        if leadership.role == Role::Leading {
            *term = Some(self.begin(&leadership.term));
        }
        self.role = leadership.role;
        self.leaderless_since = Instant::now();
    }

    fn begin(&self, token: &CancellationToken) -> Term {
        let mut scopes: Vec<String> = self.prefixes.all().map(str::to_owned).into();
        scopes.push(keys::CLUSTER_CONFIG.to_owned());
        scopes.push(self.synced_prefix());
        Term::start(&self.etcd, scopes, Phase::Listing, token.child_token())
    }

    async fn end(&mut self, term: &mut Option<Term>) {
        self.state.deactivate();
        if let Some(Term { task, stop, .. }) = term.take() {
            stop.cancel();
            if !task.is_finished() {
                // A panic was logged by its hook; the writer is gone either way.
                let _ = task.await;
            }
        }
    }

    fn on_progress(
        &mut self,
        progress: Progress,
        term: &mut Option<Term>,
        leadership: &watch::Receiver<Leadership>,
    ) {
        let Some(current) = term else { return };
        match (progress, &current.phase) {
            (Progress::Ended, _) => {
                *term = None;
                self.state.deactivate();
                let now = leadership.borrow().clone();
                if now.role == Role::Leading && !now.term.is_cancelled() {
                    tracing::error!("the writer to etcd has ended; starting another one");
                    *term = Some(self.begin(&now.term));
                }
            }
            (Progress::Done, Phase::Listing) => current.phase = Phase::Syncing,
            (Progress::Done, Phase::Flushing(_)) => {
                self.put_canaries(&current.writer);
                current.phase = Phase::Live;
                tracing::info!("everything is published");
            }
            (Progress::Done, _) => {}
        }
    }

    /// The value of a canary that is there already stays, so that a restart writes nothing.
    fn put_canaries(&self, writer: &Writer) {
        let prefix = self.synced_prefix();
        let stored: BTreeMap<_, _> = writer
            .stored(&prefix)
            .into_iter()
            .map(|stored| (stored.key, stored.value))
            .collect();
        let now = rfc3339::format(SystemTime::now());
        for key in canaries(self.cluster()) {
            let value = stored.get(key.as_bytes()).cloned();
            writer.put(key, value.unwrap_or_else(|| now.clone().into()));
        }
        writer.prune(&prefix);
    }

    fn synced_prefix(&self) -> String {
        format!("{}{}/", keys::SYNCED, self.cluster())
    }

    fn on_told(&mut self, told: Told) {
        let input = match told {
            Told::Event(input) => *input,
            Told::Failed { kind, error } => {
                self.metrics.watch_errors.get_or_create(&kind.into()).inc();
                if self
                    .failing
                    .insert(kind, (error.clone(), Instant::now()))
                    .is_none()
                {
                    tracing::warn!(
                        kind = kind.as_str(),
                        error,
                        "watch of the Kubernetes API failed; trying again"
                    );
                }
                return;
            }
        };
        let kind = kind_of(&input);
        self.metrics.events.get_or_create(&kind.into()).inc();
        if self.failing.remove(&kind).is_some() {
            works_again(kind);
        }
        for report in self.state.on(input) {
            let labels = ProblemLabels {
                kind: report.kind.as_str(),
                reason: report.problem.reason(),
            };
            self.metrics.problems.get_or_create(&labels).inc();
            tracing::warn!(kind = labels.kind, object = %report.object, reason = labels.reason, "{}", report.problem);
        }
    }

    /// Hands over what changed.
    fn publish(&mut self, term: &mut Option<Term>) {
        let Some(term) = term else { return };
        if matches!(term.phase, Phase::Syncing) && self.state.is_synced() {
            self.activate(&term.writer);
            self.hand_over(&term.writer);
            for prefix in self.prefixes.all() {
                term.writer.prune(prefix);
            }
            let writer = term.writer.clone();
            term.phase = Phase::Flushing(Box::pin(async move { writer.flush().await }));
        } else if term.publishes() {
            self.hand_over(&term.writer);
        }
    }

    /// Takes over the identities of etcd and wants this cluster's config.
    fn activate(&mut self, writer: &Writer) {
        let stored = writer.stored(self.prefixes.identities());
        let stored = stored.iter().map(|stored| (&stored.key[..], &stored.value[..]));
        for (key, refusal) in self.state.activate(stored, rand::random(), self.origin.elapsed()) {
            tracing::warn!(
                key,
                reason = refusal.reason(),
                "identity in etcd is not usable and is removed: {refusal}"
            );
        }
        let config = ClusterConfig::of_cluster(self.settings.cluster.id, self.settings.max_clusters);
        writer.put(keys::cluster_config(self.cluster()), config.encode());
    }

    fn hand_over(&mut self, writer: &Writer) {
        let began = Instant::now();
        let changes = self.state.desired(self.origin.elapsed());
        if changes.is_empty() {
            return;
        }
        self.metrics.changes.inc_by(changes.len() as u64);
        for change in changes {
            match change.value {
                Some(value) => writer.put(change.key, value),
                None => writer.delete(&change.key),
            }
        }
        self.metrics.round.observe(began.elapsed().as_secs_f64());
        let exhausted = self.state.exhausted();
        if let Some((pods, error)) = exhausted
            && !self.exhausted
        {
            tracing::error!(pods, "pods without an identity are not published: {error}");
        }
        self.exhausted = exhausted.is_some();
    }

    fn on_tick(&mut self, term: &mut Option<Term>, queue_len: usize) {
        let leaderless = self.role == Role::Unknown && self.leaderless_since.elapsed() >= HEARTBEAT_AFTER;
        if leaderless && term.is_none() {
            // Nothing changes while the Kubernetes API is away, but peers must see that this cluster's etcd is alive.
            // A writer counts as connected once a scope has answered; this one is small, and nothing in it is wanted or pruned.
            let scopes = vec![keys::CLUSTER_CONFIG.to_owned()];
            *term = Some(Term::start(
                &self.etcd,
                scopes,
                Phase::Heartbeat,
                CancellationToken::new(),
            ));
        }
        let over = self
            .failing
            .extract_if(.., |_, (_, at)| at.elapsed() >= FAILING_FOR);
        over.for_each(|(kind, _)| works_again(kind));
        for kind in Kind::ALL {
            self.metrics
                .objects
                .get_or_create(&kind.into())
                .set(self.state.len(kind) as i64);
        }
        self.metrics.queue.set(queue_len as i64);
        self.metrics.identities.set(self.state.identities() as i64);
        let starved = self.state.exhausted().map_or(0, |(pods, _)| pods);
        self.metrics.starved.set(starved as i64);
        self.report_etcd(term);
        self.health.set("kubernetes", self.kubernetes_health());
        self.health
            .set("publishing", self.publishing_health(term.as_ref()));
    }

    fn report_etcd(&self, term: &mut Option<Term>) {
        let status = term.as_ref().map(|term| term.writer.status());
        let metrics = &self.metrics;
        metrics
            .etcd_connected
            .set(status.as_ref().is_some_and(|status| status.connected).into());
        metrics
            .etcd_pending
            .set(status.as_ref().map_or(0, |status| status.pending as i64));
        metrics
            .etcd_refused
            .set(status.as_ref().map_or(0, |status| status.refused as i64));
        let (Some(term), Some(status)) = (term, status) else {
            self.health.set(
                "etcd",
                HealthState::Ok("not connected: another operator leads".into()),
            );
            return;
        };
        metrics
            .etcd_writes
            .inc_by(status.writes.saturating_sub(term.counted.writes));
        metrics
            .etcd_failures
            .inc_by(status.failures.saturating_sub(term.counted.failures));
        let health = if status.connected {
            HealthState::Ok(format!("{} keys pending", status.pending))
        } else if status.listed {
            HealthState::Degraded(format!("not connected, trying again: {}", status.last_error))
        } else {
            HealthState::Starting(format!("not connected yet: {}", status.last_error))
        };
        self.health.set("etcd", health);
        term.counted = status;
    }

    fn kubernetes_health(&self) -> HealthState {
        let failing = self
            .failing
            .iter()
            .map(|(kind, (error, _))| format!("{}: {error}", kind.as_str()));
        let failing = failing.collect::<Vec<_>>().join("; ");
        let unsynced: BTreeSet<_> = Kind::ALL
            .into_iter()
            .filter(|kind| !self.state.is_kind_synced(*kind))
            .map(Kind::as_str)
            .collect();
        if !unsynced.is_empty() {
            let kinds = unsynced.into_iter().collect::<Vec<_>>().join(", ");
            HealthState::Starting(format!("waiting for {kinds}; {failing}"))
        } else if !failing.is_empty() {
            HealthState::Degraded(format!("what is known stays; {failing}"))
        } else {
            HealthState::Ok("all kinds are watched".into())
        }
    }

    fn publishing_health(&self, term: Option<&Term>) -> HealthState {
        match (&self.role, term.map(|term| &term.phase)) {
            (Role::Leading, Some(Phase::Live)) => match self.state.exhausted() {
                None => HealthState::Ok("leading, everything is published".into()),
                Some((pods, error)) => {
                    HealthState::Degraded(format!("{pods} pods without identity: {error}"))
                }
            },
            (Role::Leading, Some(Phase::Flushing(_))) => {
                HealthState::Starting("leading, writing everything once".into())
            }
            (Role::Leading, Some(Phase::Syncing)) => {
                HealthState::Starting("leading, waiting for Kubernetes".into())
            }
            (Role::Leading, _) => HealthState::Starting("leading, reading etcd".into()),
            (Role::Following { holder }, _) => HealthState::Ok(format!("standing by, {holder} leads")),
            (Role::Unknown, Some(Phase::Heartbeat)) => HealthState::Degraded(
                "nobody is known to lead; what is published stays, the heartbeat goes on".into(),
            ),
            (Role::Unknown, _) => HealthState::Starting("looking for a leader".into()),
        }
    }
}

fn works_again(kind: Kind) {
    tracing::info!(kind = kind.as_str(), "watch of the Kubernetes API works again");
}

fn kind_of(input: &Input) -> Kind {
    match input {
        Input::Service(_) => Kind::Services,
        Input::Slice(_) => Kind::EndpointSlices,
        Input::Pod(_) => Kind::Pods,
        Input::Node(_) => Kind::Nodes,
        Input::Namespace(_) => Kind::Namespaces,
    }
}
