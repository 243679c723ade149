//! The embedded store: writes answered as etcd answers them, kept through kills, and refused to everybody but the operator.

mod disk;
mod edges;
mod kills;

use std::time::Duration;

use etcd_client::{
    Client, DeleteOptions, Error, GetOptions, LeaseTimeToLiveOptions, PutOptions, Txn, TxnOp, WatchOptions,
    WatchStream,
};
use isthmus_kvstore::Feed;
use rand::{SeedableRng, rngs::StdRng};

use crate::{
    lab::{Apiserver, Etcd, Pki, Publisher, View, embedded},
    script::{PREFIX, Script, Step, told},
};

/// A watch and what it has told: each event, and why it ended if it did.
struct Watching {
    stream: WatchStream,
    told: Vec<String>,
    seen: i64,
}

impl Watching {
    async fn start(client: &mut Client, start: i64) -> Self {
        let options = WatchOptions::new().with_prefix().with_start_revision(start);
        Self {
            stream: client.watch(PREFIX, Some(options)).await.unwrap(),
            told: Vec::new(),
            seen: 0,
        }
    }

    /// Takes what there is up to revision `end`, which has an event.
    async fn until(&mut self, end: i64) {
        let collect = async {
            while self.seen < end {
                let response = self.stream.message().await.unwrap().expect("the stream goes on");
                if response.canceled() {
                    self.told
                        .push(format!("compacted at {}", response.compact_revision()));
                    return;
                }
                for event in response.events() {
                    self.told.push(told(Ok(event)));
                    self.seen = event.kv().unwrap().mod_revision();
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(60), collect)
            .await
            .expect("the events come");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_answers_every_call_as_etcd_does() {
    let (pki, data) = (Pki::new(), tempfile::tempdir().unwrap());
    for seed in 0..4 {
        let etcd = Etcd::start().await;
        let config = embedded("c1", 1, &data.path().join(seed.to_string()), &pki);
        let mut server = Apiserver::start(config).await;
        let mut theirs = etcd.client().await.unwrap();
        let mut ours = pki.client(server.address, "admin-c1").await;
        let mut script = Script {
            random: StdRng::seed_from_u64(seed),
            revision: 1,
        };
        let mut watches = vec![];
        let mut compacted = 1;
        for number in 0..400 {
            if number == 200 {
                // What was stored is there again, revisions and leases included.
                drop((ours, std::mem::take(&mut watches)));
                server = Apiserver::start(server.stop().await).await;
                ours = pki.client(server.address, "admin-c1").await;
            }
            if number % 50 == 0 {
                let start = if number % 200 == 0 { 0 } else { script.revision - 6 };
                let start = start.max(compacted + 1);
                let mut pair = vec![];
                for client in [&mut theirs, &mut ours] {
                    let mut watching = Watching::start(client, start).await;
                    if start <= script.revision {
                        // Before a compaction can overtake it.
                        watching.until(script.revision).await;
                    }
                    pair.push(watching);
                }
                watches.push(pair);
            }
            let step = script.step();
            let [want, got] = [
                step.clone().run(&mut theirs).await,
                step.clone().run(&mut ours).await,
            ];
            assert_eq!(got, want, "seed {seed}, step {number}: {step:?}");
            if let Step::Compact(at) = step
                && !want.contains("OutOfRange")
            {
                compacted = at;
            }
            let header = theirs.get("x", None).await.unwrap();
            script.revision = header.header().unwrap().revision();
        }
        for client in [&mut theirs, &mut ours] {
            client.put(format!("{PREFIX}z"), "end", None).await.unwrap();
        }
        let end = script.revision + 1;
        for (index, mut pair) in watches.into_iter().enumerate() {
            for watching in &mut pair {
                watching.until(end).await;
            }
            assert_eq!(pair[1].told, pair[0].told, "seed {seed}, watch {index}");
        }
        // Old revisions and watches from before the compaction end alike.
        for back in 0..20 {
            let options = GetOptions::new().with_prefix().with_revision((end - back).max(1));
            let [want, got] = [
                theirs.get(PREFIX, Some(options.clone())).await,
                ours.get(PREFIX, Some(options)).await,
            ];
            let kvs = |answer: Result<etcd_client::GetResponse, Error>| {
                told(answer.map(|answer| answer.kvs().to_vec()))
            };
            assert_eq!(kvs(got), kvs(want), "seed {seed}, {back} back");
        }
        let at = (end - 3).max(compacted + 1);
        for client in [&mut theirs, &mut ours] {
            client.compact(at, None).await.unwrap();
        }
        for start in [1, at - 1, at, at + 1] {
            let mut pair = vec![];
            for client in [&mut theirs, &mut ours] {
                let mut watching = Watching::start(client, start).await;
                watching.until(end).await;
                // This etcd forgets deletions at the compacted revision itself; newer ones tell them, as ours does.
                let forgotten = format!("mod_revision: {at},");
                let told = watching.told.into_iter();
                let told = told.filter(|event| !(event.contains("Delete") && event.contains(&forgotten)));
                pair.push(told.collect::<Vec<_>>());
            }
            assert_eq!(
                pair[1], pair[0],
                "seed {seed}, watch from {start}, compacted at {at}"
            );
        }
        drop((ours, theirs));
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_end_and_take_their_keys_along() {
    let (pki, data) = (Pki::new(), tempfile::tempdir().unwrap());
    let server = Apiserver::start(embedded("c1", 1, data.path(), &pki)).await;
    let mut client = pki.client(server.address, "admin-c1").await;
    let lease = client.lease_grant(1, None).await.unwrap();
    // As etcd does.
    assert_eq!(lease.ttl(), 2);
    let kept = client.lease_grant(2, None).await.unwrap().id();
    let with = |lease| Some(PutOptions::new().with_lease(lease));
    for (key, lease) in [("a", lease.id()), ("b", lease.id()), ("c", kept), ("d", 0)] {
        client
            .put(format!("{PREFIX}{key}"), "1", with(lease))
            .await
            .unwrap();
    }
    // Written again without it, a key outlives its lease.
    client.put(format!("{PREFIX}b"), "2", None).await.unwrap();
    let options = Some(LeaseTimeToLiveOptions::new().with_keys());
    let info = client.lease_time_to_live(lease.id(), options).await.unwrap();
    assert_eq!((info.granted_ttl(), info.keys().len()), (2, 1));
    let (mut keeper, mut answers) = client.lease_keep_alive(kept).await.unwrap();
    let revision = client.get("x", None).await.unwrap().header().unwrap().revision();
    let gone = async {
        while client.get(format!("{PREFIX}a"), None).await.unwrap().count() > 0 {
            keeper.keep_alive().await.unwrap();
            assert_eq!(answers.message().await.unwrap().unwrap().ttl(), 2);
        }
    };
    tokio::time::timeout(Duration::from_secs(60), gone)
        .await
        .expect("the lease ends");
    let answer = client
        .get(PREFIX, Some(GetOptions::new().with_prefix()))
        .await
        .unwrap();
    assert_eq!(
        (answer.count(), answer.header().unwrap().revision()),
        (3, revision + 1)
    );
    assert_eq!(
        client.lease_time_to_live(lease.id(), None).await.unwrap().ttl(),
        -1
    );
    assert_eq!(client.leases().await.unwrap().leases().len(), 1);
    // A lease is there again after a restart.
    let server = Apiserver::start(server.stop().await).await;
    let mut client = pki.client(server.address, "admin-c1").await;
    let options = Some(LeaseTimeToLiveOptions::new().with_keys());
    let info = client.lease_time_to_live(kept, options).await.unwrap();
    assert_eq!(info.keys(), [format!("{PREFIX}c").into_bytes()]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_but_the_operator_writes_and_nobody_writes_what_is_mirrored() {
    let (pki, data) = (Pki::new(), tempfile::tempdir().unwrap());
    let server = Apiserver::start(embedded("c1", 1, data.path(), &pki)).await;
    let denied = "PermissionDenied: etcdserver: permission denied";
    for name in ["local-c1", "remote", "remote-c2", "admin-c2", "admin"] {
        let mut client = pki.client(server.address, name).await;
        let key = format!("{PREFIX}a");
        let txn = Txn::new().and_then([TxnOp::put(key.clone(), "1", None)]);
        for answer in [
            told(client.put(key.clone(), "1", None).await),
            told(client.delete(key.clone(), None).await),
            told(client.txn(txn).await),
            told(client.compact(1, None).await),
        ] {
            assert_eq!(answer, denied, "{name}");
        }
    }
    let mut client = pki.client(server.address, "admin-c1").await;
    for key in [
        "cilium/cache/nodes/v1/c2/n",
        "cilium/cluster-config/c2",
        "isthmus/status/v1/remotes/c2",
    ] {
        assert_eq!(told(client.put(key, "1", None).await), denied, "{key}");
        let nested = Txn::new().or_else([TxnOp::delete(key, None)]);
        let txn = Txn::new().and_then([TxnOp::txn(nested)]);
        assert_eq!(told(client.txn(txn).await), denied, "{key}");
    }
    let everything = Some(DeleteOptions::new().with_prefix());
    assert_eq!(told(client.delete("cilium/", everything).await), denied);
    let revision = client.get("x", None).await.unwrap().header().unwrap().revision();
    assert_eq!(revision, 1);
    client.put("cilium/cluster-config/c1", "1", None).await.unwrap();
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_of_writes_shares_few_flushes() {
    let (pki, data) = (Pki::new(), tempfile::tempdir().unwrap());
    let server = Apiserver::start(embedded("c1", 1, data.path(), &pki)).await;
    let client = pki.client(server.address, "admin-c1").await;
    let puts = (0..400).map(|number| {
        let mut client = client.clone();
        tokio::spawn(async move { client.put(format!("{PREFIX}{number}"), "1", None).await.unwrap() })
    });
    for put in puts.collect::<Vec<_>>() {
        put.await.unwrap();
    }
    let count = |metric: &str| -> f64 {
        let text = server.metrics.encode();
        let line = text
            .lines()
            .find(|line| line.starts_with(&format!("isthmus_clustermesh_{metric} ")));
        line.and_then(|line| line.rsplit(' ').next())
            .unwrap()
            .parse()
            .unwrap()
    };
    assert_eq!(count("embedded_writes_total"), 400.0);
    let flushes = count("embedded_flushes_total");
    assert!(flushes <= 100.0, "{flushes} flushes");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_operators_writer_publishes_and_readers_resume_without_a_list() {
    let (pki, data) = (Pki::new(), tempfile::tempdir().unwrap());
    let server = Apiserver::start(embedded("c1", 1, data.path(), &pki)).await;
    let publisher = Publisher::to(pki.config(server.address, "admin-c1"));
    for number in 0..600 {
        publisher.writer.put(format!("{PREFIX}{number:03}"), "1");
    }
    publisher.writer.prune(PREFIX);
    publisher.writer.flush().await;
    let view = View::open(
        pki.config(server.address, "remote-c2"),
        vec![Feed::prefix(PREFIX, 1024)],
    );
    let before = view
        .until("all keys", |view| {
            view.keys.len() == 600 && !view.synced.is_empty()
        })
        .await;
    let stopped = server.stop().await;
    publisher.writer.put(format!("{PREFIX}000"), "2");
    publisher.writer.delete(format!("{PREFIX}599").as_bytes());
    let server = Apiserver::start(stopped).await;
    publisher.writer.flush().await;
    let after = view
        .until("the changes", |view| {
            view.keys.len() == 599
                && view
                    .value(&format!("{PREFIX}000"))
                    .is_some_and(|value| value == "2")
        })
        .await;
    let history = |view: &crate::lab::ViewContent| view.synced.values().next().map(|synced| synced.0);
    assert_eq!(after.listings, before.listings);
    let again = view
        .until("it is synced", |view| view.connected && !view.synced.is_empty())
        .await;
    assert_eq!(history(&again), history(&before));
    server.stop().await;
}
