//! The two nodes of `nodes`, and a network outside that node 1 alone reaches: 198.51.100.0/24 and 2001:db8:9::/64, the node .1,
//! a client .7. It knows the way to nodes' addresses and to load balancers' ones, and none to pods.
#![allow(dead_code, reason = "each test target uses some of it")]

use std::collections::BTreeMap;

use isthmus_bpf_abi::{
    Device, Endpoint, EndpointKey, PROTO_TCP, PROTO_UDP, ServiceKey, ServiceValue, feature, service_flag,
};
use isthmus_datapath::{Datapath, MapOp};

use crate::{
    lab::{Lab, address, ifindex, in_namespace, run},
    nodes::{Node, two},
    services::service_ops,
};

/// The client.
pub const CLIENT: [&str; 2] = ["198.51.100.7", "2001:db8:9::7"];
/// Node 1's address there.
pub const NEAR: [&str; 2] = ["198.51.100.1", "2001:db8:9::1"];
/// Node 1's own address.
pub const NODE: [&str; 2] = ["192.0.2.1", "2001:db8::1"];

/// Without socket hooks. Returns the nodes and the client's namespace.
pub fn build(lab: &mut Lab) -> ([Node; 2], String) {
    lab.socket_lb = false;
    let nodes = two(lab, "192.0.2.");
    let world = lab.namespace("world");
    let node = &nodes[0].namespace;
    run(&[
        "ip", "-n", node, "link", "add", "eth1", "type", "veth", "peer", "name", "eth0", "netns", &world,
    ]);
    for (namespace, device, at) in [(node, "eth1", NEAR), (&world, "eth0", CLIENT)] {
        for (text, bits) in at.iter().zip(["/24", "/64"]) {
            let with_bits = format!("{text}{bits}");
            let mut command = vec!["ip", "-n", namespace, "address", "add", &with_bits, "dev", device];
            if text.contains(':') {
                command.push("nodad");
            }
            run(&command);
        }
        run(&["ip", "-n", namespace, "link", "set", device, "up"]);
    }
    for (to, via) in [
        ("192.0.2.0/24", NEAR[0]),
        ("203.0.113.0/24", NEAR[0]),
        ("2001:db8::/64", NEAR[1]),
        ("2001:db8:80::/64", NEAR[1]),
    ] {
        run(&["ip", "-n", &world, "route", "add", to, "via", via]);
    }
    for node in &nodes {
        outside(node);
    }
    (nodes, world)
}

/// What the agent does for devices to the outside.
fn outside(node: &Node) {
    let tables = node.datapath.tables();
    let number = node.number;
    let mut config = tables.node_config().expect("configuration");
    config.features |= feature::NODE_PORT | feature::MASQUERADE_IPV4 | feature::MASQUERADE_IPV6;
    (config.snat_port_min, config.snat_port_max, config.tunnel_port) = (1_024, 29_999, 8472);
    tables.set_node_config(&config).expect("configuration");
    let mut devices = BTreeMap::from([(
        ifindex(&node.namespace, "eth0"),
        Device {
            ipv4: address(&format!("192.0.2.{number}")),
            ipv6: address(&format!("2001:db8::{number}")),
        },
    )]);
    let mut own = vec![
        format!("192.0.2.{number}"),
        format!("2001:db8::{number}"),
        format!("10.{number}.0.1"),
        format!("fd0{number}::1"),
    ];
    if number == 1 {
        let near = Device {
            ipv4: address(NEAR[0]),
            ipv6: address(NEAR[1]),
        };
        devices.insert(ifindex(&node.namespace, "eth1"), near);
        own.extend(NEAR.map(str::to_owned));
    }
    for text in own {
        let key = EndpointKey {
            address: address(&text),
        };
        tables
            .endpoints
            .put(&key, &Endpoint::host(1))
            .expect("own address");
    }
    tables.set_devices(&devices).expect("devices");
    let ifindexes: Vec<u32> = devices.into_keys().collect();
    let errors = in_namespace(&node.namespace, || node.datapath.attach_outside(&ifindexes));
    assert!(errors.is_empty(), "{errors:?}");
}

/// Puts a service that can be asked from outside, TCP and UDP, with these flags too.
pub fn expose(datapath: &Datapath, id: u32, vip: &str, flags: u16, backends: &[(u32, &str)]) {
    for (number, proto) in [PROTO_TCP, PROTO_UDP].into_iter().enumerate() {
        let own: Vec<_> = backends
            .iter()
            .map(|(id, socket)| (id * 2 + number as u32, *socket))
            .collect();
        let id = id * 2 + number as u32;
        let mut ops = service_ops(id, vip, proto, &own);
        let socket: std::net::SocketAddr = vip.parse().expect("frontend");
        let frontend = ServiceKey::frontend(address(&socket.ip().to_string()), socket.port(), proto);
        ops.push(MapOp::ServicePut(
            frontend,
            ServiceValue::frontend(id, own.len() as u16, service_flag::EXTERNAL | flags),
        ));
        let report = datapath.apply(&ops);
        assert!(report.is_complete(), "{:?}", report.failed);
    }
}
