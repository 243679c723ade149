//! Ends the open flows of backends that left: sockets that reached them through a frontend get an error at once, and their
//! owners connect anew, to a backend that is there.
//!
//! In: backends that may have left, once their round was brought to the maps ([`Inbox`]); what failed of it is tried again, and the
//! later looks come after that. Out: fewer sockets, and numbers. Which flows
//! end is decided by the merge (`isthmus_mesh::loadbalancer`), when to look by [`schedule`], and which sockets have those flows
//! by [`selection`]; all of that is pure. Here is what is around it:
//!
//! ```text
//!     rounds --departed--> Inbox -> Schedule -> map of the way back -> flows --question--> rounds: which of them end?
//!                                      ^                                          |
//!                                      +--- again in 0.1 s and 1 s --- walk over the namespaces (a thread of its own)
//! ```
//!
//! Invariants: a socket is ended only if the map says that it reached its peer through a frontend, and only if that flow is
//! to end by what is known right before; no walk waits for another agent's or the kernel's good will; walks take at most a
//! fifth of the time, and each ends at most [`SOCKETS_MAX`] sockets.

pub mod schedule;
pub mod selection;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use isthmus_bpf_abi::PROTO_TCP;
use isthmus_datapath::{
    Datapath,
    sock_diag::{self, Ended, Protocol, Walk},
};
use isthmus_mesh::{
    loadbalancer::{Departed, Verdict},
    to_ip,
};
use isthmus_runtime::CancellationToken;
use tokio::sync::Notify;

use self::{schedule::Schedule, selection::Selection};
use crate::{
    endpoints::keeper::chain,
    metrics::{AgentMetrics, OutcomeLabel, ProtocolLabel},
    rounds::Handle,
};

/// Sockets that one walk ends at most; more are for the next one.
pub const SOCKETS_MAX: usize = 4096;
/// A walk that failed as a whole counts as one that took so long: the pause after it is a second.
const FAILURE: Duration = Duration::from_millis(250);

/// Where departures wait. Holds each backend once; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Inbox(Arc<(Mutex<Departed>, Notify)>);

impl Inbox {
    /// Adds backends. Never waits for who takes them.
    pub fn add(&self, departed: &Departed) {
        let (waiting, news) = &*self.0;
        waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .merge(departed);
        news.notify_one();
    }

    fn take(&self) -> Departed {
        std::mem::take(&mut *self.0.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    async fn news(&self) {
        self.0.1.notified().await;
    }
}

/// What is wanted and can be had.
#[derive(Clone, Debug, Default)]
pub struct Support {
    /// Protocols whose sockets are ended.
    pub protocols: Vec<Protocol>,
    /// Why others are not, although they should be.
    pub lacking: Option<String>,
}

/// Asks the kernel about the protocols that are wanted, and says what it cannot do. Blocks: it may load modules.
pub fn probe(wanted: &[Protocol], metrics: &AgentMetrics) -> Support {
    let mut support = Support::default();
    let mut lacking = Vec::new();
    for &protocol in wanted {
        let result = sock_diag::probe(protocol);
        let label = ProtocolLabel {
            protocol: protocol.name(),
        };
        metrics
            .sockets_endable
            .get_or_create(&label)
            .set(result.is_ok().into());
        match result {
            Ok(()) => support.protocols.push(protocol),
            Err(error) => {
                let why = chain(&error);
                tracing::warn!(
                    protocol = protocol.name(),
                    error = why,
                    "open flows of backends that leave are not ended: their clients wait for a time-out"
                );
                lacking.push(format!("{}: {why}", protocol.name()));
            }
        }
    }
    if !lacking.is_empty() {
        let lacking = lacking.join("; ");
        support.lacking = Some(format!(
            "open flows of backends that leave are not ended: {lacking}"
        ));
    }
    support
}

/// What does not change.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Protocols whose sockets are ended.
    pub protocols: Vec<Protocol>,
    /// Also those in pods' namespaces, not only the node's own.
    pub pods: bool,
}

/// Works until `shutdown`.
pub async fn run(
    datapath: Arc<Datapath>,
    settings: Settings,
    inbox: Inbox,
    rounds: Handle,
    metrics: AgentMetrics,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let started = Instant::now();
    let mut schedule = Schedule::default();
    loop {
        let now = started.elapsed();
        schedule.add(now, &inbox.take());
        if let Some(departed) = schedule.due(now) {
            let walk = walk(&datapath, &settings, &departed, &rounds);
            let result = tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                result = walk => result,
            };
            let done = started.elapsed();
            let took = done.saturating_sub(now);
            let (again, counts_as) = match &result {
                Ok(Some(ended)) => (ended.unfinished, took),
                Ok(None) => (false, took),
                Err(_) => (true, FAILURE.max(took)),
            };
            schedule.done(done, counts_as, again.then_some(&departed));
            report(&metrics, took, result);
            continue;
        }
        let wake = schedule
            .wake_at()
            .map(|at| tokio::time::Instant::from_std(started + at));
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            () = inbox.news() => {}
            () = until(wake) => {}
        }
    }
}

async fn until(wake: Option<tokio::time::Instant>) {
    match wake {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Ends the flows to these backends that are to end. `None`: there are none.
async fn walk(
    datapath: &Arc<Datapath>,
    settings: &Settings,
    departed: &Departed,
    rounds: &Handle,
) -> anyhow::Result<Option<Ended>> {
    let (tables, protocols, wanted) = (Arc::clone(datapath), settings.protocols.clone(), departed.clone());
    let selection = tokio::task::spawn_blocking(move || {
        let mut selection = Selection::new(wanted, protocols);
        let mut scan = Default::default();
        let map = &tables.tables().reverse_sk;
        while !isthmus_datapath::map::Scan::is_over(&scan) {
            map.scan(&mut scan)?
                .iter()
                .for_each(|(key, value)| selection.take(key, value));
        }
        Ok::<_, isthmus_datapath::MapError>(selection)
    })
    .await??;
    if selection.is_empty() {
        return Ok(None);
    }
    let judged = rounds.read(move |facts, _| {
        let state = &facts.state;
        let targets = selection.targets(|flow| match state.lb().verdict(flow) {
            Verdict::GoesOn => false,
            Verdict::Ends => true,
            Verdict::Withdrawn => {
                let (address, _, protocol) = flow.backend;
                protocol != PROTO_TCP || !state.ipcache().knows(to_ip(&address))
            }
        });
        let pods = state
            .local()
            .endpoints()
            .iter()
            .filter_map(|endpoint| endpoint.device.as_ref());
        (targets, pods.map(|device| device.netns.as_str().into()).collect())
    });
    // Nobody answers any more: the agent is stopping.
    let Some((targets, pods)) = judged.await else {
        return Ok(None);
    };
    if targets.is_empty() {
        return Ok(None);
    }
    let walk = Walk {
        pods: if settings.pods { pods } else { vec![] },
        targets,
        sockets_max: SOCKETS_MAX,
    };
    Ok(Some(sock_diag::start(walk)?.await?))
}

fn report(metrics: &AgentMetrics, took: Duration, result: anyhow::Result<Option<Ended>>) {
    let outcome = match result {
        Ok(None) => return,
        Err(error) => {
            tracing::warn!(
                error = chain(error.as_ref()),
                "open flows of backends that left are not ended yet; trying again"
            );
            "failed"
        }
        Ok(Some(ended)) => {
            for (protocol, count) in [(Protocol::Tcp, ended.tcp), (Protocol::Udp, ended.udp)] {
                let protocol = protocol.name();
                let label = ProtocolLabel { protocol };
                metrics.sockets_ended.get_or_create(&label).inc_by(count as u64);
            }
            if ended.sockets() > 0 {
                tracing::info!(
                    tcp = ended.tcp,
                    udp = ended.udp,
                    namespaces = ended.namespaces,
                    millis = took.as_millis() as u64,
                    "open flows of backends that left were ended"
                );
            }
            if let Some((namespace, error)) = ended.errors.first() {
                tracing::warn!(
                    failures = ended.failures,
                    namespace = %namespace.display(),
                    error = chain(error),
                    "some open flows of backends that left may not be ended"
                );
            }
            if ended.failures > 0 { "failed" } else { "ok" }
        }
    };
    metrics
        .socket_walks
        .get_or_create(&OutcomeLabel { outcome })
        .inc();
    metrics.socket_walk_seconds.observe(took.as_secs_f64());
}
