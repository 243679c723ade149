//! Connections without end: floods, silence, garbage, resets. Whoever behaves gets in and is served meanwhile.

use std::{io::Write, net::TcpStream, time::Duration};

use isthmus_clustermesh_apiserver::{Config, server::bucket::Rate};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{
    lab::{Apiserver, Etcd, Pki, config, eventually},
    raw::{Answers, Dial, Raw, watch_request},
};

const PREFIX: &str = "cilium/state/x/";

struct Scene {
    etcd: Etcd,
    pki: Pki,
    server: Apiserver,
    good: (Raw, Answers),
}

impl Scene {
    async fn new(change: impl FnOnce(&mut Config)) -> Self {
        let (etcd, pki) = (Etcd::start().await, Pki::new());
        let mut config = config("c1", 1, etcd.config(), &pki);
        change(&mut config);
        let server = Apiserver::start(config).await;
        server.ready().await;
        // It comes from an address of its own.
        let dial = Dial::new(&pki, "remote-c3").from("127.0.0.9");
        let mut good = dial.open(server.address).await.unwrap();
        let answers = good.watch(PREFIX, 0).await.unwrap();
        Self {
            etcd,
            pki,
            server,
            good: (good, answers),
        }
    }

    /// The good client hears of each change, and another one like it gets in.
    async fn others_are_served(&mut self) {
        let mut client = self.etcd.client().await.unwrap();
        let put = client.put(format!("{PREFIX}a"), "x", None).await.unwrap();
        let revision = put.header().unwrap().revision();
        let heard = tokio::time::timeout(Duration::from_secs(60), self.good.1.revisions(revision));
        assert_eq!(heard.await.unwrap().unwrap(), [revision]);
        let dial = Dial::new(&self.pki, "remote-c3").from("127.0.0.9");
        let listed = async { dial.open(self.server.address).await?.list(PREFIX).await };
        let listed = tokio::time::timeout(Duration::from_secs(60), listed).await;
        assert_eq!(listed.unwrap().unwrap().kvs.len(), 1);
    }

    fn rejected(&self, reason: &str) -> i64 {
        self.server.metric(&format!(
            "apiserver_rejected_connections_total{{reason=\"{reason}\"}}"
        ))
    }

    fn closed(&self, reason: &str) -> i64 {
        self.server.metric(&format!(
            "apiserver_closed_connections_total{{reason=\"{reason}\"}}"
        ))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_from_one_address_is_closed_and_other_addresses_get_in() {
    let mut scene = Scene::new(|config| {
        config.limits.connection_rate_per_address = Rate {
            per_second: 5,
            burst: 20,
        };
    })
    .await;
    let flood: Vec<TcpStream> = (0..300)
        .filter_map(|_| TcpStream::connect(scene.server.address).ok())
        .collect();
    scene.others_are_served().await;
    eventually("most of it was refused", || async {
        (scene.rejected("connection_rate") >= 200).then_some(())
    })
    .await;
    drop(flood);
    scene.others_are_served().await;
    scene.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_open_handshakes_make_room_for_others() {
    let mut scene = Scene::new(|config| {
        config.limits.handshakes = 8;
        config.limits.handshake_timeout = Duration::from_secs(3600);
    })
    .await;
    // Half of them begin a handshake that they never go on with.
    let silent: Vec<TcpStream> = (0..40)
        .map(|number| {
            let mut tcp = TcpStream::connect(scene.server.address).unwrap();
            if number % 2 == 0 {
                tcp.write_all(&[22, 3, 1, 2, 0, 1]).unwrap();
            }
            tcp
        })
        .collect();
    scene.others_are_served().await;
    assert!(scene.rejected("handshake_evicted") >= 32);
    drop(silent);
    scene.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_of_a_client_and_of_all_are_limited_and_places_come_back() {
    let mut scene = Scene::new(|config| {
        config.limits.connections = 5;
        config.limits.connections_per_client = 3;
    })
    .await;
    let dial = Dial::new(&scene.pki, "remote-c2");
    let address = scene.server.address;
    let mut held = Vec::new();
    for _ in 0..3 {
        let mut raw = dial.open(address).await.unwrap();
        raw.list(PREFIX).await.unwrap();
        held.push(raw);
    }
    let fourth = async { dial.open(address).await?.list(PREFIX).await };
    assert!(fourth.await.is_err());
    assert_eq!(scene.rejected("connections_per_client"), 1);
    // Another client has the last place of all.
    scene.others_are_served().await;
    let last = Dial::new(&scene.pki, "remote-c4");
    let last = eventually("the place of the last check is free", || async {
        let mut raw = last.open(address).await.ok()?;
        raw.list(PREFIX).await.ok().map(|_| raw)
    })
    .await;
    let sixth = async { dial.open(address).await?.list(PREFIX).await };
    assert!(sixth.await.is_err());
    eventually("all places are taken", || async {
        (scene.rejected("connections") >= 1).then_some(())
    })
    .await;
    drop((held, last));
    eventually("there is a place again", || async {
        dial.open(address).await.ok()?.list(PREFIX).await.ok()
    })
    .await;
    scene.others_are_served().await;
    scene.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_and_silence_end_before_and_after_the_handshake() {
    let mut scene = Scene::new(|config| config.limits.handshake_timeout = Duration::from_secs(2)).await;
    let address = scene.server.address;
    let mut plain = tokio::net::TcpStream::connect(address).await.unwrap();
    plain
        .write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    // An alert, or nothing.
    let _ = plain.read_to_end(&mut answer).await;
    assert!(answer.len() < 64);
    eventually("it is counted", || async {
        (scene.rejected("protocol") == 1).then_some(())
    })
    .await;
    let dial = Dial::new(&scene.pki, "remote-c2");
    let mut garbage = dial.shake(address).await.unwrap();
    garbage.write_all(&[0xff; 4096]).await.unwrap();
    // Reset, or closed after a word of HTTP/2.
    let _ = garbage.read_to_end(&mut answer).await;
    // A client that shakes hands and says nothing, and one that says half a hello.
    let silent = dial.shake(address).await.unwrap();
    let mut half = dial.shake(address).await.unwrap();
    half.write_all(b"PRI * HTTP/2.0").await.unwrap();
    for mut quiet in [silent, half] {
        let end = tokio::time::timeout(Duration::from_secs(60), quiet.read_to_end(&mut answer));
        let _ = end.await.expect("it is closed");
    }
    assert_eq!(scene.closed("timeout"), 2);
    scene.others_are_served().await;
    scene.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rapid_resets_end_the_connection() {
    let mut scene = Scene::new(|_| ()).await;
    let mut hostile = Dial::new(&scene.pki, "remote-c2")
        .open(scene.server.address)
        .await
        .unwrap();
    let request = watch_request(PREFIX, 0);
    let resets = async {
        loop {
            let Ok((_, mut requests)) = hostile.begin("/etcdserverpb.Watch/Watch", &request, false).await
            else {
                return;
            };
            requests.send_reset(h2::Reason::CANCEL);
        }
    };
    tokio::time::timeout(Duration::from_secs(60), resets)
        .await
        .expect("the connection is ended");
    let ended = (&mut hostile.connection).await.unwrap().unwrap_err();
    // Its resets may meet a socket that is closed already, before it has read why.
    assert!(
        ended.is_io() || ended.reason() == Some(h2::Reason::ENHANCE_YOUR_CALM),
        "{ended}"
    );
    eventually("its watches are gone", || async {
        (scene.server.metric("server_watches") == 1).then_some(())
    })
    .await;
    scene.others_are_served().await;
    scene.server.stop().await;
}
