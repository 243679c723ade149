//! Clients outside with real sockets: node ports and load balancers' addresses of a node, backends on it and on another behind
//! VXLAN; and pods that talk to the outside.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::{
    collections::BTreeSet,
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
};

use isthmus_bpf_abi::{
    IDENTITY_REMOTE_NODE, IDENTITY_WORLD, IpcacheKey, IpcacheValue, PROTO_TCP, PROTO_UDP, PrefixKey,
    ServiceKey, ServiceValue, backend_state, service_flag,
};
use isthmus_datapath::{Datapath, DatapathConfig, MapOp, PacketHook, device, links, outside};

#[path = "support/clients.rs"]
mod clients;
#[path = "support/lab.rs"]
mod lab;
#[path = "support/nodes.rs"]
mod nodes;
#[path = "support/services.rs"]
mod services;
#[path = "support/world.rs"]
mod world;

use clients::{TIMEOUT, is_refused, send_bulk, serve_bulk, udp_to};
use lab::{Lab, address, in_namespace, run, with_netlink};
use nodes::Node;
use services::{backend, connect, echo, receive, serve};
use world::{CLIENT, NEAR, build, expose};

const NODE_PORT: [&str; 2] = ["192.0.2.1:30080", "[2001:db8::1]:30080"];
const BALANCER: [&str; 2] = ["203.0.113.80:80", "[2001:db8:80::80]:80"];
const HERE: [&str; 2] = ["10.1.0.6:8080", "[fd01::6]:8080"];
const THERE: [&str; 2] = ["10.2.0.5:8080", "[fd02::5]:8080"];

/// Backends are pod .6 of node 1 and pod .5 of node 2. Reasons for drops other than these fail the test.
fn check(expected: &[&str], test: impl FnOnce(&Node, &Node, &str)) {
    let mut lab = Lab::new();
    let ([one, two], world) = build(&mut lab);
    for (node, pod, sockets, name) in [(&one, 1, HERE, "here"), (&two, 0, THERE, "there")] {
        in_namespace(&node.pods[pod], || sockets.map(|socket| serve(socket, name)));
    }
    test(&one, &two, &world);
    for node in [&one, &two] {
        let drops: Vec<_> = node
            .datapath
            .tables()
            .counters()
            .unwrap()
            .into_iter()
            .filter(|counter| counter.reason.is_drop() && !expected.contains(&counter.reason.name()))
            .map(|counter| format!("{} {}", counter.reason.name(), counter.direction.name()))
            .collect();
        assert_eq!(drops, [""; 0], "node {}", node.number);
    }
}

/// Asks over TCP and UDP so often that both backends of a service answer; returns who did.
fn ask(vip: &str) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    for _ in 0..24 {
        let (mut stream, name) = connect(vip).expect("a connection");
        assert_eq!(stream.peer_addr().unwrap(), vip.parse().unwrap());
        echo(&mut stream).unwrap();
        let socket = udp_to(vip);
        socket.send(b"?").unwrap();
        seen.extend([name, format!("udp {}", receive(&socket).0)]);
    }
    seen
}

fn everybody() -> BTreeSet<String> {
    ["here", "there", "udp here", "udp there"]
        .map(str::to_owned)
        .into()
}

#[test]
fn a_client_outside_reaches_backends_of_all_nodes() {
    check(&[], |one, _, world| {
        // The strictest nodes drop what comes in with an address of their own.
        in_namespace(&one.namespace, || {
            std::fs::write("/proc/sys/net/ipv4/conf/all/rp_filter", "1").unwrap();
        });
        let mut id = 0;
        for vips in [NODE_PORT, BALANCER] {
            for (family, vip) in vips.into_iter().enumerate() {
                id += 1;
                expose(
                    &one.datapath,
                    id,
                    vip,
                    0,
                    &[(id * 2, HERE[family]), (id * 2 + 1, THERE[family])],
                );
                assert_eq!(in_namespace(world, || ask(vip)), everybody(), "{vip}");
            }
        }
    });
}

#[test]
fn streams_and_fragments_of_any_size_arrive_whole() {
    check(&[], |one, two, world| {
        let mut id = 0;
        for (node, pod, sockets) in [
            (one, 1, ["10.1.0.6:9000", "[fd01::6]:9000"]),
            (two, 0, ["10.2.0.5:9000", "[fd02::5]:9000"]),
        ] {
            for (family, target) in sockets.into_iter().enumerate() {
                id += 1;
                expose(&one.datapath, id, BALANCER[family], 0, &[(id, target)]);
                let server = in_namespace(&node.pods[pod], || serve_bulk(target));
                in_namespace(world, || send_bulk(BALANCER[family]));
                server.join().unwrap();
            }
        }
    });
}

#[test]
fn a_client_outside_hears_of_closed_ports_and_of_missing_backends() {
    check(&["no-backend"], |one, _, world| {
        let mut id = 0;
        for targets in [
            None,
            Some(["10.1.0.6:1", "[fd01::6]:1"]),
            Some(["10.2.0.5:1", "[fd02::5]:1"]),
            Some(["192.0.2.1:1", "[2001:db8::1]:1"]),
        ] {
            for (family, vip) in BALANCER.into_iter().enumerate() {
                id += 1;
                let backends: Vec<_> = targets.iter().map(|targets| (id, targets[family])).collect();
                expose(&one.datapath, id, vip, 0, &backends);
                in_namespace(world, || is_refused(vip));
            }
        }
    });
}

#[test]
fn a_process_of_any_node_is_a_backend_for_clients_outside() {
    check(&[], |one, two, world| {
        let mut id = 0;
        for (node, name) in [(one, "first"), (two, "second")] {
            let number = node.number;
            for (family, socket) in [
                format!("192.0.2.{number}:6443"),
                format!("[2001:db8::{number}]:6443"),
            ]
            .into_iter()
            .enumerate()
            {
                id += 1;
                in_namespace(&node.namespace, || serve(&socket, name));
                expose(&one.datapath, id, BALANCER[family], 0, &[(id, &socket)]);
                let seen = in_namespace(world, || ask(BALANCER[family]));
                assert_eq!(seen, BTreeSet::from([name.to_owned(), format!("udp {name}")]));
            }
        }
    });
}

/// Nobody vouches for the source of what comes from outside, whatever the ipcache says of that address.
#[test]
fn a_client_outside_has_no_identity_in_the_overlay() {
    check(&[], |one, two, world| {
        let key = IpcacheKey::host(&address(CLIENT[0]));
        let tables = one.datapath.tables();
        tables
            .ipcache
            .put(&key, &IpcacheValue::direct(131_099, 0))
            .unwrap();
        expose(&one.datapath, 1, BALANCER[0], 0, &[(1, THERE[0])]);
        // In the tunnel's place: what arrives there.
        run(&["ip", "-n", &two.namespace, "link", "delete", device::VXLAN_NAME]);
        let tunnel = in_namespace(&two.namespace, || UdpSocket::bind("192.0.2.2:8472").unwrap());
        tunnel.set_read_timeout(TIMEOUT).unwrap();
        in_namespace(world, || udp_to(BALANCER[0]).send(b"?").unwrap());
        let mut packet = [0; 2_048];
        tunnel.recv(&mut packet).unwrap();
        let vni = u32::from_be_bytes([0, packet[4], packet[5], packet[6]]);
        assert_eq!(vni, IDENTITY_WORLD);
    });
}

/// What the ipcache says of nodes.
fn know_each_other(one: &Node, two: &Node) {
    for (node, others) in [
        (one, ["192.0.2.2", "2001:db8::2"]),
        (two, ["192.0.2.1", "2001:db8::1"]),
    ] {
        for text in others {
            let key = IpcacheKey::host(&address(text));
            let value = IpcacheValue::direct(IDENTITY_REMOTE_NODE, 0);
            node.datapath.tables().ipcache.put(&key, &value).unwrap();
        }
    }
}

/// The network between nodes drops what has a pod's address.
#[test]
fn pods_reach_other_nodes_with_their_nodes_address() {
    check(&[], |one, two, _| {
        know_each_other(one, two);
        for (family, own) in ["192.0.2.2", "2001:db8::2"].into_iter().enumerate() {
            let server = SocketAddr::new(world::NODE[family].parse().unwrap(), 7_003).to_string();
            in_namespace(&one.namespace, || mirror(&server));
            in_namespace(&two.pods[0], || {
                let mut stream = TcpStream::connect(&server).unwrap();
                stream.set_read_timeout(TIMEOUT).unwrap();
                let mut tcp = String::new();
                stream.read_to_string(&mut tcp).unwrap();
                let datagrams = udp_to(&server);
                datagrams.send(b"?").unwrap();
                assert_eq!([tcp, receive(&datagrams).0], [own; 2]);
            });
            ping(&two.pods[0], world::NODE[family]);
            // A process that has the node's address reaches a pod through the overlay, and is answered by that pod.
            let pod = THERE[family].replace("8080", "7004");
            in_namespace(&two.pods[0], || serve(&pod, "pod"));
            in_namespace(&one.namespace, || {
                let socket =
                    UdpSocket::bind(SocketAddr::new(world::NODE[family].parse().unwrap(), 0)).unwrap();
                socket.set_read_timeout(TIMEOUT).unwrap();
                socket.connect(pod.parse::<SocketAddr>().unwrap()).unwrap();
                for _ in 0..2 {
                    socket.send(b"?").unwrap();
                    assert_eq!(receive(&socket).0, "pod");
                }
            });
        }
    });
}

/// The pod's own node knows no such service: it asks a node port over the nodes' network, with the node's address.
#[test]
fn a_pod_reaches_another_nodes_port() {
    check(&[], |one, two, _| {
        know_each_other(one, two);
        for (family, vip) in NODE_PORT.into_iter().enumerate() {
            let id = 1 + family as u32;
            expose(
                &one.datapath,
                id,
                vip,
                0,
                &[(id * 2, HERE[family]), (id * 2 + 1, THERE[family])],
            );
            assert_eq!(in_namespace(&two.pods[1], || ask(vip)), everybody(), "{vip}");
            // A process of the node itself answers through the overlay.
            let target = ["192.0.2.1:6443", "[2001:db8::1]:6443"][family];
            in_namespace(&one.namespace, || serve(target, "node"));
            expose(&one.datapath, 10 + id, vip, 0, &[(10 + id, target)]);
            let seen = in_namespace(&two.pods[1], || ask(vip));
            assert_eq!(seen, BTreeSet::from(["node", "udp node"].map(str::to_owned)));
        }
    });
}

#[test]
fn open_connections_outlive_rotation_and_a_new_agent() {
    check(&["backend-gone", "no-backend"], |one, _, world| {
        let mut streams = Vec::new();
        let mut id = 0;
        for (vips, targets) in [(NODE_PORT, HERE), (BALANCER, THERE)] {
            for (vip, target) in vips.into_iter().zip(targets) {
                id += 1;
                expose(&one.datapath, id, vip, 0, &[(id, target)]);
                let (mut stream, _) = in_namespace(world, || connect(vip)).expect("a connection");
                echo(&mut stream).unwrap();
                let socket: SocketAddr = vip.parse().unwrap();
                let frontend =
                    ServiceKey::frontend(address(&socket.ip().to_string()), socket.port(), PROTO_TCP);
                let mut leaving = backend(target, PROTO_TCP);
                leaving.state = backend_state::TERMINATING;
                let report = one.datapath.apply(&[
                    MapOp::BackendPut(id * 2, leaving),
                    MapOp::ServicePut(
                        frontend,
                        ServiceValue::frontend(id * 2, 0, service_flag::EXTERNAL),
                    ),
                    MapOp::ServiceDelete(frontend.at_slot(1)),
                ]);
                assert!(report.is_complete());
                streams.push((stream, vip, id * 2));
            }
        }
        // Another agent takes over what is there.
        let config = DatapathConfig {
            bpf_root: one.datapath.bpf_root().to_owned(),
            cgroup_root: None,
            socket_lb: false,
        };
        let second = in_namespace(&one.namespace, || Datapath::open(&config)).unwrap();
        for (stream, vip, backend) in &mut streams {
            for _ in 0..10 {
                echo(stream).unwrap();
            }
            let refused = in_namespace(world, || TcpStream::connect(*vip)).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
            assert!(second.apply(&[MapOp::BackendDelete(*backend)]).is_complete());
            assert_eq!(echo(stream).unwrap_err().kind(), ErrorKind::ConnectionReset);
        }
    });
}

/// Says over TCP and UDP from where it is asked.
fn mirror(socket: &str) {
    let tcp = TcpListener::bind(socket).unwrap();
    thread::spawn(move || {
        for stream in tcp.incoming() {
            let Ok(mut stream) = stream else { return };
            let peer = stream.peer_addr().unwrap().ip().to_string();
            let _ = stream.write_all(peer.as_bytes());
        }
    });
    let udp = UdpSocket::bind(socket).unwrap();
    thread::spawn(move || {
        while let Ok((_, from)) = udp.recv_from(&mut [0; 64]) {
            let _ = udp.send_to(from.ip().to_string().as_bytes(), from);
        }
    });
}

fn ping(namespace: &str, to: &str) {
    let net = format!("--net=/run/netns/{namespace}");
    run(&[
        "nsenter", &net, "ping", "-n", "-c", "2", "-i", "0.2", "-W", "30", to,
    ]);
}

#[test]
fn pods_reach_the_outside_with_the_nodes_address() {
    check(&[], |one, _, world| {
        for (family, (server, pod)) in CLIENT.into_iter().zip(["10.1.0.5", "fd01::5"]).enumerate() {
            let socket = SocketAddr::new(server.parse().unwrap(), 7_000).to_string();
            in_namespace(world, || mirror(&socket));
            let seen = || {
                in_namespace(&one.pods[0], || {
                    let mut stream = TcpStream::connect(&socket).unwrap();
                    stream.set_read_timeout(TIMEOUT).unwrap();
                    let mut tcp = String::new();
                    stream.read_to_string(&mut tcp).unwrap();
                    let datagrams = udp_to(&socket);
                    datagrams.send(b"?").unwrap();
                    [tcp, receive(&datagrams).0]
                })
            };
            assert_eq!(seen(), [NEAR[family]; 2], "{server}");
            ping(&one.pods[0], server);
            // A closed port is heard of.
            let closed = SocketAddr::new(server.parse().unwrap(), 1).to_string();
            in_namespace(&one.pods[0], || is_refused(&closed));
            // An excluded prefix sees the pod itself, if it knows the way.
            let (to, via) = [("10.1.0.0/24", NEAR[0]), ("fd01::/64", NEAR[1])][family];
            run(&["ip", "-n", world, "route", "add", to, "via", via]);
            let bits = if family == 0 { 96 + 24 } else { 64 };
            let prefix = [address("198.51.100.0"), address("2001:db8:9::")][family];
            let key = PrefixKey {
                prefix_len: bits,
                address: prefix,
            };
            one.datapath.tables().set_no_masquerade(&[key].into()).unwrap();
            assert_eq!(seen(), [pod; 2], "{server}");
            one.datapath.tables().set_no_masquerade(&[].into()).unwrap();
            // Who reaches a pod directly is answered by the pod itself.
            let socket = SocketAddr::new(pod.parse().unwrap(), 7_001).to_string();
            in_namespace(&one.pods[0], || serve(&socket, "pod"));
            in_namespace(world, || {
                let (mut stream, name) = connect(&socket).unwrap();
                echo(&mut stream).unwrap();
                let datagrams = udp_to(&socket);
                datagrams.send(b"?").unwrap();
                assert_eq!([name, receive(&datagrams).0], ["pod"; 2]);
            });
            ping(world, pod);
        }
        let flows = one.datapath.tables().ct.dump().unwrap();
        assert!(flows.iter().any(|(key, _)| key.proto == PROTO_UDP));
    });
}

/// A service with a backend outside: translated at the pod, masqueraded at the device, and all of it back.
#[test]
fn a_backend_outside_is_reached_through_a_service() {
    check(&[], |one, _, world| {
        for (family, vip) in ["10.96.0.10:80", "[fd96::10]:80"].into_iter().enumerate() {
            let target = SocketAddr::new(CLIENT[family].parse().unwrap(), 7_002).to_string();
            in_namespace(world, || serve(&target, "outside"));
            let id = 1 + family as u32;
            services::put_service(&one.datapath, id, vip, &[(id, &target)]);
            in_namespace(&one.pods[0], || {
                let (mut stream, name) = connect(vip).unwrap();
                echo(&mut stream).unwrap();
                let socket = udp_to(vip);
                socket.send(b"?").unwrap();
                assert_eq!([name, receive(&socket).0], ["outside"; 2]);
            });
        }
    });
}

#[test]
fn devices_to_the_outside_are_found_and_hooks_leave_the_others() {
    check(&[], |one, _, _| {
        let attached = |hook| links::attached_devices(one.datapath.bpf_root(), hook).unwrap();
        let (eth0, eth1) = (
            lab::ifindex(&one.namespace, "eth0"),
            lab::ifindex(&one.namespace, "eth1"),
        );
        let survey = |node: &[&str]| {
            let node: Vec<_> = node.iter().map(|ip| ip.parse().unwrap()).collect();
            in_namespace(&one.namespace, || {
                let found = with_netlink(|netlink| async move { outside::survey(&netlink).await }).unwrap();
                outside::choose(&found, &[], &node).0
            })
        };
        let names = |devices: &[outside::OutsideDevice]| -> Vec<String> {
            devices.iter().map(|device| device.name.clone()).collect()
        };
        assert_eq!(names(&survey(&["192.0.2.1"])), ["eth0"]);
        run(&[
            "ip",
            "-n",
            &one.namespace,
            "-6",
            "route",
            "add",
            "default",
            "via",
            CLIENT[1],
        ]);
        let both = survey(&["192.0.2.1", "2001:db8::1"]);
        assert_eq!(names(&both), ["eth0", "eth1"]);
        let addresses: Vec<_> = both
            .iter()
            .flat_map(|d| [d.ipv4.unwrap(), d.ipv6.unwrap()])
            .collect();
        let expected = ["192.0.2.1", "2001:db8::1", NEAR[0], NEAR[1]];
        assert_eq!(
            addresses,
            expected.map(|ip| ip.parse::<std::net::IpAddr>().unwrap())
        );
        for hook in PacketHook::OF_OUTSIDE {
            assert_eq!(attached(hook), [eth0, eth1]);
        }
        // One is no longer wanted, and one does not exist: the other has its hooks all the same.
        let errors = in_namespace(&one.namespace, || one.datapath.attach_outside(&[9_999, eth1]));
        assert_eq!(errors.len(), 2, "{errors:?}");
        for hook in PacketHook::OF_OUTSIDE {
            assert_eq!(attached(hook), [eth1]);
        }
    });
}
