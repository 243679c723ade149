//! What an operator sees: readiness with dark peers, replicas, and every metric that is documented.

use std::{net::TcpListener, time::Duration};

use isthmus_clustermesh_apiserver::mirror::readiness::ReadyTimeouts;
use isthmus_kvstore::{ask_replicas, troubleshoot};
use isthmus_runtime::State;
use isthmus_wire::{keys, status::Phase};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    clusters::{pair, write_file},
    lab::{Apiserver, Etcd, Pki, config, eventually, quick},
};

const PEERS: u32 = 20;
const DARK: u32 = 5;

/// A name and ID of a peer.
fn peer(number: u32) -> (String, u32) {
    (format!("peer{number}"), number + 10)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dark_peers_hold_up_nobody_and_answering_ones_are_waited_for() {
    let (pki, own, others) = (Pki::new(), Etcd::start().await, Etcd::start().await);
    let files = tempfile::tempdir().unwrap();
    // One etcd stands for all peers: as mirrors they have prefixes of their own.
    let mut raw = others.client().await.unwrap();
    raw.put("cilium/.heartbeat", "1", None).await.unwrap();
    for number in 0..PEERS - DARK {
        let (name, id) = peer(number);
        let text = format!(
            "{{\"id\":{id},\"capabilities\":{{\"cached\":true,\"syncedCanaries\":true,\"maxConnectedClusters\":255}}}}"
        );
        raw.put(format!("{}{name}", keys::CLUSTER_CONFIG), text, None)
            .await
            .unwrap();
        for kind in ["nodes", "ip", "identities", "services"] {
            // The last one's canary comes later.
            if (number, kind) != (0, "ip") {
                raw.put(format!("cilium/synced/{name}/cilium/cache/{kind}/v1"), "x", None)
                    .await
                    .unwrap();
            }
        }
        write_file(
            files.path(),
            &name,
            &format!("endpoints: ['http://127.0.0.1:{}']\n", others.port),
        );
    }
    // Some refuse connections, others take them and never answer.
    let mut silent = Vec::new();
    for number in PEERS - DARK..PEERS {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        if number % 2 == 0 {
            silent.push(socket);
        }
        write_file(
            files.path(),
            &peer(number).0,
            &format!("endpoints: ['http://127.0.0.1:{port}']\n"),
        );
    }
    let mut config = config("own", 1, own.config(), &pki);
    config.clustermesh_config = Some(files.path().to_owned());
    // Not this bound is what ends the waiting.
    config.ready = ReadyTimeouts {
        per_cluster: Duration::from_secs(2),
        global: Duration::from_secs(3600),
    };
    let server = Apiserver::start(config).await;
    let state = |server: &Apiserver| server.health.snapshot().get("mirror").cloned();
    // All are there but one, which answers and has more to say.
    eventually("one is waited for, and no other", || async {
        let Some(State::Starting(text)) = state(&server) else {
            return None;
        };
        (text.starts_with("14/20") && text.matches(';').count() == 1 && text.contains("peer0: listing"))
            .then_some(())
    })
    .await;
    assert!(!server.health.is_ready());
    raw.put("cilium/synced/peer0/cilium/cache/ip/v1", "x", None)
        .await
        .unwrap();
    server.ready().await;
    let Some(State::Degraded(text)) = state(&server) else {
        panic!("{:?}", state(&server));
    };
    assert!(
        text.starts_with("15/20") && text.matches("not reachable").count() == 5,
        "{text}"
    );
    // They come back one by one, and all is well; nobody becomes unready on the way.
    for number in PEERS - DARK..PEERS {
        std::fs::remove_file(files.path().join(peer(number).0)).unwrap();
    }
    eventually("all that are left are synced", || async {
        assert!(server.health.is_ready());
        (state(&server) == Some(State::Ok("15/15 remote clusters synced".into()))).then_some(())
    })
    .await;
}

/// What `/metrics` says.
async fn scrape(address: std::net::SocketAddr) -> Option<String> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    let request = "GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await.ok()?;
    Some(text)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_documented_metric_is_there_and_replicas_tell_of_themselves() {
    let pki = Pki::new();
    let (mut a, b) = pair(&pki).await;
    let mut stopped = a.server.take().unwrap().stop().await;
    let admin = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    stopped.admin_listen = Some(admin);
    a.server = Some(Apiserver::start(stopped).await);
    a.configure(
        "b",
        &format!(
            "{}isthmus-accept: {{namespaces: []}}\n",
            pki.yaml(b.address(), "remote-a")
        ),
    );
    let status = a
        .until(&pki, "b", "some are refused", |status| {
            status.phase == Phase::Synced && !status.refused.is_empty()
        })
        .await;
    let progress = &status.progress;
    assert_eq!(
        (progress.left_ms, progress.received),
        (Some(0), progress.expected),
        "{status:?}"
    );
    assert!(
        progress.expected >= 6 && progress.bytes > 0 && status.bytes > 0,
        "{status:?}"
    );
    // A right that a peer does not have.
    let mut remote = pki.client(a.address(), "remote-b").await;
    assert!(remote.get("cilium/cache/nodes/v1/b/n1", None).await.is_err());

    // The table in docs/running.md.
    let documented: Vec<&str> = include_str!("../../../../docs/running.md")
        .lines()
        .filter_map(|line| line.strip_prefix("| `isthmus_clustermesh_")?.split_once('`'))
        .map(|(name, _)| name)
        .collect();
    assert!(documented.len() > 30, "{documented:?}");
    let text = eventually("all documented metrics are scraped", || async {
        let text = scrape(admin).await?;
        let missing: Vec<_> = documented
            .iter()
            .filter(|name| {
                let name = format!("\nisthmus_clustermesh_{name}");
                !text.contains(&format!("{name} ")) && !text.contains(&format!("{name}{{"))
            })
            // Those of another store, and of what has not happened.
            .filter(|name| !name.starts_with("embedded_") && !ABSENT.contains(name))
            .collect();
        missing.is_empty().then_some(text)
    })
    .await;
    // The largest, where there are several.
    let value = |name: &str| -> f64 {
        let lines = text.lines().filter(|line| line.starts_with(name));
        let values = lines.map(|line| line.rsplit(' ').next().unwrap().parse().unwrap());
        values.fold(f64::MIN, f64::max)
    };
    assert!(value("isthmus_clustermesh_server_sent_bytes_total") > 1000.0);
    assert!(value("isthmus_clustermesh_server_requests_denied_total") >= 1.0);
    assert!(value("isthmus_clustermesh_remote_cluster_connected") >= 1.0);
    assert!(value("isthmus_clustermesh_store_bytes") > 0.0);

    // Every address of the API server, with the agents' certificate.
    let mut upstream = pki.config(a.address(), "local-a");
    let unused = TcpListener::bind("127.0.0.2:0").unwrap();
    upstream
        .host_aliases
        .get_mut("a.mesh.cilium.io")
        .unwrap()
        .push(unused.local_addr().unwrap().ip());
    let replicas = ask_replicas(&upstream, &quick(), Duration::from_secs(30)).await;
    assert_eq!(replicas.len(), 2);
    let told = replicas[0].answer.as_ref().unwrap();
    assert_eq!(
        (
            told.cluster.as_str(),
            told.remotes,
            told.remotes_connected,
            told.remotes_ready,
            told.synced
        ),
        ("a", 1, 1, 1, true)
    );
    assert!(
        told.started_ms > 0 && told.revision > 0 && told.keys > 6 && told.bytes > 0,
        "{told:?}"
    );
    let error = replicas[1].answer.as_ref().unwrap_err();
    assert!(
        error.contains("127.0.0.2") || error.contains("refused"),
        "{error}"
    );
    // Another cluster is told etcd's answer and no more.
    let other = ask_replicas(
        &pki.config(a.address(), "remote-b"),
        &quick(),
        Duration::from_secs(30),
    )
    .await;
    let told = other[0].answer.as_ref().unwrap();
    assert_eq!((told.version.as_str(), told.started_ms), ("etcd 3.5.0", 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn troubleshooting_names_the_step_that_fails() {
    let pki = Pki::new();
    let (a, b) = pair(&pki).await;
    a.until(&pki, "b", "ready", |status| status.ready).await;
    let files = tempfile::tempdir().unwrap();
    let check = async |cluster: &str, text: &str| {
        write_file(files.path(), cluster, text);
        let cluster = isthmus_model::ClusterName::new(cluster).unwrap();
        let path = files.path().join(cluster.as_str());
        let findings = troubleshoot(&cluster, &path, Duration::from_secs(20)).await;
        let steps: Vec<&str> = findings.iter().map(|finding| finding.step).collect();
        let bad = findings
            .iter()
            .filter(|finding| !finding.ok)
            .map(|finding| (finding.step, finding.text.clone()));
        (steps.join(" "), bad.collect::<Vec<_>>())
    };
    let good = pki.yaml(b.address(), "remote-a");
    let (steps, bad) = check("b", &good).await;
    assert_eq!(
        (steps.as_str(), bad),
        ("file certificate name tcp tls etcd cluster", vec![])
    );
    let failing = async |cluster: &str, text: &str, step: &str| {
        let (_, bad) = check(cluster, text).await;
        assert_eq!(
            bad.iter().map(|(step, _)| *step).collect::<Vec<_>>(),
            [step],
            "{bad:?}"
        );
        bad[0].1.clone()
    };
    failing("b", "endpoints: [", "file").await;
    failing("b", &good.replace("127.0.0.1", "127.0.0.3"), "tcp").await;
    let other = Pki::new();
    let foreign = good.replace(
        &pki.path("ca.crt").display().to_string(),
        &other.path("ca.crt").display().to_string(),
    );
    let text = failing("b", &foreign, "tls").await;
    assert!(text.contains("ca.crt"), "{text}");
    let text = failing("b", &pki.yaml(b.address(), "nobody"), "etcd").await;
    assert!(text.contains("permission denied"), "{text}");
    // The file is named after another cluster than the one that answers.
    failing("c", &good, "etcd").await;
    let text = failing("c", &pki.yaml(b.address(), "local-b"), "cluster").await;
    assert!(text.contains("no config of cluster c"), "{text}");
}

/// Metrics of things that do not happen in this test: they have no value before.
const ABSENT: [&str; 3] = [
    "apiserver_rejected_connections_total",
    "apiserver_closed_connections_total",
    "apiserver_throttled_requests_total",
];
