//! The packet programs, a frame at a time, through BPF_PROG_TEST_RUN: frame in, verdict, frame out, counted reason.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use isthmus_bpf_abi::{
    Direction, DropReason, Endpoint, EndpointKey, IDENTITY_REMOTE_NODE, IpcacheKey, IpcacheValue, NodeConfig,
    endpoint_flag, ipcache_flag,
};
use isthmus_datapath::{Datapath, PacketHook};

#[path = "support/frames.rs"]
mod frames;
#[path = "support/lab.rs"]
mod lab;

use frames::{ethernet, icmpv6, icmpv6_with_options, udp};
use lab::{Lab, address, ifindex, in_namespace, open_in, run};

const POD_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 1, 2];
const PASS: u32 = 0;
const DROP: u32 = 2;
const REDIRECT: u32 = 7;

/// A node with two pods, their addresses, a remote prefix for each family, and one address that does not answer.
struct Node {
    datapath: Datapath,
    namespace: String,
    pod_ifindex: u32,
}

impl Node {
    fn check(test: impl FnOnce(&Node)) {
        let mut lab = Lab::new();
        let namespace = lab.namespace("node");
        for (device, peer) in [("pod1", "peer1"), ("pod2", "peer2")] {
            run(&[
                "ip", "-n", &namespace, "link", "add", device, "type", "veth", "peer", "name", peer,
            ]);
        }
        let datapath = open_in(&namespace, &lab.datapath_config());
        let tables = datapath.tables();
        let pods = [
            ("pod1", 1, POD_MAC, ["10.1.0.5", "fd01::5"]),
            ("pod2", 2, OTHER_MAC, ["10.1.0.6", "fd01::6"]),
        ];
        for (device, endpoint_id, pod_mac, addresses) in pods {
            let endpoint = Endpoint {
                ifindex: ifindex(&namespace, device),
                endpoint_id,
                identity: 65_536 + endpoint_id,
                flags: 0,
                pod_mac,
                host_mac: HOST_MAC,
            };
            for text in addresses {
                tables
                    .endpoints
                    .put(
                        &EndpointKey {
                            address: address(text),
                        },
                        &endpoint,
                    )
                    .unwrap();
            }
        }
        tables
            .endpoints
            .put(
                &EndpointKey {
                    address: address("10.1.0.1"),
                },
                &Endpoint::host(1),
            )
            .unwrap();
        let remote = IpcacheValue::tunnel(131_073, address("192.0.2.2"), 0, ipcache_flag::REMOTE_CLUSTER);
        let remote6 = IpcacheValue::tunnel(131_073, address("2001:db8::2"), 0, ipcache_flag::REMOTE_CLUSTER);
        let gone = IpcacheValue::direct(2, ipcache_flag::UNROUTABLE);
        let direct = IpcacheValue {
            flags: remote.flags | ipcache_flag::SKIP_TUNNEL,
            ..remote
        };
        tables
            .ipcache
            .put(&IpcacheKey::ipv4([10, 2, 0, 0], 24), &remote)
            .unwrap();
        tables
            .ipcache
            .put(&IpcacheKey::ipv6(address("fd02::"), 64), &remote6)
            .unwrap();
        tables
            .ipcache
            .put(&IpcacheKey::ipv4([10, 2, 0, 99], 32), &gone)
            .unwrap();
        tables
            .ipcache
            .put(&IpcacheKey::ipv4([10, 2, 0, 98], 32), &direct)
            .unwrap();
        let config = NodeConfig {
            vxlan_ifindex: 1,
            node_identity: IDENTITY_REMOTE_NODE,
            cluster_id: 1,
            ..NodeConfig::default()
        };
        tables.set_node_config(&config).unwrap();
        let node = Self {
            datapath,
            pod_ifindex: ifindex(&namespace, "pod1"),
            namespace,
        };
        test(&node);
    }

    fn simulate(&self, hook: PacketHook, frame: &[u8]) -> (u32, Vec<u8>) {
        in_namespace(&self.namespace, || {
            self.datapath.simulate(hook, frame, self.pod_ifindex)
        })
        .expect("test run")
    }

    /// Runs one frame and compares verdict and what was counted.
    fn row(&self, hook: PacketHook, what: &str, frame: &[u8], verdict: u32, reason: DropReason) -> Vec<u8> {
        let direction = match hook {
            PacketHook::FromContainer => Direction::FromContainer,
            PacketHook::FromOverlay => Direction::FromOverlay,
            PacketHook::ToOverlay => Direction::ToOverlay,
            PacketHook::ToContainer => Direction::ToContainer,
            PacketHook::FromHostDevice => Direction::FromHostDevice,
            PacketHook::ToHostDevice => Direction::ToHostDevice,
        };
        let before = self.datapath.tables().counter(reason, direction).unwrap();
        let (got, out) = self.simulate(hook, frame);
        let after = self.datapath.tables().counter(reason, direction).unwrap();
        assert_eq!((got, after.packets - before.packets), (verdict, 1), "{what}");
        assert_eq!(after.bytes - before.bytes, frame.len() as u64, "{what}");
        out
    }
}

/// Hop-by-hop options and then not ICMPv6.
fn udp_with_options() -> Vec<u8> {
    let mut frame = icmpv6_with_options(POD_MAC, "fe80::1", "ff02::16");
    frame[54] = 17;
    frame
}

#[test]
fn from_container() {
    use DropReason::*;
    Node::check(|node| {
        let rows: [(&str, Vec<u8>, u32, DropReason); 21] = [
            (
                "to a pod here",
                udp(POD_MAC, "10.1.0.5", "10.1.0.6"),
                REDIRECT,
                Forwarded,
            ),
            (
                "to a pod here, IPv6",
                udp(POD_MAC, "fd01::5", "fd01::6"),
                REDIRECT,
                Forwarded,
            ),
            (
                "to a remote pod",
                udp(POD_MAC, "10.1.0.5", "10.2.0.7"),
                REDIRECT,
                Forwarded,
            ),
            (
                "to a remote pod, IPv6",
                udp(POD_MAC, "fd01::5", "fd02::7"),
                REDIRECT,
                Forwarded,
            ),
            (
                "to the router IP",
                udp(POD_MAC, "10.1.0.5", "10.1.0.1"),
                PASS,
                Forwarded,
            ),
            (
                "to the world",
                udp(POD_MAC, "10.1.0.5", "198.51.100.1"),
                PASS,
                Forwarded,
            ),
            (
                "without encapsulation",
                udp(POD_MAC, "10.1.0.5", "10.2.0.98"),
                PASS,
                Forwarded,
            ),
            (
                "to where nobody answers",
                udp(POD_MAC, "10.1.0.5", "10.2.0.99"),
                DROP,
                Unroutable,
            ),
            (
                "another pod's source",
                udp(POD_MAC, "10.1.0.6", "10.2.0.7"),
                DROP,
                InvalidSource,
            ),
            (
                "a stranger's source",
                udp(POD_MAC, "203.0.113.9", "10.2.0.7"),
                DROP,
                InvalidSource,
            ),
            (
                "a stranger's source, IPv6",
                udp(POD_MAC, "2001:db8::9", "fd02::7"),
                DROP,
                InvalidSource,
            ),
            (
                "the node's source",
                udp(POD_MAC, "10.1.0.1", "10.2.0.7"),
                DROP,
                InvalidSource,
            ),
            (
                "another MAC address",
                udp(OTHER_MAC, "10.1.0.5", "10.1.0.6"),
                DROP,
                InvalidSourceMac,
            ),
            (
                "neighbour solicitation",
                icmpv6(POD_MAC, "fe80::1", "ff02::1:ff00:1"),
                PASS,
                Forwarded,
            ),
            (
                "address probing",
                icmpv6(POD_MAC, "::", "ff02::1:ff00:5"),
                PASS,
                Forwarded,
            ),
            (
                "listener report",
                icmpv6_with_options(POD_MAC, "fe80::1", "ff02::16"),
                PASS,
                Forwarded,
            ),
            ("options only", udp_with_options(), DROP, InvalidSource),
            (
                "ICMPv6 from nowhere to a pod",
                icmpv6(POD_MAC, "fe80::1", "fd01::6"),
                DROP,
                InvalidSource,
            ),
            (
                "link-local UDP",
                udp(POD_MAC, "fe80::1", "ff02::fb"),
                DROP,
                InvalidSource,
            ),
            ("ARP", ethernet(POD_MAC, [0x08, 0x06], &[0; 28]), PASS, Forwarded),
            (
                "another protocol",
                ethernet(POD_MAC, [0x88, 0xcc], &[0; 28]),
                DROP,
                UnsupportedProtocol,
            ),
        ];
        for (what, frame, verdict, reason) in rows {
            node.row(PacketHook::FromContainer, what, &frame, verdict, reason);
        }
    });
}

#[test]
fn delivery_to_a_pod_here_rewrites_mac_addresses_and_nothing_else() {
    Node::check(|node| {
        for frame in [
            udp(POD_MAC, "10.1.0.5", "10.1.0.6"),
            udp(POD_MAC, "fd01::5", "fd01::6"),
        ] {
            let out = node.row(
                PacketHook::FromContainer,
                "to a pod here",
                &frame,
                REDIRECT,
                DropReason::Forwarded,
            );
            assert_eq!(out[..6], OTHER_MAC);
            assert_eq!(out[6..12], HOST_MAC);
            assert_eq!(out[12..], frame[12..], "the TTL too stays");
        }
    });
}

#[test]
fn a_header_cut_short_is_dropped() {
    Node::check(|node| {
        let whole = udp(POD_MAC, "fd01::5", "fd01::6");
        for length in [14, 20, 37, 53] {
            // A frame without a whole IP header is refused by the test run itself unless its type is unknown there.
            let short = &whole[..length];
            let result = in_namespace(&node.namespace, || {
                node.datapath
                    .simulate(PacketHook::FromContainer, short, node.pod_ifindex)
            });
            match result {
                Ok((verdict, _)) => assert_eq!(verdict, DROP, "{length} bytes"),
                Err(error) => assert_eq!(error.raw_os_error(), Some(22), "{length} bytes: {error}"),
            }
        }
    });
}

#[test]
fn without_configuration_nothing_enters_the_overlay() {
    Node::check(|node| {
        node.datapath
            .tables()
            .set_node_config(&NodeConfig::default())
            .unwrap();
        let frame = udp(POD_MAC, "10.1.0.5", "10.2.0.7");
        node.row(
            PacketHook::FromContainer,
            "remote",
            &frame,
            DROP,
            DropReason::NotConfigured,
        );
    });
}

#[test]
fn identities_that_do_not_fit_a_vni_stay_here() {
    Node::check(|node| {
        let key = EndpointKey {
            address: address("10.1.0.5"),
        };
        let endpoint = node.datapath.tables().endpoints.lookup(&key).unwrap().unwrap();
        for identity in [0, 0x0100_0001] {
            node.datapath
                .tables()
                .endpoints
                .put(&key, &Endpoint { identity, ..endpoint })
                .unwrap();
            let frame = udp(POD_MAC, "10.1.0.5", "10.2.0.7");
            node.row(
                PacketHook::FromContainer,
                "remote",
                &frame,
                DROP,
                DropReason::InvalidVni,
            );
        }
        assert_eq!(endpoint.flags & endpoint_flag::HOST, 0);
    });
}

#[test]
fn to_overlay() {
    use DropReason::*;
    Node::check(|node| {
        let rows: [(&str, Vec<u8>, u32, DropReason); 5] = [
            (
                "to a remote pod",
                udp(HOST_MAC, "10.1.0.1", "10.2.0.7"),
                PASS,
                Forwarded,
            ),
            (
                "to a remote pod, IPv6",
                udp(HOST_MAC, "fd01::1", "fd02::7"),
                PASS,
                Forwarded,
            ),
            (
                "to an address of no node",
                udp(HOST_MAC, "10.1.0.1", "10.3.0.7"),
                DROP,
                NoTunnelEndpoint,
            ),
            (
                "to where nobody answers",
                udp(HOST_MAC, "10.1.0.1", "10.2.0.99"),
                DROP,
                Unroutable,
            ),
            (
                "ARP",
                ethernet(HOST_MAC, [0x08, 0x06], &[0; 28]),
                DROP,
                UnsupportedProtocol,
            ),
        ];
        for (what, frame, verdict, reason) in rows {
            node.row(PacketHook::ToOverlay, what, &frame, verdict, reason);
        }
    });
}

#[test]
fn from_overlay_wants_tunnel_data() {
    Node::check(|node| {
        let frame = udp(HOST_MAC, "10.2.0.7", "10.1.0.5");
        node.row(
            PacketHook::FromOverlay,
            "plain",
            &frame,
            DROP,
            DropReason::NoTunnelKey,
        );
    });
}
