//! The outside: clients that reach a global service through any node's port, also where all backends are in another cluster; and
//! pods that reach a server outside, which sees their node.

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context, ensure};
use isthmus_e2e::{GLOBAL, NAMESPACE, PATIENCE, Sandbox, eventually, program};
use isthmus_sandbox::load::{Load, Style, Tally};

const TIMEOUT: Option<Duration> = Some(Duration::from_secs(10));

/// Asks a node over TCP and UDP, from the machine's own namespace; returns both answers, `CLUSTER/POD`.
fn ask(node: Ipv4Addr) -> anyhow::Result<[String; 2]> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((node, 30_080)), Duration::from_secs(10))?;
    stream.set_read_timeout(TIMEOUT)?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")?;
    let mut buffer = [0; 512];
    let length = stream.read(&mut buffer)?;
    let answer = String::from_utf8_lossy(&buffer[..length]).into_owned();
    let (_, tcp) = answer.split_once("\r\n\r\n").context("no body")?;
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(TIMEOUT)?;
    socket.connect((node, 30_081))?;
    socket.send(b"?")?;
    let length = socket.recv(&mut buffer)?;
    let udp = String::from_utf8_lossy(&buffer[..length]).into_owned();
    Ok([tcp.trim().to_owned(), udp.trim().to_owned()])
}

/// The clusters whose pods answer at a node, in so many questions that none is missed.
fn clusters_behind(node: Ipv4Addr) -> anyhow::Result<BTreeSet<String>> {
    let mut seen = BTreeSet::new();
    for _ in 0..40 {
        for answer in ask(node)? {
            seen.insert(answer.split('/').next().unwrap_or_default().to_owned());
        }
    }
    Ok(seen)
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_outside_and_servers_outside() -> anyhow::Result<()> {
    let sandbox = Sandbox::up("e2e-outside", 2, 2).await?;
    for cluster in ["east", "west"] {
        let kubectl = sandbox.kubectl(cluster);
        sandbox.make_service(cluster, "hello", 2, GLOBAL).await?;
        let ports = r#"{"spec": {"type": "NodePort", "ports": [
            {"name": "http", "port": 80, "targetPort": 8080, "nodePort": 30080},
            {"name": "ask", "port": 80, "targetPort": 8080, "nodePort": 30081, "protocol": "UDP"}]}}"#;
        let patch = [
            "-n", NAMESPACE, "patch", "service", "hello", "--type", "merge", "-p", ports,
        ];
        kubectl.run(&patch).await?;
    }
    let nodes: Vec<_> = sandbox
        .client()
        .plan()
        .nodes()
        .map(|node| (node.name.clone(), node.address))
        .collect();
    let behind = |want: &'static [&'static str]| {
        let nodes = &nodes;
        async move {
            for (name, address) in nodes {
                eventually("a node's port leads to the service", async || {
                    let seen = clusters_behind(*address)?;
                    ensure!(seen.iter().eq(want), "{name} leads to {seen:?}, not {want:?}");
                    Ok(())
                })
                .await?;
            }
            anyhow::Ok(())
        }
    };
    behind(&["east", "west"]).await?;
    // The last backends of one cluster go: its nodes lead to the other one.
    let scale = ["-n", NAMESPACE, "scale", "deployment", "hello", "--replicas", "0"];
    sandbox.kubectl("west").run(&scale).await?;
    behind(&["east"]).await?;
    pods_reach_a_server_outside(&sandbox, nodes[0].1).await
}

async fn pods_reach_a_server_outside(sandbox: &Sandbox, node: Ipv4Addr) -> anyhow::Result<()> {
    // The machine's address on the nodes' network: outside of the mesh.
    let own = TcpStream::connect((node, 30_080))?.local_addr()?.ip();
    let listener = TcpListener::bind((own, 0))?;
    let target = listener.local_addr()?;
    let seen = Arc::new(Mutex::new(BTreeSet::<IpAddr>::new()));
    let peers = Arc::clone(&seen);
    // Ends with the process.
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            if let Ok(peer) = stream.peer_addr() {
                peers
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(peer.ip());
            }
            let _ = stream.read(&mut [0; 512]);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\noutside/server\n");
        }
    });
    sandbox.make_client("east", "client", Some("east-1")).await?;
    let asker = sandbox.asker("east", "client");
    let isthmus = program("isthmus")?;
    let load = eventually("the client runs", async || {
        Load::start(sandbox.client(), &isthmus, &asker, target, Style::Connections, 50).await
    })
    .await?;
    let answered = |tally: &Tally| tally.failed == 0 && tally.clusters() == ["outside"];
    load.until(20, PATIENCE, "a server outside answers", answered)
        .await?;
    load.stop().await?;
    let seen = seen.lock().unwrap_or_else(PoisonError::into_inner).clone();
    ensure!(
        seen == BTreeSet::from([IpAddr::V4(node)]),
        "the server saw {seen:?}, not {node}"
    );
    Ok(())
}
