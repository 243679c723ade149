//! What decides about clients outside beside the backends: source ranges, external traffic policy, session affinity, and that
//! cluster IPs are not for them. Frames through BPF_PROG_TEST_RUN.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use isthmus_bpf_abi::{
    BackendKey, DropReason, PROTO_TCP, PROTO_UDP, SCOPE_INTERNAL, SOURCE_RANGE_STATIC_BITS, ServiceKey,
    ServiceValue, SourceRangeKey, TCP_ACK, TCP_RST, TCP_SYN, backend_state, service_flag,
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

use edge::{BALANCER, CLIENT, Edge, NODE_PORT, OUTSIDER};
use lab::address;
use pair::{DROP, LOCAL, POD, REDIRECT, REMOTE};
use services::backend;
use transport::{end, ends, read, tcp, udp};

fn syn(from: &str, to: &str) -> Vec<u8> {
    tcp(OUTSIDER, ends(from, to), TCP_SYN, b"")
}

fn range(service_id: u32, prefix: &str, bits: u32) -> SourceRangeKey {
    let mapped = if prefix.contains(':') { 0 } else { 96 };
    SourceRangeKey {
        prefix_len: SOURCE_RANGE_STATIC_BITS + mapped + bits,
        service_id,
        address: address(prefix),
    }
}

#[test]
fn only_sources_in_a_services_ranges_may_ask_it_from_outside() {
    Edge::check(|edge| {
        for (id, vip, family) in [(1, BALANCER[0], 0), (2, BALANCER[1], 1), (3, NODE_PORT[0], 0)] {
            let ranges = if id == 3 { 0 } else { service_flag::SOURCE_RANGES };
            edge.service(id, vip, PROTO_TCP, ranges, &[LOCAL[family]]);
        }
        edge.node.apply(&[
            MapOp::SourceRangePut(range(1, "198.51.100.0", 25)),
            MapOp::SourceRangePut(range(1, "203.0.113.9", 32)),
            MapOp::SourceRangePut(range(2, "2001:db8:9::", 48)),
            // Another service's ranges are its own.
            MapOp::SourceRangePut(range(7, "0.0.0.0", 0)),
            MapOp::SourceRangePut(range(7, "::", 0)),
        ]);
        let rows = [
            ("198.51.100.7:1000", BALANCER[0], true),
            ("198.51.100.127:1000", BALANCER[0], true),
            ("198.51.100.128:1000", BALANCER[0], false),
            ("203.0.113.9:1000", BALANCER[0], true),
            ("203.0.113.8:1000", BALANCER[0], false),
            ("[2001:db8:9:ffff::1]:1000", BALANCER[1], true),
            ("[2001:db8:a::1]:1000", BALANCER[1], false),
            ("198.51.100.128:1000", NODE_PORT[0], true),
        ];
        for (from, vip, allowed) in rows {
            let (verdict, reason) = match allowed {
                true => (REDIRECT, DropReason::Translated),
                false => (DROP, DropReason::SourceRange),
            };
            edge.comes(&syn(from, vip), verdict, reason);
            assert_eq!(
                edge.flow(ends(from, vip), PROTO_TCP).is_some(),
                allowed,
                "{from} to {vip}"
            );
        }
        // A range that goes ends what it had allowed.
        edge.node
            .apply(&[MapOp::SourceRangeDelete(range(1, "203.0.113.9", 32))]);
        let data = tcp(OUTSIDER, ends("203.0.113.9:1000", BALANCER[0]), TCP_ACK, b"data");
        edge.comes(&data, DROP, DropReason::SourceRange);
        // Pods are inside.
        let pod = tcp(POD, ends("10.1.0.5:1000", BALANCER[0]), TCP_SYN, b"");
        edge.node.expect(0, &pod, REDIRECT, DropReason::Translated);
    });
}

/// Pods and processes of this node never come from outside.
#[test]
fn nobody_outside_speaks_for_who_is_on_this_node() {
    Edge::check(|edge| {
        for family in [0, 1] {
            let id = 1 + 2 * family as u32;
            edge.service(id, NODE_PORT[family], PROTO_TCP, 0, &[LOCAL[family]]);
            edge.service(id + 1, BALANCER[family], PROTO_TCP, 0, &[REMOTE[family]]);
            let forged = [
                [
                    "10.1.0.5:1000",
                    "10.1.0.6:1000",
                    "10.1.0.1:1000",
                    "192.0.2.1:1000",
                ],
                [
                    "[fd01::5]:1000",
                    "[fd01::6]:1000",
                    "[fd01::1]:1000",
                    "[2001:db8::1]:1000",
                ],
            ];
            for from in forged[family] {
                for vip in [NODE_PORT[family], BALANCER[family]] {
                    edge.comes(&syn(from, vip), DROP, DropReason::InvalidSource);
                    assert_eq!(edge.flow(ends(from, vip), PROTO_TCP), None);
                }
            }
        }
    });
}

#[test]
fn cluster_ips_are_not_for_the_outside() {
    Edge::check(|edge| {
        for (id, vip) in [(1, "10.96.0.10:80"), (2, "[fd96::10]:80")] {
            let family = id as usize - 1;
            edge.node.service(id, vip, PROTO_TCP, &[LOCAL[family]]);
            let frontend = end(vip);
            let key = ServiceKey::frontend(frontend.0, frontend.1, PROTO_TCP);
            let value = ServiceValue::frontend(id, 1, service_flag::CLUSTER_IP);
            edge.node.apply(&[MapOp::ServicePut(key, value)]);
            edge.comes(&syn(CLIENT[family], vip), DROP, DropReason::ClusterIpOutside);
        }
    });
}

#[test]
fn what_is_kept_on_the_node_keeps_its_source_and_goes_nowhere_else() {
    Edge::check(|edge| {
        for family in [0, 1] {
            let id = 1 + 4 * family as u32;
            let vip = NODE_PORT[family];
            edge.service(id, vip, PROTO_TCP, service_flag::EXTERNAL_LOCAL, &[LOCAL[family]]);
            edge.service_inside(id + 1, vip, PROTO_TCP, &[REMOTE[family]]);
            for port in 0..16 {
                let from = CLIENT[family].replace("50000", &(50_000 + port).to_string());
                let out = edge.comes(&syn(&from, vip), REDIRECT, DropReason::Translated);
                assert_eq!(read(&out).ends, ends(&from, LOCAL[family]));
            }
            // Inside the cluster all backends are there.
            let pod = pair::CLIENT[family];
            let out = edge.node.send(0, &tcp(POD, ends(pod, vip), TCP_SYN, b"")).1;
            assert_eq!(read(&out).ends.destination, end(REMOTE[family]));
            // None here, some elsewhere: silence, so that the client tries another node. None at all: an answer.
            edge.service(id, vip, PROTO_TCP, service_flag::EXTERNAL_LOCAL, &[]);
            let asked = syn(&CLIENT[family].replace("50000", "49999"), vip);
            edge.comes(&asked, DROP, DropReason::NoBackend);
            edge.service_inside(id + 1, vip, PROTO_TCP, &[]);
            let out = read(&edge.comes(&asked, REDIRECT, DropReason::NoBackend));
            assert_eq!(out.transport[13], TCP_RST | TCP_ACK);
            let key = ServiceKey::frontend(end(vip).0, end(vip).1, PROTO_TCP);
            let inside = ServiceKey {
                scope: SCOPE_INTERNAL,
                ..key
            };
            edge.node.apply(&[MapOp::ServiceDelete(inside)]);
            edge.comes(&asked, REDIRECT, DropReason::NoBackend);
        }
    });
}

#[test]
fn a_client_outside_stays_on_its_backend() {
    Edge::check(|edge| {
        for family in [0, 1] {
            let id = 1 + family as u32;
            let vip = NODE_PORT[family];
            let backends = [LOCAL[family], REMOTE[family]];
            edge.service(id, vip, PROTO_UDP, 0, &backends);
            let key = ServiceKey::frontend(end(vip).0, end(vip).1, PROTO_UDP);
            let value = ServiceValue::frontend(id, 2, service_flag::EXTERNAL).with_affinity(3_600);
            edge.node.apply(&[MapOp::ServicePut(key, value)]);
            let target = |host: u16, port: u16| {
                let from = match family {
                    0 => format!("198.51.100.{host}:{port}"),
                    _ => format!("[2001:db8:9::{host}]:{port}"),
                };
                let frame = udp(OUTSIDER, ends(&from, vip), b"?");
                read(&edge.comes(&frame, REDIRECT, DropReason::Translated))
                    .ends
                    .destination
            };
            let mut seen = [0; 2];
            for host in 1..=32 {
                let first = target(host, 1_000);
                seen[usize::from(first == end(REMOTE[family]))] += 1;
                for port in 1_001..1_006 {
                    assert_eq!(target(host, port), first, "client {host}");
                }
            }
            assert!(seen.iter().all(|&clients| clients >= 6), "{seen:?}");
            // It moves when its backend leaves rotation, and stays there.
            let mut leaving = backend(LOCAL[family], PROTO_UDP);
            leaving.state = backend_state::TERMINATING;
            let tables = edge.node.datapath.tables();
            tables
                .backends
                .put(&BackendKey { id: id * 10 + 1 }, &leaving)
                .unwrap();
            edge.node.apply(&[MapOp::ServicePut(
                key.at_slot(1),
                ServiceValue::slot(id, id * 10 + 2),
            )]);
            for host in 1..=32 {
                assert_eq!(target(host, 2_000), end(REMOTE[family]));
            }
        }
    });
}
