//! An upstream whose address moves, as a load balancer's does: connections are torn down, some in the middle of a message, and
//! the next one goes elsewhere. Nothing that is known is withdrawn, and nobody lists again.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use isthmus_kvstore::Feed;
use isthmus_runtime::CancellationToken;
use isthmus_wire::keys::Kind;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::{
    clusters::Cluster,
    lab::{Apiserver, Pki, View, config, eventually},
};

const ROTATIONS: usize = 100;
const REMOTE: &str = "cilium/cache/nodes/v1/b/";

/// An address that leads to `server` until the token is cancelled. Each connection is cut after so many bytes of the server's.
async fn lead(
    at: SocketAddr,
    server: SocketAddr,
    cut_after: usize,
    accepted: Arc<AtomicUsize>,
    moved: CancellationToken,
) {
    // The one before it here has gone a moment ago.
    let listener = eventually("the address is free", || async {
        TcpListener::bind(at).await.ok()
    })
    .await;
    tokio::spawn(async move {
        loop {
            let client = tokio::select! {
                () = moved.cancelled() => return,
                client = listener.accept() => client.unwrap().0,
            };
            accepted.fetch_add(1, Ordering::Relaxed);
            let moved = moved.clone();
            tokio::spawn(async move {
                tokio::select! {
                    () = moved.cancelled() => {}
                    () = pipe(client, server, cut_after) => {}
                }
            });
        }
    });
}

async fn pipe(client: TcpStream, server: SocketAddr, cut_after: usize) {
    let Ok(server) = TcpStream::connect(server).await else {
        return;
    };
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
        (client.into_split(), server.into_split());
    let up = tokio::io::copy(&mut from_client, &mut to_server);
    let down = async {
        let mut left = cut_after;
        let mut buffer = vec![0; 4096];
        while left > 0 {
            let len = buffer.len().min(left);
            match from_server.read(&mut buffer[..len]).await {
                Ok(len @ 1..) if to_client.write_all(&buffer[..len]).await.is_ok() => left -= len,
                _ => return,
            }
        }
    };
    tokio::select! {
        _ = up => {}
        () = down => {}
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upstream_whose_address_moves_a_hundred_times_withdraws_nothing() {
    let pki = Pki::new();
    let b = Cluster::start("b", 2, &pki).await;
    b.publish().await;
    (0..300).for_each(|number| b.put_node(&format!("m{number}")));
    b.writer().flush().await;
    let etcd = crate::lab::Etcd::start().await;
    let files = tempfile::tempdir().unwrap();
    let mut addresses: Vec<SocketAddr> = vec![];
    for _ in 0..3 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        addresses.push(listener.local_addr().unwrap());
    }
    // One name, several addresses.
    let file = pki.yaml(addresses[0], "remote-a");
    let (first, rest) = file.split_once('\n').unwrap();
    let endpoints = addresses
        .iter()
        .map(|address| format!("'https://a.mesh.cilium.io:{}'", address.port()));
    let endpoints = endpoints.collect::<Vec<_>>().join(", ");
    assert!(first.starts_with("endpoints"));
    let file = format!("endpoints: [{endpoints}]\n{rest}");
    crate::clusters::write_file(files.path(), "b", &file);

    let accepted = Arc::new(AtomicUsize::new(0));
    let mut moved = CancellationToken::new();
    lead(
        addresses[0],
        b.address(),
        usize::MAX,
        accepted.clone(),
        moved.clone(),
    )
    .await;
    // A reader of b through the moving address, and one of a's mirror of it.
    let direct = View::open(
        isthmus_kvstore::EtcdConfig::parse(&file).unwrap(),
        vec![Feed::prefix("cilium/state/nodes/v1/b/", 1 << 20)],
    );
    let mut setup = config("a", 1, etcd.config(), &pki);
    setup.clustermesh_config = Some(files.path().to_owned());
    let a = Apiserver::start(setup).await;
    a.ready().await;
    let mirrored = View::open(
        pki.config(a.address, "local-a"),
        vec![Feed::prefix(REMOTE, 1 << 20)],
    );
    for view in [&direct, &mirrored] {
        view.until("all nodes", |view| {
            view.keys.len() == 301 && view.synced.len() == 1
        })
        .await;
    }
    let lists = [direct.now().listings, mirrored.now().listings];

    for rotation in 0..ROTATIONS {
        b.put_node(&format!("m{}", rotation % 7));
        b.put(
            Kind::Nodes,
            "last",
            isthmus_wire::node::encode(&isthmus_model::Node {
                boot_id: rotation.to_string(),
                ..b.node("last")
            }),
        );
        moved.cancel();
        moved = CancellationToken::new();
        let before = accepted.load(Ordering::Relaxed);
        // Handshake, checks, events: the cut falls anywhere. Every fourth address holds.
        let holds = rotation % 4 == 3;
        let cut_after = if holds {
            usize::MAX
        } else {
            300 + 397 * (rotation % 23)
        };
        let at = addresses[(rotation + 1) % addresses.len()];
        lead(at, b.address(), cut_after, accepted.clone(), moved.clone()).await;
        eventually("both came to the new address", || async {
            (accepted.load(Ordering::Relaxed) >= before + 2).then_some(())
        })
        .await;
        if holds {
            let rotation = rotation.to_string();
            for (view, key) in [
                (&direct, "cilium/state/nodes/v1/b/last"),
                (&mirrored, "cilium/cache/nodes/v1/b/last"),
            ] {
                view.until(&format!("change {rotation} of {key}"), |view| {
                    let value = view.value(key).and_then(|value| std::str::from_utf8(value).ok());
                    value.is_some_and(|value| value.contains(&format!("\"{rotation}\"")))
                })
                .await;
            }
        }
    }
    // And the file names another address.
    moved.cancel();
    crate::clusters::write_file(files.path(), "b", &pki.yaml(b.address(), "remote-a"));
    b.put_node("elsewhere");
    mirrored
        .until("what happened since", |view| {
            view.value(&format!("{REMOTE}elsewhere")).is_some()
        })
        .await;
    let at = addresses[0];
    lead(
        at,
        b.address(),
        usize::MAX,
        accepted.clone(),
        CancellationToken::new(),
    )
    .await;
    direct
        .until("what happened since", |view| view.keys.len() == 303)
        .await;
    for (view, lists) in [&direct, &mirrored].into_iter().zip(lists) {
        let now = view.now();
        assert_eq!(now.keys.len(), 303);
        assert_eq!(now.deleted, Vec::<bytes::Bytes>::new(), "nothing is withdrawn");
        assert_eq!(now.listings, lists, "nobody lists again");
    }
    a.stop().await;
}
