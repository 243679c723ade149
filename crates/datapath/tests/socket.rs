//! Socket load balancing with real sockets: what a process below the cgroup sees.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::{
    collections::BTreeSet,
    net::{TcpStream, UdpSocket},
};

use isthmus_bpf_abi::{Direction, DropReason, PROTO_TCP, ServiceKey, ServiceValue};
use isthmus_datapath::{Datapath, MapOp};

#[path = "support/lab.rs"]
mod lab;
#[path = "support/services.rs"]
mod services;

use lab::{Lab, address, in_namespace, open_in, run};
use services::{connect, put_service, receive, serve, udp};

const VIP4: &str = "10.96.0.10:80";
const VIP4_MAPPED: &str = "[::ffff:10.96.0.10]:80";
const VIP6: &str = "[fd96::10]:80";
const EHOSTUNREACH: Option<i32> = Some(113);

/// A namespace with two backends for each family, and services for them. The frontends' addresses are nowhere: only
/// the hooks make them answer.
fn check(test: impl FnOnce(&Datapath) + Send) {
    let mut lab = Lab::new();
    let namespace = lab.namespace("host");
    let addresses = ["192.0.2.1/32", "192.0.2.2/32", "fd00::1/128", "fd00::2/128"];
    for address in addresses {
        run(&["ip", "-n", &namespace, "address", "add", address, "dev", "lo"]);
    }
    let datapath = open_in(&namespace, &lab.datapath_config());
    put_service(
        &datapath,
        1,
        VIP4,
        &[(1, "192.0.2.1:8080"), (2, "192.0.2.2:8080")],
    );
    put_service(
        &datapath,
        2,
        VIP6,
        &[(3, "[fd00::1]:8080"), (4, "[fd00::2]:8080")],
    );
    put_service(&datapath, 3, "10.96.0.11:80", &[]);
    put_service(&datapath, 4, "[fd96::11]:80", &[]);
    in_namespace(&namespace, || {
        serve("192.0.2.1:8080", "four-1");
        serve("192.0.2.2:8080", "four-2");
        serve("[fd00::1]:8080", "six-1");
        serve("[fd00::2]:8080", "six-2");
        test(&datapath);
    });
}

fn names_seen(vip: &str) -> BTreeSet<String> {
    (0..40).map(|_| connect(vip).expect("a connection").1).collect()
}

#[test]
fn tcp_reaches_every_backend() {
    check(|datapath| {
        let four = BTreeSet::from(["four-1".to_owned(), "four-2".to_owned()]);
        assert_eq!(names_seen(VIP4), four);
        assert_eq!(names_seen(VIP4_MAPPED), four);
        assert_eq!(
            names_seen(VIP6),
            BTreeSet::from(["six-1".to_owned(), "six-2".to_owned()])
        );
        let translated = datapath
            .tables()
            .counter(DropReason::Translated, Direction::Socket)
            .unwrap();
        assert_eq!(translated.packets, 120);
    });
}

#[test]
fn tcp_peer_is_the_frontend() {
    check(|_| {
        for vip in [VIP4, VIP4_MAPPED, VIP6] {
            let (stream, _) = connect(vip).unwrap();
            assert_eq!(stream.peer_addr().unwrap(), vip.parse().unwrap());
        }
    });
}

#[test]
fn udp_answer_comes_from_the_frontend() {
    check(|_| {
        for (bind, vip) in [("0.0.0.0:0", VIP4), ("[::]:0", VIP4_MAPPED), ("[::]:0", VIP6)] {
            let socket = udp(bind);
            socket.send_to(b"?", vip).unwrap();
            let (name, from) = receive(&socket);
            assert!(
                name.starts_with(if vip == VIP6 { "six" } else { "four" }),
                "{name}"
            );
            assert_eq!(from, vip.parse().unwrap());
        }
    });
}

#[test]
fn udp_conversation_stays_on_one_backend() {
    check(|_| {
        let mut names = BTreeSet::new();
        for _ in 0..20 {
            let socket = udp("0.0.0.0:0");
            let of_socket: BTreeSet<_> = (0..5)
                .map(|_| {
                    socket.send_to(b"?", VIP4).unwrap();
                    receive(&socket).0
                })
                .collect();
            assert_eq!(of_socket.len(), 1, "{of_socket:?}");
            names.extend(of_socket);
        }
        assert_eq!(names.len(), 2, "sockets spread over backends");
    });
}

#[test]
fn connected_udp_has_the_frontend_as_peer() {
    check(|_| {
        for (bind, vip) in [("0.0.0.0:0", VIP4), ("[::]:0", VIP4_MAPPED), ("[::]:0", VIP6)] {
            let socket = udp(bind);
            socket.connect(vip).unwrap();
            assert_eq!(socket.peer_addr().unwrap(), vip.parse().unwrap());
            socket.send(b"?").unwrap();
            assert_eq!(receive(&socket).1, vip.parse().unwrap());
        }
    });
}

#[test]
fn frontend_without_backends_is_unreachable() {
    check(|datapath| {
        for (bind, vip) in [
            ("0.0.0.0:0", "10.96.0.11:80"),
            ("[::]:0", "[::ffff:10.96.0.11]:80"),
            ("[::]:0", "[fd96::11]:80"),
        ] {
            assert_eq!(
                TcpStream::connect(vip).unwrap_err().raw_os_error(),
                EHOSTUNREACH,
                "{vip}"
            );
            let socket = UdpSocket::bind(bind).unwrap();
            assert_eq!(
                socket.send_to(b"?", vip).unwrap_err().raw_os_error(),
                EHOSTUNREACH,
                "{vip}"
            );
            assert_eq!(
                socket.connect(vip).unwrap_err().raw_os_error(),
                EHOSTUNREACH,
                "{vip}"
            );
        }
        let refused = datapath
            .tables()
            .counter(DropReason::NoBackend, Direction::Socket)
            .unwrap();
        assert_eq!(refused.packets, 9);
    });
}

#[test]
fn other_addresses_are_left_alone() {
    check(|_| {
        let (stream, name) = connect("192.0.2.2:8080").unwrap();
        assert_eq!(
            (name.as_str(), stream.peer_addr().unwrap()),
            ("four-2", "192.0.2.2:8080".parse().unwrap())
        );
        let socket = udp("0.0.0.0:0");
        socket.send_to(b"?", "192.0.2.1:8080").unwrap();
        assert_eq!(
            receive(&socket),
            ("four-1".to_owned(), "192.0.2.1:8080".parse().unwrap())
        );
        // The frontend's address at another port is not a frontend.
        assert!(TcpStream::connect("10.96.0.10:81").is_err());
    });
}

#[test]
fn a_slot_without_backend_never_fails_a_connection() {
    check(|datapath| {
        // Backend 9 does not exist: what a reader meets between two steps of a change.
        let frontend = ServiceKey::frontend(address("10.96.0.10"), 80, PROTO_TCP);
        let slots = (1..=3).map(|slot| MapOp::ServicePut(frontend.at_slot(slot), ServiceValue::slot(2, 900)));
        let mut ops: Vec<_> = slots.collect();
        ops.push(MapOp::ServicePut(frontend.at_slot(4), ServiceValue::slot(2, 2)));
        ops.push(MapOp::ServicePut(frontend, ServiceValue::frontend(2, 4, 0)));
        assert!(datapath.apply(&ops).is_complete());
        assert_eq!(names_seen(VIP4), BTreeSet::from(["four-1".to_owned()]));
    });
}

#[test]
fn only_dangling_slots_refuse_with_a_reason() {
    check(|datapath| {
        let frontend = ServiceKey::frontend(address("10.96.0.10"), 80, PROTO_TCP);
        let ops = [
            MapOp::ServicePut(frontend.at_slot(1), ServiceValue::slot(2, 900)),
            MapOp::ServicePut(frontend, ServiceValue::frontend(2, 1, 0)),
        ];
        assert!(datapath.apply(&ops).is_complete());
        assert_eq!(TcpStream::connect(VIP4).unwrap_err().raw_os_error(), EHOSTUNREACH);
        assert_eq!(
            datapath
                .tables()
                .counter(DropReason::BackendGone, Direction::Socket)
                .unwrap()
                .packets,
            1
        );
    });
}

#[test]
fn ipv6_backend_of_an_ipv4_frontend_serves_ipv6_sockets_only() {
    check(|datapath| {
        put_service(datapath, 5, "10.96.0.12:80", &[(7, "[fd00::1]:8080")]);
        assert_eq!(
            TcpStream::connect("10.96.0.12:80").unwrap_err().raw_os_error(),
            EHOSTUNREACH
        );
        assert_eq!(
            datapath
                .tables()
                .counter(DropReason::FamilyMismatch, Direction::Socket)
                .unwrap()
                .packets,
            1
        );
        assert_eq!(connect("[::ffff:10.96.0.12]:80").unwrap().1, "six-1");
    });
}
