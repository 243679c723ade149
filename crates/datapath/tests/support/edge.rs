//! The node of `pair` with a device to the outside: frames of clients through BPF_PROG_TEST_RUN.
//!
//! The node is 192.0.2.1 and 2001:db8::1 there, and 10.1.0.1 and fd01::1 in the pod network. A neighbour is .2 and ::2.
#![allow(dead_code, reason = "each test target uses some of it")]

use isthmus_bpf_abi::{
    CtValue, Device, Direction, DropReason, Endpoint, EndpointKey, NodeConfig, ServiceKey, ServiceValue,
    feature, service_flag,
};
use isthmus_datapath::{MapOp, PacketHook};

use crate::{
    lab::{address, ifindex, in_namespace, run},
    pair::{Node, key},
    services::service_ops,
    transport::{Ends, end},
};

pub const OUTSIDER: [u8; 6] = [2, 0, 0, 0, 9, 9];
/// A client outside.
pub const CLIENT: [&str; 2] = ["198.51.100.7:50000", "[2001:db8:9::7]:50000"];
/// A frontend on the node's own addresses.
pub const NODE_PORT: [&str; 2] = ["192.0.2.1:30080", "[2001:db8::1]:30080"];
/// A load balancer's address, which the node has on no device.
pub const BALANCER: [&str; 2] = ["203.0.113.80:80", "[2001:db8:80::80]:80"];
/// Where clients of a backend behind the overlay seem to be.
pub const ROUTER: [&str; 2] = ["10.1.0.1", "fd01::1"];
pub const NODE: [&str; 2] = ["192.0.2.1", "2001:db8::1"];
/// Ports that may stand for others.
pub const PORTS: std::ops::RangeInclusive<u16> = 1_024..=29_999;

/// See the module.
pub struct Edge<'a> {
    pub node: &'a Node,
    pub ifindex: u32,
}

pub const ALL_FEATURES: u32 =
    feature::PACKET_LB | feature::NODE_PORT | feature::MASQUERADE_IPV4 | feature::MASQUERADE_IPV6;

impl Edge<'_> {
    pub fn check(test: impl FnOnce(&Edge<'_>)) {
        Node::check(|node| {
            let ns = &node.namespace;
            run(&[
                "ip", "-n", ns, "link", "add", "eth0", "type", "veth", "peer", "name", "wire",
            ]);
            for device in ["eth0", "wire"] {
                run(&["ip", "-n", ns, "link", "set", device, "up"]);
            }
            run(&["ip", "-n", ns, "address", "add", "192.0.2.1/24", "dev", "eth0"]);
            run(&[
                "ip",
                "-n",
                ns,
                "address",
                "add",
                "2001:db8::1/64",
                "dev",
                "eth0",
                "nodad",
            ]);
            in_namespace(ns, || isthmus_datapath::device::enable_forwarding().unwrap());
            let edge = Edge {
                node,
                ifindex: ifindex(ns, "eth0"),
            };
            let tables = node.datapath.tables();
            for text in ROUTER.iter().chain(&NODE) {
                let address = address(text);
                tables
                    .endpoints
                    .put(&EndpointKey { address }, &Endpoint::host(1))
                    .unwrap();
            }
            let device = Device {
                ipv4: address(NODE[0]),
                ipv6: address(NODE[1]),
            };
            tables.set_devices(&[(edge.ifindex, device)].into()).unwrap();
            edge.set(ALL_FEATURES, PORTS);
            test(&edge);
        });
    }

    pub fn set(&self, features: u32, ports: std::ops::RangeInclusive<u16>) {
        let config = NodeConfig {
            node_ipv4: address(NODE[0]),
            node_ipv6: address(NODE[1]),
            router_ipv4: address(ROUTER[0]),
            router_ipv6: address(ROUTER[1]),
            vxlan_ifindex: 1,
            features,
            snat_port_min: *ports.start(),
            snat_port_max: *ports.end(),
            tunnel_port: 8472,
            ..NodeConfig::default()
        };
        self.node.datapath.tables().set_node_config(&config).unwrap();
    }

    /// Puts a service with these flags beside [`service_flag::EXTERNAL`]; its backends are numbered from `id * 10 + 1`.
    pub fn service(&self, id: u32, vip: &str, proto: u8, flags: u16, backends: &[&str]) {
        self.node.service(id, vip, proto, backends);
        let vip = end(vip);
        let frontend = ServiceKey::frontend(vip.0, vip.1, proto);
        let value = ServiceValue::frontend(id, backends.len() as u16, service_flag::EXTERNAL | flags);
        self.node.apply(&[MapOp::ServicePut(frontend, value)]);
    }

    /// The same service, as who asks inside the cluster sees it.
    pub fn service_inside(&self, id: u32, vip: &str, proto: u8, backends: &[&str]) {
        let numbered: Vec<_> = (id * 10 + 1..).zip(backends.iter().copied()).collect();
        let ops: Vec<_> = service_ops(id, vip, proto, &numbered)
            .into_iter()
            .map(|op| match op {
                MapOp::ServicePut(key, value) => MapOp::ServicePut(ServiceKey { scope: 1, ..key }, value),
                other => other,
            })
            .collect();
        self.node.apply(&ops);
    }

    /// A frame comes in; compares the verdict and that `reason` was counted once.
    pub fn comes(&self, frame: &[u8], verdict: u32, reason: DropReason) -> Vec<u8> {
        self.passes(PacketHook::FromHostDevice, frame, verdict, reason)
    }

    /// A frame leaves.
    pub fn leaves(&self, frame: &[u8], verdict: u32, reason: DropReason) -> Vec<u8> {
        self.passes(PacketHook::ToHostDevice, frame, verdict, reason)
    }

    fn passes(&self, hook: PacketHook, frame: &[u8], verdict: u32, reason: DropReason) -> Vec<u8> {
        let direction = match hook {
            PacketHook::FromHostDevice => Direction::FromHostDevice,
            _ => Direction::ToHostDevice,
        };
        let tables = self.node.datapath.tables();
        let before = tables.counter(reason, direction).unwrap().packets;
        let (got, out) = self.run(hook, frame).expect("test run");
        let counted = tables.counter(reason, direction).unwrap().packets - before;
        assert_eq!(
            (got, counted),
            (verdict, 1),
            "{reason:?} of {:?}",
            self.node.counters()
        );
        out
    }

    pub fn run(&self, hook: PacketHook, frame: &[u8]) -> std::io::Result<(u32, Vec<u8>)> {
        in_namespace(&self.node.namespace, || {
            self.node.datapath.simulate(hook, frame, self.ifindex)
        })
    }

    pub fn flow(&self, ends: Ends, proto: u8) -> Option<CtValue> {
        self.node.flow(ends, proto)
    }

    pub fn forget(&self, ends: Ends, proto: u8) {
        self.node.datapath.tables().ct.delete(&key(ends, proto)).unwrap();
    }

    /// Changes a flow's entry.
    pub fn edit(&self, ends: Ends, proto: u8, edit: impl FnOnce(&mut CtValue)) {
        let mut value = self.flow(ends, proto).expect("an entry");
        edit(&mut value);
        self.node
            .datapath
            .tables()
            .ct
            .put(&key(ends, proto), &value)
            .unwrap();
    }
}
