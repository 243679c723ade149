//! Nodes and pods as network namespaces: plain ones, as peers use, and ones with our datapath, alone or joined by VXLAN.
//!
//! Node n has the underlay address 192.0.2.n and two pods: a client with the addresses 10.n.0.64 to .127 and a server with
//! 10.n.0.32 to .36. Both kinds of nodes have the same veth pairs, routes and settings; what differs is the programs and maps.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
    path::Path,
};

use anyhow::{Context, Result, ensure};
use isthmus_bpf_abi::{
    Endpoint, EndpointKey, IDENTITY_REMOTE_NODE, IpcacheKey, IpcacheValue, NodeConfig, feature, ipcache_flag,
    ipv4_mapped,
};
use isthmus_datapath::{
    Datapath, MapOp, device,
    routes::{self, Route},
};

use super::{Lab, in_namespace, ip, run, sysctl};

/// Addresses of a client pod.
const CLIENT: std::ops::RangeInclusive<u8> = 64..=127;
/// Addresses of a server pod, which are as many backends.
const SERVER: std::ops::RangeInclusive<u8> = 32..=36;
const VXLAN_PORT: u16 = 8472;
/// Of pods: what fits into VXLAN over 1,500.
const MTU: u32 = 1500 - device::OVERHEAD_IPV4;

/// A pod.
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// Its addresses.
    pub addresses: Vec<Ipv4Addr>,
    ifindex: u32,
    pod_mac: [u8; 6],
    host_mac: [u8; 6],
}

/// A node.
pub struct Node {
    /// Its namespace.
    pub namespace: String,
    /// Its first pod.
    pub client: Pod,
    /// Its second.
    pub server: Pod,
}

impl Node {
    /// A node without programs.
    pub fn plain(lab: &Lab, name: &str, number: u8) -> Result<Self> {
        let namespace = lab.namespace(name)?;
        sysctl(
            &namespace,
            &[
                ("ipv4/ip_forward", "1"),
                ("ipv4/conf/all/rp_filter", "0"),
                ("ipv4/conf/default/rp_filter", "0"),
            ],
        )?;
        ip(&namespace, &format!("address add 10.{number}.0.1/32 dev lo\n"))?;
        Ok(Self {
            client: pod(lab, &namespace, &format!("{name}c"), "pod0", number, CLIENT)?,
            server: pod(lab, &namespace, &format!("{name}s"), "pod1", number, SERVER)?,
            namespace,
        })
    }
}

/// A node with our datapath.
pub struct IsthmusNode {
    /// The node.
    pub node: Node,
    /// Its datapath.
    pub datapath: Datapath,
}

impl IsthmusNode {
    /// A node alone; processes in `cgroup` have the socket hooks, on all nodes.
    pub fn alone(lab: &Lab, cgroup: &Path) -> Result<Self> {
        let node = Node::plain(lab, "own", 1)?;
        Self::equip(lab, node, 1, cgroup, 0, vec![])
    }

    /// Two nodes, each other's pods behind VXLAN.
    pub fn pair(lab: &Lab, cgroup: &Path) -> Result<[Self; 2]> {
        let nodes = [Node::plain(lab, "one", 1)?, Node::plain(lab, "two", 2)?];
        run(&[
            "ip",
            "-n",
            &nodes[0].namespace,
            "link",
            "add",
            "eth0",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            &nodes[1].namespace,
        ])?;
        for (number, node) in (1..).zip(&nodes) {
            ip(
                &node.namespace,
                &format!("address add 192.0.2.{number}/24 dev eth0\nlink set eth0 up\n"),
            )?;
        }
        let [one, two] = nodes;
        Ok([
            Self::joined(lab, one, 1, cgroup)?,
            Self::joined(lab, two, 2, cgroup)?,
        ])
    }

    fn joined(lab: &Lab, node: Node, number: u8, cgroup: &Path) -> Result<Self> {
        let other = 3 - number;
        // The device that the agent makes wants the router's address for itself.
        ip(
            &node.namespace,
            &format!("address del 10.{number}.0.1/32 dev lo\n"),
        )?;
        let vxlan = in_namespace(&node.namespace, || overlay(number, other))?;
        let remote = IpcacheValue::tunnel(
            2,
            ipv4_mapped([192, 0, 2, other]),
            0,
            ipcache_flag::REMOTE_CLUSTER,
        );
        let route = MapOp::IpcachePut(IpcacheKey::ipv4([10, other, 0, 0], 24), remote);
        Self::equip(lab, node, number, cgroup, vxlan, vec![route])
    }

    fn equip(
        lab: &Lab,
        node: Node,
        number: u8,
        cgroup: &Path,
        vxlan_ifindex: u32,
        mut operations: Vec<MapOp>,
    ) -> Result<Self> {
        let config = lab.datapath_config(&format!("bpf{number}"), cgroup)?;
        let datapath = in_namespace(&node.namespace, || Ok(Datapath::open(&config)?))?;
        datapath.tables().set_node_config(&NodeConfig {
            node_ipv4: ipv4_mapped([192, 0, 2, number]),
            router_ipv4: ipv4_mapped([10, number, 0, 1]),
            vxlan_ifindex,
            node_identity: IDENTITY_REMOTE_NODE,
            cluster_id: number.into(),
            features: feature::SOURCE_CHECK | feature::PACKET_LB,
            ..NodeConfig::default()
        })?;
        let pods = [(1, &node.client), (2, &node.server)];
        in_namespace(&node.namespace, || {
            if vxlan_ifindex != 0 {
                datapath.attach_overlay(vxlan_ifindex)?;
            }
            for (_, pod) in pods {
                datapath.attach_endpoint(pod.ifindex)?;
            }
            Ok(())
        })?;
        for (id, pod) in pods {
            let endpoint = Endpoint {
                ifindex: pod.ifindex,
                endpoint_id: id,
                identity: u32::from(number) * 65_536 + id,
                flags: 0,
                pod_mac: pod.pod_mac,
                host_mac: pod.host_mac,
            };
            operations.extend(pod.addresses.iter().map(|address| {
                let address = ipv4_mapped(address.octets());
                MapOp::EndpointPut(EndpointKey { address }, endpoint)
            }));
        }
        let report = datapath.apply(&operations);
        ensure!(report.is_complete(), "endpoints: {:?}", report.failed);
        Ok(Self { node, datapath })
    }
}

/// The VXLAN device and the route to the other node's pods, as the agent makes them. Returns the device's index.
fn overlay(number: u8, other: u8) -> Result<u32> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let (connection, netlink, _) = rtnetlink::new_connection().context("netlink")?;
        let task = tokio::spawn(connection);
        let router = IpAddr::from([10, number, 0, 1]);
        let config = device::VxlanConfig {
            port: VXLAN_PORT,
            mtu: MTU,
            router_ips: vec![router],
        };
        let ifindex = device::ensure_vxlan(&netlink, &config).await?;
        let desired = BTreeSet::from([Route {
            destination: IpAddr::from([10, other, 0, 0]),
            prefix_len: 24,
            ifindex,
            source: Some(router),
        }]);
        let plan = routes::plan(&routes::dump(&netlink).await?, &desired);
        let errors = routes::apply(&netlink, &plan).await;
        task.abort();
        ensure!(errors.is_empty(), "routes: {errors:?}");
        Ok(ifindex)
    })
}

/// A pod, as a CNI plugin makes it; neighbours are known on both sides.
fn pod(
    lab: &Lab,
    node: &str,
    name: &str,
    device: &str,
    number: u8,
    hosts: std::ops::RangeInclusive<u8>,
) -> Result<Pod> {
    let pod = lab.namespace(name)?;
    let mtu = MTU.to_string();
    run(&[
        "ip", "-n", node, "link", "add", device, "mtu", &mtu, "type", "veth", "peer", "name", "eth0", "mtu",
        &mtu, "netns", &pod,
    ])?;
    sysctl(
        &pod,
        &[
            ("ipv4/ip_local_port_range", "1024 65535"),
            ("core/somaxconn", "65535"),
        ],
    )?;
    let addresses: Vec<Ipv4Addr> = hosts.map(|host| Ipv4Addr::new(10, number, 0, host)).collect();
    let list = |line: &dyn Fn(&Ipv4Addr) -> String| addresses.iter().map(line).collect::<String>();
    ip(
        &pod,
        &(list(&|address| format!("address add {address}/32 dev eth0\n")) + "link set eth0 up\n"),
    )?;
    ip(node, &format!("link set {device} up\n"))?;
    let (pod_mac, host_mac) = (mac(&pod, "eth0")?, mac(node, device)?);
    let router = format!("10.{number}.0.1");
    ip(
        &pod,
        &format!(
            "neighbour add {router} lladdr {} dev eth0 nud permanent\nroute add {router} dev eth0\nroute add default \
             via {router} dev eth0\n",
            text(host_mac)
        ),
    )?;
    ip(
        node,
        &list(&|address| {
            let mac = text(pod_mac);
            format!(
                "route add {address}/32 dev {device}\nneighbour add {address} lladdr {mac} dev {device} nud permanent\n"
            )
        }),
    )?;
    let ifindex = in_namespace(node, || Ok(nix::net::if_::if_nametoindex(device)?))?;
    Ok(Pod {
        namespace: pod,
        addresses,
        ifindex,
        pod_mac,
        host_mac,
    })
}

fn mac(namespace: &str, device: &str) -> Result<[u8; 6]> {
    let text = run(&["ip", "-n", namespace, "-o", "link", "show", device])?;
    let mac = text
        .split_whitespace()
        .skip_while(|word| *word != "link/ether")
        .nth(1)
        .with_context(|| format!("{device} has no MAC address"))?;
    parse_mac(mac).with_context(|| format!("a MAC address: {mac}"))
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).ok())
        .collect();
    bytes?.try_into().ok()
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses_are_read_as_written() {
        let mac = [2, 0, 0xab, 1, 2, 0xff];
        assert_eq!(text(mac), "02:00:ab:01:02:ff");
        assert_eq!(parse_mac(&text(mac)), Some(mac));
        assert_eq!(parse_mac("02:00"), None);
    }
}
