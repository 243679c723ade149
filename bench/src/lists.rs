//! `lists`: many keys, listed in pages by many clients at once, beside etcd with the same certificates and readers.
//!
//! In: how many keys; values of 200 bytes. Out: keys a second over all clients, and the resident memory that the keys take,
//! divided by the bytes of keys and values and 64 for each: in our store alone, and in the whole server process, which has
//! just received them.
//!
//! Each client has a connection of its own, mutual TLS, and lists everything once in pages of 256 at the revision of its first
//! page, as Cilium's readers do. So that a list which is cut off says as much as a whole one, clients begin at places that
//! are spread evenly over the keys, and go round. Both servers hold the same etcd's content; they take turns.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use etcd_client::{Client, Txn, TxnOp};
use isthmus_clustermesh_apiserver::store::{HistoryLimits, Relist, SourceChange, Store, SubId};
use isthmus_model::ClusterName;
use isthmus_proto::etcdserverpb::{RangeRequest, RangeResponse};
use tokio::task::JoinSet;
use tokio_rustls::rustls::ClientConfig;

use crate::{
    figure::Figure,
    reader::Connection,
    servers::{Apiserver, Certificates, Etcd, rss_kib},
};

const CLIENTS: usize = 50;
const PAGE: i64 = 256;
const VALUE_LEN: usize = 200;
/// Beside its key and value, an entry may take this before the ratio counts it.
const ENTRY_LEN: usize = 64;
/// Listing is cut off after so long.
const WINDOW: Duration = Duration::from_secs(20);
const PREFIX: &str = "cilium/state/ip/v1/default/";
const PREFIX_END: &str = "cilium/state/ip/v1/default0";
/// What etcd allows in a transaction.
const TXN_PUTS: usize = 128;
const TXNS_MAX: usize = 16;

/// Measures with `keys` keys.
pub fn run(keys: usize) -> Result<Vec<Figure>> {
    ensure!(
        (CLIENTS..10_000_000).contains(&keys),
        "--keys is {keys}: it takes {CLIENTS} to 9,999,999"
    );
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let figures = runtime.block_on(measure(keys));
    runtime.shutdown_background();
    figures
}

async fn measure(keys: usize) -> Result<Vec<Figure>> {
    // First, before this process has memory to give back.
    let store_kib = store_kib(keys)?;
    let certificates = Certificates::new()?;
    let config = certificates.client_config()?;
    let etcd = Etcd::start(&certificates).await?;
    let empty = Apiserver::start(&certificates, &etcd).await?.process.rss_kib()?;
    let etcd_empty = etcd.process.rss_kib()?;
    let bytes = fill(&etcd.client().await?, keys).await.context("filling etcd")?;
    let ratio = |kib: f64| kib * 1024.0 / (bytes + keys * ENTRY_LEN) as f64;
    let their_ratio = ratio(etcd.process.rss_kib()? - etcd_empty);
    let theirs = list(&config, etcd.address, keys).await.context("etcd")?;
    let server = Apiserver::start(&certificates, &etcd).await?;
    let our_process_ratio = ratio(server.process.rss_kib()? - empty);
    let ours = list(&config, server.address, keys)
        .await
        .context("the API server")?;
    Ok(vec![
        Figure::beside("lists", "keys_per_s", "keys/s", ours, theirs, "etcd"),
        Figure::beside(
            "lists",
            "store_bytes_ratio",
            "ratio",
            ratio(store_kib),
            their_ratio,
            "etcd process",
        ),
        Figure::beside(
            "lists",
            "process_bytes_ratio",
            "ratio",
            our_process_ratio,
            their_ratio,
            "etcd process",
        ),
    ])
}

/// Memory that our store takes for the keys: alone in a process, without the buffers in which a list arrives.
fn store_kib(keys: usize) -> Result<f64> {
    let history = HistoryLimits {
        len: 1,
        bytes: 1,
        age: HistoryLimits::AGE,
    };
    let mut store = Store::new(ClusterName::new("bench")?, 1, history, history);
    let list = Relist {
        cluster_id: 2,
        revision: 1,
        new_history: true,
        changes: vec![],
        present: None,
    };
    store.relist(&SubId::Own, list);
    let before = rss_kib("self")?;
    for number in 0..keys {
        let revision = number as i64 + 2;
        let put = SourceChange::Put {
            key: key(number).into(),
            value: vec![b'x'; VALUE_LEN].into(),
            create_revision: revision,
            mod_revision: revision,
            version: 1,
        };
        store.apply(&SubId::Own, revision, vec![put]);
    }
    let kib = rss_kib("self")? - before;
    let status = store.status(&SubId::Own).context("no sub-store")?;
    ensure!(
        status.keys == keys,
        "the store has {} keys, not {keys}",
        status.keys
    );
    Ok(kib)
}

fn key(number: usize) -> String {
    format!("{PREFIX}{number:07}")
}

/// Returns the bytes of all keys and values.
async fn fill(client: &Client, keys: usize) -> Result<usize> {
    let mut txns = JoinSet::new();
    let value = "x".repeat(VALUE_LEN);
    for begin in (0..keys).step_by(TXN_PUTS) {
        if txns.len() >= TXNS_MAX {
            let done: Result<()> = txns.join_next().await.context("none")??;
            done?;
        }
        let puts = (begin..keys.min(begin + TXN_PUTS)).map(|number| TxnOp::put(key(number), &*value, None));
        let (mut client, txn) = (client.clone(), Txn::new().and_then(puts.collect::<Vec<_>>()));
        txns.spawn(async move {
            client.txn(txn).await?;
            Ok(())
        });
    }
    while let Some(done) = txns.join_next().await {
        done??;
    }
    Ok(keys * (key(0).len() + VALUE_LEN))
}

/// Keys a second, over all clients.
async fn list(config: &Arc<ClientConfig>, address: SocketAddr, keys: usize) -> Result<f64> {
    let mut clients = Vec::with_capacity(CLIENTS);
    for _ in 0..CLIENTS {
        clients.push(Connection::open(config.clone(), address).await?);
    }
    let begun = Instant::now();
    let mut lists = JoinSet::new();
    for (number, client) in clients.into_iter().enumerate() {
        lists.spawn(list_once(client, number * keys / CLIENTS, keys, begun + WINDOW));
    }
    let mut listed = 0;
    while let Some(count) = lists.join_next().await {
        listed += count??;
    }
    Ok(listed as f64 / begun.elapsed().as_secs_f64())
}

/// Lists all keys from number `first` on, then those before it. Returns how many it got until `deadline`.
async fn list_once(mut client: Connection, first: usize, keys: usize, deadline: Instant) -> Result<usize> {
    let (mut revision, mut listed) = (0, 0);
    for (mut from, end, want) in [
        (key(first), PREFIX_END.to_owned(), keys - first),
        (PREFIX.to_owned(), key(first), first),
    ] {
        let mut part = 0;
        while part < want {
            if Instant::now() > deadline {
                return Ok(listed);
            }
            let request = RangeRequest {
                key: from.clone().into(),
                range_end: end.clone().into(),
                limit: PAGE,
                revision,
                ..Default::default()
            };
            let mut responses = client.call("/etcdserverpb.KV/Range", &request, true).await?;
            let page: RangeResponse = responses.next().await?;
            revision = page.header.context("no header")?.revision;
            let last = page.kvs.last().context("an empty page before the end")?;
            ensure!(
                page.count as usize == want - part,
                "{} keys are left, not {}",
                page.count,
                want - part
            );
            ensure!(
                page.kvs[0].key == key((listed + first) % keys),
                "a page begins elsewhere"
            );
            from = format!("{}\0", std::str::from_utf8(&last.key)?);
            part += page.kvs.len();
            listed += page.kvs.len();
        }
        ensure!(part == want, "{part} keys, not {want}");
    }
    Ok(listed)
}
