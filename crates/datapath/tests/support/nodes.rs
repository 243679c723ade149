//! Two nodes as network namespaces, joined by a veth pair as their underlay, two pods each.
//!
//! Node n (1 or 2): underlay 192.0.2.n and 2001:db8::n; pods 10.n.0.5 and 10.n.0.6, fdn::5 and fdn::6; router IPs
//! 10.n.0.1 and fdn::1. Identities are n * 65536 + 5 or 6.
#![allow(dead_code, reason = "each test target uses some of it")]

use std::{collections::BTreeSet, net::IpAddr};

use isthmus_bpf_abi::{
    Endpoint, EndpointKey, IDENTITY_REMOTE_NODE, IpcacheKey, IpcacheValue, NodeConfig, feature, ipcache_flag,
};
use isthmus_datapath::{
    Datapath, MapOp,
    device::{self, VxlanConfig},
    routes::{self, Route},
};

use crate::lab::{Lab, address, chain, ifindex, in_namespace, mac, open_in, run, with_netlink};

/// One node.
pub struct Node {
    /// 1 or 2.
    pub number: u8,
    /// Its namespace.
    pub namespace: String,
    /// Its pods' namespaces: .5 and .6.
    pub pods: [String; 2],
    /// Its datapath.
    pub datapath: Datapath,
    /// Its VXLAN device.
    pub vxlan_ifindex: u32,
}

/// Builds both. `underlay` is the other node's address as node 1 and node 2 see it: `"192.0.2."` or `"2001:db8::"`.
pub fn two(lab: &mut Lab, underlay: &str) -> [Node; 2] {
    let namespaces = ["node1", "node2"].map(|name| lab.namespace(name));
    let [first, second] = &namespaces;
    run(&[
        "ip", "-n", first, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second,
    ]);
    for (number, namespace) in (1..).zip(&namespaces) {
        for address in [format!("192.0.2.{number}/24"), format!("2001:db8::{number}/64")] {
            add_address(namespace, &address, "eth0");
        }
        run(&["ip", "-n", namespace, "link", "set", "eth0", "up"]);
    }
    let [first, second] = namespaces;
    [node(lab, 1, first, underlay), node(lab, 2, second, underlay)]
}

fn node(lab: &mut Lab, number: u8, namespace: String, underlay: &str) -> Node {
    let config = lab.datapath_config();
    let datapath = open_in(&namespace, &config);
    let other = 3 - number;
    let vxlan_ifindex = in_namespace(&namespace, || {
        with_netlink(|netlink| async move {
            let node_address: IpAddr = format!("{underlay}{number}").parse().expect("address");
            let mtu = device::overlay_mtu(&netlink, node_address).await.expect("MTU");
            let router_ips = [format!("10.{number}.0.1"), format!("fd0{number}::1")];
            let config = VxlanConfig {
                port: 8472,
                mtu,
                router_ips: router_ips.map(|ip| ip.parse().expect("IP")).to_vec(),
            };
            let ifindex = device::ensure_vxlan(&netlink, &config)
                .await
                .unwrap_or_else(|error| panic!("{}", chain(&error)));
            device::enable_forwarding().expect("forwarding");
            let desired = BTreeSet::from([
                route(
                    &format!("10.{other}.0.0"),
                    24,
                    ifindex,
                    Some(&format!("10.{number}.0.1")),
                ),
                route(
                    &format!("fd0{other}::"),
                    64,
                    ifindex,
                    Some(&format!("fd0{number}::1")),
                ),
            ]);
            let plan = routes::plan(&routes::dump(&netlink).await.expect("routes"), &desired);
            let errors = routes::apply(&netlink, &plan).await;
            assert!(errors.is_empty(), "{}", chain(&errors[0]));
            assert_eq!(routes::dump(&netlink).await.expect("routes"), desired);
            ifindex
        })
    });
    in_namespace(&namespace, || datapath.attach_overlay(vxlan_ifindex))
        .unwrap_or_else(|error| panic!("{}", chain(&error)));
    let remote = |identity| {
        IpcacheValue::tunnel(
            identity,
            address(&format!("{underlay}{other}")),
            0,
            ipcache_flag::REMOTE_CLUSTER,
        )
    };
    let mut ops = vec![
        MapOp::IpcachePut(IpcacheKey::ipv4([10, other, 0, 0], 24), remote(2)),
        MapOp::IpcachePut(IpcacheKey::ipv6(address(&format!("fd0{other}::")), 64), remote(2)),
    ];
    let tables = datapath.tables();
    tables
        .set_node_config(&NodeConfig {
            node_ipv4: address(&format!("192.0.2.{number}")),
            node_ipv6: address(&format!("2001:db8::{number}")),
            router_ipv4: address(&format!("10.{number}.0.1")),
            router_ipv6: address(&format!("fd0{number}::1")),
            vxlan_ifindex,
            node_identity: IDENTITY_REMOTE_NODE,
            cluster_id: number.into(),
            features: feature::SOURCE_CHECK | feature::PACKET_LB,
            ..NodeConfig::default()
        })
        .expect("configuration");
    let mtu: u32 = if underlay.contains(':') { 1430 } else { 1450 };
    let pods = [5, 6].map(|host| pod(lab, &datapath, &namespace, number, host, mtu, &mut ops));
    in_namespace(&namespace, || {
        with_netlink(|netlink| async move {
            let actual = routes::dump(&netlink).await.expect("routes");
            let mut desired = actual.clone();
            for host in [5, 6] {
                let device = nix::net::if_::if_nametoindex(format!("pod{host}").as_str()).expect("device");
                desired.insert(route(&format!("10.{number}.0.{host}"), 32, device, None));
                desired.insert(route(&format!("fd0{number}::{host}"), 128, device, None));
            }
            let errors = routes::apply(&netlink, &routes::plan(&actual, &desired)).await;
            assert!(errors.is_empty(), "{}", chain(&errors[0]));
        });
    });
    let report = datapath.apply(&ops);
    assert!(report.is_complete(), "{:?}", report.failed);
    Node {
        number,
        namespace,
        pods,
        datapath,
        vxlan_ifindex,
    }
}

/// What the CNI plugin does, and the agent at its request.
fn pod(
    lab: &mut Lab,
    datapath: &Datapath,
    node: &str,
    number: u8,
    host: u8,
    mtu: u32,
    ops: &mut Vec<MapOp>,
) -> String {
    let pod = lab.namespace(&format!("pod{number}{host}"));
    let device = format!("pod{host}");
    let mtu = mtu.to_string();
    run(&[
        "ip", "-n", node, "link", "add", &device, "mtu", &mtu, "type", "veth", "peer", "name", "eth0", "mtu",
        &mtu, "netns", &pod,
    ]);
    add_address(&pod, &format!("10.{number}.0.{host}/32"), "eth0");
    add_address(&pod, &format!("fd0{number}::{host}/128"), "eth0");
    run(&["ip", "-n", node, "link", "set", &device, "up"]);
    run(&["ip", "-n", &pod, "link", "set", "eth0", "up"]);
    let host_mac = mac(node, &device);
    let host_mac_text = host_mac.map(|byte| format!("{byte:02x}")).join(":");
    for router in [format!("10.{number}.0.1"), format!("fd0{number}::1")] {
        run(&[
            "ip",
            "-n",
            &pod,
            "neighbour",
            "add",
            &router,
            "lladdr",
            &host_mac_text,
            "dev",
            "eth0",
            "nud",
            "permanent",
        ]);
        run(&["ip", "-n", &pod, "route", "add", &router, "dev", "eth0"]);
        run(&[
            "ip", "-n", &pod, "route", "add", "default", "via", &router, "dev", "eth0",
        ]);
    }
    let ifindex = ifindex(node, &device);
    in_namespace(node, || datapath.attach_endpoint(ifindex))
        .unwrap_or_else(|error| panic!("{}", chain(&error)));
    let endpoint = Endpoint {
        ifindex,
        endpoint_id: host.into(),
        identity: u32::from(number) * 65_536 + u32::from(host),
        flags: 0,
        pod_mac: mac(&pod, "eth0"),
        host_mac,
    };
    let addresses = [format!("10.{number}.0.{host}"), format!("fd0{number}::{host}")];
    ops.extend(addresses.map(|text| {
        MapOp::EndpointPut(
            EndpointKey {
                address: address(&text),
            },
            endpoint,
        )
    }));
    pod
}

fn add_address(namespace: &str, address: &str, device: &str) {
    let mut command = vec!["ip", "-n", namespace, "address", "add", address, "dev", device];
    if address.contains(':') {
        command.push("nodad");
    }
    run(&command);
}

/// A route.
pub fn route(destination: &str, prefix_len: u8, ifindex: u32, source: Option<&str>) -> Route {
    Route {
        destination: destination.parse().expect("destination"),
        prefix_len,
        ifindex,
        source: source.map(|source| source.parse().expect("source")),
    }
}
