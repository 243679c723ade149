//! An API server that begins anew: what it cannot know yet it must not say is gone.

use isthmus_kvstore::Feed;
use isthmus_wire::keys::Kind;

use crate::{
    clusters::{exact, pair},
    lab::{Apiserver, Pki, View, dump, eventually},
};

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
