//! Who may read what, and who gets in at all.

use etcd_client::{Error, GetOptions, WatchOptions};
use isthmus_kvstore::{Client, EtcdConfig, Feed};
use tonic::Code;

use crate::lab::{Apiserver, Etcd, Pki, View, config, quick};

async fn server() -> (Etcd, Pki, Apiserver) {
    let (etcd, pki) = (Etcd::start().await, Pki::new());
    let mut theirs = etcd.client().await.unwrap();
    for key in [
        "cilium/.heartbeat",
        "cilium/state/nodes/v1/c1/n1",
        "isthmus/local/services/v1/c1/a/b",
    ] {
        theirs.put(key, "x", None).await.unwrap();
    }
    let server = Apiserver::start(config("c1", 1, etcd.config(), &pki)).await;
    server.ready().await;
    (etcd, pki, server)
}

fn status(error: Error) -> (Code, String) {
    match error {
        Error::GRpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("{other}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_decide_what_is_readable() {
    let (_etcd, pki, server) = server().await;
    let denied = (Code::PermissionDenied, "etcdserver: permission denied".to_owned());
    for (name, prefix, allowed) in [
        ("remote", "cilium/.heartbeat", true),
        ("remote-c2", "cilium/state/", true),
        ("remote-c2", "cilium/cluster-config/", false),
        ("remote-c2", "isthmus/local/", false),
        ("remote-c2", "cilium/", false),
        ("local-c1", "isthmus/local/", true),
        ("local-c1", "cilium/cluster-config/", true),
        ("local-c1", "", false),
        ("local-c2", "cilium/.heartbeat", false),
        ("admin-c1", "cilium/", true),
        ("nobody", "cilium/.heartbeat", false),
    ] {
        let what = format!("{name} reads {prefix}");
        let mut client = pki.client(server.address, name).await;
        let key = if prefix.is_empty() { "\0" } else { prefix };
        let options = if prefix.is_empty() {
            GetOptions::new().with_from_key()
        } else {
            GetOptions::new().with_prefix()
        };
        let answer = client.get(key, Some(options)).await;
        let options = if prefix.is_empty() {
            WatchOptions::new().with_from_key()
        } else {
            WatchOptions::new().with_prefix()
        };
        let mut watch = client.watch(key, Some(options)).await.unwrap();
        let created = watch.message().await.unwrap().unwrap();
        assert!(created.created() && created.header().is_some(), "{what}");
        if allowed {
            assert!(answer.is_ok(), "{what}");
            assert!(!created.canceled(), "{what}");
        } else {
            assert_eq!(status(answer.unwrap_err()), denied, "{what}");
            assert!(created.canceled(), "{what}");
            assert_eq!(created.watch_id(), -1);
            assert_eq!(
                created.cancel_reason(),
                "rpc error: code = PermissionDenied desc = etcdserver: permission denied"
            );
        }
        for error in [
            client.put("cilium/state/x", "1", None).await.unwrap_err(),
            client.delete("cilium/state/x", None).await.unwrap_err(),
            client
                .txn(etcd_client::Txn::new().and_then([etcd_client::TxnOp::put("cilium/state/x", "1", None)]))
                .await
                .unwrap_err(),
            client.compact(1, None).await.unwrap_err(),
        ] {
            assert_eq!(status(error), denied, "{name} writes");
        }
    }
    let mut client = pki.client(server.address, "local-c1").await;
    assert_eq!(
        status(client.get("", None).await.unwrap_err()),
        (
            Code::InvalidArgument,
            "etcdserver: key is not provided".to_owned()
        )
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_around_reading_keep_old_clients_happy() {
    let (_etcd, pki, server) = server().await;
    let mut client = pki.client(server.address, "remote").await;
    let status_answer = client.status().await.unwrap();
    assert_eq!(status_answer.version(), "3.5.0");
    assert_eq!(
        status_answer.leader(),
        status_answer.header().unwrap().member_id()
    );
    let lease = client.lease_grant(60, None).await.unwrap();
    assert!(lease.id() != 0 && lease.ttl() >= 60);
    let (mut keeper, mut answers) = client.lease_keep_alive(lease.id()).await.unwrap();
    keeper.keep_alive().await.unwrap();
    let alive = answers.message().await.unwrap().unwrap();
    assert!(alive.id() == lease.id() && alive.ttl() > 0 && alive.header().is_some());
    client.lease_revoke(lease.id()).await.unwrap();
    assert_eq!(client.member_list().await.unwrap().members().len(), 1);
    // Every header names the same cluster: Cilium's readers pin it.
    let id = client
        .get("cilium/.heartbeat", None)
        .await
        .unwrap()
        .header()
        .unwrap()
        .cluster_id();
    assert_eq!(status_answer.header().unwrap().cluster_id(), id);
    assert_eq!(alive.header().unwrap().cluster_id(), id);
    let mut nobody = pki.client(server.address, "nobody").await;
    assert!(nobody.status().await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_certificate_or_a_foreign_one_does_not_get_in() {
    let (_etcd, pki, server) = server().await;
    let other = Pki::new();
    let (cert, key) = other.issue("admin-c1");
    let base = format!(
        "endpoints: ['https://localhost:{}']\ntrusted-ca-file: {}\n",
        server.address.port(),
        pki.path("ca.crt").display()
    );
    let foreign = format!(
        "{base}cert-file: {}\nkey-file: {}\n",
        cert.display(),
        key.display()
    );
    for text in [base, foreign] {
        // With TLS 1.3 the client learns of its refusal at its first read.
        let result = match Client::connect(&EtcdConfig::parse(&text).unwrap(), &quick()).await {
            Err(_) => continue,
            Ok(client) => client.range(Default::default()).await,
        };
        assert!(result.is_err());
    }
    // A server that the client does not trust.
    let distrust = EtcdConfig::parse(&format!(
        "endpoints: ['https://localhost:{}']\ntrusted-ca-file: {}\n",
        server.address.port(),
        other.path("ca.crt").display()
    ));
    assert!(Client::connect(&distrust.unwrap(), &quick()).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_denied_feed_does_not_stop_the_others() {
    let (_etcd, pki, server) = server().await;
    let feeds = vec![
        Feed::prefix("isthmus/local/", 1024),
        Feed::prefix("cilium/state/", 1024),
    ];
    let view = View::open(pki.config(server.address, "remote-c2"), feeds);
    let view = view
        .until("one feed is synced, the other refused", |view| {
            view.synced.len() == 1 && !view.failed.is_empty()
        })
        .await;
    assert!(view.connected && view.value("cilium/state/nodes/v1/c1/n1").is_some());
    assert!(view.failed[0].contains("permission denied"), "{:?}", view.failed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotated_server_certificate_is_shown_at_the_next_handshake() {
    let (_etcd, pki, server) = server().await;
    // Another server certificate under another CA.
    let other = Pki::new();
    let mut old = pki.client(server.address, "admin-c1").await;
    // It connects with its first call.
    old.get("cilium/.heartbeat", None).await.unwrap();
    for file in ["server.crt", "server.key"] {
        std::fs::copy(other.path(file), pki.path(file)).unwrap();
    }
    let (cert, key) = pki.issue("admin-c1");
    let config = EtcdConfig::parse(&format!(
        "endpoints: ['https://localhost:{}']\ntrusted-ca-file: {}\ncert-file: {}\nkey-file: {}\n",
        server.address.port(),
        other.path("ca.crt").display(),
        cert.display(),
        key.display()
    ));
    Client::connect(&config.unwrap(), &quick()).await.unwrap();
    assert!(
        old.get("cilium/.heartbeat", None).await.is_ok(),
        "open connections stay"
    );
}
