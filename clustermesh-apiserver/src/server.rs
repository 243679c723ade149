//! etcd's v3 read API over mutual TLS, from the store.
//!
//! In: gRPC calls of peers whose certificates are verified. Out: answers that etcd's clients, Cilium's readers and our own
//! understand as etcd's, down to the texts of errors, by which clients tell them apart.
//!
//! Invariants: a call outside the peer's key ranges, and every write but the local operator's to an embedded store, is refused; each answer carries a header with the
//! cluster ID of its view; nobody gets an event twice or misses one silently.

mod accept;
mod account;
mod answers;
mod border;
pub mod bucket;
mod calls;
mod connection;
mod drain;
pub mod errors;
mod face;
mod kv;
pub mod limits;
pub mod locks;
mod peer;
mod refused;
mod registry;
mod replica;
mod stream;
pub mod txn;
mod watch;
mod write;

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use isthmus_model::ClusterName;
use isthmus_proto::etcdserverpb::{
    auth_server::AuthServer, cluster_server::ClusterServer, kv_server::KvServer, lease_server::LeaseServer,
    maintenance_server::MaintenanceServer,
};
use isthmus_runtime::{CancellationToken, Health, State};
use isthmus_tls::ServerTls;
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::task::TaskTracker;
use tonic::service::Routes;

use crate::{
    embedded::Embedded,
    metrics::{Reason, ServerMetrics, Throttled},
    shared::Shared,
    store::Route,
};

use account::Totals;
use answers::Answers;
use border::{Border, LogGate};
pub use limits::ServerLimits;
use locks::Locks;
pub(crate) use peer::Peer;
use registry::Registry;

/// Time between two log lines about the same kind of refusal.
const LOG_INTERVAL: Duration = Duration::from_secs(10);
/// Name of the server in the health register.
const SERVER: &str = "server";

/// What the services share.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) shared: Shared,
    pub(crate) limits: ServerLimits,
    pub(crate) metrics: ServerMetrics,
    pub(crate) address: SocketAddr,
    pub(crate) cluster: ClusterName,
    /// Takes the local operator's writes; `None` = there is an etcd for them.
    pub(crate) embedded: Option<Embedded>,
    begun: Instant,
    border: Mutex<Border>,
    registry: Registry,
    totals: Arc<Totals>,
    answers: Answers,
    locks: Locks,
    log: Mutex<LogGate<&'static str>>,
}

impl Context {
    /// Time as the border counts it.
    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    fn border(&self) -> MutexGuard<'_, Border> {
        self.border.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a line about `reason` is due, and how many were left out since the last one.
    fn log(&self, reason: &'static str) -> Option<u64> {
        let now = self.now();
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.ask(reason, now)
    }

    fn connected(&self) {
        self.metrics
            .connections
            .get_or_create(&crate::metrics::Outcome { outcome: "accepted" })
            .inc();
    }

    /// A connection is not let in.
    fn refused(&self, reason: &'static str, from: Option<SocketAddr>, why: &str) {
        let outcome = if reason == border::Reason::Timeout.as_str() {
            "timeout"
        } else {
            "refused"
        };
        self.metrics
            .connections
            .get_or_create(&crate::metrics::Outcome { outcome })
            .inc();
        self.metrics
            .rejected_connections
            .get_or_create(&Reason { reason })
            .inc();
        if let Some(left_out) = self.log(reason) {
            tracing::warn!(reason, ?from, why, left_out, "refused a connection");
        }
    }

    /// A connection that was let in is cut off.
    fn cut_off(&self, peer: &Peer, reason: &'static str) {
        peer.close();
        self.metrics
            .closed_connections
            .get_or_create(&Reason { reason })
            .inc();
        if let Some(left_out) = self.log(reason) {
            tracing::warn!(reason, peer = peer.name, left_out, "closed a connection");
        }
    }

    /// A request is refused, because of what its client or others have had.
    fn throttled(&self, peer: &Peer, reason: &'static str, what: &str) {
        let kind = peer.kind;
        self.metrics
            .throttled
            .get_or_create(&Throttled { reason, kind })
            .inc();
        if let Some(left_out) = self.log(reason) {
            tracing::warn!(reason, peer = peer.name, what, left_out, "refused a request");
        }
    }

    /// A client has a certificate of the right CA and a name that nobody knows.
    fn no_rights(&self, name: &str) {
        self.metrics
            .connections
            .get_or_create(&crate::metrics::Outcome { outcome: "no_rights" })
            .inc();
        if let Some(left_out) = self.log("no_rights") {
            tracing::warn!(
                peer = name,
                left_out,
                "the certificate's common name has no rights here; it takes admin-<this cluster>, local-<this cluster>, remote or remote-<other cluster>"
            );
        }
    }
}

/// Serves on `listener` until `shutdown`. Then the server is not ready any longer; it goes on for the grace time, accepts no
/// more, and sends its clients away over some time: their streams end with UNAVAILABLE after what was still to be said, so that
/// they resume elsewhere.
#[allow(
    clippy::too_many_arguments,
    reason = "each is one part that the server is put together from"
)]
pub async fn serve(
    listener: TcpListener,
    tls: ServerTls,
    cluster: ClusterName,
    shared: Shared,
    embedded: Option<Embedded>,
    limits: ServerLimits,
    metrics: ServerMetrics,
    health: Health,
    shutdown: CancellationToken,
) -> std::io::Result<()> {
    let begun = Instant::now();
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let first_revision = i64::try_from(since_epoch.as_micros()).unwrap_or(1).max(1);
    let server_id = shared.read(|store| store.header(&Route::Merged).cluster_id);
    let context = Arc::new(Context {
        locks: Locks::new(&cluster, server_id, first_revision, limits.locks.clone()),
        address: listener.local_addr()?,
        shared,
        metrics,
        cluster,
        embedded,
        begun,
        border: Mutex::default(),
        registry: Registry::default(),
        totals: Arc::new(Totals::new(begun)),
        answers: Answers::new(limits.answer_bytes_in_flight),
        log: Mutex::new(LogGate::new(LOG_INTERVAL)),
        limits,
    });
    let tls = Arc::new(tls);
    // Everything below ends with this.
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    let closing = stop.child_token();
    let connections = TaskTracker::new();
    let mut tasks = JoinSet::new();
    tasks.spawn(locks::expire(context.clone(), stop.clone()));
    tasks.spawn(registry::look_after(
        context.clone(),
        tls.clone(),
        health.clone(),
        stop,
    ));
    let mut accepting = tokio::spawn(accept::accept(
        listener,
        tls,
        context.clone(),
        routes(&context),
        connections.clone(),
        closing.clone(),
    ));
    let ended = |result: Result<(), tokio::task::JoinError>| result.map_err(std::io::Error::other);
    tokio::select! {
        () = shutdown.cancelled() => {}
        // None of them ends before it is told to, unless by a panic.
        result = &mut accepting => return ended(result),
        Some(result) = tasks.join_next() => return ended(result),
    }
    let grace = context.limits.shutdown_grace;
    health.set(
        SERVER,
        State::Failed("stopping: clients are sent to other replicas".to_owned()),
    );
    tracing::info!(
        ?grace,
        "not ready any longer; clients are sent away after the grace time"
    );
    tokio::time::sleep(grace).await;
    closing.cancel();
    ended(accepting.await)?;
    drain::drain(&context, connections).await;
    Ok(())
}

fn routes(context: &Arc<Context>) -> Routes {
    let limit = context.limits.request_bytes;
    let calls = || calls::Calls(context.clone());
    Routes::new(KvServer::new(kv::Kv(context.clone())).max_decoding_message_size(limit))
        .add_service(watch::WatchServer::new(context.clone()))
        .add_service(LeaseServer::new(calls()).max_decoding_message_size(limit))
        .add_service(ClusterServer::new(calls()).max_decoding_message_size(limit))
        .add_service(MaintenanceServer::new(calls()).max_decoding_message_size(limit))
        .add_service(AuthServer::new(calls()).max_decoding_message_size(limit))
        .prepare()
}
