//! Pods' packets to the outside, and the answers, a frame at a time through BPF_PROG_TEST_RUN.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use isthmus_bpf_abi::{
    Device, DropReason, IDENTITY_KUBE_APISERVER, IDENTITY_REMOTE_NODE, IDENTITY_WORLD, IpcacheKey,
    IpcacheValue, PROTO_ICMP, PROTO_ICMPV6, PROTO_SCTP, PROTO_TCP, PROTO_UDP, PrefixKey, TCP_ACK, TCP_RST,
    TCP_SYN, ct_flag, ct_state, feature,
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

use edge::{ALL_FEATURES, Edge, NODE, NODE_PORT, OUTSIDER, PORTS};
use lab::address;
use pair::{CLIENT, DROP, HOST, LOCAL, PASS, REDIRECT, ip};
use transport::{echo, end, ends, fragments, read, read_quote, sctp, tcp, udp, udp_datagram, unreachable};

const WEB: [&str; 2] = ["198.51.100.9:443", "[2001:db8:9::9]:443"];
const ICMP: [u8; 2] = [PROTO_ICMP, PROTO_ICMPV6];

#[test]
fn a_pods_packets_leave_with_the_nodes_address_and_their_answers_come_back() {
    Edge::check(|edge| {
        for family in [0, 1] {
            let own = ends(CLIENT[family], WEB[family]);
            for (proto, frame, answer) in [
                (
                    PROTO_TCP,
                    (|ends| tcp(HOST, ends, TCP_SYN, b"")) as fn(_) -> Vec<u8>,
                    (|ends| tcp(OUTSIDER, ends, TCP_SYN | TCP_ACK, b"")) as fn(_) -> Vec<u8>,
                ),
                (
                    PROTO_UDP,
                    |ends| udp(HOST, ends, b"odd"),
                    |ends| udp(OUTSIDER, ends, b"even"),
                ),
            ] {
                let out = read(&edge.leaves(&frame(own), PASS, DropReason::Translated));
                assert_eq!(
                    (out.ends.destination, out.ends.source.0),
                    (end(WEB[family]), address(NODE[family]))
                );
                assert!(PORTS.contains(&out.ends.source.1));
                let flow = edge.flow(own, proto).unwrap();
                assert_eq!(
                    (flow.flags, flow.service_id, flow.ifindex),
                    (ct_flag::SNAT, 0, edge.ifindex)
                );
                // The stack brings it to the pod, as it has brought the pod's packet here.
                let back = read(&edge.comes(&answer(out.ends.back()), PASS, DropReason::Translated));
                assert_eq!(back.ends, own.back());
                // The same flow keeps its port.
                assert_eq!(
                    read(&edge.leaves(&frame(own), PASS, DropReason::Translated)).ends,
                    out.ends
                );
            }
        }
        // Another device, another address.
        let device = Device {
            ipv4: address("192.0.2.77"),
            ipv6: [0; 16],
        };
        edge.node
            .datapath
            .tables()
            .set_devices(&[(edge.ifindex, device)].into())
            .unwrap();
        let out = edge.leaves(
            &tcp(HOST, ends("10.1.0.5:1", WEB[0]), TCP_SYN, b""),
            PASS,
            DropReason::Translated,
        );
        assert_eq!(read(&out).ends.source.0, address("192.0.2.77"));
        let six = tcp(HOST, ends("[fd01::5]:1", WEB[1]), TCP_SYN, b"");
        edge.leaves(&six, DROP, DropReason::NotConfigured);
    });
}

#[test]
fn echoes_are_told_apart_by_their_number() {
    Edge::check(|edge| {
        for family in [0, 1] {
            let (pod, web) = (ip(CLIENT[family]), ip(WEB[family]));
            let mut numbers = Vec::new();
            for number in [7, 8] {
                let out =
                    read(&edge.leaves(&echo(HOST, pod, web, true, number), PASS, DropReason::Translated));
                assert_eq!(
                    (out.ends.source.0, out.ends.destination.0),
                    (address(NODE[family]), address(web))
                );
                let there = u16::from_be_bytes([out.transport[4], out.transport[5]]);
                let answer = echo(OUTSIDER, web, NODE[family], false, there);
                let back = read(&edge.comes(&answer, PASS, DropReason::Translated));
                assert_eq!(
                    (back.ends.source.0, back.ends.destination.0),
                    (address(web), address(pod))
                );
                assert_eq!(back.transport[4..6], number.to_be_bytes());
                // A router on the way says that it goes no further.
                let quoted = echo(OUTSIDER, NODE[family], web, true, there);
                let router = ["198.51.100.1", "2001:db8:9::1"][family];
                let error = unreachable(OUTSIDER, router, NODE[family], &quoted);
                let back = read(&edge.comes(&error, PASS, DropReason::Translated));
                assert_eq!(
                    (back.ends.source.0, back.ends.destination.0),
                    (address(router), address(pod))
                );
                let quoted = &back.transport[8 + [20, 40][family]..];
                assert_eq!(quoted[4..6], number.to_be_bytes());
                numbers.push(there);
            }
            assert_ne!(numbers[0], numbers[1]);
            // Whoever asks the node, or is answered by a pod, is not meddled with.
            for other in [
                echo(OUTSIDER, web, NODE[family], true, 9),
                echo(OUTSIDER, web, NODE[family], false, 9),
            ] {
                assert_eq!(edge.comes(&other, PASS, DropReason::Forwarded), other);
            }
            let answer = echo(HOST, pod, web, false, 9);
            assert_eq!(edge.leaves(&answer, PASS, DropReason::Forwarded), answer);
        }
    });
}

#[test]
fn errors_about_masqueraded_flows_reach_who_sent_them() {
    Edge::check(|edge| {
        for family in [0, 1] {
            let router = ["198.51.100.1", "2001:db8:9::1"][family];
            let own = ends(CLIENT[family], WEB[family]);
            for frame in [
                (|ends| tcp(HOST, ends, TCP_SYN, b"")) as fn(_) -> Vec<u8>,
                |ends| udp(HOST, ends, b"odd"),
            ] {
                let seen = read(&edge.leaves(&frame(own), PASS, DropReason::Translated)).ends;
                let error = unreachable(OUTSIDER, router, NODE[family], &frame(seen));
                let back = read(&edge.comes(&error, PASS, DropReason::Translated));
                assert_eq!((back.ends.destination.0, read_quote(&back)), (own.source.0, own));
                let error = unreachable(HOST, ip(CLIENT[family]), ip(WEB[family]), &frame(own.back()));
                let out = read(&edge.leaves(&error, PASS, DropReason::Translated));
                assert_eq!(
                    (out.proto, out.ends.source.0),
                    (ICMP[family], address(NODE[family]))
                );
                assert_eq!(read_quote(&out), seen.back());
            }
        }
    });
}

#[test]
fn what_stays_in_the_mesh_or_is_excluded_keeps_its_source() {
    Edge::check(|edge| {
        let tables = edge.node.datapath.tables();
        edge.node.apply(&[
            MapOp::IpcachePut(
                IpcacheKey::ipv4([192, 0, 2, 9], 32),
                IpcacheValue::direct(IDENTITY_REMOTE_NODE, 0),
            ),
            MapOp::IpcachePut(
                IpcacheKey::ipv4([192, 0, 2, 10], 32),
                IpcacheValue::direct(IDENTITY_KUBE_APISERVER, 0),
            ),
            MapOp::IpcachePut(
                IpcacheKey::ipv4([192, 0, 2, 11], 32),
                IpcacheValue::tunnel(IDENTITY_REMOTE_NODE, address("192.0.2.9"), 0, 0),
            ),
            MapOp::IpcachePut(
                IpcacheKey::ipv4([10, 3, 9, 9], 32),
                IpcacheValue::direct(IDENTITY_REMOTE_NODE, 0),
            ),
            MapOp::IpcachePut(
                IpcacheKey::ipv6(address("2001:db8::9"), 128),
                IpcacheValue::direct(IDENTITY_REMOTE_NODE, 0),
            ),
            MapOp::IpcachePut(
                IpcacheKey::ipv4([10, 2, 9, 0], 24),
                IpcacheValue::direct(131_073, 0),
            ),
            MapOp::IpcachePut(
                IpcacheKey::ipv4([198, 18, 0, 0], 15),
                IpcacheValue::direct(IDENTITY_WORLD, 0),
            ),
        ]);
        let prefix = |text: &str, bits: u32| PrefixKey {
            prefix_len: bits,
            address: address(text),
        };
        let excluded = [prefix("10.0.0.0", 96 + 8), prefix("2001:db8:77::", 48)].into();
        tables.set_no_masquerade(&excluded).unwrap();
        for (to, hidden) in [
            // Nodes, one of them behind a tunnel, and one that is excluded.
            ("192.0.2.9:80", true),
            ("192.0.2.10:80", true),
            ("192.0.2.11:80", false),
            ("10.3.9.9:80", false),
            ("[2001:db8::9]:80", true),
            ("10.2.9.3:80", false),
            ("10.200.0.1:80", false),
            ("198.18.0.1:80", true),
            ("11.0.0.1:80", true),
            ("[2001:db8:77:1::1]:80", false),
            ("[2001:db8:78::1]:80", true),
        ] {
            let from = CLIENT[usize::from(to.starts_with('['))];
            let frame = tcp(HOST, ends(from, to), TCP_SYN, b"");
            let reason = if hidden {
                DropReason::Translated
            } else {
                DropReason::Forwarded
            };
            let out = edge.leaves(&frame, PASS, reason);
            assert_eq!(out != frame, hidden, "{to}");
        }
        // The node's own packets, and others' that it forwards.
        for from in ["192.0.2.1:40000", "203.0.113.3:40000"] {
            let frame = tcp(HOST, ends(from, WEB[0]), TCP_SYN, b"");
            assert_eq!(edge.leaves(&frame, PASS, DropReason::Forwarded), frame);
        }
        // Switched off, for one family alone.
        edge.set(ALL_FEATURES & !feature::MASQUERADE_IPV4, PORTS);
        let four = tcp(HOST, ends("10.1.0.5:77", WEB[0]), TCP_SYN, b"");
        assert_eq!(edge.leaves(&four, PASS, DropReason::Forwarded), four);
        let six = tcp(HOST, ends("[fd01::5]:77", WEB[1]), TCP_SYN, b"");
        edge.leaves(&six, PASS, DropReason::Translated);
        // What is no longer excluded.
        tables.set_no_masquerade(&[].into()).unwrap();
        let six = tcp(HOST, ends("[fd01::5]:78", "[2001:db8:77:1::1]:80"), TCP_SYN, b"");
        edge.leaves(&six, PASS, DropReason::Translated);
    });
}

#[test]
fn answers_of_pods_to_who_reached_them_directly_keep_their_source() {
    Edge::check(|edge| {
        for family in [0, 1] {
            let asked = ends(WEB[family], LOCAL[family]);
            let question = udp(OUTSIDER, asked, b"?");
            assert_eq!(edge.comes(&question, PASS, DropReason::Forwarded), question);
            let answer = udp(HOST, asked.back(), b"!");
            assert_eq!(edge.leaves(&answer, PASS, DropReason::Forwarded), answer);
            assert_eq!(
                edge.node.expect(
                    1,
                    &udp(pair::OTHER, asked.back(), b"!"),
                    PASS,
                    DropReason::Forwarded
                )[14..],
                answer[14..]
            );
            assert_eq!(edge.comes(&question, PASS, DropReason::Forwarded), question);
            let question = sctp(OUTSIDER, asked);
            assert_eq!(edge.comes(&question, PASS, DropReason::Forwarded), question);
            let answer = sctp(HOST, asked.back());
            assert_eq!(edge.leaves(&answer, PASS, DropReason::Forwarded), answer);
            let question = tcp(OUTSIDER, asked, TCP_SYN, b"");
            assert_eq!(edge.comes(&question, PASS, DropReason::Forwarded), question);
            // The other's first packet came another way than through our devices, or our entries are gone: then its next counts.
            let other = ends(&WEB[family].replace("443", "444"), LOCAL[family]);
            let third = ends(&WEB[family].replace("443", "445"), LOCAL[family]);
            let data = tcp(OUTSIDER, third, TCP_ACK, b"data");
            assert_eq!(edge.comes(&data, PASS, DropReason::Forwarded), data);
            for (asked, flags) in [
                (asked, TCP_SYN | TCP_ACK),
                (asked, TCP_ACK),
                (asked, TCP_RST | TCP_ACK),
                (other, TCP_SYN | TCP_ACK),
                (other, TCP_ACK),
                (third, TCP_ACK),
            ] {
                let answer = tcp(HOST, asked.back(), flags, b"");
                assert_eq!(edge.leaves(&answer, PASS, DropReason::Forwarded), answer);
            }
            for asked in [asked, other, third] {
                let flow = edge.flow(asked.back(), PROTO_TCP).unwrap();
                assert_eq!((flow.flags, flow.service_id), (ct_flag::REVERSE, 0));
            }
            // What the pod begins itself is no answer.
            let own = tcp(HOST, third.back(), TCP_SYN, b"");
            edge.leaves(&own, PASS, DropReason::Translated);
        }
    });
}

/// Of a connection that a pod has begun no packet leaves with the pod's address, whatever the table has forgotten.
#[test]
fn a_masqueraded_connection_outlives_its_entries() {
    Edge::check(|edge| {
        for family in [0, 1] {
            edge.set(ALL_FEATURES, 3_000..=3_001);
            let server = WEB[family];
            let first_try = |own| transport::first_port(own, PROTO_TCP, &(3_000..=3_001));
            let pod = |port: u16| {
                let from = CLIENT[family].replace("40000", &port.to_string());
                ends(&from, server)
            };
            let before = pod(20_000);
            // Both want the same port.
            let own = (20_001..)
                .map(pod)
                .find(|own| first_try(*own) == first_try(before));
            let own = own.unwrap();
            let leaves = |own, flags| {
                let frame = tcp(HOST, own, flags, b"");
                read(&edge.leaves(&frame, PASS, DropReason::Translated)).ends
            };
            let taken = leaves(before, TCP_SYN);
            let out = leaves(own, TCP_SYN);
            assert_eq!(taken.source.1, first_try(own));
            assert_ne!(out.source.1, taken.source.1);
            let answer = tcp(OUTSIDER, out.back(), TCP_SYN | TCP_ACK, b"");
            edge.comes(&answer, PASS, DropReason::Translated);
            assert_eq!(leaves(own, TCP_ACK), out);
            // The port that it would rather have is free now, but not its own.
            for gone in [before, taken.back(), own] {
                edge.forget(gone, PROTO_TCP);
            }
            assert_eq!(leaves(own, TCP_ACK), out);
            let flow = edge.flow(own, PROTO_TCP).unwrap();
            assert_eq!((flow.flags, flow.state), (ct_flag::SNAT, ct_state::ESTABLISHED));
            // An answer makes the first entry too.
            edge.forget(own, PROTO_TCP);
            edge.edit(out.back(), PROTO_TCP, |entry| entry.last_seen -= 2);
            let answer = tcp(OUTSIDER, out.back(), TCP_ACK, b"data");
            let back = read(&edge.comes(&answer, PASS, DropReason::Translated)).ends;
            assert_eq!(back, own.back());
            assert_eq!(
                edge.flow(own, PROTO_TCP).unwrap().peer_port,
                out.source.1.to_be_bytes()
            );
            // Nothing is left: it begins anew.
            for gone in [own, out.back()] {
                edge.forget(gone, PROTO_TCP);
            }
            let anew = leaves(own, TCP_ACK);
            assert_eq!(
                (anew.source.0, anew.source.1),
                (address(NODE[family]), first_try(own))
            );
            let answer = tcp(OUTSIDER, anew.back(), TCP_ACK, b"data");
            let back = read(&edge.comes(&answer, PASS, DropReason::Translated)).ends;
            assert_eq!(back, own.back());
            // Who sends to the pod itself with the server's address and port changes nothing.
            let meddling = tcp(OUTSIDER, own.back(), TCP_SYN, b"");
            assert_eq!(edge.comes(&meddling, PASS, DropReason::Forwarded), meddling);
            assert_eq!(leaves(own, TCP_ACK), anew);
        }
    });
}

#[test]
fn nothing_leaves_with_a_pods_address_that_has_no_way_back() {
    Edge::check(|edge| {
        for family in [0, 1] {
            let own = ends(CLIENT[family], WEB[family]);
            let [first, later] = fragments(HOST, own, 9, &udp_datagram(own, &[5; 600]), 304);
            edge.leaves(&later, DROP, DropReason::FragmentUnknown);
            let first = read(&edge.leaves(&first, PASS, DropReason::Translated));
            let later = read(&edge.leaves(&later, PASS, DropReason::Translated));
            assert_eq!(later.ends.source.0, address(NODE[family]));
            assert_eq!(
                transport::sum_of_parts(first.ends, &[&first.transport, &later.transport]),
                0xffff
            );
        }
        // GRE has nothing by which its answers could be told apart.
        let mut gre = udp(HOST, ends(CLIENT[0], WEB[0]), b"12345678");
        gre[23] = 47;
        edge.leaves(&gre, DROP, DropReason::UnsupportedTransport);
        // SCTP with its own port, as long as nobody else has it.
        let out = edge.leaves(
            &sctp(HOST, ends("10.1.0.5:5000", WEB[0])),
            PASS,
            DropReason::Translated,
        );
        assert_eq!(read(&out).ends, ends("192.0.2.1:5000", WEB[0]));
        edge.leaves(
            &sctp(HOST, ends("10.1.0.6:5000", WEB[0])),
            DROP,
            DropReason::NoSnatPort,
        );
        assert!(edge.flow(ends("10.1.0.5:5000", WEB[0]), PROTO_SCTP).is_some());
    });
}

#[test]
fn ports_run_out_with_a_reason_and_other_servers_are_free() {
    Edge::check(|edge| {
        edge.set(ALL_FEATURES, 3_000..=3_003);
        let mut left = 0;
        for port in 0..40 {
            let own = ends(&format!("10.1.0.5:{}", 20_000 + port), WEB[0]);
            let (verdict, out) = edge.run(PacketHook::ToHostDevice, &udp(HOST, own, b"?")).unwrap();
            if verdict == PASS {
                assert_eq!(read(&out).ends.source.0, address(NODE[0]));
                left += 1;
            }
        }
        assert_eq!(left, 4);
        let one_more = udp(HOST, ends("10.1.0.5:30000", WEB[0]), b"?");
        edge.leaves(&one_more, DROP, DropReason::NoSnatPort);
        let elsewhere = udp(HOST, ends("10.1.0.5:30000", "198.51.100.10:443"), b"?");
        edge.leaves(&elsewhere, PASS, DropReason::Translated);
    });
}

/// Frames with random bytes in their headers, at both hooks: any verdict, but one of ours.
#[test]
fn no_frame_confuses_the_programs() {
    Edge::check(|edge| {
        edge.service(1, NODE_PORT[0], PROTO_TCP, 0, &[LOCAL[0]]);
        edge.service(2, NODE_PORT[1], PROTO_UDP, 0, &[pair::REMOTE[1]]);
        let mut seed = 0x1234_5678_9abc_def0_u64;
        let mut random = move || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed
        };
        for round in 0..1_500 {
            let family = round % 2;
            let (from, to) = match round % 5 {
                0 | 1 => (edge::CLIENT[family], NODE_PORT[family]),
                2 => (WEB[family], NODE_PORT[family]),
                _ => (CLIENT[family], WEB[family]),
            };
            let flow = ends(from, to);
            let mut frame = match round % 4 {
                0 => tcp(OUTSIDER, flow, TCP_SYN, b"12345678"),
                1 => udp(OUTSIDER, flow, b"12345678"),
                2 => echo(OUTSIDER, ip(from), ip(to), true, 5),
                _ => unreachable(
                    OUTSIDER,
                    ip(from),
                    ip(to),
                    &udp(OUTSIDER, flow.back(), b"12345678"),
                ),
            };
            let end = frame.len().min(80);
            for _ in 0..=random() % 3 {
                let at = 12 + random() as usize % (end - 12);
                frame[at] = random() as u8;
            }
            frame.truncate(54 + random() as usize % 60);
            for hook in PacketHook::OF_OUTSIDE {
                match edge.run(hook, &frame) {
                    Ok((verdict, _)) => assert!([PASS, DROP, REDIRECT].contains(&verdict), "{frame:02x?}"),
                    // The test run itself refuses what has no whole IP header.
                    Err(error) => assert_eq!(error.raw_os_error(), Some(22), "{frame:02x?}"),
                }
            }
        }
    });
}
