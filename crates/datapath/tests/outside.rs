//! Clients outside and the node's devices to them, a frame at a time through BPF_PROG_TEST_RUN: node ports, load balancers'
//! addresses, external IPs. Every frame that comes out has its checksums compared.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::collections::BTreeSet;

use isthmus_bpf_abi::{
    DropReason, IpcacheKey, IpcacheValue, PROTO_ICMP, PROTO_ICMPV6, PROTO_SCTP, PROTO_TCP, PROTO_UDP,
    TCP_ACK, TCP_RST, TCP_SYN, ct_flag, ct_state, feature,
};
use isthmus_datapath::{MapOp, PacketHook};

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
use lab::address;
use pair::{DROP, HOST, LOCAL, OTHER, PASS, REDIRECT, REMOTE, ip};
use transport::{Ends, end, ends, fragments, read, read_quote, sctp, tcp, udp, udp_datagram, unreachable};

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

/// As many flows as there are ports, then one more; then ports of flows that are over, or are just closing, are used again.
#[test]
fn no_two_flows_have_one_port_and_none_is_lost_for_ever() {
    Edge::check(|edge| {
        const ROOM: u16 = 16;
        edge.set(ALL_FEATURES, 2_000..=1_999 + ROOM);
        edge.service(1, NODE_PORT[0], PROTO_TCP, 0, &[REMOTE[0]]);
        let ask = |number: u16| ends(&client(0, number), NODE_PORT[0]);
        let syn = |number| tcp(OUTSIDER, ask(number), TCP_SYN, b"");
        let mut ports = BTreeSet::new();
        let mut refused = Vec::new();
        for number in 0..200 {
            let (verdict, out) = edge.run(PacketHook::FromHostDevice, &syn(number)).unwrap();
            assert_eq!(verdict, REDIRECT);
            let out = read(&out);
            if out.ends.destination == end(REMOTE[0]) {
                assert!(ports.insert(out.ends.source.1), "{} twice", out.ends.source.1);
            } else {
                assert_eq!(
                    (out.ends, out.transport[13]),
                    (ask(number).back(), TCP_RST | TCP_ACK)
                );
                refused.push(number);
            }
        }
        assert!(
            ports.len() as u16 >= ROOM - 1 && ports.len() <= usize::from(ROOM),
            "{ports:?}"
        );
        let number = refused[0];
        edge.comes(&syn(number), REDIRECT, DropReason::NoSnatPort);
        assert_eq!(edge.flow(ask(number), PROTO_TCP), None);
        // To another backend the same ports are free.
        edge.service(2, BALANCER[0], PROTO_TCP, 0, &["10.2.0.8:8080"]);
        let other = tcp(OUTSIDER, ends(&client(0, 1), BALANCER[0]), TCP_SYN, b"");
        edge.comes(&other, REDIRECT, DropReason::Translated);
        // One flow is over, another is closing: both leave their port, and their entries.
        for (age, state) in [(100, ct_state::OPENING), (1, ct_state::CLOSING)] {
            let port = *ports.first().unwrap();
            ports.remove(&port);
            let back = ends(REMOTE[0], &format!("10.1.0.1:{port}"));
            let former = edge.flow(back, PROTO_TCP).unwrap();
            edge.edit(back, PROTO_TCP, |entry| {
                entry.last_seen = entry.last_seen.wrapping_sub(age);
                entry.state = state;
            });
            let taken = refused.iter().find(|number| {
                let (_, out) = edge.run(PacketHook::FromHostDevice, &syn(**number)).unwrap();
                read(&out).ends == back.back()
            });
            let taken = *taken.expect("one of 180 tries that port");
            assert_eq!(
                edge.flow(back, PROTO_TCP).unwrap().peer_port,
                (40_000 + taken).to_be_bytes()
            );
            let former_ends = Ends {
                source: (former.peer_address, u16::from_be_bytes(former.peer_port)),
                destination: end(NODE_PORT[0]),
            };
            assert_eq!(edge.flow(former_ends, PROTO_TCP), None, "the former flow's entry");
            refused.retain(|number| *number != taken);
        }
        let claims = edge.node.datapath.tables().ct.dump().unwrap();
        assert!(claims.iter().all(|(key, _)| key.pad == [0; 3]), "a claim stayed");
    });
}

/// All CPUs look for ports at once, first for free ones, then for those of flows that are over.
#[test]
fn ports_are_given_once_however_many_ask() {
    Edge::check(|edge| {
        const ROOM: u16 = 256;
        const EACH: u16 = 100;
        edge.set(ALL_FEATURES, 2_000..=1_999 + ROOM);
        edge.service(1, NODE_PORT[0], PROTO_UDP, 0, &[REMOTE[0]]);
        for round in 0..4 {
            let start = std::sync::Barrier::new(4);
            let got: Vec<(Ends, Ends)> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..4)
                    .map(|thread| {
                        let start = &start;
                        scope.spawn(move || {
                            lab::in_namespace(&edge.node.namespace, || {
                                start.wait();
                                let datapath = &edge.node.datapath;
                                let flows = (0..EACH).map(|number| {
                                    let port = 10_000 + round * 4 * EACH + thread * EACH + number;
                                    let asked = ends(&format!("198.51.100.7:{port}"), NODE_PORT[0]);
                                    let frame = udp(OUTSIDER, asked, b"?");
                                    let hook = PacketHook::FromHostDevice;
                                    let (_, out) = datapath.simulate(hook, &frame, edge.ifindex).unwrap();
                                    (asked, read(&out).ends)
                                });
                                flows.collect::<Vec<_>>()
                            })
                        })
                    })
                    .collect();
                threads
                    .into_iter()
                    .flat_map(|thread| thread.join().unwrap())
                    .collect()
            });
            let mut ports = BTreeSet::new();
            for (asked, reached) in got {
                if reached.destination != end(REMOTE[0]) {
                    continue;
                }
                assert!(
                    ports.insert(reached.source.1),
                    "{} twice in round {round}",
                    reached.source.1
                );
                let back = edge.flow(reached.back(), PROTO_UDP).unwrap();
                assert_eq!(
                    (back.peer_address, back.peer_port),
                    (asked.source.0, asked.source.1.to_be_bytes())
                );
            }
            // Who finds nothing in its tries is refused; nearly all ports are given.
            assert!(ports.len() >= usize::from(ROOM) * 3 / 4, "{} ports", ports.len());
            let tables = edge.node.datapath.tables();
            for (key, mut value) in tables.ct.dump().unwrap() {
                assert_eq!(key.pad, [0; 3], "a claim stayed");
                value.last_seen = value.last_seen.wrapping_sub(100);
                tables.ct.put(&key, &value).unwrap();
            }
        }
    });
}

#[test]
fn a_flow_finds_its_port_again_and_the_way_back_is_mended() {
    Edge::check(|edge| {
        for family in [0, 1] {
            edge.service(
                1 + family as u32,
                NODE_PORT[family],
                PROTO_TCP,
                0,
                &[REMOTE[family]],
            );
            let asked = ends(CLIENT[family], NODE_PORT[family]);
            let out = edge.comes(
                &tcp(OUTSIDER, asked, TCP_SYN, b""),
                REDIRECT,
                DropReason::Translated,
            );
            let reached = read(&out).ends;
            let data = tcp(OUTSIDER, asked, TCP_ACK, b"data");
            edge.comes(&data, REDIRECT, DropReason::Translated);
            // The first entry is evicted.
            edge.forget(asked, PROTO_TCP);
            assert_eq!(
                read(&edge.comes(&data, REDIRECT, DropReason::Translated)).ends,
                reached
            );
            // Then the other one.
            edge.forget(reached.back(), PROTO_TCP);
            edge.edit(asked, PROTO_TCP, |entry| entry.last_seen -= 2);
            edge.comes(&data, REDIRECT, DropReason::Translated);
            let answer = tcp(OUTSIDER, reached.back(), TCP_ACK, b"data");
            assert_eq!(
                read(&edge.comes(&answer, REDIRECT, DropReason::Translated)).ends,
                asked.back()
            );
            // Its port became another's: it must not go on with it.
            edge.edit(reached.back(), PROTO_TCP, |entry| entry.peer_port = [1, 1]);
            edge.edit(asked, PROTO_TCP, |entry| entry.last_seen -= 2);
            edge.comes(&data, REDIRECT, DropReason::Translated);
            let out = read(&edge.comes(&data, REDIRECT, DropReason::Translated)).ends;
            assert_eq!(out.destination, reached.destination);
            assert_ne!(out.source, reached.source);
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

#[test]
fn sctp_keeps_its_port_or_is_refused() {
    Edge::check(|edge| {
        edge.service(1, NODE_PORT[0], PROTO_SCTP, 0, &["10.2.0.7:30080"]);
        let asked = ends(CLIENT[0], NODE_PORT[0]);
        let out = read(&edge.comes(&sctp(OUTSIDER, asked), REDIRECT, DropReason::Translated));
        assert_eq!(out.ends, ends("10.1.0.1:50000", "10.2.0.7:30080"));
        let second = sctp(OUTSIDER, ends("198.51.100.8:50000", NODE_PORT[0]));
        let out = read(&edge.comes(&second, REDIRECT, DropReason::NoSnatPort));
        assert_eq!(out.proto, PROTO_ICMP);
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
