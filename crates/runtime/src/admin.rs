//! The admin endpoint: `/healthz` (alive), `/readyz` (ready, with the reasons if not), `/metrics`. HTTP/1 on a TCP address.

use std::{convert::Infallible, net::SocketAddr, time::Duration};

use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{Health, Metrics, State};

/// The endpoint's address is not free or not ours.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} for the admin endpoint; choose another with --admin-listen")]
pub struct AdminError {
    address: SocketAddr,
    #[source]
    source: std::io::Error,
}

/// Starts the endpoint and returns the address it listens on (the port is chosen if it was 0).
pub async fn serve(
    address: SocketAddr,
    health: Health,
    metrics: Metrics,
    shutdown: CancellationToken,
) -> Result<SocketAddr, AdminError> {
    let listener = TcpListener::bind(address)
        .await
        .map_err(|source| AdminError { address, source })?;
    let bound = listener
        .local_addr()
        .map_err(|source| AdminError { address, source })?;
    tokio::spawn(accept(listener, health, metrics, shutdown));
    Ok(bound)
}

/// Most connections served at once; probes and scrapers need a handful.
const CONNECTIONS_MAX: usize = 64;

async fn accept(listener: TcpListener, health: Health, metrics: Metrics, shutdown: CancellationToken) {
    let slots = std::sync::Arc::new(tokio::sync::Semaphore::new(CONNECTIONS_MAX));
    loop {
        let (stream, slot) = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => match (accepted, slots.clone().try_acquire_owned()) {
                (Ok((stream, _)), Ok(slot)) => (stream, slot),
                // Out of descriptors or slots: the peer sees a closed connection; give others time to finish.
                _ => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    continue;
                }
            },
        };
        let (health, metrics, shutdown) = (health.clone(), metrics.clone(), shutdown.clone());
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let answer = answer(&request, &health, &metrics);
                async move { Ok::<_, Infallible>(answer) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(Duration::from_secs(10))
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                () = shutdown.cancelled() => {}
                // A broken connection is the peer's affair.
                _ = connection => {}
            }
            drop(slot);
        });
    }
}

fn answer(request: &Request<Incoming>, health: &Health, metrics: &Metrics) -> Response<Full<Bytes>> {
    let (status, kind, text) = match request.uri().path() {
        "/healthz" => (StatusCode::OK, "text/plain; charset=utf-8", "ok\n".to_owned()),
        "/readyz" => {
            let status = if health.is_ready() {
                StatusCode::OK
            } else {
                StatusCode::SERVICE_UNAVAILABLE
            };
            (status, "text/plain; charset=utf-8", readiness(health))
        }
        "/metrics" => (
            StatusCode::OK,
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            metrics.encode(),
        ),
        _ => (
            StatusCode::NOT_FOUND,
            "text/plain; charset=utf-8",
            "see /healthz, /readyz and /metrics\n".to_owned(),
        ),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

fn readiness(health: &Health) -> String {
    let line = |(part, state): (&str, State)| match state {
        State::Starting(why) => format!("starting {part}: {why}\n"),
        State::Ok(what) => format!("ok       {part}: {what}\n"),
        State::Degraded(why) => format!("degraded {part}: {why}\n"),
        State::Failed(why) => format!("failed   {part}: {why}\n"),
    };
    health.snapshot().into_iter().map(line).collect()
}
