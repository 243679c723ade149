//! Per-packet load balancing between two nodes with real sockets: pods whose socket calls nobody translates, veth pairs, VXLAN.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::{collections::BTreeSet, io::ErrorKind, net::TcpStream};

use isthmus_bpf_abi::{PROTO_TCP, ServiceKey, ServiceValue, backend_state};
use isthmus_datapath::{MapOp, PacketHook};

#[path = "support/clients.rs"]
mod clients;
#[path = "support/lab.rs"]
mod lab;
#[path = "support/nodes.rs"]
mod nodes;
#[path = "support/services.rs"]
mod services;

use clients::{is_refused, send_bulk, serve_bulk, udp_to};
use lab::{Lab, address, in_namespace};
use nodes::{Node, two};
use services::{backend, connect, echo, put_service, receive, serve, service_ops};

const VIP: [&str; 2] = ["10.96.0.10:80", "[fd96::10]:80"];

/// Two nodes without socket hooks. The backends are pod .6 of node 1 and pod .5 of node 2, both families; the client is pod
/// .5 of node 1.
fn check(underlay: &str, test: impl FnOnce(&Node, &Node)) {
    let mut lab = Lab::new();
    lab.socket_lb = false;
    let [one, two] = two(&mut lab, underlay);
    in_namespace(&one.pods[1], || {
        serve("10.1.0.6:8080", "here");
        serve("[fd01::6]:8080", "here");
    });
    in_namespace(&two.pods[0], || {
        serve("10.2.0.5:8080", "there");
        serve("[fd02::5]:8080", "there");
    });
    test(&one, &two);
    for node in [&one, &two] {
        let drops: Vec<_> = node
            .datapath
            .tables()
            .counters()
            .unwrap()
            .into_iter()
            .filter(|counter| counter.reason.is_drop())
            .map(|counter| counter.reason.name())
            .filter(|name| !["no-backend", "backend-gone"].contains(name))
            .collect();
        assert_eq!(drops, [""; 0], "node {}", node.number);
    }
}

/// The service of both backends, both families and protocols.
fn both(node: &Node) {
    put_service(
        &node.datapath,
        1,
        VIP[0],
        &[(1, "10.1.0.6:8080"), (2, "10.2.0.5:8080")],
    );
    put_service(
        &node.datapath,
        2,
        VIP[1],
        &[(3, "[fd01::6]:8080"), (4, "[fd02::5]:8080")],
    );
}

fn a_pod_without_hooks_reaches_backends_everywhere(underlay: &str) {
    check(underlay, |one, _| {
        both(one);
        in_namespace(&one.pods[0], || {
            for vip in VIP {
                let mut seen = BTreeSet::new();
                for _ in 0..24 {
                    let (mut stream, name) = connect(vip).expect("a connection");
                    assert_eq!(stream.peer_addr().unwrap(), vip.parse().unwrap());
                    echo(&mut stream).unwrap();
                    let socket = udp_to(vip);
                    socket.send(b"?").unwrap();
                    seen.extend([name, format!("udp {}", receive(&socket).0)]);
                }
                let all = ["here", "there", "udp here", "udp there"].map(str::to_owned);
                assert_eq!(seen, BTreeSet::from(all), "{vip}");
            }
        });
    });
}

#[test]
fn a_pod_without_hooks_reaches_backends_everywhere_over_ipv4() {
    a_pod_without_hooks_reaches_backends_everywhere("192.0.2.");
}

#[test]
fn a_pod_without_hooks_reaches_backends_everywhere_over_ipv6() {
    a_pod_without_hooks_reaches_backends_everywhere("2001:db8::");
}

#[test]
fn segments_and_fragments_of_any_size_arrive_whole() {
    check("192.0.2.", |one, two| {
        for (family, target) in ["10.2.0.5:9000", "[fd02::5]:9000"].into_iter().enumerate() {
            put_service(
                &one.datapath,
                1 + family as u32,
                VIP[family],
                &[(1 + family as u32, target)],
            );
            let server = in_namespace(&two.pods[0], || serve_bulk(target));
            in_namespace(&one.pods[0], || send_bulk(VIP[family]));
            server.join().unwrap();
        }
    });
}

#[test]
fn processes_of_nodes_are_backends_too() {
    check("192.0.2.", |one, two| {
        for node in [one, two] {
            in_namespace(&node.namespace, || {
                for ip in [
                    format!("192.0.2.{}", node.number),
                    format!("[2001:db8::{}]", node.number),
                ] {
                    serve(
                        &format!("{ip}:6443"),
                        ["first", "second"][usize::from(node.number) - 1],
                    );
                }
            });
        }
        // Answers of node 2 go back through the overlay, as packets of nodes to pods do.
        for (id, vip, target, name) in [
            (1, "10.96.0.1:443", "192.0.2.1:6443", "first"),
            (2, "10.96.0.2:443", "192.0.2.2:6443", "second"),
            (3, "[fd96::1]:443", "[2001:db8::1]:6443", "first"),
            (4, "[fd96::2]:443", "[2001:db8::2]:6443", "second"),
        ] {
            put_service(&one.datapath, id, vip, &[(id, target)]);
            in_namespace(&one.pods[0], || {
                let (mut stream, got) = connect(vip).expect("a connection");
                assert_eq!(got, name);
                echo(&mut stream).unwrap();
                let socket = udp_to(vip);
                socket.send(b"?").unwrap();
                assert_eq!(receive(&socket).0, name);
            });
        }
    });
}

#[test]
fn a_service_without_backends_refuses_at_once() {
    check("192.0.2.", |one, _| {
        for (id, vip) in (1..).zip(VIP) {
            put_service(&one.datapath, id, vip, &[]);
            in_namespace(&one.pods[0], || is_refused(vip));
        }
    });
}

#[test]
fn a_closed_port_behind_a_frontend_is_heard_of() {
    check("192.0.2.", |one, _| {
        for (id, vip, target) in [
            (1, VIP[0], "10.2.0.5:1"),
            (2, VIP[1], "[fd02::5]:1"),
            (3, "10.96.0.11:80", "10.1.0.6:1"),
            (4, "[fd96::11]:80", "[fd01::6]:1"),
        ] {
            put_service(&one.datapath, id, vip, &[(id, target)]);
            in_namespace(&one.pods[0], || is_refused(vip));
        }
    });
}

#[test]
fn an_open_connection_outlives_its_backends_rotation_and_not_the_backend() {
    check("192.0.2.", |one, _| {
        for (id, vip, target) in [(1, VIP[0], "10.2.0.5:8080"), (2, VIP[1], "[fd02::5]:8080")] {
            let apply = |ops: &[MapOp]| assert!(one.datapath.apply(ops).is_complete());
            apply(&service_ops(id, vip, PROTO_TCP, &[(id, target)]));
            in_namespace(&one.pods[0], || {
                let (mut stream, _) = connect(vip).expect("a connection");
                echo(&mut stream).unwrap();
                let socket: std::net::SocketAddr = vip.parse().unwrap();
                let frontend =
                    ServiceKey::frontend(address(&socket.ip().to_string()), socket.port(), PROTO_TCP);
                let mut leaving = backend(target, PROTO_TCP);
                leaving.state = backend_state::TERMINATING;
                apply(&[
                    MapOp::BackendPut(id, leaving),
                    MapOp::ServicePut(frontend, ServiceValue::frontend(id, 0, 0)),
                    MapOp::ServiceDelete(frontend.at_slot(1)),
                ]);
                for _ in 0..10 {
                    echo(&mut stream).unwrap();
                }
                let refused = TcpStream::connect(vip).unwrap_err();
                assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
                apply(&[MapOp::BackendDelete(id)]);
                let reset = echo(&mut stream).unwrap_err();
                assert_eq!(reset.kind(), ErrorKind::ConnectionReset);
            });
        }
    });
}

#[test]
fn a_pod_is_its_own_backend() {
    check("192.0.2.", |one, _| {
        for (id, vip, target) in [(1, VIP[0], "10.1.0.6:8080"), (2, VIP[1], "[fd01::6]:8080")] {
            put_service(&one.datapath, id, vip, &[(id, target)]);
            in_namespace(&one.pods[1], || {
                let (mut stream, name) = connect(vip).expect("a connection");
                echo(&mut stream).unwrap();
                let socket = udp_to(vip);
                socket.send(b"?").unwrap();
                assert_eq!((name.as_str(), receive(&socket).0.as_str()), ("here", "here"));
            });
        }
    });
}

#[test]
fn a_connection_goes_on_while_backends_come_and_go() {
    check("192.0.2.", |one, _| {
        both(one);
        let (mut stream, _) = in_namespace(&one.pods[0], || connect(VIP[0]).expect("a connection"));
        for round in 0..20_u32 {
            // A third backend comes and goes.
            let extra = service_ops(
                2,
                VIP[0],
                PROTO_TCP,
                &[
                    (2, "10.1.0.6:8080"),
                    (4, "10.2.0.5:8080"),
                    (100 + round, "10.2.0.6:8080"),
                ],
            );
            assert!(one.datapath.apply(&extra).is_complete());
            echo(&mut stream).unwrap();
            let plain = service_ops(
                2,
                VIP[0],
                PROTO_TCP,
                &[(2, "10.1.0.6:8080"), (4, "10.2.0.5:8080")],
            );
            assert!(one.datapath.apply(&plain).is_complete());
            assert!(
                one.datapath
                    .apply(&[MapOp::BackendDelete(100 + round)])
                    .is_complete()
            );
            echo(&mut stream).unwrap();
        }
    });
}

#[test]
fn hooks_are_on_both_ways_of_a_pods_device_and_go_with_it() {
    check("192.0.2.", |one, _| {
        let pods: Vec<u32> = [5, 6]
            .map(|host| lab::ifindex(&one.namespace, &format!("pod{host}")))
            .into();
        for hook in PacketHook::OF_ENDPOINT {
            let attached = isthmus_datapath::links::attached_devices(one.datapath.bpf_root(), hook).unwrap();
            assert_eq!(attached, pods, "{}", hook.name());
        }
        in_namespace(&one.namespace, || one.datapath.detach_endpoint(pods[0])).unwrap();
        in_namespace(&one.namespace, || one.datapath.retain_endpoints(&[])).unwrap();
        for hook in PacketHook::OF_ENDPOINT {
            let attached = isthmus_datapath::links::attached_devices(one.datapath.bpf_root(), hook).unwrap();
            assert_eq!(attached, [0; 0], "{}", hook.name());
        }
    });
}
