//! Ports of the node that stand for clients outside: each is one flow's, and a flow keeps its own. Frames through
//! BPF_PROG_TEST_RUN.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::collections::BTreeSet;

use isthmus_bpf_abi::{
    DropReason, PROTO_ICMP, PROTO_SCTP, PROTO_TCP, PROTO_UDP, TCP_ACK, TCP_RST, TCP_SYN, ct_state,
};
use isthmus_datapath::PacketHook;

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

use edge::{ALL_FEATURES, BALANCER, CLIENT, Edge, NODE_PORT, OUTSIDER};
use pair::{REDIRECT, REMOTE};
use transport::{Ends, end, ends, read, sctp, tcp, udp};

/// A client's port that no other call gave.
fn client(number: u16) -> String {
    CLIENT[0].replace("50000", &(40_000 + number).to_string())
}

/// As many flows as there are ports, then one more; then ports of flows that are over, or are just closing, are used again.
#[test]
fn no_two_flows_have_one_port_and_none_is_lost_for_ever() {
    Edge::check(|edge| {
        const ROOM: u16 = 16;
        edge.set(ALL_FEATURES, 2_000..=1_999 + ROOM);
        edge.service(1, NODE_PORT[0], PROTO_TCP, 0, &[REMOTE[0]]);
        let ask = |number: u16| ends(&client(number), NODE_PORT[0]);
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
        let other = tcp(OUTSIDER, ends(&client(1), BALANCER[0]), TCP_SYN, b"");
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
