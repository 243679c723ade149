//! What the receiver grants, on the fly: withdrawn at once, back with a list, and nothing else moves.

use isthmus_kvstore::Feed;
use isthmus_wire::{
    ip,
    keys::Kind,
    status::{Phase, RemoteStatus},
};

use crate::{
    clusters::{exact, pair},
    lab::{Pki, View, dump, eventually},
};

fn refused(reason: &'static str) -> impl Fn(&RemoteStatus) -> bool {
    move |status| status.refused.contains_key(reason)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grants_change_what_is_mirrored_and_nothing_else() {
    let pki = Pki::new();
    let (a, mut b) = pair(&pki).await;
    a.until(&pki, "b", "ready", |status| status.ready).await;
    exact(&a, &b, &pki, &Kind::ALL).await;
    let plain = pki.yaml(b.address(), "remote-a");
    let with = |accept: &str| format!("{plain}isthmus-accept: {accept}\n");

    // A second endpoint, outside of what will be granted.
    let entry = b.ip_entry("10.77.0.1", 131_073);
    b.put(Kind::Ip, "10.77.0.1", ip::encode(&entry));
    b.writer().flush().await;
    let feeds = vec![
        Feed::prefix("cilium/cache/ip/v1/b/", 1 << 20),
        Feed::prefix("cilium/cache/nodes/v1/b/", 1 << 20),
    ];
    let view = View::open(pki.config(a.address(), "local-a"), feeds);
    view.until("both addresses and the node", |view| view.keys.len() == 3)
        .await;

    a.configure(
        "b",
        &with("{pod-cidrs: [10.2.0.0/16], node-cidrs: [172.18.0.0/16], namespaces: [shop]}"),
    );
    let status = a
        .until(&pki, "b", "one is refused", refused("not_granted_cidr"))
        .await;
    assert!(
        status.ready && status.connected && status.restricted,
        "{status:?}"
    );
    assert!(
        status
            .last_refusals
            .iter()
            .any(|text| text.contains("10.77.0.1") && text.contains("pod-cidrs")),
        "{status:?}"
    );
    // The identity has no namespace, which may be anybody's: refused as well.
    assert!(status.refused.contains_key("not_granted_namespace"), "{status:?}");
    let seen = view
        .until("withdrawn", |view| view.keys.len() == 2 && view.synced.len() == 2)
        .await;
    assert_eq!(
        seen.deleted,
        [&b"cilium/cache/ip/v1/b/10.77.0.1"[..]],
        "nothing else went"
    );
    // The connection was not made anew for it.
    let status = a
        .until(&pki, "b", "listed again", |status| status.phase == Phase::Synced)
        .await;
    assert_eq!(status.num_failures, 0, "{status:?}");

    a.configure("b", &with("{namespaces: [shop]}"));
    view.until("granted again", |view| view.keys.len() == 3).await;

    // A mistake is told, and what was granted before goes on.
    a.configure("b", &with("{pod-cidr: [10.2.0.0/16]}"));
    let status = a
        .until(&pki, "b", "a complaint", |status| {
            status.status.contains("pod-cidr")
        })
        .await;
    assert!(status.ready && status.restricted, "{status:?}");

    // A cluster that is away, or plays dead, is withdrawn all the same.
    let stopped = b.server.take().unwrap().stop().await;
    a.until(&pki, "b", "away", |status| {
        status.phase == Phase::Stale && status.stale_since_ms > 0
    })
    .await;
    a.configure("b", &with("{pod-cidrs: [], node-cidrs: []}"));
    eventually("all addresses are withdrawn", || async {
        let mut agent = a.agent(&pki).await;
        let left = dump(&mut agent, "cilium/cache/").await;
        let placed =
            |key: &[u8]| key.starts_with(b"cilium/cache/ip/") || key.starts_with(b"cilium/cache/nodes/");
        (!left.keys().any(|key| placed(key))).then_some(())
    })
    .await;

    // Without grants it is exact again.
    a.configure("b", &plain);
    b.server = Some(crate::lab::Apiserver::start(stopped).await);
    a.until(&pki, "b", "back", |status| {
        status.phase == Phase::Synced && !status.restricted
    })
    .await;
    exact(&a, &b, &pki, &Kind::ALL).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_remote_cluster_has_no_more_than_it_may_and_the_rest_when_there_is_room() {
    let pki = Pki::new();
    let (a, b) = pair(&pki).await;
    a.until(&pki, "b", "ready", |status| status.ready).await;
    let accept = "isthmus-accept: {max-entries: {nodes: 2}, max-bytes: 1Mi}\n";
    a.configure("b", &format!("{}{accept}", pki.yaml(b.address(), "remote-a")));
    for number in 2..5 {
        b.put_node(&format!("n{number}"));
    }
    b.writer().flush().await;
    let status = a.until(&pki, "b", "some are too many", refused("too_many")).await;
    assert!(status.ready && status.objects["nodes"] == 2, "{status:?}");
    // Bytes, of all kinds together.
    let large = b.node("n1");
    let large = isthmus_model::Node {
        boot_id: "x".repeat(900_000),
        ..large
    };
    b.put(Kind::Nodes, "n1", isthmus_wire::node::encode(&large));
    b.writer().flush().await;
    eventually("the large one is taken", || async {
        (a.status(&pki, "b").await?.bytes > 900_000).then_some(())
    })
    .await;
    let entry = isthmus_model::IpEntry {
        pod_name: "y".repeat(300_000),
        ..b.ip_entry("10.2.0.77", 131_073)
    };
    b.put(Kind::Ip, "10.2.0.77", ip::encode(&entry));
    b.writer().flush().await;
    a.until(&pki, "b", "the next is too much", refused("too_many_bytes"))
        .await;
    // Room again, by the owner's and by the receiver's doing.
    b.put_node("n1");
    b.writer().flush().await;
    a.until(&pki, "b", "what had no room is read", |status| {
        status.objects["ip"] == 2
    })
    .await;
    a.configure("b", &pki.yaml(b.address(), "remote-a"));
    exact(&a, &b, &pki, &Kind::ALL).await;
}
