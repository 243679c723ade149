//! A reader that costs little: HTTP/2 and TLS, and of each response what is needed to know that nothing is lost.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use h2::{RecvStream, SendStream, client};
use hyper::{
    Request,
    body::{Buf, Bytes},
};
use isthmus_proto::etcdserverpb::{
    WatchCreateRequest, WatchRequest, WatchResponse, watch_request::RequestUnion,
};
use prost::Message;
use tokio::{net::TcpStream, sync::Notify};
use tokio_rustls::{
    TlsConnector,
    rustls::{ClientConfig, pki_types::ServerName},
};

/// What is watched, and under what is put.
pub const PREFIX: &str = "cilium/state/bench/";
const PREFIX_END: &str = "cilium/state/bench0";
const WINDOW: u32 = 1024 * 1024;
/// Width of a latency's bucket.
const BUCKET_US: u64 = 50;
/// The last bucket takes all that is longer.
const BUCKETS: usize = 400_000;

/// What all watchers have seen.
pub struct Tally {
    epoch: Instant,
    delivered: AtomicU64,
    moved: Notify,
    target: AtomicU64,
    latencies: Vec<AtomicU32>,
}

impl Tally {
    pub fn new() -> Self {
        Self {
            epoch: Instant::now(),
            delivered: AtomicU64::new(0),
            moved: Notify::new(),
            target: AtomicU64::new(u64::MAX),
            latencies: (0..BUCKETS).map(|_| AtomicU32::new(0)).collect(),
        }
    }

    /// What values' times count from.
    pub fn epoch(&self) -> Instant {
        self.epoch
    }

    /// Events, over all watchers.
    pub fn delivered(&self) -> u64 {
        self.delivered.load(Ordering::SeqCst)
    }

    /// Waits until so many were delivered.
    pub async fn wait_for(&self, target: u64) {
        self.target.store(target, Ordering::SeqCst);
        while self.delivered() < target {
            self.moved.notified().await;
        }
    }

    /// Begins to count latencies anew.
    pub fn forget_latencies(&self) {
        self.latencies
            .iter()
            .for_each(|bucket| bucket.store(0, Ordering::Relaxed));
    }

    /// Below which `part` of the latencies lie.
    pub fn latency_us(&self, part: f64) -> u64 {
        let counts = self
            .latencies
            .iter()
            .map(|bucket| u64::from(bucket.load(Ordering::Relaxed)));
        let rank = (counts.clone().sum::<u64>() as f64 * part).ceil() as u64;
        let mut below = 0;
        let bucket = counts.take_while(|count| {
            below += count;
            below < rank
        });
        (bucket.count() as u64 + 1) * BUCKET_US
    }

    fn add(&self, value: &[u8], now_ns: u64) -> Result<()> {
        let stamp = value.get(..20).and_then(|stamp| std::str::from_utf8(stamp).ok());
        let stamp: u64 = stamp.context("a value without a time")?.parse()?;
        let bucket = (now_ns.saturating_sub(stamp) / 1000 / BUCKET_US) as usize;
        self.latencies[bucket.min(BUCKETS - 1)].fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// A connection with one watch.
pub struct Watcher {
    // The stream ends when this is dropped.
    _requests: SendStream<Bytes>,
    responses: RecvStream,
    buffer: Vec<u8>,
    revision: Option<i64>,
}

impl Watcher {
    /// Connects, and returns once the watch is made.
    pub async fn connect(config: Arc<ClientConfig>, address: SocketAddr) -> Result<Self> {
        let tcp = TcpStream::connect(address).await.context("connect")?;
        tcp.set_nodelay(true)?;
        let name = ServerName::try_from("localhost")?;
        let tls = TlsConnector::from(config)
            .connect(name, tcp)
            .await
            .context("TLS handshake")?;
        let (send, connection) = client::Builder::new()
            .initial_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .handshake(tls)
            .await?;
        tokio::spawn(connection);
        let request = Request::post("https://localhost/etcdserverpb.Watch/Watch")
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())?;
        let (response, mut requests) = send.ready().await?.send_request(request, false)?;
        let create = WatchCreateRequest {
            key: PREFIX.into(),
            range_end: PREFIX_END.into(),
            ..Default::default()
        };
        let create = WatchRequest {
            request_union: Some(RequestUnion::CreateRequest(create)),
        };
        let mut message = vec![0];
        message.extend((create.encoded_len() as u32).to_be_bytes());
        create.encode(&mut message)?;
        requests.send_data(message.into(), false)?;
        let response = response.await.context("watch")?;
        ensure!(
            response.status().is_success(),
            "the watch is answered {}",
            response.status()
        );
        let mut watcher = Self {
            _requests: requests,
            responses: response.into_body(),
            buffer: Vec::new(),
            revision: None,
        };
        loop {
            if let Some(response) = watcher.take()? {
                ensure!(
                    response.created && !response.canceled,
                    "no watch: {}",
                    response.cancel_reason
                );
                return Ok(watcher);
            }
            watcher.receive().await?;
        }
    }

    /// Reads until the connection fails or the order is broken.
    pub async fn run(mut self, tally: Arc<Tally>) -> Result<()> {
        loop {
            let mut events = 0;
            let now_ns = tally.epoch.elapsed().as_nanos() as u64;
            while let Some(response) = self.take()? {
                ensure!(
                    !response.canceled,
                    "the watch is cancelled: {}",
                    response.cancel_reason
                );
                for event in &response.events {
                    let kv = event.kv.as_ref().context("an event without a key")?;
                    let follows = self.revision.is_none_or(|last| kv.mod_revision == last + 1);
                    ensure!(
                        follows,
                        "revision {} follows {:?}",
                        kv.mod_revision,
                        self.revision
                    );
                    self.revision = Some(kv.mod_revision);
                    tally.add(&kv.value, now_ns)?;
                }
                events += response.events.len() as u64;
            }
            if events > 0 {
                let delivered = tally.delivered.fetch_add(events, Ordering::SeqCst) + events;
                if delivered >= tally.target.load(Ordering::SeqCst) {
                    tally.moved.notify_one();
                }
            }
            self.receive().await?;
        }
    }

    async fn receive(&mut self) -> Result<()> {
        let Some(data) = self.responses.data().await else {
            let trailers = self.responses.trailers().await?;
            bail!("the stream ended: {trailers:?}");
        };
        let data = data?;
        self.responses.flow_control().release_capacity(data.len())?;
        self.buffer.extend_from_slice(&data);
        Ok(())
    }

    /// The next response, if it is complete.
    fn take(&mut self) -> Result<Option<WatchResponse>> {
        let Some((prefix, rest)) = self.buffer.split_at_checked(5) else {
            return Ok(None);
        };
        let len = (&prefix[1..]).get_u32() as usize;
        let Some(message) = rest.get(..len) else {
            return Ok(None);
        };
        let response = WatchResponse::decode(message)?;
        self.buffer.drain(..5 + len);
        Ok(Some(response))
    }
}
