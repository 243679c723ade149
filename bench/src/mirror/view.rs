//! What the server under test shows: its statuses, what it has sent, and the changes that come through it.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use isthmus_proto::etcdserverpb::{
    RangeRequest, RangeResponse, WatchCreateRequest, WatchRequest, WatchResponse, watch_request::RequestUnion,
};
use isthmus_wire::{
    keys::{REMOTE_STATUS, Scope, range_end},
    status::{Phase, RemoteStatus},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
};
use tokio_rustls::rustls::ClientConfig;

use super::{mock::Mock, population::KINDS};
use crate::reader::Connection;

/// Time between two looks at the statuses.
const LOOK_PAUSE: Duration = Duration::from_millis(50);
/// It takes no longer until everything is synced: Cilium's test allows five minutes.
const PATIENCE: Duration = Duration::from_secs(300);

/// Waits until all of `mocks` are mirrored.
pub async fn until_synced(mocks: &[Mock], config: &Arc<ClientConfig>, address: SocketAddr) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let statuses = statuses(config, address).await;
        match statuses {
            Ok(statuses) => {
                let refused = statuses.iter().find(|status| !status.last_refusals.is_empty());
                if let Some(status) = refused {
                    bail!("{}: refused {:?}", status.name, status.last_refusals);
                }
                let synced = statuses.iter().filter(|status| status.phase == Phase::Synced);
                let synced = synced.count();
                if synced == mocks.len() {
                    return Ok(());
                }
                ensure!(
                    Instant::now() < deadline,
                    "{synced} are synced after {PATIENCE:?}"
                );
            }
            Err(error) if Instant::now() > deadline => return Err(error),
            // It has only just begun.
            Err(_) => {}
        }
        tokio::time::sleep(LOOK_PAUSE).await;
    }
}

async fn statuses(config: &Arc<ClientConfig>, address: SocketAddr) -> Result<Vec<RemoteStatus>> {
    let mut connection = Connection::open(config.clone(), address).await?;
    let request = RangeRequest {
        key: REMOTE_STATUS.into(),
        range_end: range_end(REMOTE_STATUS.as_bytes()).into(),
        ..Default::default()
    };
    let mut responses = connection.call("/etcdserverpb.KV/Range", &request, true).await?;
    let listed: RangeResponse = responses.next().await?;
    let statuses = listed.kvs.iter().map(|kv| RemoteStatus::decode(&kv.value));
    Ok(statuses.collect::<Result<_, _>>()?)
}

/// Bytes that the server has sent to its clients, before TLS.
pub async fn sent_bytes(admin: SocketAddr) -> Result<f64> {
    let mut tcp = TcpStream::connect(admin).await?;
    tcp.write_all(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        .await?;
    let mut text = String::new();
    tcp.read_to_string(&mut text).await?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("isthmus_clustermesh_server_sent_bytes_total "));
    let line = line.with_context(|| format!("no such metric: {text}"))?;
    Ok(line.trim().parse()?)
}

/// A client that watches every mirrored prefix over one connection.
pub struct Watcher {
    latencies: mpsc::UnboundedReceiver<Duration>,
}

impl Watcher {
    /// Makes its watches.
    pub async fn start(
        mocks: Arc<Vec<Mock>>,
        config: &Arc<ClientConfig>,
        address: SocketAddr,
    ) -> Result<Self> {
        let mut connection = Connection::open(config.clone(), address).await?;
        let mut requests = Vec::new();
        for (number, mock) in mocks.iter().enumerate() {
            for (index, kind) in KINDS.into_iter().enumerate() {
                let prefix = kind.prefix(Scope::Cache, &mock.name).context("no prefix")?;
                let create = WatchCreateRequest {
                    range_end: range_end(prefix.as_bytes()).into(),
                    key: prefix.into(),
                    watch_id: (number * KINDS.len() + index + 1) as i64,
                    ..Default::default()
                };
                requests.push(WatchRequest {
                    request_union: Some(RequestUnion::CreateRequest(create)),
                });
            }
        }
        let mut answers = connection
            .call("/etcdserverpb.Watch/Watch", &requests[0], false)
            .await?;
        for (number, request) in requests.iter().enumerate() {
            if number > 0 {
                answers.send(request).await?;
            }
            let created: WatchResponse = answers.next().await?;
            ensure!(
                created.created && !created.canceled,
                "no watch: {}",
                created.cancel_reason
            );
        }
        let (sink, latencies) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            // The connection ends with the task.
            let _connection = connection;
            let mut seen: HashMap<i64, i64> = HashMap::new();
            while let Ok(response) = answers.next::<WatchResponse>().await {
                let mock = &mocks[(response.watch_id as usize - 1) / KINDS.len()];
                for kv in response.events.iter().filter_map(|event| event.kv.as_ref()) {
                    let before = seen.insert(response.watch_id, kv.mod_revision);
                    let made = mock.made(kv.mod_revision);
                    // An event that comes twice or too late counts as none: then the sum does not fit.
                    if let Some(made) = made
                        && before.is_none_or(|before| before < kv.mod_revision)
                        && sink.send(made.elapsed()).is_err()
                    {
                        return;
                    }
                }
            }
        });
        Ok(Self { latencies })
    }

    /// Waits for `count` events, and returns how long each took, shortest first.
    pub async fn events(&mut self, count: usize) -> Result<Vec<Duration>> {
        let mut latencies = Vec::with_capacity(count);
        while latencies.len() < count {
            let next = tokio::time::timeout(Duration::from_secs(60), self.latencies.recv()).await;
            let next = next.with_context(|| format!("{} events came, not {count}", latencies.len()))?;
            latencies.push(next.context("the watcher's connection ended")?);
        }
        latencies.sort();
        Ok(latencies)
    }
}
