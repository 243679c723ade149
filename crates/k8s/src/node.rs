//! Node objects to [`Node`].
//!
//! The node's own address inside the pod network is the first usable one of each pod CIDR; the agent takes the same one.

use std::net::IpAddr;

use ipnet::IpNet;
use isthmus_model::{Node, NumericIdentity};
use k8s_openapi::api::core::v1::Node as KubeNode;

use crate::{Cluster, ConvertError, Converted, Warning, check_name, truncate};

/// Most internal, and most external, addresses: readers take 64 of all types.
const ADDRESSES_MAX: usize = 24;

/// Converts a Node.
pub fn node(object: &KubeNode, cluster: &Cluster) -> Result<Converted<Node>, ConvertError> {
    let name = check_name(object.metadata.name.as_ref())?;
    let mut warnings = vec![];
    let mut addresses = |kind: &str, field: &'static str| {
        let all = object
            .status
            .iter()
            .flat_map(|status| status.addresses.iter().flatten());
        let mut ips: Vec<IpAddr> = vec![];
        for address in all.filter(|address| address.type_ == kind) {
            match address.address.parse::<IpAddr>().map(|ip| ip.to_canonical()) {
                Ok(ip) if !ips.contains(&ip) => ips.push(ip),
                Ok(_) => {}
                Err(_) => warnings.push(Warning::field(field, &address.address)),
            }
        }
        truncate(&mut ips, field, ADDRESSES_MAX, &mut warnings);
        ips
    };
    let internal_ips = addresses("InternalIP", "InternalIP");
    let external_ips = addresses("ExternalIP", "ExternalIP");
    let (mut v4, mut v6) = (None, None);
    for text in pod_cidrs(object) {
        match text.parse::<IpNet>().map(|net| net.trunc()) {
            // The first of a family counts; Kubernetes allows no second one.
            Ok(IpNet::V4(net)) => v4 = v4.or(Some(net)),
            Ok(IpNet::V6(net)) => v6 = v6.or(Some(net)),
            Err(_) => warnings.push(Warning::field("podCIDR", text)),
        }
    }
    let mut value = Node {
        name: name.to_owned(),
        cluster: cluster.name.clone(),
        cluster_id: cluster.id,
        internal_ips,
        external_ips,
        router_ips: vec![],
        ipv4_alloc_cidr: v4,
        ipv6_alloc_cidr: v6,
        ipv4_health_ip: None,
        ipv6_health_ip: None,
        encryption_key: 0,
        labels: object.metadata.labels.clone().unwrap_or_default(),
        annotations: object
            .metadata
            .annotations
            .iter()
            .flatten()
            .filter(|(key, _)| is_ciliums(key))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect(),
        identity: NumericIdentity::REMOTE_NODE,
        wireguard_public_key: String::new(),
        boot_id: object
            .status
            .as_ref()
            .and_then(|status| status.node_info.as_ref())
            .map(|info| info.boot_id.clone())
            .unwrap_or_default(),
    };
    value.router_ips = value.alloc_cidrs().filter_map(Node::router_ip_of).collect();
    Ok(Converted { value, warnings })
}

fn pod_cidrs(object: &KubeNode) -> impl Iterator<Item = &str> {
    let spec = object.spec.as_ref();
    let many = spec
        .and_then(|spec| spec.pod_cidrs.as_ref())
        .filter(|list| !list.is_empty());
    let one = spec
        .and_then(|spec| spec.pod_cidr.as_ref())
        .filter(|_| many.is_none());
    many.into_iter().flatten().chain(one).map(String::as_str)
}

/// Only annotations of the domain `cilium.io` travel; others may be large and change often.
fn is_ciliums(key: &str) -> bool {
    key.split_once('/')
        .is_some_and(|(domain, _)| domain == "cilium.io" || domain.ends_with(".cilium.io"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use isthmus_model::{ClusterId, ClusterName, MaxConnectedClusters};
    use k8s_openapi::{
        api::core::v1::{NodeAddress, NodeSpec, NodeStatus},
        apimachinery::pkg::apis::meta::v1::ObjectMeta,
    };

    fn cluster() -> Cluster {
        Cluster {
            name: ClusterName::new("c1").unwrap(),
            id: ClusterId::new(1, MaxConnectedClusters::C255).unwrap(),
        }
    }

    fn object(addresses: &[(&str, &str)], cidrs: &[&str]) -> KubeNode {
        KubeNode {
            metadata: ObjectMeta {
                name: Some("n1".into()),
                annotations: Some(
                    [
                        ("network.cilium.io/a", "1"),
                        ("cilium.io/b", "2"),
                        ("notcilium.io/c", "3"),
                        ("d", "4"),
                    ]
                    .map(|(k, v)| (k.to_owned(), v.to_owned()))
                    .into(),
                ),
                ..Default::default()
            },
            spec: Some(NodeSpec {
                pod_cidrs: Some(cidrs.iter().map(|cidr| (*cidr).to_owned()).collect()),
                ..Default::default()
            }),
            status: Some(NodeStatus {
                addresses: Some(
                    addresses
                        .iter()
                        .map(|(kind, address)| NodeAddress {
                            type_: (*kind).to_owned(),
                            address: (*address).to_owned(),
                        })
                        .collect(),
                ),
                ..Default::default()
            }),
        }
    }

    #[test]
    fn addresses_cidrs_and_router_addresses_are_read() {
        let object = object(
            &[
                ("Hostname", "n1"),
                ("InternalIP", "172.18.0.3"),
                ("InternalIP", "fd00::3"),
                ("ExternalIP", "203.0.113.3"),
            ],
            &["10.1.2.0/24", "fd00:10:1:2::/64"],
        );
        let Converted { value, warnings } = node(&object, &cluster()).unwrap();
        assert_eq!(warnings, []);
        assert_eq!(value.tunnel_endpoint().unwrap().to_string(), "172.18.0.3");
        assert_eq!(value.external_ips.len(), 1);
        let routers: Vec<_> = value.router_ips.iter().map(ToString::to_string).collect();
        assert_eq!(routers, ["10.1.2.1", "fd00:10:1:2::1"]);
        assert_eq!(value.identity, NumericIdentity::REMOTE_NODE);
        assert_eq!(value.annotations.len(), 2);
    }

    #[test]
    fn bad_fields_are_left_out_and_named() {
        let object = object(
            &[("InternalIP", "nowhere"), ("InternalIP", "172.18.0.3")],
            &["10.1.2.0/33", "10.1.3.7/24"],
        );
        let Converted { value, warnings } = node(&object, &cluster()).unwrap();
        assert_eq!(warnings.len(), 2);
        assert_eq!(value.ipv4_alloc_cidr.unwrap().to_string(), "10.1.3.0/24");
        assert!(node(&KubeNode::default(), &cluster()).is_err());
    }

    #[test]
    fn a_single_pod_cidr_counts_when_the_list_is_missing() {
        let mut object = object(&[], &[]);
        object.spec.as_mut().unwrap().pod_cidr = Some("10.9.0.0/24".into());
        let value = node(&object, &cluster()).unwrap().value;
        assert_eq!(value.ipv4_alloc_cidr.unwrap().to_string(), "10.9.0.0/24");
    }
}
