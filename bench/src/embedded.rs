//! Writing to the embedded store beside etcd, on the same disk, with the same clients and certificates: puts a second, how long
//! one takes, how long until a watch tells of it, and what 100,000 keys take on disk and in memory.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use etcd_client::{Client, Txn, TxnOp, WatchOptions};
use tokio::task::JoinSet;

use crate::{
    figure::Figure,
    servers::{Certificates, Etcd, Process, free_address, until_answered},
};

const PREFIX: &str = "cilium/state/ip/v1/default/";
const VALUE_LEN: usize = 256;
const CLIENTS: usize = 32;
const WINDOW: Duration = Duration::from_secs(5);
const WATCHED: usize = 300;
const KEYS: usize = 100_000;
/// What etcd allows in a transaction.
const TXN_PUTS: usize = 128;

/// Our API server with an embedded store.
struct Server {
    process: Process,
    address: std::net::SocketAddr,
    data: tempfile::TempDir,
}

impl Server {
    /// Starts it with an empty directory and waits until it answers.
    async fn start(certificates: &Certificates) -> Result<Self> {
        let data = tempfile::tempdir()?;
        let (address, admin) = (free_address()?, free_address()?);
        let program = std::env::current_exe()
            .context("where am I")?
            .with_file_name("isthmus-clustermesh-apiserver");
        let flag = |name: &str, value: &dyn std::fmt::Display| format!("--{name}={value}");
        let file = |file: &str| certificates.path(file).display().to_string();
        let mut command = std::process::Command::new(program);
        command.args([
            flag("cluster-name", &"bench"),
            flag("cluster-id", &1),
            flag("log-level", &"warn"),
            flag("store", &"embedded"),
            flag("data-dir", &data.path().display()),
            flag("listen", &address),
            flag("admin-listen", &admin),
            flag("tls-cert-file", &file("server.crt")),
            flag("tls-key-file", &file("server.key")),
            flag("tls-client-ca-file", &file("ca.crt")),
        ]);
        let hint = "build with `cargo build --release --workspace --bins`";
        let process = Process::spawn(&mut command, hint)?;
        until_answered("the API server", async || {
            let mut client = certificates.client(address).await?;
            anyhow::Ok(client.get("cilium/state/x", None).await?)
        })
        .await?;
        Ok(Self {
            process,
            address,
            data,
        })
    }
}

/// What was measured of one server.
struct Measured {
    puts_1: f64,
    puts_32: f64,
    p50_ms: f64,
    p99_ms: f64,
    watch_p50_ms: f64,
    watch_p99_ms: f64,
    disk_mib: f64,
    rss_mib: f64,
}

/// Measures both.
pub fn run() -> Result<Vec<Figure>> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let certificates = Certificates::new()?;
    let (ours, theirs) = runtime.block_on(async {
        let ours = {
            let server = Server::start(&certificates).await?;
            let rss = || server.process.rss_kib();
            measure(&certificates, server.address, server.data.path(), rss)
                .await
                .context("the API server")?
        };
        let etcd = Etcd::start(&certificates).await?;
        let rss = || etcd.process.rss_kib();
        let theirs = measure(&certificates, etcd.address, etcd.data(), rss)
            .await
            .context("etcd")?;
        anyhow::Ok((ours, theirs))
    })?;
    runtime.shutdown_background();
    let figure = |metric, unit, of: fn(&Measured) -> f64| {
        Figure::beside("embedded", metric, unit, of(&ours), of(&theirs), "etcd")
    };
    Ok(vec![
        figure("puts_per_s_1_client", "puts/s", |m| m.puts_1),
        figure("puts_per_s_32_clients", "puts/s", |m| m.puts_32),
        figure("put_p50_ms", "ms", |m| m.p50_ms),
        figure("put_p99_ms", "ms", |m| m.p99_ms),
        figure("put_to_watch_p50_ms", "ms", |m| m.watch_p50_ms),
        figure("put_to_watch_p99_ms", "ms", |m| m.watch_p99_ms),
        figure("disk_mib_100000_keys", "MiB", |m| m.disk_mib),
        figure("rss_mib_100000_keys", "MiB", |m| m.rss_mib),
    ])
}

async fn measure(
    certificates: &Certificates,
    address: std::net::SocketAddr,
    data: &std::path::Path,
    rss_kib: impl Fn() -> Result<f64>,
) -> Result<Measured> {
    let (watch_p50_ms, watch_p99_ms) = put_to_watch(certificates, address).await?;
    let one = puts(certificates, address, 1).await?;
    let (p50_ms, p99_ms) = percentiles(one.clone());
    let many = puts(certificates, address, CLIENTS).await?;
    let client = certificates.client(address).await?;
    fill(&client).await?;
    Ok(Measured {
        puts_1: one.len() as f64 / WINDOW.as_secs_f64(),
        puts_32: many.len() as f64 / WINDOW.as_secs_f64(),
        p50_ms,
        p99_ms,
        watch_p50_ms,
        watch_p99_ms,
        disk_mib: disk_bytes(data)? as f64 / (1024.0 * 1024.0),
        rss_mib: rss_kib()? / 1024.0,
    })
}

/// Puts, one after the other in each client, for a while; how long each took.
async fn puts(
    certificates: &Certificates,
    address: std::net::SocketAddr,
    clients: usize,
) -> Result<Vec<Duration>> {
    let mut tasks = JoinSet::new();
    let end = Instant::now() + WINDOW;
    for number in 0..clients {
        let mut client = certificates.client(address).await?;
        tasks.spawn(async move {
            let mut took = Vec::new();
            while Instant::now() < end {
                let begun = Instant::now();
                // 1,000 keys, written again and again.
                let key = format!("{PREFIX}{:07}", number * 1000 + took.len() % 1000);
                client.put(key, vec![b'x'; VALUE_LEN], None).await?;
                took.push(begun.elapsed());
            }
            anyhow::Ok(took)
        });
    }
    let mut all = Vec::new();
    while let Some(took) = tasks.join_next().await {
        all.extend(took??);
    }
    Ok(all)
}

/// From a put's call to its event.
async fn put_to_watch(certificates: &Certificates, address: std::net::SocketAddr) -> Result<(f64, f64)> {
    let client = certificates.client(address).await?;
    let mut watcher = certificates.client(address).await?;
    let options = WatchOptions::new().with_prefix();
    let mut stream = watcher.watch(PREFIX, Some(options)).await?;
    let mut took = Vec::new();
    for number in 0..WATCHED {
        let begun = Instant::now();
        let mut writer = client.clone();
        let put = tokio::spawn(async move {
            writer
                .put(format!("{PREFIX}watched"), vec![b'x'; VALUE_LEN], None)
                .await
        });
        // The first answer only says that there is a watch.
        let response = loop {
            let response = stream.message().await?.context("the watch ended")?;
            if !response.events().is_empty() {
                break response;
            }
        };
        took.push(begun.elapsed());
        ensure!(response.events().len() == 1, "put {number}: not one event");
        put.await??;
    }
    client.clone().delete(format!("{PREFIX}watched"), None).await?;
    Ok(percentiles(took))
}

async fn fill(client: &Client) -> Result<()> {
    let value = "x".repeat(VALUE_LEN);
    for begin in (0..KEYS).step_by(TXN_PUTS) {
        let puts = (begin..KEYS.min(begin + TXN_PUTS))
            .map(|number| TxnOp::put(format!("{PREFIX}{number:07}"), &*value, None));
        let txn = Txn::new().and_then(puts.collect::<Vec<_>>());
        client.clone().txn(txn).await?;
    }
    Ok(())
}

/// 50th and 99th, in milliseconds.
fn percentiles(mut took: Vec<Duration>) -> (f64, f64) {
    took.sort_unstable();
    let at = |share: f64| {
        let index = (took.len() as f64 * share) as usize;
        let took = took.get(index.min(took.len().saturating_sub(1)));
        took.map_or(0.0, Duration::as_secs_f64) * 1000.0
    };
    (at(0.5), at(0.99))
}

/// Bytes that are taken on disk below `path`.
fn disk_bytes(path: &std::path::Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut bytes = 0;
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += if metadata.is_dir() {
            disk_bytes(&entry.path())?
        } else {
            metadata.blocks() * 512
        };
    }
    Ok(bytes)
}
