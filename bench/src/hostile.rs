//! `hostile`: what well-behaved clients notice of hostile ones: how long an event takes to them, with and without attackers, in
//! one run against one server.
//!
//! In: nothing. 50 watchers, each with a connection of its own, are told of 100 events a second, first in a quiet server and then
//! while attackers do all of the following at once: a reader with 128 streams that reads nothing, a client that asks for 100,000
//! watches, clients that list everything again and again, half-open connections, rapid resets, garbage, and connections that
//! come and go as fast as they can. Out: the 99th percentile of both. Every watcher must get every event, once and in order, in
//! both; otherwise there are no figures.
//!
//! The attackers' threads yield to everybody else's (`renice`), for attackers have machines of their own: what they make the
//! server do is part of the figure, at the server's own priority; what they cost themselves is so as far as cores are idle.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use isthmus_proto::etcdserverpb::{
    RangeRequest, RangeResponse, WatchCreateRequest, WatchRequest, WatchResponse, watch_request::RequestUnion,
};
use tokio::{io::AsyncWriteExt, net::TcpStream, task::JoinSet};
use tokio_rustls::rustls::ClientConfig;

use crate::{
    fanout::{Load, connect, publish, watcher::Tally},
    figure::Figure,
    reader::Connection,
    servers::{Apiserver, Certificates, Etcd},
};

const WATCHERS: usize = 50;
const LOAD: Load = Load {
    events: 1500,
    per_second: 100,
};
/// Keys that are there to be listed, and what was changed before watchers from the first revision ask.
const KEYS: usize = 2000;
const STREAMS: usize = 128;
const WATCHES: usize = 100_000;
/// Streams that are reset together, 500 times a second.
const RESETS_AT_ONCE: usize = 8;
/// Clients that list all the time.
const LISTERS: usize = 2;
/// Connections that are opened a second, and left half-open.
const CONNECTIONS_PER_SECOND: u64 = 200;
const PATIENCE: Duration = Duration::from_secs(60);
/// What listers and the slow reader read.
const OTHER: &str = "cilium/state/other/";
const OTHER_END: &str = "cilium/state/other0";

/// How often each attacker got to its goal: so that a figure without attacks is noticed.
#[derive(Debug, Default)]
struct Attacks {
    streams: AtomicU64,
    watches: AtomicU64,
    lists: AtomicU64,
    half_open: AtomicU64,
    resets: AtomicU64,
    garbage: AtomicU64,
}

/// Measures.
pub fn run() -> Result<Vec<Figure>> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let certificates = Certificates::new()?;
    let (attacked, quiet) = runtime.block_on(measure(&certificates))?;
    runtime.shutdown_background();
    Ok(vec![Figure::beside(
        "hostile",
        "p99_vs_quiet",
        "ms",
        attacked,
        quiet,
        "the same server without attackers",
    )])
}

async fn measure(certificates: &Certificates) -> Result<(f64, f64)> {
    let etcd = Etcd::start(certificates).await?;
    let client = etcd.client().await?;
    let mut first = 0;
    for number in 0..KEYS {
        let put = client
            .clone()
            .put(format!("{OTHER}{number:05}"), vec![b'x'; 1000], None)
            .await?;
        let revision = put.header().context("no header")?.revision();
        first = if first == 0 { revision } else { first };
    }
    let server = Apiserver::start(certificates, &etcd).await?;
    let tally = Arc::new(Tally::new());
    let mut watchers = connect(certificates, server.address, WATCHERS, &tally).await?;
    let mut phase = async |load: Load| -> Result<f64> {
        let target = tally.delivered() + load.events * WATCHERS as u64;
        tally.forget_latencies();
        let deliveries = async {
            publish(&client, load, tally.epoch()).await?;
            tokio::time::timeout(PATIENCE, tally.wait_for(target))
                .await
                .with_context(|| format!("{} of {target} deliveries", tally.delivered()))
        };
        tokio::select! {
            done = deliveries => done?,
            Some(ended) = watchers.join_next() => ended.context("a watcher panicked")?.context("a watcher ended")?,
        }
        ensure!(
            tally.delivered() == target,
            "{} deliveries, not {target}",
            tally.delivered()
        );
        Ok(tally.latency_us(0.99) as f64 / 1e3)
    };
    phase(Load { events: 100, ..LOAD }).await?;
    let quiet = phase(LOAD).await?;
    let attacks = Arc::new(Attacks::default());
    let attackers = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .on_thread_start(yield_to_others)
        .build()?;
    let cpu = server.process.cpu_seconds()?;
    let config = certificates.client_config()?;
    attackers.spawn(attack(config, server.address, first, attacks.clone()));
    let attacked = phase(LOAD).await?;
    let rss_mib = server.process.rss_kib()? / 1024.0;
    let cpu = server.process.cpu_seconds()? - cpu;
    attackers.shutdown_background();
    eprintln!("hostile: {attacks:?}, the server: {rss_mib:.0} MiB, {cpu:.1} CPU seconds");
    ensure!(
        attacks.streams.load(Ordering::Relaxed) == STREAMS as u64
            && attacks.watches.load(Ordering::Relaxed) > 0
            && attacks.lists.load(Ordering::Relaxed) > 0
            && attacks.half_open.load(Ordering::Relaxed) > 0
            && attacks.resets.load(Ordering::Relaxed) > 0
            && attacks.garbage.load(Ordering::Relaxed) > 0,
        "not every attack took place: {attacks:?}"
    );
    Ok((attacked, quiet))
}

/// Gives the calling thread the lowest priority.
fn yield_to_others() {
    let thread = std::fs::read_link("/proc/thread-self").ok();
    let id = thread
        .as_deref()
        .and_then(|path| path.file_name())
        .map(|id| id.to_owned());
    let done = id.and_then(|id| {
        let mut renice = std::process::Command::new("renice");
        renice
            .args(["-n", "19", "-p"])
            .arg(id)
            .stdout(std::process::Stdio::null());
        renice.status().ok()
    });
    if !done.is_some_and(|status| status.success()) {
        eprintln!("hostile: renice does not work here; the attackers' own work is part of the figure");
    }
}

/// All attacks.
async fn attack(config: Arc<ClientConfig>, address: SocketAddr, first: i64, attacks: Arc<Attacks>) {
    let mut tasks = JoinSet::new();
    tasks.spawn(again(config.clone(), attacks.clone(), move |config, attacks| {
        read_nothing(config, address, first, attacks)
    }));
    tasks.spawn(again(config.clone(), attacks.clone(), move |config, attacks| {
        watch_everything(config, address, attacks)
    }));
    for _ in 0..LISTERS {
        tasks.spawn(again(config.clone(), attacks.clone(), move |config, attacks| {
            list_everything(config, address, attacks)
        }));
    }
    tasks.spawn(again(config.clone(), attacks.clone(), move |config, attacks| {
        reset(config, address, attacks)
    }));
    tasks.spawn(again(config, attacks, move |_, attacks| {
        leave_open(address, attacks)
    }));
    tasks.join_all().await;
}

/// An attacker that is thrown out comes back.
async fn again<F: Future<Output = Result<()>>>(
    config: Arc<ClientConfig>,
    attacks: Arc<Attacks>,
    mut attack: impl FnMut(Arc<ClientConfig>, Arc<Attacks>) -> F,
) {
    loop {
        // How it failed is of no interest here.
        let _ = attack(config.clone(), attacks.clone()).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn watch_request(start_revision: i64) -> WatchRequest {
    WatchRequest {
        request_union: Some(RequestUnion::CreateRequest(WatchCreateRequest {
            key: OTHER.into(),
            range_end: OTHER_END.into(),
            start_revision,
            ..Default::default()
        })),
    }
}

/// Opens streams that have megabytes to say, and reads none of them.
async fn read_nothing(
    config: Arc<ClientConfig>,
    address: SocketAddr,
    first: i64,
    attacks: Arc<Attacks>,
) -> Result<()> {
    let mut connection = Connection::open(config, address).await?;
    let mut streams = Vec::new();
    for _ in 0..STREAMS {
        let request = watch_request(first);
        streams.push(
            connection
                .begin("/etcdserverpb.Watch/Watch", &request, false)
                .await?,
        );
        attacks.streams.fetch_max(streams.len() as u64, Ordering::Relaxed);
    }
    std::future::pending().await
}

/// Asks for more watches than anybody needs.
async fn watch_everything(
    config: Arc<ClientConfig>,
    address: SocketAddr,
    attacks: Arc<Attacks>,
) -> Result<()> {
    let mut connection = Connection::open(config, address).await?;
    let mut answers = connection
        .call("/etcdserverpb.Watch/Watch", &watch_request(0), false)
        .await?;
    for _ in 0..WATCHES {
        answers.send(&watch_request(0)).await?;
        while answers.take::<WatchResponse>()?.is_some() {}
        answers.receive_ready().await?;
        attacks.watches.fetch_add(1, Ordering::Relaxed);
    }
    // It keeps what it got.
    loop {
        answers.next::<WatchResponse>().await?;
    }
}

/// Lists everything in one piece, again and again.
async fn list_everything(
    config: Arc<ClientConfig>,
    address: SocketAddr,
    attacks: Arc<Attacks>,
) -> Result<()> {
    let mut connection = Connection::open(config, address).await?;
    loop {
        let request = RangeRequest {
            key: OTHER.into(),
            range_end: OTHER_END.into(),
            ..Default::default()
        };
        let mut answers = connection.call("/etcdserverpb.KV/Range", &request, true).await?;
        answers.next::<RangeResponse>().await?;
        attacks.lists.fetch_add(1, Ordering::Relaxed);
    }
}

/// Opens streams and resets them a moment later.
async fn reset(config: Arc<ClientConfig>, address: SocketAddr, attacks: Arc<Attacks>) -> Result<()> {
    let mut connection = Connection::open(config, address).await?;
    // What is reset before it was sent is never sent.
    let mut ticks = tokio::time::interval(Duration::from_millis(2));
    let mut streams = Vec::new();
    loop {
        ticks.tick().await;
        attacks.resets.fetch_add(streams.len() as u64, Ordering::Relaxed);
        streams.clear();
        for _ in 0..RESETS_AT_ONCE {
            let request = watch_request(0);
            streams.push(
                connection
                    .begin("/etcdserverpb.Watch/Watch", &request, false)
                    .await?,
            );
        }
    }
}

/// Opens connections that say nothing, half of a handshake, or garbage.
async fn leave_open(address: SocketAddr, attacks: Arc<Attacks>) -> Result<()> {
    let mut held = std::collections::VecDeque::new();
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / CONNECTIONS_PER_SECOND as u32);
    for number in 0u64.. {
        ticks.tick().await;
        let mut tcp = TcpStream::connect(address).await?;
        match number % 3 {
            0 => {}
            1 => tcp.write_all(&[22, 3, 1, 2, 0, 1]).await?,
            _ => {
                tcp.write_all(&[0xff; 1024]).await?;
                attacks.garbage.fetch_add(1, Ordering::Relaxed);
            }
        }
        attacks.half_open.fetch_add(1, Ordering::Relaxed);
        held.push_back(tcp);
        if held.len() > 2000 {
            held.pop_front();
        }
    }
    Ok(())
}
