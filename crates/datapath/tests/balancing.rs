//! Per-packet load balancing, a frame at a time through BPF_PROG_TEST_RUN: frame in, maps, verdict, frame out, counted reason.
//! Every frame that comes out has its checksums compared.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use isthmus_bpf_abi::{
    BackendKey, DropReason, LOOPBACK_IPV4, LOOPBACK_IPV6, PROTO_ICMP, PROTO_ICMPV6, PROTO_SCTP, PROTO_TCP,
    PROTO_UDP, ServiceKey, ServiceValue, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, backend_state, ct_flag,
    ct_state, feature,
};
use isthmus_datapath::{MapOp, PacketHook};

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

use lab::{address, in_namespace};
use pair::{CLIENT, DROP, HOST, LOCAL, Node, OTHER, PASS, POD, REDIRECT, REMOTE, VIP, ip, key};
use services::backend;
use transport::{
    Ends, Seen, end, ends, fragments, read, read_quote, sctp, sum_of_parts, tcp, udp, udp_datagram,
    udp_unchecked, unreachable, with_ipv4_options,
};

/// A frame of each protocol with ports.
fn frame(proto: u8, mac: [u8; 6], ends: Ends) -> Vec<u8> {
    match proto {
        PROTO_TCP => tcp(mac, ends, TCP_SYN, b""),
        PROTO_UDP => udp(mac, ends, b"odd"),
        _ => sctp(mac, ends),
    }
}

#[test]
fn a_frontend_leads_to_a_pod_here_and_its_answer_back() {
    Node::check(|node| {
        for (id, proto) in [(1, PROTO_TCP), (3, PROTO_UDP)] {
            for family in [0, 1] {
                node.service(id + family as u32, VIP[family], proto, &[LOCAL[family]]);
                let asked = ends(CLIENT[family], VIP[family]);
                let reached = ends(CLIENT[family], LOCAL[family]);
                let out = read(&node.expect(0, &frame(proto, POD, asked), REDIRECT, DropReason::Translated));
                assert_eq!((out.ends, out.macs), (reached, [OTHER, HOST]));
                let answer = frame(proto, OTHER, reached.back());
                let out = read(&node.expect(1, &answer, REDIRECT, DropReason::Translated));
                assert_eq!((out.ends, out.macs), (asked.back(), [POD, HOST]));
            }
        }
    });
}

#[test]
fn a_frontend_leads_into_the_overlay() {
    Node::check(|node| {
        for (id, proto) in [(1, PROTO_TCP), (3, PROTO_UDP)] {
            for family in [0, 1] {
                node.service(id + family as u32, VIP[family], proto, &[REMOTE[family]]);
                let asked = ends(CLIENT[family], VIP[family]);
                let out = read(&node.expect(0, &frame(proto, POD, asked), REDIRECT, DropReason::Translated));
                assert_eq!(out.ends, ends(CLIENT[family], REMOTE[family]));
                assert_eq!(out.macs[1], POD, "the overlay's device sees the pod's own frame");
            }
        }
    });
}

#[test]
fn a_backend_elsewhere_is_the_stacks_and_its_answer_is_translated_on_the_way_in() {
    Node::check(|node| {
        for family in [0, 1] {
            let world = ["198.51.100.1:443", "[2001:db8:1::1]:443"][family];
            node.service(1 + family as u32, VIP[family], PROTO_TCP, &[world]);
            let asked = ends(CLIENT[family], VIP[family]);
            let reached = ends(CLIENT[family], world);
            let out = node.expect(0, &tcp(POD, asked, TCP_SYN, b""), PASS, DropReason::Translated);
            assert_eq!(read(&out).ends, reached);
            let answer = tcp(HOST, reached.back(), TCP_SYN | TCP_ACK, b"");
            let hook = PacketHook::ToContainer;
            let out = node.expect_at(hook, 0, &answer, PASS, DropReason::Translated);
            assert_eq!(read(&out).ends, asked.back());
            let other = tcp(
                HOST,
                ends(world, &CLIENT[family].replace("40000", "40001")),
                TCP_ACK,
                b"",
            );
            assert_eq!(
                node.expect_at(hook, 0, &other, PASS, DropReason::Forwarded),
                other
            );
        }
    });
}

#[test]
fn what_is_no_frontend_and_what_is_switched_off_stays_as_it_is() {
    Node::check(|node| {
        node.service(1, VIP[0], PROTO_TCP, &[LOCAL[0]]);
        for frame in [
            tcp(POD, ends(CLIENT[0], "10.96.0.10:81"), TCP_SYN, b""),
            tcp(POD, ends(CLIENT[0], "10.96.0.11:80"), TCP_SYN, b""),
            udp(POD, ends(CLIENT[0], VIP[0]), b"?"),
        ] {
            assert_eq!(node.expect(0, &frame, PASS, DropReason::Forwarded), frame);
        }
        node.set_features(0);
        let frame = tcp(POD, ends(CLIENT[0], VIP[0]), TCP_SYN, b"");
        assert_eq!(node.expect(0, &frame, PASS, DropReason::Forwarded), frame);
        assert_eq!(node.flow(ends(CLIENT[0], VIP[0]), PROTO_TCP), None);
    });
}

#[test]
fn checksums_that_are_not_there_are_not_made() {
    Node::check(|node| {
        node.service(1, VIP[0], PROTO_UDP, &[LOCAL[0]]);
        let frame = udp_unchecked(POD, ends(CLIENT[0], VIP[0]));
        let out = read(&node.expect(0, &frame, REDIRECT, DropReason::Translated));
        assert_eq!(out.ends.destination, end(LOCAL[0]));
        assert_eq!(out.transport[6..8], [0, 0]);
    });
}

#[test]
fn headers_with_options_are_followed() {
    Node::check(|node| {
        node.service(1, VIP[0], PROTO_TCP, &[LOCAL[0]]);
        node.service(2, VIP[1], PROTO_UDP, &[LOCAL[1]]);
        let frame = with_ipv4_options(
            &tcp(POD, ends(CLIENT[0], VIP[0]), TCP_SYN, b"x"),
            &[1, 1, 1, 0, 1, 1, 1, 0],
        );
        let out = read(&node.expect(0, &frame, REDIRECT, DropReason::Translated));
        assert_eq!(out.ends.destination, end(LOCAL[0]));
        // Destination options before UDP.
        let plain = udp(POD, ends(CLIENT[1], VIP[1]), b"x");
        let mut frame = plain[..54].to_vec();
        frame[20] = 60;
        frame.extend([PROTO_UDP, 0, 1, 4, 0, 0, 0, 0]);
        frame.extend(&plain[54..]);
        let length = (frame.len() as u16 - 54).to_be_bytes();
        frame[18..20].copy_from_slice(&length);
        let out = node.expect(0, &frame, REDIRECT, DropReason::Translated);
        assert_eq!(out[38..54], end(LOCAL[1]).0);
        assert_eq!(out[64..66], 8080_u16.to_be_bytes());
    });
}

#[test]
fn sctp_keeps_its_port_or_is_refused() {
    Node::check(|node| {
        node.service(1, VIP[0], PROTO_SCTP, &["10.1.0.6:80"]);
        node.service(2, VIP[1], PROTO_SCTP, &[LOCAL[1]]);
        let out = node.expect(
            0,
            &sctp(POD, ends(CLIENT[0], VIP[0])),
            REDIRECT,
            DropReason::Translated,
        );
        let out = read(&out);
        assert_eq!(out.ends, ends(CLIENT[0], "10.1.0.6:80"));
        assert_eq!(out.transport[8..12], [0xde, 0xad, 0xbe, 0xef]);
        node.expect(
            0,
            &sctp(POD, ends(CLIENT[1], VIP[1])),
            DROP,
            DropReason::UnsupportedTransport,
        );
    });
}

#[test]
fn flows_spread_and_each_stays() {
    Node::check(|node| {
        node.service(1, VIP[0], PROTO_UDP, &[LOCAL[0], REMOTE[0]]);
        let mut seen = [0; 2];
        for port in 0..64 {
            let asked = ends(&format!("10.1.0.5:{}", 30_000 + port), VIP[0]);
            let first = read(&node.send(0, &udp(POD, asked, b"1")).1).ends;
            seen[usize::from(first.destination == end(REMOTE[0]))] += 1;
            for _ in 0..3 {
                assert_eq!(read(&node.send(0, &udp(POD, asked, b"2")).1).ends, first);
            }
        }
        assert!(seen.iter().all(|&hits| hits >= 16), "{seen:?}");
    });
}

/// A TCP flow from SYN to its two entries' end.
#[test]
fn both_entries_follow_a_tcp_flow() {
    Node::check(|node| {
        node.service(1, VIP[0], PROTO_TCP, &[LOCAL[0]]);
        let asked = ends(CLIENT[0], VIP[0]);
        let back = ends(CLIENT[0], LOCAL[0]).back();
        let steps = [
            (true, TCP_SYN, ct_state::OPENING),
            (false, TCP_SYN | TCP_ACK, ct_state::OPENING),
            (true, TCP_ACK, ct_state::ESTABLISHED),
            (true, TCP_FIN | TCP_ACK, ct_state::ESTABLISHED),
            (false, TCP_ACK, ct_state::ESTABLISHED),
            (false, TCP_FIN | TCP_ACK, ct_state::CLOSING),
            (true, TCP_ACK, ct_state::CLOSING),
            (true, TCP_SYN, ct_state::OPENING),
        ];
        for (step, (from_client, flags, state)) in steps.into_iter().enumerate() {
            let (pod, frame) = if from_client {
                (0, tcp(POD, asked, flags, b""))
            } else {
                (1, tcp(OTHER, back, flags, b""))
            };
            node.expect(pod, &frame, REDIRECT, DropReason::Translated);
            let forward = node.flow(asked, PROTO_TCP).unwrap();
            let reverse = node.flow(back, PROTO_TCP).unwrap();
            assert_eq!((forward.state, reverse.state), (state, state), "step {step}");
            assert_eq!(forward.flags | ct_flag::REVERSE, reverse.flags, "step {step}");
            assert_eq!((forward.backend_id, forward.service_id), (11, 1));
        }
    });
}

#[test]
fn either_entry_brings_back_the_other() {
    Node::check(|node| {
        node.service(1, VIP[0], PROTO_UDP, &[LOCAL[0]]);
        let asked = ends(CLIENT[0], VIP[0]);
        let back = ends(CLIENT[0], LOCAL[0]).back();
        let ct = &node.datapath.tables().ct;
        for (lost, kept, pod, frame) in [
            (back, asked, 0, udp(POD, asked, b"?")),
            (asked, back, 1, udp(OTHER, back, b"!")),
        ] {
            node.send(0, &udp(POD, asked, b"?"));
            ct.delete(&key(lost, PROTO_UDP)).unwrap();
            // Not this very second, so that the packet is news.
            let mut entry = node.flow(kept, PROTO_UDP).unwrap();
            entry.last_seen = entry.last_seen.wrapping_sub(2);
            ct.put(&key(kept, PROTO_UDP), &entry).unwrap();
            node.expect(pod, &frame, REDIRECT, DropReason::Translated);
            assert!(node.flow(lost, PROTO_UDP).is_some());
        }
    });
}

#[test]
fn open_flows_stay_on_a_terminating_backend_and_new_ones_do_not() {
    Node::check(|node| {
        for family in [0, 1] {
            let id = 1 + family as u32;
            node.service(id, VIP[family], PROTO_TCP, &[LOCAL[family]]);
            let asked = ends(CLIENT[family], VIP[family]);
            node.send(0, &tcp(POD, asked, TCP_SYN, b""));
            node.send(0, &tcp(POD, asked, TCP_ACK, b""));
            // Out of rotation: the one slot names another backend now.
            let mut leaving = backend(LOCAL[family], PROTO_TCP);
            leaving.state = backend_state::TERMINATING;
            let vip = end(VIP[family]);
            let frontend = ServiceKey::frontend(vip.0, vip.1, PROTO_TCP);
            node.apply(&[
                MapOp::BackendPut(id * 10 + 2, backend(REMOTE[family], PROTO_TCP)),
                MapOp::ServicePut(frontend.at_slot(1), ServiceValue::slot(id, id * 10 + 2)),
                MapOp::BackendPut(id * 10 + 1, leaving),
            ]);
            let out = read(&node.send(0, &tcp(POD, asked, TCP_ACK, b"data")).1);
            assert_eq!(out.ends.destination, end(LOCAL[family]));
            // The same ports again, for a new connection.
            let out = read(&node.send(0, &tcp(POD, asked, TCP_SYN, b"")).1);
            assert_eq!(out.ends.destination, end(REMOTE[family]));
            assert_eq!(
                node.flow(ends(CLIENT[family], LOCAL[family]).back(), PROTO_TCP),
                None
            );
        }
    });
}

#[test]
fn when_the_backend_is_gone_datagrams_find_another_and_connections_are_reset() {
    Node::check(|node| {
        for (id, proto) in [(1, PROTO_TCP), (3, PROTO_UDP)] {
            for family in [0, 1] {
                let id = id + family as u32;
                node.service(id, VIP[family], proto, &[LOCAL[family]]);
                let asked = ends(CLIENT[family], VIP[family]);
                node.send(0, &frame(proto, POD, asked));
                let vip = end(VIP[family]);
                let frontend = ServiceKey::frontend(vip.0, vip.1, proto);
                node.apply(&[
                    MapOp::BackendPut(id * 10 + 2, backend(REMOTE[family], proto)),
                    MapOp::ServicePut(frontend.at_slot(1), ServiceValue::slot(id, id * 10 + 2)),
                    MapOp::BackendDelete(id * 10 + 1),
                ]);
                if proto == PROTO_UDP {
                    let out = node.expect(0, &udp(POD, asked, b"?"), REDIRECT, DropReason::Translated);
                    assert_eq!(read(&out).ends.destination, end(REMOTE[family]));
                    continue;
                }
                let data = tcp(POD, asked, TCP_ACK, b"data");
                let out = read(&node.expect(0, &data, REDIRECT, DropReason::BackendGone));
                assert_eq!(
                    (out.ends, out.macs, out.proto),
                    (asked.back(), [POD, HOST], PROTO_TCP)
                );
                assert_eq!(out.transport[13], TCP_RST);
                assert_eq!(out.transport[4..8], 5_000_u32.to_be_bytes());
                // A reset is not answered; a new connection finds its way.
                let reset = tcp(POD, asked, TCP_RST, b"");
                assert!([DROP, REDIRECT].contains(&node.send(0, &reset).0));
                let out = node.send(0, &tcp(POD, asked, TCP_SYN, b"")).1;
                assert_eq!(read(&out).ends.destination, end(REMOTE[family]));
            }
        }
    });
}

#[test]
fn a_frontend_without_backends_answers_at_once() {
    Node::check(|node| {
        for family in [0, 1] {
            node.service(1 + family as u32, VIP[family], PROTO_TCP, &[]);
            node.service(3 + family as u32, VIP[family], PROTO_UDP, &[]);
            let asked = ends(CLIENT[family], VIP[family]);
            let syn = tcp(POD, asked, TCP_SYN, b"");
            let out = read(&node.expect(0, &syn, REDIRECT, DropReason::NoBackend));
            assert_eq!((out.ends, out.macs), (asked.back(), [POD, HOST]));
            assert_eq!((out.transport.len(), out.transport[13]), (20, TCP_RST | TCP_ACK));
            assert_eq!(out.transport[8..12], 1_001_u32.to_be_bytes());

            for payload in [&b""[..], &[7; 900]] {
                let datagram = udp(POD, asked, payload);
                let out = read(&node.expect(0, &datagram, REDIRECT, DropReason::NoBackend));
                let (proto, kind) = [(PROTO_ICMP, [3, 3]), (PROTO_ICMPV6, [1, 4])][family];
                assert_eq!((out.proto, &out.transport[..2]), (proto, &kind[..]));
                assert_eq!(out.ends.source.0, asked.destination.0);
                assert_eq!(out.ends.destination.0, asked.source.0);
                assert_eq!(out.macs, [POD, HOST]);
                assert_eq!(read_quote(&out), asked);
            }
        }
        node.set_features(feature::PACKET_LB | feature::NO_BACKEND_DROP);
        let syn = tcp(POD, ends(CLIENT[0], VIP[0]), TCP_SYN, b"");
        node.expect(0, &syn, DROP, DropReason::NoBackend);
    });
}

#[test]
fn a_pod_reaches_itself_through_a_frontend() {
    Node::check(|node| {
        for (family, loopback) in [(0, LOOPBACK_IPV4), (1, LOOPBACK_IPV6)] {
            let own = ["10.1.0.5:8080", "[fd01::5]:8080"][family];
            node.service(1 + family as u32, VIP[family], PROTO_TCP, &[own]);
            let asked = ends(CLIENT[family], VIP[family]);
            let syn = tcp(POD, asked, TCP_SYN, b"");
            let out = read(&node.expect(0, &syn, REDIRECT, DropReason::Translated));
            assert_eq!(out.ends.source, (loopback, 40_000));
            assert_eq!((out.ends.destination, out.macs), (end(own), [POD, HOST]));
            let answer = tcp(POD, out.ends.back(), TCP_SYN | TCP_ACK, b"");
            let out = read(&node.expect(0, &answer, REDIRECT, DropReason::Translated));
            assert_eq!((out.ends, out.macs), (asked.back(), [POD, HOST]));
            // Nobody else talks to that address.
            let mut stray = out.ends;
            stray.source = end(CLIENT[family]);
            stray.destination = (loopback, 1);
            let stray = tcp(POD, stray, TCP_ACK, b"");
            node.expect(0, &stray, DROP, DropReason::LoopbackUnknown);
        }
    });
}

#[test]
fn errors_about_a_flow_name_what_their_reader_knows() {
    Node::check(|node| {
        for family in [0, 1] {
            node.service(1 + family as u32, VIP[family], PROTO_UDP, &[LOCAL[family]]);
            let asked = ends(CLIENT[family], VIP[family]);
            let reached = ends(CLIENT[family], LOCAL[family]);
            let sent = node.send(0, &udp(POD, asked, b"?")).1;
            // The backend refuses; a router on the way does.
            for (hook, pod, mac, from, seems_from) in [
                (PacketHook::FromContainer, 1, OTHER, LOCAL[family], VIP[family]),
                (
                    PacketHook::ToContainer,
                    0,
                    HOST,
                    ["192.0.2.9:0", "[2001:db8::9]:0"][family],
                    ["192.0.2.9:0", "[2001:db8::9]:0"][family],
                ),
            ] {
                let error = unreachable(mac, ip(from), ip(CLIENT[family]), &sent);
                let verdict = if hook == PacketHook::ToContainer {
                    PASS
                } else {
                    REDIRECT
                };
                let out = node.expect_at(hook, pod, &error, verdict, DropReason::Translated);
                let out = read(&out);
                assert_eq!(read_quote(&out), asked);
                assert_eq!(out.ends.source.0, address(ip(seems_from)));
                assert_eq!(out.ends.destination.0, address(ip(CLIENT[family])));
            }
            // The client refuses an answer: the backend must hear of what it sent.
            let answer = node.send(1, &udp(OTHER, reached.back(), b"!")).1;
            let error = unreachable(POD, ip(CLIENT[family]), ip(VIP[family]), &answer);
            let out = read(&node.expect(0, &error, REDIRECT, DropReason::Translated));
            assert_eq!(read_quote(&out), reached.back());
            assert_eq!(out.ends.destination.0, address(ip(LOCAL[family])));
            // About no flow of ours.
            let stranger = udp(HOST, ends(CLIENT[family], REMOTE[family]), b"?");
            let error = unreachable(OTHER, ip(LOCAL[family]), ip(CLIENT[family]), &stranger);
            let out = node.expect(1, &error, REDIRECT, DropReason::Forwarded);
            assert_eq!(out[12..], error[12..]);
        }
    });
}

#[test]
fn fragments_go_where_their_first_goes() {
    Node::check(|node| {
        for family in [0, 1] {
            node.service(1 + family as u32, VIP[family], PROTO_UDP, &[LOCAL[family]]);
            let asked = ends(CLIENT[family], VIP[family]);
            let reached = ends(CLIENT[family], LOCAL[family]);
            for (pod, mac, before, after) in
                [(0, POD, asked, reached), (1, OTHER, reached.back(), asked.back())]
            {
                let datagram = udp_datagram(before, &[9; 1000]);
                let parts = fragments(mac, before, 77, &datagram, 512)
                    .map(|part| node.expect(pod, &part, REDIRECT, DropReason::Translated));
                let [first, later]: [Seen; 2] = parts.map(|part| read(&part));
                assert_eq!(first.ends, after);
                assert_eq!(
                    (later.ends.source.0, later.ends.destination.0),
                    (after.source.0, after.destination.0)
                );
                assert_eq!(sum_of_parts(after, &[&first.transport, &later.transport]), 0xffff);
                // A later part of a datagram that nobody has seen begin is no service's.
                let [_, stray] = fragments(mac, before, 78, &datagram, 512);
                assert_eq!(
                    node.expect(
                        pod,
                        &stray,
                        if pod == 0 { PASS } else { REDIRECT },
                        DropReason::Forwarded
                    )[12..],
                    stray[12..]
                );
            }
        }
    });
}

#[test]
fn one_socket_through_two_frontends_gets_two_backends_or_a_refusal() {
    Node::check(|node| {
        let second = "10.96.0.11:80";
        for proto in [PROTO_TCP, PROTO_UDP] {
            let id = u32::from(proto) * 10;
            node.service(id + 1, VIP[0], proto, &[LOCAL[0]]);
            node.service(id + 2, second, proto, &[LOCAL[0], REMOTE[0]]);
            node.send(0, &frame(proto, POD, ends(CLIENT[0], VIP[0])));
            let out = node.send(0, &frame(proto, POD, ends(CLIENT[0], second))).1;
            assert_eq!(read(&out).ends.destination, end(REMOTE[0]));

            node.service(id + 3, "10.96.0.12:80", proto, &[LOCAL[0]]);
            let third = frame(proto, POD, ends(CLIENT[0], "10.96.0.12:80"));
            if proto == PROTO_TCP {
                let out = read(&node.expect(0, &third, REDIRECT, DropReason::TupleInUse));
                assert_eq!(out.transport[13], TCP_RST | TCP_ACK);
            } else {
                node.expect(0, &third, REDIRECT, DropReason::Translated);
                let answer = udp(OTHER, ends(LOCAL[0], CLIENT[0]), b"!");
                let out = read(&node.send(1, &answer).1);
                assert_eq!(out.ends.source, end("10.96.0.12:80"));
            }
        }
    });
}

#[test]
fn a_backend_of_the_other_family_is_no_backend_for_packets() {
    Node::check(|node| {
        node.service(1, VIP[0], PROTO_TCP, &[LOCAL[1]]);
        let syn = tcp(POD, ends(CLIENT[0], VIP[0]), TCP_SYN, b"");
        let out = read(&node.expect(0, &syn, REDIRECT, DropReason::FamilyMismatch));
        assert_eq!(out.transport[13], TCP_RST | TCP_ACK);
    });
}

#[test]
fn a_slot_without_backend_never_fails_a_flow() {
    Node::check(|node| {
        node.service(1, VIP[0], PROTO_UDP, &[LOCAL[0], LOCAL[0], LOCAL[0], REMOTE[0]]);
        let tables = node.datapath.tables();
        for id in [11, 12, 13] {
            tables.backends.delete(&BackendKey { id }).unwrap();
        }
        for port in 0..32 {
            let asked = ends(&format!("10.1.0.5:{}", 30_000 + port), VIP[0]);
            let out = node.expect(0, &udp(POD, asked, b"?"), REDIRECT, DropReason::Translated);
            assert_eq!(read(&out).ends.destination, end(REMOTE[0]));
        }
    });
}

/// Frames with random bytes in their headers: any verdict, but one of ours, and no packet of another length unless answered.
#[test]
fn no_frame_confuses_the_programs() {
    Node::check(|node| {
        for family in [0, 1] {
            node.service(1 + family as u32, VIP[family], PROTO_TCP, &[LOCAL[family]]);
            node.service(3 + family as u32, VIP[family], PROTO_UDP, &[]);
        }
        let mut seed = 0x1234_5678_9abc_def0_u64;
        let mut random = move || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed
        };
        in_namespace(&node.namespace, || {
            for round in 0..4_000 {
                let family = round % 2;
                let asked = ends(CLIENT[family], VIP[family]);
                let mut frame = match round % 3 {
                    0 => tcp(POD, asked, TCP_SYN, b"12345678"),
                    1 => udp(POD, asked, b"12345678"),
                    _ => unreachable(
                        POD,
                        ip(CLIENT[family]),
                        ip(VIP[family]),
                        &udp(POD, asked.back(), b"12345678"),
                    ),
                };
                let end = frame.len().min(80);
                for _ in 0..=random() % 3 {
                    let at = 14 + random() as usize % (end - 14);
                    frame[at] = random() as u8;
                }
                frame.truncate(54 + random() as usize % 60);
                for hook in [PacketHook::FromContainer, PacketHook::ToContainer] {
                    match node.datapath.simulate(hook, &frame, node.pods[0]) {
                        Ok((verdict, _)) => {
                            assert!([PASS, DROP, REDIRECT].contains(&verdict), "{frame:02x?}");
                        }
                        // The test run itself refuses what has no whole IP header.
                        Err(error) => assert_eq!(error.raw_os_error(), Some(22), "{frame:02x?}"),
                    }
                }
            }
        });
    });
}
