//! Connections: accept, handshake, name the peer. A slow or hostile handshake holds up nobody else.

use std::{
    io,
    pin::Pin,
    sync::{Arc, atomic::AtomicUsize},
    task::{Context as TaskContext, Poll},
    time::Duration,
};

use isthmus_runtime::CancellationToken;
use isthmus_tls::{Rights, ServerTls, peer_common_name};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use super::{Context, Peer};

/// Handshaken connections that wait to be served; the server takes them at once.
const READY_MAX: usize = 64;

/// A served connection.
pub(super) struct Connection {
    stream: TlsStream<TcpStream>,
    peer: Arc<Peer>,
    _slot: OwnedSemaphorePermit,
}

impl Connected for Connection {
    type ConnectInfo = Arc<Peer>;

    fn connect_info(&self) -> Arc<Peer> {
        self.peer.clone()
    }
}

/// Accepts until `shutdown`.
pub(super) fn accept(
    listener: TcpListener,
    tls: ServerTls,
    context: Arc<Context>,
    shutdown: CancellationToken,
) -> ReceiverStream<io::Result<Connection>> {
    let (ready, incoming) = mpsc::channel(READY_MAX);
    tokio::spawn(async move {
        let slots = Arc::new(Semaphore::new(context.limits.connections));
        loop {
            let slot = tokio::select! {
                () = shutdown.cancelled() => return,
                // Never closed.
                Ok(slot) = slots.clone().acquire_owned() => slot,
            };
            let tcp = tokio::select! {
                () = shutdown.cancelled() => return,
                accepted = listener.accept() => match accepted {
                    Ok((tcp, _)) => tcp,
                    Err(error) => {
                        // Out of descriptors, most likely: wait until some are free again.
                        tracing::warn!(error = &error as &dyn std::error::Error, "cannot accept a connection");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        continue;
                    }
                },
            };
            let (context, ready) = (context.clone(), ready.clone());
            let acceptor = TlsAcceptor::from(tls.config());
            tokio::spawn(async move {
                let from = tcp.peer_addr().ok();
                let timeout = context.limits.handshake_timeout;
                match tokio::time::timeout(timeout, handshake(tcp, acceptor, slot, &context)).await {
                    Ok(Ok(connection)) => {
                        tracing::debug!(peer = connection.peer.name, ?from, "connected");
                        context
                            .metrics
                            .connections
                            .get_or_create(&outcome("accepted"))
                            .inc();
                        // The receiver goes only when the server stops.
                        let _ = ready.send(Ok(connection)).await;
                    }
                    Ok(Err(error)) => {
                        tracing::debug!(
                            error = &error as &dyn std::error::Error,
                            ?from,
                            "handshake failed"
                        );
                        context
                            .metrics
                            .connections
                            .get_or_create(&outcome("refused"))
                            .inc();
                    }
                    Err(_) => {
                        context
                            .metrics
                            .connections
                            .get_or_create(&outcome("timeout"))
                            .inc();
                    }
                }
            });
        }
    });
    ReceiverStream::new(incoming)
}

fn outcome(outcome: &'static str) -> crate::metrics::Outcome {
    crate::metrics::Outcome { outcome }
}

async fn handshake(
    tcp: TcpStream,
    acceptor: TlsAcceptor,
    slot: OwnedSemaphorePermit,
    context: &Context,
) -> io::Result<Connection> {
    tcp.set_nodelay(true)?;
    let stream = acceptor.accept(tcp).await?;
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let name = peer_common_name(chain).map_err(io::Error::other)?;
    let rights = Rights::of_common_name(&name, context.cluster.as_str());
    if rights.is_none() {
        // Served, and refused call by call: that is an answer which a client can show to people.
        tracing::warn!(
            peer = name,
            "the certificate's common name has no rights here; it takes admin-<this cluster>, local-<this cluster>, remote or remote-<other cluster>"
        );
    }
    Ok(Connection {
        peer: Arc::new(Peer {
            name,
            rights,
            watches: AtomicUsize::new(0),
        }),
        stream,
        _slot: slot,
    })
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
