//! Accepting connections: the border's decisions about addresses, the handshake, the name of the peer and its place. A slow or
//! hostile handshake holds up nobody else.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use isthmus_runtime::CancellationToken;
use isthmus_tls::{PeerRefusal, Rights, ServerTls, peer_common_name};
use nix::sys::socket::{setsockopt, sockopt};
use rustls::{HandshakeKind, pki_types::UnixTime};
use tokio::{
    net::{TcpListener, TcpStream},
    task::AbortHandle,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::task::TaskTracker;
use tonic::service::Routes;

use super::{
    Context, Peer,
    account::Account,
    border::{Knock, Reason, Shares},
    connection::{self, Builder},
    registry::Registry,
};

/// A handshake is not evicted before it has had so long.
const HANDSHAKE_MIN: Duration = Duration::from_secs(1);
/// While all places of handshakes are taken, they are looked at so often.
const FULL_PAUSE: Duration = Duration::from_millis(10);
/// What was sent and is not acknowledged after so long ends the connection; so does silence, after a few probes.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(45);
/// Silence before the first probe, and between probes, in seconds.
const PROBE_SECONDS: (u32, u32) = (20, 10);

/// The handshakes that are going on, oldest first.
#[derive(Debug, Default)]
struct Handshakes(Mutex<BTreeMap<u64, (Duration, Option<AbortHandle>)>>);

impl Handshakes {
    fn inner(&self) -> MutexGuard<'_, BTreeMap<u64, (Duration, Option<AbortHandle>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is room for one more; the oldest makes room if it had its time.
    async fn make_room(&self, context: &Context) {
        loop {
            {
                let mut running = self.inner();
                if running.len() < context.limits.handshakes.max(1) {
                    return;
                }
                if let Some(oldest) = running.first_entry()
                    && context.now().saturating_sub(oldest.get().0) >= HANDSHAKE_MIN
                {
                    if let (_, Some(task)) = oldest.remove() {
                        task.abort();
                    }
                    context.refused(Reason::Evicted.as_str(), None, "");
                    return;
                }
            }
            tokio::time::sleep(FULL_PAUSE).await;
        }
    }

    fn abort_all(&self) {
        for (_, task) in std::mem::take(&mut *self.inner()).into_values() {
            task.iter().for_each(AbortHandle::abort);
        }
    }
}

/// Accepts until `stop`. Connections are tasks of `connections`.
pub(super) async fn accept(
    listener: TcpListener,
    tls: Arc<ServerTls>,
    context: Arc<Context>,
    routes: Routes,
    connections: TaskTracker,
    stop: CancellationToken,
) {
    let handshakes = Arc::new(Handshakes::default());
    let builder = Arc::new(connection::builder(&context.limits));
    let accepting = async {
        for number in 0u64.. {
            let (tcp, from) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, most likely: wait until some are free again.
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "cannot accept a connection"
                    );
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let knock = context.border().knock(from.ip(), &context.limits, context.now());
            match knock {
                Knock::Refuse(reason) => {
                    context.refused(reason.as_str(), Some(from), "");
                    continue;
                }
                Knock::Wait(wait) => tokio::time::sleep(wait).await,
                Knock::Proceed => {}
            }
            handshakes.make_room(&context).await;
            // Before the task begins, so that it finds its own place.
            handshakes.inner().insert(number, (context.now(), None));
            let task = connections.spawn({
                let (tls, context, builder, routes) =
                    (tls.clone(), context.clone(), builder.clone(), routes.clone());
                let handshakes = handshakes.clone();
                async move {
                    let timeout = context.limits.handshake_timeout;
                    // In a box of its own, for what a handshake takes of memory is given back when it is over.
                    let shaken = tokio::time::timeout(timeout, Box::pin(shake(tcp, &tls))).await;
                    // Unless it was evicted in this moment: then its task ends at its next wait.
                    handshakes.inner().remove(&number);
                    match shaken {
                        Ok(Ok(shaken)) => serve(shaken, from, &tls, context, &builder, routes).await,
                        Ok(Err(error)) => {
                            let reason = PeerRefusal::of_handshake(&error)
                                .map_or(Reason::Network.as_str(), PeerRefusal::reason);
                            context.refused(reason, Some(from), &error.to_string());
                        }
                        Err(_) => context.refused(Reason::Timeout.as_str(), Some(from), "no handshake"),
                    }
                }
            });
            if let Some((_, handle)) = handshakes.inner().get_mut(&number) {
                *handle = Some(task.abort_handle());
            }
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = accepting => {}
    }
    handshakes.abort_all();
}

/// A finished handshake, and the state of the TLS files that it was made with.
struct Shaken {
    /// In a box: it is handed on from future to future, each of which would keep room for it.
    stream: Box<TlsStream<TcpStream>>,
    state: Arc<isthmus_tls::ServerState>,
}

async fn shake(tcp: TcpStream, tls: &ServerTls) -> io::Result<Shaken> {
    tcp.set_nodelay(true)?;
    // A client that went without a word is noticed by TCP as well as by HTTP/2's pings, which a full connection cannot send.
    setsockopt(&tcp, sockopt::KeepAlive, &true)?;
    setsockopt(&tcp, sockopt::TcpKeepIdle, &PROBE_SECONDS.0)?;
    setsockopt(&tcp, sockopt::TcpKeepInterval, &PROBE_SECONDS.1)?;
    setsockopt(
        &tcp,
        sockopt::TcpUserTimeout,
        &(UNACKNOWLEDGED_MAX.as_millis() as u32),
    )?;
    let state = tls.current();
    let stream = TlsAcceptor::from(state.config()).accept(tcp).await?;
    Ok(Shaken {
        stream: Box::new(stream),
        state,
    })
}

/// A client's place at the border; given back with the value.
struct Place {
    context: Arc<Context>,
    name: String,
}

impl Place {
    fn take(context: &Arc<Context>, name: &str) -> Result<(Self, Arc<Shares>), Reason> {
        let shares = context.border().enter(name, &context.limits, context.now())?;
        let place = Self {
            context: context.clone(),
            name: name.to_owned(),
        };
        Ok((place, shares))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let now = self.context.now();
        self.context.border().leave(&self.name, now);
    }
}

async fn serve(
    shaken: Shaken,
    from: SocketAddr,
    tls: &ServerTls,
    context: Arc<Context>,
    builder: &Builder,
    routes: Routes,
) {
    let session = shaken.stream.get_ref().1;
    let resumed = session.handshake_kind() == Some(HandshakeKind::Resumed);
    let chain = session.peer_certificates().unwrap_or_default().to_vec();
    let name = match peer_common_name(&chain) {
        Ok(name) => name,
        Err(error) => {
            return context.refused(Reason::NoName.as_str(), Some(from), &error.to_string());
        }
    };
    let rights = Rights::of_common_name(&name, context.cluster.as_str());
    let (_place, shares) = match Place::take(&context, &name) {
        Ok(taken) => taken,
        Err(reason) => return context.refused(reason.as_str(), Some(from), &name),
    };
    if rights.is_none() {
        // Served, and refused call by call: that is an answer which a client can show to people.
        context.no_rights(&name);
    }
    let account = Account::new(context.totals.clone(), context.limits.pending_bytes);
    let peer = Arc::new(Peer::new(name, rights, chain, shares, account));
    let _entry = Registry::enter(&context, &peer);
    // A resumed session was judged when it was new, and a handshake may have begun before the files changed. Whoever looks
    // after connections judges those that have entered when the files change; so this comes after entering.
    let current = tls.current();
    let judged = !resumed && Arc::ptr_eq(&current, &shaken.state);
    if !judged && let Err(refusal) = current.judge(&peer.chain, UnixTime::now()) {
        return context.refused(refusal.reason(), Some(from), &peer.name);
    }
    tracing::debug!(peer = peer.name, ?from, resumed, "connected");
    context.connected();
    connection::serve(shaken.stream, peer, builder, routes, &context.metrics).await;
}
