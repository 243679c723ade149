//! The floor: one thread writes the same bytes to as many TLS connections, and does nothing else.

use std::{
    io::{ErrorKind, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use tokio::{io::AsyncReadExt, task::JoinSet};
use tokio_rustls::{
    TlsConnector,
    rustls::{ServerConfig, ServerConnection, StreamOwned, crypto::ring, pki_types::ServerName},
};

use super::{BURST, CONNECTING_MAX, Load, PATIENCE, STEADY, VALUE_LEN};
use crate::servers::{Certificates, cpu_seconds};

/// Bytes of a delivered event around its value: HTTP/2 and gRPC frames, header, key, revisions.
const FRAME_LEN: usize = 80;

/// CPU time of a delivery.
pub struct Floor {
    pub steady_us: f64,
    pub burst_us: f64,
}

/// Measures with as many connections.
pub async fn measure(certificates: &Certificates, connections: usize) -> Result<Floor> {
    let (chain, key) = certificates.chain("server")?;
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let server = tokio::task::spawn_blocking(move || serve(&listener, Arc::new(config), connections));
    let client = certificates.client_config()?;
    let mut readers = JoinSet::new();
    let slots = Arc::new(tokio::sync::Semaphore::new(CONNECTING_MAX));
    for _ in 0..connections {
        let (client, slots) = (client.clone(), slots.clone());
        readers.spawn(async move {
            let slot = slots.acquire_owned().await?;
            let tcp = tokio::net::TcpStream::connect(address).await?;
            let name = ServerName::try_from("localhost")?;
            let mut tls = TlsConnector::from(client).connect(name, tcp).await?;
            drop(slot);
            let mut buffer = vec![0; 16 * 1024];
            while tls.read(&mut buffer).await.unwrap_or(0) > 0 {}
            anyhow::Ok(())
        });
    }
    tokio::time::timeout(2 * PATIENCE, server)
        .await
        .context("it does not end")??
}

fn serve(listener: &TcpListener, config: Arc<ServerConfig>, connections: usize) -> Result<Floor> {
    let mut streams = Vec::with_capacity(connections);
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + PATIENCE;
    while streams.len() < connections {
        let tcp = match listener.accept() {
            Ok((tcp, _)) => tcp,
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            Err(error) => return Err(error).context("accept"),
        };
        tcp.set_nonblocking(false)?;
        tcp.set_nodelay(true)?;
        tcp.set_read_timeout(Some(PATIENCE))?;
        tcp.set_write_timeout(Some(PATIENCE))?;
        let mut stream = StreamOwned::new(ServerConnection::new(config.clone())?, tcp);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        streams.push(stream);
    }
    Ok(Floor {
        steady_us: broadcast(&mut streams, STEADY.among(connections), 1)?,
        // As many writes as a server makes that bundles what comes within ten milliseconds.
        burst_us: broadcast(&mut streams, BURST.among(connections), 20)?,
    })
}

/// CPU time of a delivery, events going out `bundle` at a time.
fn broadcast(
    streams: &mut [StreamOwned<ServerConnection, TcpStream>],
    load: Load,
    bundle: u64,
) -> Result<f64> {
    let thread = Path::new("/proc/thread-self/stat");
    let (cpu, begun) = (cpu_seconds(thread)?, Instant::now());
    let bytes = vec![b'x'; (VALUE_LEN + FRAME_LEN) * bundle as usize];
    for number in (0..load.events).step_by(bundle as usize) {
        let at = begun + Duration::from_micros(number * 1_000_000 / load.per_second);
        std::thread::sleep(at.saturating_duration_since(Instant::now()));
        for stream in &mut *streams {
            stream.write_all(&bytes)?;
        }
    }
    Ok((cpu_seconds(thread)? - cpu) * 1e6 / (load.events * streams.len() as u64) as f64)
}
