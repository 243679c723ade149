//! The operator between a Kubernetes API (the sandbox's emulator) and a real etcd.
#![expect(
    clippy::unwrap_used,
    reason = "a failed step of a test's set-up fails the test"
)]

use std::time::{Duration, Instant};

use isthmus_model::{ClusterId, ClusterName, IdentityRange, MaxConnectedClusters, NumericIdentity};
use isthmus_wire::{ClusterConfig, identity, ip, slice as slice_wire};
use serde_json::json;

mod etcd;
mod world;

use world::*;

/// Longest wait for anything.
const DEADLINE: Duration = Duration::from_secs(40);

/// Waits until `condition` holds, and fails at the deadline.
pub async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !condition().await {
        assert!(Instant::now() < end, "not within {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn c1() -> (ClusterName, ClusterId, IdentityRange) {
    let max = MaxConnectedClusters::C255;
    let id = ClusterId::new(1, max).unwrap();
    (ClusterName::new("c1").unwrap(), id, IdentityRange::of(id, max))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_published_is_what_readers_accept() {
    let world = World::start().await;
    let operator = world.live_operator("a").await;
    let content = world.etcd.content().await;
    let (cluster, id, range) = c1();
    let plain: Vec<_> = content
        .keys()
        .filter(|key| !key.starts_with(IDENTITIES))
        .cloned()
        .collect();
    assert_eq!(plain, World::expected_keys());
    let config = ClusterConfig::decode(&content["cilium/cluster-config/c1"].value).unwrap();
    assert!(config.has_slices() && config.capabilities.synced_canaries);
    let entry = ip::decode("10.1.0.21", &content[POD_IP].value, range).unwrap();
    let labels = &content[&format!("{IDENTITIES}{}", entry.identity)];
    let labels = identity::decode(entry.identity, &labels.value, &cluster, range).unwrap();
    assert_eq!(labels.find("app").unwrap().value, "cart");
    let node = isthmus_wire::node::decode("n1", &content[NODE].value, &cluster, id).unwrap();
    assert_eq!(node.router_ips[0].to_string(), "10.1.0.1");
    assert_eq!(node.identity, NumericIdentity::REMOTE_NODE);
    let slice = slice_wire::decode_slice("shop/cart/cart-1", &content[SLICE].value, &cluster, id).unwrap();
    assert_eq!(slice.endpoints.len(), 1);
    // Canaries were written after everything else.
    let newest = |canary: bool| {
        let entries = content
            .iter()
            .filter(|(key, _)| key.starts_with("cilium/synced/") == canary);
        entries.map(|(_, entry)| entry.mod_revision).collect::<Vec<_>>()
    };
    assert!(newest(true).iter().min() > newest(false).iter().max());
    assert!(operator.get("/readyz").await.starts_with("HTTP/1.1 200"));
    assert_eq!(
        operator
            .metric("isthmus_operator_objects{kind=\"services\"}")
            .await,
        Some(1.0)
    );
    eventually("a heartbeat", async || world.etcd.heartbeat().await > 0).await;
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_and_deletions_follow() {
    let world = World::start().await;
    let operator = world.live_operator("a").await;
    let before = world.etcd.content().await;
    world.put_endpoints(&["10.1.0.21", "10.1.0.22"]);
    let has_both = async || {
        let text = world.value(CILIUM_SERVICE).await.unwrap();
        text.contains("10.1.0.21") && text.contains("10.1.0.22")
    };
    eventually("the new endpoint", has_both).await;
    let after = world.etcd.content().await;
    let changed: Vec<_> = after
        .iter()
        .filter(|(key, entry)| before.get(*key) != Some(entry))
        .collect();
    let changed: Vec<_> = changed.into_iter().map(|(key, _)| key.as_str()).collect();
    assert_eq!(changed, [CILIUM_SERVICE, LOCAL_SLICE, SLICE]);

    world.change(SERVICES, "cart", |service| {
        service["metadata"]["annotations"]["service.cilium.io/shared"] = json!("false");
    });
    eventually("no export", async || world.value(SLICE).await.is_none()).await;
    eventually("no blob", async || world.value(CILIUM_SERVICE).await.is_none()).await;
    assert!(world.value(LOCAL_SLICE).await.is_some());

    world.delete("pods", "cart-0");
    eventually("no address", async || world.value(POD_IP).await.is_none()).await;
    world.delete(SERVICES, "cart");
    eventually("no slice", async || world.value(LOCAL_SLICE).await.is_none()).await;
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_numbers_and_writes_nothing() {
    let world = World::start().await;
    for number in 0..20 {
        world.put_pod(
            &format!("p{number}"),
            &format!("app{number}"),
            &format!("10.1.0.{}", 100 + number),
        );
    }
    world.live_operator("a").await.stop().await;
    let before = world.etcd.content().await;
    assert_eq!(
        before.keys().filter(|key| key.starts_with(IDENTITIES)).count(),
        21
    );
    let operator = world.live_operator("b").await;
    assert_eq!(world.etcd.content().await, before);
    drop(operator);
    // What came or went while no operator was there is made good, and no more than that.
    world.delete("pods", "p3");
    world.put_pod("p30", "app7", "10.1.0.130");
    let operator = world.live_operator("c").await;
    let mut after = world.etcd.content().await;
    let range = c1().2;
    let number = |content: &etcd::Content, address: &str| {
        let entry = &content[&format!("cilium/state/ip/v1/default/{address}")];
        ip::decode(address, &entry.value, range).unwrap().identity
    };
    assert_eq!(number(&after, "10.1.0.130"), number(&before, "10.1.0.107"));
    after.remove("cilium/state/ip/v1/default/10.1.0.130").unwrap();
    let mut want = before;
    want.remove("cilium/state/ip/v1/default/10.1.0.103").unwrap();
    assert_eq!(after, want);
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_emptied_etcd_is_filled_again() {
    let mut world = World::start().await;
    let operator = world.live_operator("a").await;
    let data = |content: etcd::Content| {
        let data = content
            .into_iter()
            .filter(|(key, _)| !key.starts_with("cilium/synced/"));
        data.map(|(key, entry)| (key, entry.value)).collect::<Vec<_>>()
    };
    let before = data(world.etcd.content().await);
    // One key, removed by somebody else.
    world.etcd.delete(NODE).await;
    eventually("the node again", async || world.value(NODE).await.is_some()).await;
    // All of it, with the history.
    world.etcd.wipe();
    world.put_endpoints(&["10.1.0.21", "10.1.0.22"]);
    world.put_endpoints(&["10.1.0.21"]);
    world.etcd.run().await;
    let keys = World::expected_keys();
    eventually("all keys again", async || {
        let content = world.etcd.content().await;
        keys.iter().all(|key| content.contains_key(key))
    })
    .await;
    assert_eq!(data(world.etcd.content().await), before);
    // A plain outage: what changes meanwhile arrives afterwards.
    world.etcd.stop();
    world.put_endpoints(&["10.1.0.23"]);
    world.etcd.run().await;
    let arrived = async || {
        world
            .value(CILIUM_SERVICE)
            .await
            .is_some_and(|text| text.contains("10.1.0.23"))
    };
    eventually("the change", arrived).await;
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_is_stale_and_ours_is_deleted_at_the_start() {
    let world = World::start().await;
    let (stale, foreign) = (
        [
            "cilium/state/nodes/v1/c1/gone",
            "cilium/state/ip/v1/default/10.9.9.9",
            "cilium/state/identities/v1/id/nonsense",
            "cilium/state/identities/v1/id/131072",
            "cilium/state/services/v1/c1/shop/gone",
            "isthmus/local/slices/v1/c1/shop/gone/x",
            "cilium/synced/c1/cilium/state/other/v1",
        ],
        [
            "cilium/state/nodes/v1/c10/other",
            "cilium/cluster-config/c2",
            "cilium/synced/c10/x",
            "other/key",
        ],
    );
    for key in stale.iter().chain(&foreign) {
        world.etcd.put(key, "left behind").await;
    }
    let operator = world.live_operator("a").await;
    let gone = async || {
        let keys = world.keys().await;
        stale.iter().all(|key| !keys.iter().any(|known| known == key))
    };
    eventually("stale keys gone", gone).await;
    let keys = world.keys().await;
    assert!(
        foreign.iter().all(|key| keys.iter().any(|known| known == key)),
        "{keys:?}"
    );
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_deleted_while_kubernetes_is_away() {
    let mut world = World::start().await;
    world.live_operator("a").await.stop().await;
    let before = world.etcd.content().await;
    world.stop_serving().await;
    let operator = world.operator("b").await;
    operator.publishing("the heartbeat goes on").await;
    let beat = world.etcd.heartbeat().await;
    eventually("a heartbeat", async || world.etcd.heartbeat().await > beat).await;
    assert_eq!(world.etcd.content().await, before);
    assert!(operator.get("/readyz").await.starts_with("HTTP/1.1 503"));
    world.serve().await;
    world.delete("pods", "cart-0");
    eventually("the deletion", async || world.value(POD_IP).await.is_none()).await;
    operator.is_live().await;

    // Away again, under a leader: it cannot renew, and all stays.
    let before = world.etcd.content().await;
    world.stop_serving().await;
    operator.publishing("the heartbeat goes on").await;
    assert_eq!(world.etcd.content().await, before);
    world.serve().await;
    world.put_pod("cart-1", "cart", "10.1.0.31");
    let key = "cilium/state/ip/v1/default/10.1.0.31";
    eventually("the new pod", async || world.value(key).await.is_some()).await;
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_two_operators_writes_and_the_other_takes_over() {
    let world = World::start().await;
    let a = world.live_operator("a").await;
    let b = world.operator("b").await;
    b.publishing("standing by, a leads").await;
    assert_eq!(world.holder().as_deref(), Some("a"));
    let before = world.etcd.content().await;
    a.stop().await;
    // Released and not left to expire; the other one may have it already.
    assert_ne!(world.holder().as_deref(), Some("a"));
    b.is_live().await;
    assert_eq!(world.holder().as_deref(), Some("b"));
    assert_eq!(world.etcd.content().await, before);

    // The Lease is taken away: no write after that.
    let events = "isthmus_operator_kube_events_total{kind=\"endpointslices\"}";
    let seen = b.metric(events).await.unwrap();
    world
        .kube
        .modify(
            LEASES,
            "kube-system",
            isthmus_operator::config::LEASE_NAME,
            isthmus_sandbox_kube::Part::Whole,
            |lease| {
                lease["spec"]["holderIdentity"] = json!("c");
                lease["spec"]["leaseDurationSeconds"] = json!(3600);
            },
        )
        .unwrap();
    b.publishing("standing by, c leads").await;
    world.put_endpoints(&["10.1.0.77"]);
    eventually("the event", async || b.metric(events).await.unwrap() > seen).await;
    assert_eq!(world.etcd.content().await, before);
    b.stop().await;
    assert_eq!(world.holder().as_deref(), Some("c"));
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_annotations_lose_nothing_but_themselves() {
    let world = World::start().await;
    let operator = world.live_operator("a").await;
    world.change(SERVICES, "cart", |service| {
        service["metadata"]["annotations"]["service.cilium.io/affinity"] = json!("nearby");
    });
    world.change(SLICES, "cart-1", |slice| {
        slice["metadata"]["annotations"] = json!({"service.cilium.io/weight": "heavy"});
        slice["endpoints"] = world::slice(&["10.1.0.21", "10.1.0.22"])["endpoints"].clone();
    });
    let (cluster, id, _) = c1();
    eventually("the endpoint", async || {
        let content = world.etcd.content().await;
        let slice =
            slice_wire::decode_slice("shop/cart/cart-1", &content[SLICE].value, &cluster, id).unwrap();
        slice.endpoints.len() == 2 && slice.endpoints.iter().all(|endpoint| endpoint.weight == 1)
    })
    .await;
    for kind in ["services", "endpointslices"] {
        let metric =
            format!("isthmus_operator_object_problems_total{{kind=\"{kind}\",reason=\"annotation\"}}");
        eventually(&metric, async || operator.metric(&metric).await == Some(1.0)).await;
    }
    world.change(SERVICES, "cart", |service| {
        service["metadata"]["annotations"]["service.cilium.io/global"] = json!("perhaps");
    });
    eventually("not global", async || world.value(SLICE).await.is_none()).await;
    assert!(world.value(LOCAL_SLICE).await.is_some());
    operator.stop().await;
}
