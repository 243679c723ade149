//! `fanout`: what a delivery to a watcher costs the server, beside etcd with the same certificates, load and readers.
//!
//! In: how many watchers. Each has a connection of its own, mutual TLS, and one watch on the same prefix. Values of 200 bytes
//! are put at a steady 100 a second, then 2,000 within a second (fewer, if there are more than 500 watchers). Out: the server process' CPU time for each delivered event,
//! its resident memory for each watcher, and how long an event takes from just before its put until a watcher has it.
//!
//! Every watcher must get every event, once and in order; otherwise there are no figures. Ours follows an etcd, whose CPU
//! time is not counted but whose time to commit is part of the latency. Readers share the cores with the servers, so the
//! latencies under load are those of the whole machine. Beside both, the floor: one thread that writes the same bytes to as
//! many TLS connections with blocking calls.

mod floor;
pub(crate) mod watcher;

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use etcd_client::Client;
use tokio::task::JoinSet;

use crate::{
    figure::Figure,
    servers::{Apiserver, Certificates, Etcd, Process},
};
use watcher::Tally;

/// Bytes of a value.
const VALUE_LEN: usize = 200;
const KEYS: u64 = 100;
/// So many watchers the loads are made for.
const WATCHERS: u64 = 500;
const STEADY: Load = Load {
    events: 600,
    per_second: 100,
};
const BURST: Load = Load {
    events: 2_000,
    per_second: 2_000,
};
/// Puts on their way at once.
const PUTS_MAX: usize = 256;
/// Connections that are being made at once.
const CONNECTING_MAX: usize = 32;
/// Making the connections, or delivering what was put, takes no longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is put.
#[derive(Clone, Copy)]
pub(crate) struct Load {
    /// So many events,
    pub(crate) events: u64,
    /// at this rate.
    pub(crate) per_second: u64,
}

impl Load {
    /// With more watchers than `WATCHERS` there are fewer events: deliveries a second stay what two cores can make.
    fn among(self, watchers: usize) -> Self {
        let share = |number: u64| (number * WATCHERS / WATCHERS.max(watchers as u64)).max(1);
        Self {
            events: share(self.events),
            per_second: share(self.per_second),
        }
    }
}

/// What was measured of one server.
struct Measured {
    steady_us: f64,
    burst_us: f64,
    rss_kib: f64,
    p99_ms: f64,
}

/// Measures with `watchers` watchers.
pub fn run(watchers: usize) -> Result<Vec<Figure>> {
    ensure!(watchers > 0, "--watchers is 0: it takes at least 1");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let certificates = Certificates::new()?;
    let (floor, ours, theirs) = runtime.block_on(async {
        let floor = floor::measure(&certificates, watchers)
            .await
            .context("the floor")?;
        let ours = {
            let etcd = Etcd::start(&certificates).await?;
            let server = Apiserver::start(&certificates, &etcd).await?;
            let (process, address) = (&server.process, server.address);
            measure(&certificates, process, address, &etcd, watchers)
                .await
                .context("the API server")?
        };
        // Said already, for with thousands of watchers etcd may not come to an end.
        eprintln!(
            "fanout: {watchers} watchers, ours: {:.2} us steady, {:.2} us burst, {:.1} KiB a watcher, p99 {:.1} ms",
            ours.steady_us, ours.burst_us, ours.rss_kib, ours.p99_ms
        );
        let etcd = Etcd::start(&certificates).await?;
        let theirs = measure(&certificates, &etcd.process, etcd.address, &etcd, watchers).await;
        if let Err(error) = &theirs {
            // Ours are figures all the same.
            eprintln!("fanout: etcd failed, so there are none of it: {error:#}");
        }
        let theirs = theirs.ok();
        anyhow::Ok((floor, ours, theirs))
    })?;
    runtime.shutdown_background();
    let beside = |metric, unit, ours, peer, name| Figure::beside("fanout", metric, unit, ours, peer, name);
    let figure = |metric, unit, of: fn(&Measured) -> f64| match &theirs {
        Some(theirs) => beside(metric, unit, of(&ours), of(theirs), "etcd"),
        None => Figure::alone("fanout", metric, unit, of(&ours)),
    };
    let broadcast = "bare TLS broadcast";
    Ok(vec![
        figure("cpu_us_per_delivery_steady", "us", |of| of.steady_us),
        beside(
            "cpu_us_per_delivery_steady_floor",
            "us",
            ours.steady_us,
            floor.steady_us,
            broadcast,
        ),
        figure("cpu_us_per_delivery_burst", "us", |of| of.burst_us),
        beside(
            "cpu_us_per_delivery_burst_floor",
            "us",
            ours.burst_us,
            floor.burst_us,
            broadcast,
        ),
        figure("rss_kib_per_watcher", "KiB", |of| of.rss_kib),
        figure("p99_ms", "ms", |of| of.p99_ms),
    ])
}

async fn measure(
    certificates: &Certificates,
    process: &Process,
    address: SocketAddr,
    etcd: &Etcd,
    watchers: usize,
) -> Result<Measured> {
    let before = process.rss_kib()?;
    let tally = Arc::new(Tally::new());
    let mut connections = connect(certificates, address, watchers, &tally).await?;
    let client = etcd.client().await?;
    let mut phase = async |load: Load| -> Result<f64> {
        let (cpu, target) = (
            process.cpu_seconds()?,
            tally.delivered() + load.events * watchers as u64,
        );
        tally.forget_latencies();
        let deliveries = async {
            publish(&client, load, tally.epoch()).await?;
            tally.wait_for(target).await;
            anyhow::Ok(())
        };
        tokio::select! {
            done = tokio::time::timeout(PATIENCE, deliveries) => done.with_context(|| {
                format!("{} of {target} deliveries after {PATIENCE:?}", tally.delivered())
            })??,
            Some(ended) = connections.join_next() => {
                ended.context("a watcher panicked")?.context("a watcher ended")?;
            }
        }
        ensure!(
            tally.delivered() == target,
            "{} deliveries, not {target}",
            tally.delivered()
        );
        Ok((process.cpu_seconds()? - cpu) * 1e6 / (load.events * watchers as u64) as f64)
    };
    // Once around, so that nobody's first buffers are counted as CPU of a delivery.
    phase(Load {
        events: 20,
        ..STEADY.among(watchers)
    })
    .await?;
    let steady_us = phase(STEADY.among(watchers)).await?;
    let rss_kib = (process.rss_kib()? - before) / watchers as f64;
    let p99_ms = tally.latency_us(0.99) as f64 / 1e3;
    let burst_us = phase(BURST.among(watchers)).await?;
    Ok(Measured {
        steady_us,
        burst_us,
        rss_kib,
        p99_ms,
    })
}

/// Makes the watchers; each is a task that ends only with an error.
pub(crate) async fn connect(
    certificates: &Certificates,
    address: SocketAddr,
    watchers: usize,
    tally: &Arc<Tally>,
) -> Result<JoinSet<Result<()>>> {
    let config = certificates.client_config()?;
    let mut tasks = JoinSet::new();
    let mut connecting = JoinSet::new();
    let all = async {
        for number in 0..watchers {
            if number >= CONNECTING_MAX {
                let watcher: Result<watcher::Watcher> = connecting.join_next().await.context("none")??;
                tasks.spawn(watcher?.run(tally.clone()));
            }
            connecting.spawn(watcher::Watcher::connect(config.clone(), address));
        }
        while let Some(watcher) = connecting.join_next().await {
            tasks.spawn(watcher??.run(tally.clone()));
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(PATIENCE, all)
        .await
        .with_context(|| format!("the watchers are not connected after {PATIENCE:?}"))??;
    Ok(tasks)
}

/// Puts `load`; each value begins with the time since `epoch`.
pub(crate) async fn publish(client: &Client, load: Load, epoch: Instant) -> Result<()> {
    let begun = tokio::time::Instant::now();
    let mut puts = JoinSet::new();
    for number in 0..load.events {
        tokio::time::sleep_until(begun + Duration::from_micros(number * 1_000_000 / load.per_second)).await;
        if puts.len() >= PUTS_MAX {
            puts.join_next().await.context("none")???;
        }
        let mut client = client.clone();
        puts.spawn(async move {
            let key = format!("{}{}", watcher::PREFIX, number % KEYS);
            client.put(key, value(epoch), None).await?;
            anyhow::Ok(())
        });
    }
    while let Some(put) = puts.join_next().await {
        put??;
    }
    Ok(())
}

fn value(epoch: Instant) -> String {
    format!(
        "{:020}{:x>width$}",
        epoch.elapsed().as_nanos(),
        "",
        width = VALUE_LEN - 20
    )
}
