//! A node of a cluster.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{ClusterId, ClusterName, NumericIdentity};

/// A node of a cluster, as every cluster of the mesh sees it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Node {
    /// Kubernetes name, unique in its cluster.
    pub name: String,
    /// Cluster it belongs to.
    pub cluster: ClusterName,
    /// The ID of that cluster.
    pub cluster_id: ClusterId,
    /// Internal addresses: tunnel endpoints. First of a family is used.
    pub internal_ips: Vec<IpAddr>,
    /// Addresses known outside.
    pub external_ips: Vec<IpAddr>,
    /// The node's own addresses inside the pod network (`CiliumInternalIP`): at most one of a family.
    pub router_ips: Vec<IpAddr>,
    /// IPv4 pod CIDR.
    pub ipv4_alloc_cidr: Option<Ipv4Net>,
    /// IPv6 pod CIDR.
    pub ipv6_alloc_cidr: Option<Ipv6Net>,
    /// IPv4 address of the health endpoint.
    pub ipv4_health_ip: Option<Ipv4Addr>,
    /// IPv6 address of the health endpoint.
    pub ipv6_health_ip: Option<Ipv6Addr>,
    /// Encryption key index; 0 = do not encrypt to this node, 255 = WireGuard.
    pub encryption_key: u8,
    /// Kubernetes labels.
    pub labels: BTreeMap<String, String>,
    /// Kubernetes annotations that others need.
    pub annotations: BTreeMap<String, String>,
    /// Identity of the node.
    pub identity: NumericIdentity,
    /// WireGuard public key, base64; empty if none.
    pub wireguard_public_key: String,
    /// The kernel's boot ID, empty if unknown.
    pub boot_id: String,
}

impl Node {
    /// The address that other nodes send to: internal before external, IPv4 before IPv6.
    pub fn tunnel_endpoint(&self) -> Option<IpAddr> {
        let pick = |list: &[IpAddr]| list.iter().find(|ip| ip.is_ipv4()).or(list.first()).copied();
        pick(&self.internal_ips).or_else(|| pick(&self.external_ips))
    }

    /// Both pod CIDRs.
    pub fn alloc_cidrs(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.ipv4_alloc_cidr
            .map(IpNet::V4)
            .into_iter()
            .chain(self.ipv6_alloc_cidr.map(IpNet::V6))
    }

    /// The router address of a pod CIDR: its first usable address. The node owns it and IPAM never hands it out.
    pub fn router_ip_of(cidr: IpNet) -> Option<IpAddr> {
        let second = match cidr.network() {
            IpAddr::V4(ip) => IpAddr::V4(Ipv4Addr::from(u32::from(ip).checked_add(1)?)),
            IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from(u128::from(ip).checked_add(1)?)),
        };
        cidr.contains(&second).then_some(second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn router_ip_is_the_first_usable_address() {
        let ip = |cidr: &str| Node::router_ip_of(cidr.parse().unwrap()).map(|ip| ip.to_string());
        assert_eq!(ip("10.1.2.0/24").as_deref(), Some("10.1.2.1"));
        assert_eq!(ip("fd00:10:1:2::/64").as_deref(), Some("fd00:10:1:2::1"));
        assert_eq!(ip("10.1.2.3/32"), None);
        assert_eq!(ip("255.255.255.255/32"), None);
    }
}
