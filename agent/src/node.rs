//! This node in the pod network: what its node object says that the datapath needs. Pure.
//!
//! In: the own cluster's node object of this node. Out: [`LocalNode`], or why the object is not usable.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use isthmus_bpf_abi::{Endpoint, EndpointKey, IDENTITY_REMOTE_NODE, NodeConfig, feature};
use isthmus_mesh::to_address;
use isthmus_model::{ClusterId, Node, NumericIdentity};

/// The next hop of IPv4 pods: link-local, so it can clash with no pod's address. Nobody answers ARP for it; the CNI
/// plugin installs a permanent neighbour entry to the node's end of the veth pair.
pub const GATEWAY_IPV4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The same for IPv6.
pub const GATEWAY_IPV6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// What this node is in the pod network.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct LocalNode {
    /// Address of the node itself, IPv4.
    pub ipv4: Option<Ipv4Addr>,
    /// Address of the node itself, IPv6.
    pub ipv6: Option<Ipv6Addr>,
    /// Where other nodes send tunnelled packets.
    pub tunnel_endpoint: IpAddr,
    /// Pod CIDR, IPv4.
    pub ipv4_cidr: Option<Ipv4Net>,
    /// Pod CIDR, IPv6.
    pub ipv6_cidr: Option<Ipv6Net>,
    /// The node's own addresses inside the pod network: first address of each pod CIDR.
    pub router_ips: Vec<IpAddr>,
    /// All addresses of the node outside the pod network.
    pub addresses: Vec<IpAddr>,
}

/// Why a node object does not describe a node that can work.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum LocalNodeError {
    /// No address.
    #[error(
        "node object of {0:?} has no internal or external address: the Kubernetes node's status.addresses is empty"
    )]
    NoAddress(String),
    /// No pod CIDR.
    #[error("node object of {0:?} has no pod CIDR: the Kubernetes node's spec.podCIDRs is empty")]
    NoCidr(String),
}

impl LocalNode {
    /// Reads the node object.
    pub fn new(node: &Node) -> Result<Self, LocalNodeError> {
        let tunnel_endpoint = node
            .tunnel_endpoint()
            .ok_or_else(|| LocalNodeError::NoAddress(node.name.clone()))?;
        if node.ipv4_alloc_cidr.is_none() && node.ipv6_alloc_cidr.is_none() {
            return Err(LocalNodeError::NoCidr(node.name.clone()));
        }
        let addresses: Vec<IpAddr> = node
            .internal_ips
            .iter()
            .chain(&node.external_ips)
            .copied()
            .collect();
        Ok(Self {
            ipv4: addresses.iter().find_map(|ip| match ip {
                IpAddr::V4(ip) => Some(*ip),
                IpAddr::V6(_) => None,
            }),
            ipv6: addresses.iter().find_map(|ip| match ip {
                IpAddr::V6(ip) => Some(*ip),
                IpAddr::V4(_) => None,
            }),
            tunnel_endpoint,
            ipv4_cidr: node.ipv4_alloc_cidr,
            ipv6_cidr: node.ipv6_alloc_cidr,
            router_ips: node.alloc_cidrs().filter_map(Node::router_ip_of).collect(),
            addresses,
        })
    }

    /// The router address of a family.
    pub fn router_ip(&self, ipv4: bool) -> Option<IpAddr> {
        self.router_ips.iter().find(|ip| ip.is_ipv4() == ipv4).copied()
    }

    /// The programs' configuration, with these bits of [`feature`] and tables of so many entries.
    pub fn config(
        &self,
        cluster_id: ClusterId,
        vxlan_ifindex: u32,
        features: u32,
        maglev_table_size: u32,
    ) -> NodeConfig {
        let address = |ip: Option<IpAddr>| ip.map(to_address).unwrap_or_default();
        NodeConfig {
            node_ipv4: address(self.ipv4.map(IpAddr::V4)),
            node_ipv6: address(self.ipv6.map(IpAddr::V6)),
            router_ipv4: address(self.router_ip(true)),
            router_ipv6: address(self.router_ip(false)),
            vxlan_ifindex,
            node_identity: IDENTITY_REMOTE_NODE,
            features: feature::SOURCE_CHECK | features,
            cluster_id: cluster_id.get(),
            pad: 0,
            maglev_table_size,
            snat_port_min: 0,
            snat_port_max: 0,
            tunnel_port: 0,
            pad_end: 0,
        }
    }

    /// The node's own entries in the endpoints map: packets for these go to the node's stack.
    pub fn host_entries(&self) -> impl Iterator<Item = (EndpointKey, Endpoint)> + '_ {
        self.router_ips.iter().chain(&self.addresses).map(|ip| {
            let key = EndpointKey {
                address: to_address(*ip),
            };
            (key, Endpoint::host(NumericIdentity::HOST.0))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use isthmus_model::{ClusterName, MaxConnectedClusters};

    fn node() -> Node {
        Node {
            name: "n1".into(),
            cluster: ClusterName::new("c1").unwrap(),
            cluster_id: ClusterId::new(1, MaxConnectedClusters::C255).unwrap(),
            internal_ips: vec!["172.18.0.2".parse().unwrap(), "fd18::2".parse().unwrap()],
            external_ips: vec![],
            router_ips: vec![],
            ipv4_alloc_cidr: Some("10.1.2.0/24".parse().unwrap()),
            ipv6_alloc_cidr: Some("fd00:1:2::/64".parse().unwrap()),
            ipv4_health_ip: None,
            ipv6_health_ip: None,
            encryption_key: 0,
            labels: Default::default(),
            annotations: Default::default(),
            identity: NumericIdentity::REMOTE_NODE,
            wireguard_public_key: String::new(),
            boot_id: String::new(),
        }
    }

    #[test]
    fn the_node_object_gives_addresses_routers_and_config() {
        let local = LocalNode::new(&node()).unwrap();
        assert_eq!(local.router_ip(true), Some("10.1.2.1".parse().unwrap()));
        assert_eq!(local.router_ip(false), Some("fd00:1:2::1".parse().unwrap()));
        assert_eq!(local.tunnel_endpoint, "172.18.0.2".parse::<IpAddr>().unwrap());
        let config = local.config(node().cluster_id, 7, feature::PACKET_LB, 251);
        assert_eq!(config.features, feature::SOURCE_CHECK | feature::PACKET_LB);
        assert_eq!(config.router_ipv4, isthmus_bpf_abi::ipv4_mapped([10, 1, 2, 1]));
        assert_eq!((config.vxlan_ifindex, config.cluster_id), (7, 1));
        assert_eq!(local.host_entries().count(), 4);
    }

    #[test]
    fn an_object_without_address_or_cidr_says_so() {
        let mut bare = node();
        bare.internal_ips.clear();
        assert!(matches!(LocalNode::new(&bare), Err(LocalNodeError::NoAddress(_))));
        let mut bare = node();
        bare.ipv4_alloc_cidr = None;
        assert!(LocalNode::new(&bare).is_ok());
        bare.ipv6_alloc_cidr = None;
        assert!(matches!(LocalNode::new(&bare), Err(LocalNodeError::NoCidr(_))));
    }
}
