//! One connection: HTTP/2 over TLS, from its handshake until the client goes, is sent away, or is cut off.

use std::{
    convert::Infallible,
    io,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context as TaskContext, Poll},
    time::Duration,
};

use hyper::{Request, body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use prometheus_client::metrics::counter::Counter;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::{Status, codegen::Service, service::Routes};

use crate::metrics::ServerMetrics;

use super::{Peer, account::Metered, answers::Large, limits::ServerLimits, refused};

/// Bytes of a stream's requests that may wait to be read.
const STREAM_WINDOW: u32 = 48 * 1024;
/// Those of all streams of a connection. HTTP/2 ends a connection whose small frames take half as much beside their bytes: this
/// is enough for the smallest requests that fill a stream's window, sent by a client that does not wait for answers.
const CONNECTION_WINDOW: u32 = 512 * 1024;
/// A client that is silent for so long is asked whether it is there,
const PING_INTERVAL: Duration = Duration::from_secs(30);
/// and is given up if it does not answer within so long.
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// Bytes of a stream beyond which no room is asked for. Smaller than a message: those are counted in [`super::account`].
const SEND_BUFFER: usize = 64 * 1024;

/// gRPC's code, as headers say it.
const PERMISSION_DENIED: &[u8] = b"7";

/// How connections are served.
pub(super) type Builder = http2::Builder<TokioExecutor>;

/// As `limits` say.
pub(super) fn builder(limits: &ServerLimits) -> Builder {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams)
        // Requests are small. What a peer has sent and nobody has read yet is no more than this.
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(limits.header_bytes)
        .max_pending_accept_reset_streams(limits.resets)
        .max_local_error_reset_streams(limits.resets.max(1) * 16)
        .max_send_buf_size(SEND_BUFFER)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT);
    builder
}

/// Serves until the connection has ended. A peer that is to leave is told so, and its streams may end before it is closed.
pub(super) async fn serve<S>(
    stream: S,
    peer: Arc<Peer>,
    builder: &Builder,
    routes: Routes,
    metrics: &ServerMetrics,
) where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let service = service_fn({
        let (peer, denied) = (peer.clone(), metrics.denied_requests.clone());
        move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(peer.clone());
            let refused = refused::refusal(request.uri().path(), &peer);
            let answer = routes.clone().call(request);
            let (account, denied) = (peer.account.clone(), denied.clone());
            async move {
                let mut answer = match refused {
                    Some(status) => status.into_http(),
                    None => answer.await?,
                };
                // An answer that is an error has its code in the header.
                let code = answer.headers().get(Status::GRPC_STATUS);
                if code.is_some_and(|code| code.as_bytes() == PERMISSION_DENIED) {
                    denied.inc();
                }
                let large = answer.extensions_mut().remove::<Large>();
                Ok::<_, Infallible>(answer.map(|body| Metered::new(body, account, large)))
            }
        }
    });
    let io = TokioIo::new(Heard {
        stream,
        peer: peer.clone(),
        sent_bytes: metrics.sent_bytes.clone(),
    });
    let mut connection = pin!(builder.serve_connection(io, service));
    let mut left = pin!(peer.clone().left());
    let mut leaving = false;
    loop {
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(peer = peer.name, error = &error as &dyn std::error::Error, "a connection failed");
                }
                return;
            }
            () = peer.closed() => return,
            () = left.as_mut(), if !leaving => {
                leaving = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

/// A stream that tells its peer that it was heard.
struct Heard<S> {
    stream: S,
    peer: Arc<Peer>,
    sent_bytes: Counter,
}

impl<S> Heard<S> {
    fn sent(&self, polled: &Poll<io::Result<usize>>) {
        if let Poll::Ready(Ok(bytes)) = polled {
            self.sent_bytes.inc_by(*bytes as u64);
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Heard<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buffer);
        self.peer.hears(buffer.filled().len() - before);
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Heard<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.sent(&polled);
        polled
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, bytes);
        self.sent(&polled);
        polled
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
