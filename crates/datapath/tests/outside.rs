//! Clients outside and the node's devices to them, a frame at a time through BPF_PROG_TEST_RUN: node ports, load balancers'
//! addresses, external IPs. Every frame that comes out has its checksums compared.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use isthmus_bpf_abi::{
    DropReason, IpcacheKey, IpcacheValue, PROTO_ICMP, PROTO_ICMPV6, PROTO_TCP, PROTO_UDP, TCP_ACK, TCP_RST,
    TCP_SYN, ct_flag, feature,
};
use isthmus_datapath::MapOp;

#[path = "support/edge.rs"]
mod edge;
#[path = "support/frames.rs"]
mod frames;
#[path = "support/lab.rs"]
mod lab;
#[path = "support/pair.rs"]
mod pair;
#[path = "support/services.rs"]
mod services;
#[path = "support/transport.rs"]
mod transport;

use edge::{ALL_FEATURES, BALANCER, CLIENT, Edge, NODE, NODE_PORT, OUTSIDER, PORTS, ROUTER};
use lab::{address, run};
use pair::{DROP, HOST, LOCAL, OTHER, PASS, REDIRECT, REMOTE, ip};
use transport::{
    Ends, end, ends, fragments, read, read_quote, tcp, ttl, udp, udp_datagram, unreachable, with_ttl,
};

/// A host-network pod of another node.
const FAR_NODE: [&str; 2] = ["192.0.2.2:6443", "[2001:db8::2]:6443"];

/// A port of the node in the pod network.
const ROUTER_PORT: [&str; 2] = ["10.1.0.1:4240", "[fd01::1]:4240"];

/// A frame of a protocol with ports.
fn frame(proto: u8, mac: [u8; 6], ends: Ends) -> Vec<u8> {
    match proto {
        PROTO_TCP => tcp(mac, ends, TCP_SYN, b""),
        _ => udp(mac, ends, b"odd"),
    }
}

/// A client's port that no other call gave.
fn client(family: usize, number: u16) -> String {
    CLIENT[family].replace("50000", &(40_000 + number).to_string())
}

#[test]
fn a_pod_here_sees_the_client_and_its_answer_comes_from_the_frontend() {
    Edge::check(|edge| {
        let mut id = 0;
        for vip in [NODE_PORT, BALANCER] {
            for proto in [PROTO_TCP, PROTO_UDP] {
                for family in [0, 1] {
                    id += 1;
                    edge.service(id, vip[family], proto, 0, &[LOCAL[family]]);
                    let from = client(family, id as u16);
                    let asked = ends(&from, vip[family]);
                    let reached = ends(&from, LOCAL[family]);
                    let out = edge.comes(&frame(proto, OUTSIDER, asked), REDIRECT, DropReason::Translated);
                    let out = read(&out);
                    assert_eq!((out.ends, out.macs), (reached, [OTHER, HOST]));
                    let flow = edge.flow(asked, proto).unwrap();
                    assert_eq!((flow.flags, flow.ifindex, flow.service_id), (0, edge.ifindex, id));
                    let answer = frame(proto, OTHER, reached.back());
                    let out = edge.node.expect(1, &answer, REDIRECT, DropReason::Translated);
                    assert_eq!(read(&out).ends, asked.back());
                    assert_eq!(edge.flow(reached.back(), proto).unwrap().ifindex, edge.ifindex);
                }
            }
        }
        // What the pod sends outside by itself is the stack's.
        let own = udp(OTHER, ends(LOCAL[0], "198.51.100.8:53"), b"?");
        assert_eq!(edge.node.expect(1, &own, PASS, DropReason::Forwarded), own);
    });
}

#[test]
fn a_backend_on_another_node_sees_this_node_and_its_answer_goes_back_through_it() {
    Edge::check(|edge| {
        let mut id = 0;
        for (target, source) in [(REMOTE, ROUTER), (FAR_NODE, NODE)] {
            for proto in [PROTO_TCP, PROTO_UDP] {
                for family in [0, 1] {
                    id += 1;
                    let vip = NODE_PORT[family].replace("30080", &(30_080 + id).to_string());
                    edge.service(id, &vip, proto, 0, &[target[family]]);
                    let asked = ends(CLIENT[family], &vip);
                    let out = edge.comes(&frame(proto, OUTSIDER, asked), REDIRECT, DropReason::Translated);
                    let reached = read(&out).ends;
                    assert_eq!(reached.destination, end(target[family]));
                    assert_eq!(reached.source.0, address(source[family]));
                    assert!(PORTS.contains(&reached.source.1), "{reached:?}");
                    let flow = edge.flow(asked, proto).unwrap();
                    assert_eq!((flow.flags, flow.peer_address), (ct_flag::SNAT, reached.source.0));
                    // The same flow, the same port.
                    let more = tcp(OUTSIDER, asked, TCP_ACK, b"data");
                    let more = if proto == PROTO_TCP {
                        more
                    } else {
                        udp(OUTSIDER, asked, b"data")
                    };
                    let out = edge.comes(&more, REDIRECT, DropReason::Translated);
                    assert_eq!(read(&out).ends, reached);
                    let answer = frame(proto, OUTSIDER, reached.back());
                    let out = edge.comes(&answer, REDIRECT, DropReason::Translated);
                    assert_eq!(read(&out).ends, asked.back());
                }
            }
        }
    });
}

#[test]
fn a_process_of_the_node_is_a_backend_too() {
    Edge::check(|edge| {
        let mut id = 0;
        for proto in [PROTO_TCP, PROTO_UDP] {
            for family in [0, 1] {
                id += 1;
                let target = NODE_PORT[family].replace("30080", "6443");
                edge.service(id, BALANCER[family], proto, 0, &[&target]);
                let asked = ends(CLIENT[family], BALANCER[family]);
                let reached = ends(CLIENT[family], &target);
                let out = edge.comes(&frame(proto, OUTSIDER, asked), PASS, DropReason::Translated);
                assert_eq!(read(&out).ends, reached);
                let answer = frame(proto, HOST, reached.back());
                let out = edge.leaves(&answer, PASS, DropReason::Translated);
                assert_eq!(read(&out).ends, asked.back());
                let closed = unreachable(
                    HOST,
                    NODE[family],
                    ip(CLIENT[family]),
                    &frame(proto, HOST, reached),
                );
                let out = read(&edge.leaves(&closed, PASS, DropReason::Translated));
                assert_eq!(
                    (out.ends.source.0, read_quote(&out)),
                    (end(BALANCER[family]).0, asked)
                );
            }
        }
    });
}

/// One client's port through two frontends to one pod: the pod sees the router the second time, and answers it.
#[test]
fn one_socket_through_two_frontends_reaches_one_pod_twice() {
    Edge::check(|edge| {
        let mut id = 0;
        for proto in [PROTO_TCP, PROTO_UDP] {
            for family in [0, 1] {
                id += 2;
                edge.service(id, NODE_PORT[family], proto, 0, &[LOCAL[family]]);
                edge.service(id + 1, BALANCER[family], proto, 0, &[LOCAL[family]]);
                let first = ends(CLIENT[family], NODE_PORT[family]);
                let second = ends(CLIENT[family], BALANCER[family]);
                let out = edge.comes(&frame(proto, OUTSIDER, first), REDIRECT, DropReason::Translated);
                assert_eq!(read(&out).ends, ends(CLIENT[family], LOCAL[family]));
                let out =
                    read(&edge.comes(&frame(proto, OUTSIDER, second), REDIRECT, DropReason::Translated));
                assert_eq!(
                    (out.ends.source.0, out.macs),
                    (address(ROUTER[family]), [OTHER, HOST])
                );
                for (answer, asked) in [
                    (ends(LOCAL[family], CLIENT[family]), first),
                    (out.ends.back(), second),
                ] {
                    let answer = frame(proto, OTHER, answer);
                    let out = edge.node.expect(1, &answer, REDIRECT, DropReason::Translated);
                    assert_eq!(read(&out).ends, asked.back());
                }
                // What else the pod tells the node is the node's.
                let own = frame(proto, OTHER, ends(LOCAL[family], ROUTER_PORT[family]));
                assert_eq!(edge.node.expect(1, &own, PASS, DropReason::Forwarded), own);
            }
        }
    });
}

/// The same to a process of the node, whose stack takes no packet from its own router address.
#[test]
fn one_socket_through_two_frontends_reaches_a_process_once() {
    Edge::check(|edge| {
        let mut id = 0;
        for proto in [PROTO_TCP, PROTO_UDP] {
            for family in [0, 1] {
                id += 2;
                let target = NODE_PORT[family].replace("30080", "6443");
                edge.service(id, NODE_PORT[family], proto, 0, &[&target]);
                edge.service(id + 1, BALANCER[family], proto, 0, &[&target]);
                let [first, second] = [NODE_PORT, BALANCER].map(|vip| ends(CLIENT[family], vip[family]));
                let reached = ends(CLIENT[family], &target);
                let out = edge.comes(&frame(proto, OUTSIDER, first), PASS, DropReason::Translated);
                assert_eq!(read(&out).ends, reached);
                let ask = frame(proto, OUTSIDER, second);
                let newest = if proto == PROTO_TCP {
                    let out = read(&edge.comes(&ask, REDIRECT, DropReason::TupleInUse));
                    assert_eq!((out.ends, out.transport[13]), (second.back(), TCP_RST | TCP_ACK));
                    first
                } else {
                    let out = edge.comes(&ask, PASS, DropReason::Translated);
                    assert_eq!(read(&out).ends, reached);
                    second
                };
                let answer = frame(proto, HOST, reached.back());
                let out = edge.leaves(&answer, PASS, DropReason::Translated);
                assert_eq!(read(&out).ends, newest.back());
                // A pod beside it is reached all the same.
                if proto == PROTO_TCP {
                    edge.service(id + 1, BALANCER[family], proto, 0, &[&target, LOCAL[family]]);
                    let out = edge.comes(&ask, REDIRECT, DropReason::Translated);
                    assert_eq!(read(&out).ends.destination, end(LOCAL[family]));
                }
            }
        }
        // An address of the node that the agent does not know: nothing goes there with the node's own as its source.
        run(&[
            "ip",
            "-n",
            &edge.node.namespace,
            "address",
            "add",
            "192.0.2.77/24",
            "dev",
            "eth0",
        ]);
        edge.service(90, "203.0.113.90:80", PROTO_TCP, 0, &["192.0.2.77:80"]);
        let syn = frame(PROTO_TCP, OUTSIDER, ends(CLIENT[0], "203.0.113.90:80"));
        edge.comes(&syn, DROP, DropReason::NoRoute);
    });
}

#[test]
fn what_is_no_frontend_and_what_is_switched_off_passes_as_it_is() {
    Edge::check(|edge| {
        edge.service(1, NODE_PORT[0], PROTO_TCP, 0, &[LOCAL[0]]);
        edge.node.service(2, "10.96.0.10:80", PROTO_TCP, &[LOCAL[0]]);
        let mut arp = frames::ethernet(OUTSIDER, [0x08, 0x06], &[0; 28]);
        let others = [
            tcp(OUTSIDER, ends(CLIENT[0], "192.0.2.1:22"), TCP_SYN, b""),
            udp(OUTSIDER, ends(CLIENT[0], NODE_PORT[0]), b"?"),
            tcp(OUTSIDER, ends(CLIENT[0], LOCAL[0]), TCP_SYN, b""),
            udp(OUTSIDER, ends("192.0.2.2:54321", "192.0.2.1:8472"), b"a tunnel's"),
            frames::icmpv6(OUTSIDER, "fe80::1", "ff02::1"),
            frames::ethernet(OUTSIDER, [0x88, 0xcc], &[0; 40]),
            arp.clone(),
        ];
        for other in others {
            assert_eq!(edge.comes(&other, PASS, DropReason::Forwarded), other);
            assert_eq!(edge.leaves(&other, PASS, DropReason::Forwarded), other);
        }
        edge.set(feature::PACKET_LB, PORTS);
        let asked = ends(CLIENT[0], NODE_PORT[0]);
        let syn = tcp(OUTSIDER, asked, TCP_SYN, b"");
        assert_eq!(edge.comes(&syn, PASS, DropReason::Forwarded), syn);
        assert_eq!(edge.flow(asked, PROTO_TCP), None);
        arp.clear();
    });
}

#[test]
fn a_frontend_without_backends_answers_outside_at_once() {
    Edge::check(|edge| {
        let mut id = 0;
        for proto in [PROTO_TCP, PROTO_UDP] {
            for family in [0, 1] {
                id += 1;
                edge.service(id, NODE_PORT[family], proto, 0, &[]);
                let asked = ends(CLIENT[family], NODE_PORT[family]);
                let sent = frame(proto, OUTSIDER, asked);
                let out = read(&edge.comes(&sent, REDIRECT, DropReason::NoBackend));
                if proto == PROTO_TCP {
                    assert_eq!((out.ends, out.transport[13]), (asked.back(), TCP_RST | TCP_ACK));
                } else {
                    assert_eq!(out.proto, [PROTO_ICMP, PROTO_ICMPV6][family]);
                    assert_eq!(out.ends.destination.0, asked.source.0);
                    assert_eq!(read_quote(&out), asked);
                }
                edge.set(ALL_FEATURES | feature::NO_BACKEND_DROP, PORTS);
                edge.comes(&sent, DROP, DropReason::NoBackend);
                edge.set(ALL_FEATURES, PORTS);
            }
        }
    });
}

#[test]
fn a_client_that_comes_another_way_is_answered_there() {
    Edge::check(|edge| {
        edge.service(1, NODE_PORT[0], PROTO_UDP, 0, &[LOCAL[0]]);
        let asked = ends(CLIENT[0], NODE_PORT[0]);
        let back = ends(LOCAL[0], CLIENT[0]);
        let ask = udp(OUTSIDER, asked, b"?");
        edge.comes(&ask, REDIRECT, DropReason::Translated);
        for entry in [asked, back] {
            edge.edit(entry, PROTO_UDP, |entry| entry.ifindex = 77);
        }
        edge.comes(&ask, REDIRECT, DropReason::Translated);
        for entry in [asked, back] {
            assert_eq!(edge.flow(entry, PROTO_UDP).unwrap().ifindex, edge.ifindex);
        }
    });
}

/// Two nodes may have each other's frontends as backends.
#[test]
fn a_packet_between_devices_has_a_last_hop() {
    Edge::check(|edge| {
        for family in [0, 1] {
            let id = 1 + 2 * family as u32;
            edge.service(id, NODE_PORT[family], PROTO_TCP, 0, &[FAR_NODE[family]]);
            edge.service(id + 1, BALANCER[family], PROTO_TCP, 0, &[LOCAL[family]]);
            let asked = ends(CLIENT[family], NODE_PORT[family]);
            let question = tcp(OUTSIDER, asked, TCP_SYN, b"");
            let out = edge.comes(&with_ttl(&question, 2), REDIRECT, DropReason::Translated);
            assert_eq!(ttl(&out), 1);
            let answer = tcp(OUTSIDER, read(&out).ends.back(), TCP_SYN | TCP_ACK, b"");
            let out = edge.comes(&with_ttl(&answer, 255), REDIRECT, DropReason::Translated);
            assert_eq!((ttl(&out), read(&out).ends), (254, asked.back()));
            for last in [0, 1] {
                edge.comes(&with_ttl(&question, last), DROP, DropReason::TtlExpired);
                edge.comes(&with_ttl(&answer, last), DROP, DropReason::TtlExpired);
            }
            // A pod here is where it ends, and its answer leaves by a device.
            let asked = ends(CLIENT[family], BALANCER[family]);
            let question = tcp(OUTSIDER, asked, TCP_SYN, b"");
            let out = edge.comes(&with_ttl(&question, 1), REDIRECT, DropReason::Translated);
            assert_eq!(ttl(&out), 1);
            let answer = tcp(OTHER, read(&out).ends.back(), TCP_SYN | TCP_ACK, b"");
            let out = edge.node.expect(1, &answer, REDIRECT, DropReason::Translated);
            assert_eq!((ttl(&out), read(&out).ends), (63, asked.back()));
        }
    });
}

#[test]
fn errors_about_a_flow_from_outside_reach_who_sent_it() {
    Edge::check(|edge| {
        for family in [0, 1] {
            let other = ["198.51.100.1", "2001:db8:9::1"][family];
            for (id, proto) in [(1, PROTO_TCP), (3, PROTO_UDP)] {
                let id = id + family as u32;
                // A pod here.
                edge.service(id, NODE_PORT[family], proto, 0, &[LOCAL[family]]);
                let asked = ends(CLIENT[family], NODE_PORT[family]);
                let reached = ends(CLIENT[family], LOCAL[family]);
                edge.comes(&frame(proto, OUTSIDER, asked), REDIRECT, DropReason::Translated);
                let quoted = frame(proto, OUTSIDER, asked.back());
                let error = unreachable(OUTSIDER, other, NODE[family], &quoted);
                let out = read(&edge.comes(&error, REDIRECT, DropReason::Translated));
                assert_eq!(
                    (out.ends.source.0, out.ends.destination.0),
                    (address(other), end(LOCAL[family]).0)
                );
                assert_eq!((read_quote(&out), out.macs), (reached.back(), [OTHER, HOST]));
                let error = unreachable(
                    OTHER,
                    ip(LOCAL[family]),
                    ip(CLIENT[family]),
                    &frame(proto, OTHER, reached),
                );
                let out = read(&edge.node.expect(1, &error, REDIRECT, DropReason::Translated));
                assert_eq!(
                    (out.ends.source.0, out.ends.destination.0),
                    (asked.destination.0, asked.source.0)
                );
                assert_eq!(read_quote(&out), asked);
                // One elsewhere: both sides of the quote change.
                let id = id + 10;
                edge.service(id, BALANCER[family], proto, 0, &[REMOTE[family]]);
                let asked = ends(CLIENT[family], BALANCER[family]);
                let out = edge.comes(&frame(proto, OUTSIDER, asked), REDIRECT, DropReason::Translated);
                let reached = read(&out).ends;
                let quoted = frame(proto, OUTSIDER, asked.back());
                let error = unreachable(OUTSIDER, other, ip(BALANCER[family]), &quoted);
                let out = read(&edge.comes(&error, REDIRECT, DropReason::Translated));
                assert_eq!(
                    (out.ends.source.0, out.ends.destination.0),
                    (reached.source.0, reached.destination.0)
                );
                assert_eq!(read_quote(&out), reached.back());
                let error = unreachable(
                    OUTSIDER,
                    ip(REMOTE[family]),
                    ROUTER[family],
                    &frame(proto, OUTSIDER, reached),
                );
                let out = read(&edge.comes(&error, REDIRECT, DropReason::Translated));
                assert_eq!(
                    (out.ends.source.0, out.ends.destination.0),
                    (asked.destination.0, asked.source.0)
                );
                assert_eq!(read_quote(&out), asked);
            }
            // About a flow that is not ours.
            let strange = udp(OUTSIDER, ends(NODE_PORT[family], &client(family, 9)), b"?");
            let error = unreachable(OUTSIDER, other, NODE[family], &strange);
            assert_eq!(edge.comes(&error, PASS, DropReason::Forwarded), error);
        }
    });
}

#[test]
fn fragments_from_outside_go_where_their_first_goes() {
    Edge::check(|edge| {
        for family in [0, 1] {
            edge.service(
                1 + family as u32,
                NODE_PORT[family],
                PROTO_UDP,
                0,
                &[REMOTE[family]],
            );
            let asked = ends(CLIENT[family], NODE_PORT[family]);
            let [first, later] = fragments(OUTSIDER, asked, 7, &udp_datagram(asked, &[5; 600]), 304);
            // One that overtakes is nobody's.
            assert_eq!(edge.comes(&later, PASS, DropReason::Forwarded), later);
            let first = read(&edge.comes(&first, REDIRECT, DropReason::Translated));
            let later = read(&edge.comes(&later, REDIRECT, DropReason::Translated));
            assert_eq!(first.ends.source.0, address(ROUTER[family]));
            assert_eq!(
                (later.ends.source.0, later.ends.destination.0),
                (first.ends.source.0, first.ends.destination.0)
            );
            assert_eq!(
                transport::sum_of_parts(first.ends, &[&first.transport, &later.transport]),
                0xffff
            );
        }
    });
}

/// A client in the mesh that asks a node port over the nodes' network: the answer goes into the overlay.
#[test]
fn a_pod_of_another_node_is_answered_through_the_overlay() {
    Edge::check(|edge| {
        edge.service(1, NODE_PORT[0], PROTO_TCP, 0, &[LOCAL[0]]);
        let asked = ends("10.2.0.9:50000", NODE_PORT[0]);
        edge.comes(
            &tcp(OUTSIDER, asked, TCP_SYN, b""),
            REDIRECT,
            DropReason::Translated,
        );
        let answer = tcp(OTHER, ends(LOCAL[0], "10.2.0.9:50000"), TCP_SYN | TCP_ACK, b"");
        let out = edge.node.expect(1, &answer, REDIRECT, DropReason::Translated);
        assert_eq!(read(&out).ends, asked.back());
        // A backend that must not be reached.
        let unroutable = IpcacheValue::direct(3, isthmus_bpf_abi::ipcache_flag::UNROUTABLE);
        edge.node
            .apply(&[MapOp::IpcachePut(IpcacheKey::ipv4([10, 3, 0, 0], 24), unroutable)]);
        edge.service(2, BALANCER[0], PROTO_TCP, 0, &["10.3.0.7:8080"]);
        let asked = ends(CLIENT[0], BALANCER[0]);
        let out = edge.comes(
            &tcp(OUTSIDER, asked, TCP_SYN, b""),
            REDIRECT,
            DropReason::Unroutable,
        );
        assert_eq!(read(&out).transport[13], TCP_RST | TCP_ACK);
    });
}
