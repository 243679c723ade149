//! A node with two pods (.5 and .6) and a remote prefix, both families, for frames through BPF_PROG_TEST_RUN.
#![allow(dead_code, reason = "each test target uses some of it")]

use isthmus_bpf_abi::{
    CtKey, CtValue, Direction, DropReason, Endpoint, EndpointKey, IpcacheKey, IpcacheValue, NodeConfig,
    feature, ipcache_flag,
};
use isthmus_datapath::{Counter, Datapath, MapOp, PacketHook};

use crate::{
    lab::{Lab, address, ifindex, in_namespace, open_in, run},
    services::service_ops,
    transport::Ends,
};

pub const POD: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];
pub const HOST: [u8; 6] = [2, 0, 0, 0, 1, 2];
pub const PASS: u32 = 0;
pub const DROP: u32 = 2;
pub const REDIRECT: u32 = 7;

pub const CLIENT: [&str; 2] = ["10.1.0.5:40000", "[fd01::5]:40000"];
pub const VIP: [&str; 2] = ["10.96.0.10:80", "[fd96::10]:80"];
pub const LOCAL: [&str; 2] = ["10.1.0.6:8080", "[fd01::6]:8080"];
pub const REMOTE: [&str; 2] = ["10.2.0.7:8080", "[fd02::7]:8080"];
/// The address alone.
pub fn ip(end: &str) -> &str {
    end.rsplit_once(':').unwrap().0.trim_matches(['[', ']'])
}

/// See the module.
pub struct Node {
    pub datapath: Datapath,
    pub namespace: String,
    pub pods: [u32; 2],
}

impl Node {
    pub fn check(test: impl FnOnce(&Node)) {
        let mut lab = Lab::new();
        let namespace = lab.namespace("node");
        for (device, peer) in [("pod1", "peer1"), ("pod2", "peer2")] {
            run(&[
                "ip", "-n", &namespace, "link", "add", device, "type", "veth", "peer", "name", peer,
            ]);
        }
        lab.socket_lb = false;
        let datapath = open_in(&namespace, &lab.datapath_config());
        let node = Self {
            pods: [ifindex(&namespace, "pod1"), ifindex(&namespace, "pod2")],
            datapath,
            namespace,
        };
        let tables = node.datapath.tables();
        let pods = [
            (node.pods[0], 1, POD, ["10.1.0.5", "fd01::5"]),
            (node.pods[1], 2, OTHER, ["10.1.0.6", "fd01::6"]),
        ];
        for (ifindex, endpoint_id, pod_mac, addresses) in pods {
            let endpoint = Endpoint {
                ifindex,
                endpoint_id,
                identity: 65_536 + endpoint_id,
                flags: 0,
                pod_mac,
                host_mac: HOST,
            };
            for text in addresses {
                let address = address(text);
                tables.endpoints.put(&EndpointKey { address }, &endpoint).unwrap();
            }
        }
        let remote = |to| IpcacheValue::tunnel(131_073, address(to), 0, ipcache_flag::REMOTE_CLUSTER);
        tables
            .ipcache
            .put(&IpcacheKey::ipv4([10, 2, 0, 0], 24), &remote("192.0.2.2"))
            .unwrap();
        tables
            .ipcache
            .put(&IpcacheKey::ipv6(address("fd02::"), 64), &remote("2001:db8::2"))
            .unwrap();
        node.set_features(feature::PACKET_LB);
        test(&node);
    }

    pub fn set_features(&self, features: u32) {
        let config = NodeConfig {
            vxlan_ifindex: 1,
            features,
            ..NodeConfig::default()
        };
        self.datapath.tables().set_node_config(&config).unwrap();
    }

    /// Puts a service; its backends are numbered from `id * 10 + 1`.
    pub fn service(&self, id: u32, vip: &str, proto: u8, backends: &[&str]) {
        let numbered: Vec<_> = (id * 10 + 1..).zip(backends.iter().copied()).collect();
        self.apply(&service_ops(id, vip, proto, &numbered));
    }

    pub fn apply(&self, ops: &[MapOp]) {
        let report = self.datapath.apply(ops);
        assert!(report.is_complete(), "{:?}", report.failed);
    }

    /// Runs a frame of a pod (0 or 1).
    pub fn send(&self, pod: usize, frame: &[u8]) -> (u32, Vec<u8>) {
        self.run(PacketHook::FromContainer, pod, frame)
    }

    pub fn run(&self, hook: PacketHook, pod: usize, frame: &[u8]) -> (u32, Vec<u8>) {
        in_namespace(&self.namespace, || {
            self.datapath.simulate(hook, frame, self.pods[pod])
        })
        .expect("test run")
    }

    /// Runs a frame and compares the verdict and that `reason` was counted once.
    pub fn expect(&self, pod: usize, frame: &[u8], verdict: u32, reason: DropReason) -> Vec<u8> {
        self.expect_at(PacketHook::FromContainer, pod, frame, verdict, reason)
    }

    pub fn expect_at(
        &self,
        hook: PacketHook,
        pod: usize,
        frame: &[u8],
        verdict: u32,
        reason: DropReason,
    ) -> Vec<u8> {
        let direction = match hook {
            PacketHook::ToContainer => Direction::ToContainer,
            _ => Direction::FromContainer,
        };
        let counter = || self.datapath.tables().counter(reason, direction).unwrap();
        let before = counter();
        let (got, out) = self.run(hook, pod, frame);
        let counted = counter().packets - before.packets;
        assert_eq!(
            (got, counted),
            (verdict, 1),
            "{reason:?} of {:?}",
            self.counters()
        );
        out
    }

    pub fn counters(&self) -> Vec<Counter> {
        self.datapath.tables().counters().unwrap()
    }

    pub fn flow(&self, ends: Ends, proto: u8) -> Option<CtValue> {
        self.datapath.tables().ct.lookup(&key(ends, proto)).unwrap()
    }
}

pub fn key(ends: Ends, proto: u8) -> CtKey {
    CtKey {
        source: ends.source.0,
        destination: ends.destination.0,
        source_port: ends.source.1.to_be_bytes(),
        destination_port: ends.destination.1.to_be_bytes(),
        proto,
        pad: [0; 3],
    }
}
