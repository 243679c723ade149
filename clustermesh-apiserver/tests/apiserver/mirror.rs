//! Clusters that mirror each other: what passes the border, what does not, and what stays when a remote goes away.

mod grants;
mod operations;

use isthmus_kvstore::Feed;
use isthmus_model::IdentityRange;
use isthmus_wire::{
    ClusterConfig, ip,
    keys::{self, Kind, Scope},
    node,
    status::RemoteStatus,
};
use nix::sys::signal::Signal;

use crate::lab::{Apiserver, Pki, View, cluster_id, dump, eventually};

use crate::clusters::{Cluster, MAX, exact, pair};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_clusters_mirror_each_other_exactly() {
    let pki = Pki::new();
    let (a, b) = pair(&pki).await;
    for (here, there) in [(&a, &b), (&b, &a)] {
        let status = here
            .until(&pki, there.name.as_str(), "ready", |status| {
                status.ready && status.connected && status.heartbeat_seen_ms > 0
            })
            .await;
        assert_eq!(
            (status.cluster_id, status.slices, status.status.as_str()),
            (there.id, true, "")
        );
        assert!(status.refused.is_empty(), "{status:?}");
        assert!(status.objects.values().all(|count| *count == 1), "{status:?}");
        assert_eq!(status.synced.len(), 6);
        exact(here, there, &pki, &Kind::ALL).await;
    }
    // What an agent looks at first.
    let mut agent = a.agent(&pki).await;
    let configs = dump(&mut agent, keys::CLUSTER_CONFIG).await;
    let mirrored = ClusterConfig::decode(&configs[keys::cluster_config(&b.name).as_bytes()].0).unwrap();
    assert!(mirrored.capabilities.cached && mirrored.capabilities.synced_canaries && mirrored.has_slices());
    let own = ClusterConfig::decode(&configs[keys::cluster_config(&a.name).as_bytes()].0).unwrap();
    assert!(!own.capabilities.cached);
    let canaries = dump(&mut agent, "cilium/synced/b/").await;
    for kind in Kind::ALL {
        assert!(canaries.contains_key(keys::canary(&b.name, kind, Scope::Cache).unwrap().as_bytes()));
    }
    // A remote cluster does not see the mirror.
    let mut remote = pki.client(a.address(), "remote-b").await;
    assert!(remote.get("cilium/cache/nodes/v1/b/n1", None).await.is_err());

    // An agent follows changes by one connection, in the source's revisions.
    let feeds = vec![
        Feed::prefix("cilium/cluster-config/", 1024),
        Feed::prefix("cilium/synced/b/", 1024),
        Feed::prefix("cilium/cache/nodes/v1/b/", 1 << 20),
        Feed::prefix("isthmus/cache/slices/v1/b/", 1 << 20),
    ];
    let view = View::open(pki.config(a.address(), "local-a"), feeds);
    view.until("all is synced", |view| view.synced.len() == 4).await;
    b.put_node("n2");
    b.writer().delete(b.key(Kind::Nodes, "n1").as_bytes());
    b.writer().flush().await;
    let seen = view
        .until("the change is seen", |view| {
            view.value("cilium/cache/nodes/v1/b/n2").is_some()
                && view.value("cilium/cache/nodes/v1/b/n1").is_none()
        })
        .await;
    let mut source = b.etcd.client().await.unwrap();
    let (_, create, modified) = dump(&mut source, &b.key(Kind::Nodes, "n2"))
        .await
        .into_values()
        .next()
        .unwrap();
    assert_eq!(
        seen.revisions[&b"cilium/cache/nodes/v1/b/n2"[..]],
        (create, modified)
    );

    // Removal drains, and tells in what order.
    std::fs::remove_file(a.files.path().join("b")).unwrap();
    let seen = view
        .until("the mirror is gone", |view| {
            view.keys
                .keys()
                .all(|key| key.starts_with(b"cilium/cluster-config/a"))
        })
        .await;
    assert!(seen.keys.len() == 1, "{:?}", seen.keys.keys());
    assert!(
        dump(&mut agent, "isthmus/")
            .await
            .keys()
            .all(|key| !key.starts_with(b"isthmus/status/") && !key.starts_with(b"isthmus/cache/"))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_objects_are_refused_one_by_one_and_the_rest_goes_on() {
    let pki = Pki::new();
    let (a, b) = pair(&pki).await;
    a.until(&pki, "b", "ready", |status| status.ready).await;
    let mut agent = a.agent(&pki).await;
    let before = dump(&mut agent, "cilium/cache/nodes/v1/b/n1").await;

    let node = String::from_utf8(node::encode(&b.node("n1"))).unwrap();
    let mut raw = b.etcd.client().await.unwrap();
    // Past the writer, which would write its own value again.
    let large = format!("{{\"x\":\"{}\"}}", "y".repeat(10 * 1024 * 1024));
    let own_identity = b.ip_entry(
        "10.2.0.99",
        IdentityRange::of(cluster_id(1), MAX).numbers().start() + 1,
    );
    let puts: Vec<(String, Vec<u8>)> = vec![
        (b.key(Kind::Nodes, "bad-json"), b"{".to_vec()),
        (
            b.key(Kind::Nodes, "n9"),
            node.replace("\"n1\"", "\"n9\"")
                .replace("\"Cluster\":\"b\"", "\"Cluster\":\"a\"")
                .into_bytes(),
        ),
        (
            b.key(Kind::Nodes, "n8"),
            node.replace("\"n1\"", "\"n8\"")
                .replace("\"ClusterID\":2", "\"ClusterID\":1")
                .into_bytes(),
        ),
        (
            b.key(Kind::Nodes, "n7"),
            node.replace("172.18.0.3", "172.18.0.333")
                .replace("\"n1\"", "\"n7\"")
                .into_bytes(),
        ),
        (b.key(Kind::Nodes, "other-name"), node.clone().into_bytes()),
        (b.key(Kind::Nodes, "x/../y"), node.into_bytes()),
        (b.key(Kind::Ip, "10.2.0.99"), ip::encode(&own_identity)),
        (
            b.key(Kind::Identities, "65600"),
            b"k8s:io.cilium.k8s.policy.cluster=b;".to_vec(),
        ),
        (
            b.key(Kind::Identities, "131073"),
            b"k8s:io.cilium.k8s.policy.cluster=a;".to_vec(),
        ),
        (b.key(Kind::Slices, "shop/cart/s1"), vec![0xff; 40]),
        // b's own server does not take this one, and a not that one.
        (b.key(Kind::Nodes, "huge"), large.clone().into_bytes()),
        (
            b.key(Kind::Nodes, "large"),
            large.as_bytes()[..2 * 1024 * 1024].to_vec(),
        ),
    ];
    // A watch meets them.
    for (key, value) in puts {
        raw.put(key, value, None).await.unwrap();
    }
    let reasons = |status: &RemoteStatus| status.refused.clone();
    let want = [
        "foreign_key",
        "identity_cluster",
        "identity_range",
        "malformed",
        "malformed_field",
        "too_large",
        "wrong_cluster",
        "wrong_cluster_id",
        "wrong_name",
    ];
    let status = a
        .until(&pki, "b", "all are refused", |status| {
            status.refused.keys().map(String::as_str).eq(want)
        })
        .await;
    assert_eq!(status.refused["identity_range"], 2, "{status:?}");
    assert!(
        status.ready && status.connected && status.last_refusals.len() == 10,
        "{status:?}"
    );
    assert_eq!(
        dump(&mut agent, "cilium/cache/nodes/v1/b/").await,
        before,
        "what was there stays"
    );
    // A bad value of a known object: its previous value stays; the next good one is taken.
    raw.put(b.key(Kind::Identities, "131072"), "k8s:x", None)
        .await
        .unwrap();
    a.until(&pki, "b", "labels are refused", |status| {
        status.refused.contains_key("labels")
    })
    .await;
    assert_eq!(dump(&mut agent, "cilium/cache/identities/v1/b/").await.len(), 1);
    b.put_node("n2");
    b.writer().flush().await;
    eventually("good objects go on", || async {
        let mut agent = a.agent(&pki).await;
        (dump(&mut agent, "cilium/cache/nodes/v1/b/").await.len() == 2).then_some(())
    })
    .await;
    let metrics = a.server.as_ref().unwrap().metrics.encode();
    assert!(
        metrics
            .contains("isthmus_clustermesh_refused_objects_total{target_cluster=\"b\",reason=\"too_large\"}"),
        "{metrics}"
    );

    // A list meets them too: a server that starts now. Pages of many large values have to be read in parts.
    for index in 0..12 {
        raw.put(
            b.key(Kind::Nodes, &format!("huge{index}")),
            "z".repeat(8 * 1024 * 1024),
            None,
        )
        .await
        .unwrap();
    }
    let mut a = a;
    let stopped = a.server.take().unwrap().stop().await;
    a.server = Some(Apiserver::start(stopped).await);
    a.server.as_ref().unwrap().ready().await;
    let status = a
        .until(&pki, "b", "ready again", |status| {
            status.ready && status.objects["nodes"] == 2
        })
        .await;
    assert!(reasons(&status)["too_large"] >= 12, "{status:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clusters_that_do_not_fit_are_refused_as_a_whole() {
    let pki = Pki::new();
    let (a, b) = pair(&pki).await;
    let c = Cluster::start("c", 3, &pki).await;
    a.until(&pki, "b", "ready", |status| status.ready).await;
    a.configure("c", &pki.yaml(c.address(), "remote-a"));
    let refused =
        |words: &'static str| move |status: &RemoteStatus| !status.ready && status.status.contains(words);
    a.until(&pki, "c", "no config", refused("publishes no cluster config"))
        .await;
    for (config, words) in [
        (r#"{"id":1,"capabilities":{"maxConnectedClusters":255}}"#, "own"),
        (
            r#"{"id":2,"capabilities":{"maxConnectedClusters":255}}"#,
            "cluster b's",
        ),
        (
            r#"{"id":300,"capabilities":{"maxConnectedClusters":255}}"#,
            "not valid",
        ),
        (
            r#"{"id":3,"capabilities":{"maxConnectedClusters":511}}"#,
            "max-connected-clusters 511",
        ),
        ("{", "not valid"),
    ] {
        c.writer().put(keys::cluster_config(&c.name), config);
        c.writer().flush().await;
        let status = a.until(&pki, "c", config, refused(words)).await;
        assert!(status.connected && status.cluster_id == 0);
    }
    let mut agent = a.agent(&pki).await;
    assert!(dump(&mut agent, "cilium/cluster-config/c").await.is_empty());
    c.publish().await;
    a.until(&pki, "c", "admitted in the end", |status| status.ready)
        .await;
    exact(&a, &c, &pki, &Kind::ALL).await;
    // A duplicate is admitted as soon as the other is gone.
    c.writer().put(keys::cluster_config(&c.name), r#"{"id":2}"#);
    c.writer().flush().await;
    a.until(&pki, "c", "a duplicate", refused("cluster b's")).await;
    assert_eq!(
        dump(&mut agent, "cilium/cache/nodes/v1/c/").await.len(),
        1,
        "what was there stays"
    );
    std::fs::remove_file(a.files.path().join("b")).unwrap();
    let status = a
        .until(&pki, "c", "admitted under its new ID", |status| {
            status.cluster_id == 2
        })
        .await;
    assert!(!status.slices);
    drop(b);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plain_cilium_cluster_is_mirrored_without_canaries_and_slices() {
    let pki = Pki::new();
    let (a, mut b) = (
        Cluster::start("a", 1, &pki).await,
        Cluster::start("b", 2, &pki).await,
    );
    b.publish().await;
    b.writer().put(
        keys::cluster_config(&b.name),
        r#"{"id":2,"capabilities":{"maxConnectedClusters":255}}"#,
    );
    for kind in Kind::ALL {
        b.writer()
            .delete(keys::canary(&b.name, kind, Scope::State).unwrap().as_bytes());
    }
    b.writer().flush().await;
    // It is read from etcd itself: an old mesh has nothing else.
    a.configure("b", &format!("endpoints: ['http://127.0.0.1:{}']\n", b.etcd.port));
    let status = a.until(&pki, "b", "ready", |status| status.ready).await;
    assert_eq!((status.slices, status.synced.len()), (false, 4));
    exact(
        &a,
        &b,
        &pki,
        &[Kind::Nodes, Kind::Ip, Kind::Identities, Kind::Services],
    )
    .await;
    // It is upgraded: frames and slices come, after their canaries.
    b.publish().await;
    a.until(&pki, "b", "slices too", |status| {
        status.ready && status.slices && status.synced.len() == 6
    })
    .await;
    exact(&a, &b, &pki, &Kind::ALL).await;
    // A mirror of a mirror: a's API server as the source of b's state.
    let c = Cluster::start("c", 3, &pki).await;
    c.configure("b", &pki.yaml(a.address(), "admin-a"));
    let status = c.until(&pki, "b", "ready through a", |status| status.ready).await;
    assert_eq!(status.cluster_id, 2);
    exact(&c, &b, &pki, &Kind::ALL).await;
    b.etcd.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_remote_cluster_that_goes_away_keeps_its_state_here_and_is_exact_again_after() {
    let pki = Pki::new();
    let (a, mut b) = pair(&pki).await;
    a.until(&pki, "b", "ready", |status| status.ready && status.connected)
        .await;
    exact(&a, &b, &pki, &Kind::ALL).await;
    let feeds = vec![
        Feed::prefix("cilium/cache/nodes/v1/b/", 1 << 20),
        Feed::prefix("isthmus/cache/slices/v1/b/", 1 << 20),
    ];
    let view = View::open(pki.config(a.address(), "local-a"), feeds);
    view.until("synced", |view| view.synced.len() == 2 && view.keys.len() == 2)
        .await;

    // Its API server is gone; changes happen meanwhile.
    let stopped = b.server.take().unwrap().stop().await;
    let status = a
        .until(&pki, "b", "not connected", |status| !status.connected)
        .await;
    assert!(
        status.ready && status.num_failures > 0 && !status.status.is_empty(),
        "{status:?}"
    );
    b.put_node("n2");
    b.writer().flush().await;
    b.server = Some(Apiserver::start(stopped).await);
    a.until(&pki, "b", "connected again", |status| status.connected)
        .await;
    exact(&a, &b, &pki, &Kind::ALL).await;

    // Its etcd pauses: its server serves the last state, and the heartbeat grows old.
    b.etcd.signal(Signal::SIGSTOP);
    let health = b.server.as_ref().unwrap().health.clone();
    eventually("b has noticed", || async {
        matches!(health.snapshot()["etcd"], isthmus_runtime::State::Degraded(_)).then_some(())
    })
    .await;
    let before = a.status(&pki, "b").await.unwrap();
    assert!(before.connected && before.ready);
    b.etcd.signal(Signal::SIGCONT);
    a.until(&pki, "b", "its heart beats again", |status| {
        status.heartbeat_seen_ms > before.heartbeat_seen_ms
    })
    .await;

    // Its etcd loses everything, and the operator publishes it again.
    b.etcd.restart_empty().await;
    b.put_node("n3");
    b.writer().flush().await;
    eventually("it is published again", || async {
        let mut client = b.etcd.client().await.ok()?;
        (dump(&mut client, &b.key(Kind::Nodes, "")).await.len() == 3).then_some(())
    })
    .await;
    exact(&a, &b, &pki, &Kind::ALL).await;
    let seen = view
        .until("the agent's view is complete", |view| {
            view.keys.len() == 4 && view.synced.len() == 2
        })
        .await;
    assert_eq!(
        seen.deleted,
        Vec::<bytes::Bytes>::new(),
        "nothing was lost on the way"
    );

    // History compacted while a is cut off.
    let stopped = b.server.take().unwrap().stop().await;
    b.put_node("n4");
    b.writer().delete(b.key(Kind::Nodes, "n1").as_bytes());
    b.writer().flush().await;
    let mut client = b.etcd.client().await.unwrap();
    let revision = client.get("x", None).await.unwrap().header().unwrap().revision();
    client.compact(revision, None).await.unwrap();
    b.server = Some(Apiserver::start(stopped).await);
    exact(&a, &b, &pki, &Kind::ALL).await;
    let seen = view
        .until("n1 is gone, n4 there", |view| {
            view.value("cilium/cache/nodes/v1/b/n4").is_some()
                && view.value("cilium/cache/nodes/v1/b/n1").is_none()
        })
        .await;
    assert!(seen.value("isthmus/cache/slices/v1/b/shop/cart/s0").is_some());
}
