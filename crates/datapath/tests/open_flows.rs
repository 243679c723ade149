//! Ending the open flows of a backend, with real sockets: a pod's namespace, a frontend, and connections around it.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::{
    collections::HashSet,
    io::{ErrorKind, Read},
    net::{TcpStream, UdpSocket},
    path::PathBuf,
    time::Duration,
};

use isthmus_bpf_abi::{Address, ReverseSkKey};
use isthmus_datapath::{
    Datapath,
    sock_diag::{self, Ended, Protocol, Walk},
};

#[path = "support/lab.rs"]
mod lab;
#[path = "support/services.rs"]
mod services;

use lab::{Lab, address, in_namespace, open_in, run};
use services::{connect, echo, put_service, receive, serve, udp};

const VIPS: [&str; 3] = ["10.96.0.10:80", "[::ffff:10.96.0.10]:80", "[fd96::10]:80"];
const FIRST: [&str; 3] = ["192.0.2.1:8080", "[::ffff:192.0.2.1]:8080", "[fd00::1]:8080"];
const ECONNABORTED: Option<i32> = Some(103);

/// A node with two backends of each family, and a pod.
struct Node {
    lab: Lab,
    host: String,
    pod: String,
    datapath: Datapath,
}

impl Node {
    fn new() -> Self {
        let mut lab = Lab::new();
        let (host, pod) = (lab.namespace("host"), lab.namespace("pod"));
        run(&[
            "ip", "-n", &host, "link", "add", "lxc0", "type", "veth", "peer", "name", "eth0", "netns", &pod,
        ]);
        for (namespace, device, addresses) in [
            (&host, "lxc0", ["10.1.0.1/24", "fd01::1/64"]),
            (&pod, "eth0", ["10.1.0.2/24", "fd01::2/64"]),
        ] {
            for address in addresses {
                let mut command = vec!["ip", "-n", namespace, "address", "add", address, "dev", device];
                if address.contains(':') {
                    command.push("nodad");
                }
                run(&command);
            }
            run(&["ip", "-n", namespace, "link", "set", device, "up"]);
        }
        for (family, via) in [("-4", "10.1.0.1"), ("-6", "fd01::1")] {
            run(&["ip", family, "-n", &pod, "route", "add", "default", "via", via]);
        }
        for address in ["192.0.2.1/32", "192.0.2.2/32", "fd00::1/128", "fd00::2/128"] {
            run(&["ip", "-n", &host, "address", "add", address, "dev", "lo"]);
        }
        let datapath = open_in(&host, &lab.datapath_config());
        in_namespace(&host, || {
            serve("192.0.2.1:8080", "one");
            serve("192.0.2.2:8080", "two");
            serve("[fd00::1]:8080", "one");
            serve("[fd00::2]:8080", "two");
        });
        let node = Self {
            lab,
            host,
            pod,
            datapath,
        };
        node.lead_to(1);
        node
    }

    /// Makes one backend of each family the only one.
    fn lead_to(&self, backend: u32) {
        let four = format!("192.0.2.{backend}:8080");
        let six = format!("[fd00::{backend}]:8080");
        put_service(&self.datapath, 1, VIPS[0], &[(backend, &four)]);
        put_service(&self.datapath, 2, VIPS[2], &[(10 + backend, &six)]);
    }

    /// Entries of sockets that reached these addresses through a frontend.
    fn targets(&self, addresses: &[&str]) -> HashSet<ReverseSkKey> {
        let addresses: Vec<Address> = addresses.iter().map(|text| address(text)).collect();
        let entries = self.datapath.tables().reverse_sk.dump().unwrap();
        let keys = entries.into_iter().map(|(key, _)| key);
        keys.filter(|key| addresses.contains(&key.address)).collect()
    }

    fn end(&self, pods: &[PathBuf], targets: HashSet<ReverseSkKey>, sockets_max: usize) -> Ended {
        let walk = Walk {
            pods: pods.to_vec(),
            targets,
            sockets_max,
        };
        in_namespace(&self.host, || {
            sock_diag::start(walk).unwrap().blocking_recv().unwrap()
        })
    }

    fn end_first(&self) -> Ended {
        let ended = self.end(&[self.pod_path()], self.targets(&["192.0.2.1", "fd00::1"]), 1000);
        assert_eq!(
            (ended.failures, ended.unfinished),
            (0, false),
            "{:?}",
            ended.errors
        );
        ended
    }

    fn pod_path(&self) -> PathBuf {
        format!("/run/netns/{}", self.pod).into()
    }
}

/// An open connection and a connected socket, both in use.
struct Client {
    to: &'static str,
    tcp: TcpStream,
    udp: UdpSocket,
}

impl Client {
    fn open(to: &'static str, expect: &str) -> Self {
        let (tcp, name) = connect(to).unwrap();
        assert_eq!(name, expect);
        let udp = udp(if to.starts_with('[') {
            "[::]:0"
        } else {
            "0.0.0.0:0"
        });
        udp.connect(to).unwrap();
        let mut client = Self { to, tcp, udp };
        client.works();
        client
    }

    fn works(&mut self) {
        echo(&mut self.tcp).unwrap();
        self.udp.send(b"?").unwrap();
        receive(&self.udp);
    }

    /// What those hear that wait for an answer which does not come.
    fn is_ended(&mut self) {
        let mut byte = [0];
        self.udp.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        self.tcp.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let tcp = self.tcp.read(&mut byte).unwrap_err();
        let udp = self.udp.recv(&mut byte).unwrap_err();
        assert_eq!(tcp.kind(), ErrorKind::ConnectionAborted, "TCP to {}", self.to);
        assert_eq!(udp.raw_os_error(), ECONNABORTED, "UDP to {}", self.to);
    }
}

#[test]
fn flows_through_a_frontend_end_and_direct_ones_live() {
    let node = Node::new();
    for protocol in Protocol::ALL {
        in_namespace(&node.host, || sock_diag::probe(protocol)).unwrap();
    }
    let (mut in_pod, mut direct) = in_namespace(&node.pod, || {
        let through = VIPS.map(|vip| Client::open(vip, "one"));
        (through, FIRST.map(|backend| Client::open(backend, "one")))
    });
    let mut on_host = in_namespace(&node.host, || VIPS.map(|vip| Client::open(vip, "one")));
    node.lead_to(2);
    let mut other = in_namespace(&node.pod, || VIPS.map(|vip| Client::open(vip, "two")));

    let ended = node.end_first();
    assert_eq!((ended.tcp, ended.udp, ended.namespaces), (6, 6, 2));
    in_pod.iter_mut().chain(&mut on_host).for_each(Client::is_ended);
    direct.iter_mut().chain(&mut other).for_each(Client::works);
    in_namespace(&node.pod, || {
        for client in &in_pod {
            assert_eq!(connect(client.to).unwrap().1, "two", "a new connection");
            // The same socket may go on: it is not connected any more.
            client.udp.connect(client.to).unwrap();
            client.udp.send(b"?").unwrap();
            assert_eq!(receive(&client.udp).0, "two");
        }
    });
    let again = node.end_first();
    assert_eq!(again.sockets(), 0, "what was ended is not found again");
}

#[test]
fn a_socket_that_moved_on_lives() {
    let node = Node::new();
    in_namespace(&node.pod, || {
        let socket = udp("0.0.0.0:0");
        socket.connect(VIPS[0]).unwrap();
        node.lead_to(2);
        socket.connect(VIPS[0]).unwrap();
        socket.send(b"?").unwrap();
        assert_eq!(receive(&socket).0, "two");
        // One that is not connected chooses anew for each datagram.
        let loose = udp("0.0.0.0:0");
        node.lead_to(1);
        loose.send_to(b"?", VIPS[0]).unwrap();
        assert_eq!(receive(&loose).0, "one");
        node.lead_to(2);
        assert_eq!(node.targets(&["192.0.2.1"]).len(), 2, "both were there once");
        assert_eq!(node.end_first().sockets(), 0);
        socket.send(b"?").unwrap();
        assert_eq!(receive(&socket).0, "two");
        loose.send_to(b"?", VIPS[0]).unwrap();
        assert_eq!(receive(&loose).0, "two");
    });
}

#[test]
fn a_connection_that_waits_for_its_peer_is_ended_too() {
    let node = Node::new();
    // Where SYNs go unanswered.
    run(&[
        "ip",
        "-n",
        &node.host,
        "route",
        "add",
        "blackhole",
        "192.0.2.9/32",
    ]);
    put_service(&node.datapath, 1, VIPS[0], &[(9, "192.0.2.9:8080")]);
    let error = std::thread::scope(|scope| {
        let client = scope.spawn(|| in_namespace(&node.pod, || TcpStream::connect(VIPS[0]).unwrap_err()));
        lab::wait_for("a connection under way", || {
            !node.targets(&["192.0.2.9"]).is_empty()
        });
        node.lead_to(2);
        // It may be between hook and table: what retries are for.
        lab::wait_for("its end", || {
            let targets = node.targets(&["192.0.2.9"]);
            node.end(&[node.pod_path()], targets, 1000).tcp == 1
        });
        client.join().unwrap()
    });
    assert_eq!(error.raw_os_error(), ECONNABORTED);
}

#[test]
fn a_walk_is_bounded_and_finds_namespaces_without_a_path() {
    let mut node = Node::new();
    let mut clients = in_namespace(&node.pod, || VIPS.map(|vip| Client::open(vip, "one")));
    let targets = node.targets(&["192.0.2.1", "fd00::1"]);
    let gone = [PathBuf::new(), "/run/netns/isthmus-no-such".into()];
    let mut ended = vec![];
    for _ in 0..3 {
        ended.push(node.end(&gone, targets.clone(), 2));
    }
    let numbers: Vec<_> = ended
        .iter()
        .map(|ended| (ended.sockets(), ended.unfinished))
        .collect();
    assert_eq!(numbers, [(2, true), (2, true), (2, false)]);
    clients.iter_mut().for_each(Client::is_ended);
    assert!(ended[2].namespaces >= 2);
    assert_eq!(
        node.end(&gone, HashSet::new(), 2).namespaces,
        0,
        "nothing to look for"
    );
    let third = node.lab.namespace("third");
    let path = PathBuf::from(format!("/run/netns/{third}"));
    let ended = node.end(&[node.pod_path(), path.clone(), path], targets, 2);
    assert_eq!((ended.sockets(), ended.namespaces), (0, 3));
}
