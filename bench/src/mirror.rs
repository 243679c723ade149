//! `mirror`: an API server that mirrors 250 remote clusters: how soon it has them, what they cost it, how soon it passes a
//! change on, and what it sends again after it was killed.
//!
//! In: nothing; a seed makes the clusters, in the shape of Cilium's nightly scale test of clustermesh: 100 nodes, 1,000
//! endpoints and 100 identities each; nodes change 0.1, endpoints once and identities 0.2 times a second, 325 changes a second in
//! all. Each cluster has a server of its own, in this process. Out: seconds from the start of the server process until all are
//! synced, as its status keys say, beside a bare client that lists the same sources at once and keeps nothing; memory; CPU
//! time; latencies; and after SIGKILL of a server with 1,000 readers, the bytes that the next one sends until all are in step,
//! divided by what their first lists took. Nothing may be refused, and every change must come through; otherwise there are no figures.
//!
//! The clusters, the readers and the server share the machine's cores.

mod agents;
mod mock;
mod population;
mod sources;
mod view;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use isthmus_runtime::CancellationToken;

use crate::{
    figure::Figure,
    servers::{Apiserver, Certificates, Place},
};
use agents::Agents;
use mock::Mock;
use view::Watcher;

/// Common name that a mirror shows to remote clusters.
const REMOTE: &str = "remote";
/// Common name of the agents of cluster `bench`.
const AGENT: &str = "local-bench";
const SEED: u64 = 20_250_707;
/// Readers of the server that is killed.
const READERS: usize = 1000;
/// Changes that latency and CPU time are measured over: 20 seconds.
const CHANGES: usize = 6500;
/// Changes go on for so long before the server is killed.
const BEFORE_KILL: Duration = Duration::from_secs(5);

/// Measures with so many clusters.
pub fn run(clusters: u32) -> Result<Vec<Figure>> {
    ensure!(
        (1..=253).contains(&clusters),
        "--clusters is {clusters}: it takes 1 to 253"
    );
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let figures = runtime.block_on(measure(clusters));
    runtime.shutdown_background();
    figures
}

async fn measure(clusters: u32) -> Result<Vec<Figure>> {
    let certificates = Certificates::new()?;
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    let mocks = mock::start_all(clusters, SEED, &certificates, &stop).await?;
    let entries: usize = mocks.iter().map(|mock| mock.keys).sum();
    let bytes: usize = mocks.iter().map(|mock| mock.bytes).sum();
    eprintln!("mirror: {clusters} clusters, {entries} keys, {bytes} bytes");
    let remote = certificates.client_config_of(REMOTE)?;
    let floor_s = sources::list_all(&mocks, &remote)
        .await
        .context("the bare client")?;

    let place = Place::embedded()?;
    for mock in &*mocks {
        place.configure_remote(mock.name.as_str(), &mock.file(&certificates))?;
    }
    let begun = Instant::now();
    let server = Apiserver::spawn(&certificates, &place)?;
    let config = certificates.client_config()?;
    view::until_synced(&mocks, &config, place.address).await?;
    let cold_s = begun.elapsed().as_secs_f64();
    let cold_cpu_s = server.process.cpu_seconds()?;
    let rss_kib = server.process.rss_kib()?;
    eprintln!(
        "mirror: synced in {cold_s:.2} s ({cold_cpu_s:.2} s of CPU), {:.1} MiB; a bare client {floor_s:.2} s",
        rss_kib / 1024.0
    );
    let mut figures = vec![
        beside("cold_sync_s", "s", cold_s, floor_s, "a bare client"),
        alone("cold_sync_cpu_s", "s", cold_cpu_s),
        alone("rss_mib", "MiB", rss_kib / 1024.0),
        beside(
            "bytes_per_entry",
            "bytes",
            rss_kib * 1024.0 / entries as f64,
            bytes as f64 / entries as f64,
            "keys and values",
        ),
    ];
    figures.extend(
        steady(&mocks, &server, &certificates, &place)
            .await
            .context("steady changes")?,
    );
    figures.extend(
        resume(&mocks, server, &certificates, &place)
            .await
            .context("the restart")?,
    );
    Ok(figures)
}

async fn steady(
    mocks: &Arc<Vec<Mock>>,
    server: &Apiserver,
    certificates: &Certificates,
    place: &Place,
) -> Result<Vec<Figure>> {
    let mut watcher = Watcher::start(mocks.clone(), &certificates.client_config()?, place.address).await?;
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    let churn = tokio::spawn(mock::churn(mocks.clone(), stop.clone()));
    // The first second is left out.
    watcher.events(325).await?;
    let (cpu, begun) = (server.process.cpu_seconds()?, Instant::now());
    let latencies = watcher.events(CHANGES).await?;
    let cpu = (server.process.cpu_seconds()? - cpu) / begun.elapsed().as_secs_f64();
    stop.cancel();
    churn.await??;
    let made: usize = mocks.iter().map(Mock::changes).sum();
    watcher.events(made - 325 - CHANGES).await.context("the rest")?;
    let ms = |part: f64| {
        let index = (latencies.len() as f64 * part) as usize;
        latencies[index.min(latencies.len() - 1)].as_secs_f64() * 1e3
    };
    Ok(vec![
        alone("cpu_share", "cores", cpu),
        alone("propagation_p50_ms", "ms", ms(0.5)),
        alone("propagation_p99_ms", "ms", ms(0.99)),
        // Else there were no figures.
        alone("lost", "changes", 0.0),
    ])
}

async fn resume(
    mocks: &Arc<Vec<Mock>>,
    server: Apiserver,
    certificates: &Certificates,
    place: &Place,
) -> Result<Vec<Figure>> {
    let before = view::sent_bytes(place.admin).await?;
    let agents = Agents::start(READERS, mocks, certificates, place.address)?;
    agents.until(true).await?;
    let full = view::sent_bytes(place.admin).await? - before;
    let lists = agents.lists();
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    let churn = tokio::spawn(mock::churn(mocks.clone(), stop.clone()));
    tokio::time::sleep(BEFORE_KILL).await;
    let changed = agents.changed_bytes();
    let begun = Instant::now();
    drop(server);
    agents.until(false).await?;
    let _server = Apiserver::spawn(certificates, place)?;
    let half = async {
        while agents.synced() < READERS / 2 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        begun.elapsed().as_secs_f64()
    };
    let (half_s, all) = tokio::join!(half, agents.until(true));
    all?;
    let seconds = begun.elapsed().as_secs_f64();
    let sent = view::sent_bytes(place.admin).await?;
    let changed = agents.changed_bytes() - changed;
    let relists = agents.lists() - lists;
    stop.cancel();
    churn.await??;
    agents.end().await;
    eprintln!(
        "mirror: {READERS} readers: {full} bytes of lists; after a restart {sent} bytes, {relists} lists, {changed} bytes of changes, half in step after {half_s:.2} s, all after {seconds:.2} s"
    );
    Ok(vec![
        beside(
            "resent_ratio",
            "ratio",
            sent / full,
            changed / full,
            "changes meanwhile",
        ),
        alone("relists", "lists", relists as f64),
        alone("resume_s", "s", seconds),
    ])
}

fn beside(metric: &'static str, unit: &'static str, ours: f64, peer: f64, name: &'static str) -> Figure {
    Figure::beside("mirror", metric, unit, ours, peer, name)
}

fn alone(metric: &'static str, unit: &'static str, ours: f64) -> Figure {
    Figure::alone("mirror", metric, unit, ours)
}
