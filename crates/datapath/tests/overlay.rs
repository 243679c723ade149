//! The whole path between two nodes: pods, veth pairs, VXLAN, real packets.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    thread,
    time::Duration,
};

use isthmus_bpf_abi::{Direction, DropReason, EndpointKey};
use isthmus_datapath::{device, routes, teardown};

#[path = "support/lab.rs"]
mod lab;
#[path = "support/nodes.rs"]
mod nodes;

use lab::{Lab, address, chain, in_namespace, run, wait_for, with_netlink};
use nodes::{Node, route, two};

fn ping(namespace: &str, to: &str, options: &[&str]) {
    let net = format!("--net=/run/netns/{namespace}");
    let mut command = vec!["nsenter", &net, "ping", "-n", "-c", "1", "-W", "5"];
    command.extend(options);
    command.push(to);
    run(&command);
}

/// A megabyte from one namespace to another and its end back.
fn transfer(from: &str, to: &str, socket: &str) {
    let listener = in_namespace(to, || TcpListener::bind(socket).expect("listening"));
    thread::scope(|scope| {
        let server = scope.spawn(move || {
            let (mut connection, _) = listener.accept().expect("a connection");
            let mut received = Vec::new();
            connection.read_to_end(&mut received).expect("reading");
            connection.write_all(b"done").expect("answering");
            received.len()
        });
        in_namespace(from, || {
            let socket = socket.parse().expect("address");
            let mut connection =
                TcpStream::connect_timeout(&socket, Duration::from_secs(5)).expect("connecting");
            connection
                .set_read_timeout(Some(Duration::from_secs(5)))
                .expect("timeout");
            connection.write_all(&vec![7; 1 << 20]).expect("writing");
            connection.shutdown(std::net::Shutdown::Write).expect("ending");
            let mut answer = String::new();
            connection.read_to_string(&mut answer).expect("the answer");
            assert_eq!(answer, "done");
        });
        assert_eq!(server.join().expect("server"), 1 << 20);
    });
}

fn no_drops(node: &Node) {
    let drops: Vec<_> = node
        .datapath
        .tables()
        .counters()
        .unwrap()
        .into_iter()
        .filter(|counter| counter.reason.is_drop())
        .collect();
    assert_eq!(drops, [], "node {}", node.number);
}

fn everybody_reaches_everybody(underlay: &str) {
    let mut lab = Lab::new();
    let [one, two] = two(&mut lab, underlay);
    // Local, remote, and back.
    ping(&one.pods[0], "10.1.0.6", &[]);
    ping(&one.pods[0], "fd01::6", &[]);
    for (from, other) in [(&one, 2), (&two, 1)] {
        ping(&from.pods[0], &format!("10.{other}.0.5"), &[]);
        ping(&from.pods[0], &format!("fd0{other}::6"), &[]);
        // Pod to its own router IP and to the other node's; node to a remote pod and router IP.
        ping(&from.pods[0], &format!("10.{}.0.1", from.number), &[]);
        ping(&from.pods[0], &format!("10.{other}.0.1"), &[]);
        ping(&from.pods[0], &format!("fd0{other}::1"), &[]);
        ping(&from.namespace, &format!("10.{other}.0.6"), &[]);
        ping(&from.namespace, &format!("fd0{other}::6"), &[]);
        ping(&from.namespace, &format!("10.{other}.0.1"), &[]);
    }
    transfer(&one.pods[0], &one.pods[1], "10.1.0.6:7000");
    transfer(&one.pods[0], &two.pods[0], "10.2.0.5:7000");
    transfer(&two.pods[1], &one.pods[0], "[fd01::5]:7000");
    no_drops(&one);
    no_drops(&two);
    let through = one
        .datapath
        .tables()
        .counter(DropReason::Forwarded, Direction::FromOverlay)
        .unwrap();
    assert!(through.packets > 20 && through.bytes > 1 << 20, "{through:?}");
}

#[test]
fn everybody_reaches_everybody_over_ipv4() {
    everybody_reaches_everybody("192.0.2.");
}

#[test]
fn everybody_reaches_everybody_over_ipv6() {
    everybody_reaches_everybody("2001:db8::");
}

#[test]
fn the_mtu_fits_and_no_more() {
    let mut lab = Lab::new();
    let [one, _two] = two(&mut lab, "192.0.2.");
    // 1450 in all: IPv4 20 + ICMP 8 + payload, unfragmented.
    ping(&one.pods[0], "10.2.0.5", &["-M", "do", "-s", "1422"]);
    // The same hop limit at both ends: the overlay counts as no hop.
    ping(&one.pods[0], "10.2.0.5", &["-t", "1"]);
    ping(&one.pods[0], "10.1.0.6", &["-t", "1"]);
}

#[test]
fn spoofed_and_stray_packets_are_dropped_with_a_reason() {
    let mut lab = Lab::new();
    let [one, two] = two(&mut lab, "192.0.2.");
    let counter =
        |node: &Node, reason, direction| node.datapath.tables().counter(reason, direction).unwrap().packets;
    // A pod with another's address: its packets end at the veth.
    run(&[
        "ip",
        "-n",
        &one.pods[0],
        "address",
        "add",
        "10.1.0.77/32",
        "dev",
        "eth0",
    ]);
    let net = format!("--net=/run/netns/{}", one.pods[0]);
    let spoofed = std::process::Command::new("nsenter")
        .args([
            &net,
            "ping",
            "-n",
            "-c",
            "1",
            "-W",
            "1",
            "-I",
            "10.1.0.77",
            "10.2.0.5",
        ])
        .output()
        .unwrap();
    assert!(!spoofed.status.success());
    wait_for("a counted drop", || {
        counter(&one, DropReason::InvalidSource, Direction::FromContainer) == 1
    });
    // An address of the other node's range that no pod has.
    let net = format!("--net=/run/netns/{}", one.pods[1]);
    let stray = std::process::Command::new("nsenter")
        .args([&net, "ping", "-n", "-c", "1", "-W", "1", "10.2.0.99"])
        .output()
        .unwrap();
    assert!(!stray.status.success());
    wait_for("a counted drop", || {
        counter(&two, DropReason::UnknownDestination, Direction::FromOverlay) == 1
    });
}

#[test]
fn a_deleted_endpoint_is_unreachable_and_its_hook_gone() {
    let mut lab = Lab::new();
    let [one, two] = two(&mut lab, "192.0.2.");
    ping(&one.pods[0], "10.2.0.5", &[]);
    let key = EndpointKey {
        address: address("10.2.0.5"),
    };
    let endpoint = two.datapath.tables().endpoints.lookup(&key).unwrap().unwrap();
    two.datapath.tables().endpoints.delete(&key).unwrap();
    in_namespace(&two.namespace, || two.datapath.detach_endpoint(endpoint.ifindex)).unwrap();
    let net = format!("--net=/run/netns/{}", one.pods[0]);
    let gone = std::process::Command::new("nsenter")
        .args([&net, "ping", "-n", "-c", "1", "-W", "1", "10.2.0.5"])
        .output()
        .unwrap();
    assert!(!gone.status.success());
    ping(&one.pods[0], "10.2.0.6", &[]);
}

#[test]
fn device_and_routes_stay_when_nothing_changed_and_go_at_teardown() {
    let mut lab = Lab::new();
    let [one, _two] = two(&mut lab, "192.0.2.");
    let bpf_root = lab.bpf_root(0);
    in_namespace(&one.namespace, || {
        with_netlink(|netlink| async move {
            let config = device::VxlanConfig {
                port: 8472,
                mtu: 1400,
                router_ips: vec!["10.1.0.1".parse().unwrap(), "10.1.0.2".parse().unwrap()],
            };
            let same = device::ensure_vxlan(&netlink, &config).await.unwrap();
            assert_eq!(same, one.vxlan_ifindex, "the device was kept");
            let shown = run(&["ip", "-o", "address", "show", "dev", device::VXLAN_NAME]);
            assert!(
                shown.contains("10.1.0.1/32") && shown.contains("10.1.0.2/32"),
                "{shown}"
            );
            assert!(!shown.contains("inet6"), "{shown}");
            assert!(run(&["ip", "link", "show", device::VXLAN_NAME]).contains("mtu 1400"));

            // Only another prefix now; somebody else's route stays.
            run(&["ip", "route", "add", "203.0.113.0/24", "dev", device::VXLAN_NAME]);
            let desired = BTreeSet::from([route("10.9.0.0", 24, same, Some("10.1.0.1"))]);
            let plan = routes::plan(&routes::dump(&netlink).await.unwrap(), &desired);
            let errors = routes::apply(&netlink, &plan).await;
            assert!(errors.is_empty(), "{}", chain(&errors[0]));
            assert_eq!(routes::dump(&netlink).await.unwrap(), desired);
            assert!(run(&["ip", "route"]).contains("203.0.113.0/24"));
            // The same destination through another source is one replacement.
            let moved = BTreeSet::from([route("10.9.0.0", 24, same, Some("10.1.0.2"))]);
            let plan = routes::plan(&desired, &moved);
            assert_eq!((plan.put.len(), plan.remove.len()), (1, 0));
            assert!(routes::apply(&netlink, &plan).await.is_empty());
            assert_eq!(routes::dump(&netlink).await.unwrap(), moved);

            let other_port = device::VxlanConfig { port: 8473, ..config };
            let other = device::ensure_vxlan(&netlink, &other_port).await.unwrap();
            assert_ne!(other, same, "a port cannot be changed");

            let errors = teardown::remove_all(&netlink, &bpf_root).await;
            assert!(errors.is_empty(), "{}", chain(&errors[0]));
            assert!(!run(&["ip", "link"]).contains(device::VXLAN_NAME));
            assert!(routes::dump(&netlink).await.unwrap().is_empty());
        });
    });
}
