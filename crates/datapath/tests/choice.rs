//! What binds the choice of a backend: Maglev tables and session affinity, for packets and for sockets.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::collections::BTreeSet;

use isthmus_bpf_abi::{
    AffinityValue, MAGLEV_CHUNK, MaglevChunk, MaglevKey, NodeConfig, PROTO_TCP, PROTO_UDP, SCOPE_INTERNAL,
    ServiceKey, ServiceValue, backend_state, feature, maglev_position, service_flag, tuple_hash,
};
use isthmus_datapath::MapOp;

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

use lab::{Lab, in_namespace, open_in, run};
use pair::{CLIENT, LOCAL, Node, OTHER, POD, REMOTE, VIP, ip, key};
use services::{backend, connect, receive, serve, service_ops, udp as udp_socket};
use transport::{Ends, end, ends, read, tcp, udp};

/// Entries of the tables here: three chunks, the last one not full.
const SIZE: u32 = 251;

/// Where a UDP packet goes.
fn destination(node: &Node, pod: usize, asked: Ends) -> ([u8; 16], u16) {
    let mac = [POD, OTHER][pod];
    read(&node.send(pod, &udp(mac, asked, b"?")).1).ends.destination
}

/// Puts slot 0 of the service with number `id` and two slots anew, as `value` makes it.
fn frontend(node: &Node, id: u32, vip: &str, proto: u8, value: impl FnOnce(ServiceValue) -> ServiceValue) {
    let (address, port) = end(vip);
    node.apply(&[MapOp::ServicePut(
        ServiceKey::frontend(address, port, proto),
        value(ServiceValue::frontend(id, 2, 0)),
    )]);
}

fn use_tables(node: &Node, size: u32) {
    let config = NodeConfig {
        vxlan_ifindex: 1,
        features: feature::PACKET_LB,
        maglev_table_size: size,
        ..NodeConfig::default()
    };
    node.datapath.tables().set_node_config(&config).unwrap();
}

/// Fills a service's table; `entry` says which backend.
fn fill_table(node: &Node, service_id: u32, entry: impl Fn(u32) -> u32) {
    for chunk in 0..SIZE.div_ceil(MAGLEV_CHUNK) {
        let mut backend_ids = [0; MAGLEV_CHUNK as usize];
        for (element, id) in (0..).zip(&mut backend_ids) {
            let at = chunk * MAGLEV_CHUNK + element;
            *id = if at < SIZE { entry(at) } else { 0 };
        }
        let key = MaglevKey { service_id, chunk };
        let tables = node.datapath.tables();
        tables.maglev.put(&key, &MaglevChunk { backend_ids }).unwrap();
    }
}

#[test]
fn each_flow_goes_where_its_entry_of_the_table_says() {
    Node::check(|node| {
        use_tables(node, SIZE);
        for family in [0, 1] {
            let id = 1 + family as u32;
            node.service(id, VIP[family], PROTO_UDP, &[LOCAL[family], REMOTE[family]]);
            frontend(node, id, VIP[family], PROTO_UDP, |value| ServiceValue {
                flags: service_flag::MAGLEV,
                ..value
            });
            // Halves, so that neither chance nor slots give the same.
            let entry = |at| id * 10 + if at < SIZE / 2 { 1 } else { 2 };
            fill_table(node, id, entry);
            let mut seen = BTreeSet::new();
            for port in 30_000..30_064_u32 {
                let asked = ends(&CLIENT[family].replace("40000", &port.to_string()), VIP[family]);
                let (chunk, element) = maglev_position(tuple_hash(&key(asked, PROTO_UDP)), SIZE);
                let id_in_table = entry(chunk * MAGLEV_CHUNK + element);
                let expected = [LOCAL, REMOTE][usize::from(id_in_table % 10 == 2)][family];
                assert_eq!(destination(node, 0, asked), end(expected), "port {port}");
                seen.insert(id_in_table);
            }
            assert_eq!(seen.len(), 2);
        }
    });
}

#[test]
fn what_keeps_outside_traffic_on_this_node_does_not_keep_pods_there() {
    Node::check(|node| {
        for family in [0, 1] {
            let id = 1 + family as u32;
            node.service(id, VIP[family], PROTO_UDP, &[LOCAL[family], REMOTE[family]]);
            let asked = ends(CLIENT[family], VIP[family]);
            frontend(node, id, VIP[family], PROTO_UDP, |value| ServiceValue {
                count: 1,
                flags: service_flag::EXTERNAL | service_flag::EXTERNAL_LOCAL,
                ..value
            });
            // Without another scope the frontend is what there is.
            assert_eq!(destination(node, 0, asked), end(LOCAL[family]));
            let (address, port) = end(VIP[family]);
            let inside = ServiceKey {
                scope: SCOPE_INTERNAL,
                ..ServiceKey::frontend(address, port, PROTO_UDP)
            };
            node.apply(&[
                MapOp::ServicePut(inside.at_slot(1), ServiceValue::slot(10 + id, id * 10 + 2)),
                MapOp::ServicePut(inside, ServiceValue::frontend(10 + id, 1, service_flag::EXTERNAL)),
            ]);
            let other = ends(&CLIENT[family].replace("40000", "40001"), VIP[family]);
            assert_eq!(destination(node, 0, other), end(REMOTE[family]));
        }
    });
}

#[test]
fn a_table_that_leads_nowhere_leaves_the_choice_to_the_slots() {
    Node::check(|node| {
        let id = 1;
        node.service(id, VIP[0], PROTO_UDP, &[LOCAL[0], REMOTE[0]]);
        frontend(node, id, VIP[0], PROTO_UDP, |value| ServiceValue {
            flags: service_flag::MAGLEV,
            ..value
        });
        let mut port = 30_000;
        let mut spread = |what: &str| {
            let seen: BTreeSet<_> = (0..24)
                .map(|_| {
                    port += 1;
                    destination(node, 0, ends(&format!("10.1.0.5:{port}"), VIP[0]))
                })
                .collect();
            assert_eq!(seen, BTreeSet::from([end(LOCAL[0]), end(REMOTE[0])]), "{what}");
        };
        use_tables(node, SIZE);
        spread("no chunk is there");
        fill_table(node, id, |_| 0);
        spread("entries are empty");
        fill_table(node, id, |_| 99);
        spread("the backend is gone");
        fill_table(node, id, |_| 12);
        use_tables(node, 0);
        spread("tables are not in use");
    });
}

#[test]
fn a_client_stays_on_its_backend_for_its_time() {
    Node::check(|node| {
        for family in [0, 1] {
            let id = 1 + family as u32;
            node.service(id, VIP[family], PROTO_UDP, &[LOCAL[family], REMOTE[family]]);
            frontend(node, id, VIP[family], PROTO_UDP, |value| value.with_affinity(100));
            let client = |port: u16| ends(&CLIENT[family].replace("40000", &port.to_string()), VIP[family]);
            let first = destination(node, 0, client(30_000));
            for port in 30_001..30_032 {
                assert_eq!(destination(node, 0, client(port)), first);
            }
            let affinity = &node.datapath.tables().affinity;
            let of_client = || {
                let mut entries = affinity.dump().unwrap();
                entries.retain(|(key, _)| key.service_id == id);
                assert_eq!(entries.len(), 1);
                entries[0]
            };
            // 100 seconds are not over, then they are: with another backend in the entry, one sees which counts.
            let (key, mut value) = of_client();
            let other = if first == end(LOCAL[family]) { 2 } else { 1 } + id * 10;
            value.last_used = value.last_used.wrapping_sub(90);
            value.backend_id = other;
            affinity.put(&key, &value).unwrap();
            let moved = destination(node, 0, client(31_000));
            assert_ne!(moved, first);
            let now = of_client().1;
            assert!(now.last_used.wrapping_sub(value.last_used) >= 89, "kept alive");
            let mut seen = BTreeSet::new();
            for port in 31_001..31_032 {
                affinity
                    .put(
                        &key,
                        &AffinityValue {
                            last_used: now.last_used.wrapping_sub(200),
                            ..now
                        },
                    )
                    .unwrap();
                seen.insert(destination(node, 0, client(port)));
            }
            assert_eq!(seen.len(), 2, "who comes late is anybody's");
        }
    });
}

#[test]
fn nobody_stays_on_a_backend_that_takes_no_new_flows() {
    Node::check(|node| {
        node.service(1, VIP[0], PROTO_TCP, &[LOCAL[0], REMOTE[0]]);
        frontend(node, 1, VIP[0], PROTO_TCP, |value| value.with_affinity(100));
        let open = |port: u16| {
            let asked = ends(&format!("10.1.0.5:{port}"), VIP[0]);
            read(&node.send(0, &tcp(POD, asked, 2, b"")).1).ends.destination
        };
        let first = open(30_000);
        let (id, target, other) = if first == end(LOCAL[0]) {
            (11, LOCAL[0], REMOTE[0])
        } else {
            (12, REMOTE[0], LOCAL[0])
        };
        let mut leaving = backend(target, PROTO_TCP);
        leaving.state = backend_state::TERMINATING;
        let (address, port) = end(VIP[0]);
        let slots = ServiceKey::frontend(address, port, PROTO_TCP);
        let rest = if id == 11 { 12 } else { 11 };
        node.apply(&[
            MapOp::BackendPut(id, leaving),
            MapOp::ServicePut(slots.at_slot(1), ServiceValue::slot(1, rest)),
            MapOp::ServicePut(slots, ServiceValue::frontend(1, 1, 0).with_affinity(100)),
        ]);
        assert_eq!(open(30_001), end(other));
        assert_eq!(open(30_002), end(other));
        assert_eq!(node.datapath.tables().affinity.dump().unwrap().len(), 1);
    });
}

#[test]
fn clients_are_told_apart() {
    Node::check(|node| {
        node.service(1, VIP[0], PROTO_UDP, &[REMOTE[0], "10.2.0.8:8080"]);
        frontend(node, 1, VIP[0], PROTO_UDP, |value| value.with_affinity(100));
        destination(node, 0, ends(CLIENT[0], VIP[0]));
        destination(node, 1, ends("10.1.0.6:40000", VIP[0]));
        let entries = node.datapath.tables().affinity.dump().unwrap();
        let clients: BTreeSet<_> = entries.into_iter().map(|(key, _)| key.client).collect();
        assert_eq!(clients, [ip(CLIENT[0]), "10.1.0.6"].map(lab::address).into());
    });
}

/// A pod is known by its network namespace: all its sockets of both protocols' services stay, another pod's are its own.
#[test]
fn sockets_of_a_pod_stay_on_their_backend() {
    let mut lab = Lab::new();
    let namespace = lab.namespace("host");
    let other = lab.namespace("other");
    let addresses = ["192.0.2.1/32", "192.0.2.2/32", "fd00::1/128", "fd00::2/128"];
    for namespace in [&namespace, &other] {
        for address in addresses {
            run(&["ip", "-n", namespace, "address", "add", address, "dev", "lo"]);
        }
    }
    let datapath = open_in(&namespace, &lab.datapath_config());
    let vips = [
        ("10.96.0.10:80", ["192.0.2.1:8080", "192.0.2.2:8080"]),
        ("[fd96::10]:80", ["[fd00::1]:8080", "[fd00::2]:8080"]),
    ];
    for (id, (vip, backends)) in (1..).zip(&vips) {
        for (proto, id) in [(PROTO_TCP, id * 2), (PROTO_UDP, id * 2 + 1)] {
            let mut ops = service_ops(
                id,
                vip,
                proto,
                &[(id * 10, backends[0]), (id * 10 + 1, backends[1])],
            );
            if let Some(MapOp::ServicePut(_, value)) = ops.last_mut() {
                *value = value.with_affinity(100);
            }
            assert!(datapath.apply(&ops).is_complete());
        }
    }
    for namespace in [&namespace, &other] {
        in_namespace(namespace, || {
            for (_, backends) in &vips {
                serve(backends[0], "one");
                serve(backends[1], "two");
            }
            for (vip, _) in &vips {
                let tcp: BTreeSet<_> = (0..20).map(|_| connect(vip).unwrap().1).collect();
                assert_eq!(tcp.len(), 1, "{vip}");
                let udp: BTreeSet<_> = (0..20)
                    .map(|_| {
                        let socket = udp_socket("[::]:0");
                        let vip = if vip.starts_with('[') {
                            (*vip).to_owned()
                        } else {
                            "[::ffff:10.96.0.10]:80".to_owned()
                        };
                        socket.send_to(b"?", vip).unwrap();
                        receive(&socket).0
                    })
                    .collect();
                assert_eq!(udp.len(), 1, "{vip}");
            }
        });
    }
    assert_eq!(datapath.tables().affinity.dump().unwrap().len(), 8);
}
