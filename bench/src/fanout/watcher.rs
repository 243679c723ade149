//! A watcher, and what all of them have seen: as much of each response as it takes to know that nothing is lost.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use isthmus_proto::etcdserverpb::{
    WatchCreateRequest, WatchRequest, WatchResponse, watch_request::RequestUnion,
};
use tokio::sync::Notify;
use tokio_rustls::rustls::ClientConfig;

use crate::reader::{Connection, Responses};

/// What is watched, and under what is put.
pub const PREFIX: &str = "cilium/state/bench/";
const PREFIX_END: &str = "cilium/state/bench0";
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
    // The connection ends when this is dropped.
    _connection: Connection,
    responses: Responses,
    revision: Option<i64>,
}

impl Watcher {
    /// Connects, and returns once the watch is made.
    pub async fn connect(config: Arc<ClientConfig>, address: SocketAddr) -> Result<Self> {
        let mut connection = Connection::open(config, address).await?;
        let create = WatchCreateRequest {
            key: PREFIX.into(),
            range_end: PREFIX_END.into(),
            ..Default::default()
        };
        let create = WatchRequest {
            request_union: Some(RequestUnion::CreateRequest(create)),
        };
        let mut responses = connection
            .call("/etcdserverpb.Watch/Watch", &create, false)
            .await?;
        let created: WatchResponse = responses.next().await?;
        let reason = &created.cancel_reason;
        ensure!(created.created && !created.canceled, "no watch: {reason}");
        Ok(Self {
            _connection: connection,
            responses,
            revision: None,
        })
    }

    /// Reads until the connection fails or the order is broken.
    pub async fn run(mut self, tally: Arc<Tally>) -> Result<()> {
        loop {
            let mut events = 0;
            let now_ns = tally.epoch.elapsed().as_nanos() as u64;
            while let Some(response) = self.responses.take::<WatchResponse>()? {
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
            self.responses.receive().await?;
        }
    }
}
