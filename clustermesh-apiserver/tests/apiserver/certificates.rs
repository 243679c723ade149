//! Certificates that are wrong, end, or lose their CA, at the handshake and while connections are open; and files that change.

use std::{
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use isthmus_kvstore::{Client, EtcdConfig};
use isthmus_runtime::State;
use rcgen::date_time_ymd;

use crate::{
    lab::{Apiserver, Etcd, Pki, config, eventually, quick},
    raw::{Answers, Dial},
};

const PREFIX: &str = "cilium/state/x/";

async fn server() -> (Etcd, Pki, Apiserver) {
    let (etcd, pki) = (Etcd::start().await, Pki::new());
    let server = Apiserver::start(config("c1", 1, etcd.config(), &pki)).await;
    server.ready().await;
    (etcd, pki, server)
}

fn metric(server: &Apiserver, name: &str) -> i64 {
    server.metric(&format!("apiserver_{name}"))
}

async fn counted(server: &Apiserver, name: &str, at_least: i64) {
    eventually(name, || async {
        (metric(server, name) >= at_least).then_some(())
    })
    .await;
}

/// Puts one more key and gives its revision.
async fn put(etcd: &Etcd) -> i64 {
    let mut client = etcd.client().await.unwrap();
    let answer = client.put(format!("{PREFIX}a"), "x", None).await.unwrap();
    answer.header().unwrap().revision()
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// A certificate that ends `seconds` from now, and its last second.
fn short_lived(pki: &Pki, name: &str, seconds: u64) -> (PathBuf, PathBuf, u64) {
    let last = unix_now() + seconds;
    let (cert, key) = pki.issue_with(name, |params| {
        params.not_after = (UNIX_EPOCH + Duration::from_secs(last)).into();
    });
    (cert, key, last)
}

/// Whether a call with these files gets an answer.
async fn gets_in(server: &Apiserver, dial: &Dial) -> bool {
    let call = async { dial.open(server.address).await?.list(PREFIX).await };
    let answer = tokio::time::timeout(Duration::from_secs(60), call).await;
    answer.expect("an answer or an end").is_ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_has_no_valid_certificate_is_refused_and_counted_by_reason() {
    let (_etcd, pki, server) = server().await;
    let other = Pki::new();
    let ca = pki.path("ca.crt");
    let past = pki.issue_with("remote-past", |params| {
        params.not_before = date_time_ymd(2001, 1, 1);
        params.not_after = date_time_ymd(2002, 1, 1);
    });
    let future = pki.issue_with("remote-future", |params| {
        params.not_before = date_time_ymd(2101, 1, 1);
        params.not_after = date_time_ymd(2102, 1, 1);
    });
    let foreign = other.issue("admin-c1");
    let nameless = pki.issue_with("nameless", |params| {
        params.distinguished_name = rcgen::DistinguishedName::new();
    });
    for (identity, reason) in [
        (Some(past), "certificate_expired"),
        (Some(future), "certificate_not_yet_valid"),
        (Some(foreign), "unknown_ca"),
        (Some(nameless), "no_name"),
        (None, "no_certificate"),
    ] {
        let identity = identity
            .as_ref()
            .map(|(cert, key)| (cert.as_path(), key.as_path()));
        assert!(!gets_in(&server, &Dial::with(&ca, identity)).await, "{reason}");
        let name = format!("rejected_connections_total{{reason=\"{reason}\"}}");
        counted(&server, &name, 1).await;
        assert_eq!(metric(&server, &name), 1, "{reason}");
    }
    // A name without rights gets in and is denied call by call (see `rights`); it is counted as well.
    let answer = async {
        Dial::new(&pki, "nobody")
            .open(server.address)
            .await?
            .list(PREFIX)
            .await
    };
    assert_eq!(
        answer.await.unwrap_err().to_string(),
        "etcdserver: permission denied"
    );
    let text = server.metrics.encode();
    assert!(
        text.contains("server_connections_total{outcome=\"no_rights\"} 1"),
        "{text}"
    );
    assert!(gets_in(&server, &Dial::new(&pki, "remote-c2")).await);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_client_says_that_a_server_has_another_name() {
    let (_etcd, pki, server) = server().await;
    let text = pki
        .yaml(server.address, "remote-c2")
        .replace("a.mesh.cilium.io", "b.mesh.cilium.io");
    let error = Client::connect(&EtcdConfig::parse(&text).unwrap(), &quick()).await;
    let error = error.err().unwrap().to_string();
    assert!(
        error.contains("b.mesh.cilium.io") && error.contains("not valid for name"),
        "{error}"
    );
    counted(
        &server,
        "rejected_connections_total{reason=\"server_certificate_refused\"}",
        1,
    )
    .await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_ends_with_its_certificate_and_a_resumed_session_does_not_outlive_it() {
    let (etcd, pki, server) = server().await;
    let mut lasting = Dial::new(&pki, "remote-c3").open(server.address).await.unwrap();
    let mut lasting = lasting.watch(PREFIX, 0).await.unwrap();
    let (cert, key, last) = short_lived(&pki, "remote-c2", 15);
    let dial = Dial::with(&pki.path("ca.crt"), Some((&cert, &key)));
    let mut first = dial.open(server.address).await.unwrap();
    // Tickets come with the first answer.
    first.list(PREFIX).await.unwrap();
    let mut second = dial.open(server.address).await.unwrap();
    assert!(
        !first.resumed && second.resumed,
        "within its time a session is resumed"
    );
    let mut watches = [
        first.watch(PREFIX, 0).await.unwrap(),
        second.watch(PREFIX, 0).await.unwrap(),
    ];
    let revision = put(&etcd).await;
    for watch in watches.iter_mut().chain([&mut lasting]) {
        assert_eq!(watch.revisions(revision).await.unwrap(), [revision]);
    }
    for watch in &mut watches {
        let end = tokio::time::timeout(Duration::from_secs(60), watch.revisions(i64::MAX));
        assert!(end.await.expect("it ends").is_err());
        assert!(unix_now() > last, "not before its time");
    }
    counted(
        &server,
        "closed_connections_total{reason=\"certificate_expired\"}",
        2,
    )
    .await;
    // The client does not know, and shows its ticket: no certificate is sent, and none verified by the handshake.
    assert!(!gets_in(&server, &dial).await);
    counted(
        &server,
        "rejected_connections_total{reason=\"certificate_expired\"}",
        1,
    )
    .await;
    let revision = put(&etcd).await;
    assert_eq!(
        lasting.revisions(revision).await.unwrap(),
        [revision],
        "others stay"
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ca_that_is_taken_out_closes_its_connections_and_others_lose_nothing() {
    let (etcd, pki, server) = server().await;
    let theirs = Pki::new();
    let own_ca = std::fs::read_to_string(pki.path("ca.crt")).unwrap();
    let their_ca = std::fs::read_to_string(theirs.path("ca.crt")).unwrap();
    let (cert, key) = theirs.issue("remote-c9");
    let ca = pki.dir.path().join("own-ca.crt");
    std::fs::write(&ca, &own_ca).unwrap();
    let stranger = Dial::with(&ca, Some((&cert, &key)));
    let dial = Dial::new(&pki, "remote-c2");
    // Both CAs.
    std::fs::write(pki.path("ca.crt"), format!("{own_ca}{their_ca}")).unwrap();
    let mut connection = dial.open(server.address).await.unwrap();
    let mut watch = connection.watch(PREFIX, 0).await.unwrap();
    let mut closing = stranger.open(server.address).await.unwrap();
    let mut closed = closing.watch(PREFIX, 0).await.unwrap();
    let expect = async |watch: &mut Answers| {
        let revision = put(&etcd).await;
        assert_eq!(watch.revisions(revision).await.unwrap(), [revision]);
        revision
    };
    let revision = expect(&mut watch).await;
    assert_eq!(closed.revisions(revision).await.unwrap(), [revision]);
    // The server's own certificate and key change.
    let (cert, key) = pki.issue("renewed");
    std::fs::copy(cert, pki.path("server.crt")).unwrap();
    std::fs::copy(key, pki.path("server.key")).unwrap();
    assert!(gets_in(&server, &stranger).await);
    let revision = expect(&mut watch).await;
    assert_eq!(closed.revisions(revision).await.unwrap(), [revision]);
    // Their CA goes.
    std::fs::write(pki.path("ca.crt"), &own_ca).unwrap();
    let end = tokio::time::timeout(Duration::from_secs(60), closed.revisions(i64::MAX));
    assert!(end.await.expect("it ends").is_err());
    counted(&server, "closed_connections_total{reason=\"unknown_ca\"}", 1).await;
    assert!(!gets_in(&server, &stranger).await);
    counted(&server, "rejected_connections_total{reason=\"unknown_ca\"}", 1).await;
    for _ in 0..3 {
        expect(&mut watch).await;
    }
    assert!(gets_in(&server, &dial).await);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_a_rotation_leaves_the_old_pair_in_use_and_is_shown() {
    let (_etcd, pki, server) = server().await;
    let dial = Dial::new(&pki, "remote-c2");
    let state = || server.health.snapshot().remove("certificates");
    eventually("the certificates are reported", || async {
        (metric(&server, "certificates_usable") == 1).then_some(())
    })
    .await;
    let (cert, key) = pki.issue_with("next", |params| params.not_after = date_time_ymd(2101, 1, 1));
    let old_key = std::fs::read(pki.path("server.key")).unwrap();
    std::fs::copy(&key, pki.path("server.key")).unwrap();
    eventually("the complaint", || async {
        (metric(&server, "certificates_usable") == 0).then_some(())
    })
    .await;
    match state() {
        Some(State::Degraded(why)) => assert!(why.contains("server.key"), "{why}"),
        other => panic!("{other:?}"),
    }
    assert!(server.health.is_ready(), "what was good is used");
    assert!(gets_in(&server, &dial).await);
    // Then an unreadable file: the same.
    std::fs::write(pki.path("server.key"), old_key).unwrap();
    counted(&server, "certificates_usable", 1).await;
    std::fs::remove_file(pki.path("server.crt")).unwrap();
    eventually("the complaint", || async {
        (metric(&server, "certificates_usable") == 0).then_some(())
    })
    .await;
    assert!(gets_in(&server, &dial).await);
    // The whole rotation: the new one is in use.
    std::fs::copy(&cert, pki.path("server.crt")).unwrap();
    std::fs::copy(&key, pki.path("server.key")).unwrap();
    let until_2100 = 70 * 365 * 24 * 3600;
    counted(&server, "certificates_usable", 1).await;
    counted(
        &server,
        "certificate_expiry_seconds{certificate=\"server\"}",
        until_2100,
    )
    .await;
    counted(
        &server,
        "certificate_expiry_seconds{certificate=\"client_ca\"}",
        1,
    )
    .await;
    assert_eq!(state(), Some(State::Ok("as in the files".to_owned())));
    assert!(gets_in(&server, &dial).await);
    server.stop().await;
}
