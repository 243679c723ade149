//! The end of a replica: not ready at once, clients move to another one without a list and without a lost event, and nobody
//! holds it up for ever.

use std::time::Duration;

use etcd_client::{GetOptions, WatchOptions};
use isthmus_clustermesh_apiserver::Config;
use isthmus_kvstore::Feed;
use tokio::sync::watch;

use crate::{
    lab::{Apiserver, Etcd, Pki, View, config, eventually},
    raw::{Dial, watch_request},
};

const PREFIX: &str = "cilium/state/nodes/v1/c1/";

async fn start(etcd: &Etcd, pki: &Pki, change: impl FnOnce(&mut Config)) -> Apiserver {
    let mut config = config("c1", 1, etcd.config(), pki);
    change(&mut config);
    let server = Apiserver::start(config).await;
    server.ready().await;
    server
}

/// Puts keys one after the other until the value is dropped; tells the last revision.
struct Writer(watch::Receiver<i64>, tokio::task::JoinHandle<()>);

impl Writer {
    async fn start(etcd: &Etcd) -> Self {
        let (tell, revision) = watch::channel(0);
        let mut client = etcd.client().await.unwrap();
        let task = tokio::spawn(async move {
            for number in 0u64.. {
                let put = client.put(format!("{PREFIX}{}", number % 50), number.to_string(), None);
                let revision = put.await.unwrap().header().unwrap().revision();
                tell.send_replace(revision);
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        Self(revision, task)
    }

    fn revision(&self) -> i64 {
        *self.0.borrow()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.1.abort();
    }
}

/// Follows `PREFIX` as Cilium's clients do: one list, one watch, and when it ends the next one from the revision after the last event, on
/// whichever server answers. Ends with an error if a list would be needed.
async fn follow(pki: &Pki, servers: [std::net::SocketAddr; 2], seen: watch::Sender<Vec<i64>>) {
    let mut next = 0;
    for number in 0.. {
        let client = pki.client(servers[number % 2], "remote-c2");
        let Ok(mut client) = tokio::time::timeout(Duration::from_secs(5), client).await else {
            continue;
        };
        if next == 0 {
            let Ok(listed) = client.get(PREFIX, Some(GetOptions::new().with_prefix())).await else {
                continue;
            };
            next = listed.header().unwrap().revision() + 1;
        }
        let options = WatchOptions::new().with_prefix().with_start_revision(next);
        let watched = tokio::time::timeout(Duration::from_secs(5), client.watch(PREFIX, Some(options))).await;
        let Ok(Ok(mut stream)) = watched else {
            continue;
        };
        while let Ok(Some(answer)) = stream.message().await {
            assert_eq!(
                (answer.canceled(), answer.compact_revision()),
                (false, 0),
                "{answer:?}"
            );
            let revisions: Vec<i64> = answer
                .events()
                .iter()
                .map(|event| event.kv().unwrap().mod_revision())
                .collect();
            next = revisions.last().map_or(next, |last| last + 1);
            seen.send_modify(|seen| seen.extend(revisions));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_move_from_replica_to_replica_without_a_list_and_lose_nothing() {
    let (etcd, pki) = (Etcd::start().await, Pki::new());
    let writer = Writer::start(&etcd).await;
    let grace = |config: &mut Config| config.limits.shutdown_grace = Duration::from_millis(300);
    let mut servers = Vec::new();
    for _ in 0..2 {
        servers.push(start(&etcd, &pki, grace).await);
    }
    let addresses = [servers[0].address, servers[1].address];
    let mut both = pki.config(addresses[0], "local-c1");
    both.endpoints
        .extend(pki.config(addresses[1], "local-c1").endpoints);
    let view = View::open(both, vec![Feed::prefix(PREFIX, 1024)]);
    view.until("it is synced", |view| view.synced.len() == 1).await;
    let listings = view.now().listings;
    let (tell, seen) = watch::channel(Vec::new());
    let follower = tokio::spawn(async move { follow(&pki, addresses, tell).await });
    let caught_up = async || {
        let now = writer.revision();
        eventually("both have caught up", || async {
            let own = view.now().revisions.values().map(|revisions| revisions.1).max();
            let theirs = seen.borrow().last().copied();
            (own >= Some(now) && theirs >= Some(now)).then_some(())
        })
        .await;
    };
    caught_up().await;
    // One after the other, twice around.
    for _ in 0..4 {
        let server = servers.remove(0);
        let config = server.stop().await;
        caught_up().await;
        let server = Apiserver::start(config).await;
        server.ready().await;
        servers.push(server);
        caught_up().await;
    }
    assert_eq!(view.now().listings, listings, "no list was needed");
    assert_eq!(view.now().deleted.len(), 0);
    let seen = seen.borrow().clone();
    assert!(
        seen.windows(2).all(|pair| pair[1] == pair[0] + 1),
        "none lost, none twice"
    );
    assert!(!follower.is_finished());
    follower.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_serves_through_the_grace_time_and_then_says_everything_before_streams_end() {
    let (etcd, pki) = (Etcd::start().await, Pki::new());
    let server = start(&etcd, &pki, |config| {
        config.limits.shutdown_grace = Duration::from_secs(4);
    })
    .await;
    let dial = Dial::new(&pki, "remote-c2");
    let mut quick = dial.open(server.address).await.unwrap();
    let mut watch = quick.watch(PREFIX, 0).await.unwrap();
    // This one reads nothing for now: 3 MB wait in the history and a part of them in its connection.
    let mut slow = dial
        .clone()
        .windows(50_000, 65_535)
        .open(server.address)
        .await
        .unwrap();
    let mut unread = slow.watch(PREFIX, 0).await.unwrap();
    let mut client = etcd.client().await.unwrap();
    let mut put = async |len: usize| {
        let put = client.put(format!("{PREFIX}a"), vec![b'x'; len], None).await;
        put.unwrap().header().unwrap().revision()
    };
    let first = put(10_000).await;
    for _ in 0..300 {
        put(10_000).await;
    }
    server.begin_to_stop();
    eventually("it is not ready any longer", || async {
        (!server.health.is_ready()).then_some(())
    })
    .await;
    // Within the grace time, clients come and are served, and events go on.
    let mut late = dial.open(server.address).await.unwrap();
    assert_eq!(late.list(PREFIX).await.unwrap().kvs.len(), 1);
    let last = put(10).await;
    assert_eq!(watch.revisions(last).await.unwrap(), Vec::from_iter(first..=last));
    // Then the stream that has been told all ends, with etcd's words for it.
    let end = watch.revisions(i64::MAX).await.unwrap_err().to_string();
    assert!(
        end.contains("\"grpc-status\": \"14\"") && end.contains("server%20stopped"),
        "{end}"
    );
    let closed = tokio::time::timeout(Duration::from_secs(60), &mut quick.connection);
    // What the client sends last may meet a socket that is closed already.
    if let Err(error) = closed.await.unwrap().unwrap() {
        assert!(error.is_io(), "closed as HTTP/2 wants it: {error}");
    }
    assert!(dial.open(server.address).await.is_err(), "nobody gets in");
    // The slow one still gets everything.
    assert_eq!(
        unread.revisions(last).await.unwrap(),
        Vec::from_iter(first..=last)
    );
    assert!(
        unread
            .revisions(i64::MAX)
            .await
            .unwrap_err()
            .to_string()
            .contains("14")
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_go_is_cut_off() {
    let (etcd, pki) = (Etcd::start().await, Pki::new());
    let server = start(&etcd, &pki, |config| {
        config.limits.shutdown_timeout = Duration::from_secs(1);
    })
    .await;
    let mut stays = Dial::new(&pki, "remote-c2")
        .windows(0, 65_535)
        .open(server.address)
        .await
        .unwrap();
    let request = watch_request(PREFIX, 0);
    let _stream = stays
        .begin("/etcdserverpb.Watch/Watch", &request, false)
        .await
        .unwrap();
    eventually("its watch is there", || async {
        (server.metric("server_watches") == 1).then_some(())
    })
    .await;
    let metrics = server.metrics.clone();
    tokio::time::timeout(Duration::from_secs(60), server.stop())
        .await
        .expect("it ends");
    let line = "apiserver_closed_connections_total{reason=\"shutdown_timeout\"} 1";
    assert!(metrics.encode().contains(line));
}
