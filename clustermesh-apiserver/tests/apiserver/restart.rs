//! An API server that begins anew: what it cannot know yet it must not say is gone.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use etcd_client::{EventType, WatchOptions};
use isthmus_kvstore::Feed;
use isthmus_wire::keys::Kind;

use crate::{
    clusters::{Cluster, exact, pair},
    lab::{Apiserver, Pki, View, ViewContent, dump, embedded, eventually},
};

const OWN: &str = "cilium/state/nodes/v1/a/";
const REMOTE: &str = "cilium/cache/nodes/v1/b/";

/// What a watch of etcd's own kind of client was told: keys and revisions of its events.
type Told = Arc<Mutex<Vec<(String, i64, bool)>>>;

/// Resumes where a reader was, as etcd's client does after a reconnect: by a watch and nothing else.
async fn resumed(
    pki: &Pki,
    server: &Apiserver,
    prefix: &'static str,
    start: i64,
) -> (Told, tokio::task::JoinHandle<()>) {
    let mut client = pki.client(server.address, "local-a").await;
    let told = Told::default();
    let shared = told.clone();
    let task = tokio::spawn(async move {
        let options = WatchOptions::new().with_prefix().with_start_revision(start);
        let mut stream = client.watch(prefix, Some(options)).await.unwrap();
        while let Some(message) = stream.message().await.unwrap() {
            assert!(!message.canceled(), "{message:?}");
            for event in message.events() {
                let kv = event.kv().unwrap();
                let put = event.event_type() == EventType::Put;
                let key = kv.key_str().unwrap().to_owned();
                shared.lock().unwrap().push((key, kv.mod_revision(), put));
            }
        }
    });
    (told, task)
}

async fn positions(view: &View, count: usize) -> (ViewContent, BTreeMap<String, i64>) {
    let view = view
        .until("all is synced", |view| {
            view.synced.len() == count && view.connected
        })
        .await;
    let at = view.synced.iter();
    let at = at
        .map(|(feed, (_, revision))| (feed.to_string(), *revision))
        .collect();
    (view, at)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_server_leads_its_readers_on_and_nobody_lists() {
    let pki = Pki::new();
    let (mut a, b) = pair(&pki).await;
    a.until(&pki, "b", "ready", |status| status.ready && status.connected)
        .await;
    exact(&a, &b, &pki, &Kind::ALL).await;
    for cluster in [&a, &b] {
        (0..300).for_each(|number| cluster.put_node(&format!("m{number}")));
        cluster.writer().flush().await;
    }
    b.until(&pki, "a", "ready", |status| status.ready && status.connected)
        .await;
    exact(&b, &a, &pki, &Kind::ALL).await;
    let feeds = vec![Feed::prefix(OWN, 1 << 20), Feed::prefix(REMOTE, 1 << 20)];
    let view = View::open(pki.config(a.address(), "local-a"), feeds);
    view.until("all nodes", |view| view.keys.len() == 602).await;
    let (before, _) = positions(&view, 2).await;
    let last = |prefix: &str| {
        let of = before
            .revisions
            .iter()
            .filter(|(key, _)| key.starts_with(prefix.as_bytes()));
        of.map(|(_, (_, modified))| *modified).max().unwrap()
    };
    let (own_at, remote_at) = (last(OWN), last(REMOTE));

    let stopped = a.server.take().unwrap().stop().await;
    view.until("the reader has noticed", |view| !view.connected).await;
    for cluster in [&a, &b] {
        cluster.put_node("n2");
        cluster.writer().flush().await;
        cluster.writer().delete(cluster.key(Kind::Nodes, "n1").as_bytes());
        cluster.writer().flush().await;
        cluster.writer().delete(cluster.key(Kind::Nodes, "n2").as_bytes());
        cluster.put_node("n3");
        cluster.writer().flush().await;
    }
    let server = Apiserver::start(stopped).await;
    let after = view
        .until("the changes", |view| {
            let has = |prefix: &str, name: &str| view.value(&format!("{prefix}{name}")).is_some();
            view.synced.len() == 2
                && [OWN, REMOTE]
                    .iter()
                    .all(|prefix| has(prefix, "n3") && !has(prefix, "n1"))
        })
        .await;
    assert_eq!(after.listings, before.listings, "nobody lists");
    // What is gone was told as it went, also what came and went meanwhile.
    let gone: Vec<String> = after
        .deleted
        .iter()
        .map(|key| String::from_utf8_lossy(key).into_owned())
        .collect();
    for name in ["n1", "n2"] {
        for prefix in [OWN, REMOTE] {
            assert!(gone.contains(&format!("{prefix}{name}")), "{gone:?}");
        }
    }
    assert_eq!(gone.len(), 4, "{gone:?}");
    // Four events each, for this reader and for the own cluster's of b's mirror, and heartbeats; not 602 keys.
    let (events, sent) = (
        server.metric("server_events_total"),
        server.metric("server_sent_bytes_total"),
    );
    assert!(
        (8..100).contains(&events) && sent < 100_000,
        "{events} events, {sent} bytes"
    );

    // And as any client of etcd does, which asks for nothing but the watch.
    for (prefix, start) in [(OWN, own_at + 1), (REMOTE, remote_at + 1)] {
        let (told, task) = resumed(&pki, &server, prefix, start).await;
        let told = eventually("all was told", || async {
            let told = told.lock().unwrap().clone();
            (told.len() >= 4).then_some(told)
        })
        .await;
        task.abort();
        // The last transaction's are in one revision, in either order.
        let mut told: Vec<_> = told
            .iter()
            .map(|(key, at, put)| (*at, &key[prefix.len()..], *put))
            .collect();
        told.sort_unstable();
        let names: Vec<_> = told.iter().map(|(_, name, put)| (*name, *put)).collect();
        assert_eq!(names, [("n2", true), ("n1", false), ("n2", false), ("n3", true)]);
        assert!(told.iter().all(|(at, ..)| *at >= start));
    }
    server.ready().await;
    a.server = Some(server);
    a.until(&pki, "b", "ready", |status| status.ready && status.connected)
        .await;
    exact(&a, &b, &pki, &Kind::ALL).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_embedded_store_leads_readers_of_its_mirrors_on() {
    let pki = Pki::new();
    let b = Cluster::start("b", 2, &pki).await;
    b.publish().await;
    let (data, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    crate::clusters::write_file(files.path(), "b", &pki.yaml(b.address(), "remote-a"));
    let mut config = embedded("a", 1, data.path(), &pki);
    config.clustermesh_config = Some(files.path().to_owned());
    let server = Apiserver::start(config).await;
    server.ready().await;
    let mut operator = pki.client(server.address, "admin-a").await;
    operator.put(format!("{OWN}n1"), "1", None).await.unwrap();
    let feeds = vec![Feed::prefix(OWN, 1 << 20), Feed::prefix(REMOTE, 1 << 20)];
    let view = View::open(pki.config(server.address, "local-a"), feeds);
    view.until("two nodes", |view| view.keys.len() == 2).await;
    let (before, _) = positions(&view, 2).await;

    let stopped = server.stop().await;
    b.put_node("n2");
    b.writer().flush().await;
    b.writer().delete(b.key(Kind::Nodes, "n1").as_bytes());
    b.writer().flush().await;
    let server = Apiserver::start(stopped).await;
    let mut operator = pki.client(server.address, "admin-a").await;
    operator.put(format!("{OWN}n2"), "1", None).await.unwrap();
    let after = view
        .until("the changes", |view| {
            view.synced.len() == 2
                && view.value(&format!("{REMOTE}n2")).is_some()
                && view.value(&format!("{OWN}n2")).is_some()
                && view.keys.len() == 3
        })
        .await;
    assert_eq!(after.listings, before.listings, "nobody lists");
    assert_eq!(after.deleted, [format!("{REMOTE}n1").as_bytes()]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_while_a_remote_cluster_is_away_takes_nothing_of_it_from_agents() {
    let pki = Pki::new();
    let (mut a, mut b) = pair(&pki).await;
    a.until(&pki, "b", "ready", |status| status.ready && status.connected)
        .await;
    exact(&a, &b, &pki, &Kind::ALL).await;
    let feeds = vec![
        Feed::prefix("isthmus/status/v1/remotes/", 1 << 20),
        Feed::prefix("cilium/cache/nodes/v1/b/", 1 << 20),
        Feed::prefix("isthmus/cache/slices/v1/b/", 1 << 20),
    ];
    let view = View::open(pki.config(a.address(), "local-a"), feeds);
    view.until("all is synced", |view| {
        view.synced.len() == 3 && view.keys.len() == 3
    })
    .await;

    let remote = b.server.take().unwrap().stop().await;
    let stopped = a.server.take().unwrap().stop().await;
    view.until("the agent has noticed", |view| !view.connected).await;
    a.server = Some(Apiserver::start(stopped).await);
    let seen = view
        .until("the agent is told why it reads nothing of b", |view| {
            view.connected && view.synced.len() == 1 && !view.failed.is_empty()
        })
        .await;
    let status = a
        .until(&pki, "b", "not connected", |status| status.num_failures > 1)
        .await;
    assert!(!status.connected && !status.ready, "{status:?}");
    assert_eq!(seen.deleted, Vec::<bytes::Bytes>::new());
    assert_eq!(view.now().keys.len(), 3, "what was known of b stays");

    // Changes while nobody could see them; then all is exact again.
    b.put_node("n2");
    b.writer().delete(b.key(Kind::Nodes, "n1").as_bytes());
    b.writer().flush().await;
    b.server = Some(Apiserver::start(remote).await);
    view.until("n1 is gone, n2 there", |view| {
        view.synced.len() == 3
            && view.value("cilium/cache/nodes/v1/b/n2").is_some()
            && view.value("cilium/cache/nodes/v1/b/n1").is_none()
    })
    .await;
    assert_eq!(view.now().deleted, [&b"cilium/cache/nodes/v1/b/n1"[..]]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_file_that_turns_bad_is_no_removal_also_at_a_restart() {
    let pki = Pki::new();
    let (mut a, b) = pair(&pki).await;
    a.until(&pki, "b", "ready", |status| status.ready && status.connected)
        .await;
    let path = a.files.path().join("b");
    let good = std::fs::read_to_string(&path).unwrap();
    let feeds = vec![Feed::prefix("isthmus/status/v1/remotes/", 1 << 20)];
    let view = View::open(pki.config(a.address(), "local-a"), feeds);
    view.until("all is synced", |view| {
        view.synced.len() == 1 && view.keys.len() == 1
    })
    .await;

    // An editor's half-written file, seen for a few looks at the directory.
    for bad in ["", "endpoints: [", "endpoints: []"] {
        std::fs::write(&path, bad).unwrap();
        a.until(&pki, "b", "the file is complained about", |status| {
            status.status.contains("file")
        })
        .await;
        let status = a.status(&pki, "b").await.unwrap();
        assert!(status.connected && status.ready, "{status:?}");
        std::fs::write(&path, &good).unwrap();
        a.until(&pki, "b", "all is well", |status| status.status.is_empty())
            .await;
    }
    exact(&a, &b, &pki, &[Kind::Nodes]).await;

    std::fs::write(&path, "endpoints: [").unwrap();
    let stopped = a.server.take().unwrap().stop().await;
    a.server = Some(Apiserver::start(stopped).await);
    let status = a
        .until(&pki, "b", "the file is complained about", |status| {
            status.status.contains("file")
        })
        .await;
    assert!(!status.connected && !status.ready, "{status:?}");
    std::fs::write(&path, &good).unwrap();
    a.until(&pki, "b", "ready", |status| status.ready && status.connected)
        .await;
    assert_eq!(view.now().deleted, Vec::<bytes::Bytes>::new());

    std::fs::remove_file(&path).unwrap();
    eventually("b is removed", || async {
        let mut agent = a.agent(&pki).await;
        dump(&mut agent, "isthmus/status/").await.is_empty().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_remote_cluster_that_changes_its_id_is_drained_and_read_anew() {
    let pki = Pki::new();
    let (a, mut b) = pair(&pki).await;
    a.until(&pki, "b", "ready", |status| status.ready && status.connected)
        .await;
    exact(&a, &b, &pki, &Kind::ALL).await;
    // Its old identities are outside of the new range; they go first, as its operator would do.
    for kind in [Kind::Identities, Kind::Ip] {
        for stored in b.writer().stored(&b.key(kind, "")) {
            b.writer().delete(&stored.key);
        }
    }
    b.id = 3;
    b.publish().await;
    let status = a
        .until(&pki, "b", "ready with its new ID", |status| {
            status.cluster_id == 3 && status.ready && status.objects.values().all(|count| *count == 1)
        })
        .await;
    assert_eq!(status.objects.len(), 6, "{status:?}");
    exact(&a, &b, &pki, &Kind::ALL).await;
}
