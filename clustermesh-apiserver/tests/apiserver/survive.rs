//! Upstreams that restart, pause, lose their data or their history: readers keep what they know and end up exact.

use isthmus_kvstore::Feed;
use nix::sys::signal::Signal;

use crate::lab::{Apiserver, Etcd, Pki, Publisher, View, config, dump, eventually};

const PREFIX: &str = "cilium/state/nodes/v1/c1/";

fn feeds() -> Vec<Feed> {
    vec![
        Feed::prefix(PREFIX, 1024 * 1024),
        Feed::prefix("cilium/.heartbeat", 1024),
    ]
}

/// The view equals the etcd, revisions included.
async fn exact(etcd: &Etcd, view: &View) {
    eventually("the view equals etcd", || async {
        let mut client = etcd.client().await.ok()?;
        let want = dump(&mut client, PREFIX).await;
        let view = view.now();
        let nodes: Vec<_> = view
            .keys
            .iter()
            .filter(|(key, _)| key.starts_with(PREFIX.as_bytes()))
            .collect();
        let same = nodes.len() == want.len()
            && nodes.iter().all(|(key, value)| {
                let revisions = view.revisions[*key];
                want.get(*key) == Some(&((*value).clone(), revisions.0, revisions.1))
            });
        (same && view.connected && view.synced.len() == 2).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_lives_through_everything_that_happens_to_server_and_etcd() {
    let (mut etcd, pki) = (Etcd::start().await, Pki::new());
    let publisher = Publisher::start(&etcd);
    for index in 0..600 {
        publisher.writer.put(format!("{PREFIX}{index:03}"), "1");
    }
    publisher
        .writer
        .put("cilium/synced/c1/cilium/state/nodes/v1", "now");
    publisher.writer.prune(PREFIX);
    publisher.writer.flush().await;
    let mut server = Apiserver::start(config("c1", 1, etcd.config(), &pki)).await;
    server.ready().await;
    let view = View::open(pki.config(server.address, "local-c1"), feeds());
    exact(&etcd, &view).await;
    view.until("three pages and the heartbeat", |view| view.keys.len() == 601)
        .await;

    // The server restarts, with changes and a deletion while it is away.
    let stopped = server.stop().await;
    publisher.writer.put(format!("{PREFIX}000"), "2");
    publisher.writer.delete(format!("{PREFIX}599").as_bytes());
    publisher.writer.flush().await;
    view.until("the reader has noticed", |view| !view.connected).await;
    assert_eq!(view.now().keys.len(), 601, "nothing is forgotten");
    server = Apiserver::start(stopped).await;
    exact(&etcd, &view).await;

    // etcd restarts; the server's own watches and its readers' go on.
    let listings = view.now().listings;
    etcd.restart().await;
    publisher.writer.put(format!("{PREFIX}001"), "2");
    publisher.writer.flush().await;
    exact(&etcd, &view).await;
    assert_eq!(view.now().listings, listings, "no list was needed");

    // etcd pauses: no answer, no closed connection.
    etcd.signal(Signal::SIGSTOP);
    eventually("the server has noticed the pause", || async {
        let states = server.health.snapshot();
        matches!(states["etcd"], isthmus_runtime::State::Degraded(_)).then_some(())
    })
    .await;
    assert!(
        server.health.is_ready() && view.now().connected,
        "what is known is served"
    );
    etcd.signal(Signal::SIGCONT);
    publisher.writer.put(format!("{PREFIX}002"), "2");
    publisher.writer.flush().await;
    exact(&etcd, &view).await;
    assert_eq!(view.now().listings, listings, "no list was needed");

    // etcd's history is compacted while the server is cut off by a pause of its etcd: list, no flush.
    etcd.stop();
    etcd.restart().await;
    let mut client = etcd.client().await.unwrap();
    let revision = client
        .put(format!("{PREFIX}foreign"), "x", None)
        .await
        .unwrap()
        .header()
        .unwrap()
        .revision();
    client.compact(revision, None).await.unwrap();
    let foreign = format!("{PREFIX}foreign");
    eventually("the writer has removed what is not its own", || async {
        let mut client = etcd.client().await.ok()?;
        let left = dump(&mut client, &foreign).await;
        left.is_empty().then_some(())
    })
    .await;
    exact(&etcd, &view).await;

    // etcd loses its data and keeps its cluster ID: the writer writes it all again, the reader never loses a key.
    let deleted = view.now().deleted;
    // The reader may have seen the foreign key come and go, or neither.
    let own: Vec<_> = deleted
        .iter()
        .filter(|key| key[..] != *foreign.as_bytes())
        .collect();
    assert_eq!(own, [format!("{PREFIX}599").as_bytes()]);
    etcd.restart_empty().await;
    publisher.writer.put(format!("{PREFIX}003"), "3");
    publisher.writer.flush().await;
    eventually("everything was written again", || async {
        let mut client = etcd.client().await.ok()?;
        (dump(&mut client, PREFIX).await.len() == 599).then_some(())
    })
    .await;
    exact(&etcd, &view).await;
    let now = view.now();
    assert_eq!(now.value(&format!("{PREFIX}003")).unwrap(), "3");
    // The heartbeat may beat a moment after the rest is back.
    let lost = now.deleted[deleted.len()..]
        .iter()
        .filter(|key| &key[..] != b"cilium/.heartbeat");
    assert_eq!(lost.count(), 0, "nothing was lost on the way");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_takes_over_without_a_list() {
    let (etcd, pki) = (Etcd::start().await, Pki::new());
    let publisher = Publisher::start(&etcd);
    publisher.writer.put(format!("{PREFIX}a"), "1");
    publisher.writer.flush().await;
    let [first, second] = [
        Apiserver::start(config("c1", 1, etcd.config(), &pki)).await,
        Apiserver::start(config("c1", 1, etcd.config(), &pki)).await,
    ];
    first.ready().await;
    second.ready().await;
    let mut both = pki.config(first.address, "local-c1");
    both.endpoints
        .extend(pki.config(second.address, "local-c1").endpoints);
    let view = View::open(both, feeds());
    exact(&etcd, &view).await;
    // The sub-stores move on with each change; both replicas have seen this one.
    publisher.writer.put(format!("{PREFIX}b"), "1");
    publisher.writer.flush().await;
    exact(&etcd, &view).await;
    let listings = view.now().listings;
    // Whichever it is connected to: one after the other goes, and comes back before the other goes.
    let stopped = first.stop().await;
    publisher.writer.put(format!("{PREFIX}c"), "1");
    publisher.writer.flush().await;
    exact(&etcd, &view).await;
    assert_eq!(view.now().listings, listings, "the other replica has the history");
    let first = Apiserver::start(stopped).await;
    first.ready().await;
    second.stop().await;
    publisher.writer.put(format!("{PREFIX}d"), "1");
    publisher.writer.flush().await;
    exact(&etcd, &view).await;
    assert_eq!(view.now().deleted.len(), 0);
    first.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_writer_writes_differences_only() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await.unwrap();
    client
        .put(format!("{PREFIX}left"), "from before", None)
        .await
        .unwrap();
    client.put(format!("{PREFIX}same"), "1", None).await.unwrap();
    client
        .put("cilium/state/ip/v1/default/other", "not ours", None)
        .await
        .unwrap();
    let publisher = Publisher::start(&etcd);
    publisher.writer.listed().await;
    let stored = publisher.writer.stored(PREFIX);
    assert_eq!(stored.len(), 2, "what an earlier process left can be read back");
    publisher.writer.put(format!("{PREFIX}same"), "1");
    publisher.writer.flush().await;
    let before = dump(&mut client, PREFIX).await;
    assert_eq!(
        before[format!("{PREFIX}same").as_bytes()].2,
        3,
        "an equal value is not written"
    );
    assert_eq!(before.len(), 2, "nothing is deleted before the source is known");
    publisher.writer.prune(PREFIX);
    publisher.writer.flush().await;
    assert_eq!(dump(&mut client, PREFIX).await.len(), 1);
    assert_eq!(
        dump(&mut client, "cilium/state/ip/").await.len(),
        1,
        "outside of what is pruned"
    );
    // Somebody else's hands.
    client.delete(format!("{PREFIX}same"), None).await.unwrap();
    client.put(format!("{PREFIX}foreign"), "x", None).await.unwrap();
    eventually("it is as desired again", || async {
        let mut client = etcd.client().await.ok()?;
        let now = dump(&mut client, PREFIX).await;
        (now.len() == 1 && now.contains_key(format!("{PREFIX}same").as_bytes())).then_some(())
    })
    .await;
    // A thousand keys are a handful of transactions.
    let revision = |client: &mut etcd_client::Client| {
        let mut client = client.clone();
        async move { client.get("x", None).await.unwrap().header().unwrap().revision() }
    };
    let before = revision(&mut client).await;
    for index in 0..1000 {
        publisher.writer.put(format!("{PREFIX}{index}"), "v");
    }
    publisher.writer.flush().await;
    assert!(revision(&mut client).await - before < 40);
    assert_eq!(dump(&mut client, PREFIX).await.len(), 1001);
    let status = publisher.writer.status();
    assert!(
        status.connected && status.listed && status.pending == 0,
        "{status:?}"
    );
}
