//! etcd's v3 read API over mutual TLS, from the store.
//!
//! In: gRPC calls of peers whose certificates are verified. Out: answers that etcd's clients, Cilium's readers and our own
//! understand as etcd's, down to the texts of errors, by which clients tell them apart.
//!
//! Invariants: a call outside the peer's key ranges, and every write but the local operator's to an embedded store, is refused; each answer carries a header with the
//! cluster ID of its view; nobody gets an event twice or misses one silently.

mod accept;
mod calls;
pub mod errors;
mod kv;
mod stream;
mod watch;
mod write;

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::AtomicUsize},
    time::Duration,
};

use isthmus_model::ClusterName;
use isthmus_proto::etcdserverpb::{
    auth_server::AuthServer, cluster_server::ClusterServer, kv_server::KvServer, lease_server::LeaseServer,
    maintenance_server::MaintenanceServer,
};
use isthmus_runtime::CancellationToken;
use isthmus_tls::{Rights, ServerTls, rights::KeyRange};
use tokio::net::TcpListener;
use tonic::{Request, Status, transport::Server};

use crate::{embedded::Embedded, metrics::ServerMetrics, shared::Shared};

/// Bytes of a stream's requests that may wait to be read.
const STREAM_WINDOW: u32 = 64 * 1024;
/// Those of all streams of a connection.
const CONNECTION_WINDOW: u32 = 256 * 1024;

/// Bounds of what peers can make this server do.
#[derive(Clone, Debug)]
pub struct ServerLimits {
    /// Connections at once, handshakes included.
    pub connections: usize,
    /// HTTP/2 streams of one connection.
    pub streams: u32,
    /// Watches of one connection, over all its streams.
    pub watches: usize,
    /// Bytes of a request.
    pub request_bytes: usize,
    /// Bytes of the answer to a Range of more keys than a page of 256. Readers page; who does not is told to.
    pub answer_bytes: usize,
    /// A handshake takes no longer.
    pub handshake_timeout: Duration,
    /// How often a quiet watch that asked for it is told how far it has seen.
    pub progress_interval: Duration,
    /// How long a read of a revision that another replica has seen already waits for it.
    pub future_revision_wait: Duration,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            connections: 10_000,
            streams: 1024,
            watches: 8192,
            request_bytes: 2 * 1024 * 1024,
            answer_bytes: 64 * 1024 * 1024,
            handshake_timeout: Duration::from_secs(10),
            progress_interval: Duration::from_secs(5),
            future_revision_wait: Duration::from_millis(250),
        }
    }
}

/// What the services share.
pub(crate) struct Context {
    pub(crate) shared: Shared,
    pub(crate) limits: ServerLimits,
    pub(crate) metrics: ServerMetrics,
    pub(crate) address: SocketAddr,
    pub(crate) cluster: ClusterName,
    /// Takes the local operator's writes; `None` = there is an etcd for them.
    pub(crate) embedded: Option<Embedded>,
    /// Streams end then.
    pub(crate) shutdown: CancellationToken,
}

/// Who is on the other end of a connection.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) name: String,
    pub(crate) rights: Option<Rights>,
    /// Open watches of all streams of the connection.
    pub(crate) watches: AtomicUsize,
}

impl Peer {
    /// The peer that sent `request`.
    pub(crate) fn of<T>(request: &Request<T>) -> Result<Arc<Self>, Status> {
        // Each accepted connection has one.
        let peer = request.extensions().get::<Arc<Self>>();
        peer.cloned().ok_or_else(errors::permission_denied)
    }

    pub(crate) fn may_read(&self, range: &KeyRange) -> bool {
        self.rights.as_ref().is_some_and(|rights| rights.covers(range))
    }
}

/// Serves on `listener` until `shutdown`; open streams then end with UNAVAILABLE, so that clients resume elsewhere.
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
    shutdown: CancellationToken,
) -> std::io::Result<()> {
    let context = Arc::new(Context {
        address: listener.local_addr()?,
        shared,
        limits,
        metrics,
        cluster,
        embedded,
        shutdown: shutdown.clone(),
    });
    let limit = context.limits.request_bytes;
    tokio::spawn({
        let (shared, shutdown) = (context.shared.clone(), shutdown.clone());
        // So that no stream needs a wake-up of its own for it.
        async move {
            shutdown.cancelled().await;
            shared.wake_all();
        }
    });
    let incoming = accept::accept(listener, tls, context.clone(), shutdown.clone());
    let router = Server::builder()
        .max_concurrent_streams(context.limits.streams)
        // Requests are small. What a peer has sent and nobody has read yet is no more than this.
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(20)))
        .add_service(KvServer::new(kv::Kv(context.clone())).max_decoding_message_size(limit))
        .add_service(watch::WatchServer::new(context.clone(), shutdown.clone()))
        .add_service(LeaseServer::new(calls::Calls(context.clone())).max_decoding_message_size(limit))
        .add_service(ClusterServer::new(calls::Calls(context.clone())).max_decoding_message_size(limit))
        .add_service(MaintenanceServer::new(calls::Calls(context.clone())).max_decoding_message_size(limit))
        .add_service(AuthServer::new(calls::Calls(context)).max_decoding_message_size(limit));
    router
        .serve_with_incoming_shutdown(incoming, shutdown.cancelled_owned())
        .await
        .map_err(std::io::Error::other)
}
