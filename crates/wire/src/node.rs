//! Node JSON: `cilium/state/nodes/v1/<c>/<n>`. Field names are the Go names; nothing is omitted when empty.
//!
//! Source: Cilium's `pkg/node/types/node.go`. Health and ingress addresses are accepted both as text and as `{"Type","IP"}`.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use isthmus_model::{ClusterId, ClusterName, Node, NumericIdentity};
use serde::{Deserialize, Serialize};

use crate::{
    ip::{decode_mask, encode_mask, parse_ip},
    refusal::{Refusal, VALUE_LEN_MAX},
    service::check_owner,
};

/// Most addresses of one node.
const ADDRESSES_MAX: usize = 64;

#[derive(Deserialize, Serialize)]
struct AddressJson {
    #[serde(rename = "Type", default)]
    kind: String,
    #[serde(rename = "IP", default)]
    ip: String,
}

#[derive(Deserialize, Serialize)]
struct CidrJson {
    #[serde(rename = "IP")]
    ip: String,
    #[serde(rename = "Mask")]
    mask: String,
}

/// An address field: text in every release, an object in one stored branch.
#[derive(Deserialize, Serialize)]
#[serde(untagged)]
enum IpField {
    Text(String),
    Object(AddressJson),
}

impl Default for IpField {
    fn default() -> Self {
        Self::Text(String::new())
    }
}

impl IpField {
    fn text(&self) -> &str {
        match self {
            Self::Text(text) => text,
            Self::Object(address) => &address.ip,
        }
    }

    fn of(ip: Option<impl ToString>) -> Self {
        Self::Text(ip.map(|ip| ip.to_string()).unwrap_or_default())
    }
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "PascalCase", default)]
#[derive(Default)]
struct NodeJson {
    name: String,
    cluster: String,
    #[serde(rename = "IPAddresses")]
    ip_addresses: Option<Vec<AddressJson>>,
    #[serde(rename = "IPv4AllocCIDR")]
    ipv4_alloc_cidr: Option<CidrJson>,
    #[serde(rename = "IPv4SecondaryAllocCIDRs")]
    ipv4_secondary: Option<Vec<CidrJson>>,
    #[serde(rename = "IPv6AllocCIDR")]
    ipv6_alloc_cidr: Option<CidrJson>,
    #[serde(rename = "IPv6SecondaryAllocCIDRs")]
    ipv6_secondary: Option<Vec<CidrJson>>,
    #[serde(rename = "IPv4HealthIP")]
    ipv4_health_ip: Option<IpField>,
    #[serde(rename = "IPv6HealthIP")]
    ipv6_health_ip: Option<IpField>,
    #[serde(rename = "IPv4IngressIP")]
    ipv4_ingress_ip: Option<IpField>,
    #[serde(rename = "IPv6IngressIP")]
    ipv6_ingress_ip: Option<IpField>,
    #[serde(rename = "ClusterID")]
    cluster_id: u32,
    source: String,
    encryption_key: u8,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
    node_identity: u32,
    wireguard_pub_key: String,
    #[serde(rename = "BootID")]
    boot_id: String,
}

/// Writes a node.
pub fn encode(node: &Node) -> Vec<u8> {
    let typed = |kind: &'static str, ips: &[IpAddr]| {
        ips.iter()
            .map(|ip| AddressJson {
                kind: kind.to_owned(),
                ip: ip.to_string(),
            })
            .collect::<Vec<_>>()
    };
    let cidr = |cidr: IpNet| CidrJson {
        ip: cidr.network().to_string(),
        mask: encode_mask(cidr),
    };
    let mut addresses = typed("InternalIP", &node.internal_ips);
    addresses.extend(typed("ExternalIP", &node.external_ips));
    addresses.extend(typed("CiliumInternalIP", &node.router_ips));
    crate::json(&NodeJson {
        name: node.name.clone(),
        cluster: node.cluster.to_string(),
        ip_addresses: Some(addresses),
        ipv4_alloc_cidr: node.ipv4_alloc_cidr.map(|net| cidr(net.into())),
        ipv4_secondary: None,
        ipv6_alloc_cidr: node.ipv6_alloc_cidr.map(|net| cidr(net.into())),
        ipv6_secondary: None,
        ipv4_health_ip: Some(IpField::of(node.ipv4_health_ip)),
        ipv6_health_ip: Some(IpField::of(node.ipv6_health_ip)),
        ipv4_ingress_ip: Some(IpField::default()),
        ipv6_ingress_ip: Some(IpField::default()),
        cluster_id: node.cluster_id.get().into(),
        source: "local".to_owned(),
        encryption_key: node.encryption_key,
        labels: Some(node.labels.clone()),
        annotations: Some(node.annotations.clone()),
        node_identity: node.identity.0,
        wireguard_pub_key: node.wireguard_public_key.clone(),
        boot_id: node.boot_id.clone(),
    })
}

/// Reads the node of key suffix `suffix` (its name), published by `cluster`.
pub fn decode(
    suffix: &str,
    value: &[u8],
    cluster: &ClusterName,
    cluster_id: ClusterId,
) -> Result<Node, Refusal> {
    Refusal::check_len(value, VALUE_LEN_MAX)?;
    let json: NodeJson = serde_json::from_slice(value).map_err(Refusal::Json)?;
    if json.name.is_empty() {
        return Err(Refusal::Missing("Name"));
    }
    check_owner(&json.cluster, json.cluster_id, cluster, cluster_id)?;
    if json.name != suffix {
        return Err(Refusal::WrongName {
            got: crate::refusal::shorten(&json.name),
            want: crate::refusal::shorten(suffix),
        });
    }
    let addresses = json.ip_addresses.unwrap_or_default();
    if addresses.len() > ADDRESSES_MAX {
        return Err(Refusal::TooMany {
            what: "IPAddresses",
            len: addresses.len(),
            limit: ADDRESSES_MAX,
        });
    }
    let (mut internal_ips, mut external_ips, mut router_ips) = (vec![], vec![], vec![]);
    for address in &addresses {
        let list = match address.kind.as_str() {
            "InternalIP" => &mut internal_ips,
            "CiliumInternalIP" => &mut router_ips,
            "ExternalIP" => &mut external_ips,
            // Host names and the like; Cilium's readers use no others either.
            _ => continue,
        };
        list.push(parse_ip("IPAddresses", &address.ip)?);
    }
    Ok(Node {
        name: json.name,
        cluster: cluster.clone(),
        cluster_id,
        internal_ips,
        external_ips,
        router_ips,
        ipv4_alloc_cidr: match cidr("IPv4AllocCIDR", json.ipv4_alloc_cidr)? {
            None => None,
            Some(IpNet::V4(net)) => Some(net),
            Some(IpNet::V6(net)) => return Err(Refusal::malformed("IPv4AllocCIDR", &net.to_string())),
        },
        ipv6_alloc_cidr: match cidr("IPv6AllocCIDR", json.ipv6_alloc_cidr)? {
            None => None,
            Some(IpNet::V6(net)) => Some(net),
            Some(IpNet::V4(net)) => return Err(Refusal::malformed("IPv6AllocCIDR", &net.to_string())),
        },
        ipv4_health_ip: match address("IPv4HealthIP", json.ipv4_health_ip)? {
            Some(IpAddr::V4(ip)) => Some::<Ipv4Addr>(ip),
            _ => None,
        },
        ipv6_health_ip: match address("IPv6HealthIP", json.ipv6_health_ip)? {
            Some(IpAddr::V6(ip)) => Some::<Ipv6Addr>(ip),
            _ => None,
        },
        encryption_key: json.encryption_key,
        labels: json.labels.unwrap_or_default(),
        annotations: json.annotations.unwrap_or_default(),
        identity: NumericIdentity(json.node_identity),
        wireguard_public_key: json.wireguard_pub_key,
        boot_id: json.boot_id,
    })
}

/// Addresses in a node's value that [`Node`] has no place for and Cilium's readers use: secondary pod CIDRs, ingress addresses.
pub fn other_addresses(value: &[u8]) -> Result<Vec<IpNet>, Refusal> {
    Refusal::check_len(value, VALUE_LEN_MAX)?;
    let json: NodeJson = serde_json::from_slice(value).map_err(Refusal::Json)?;
    let mut all = Vec::new();
    for (what, list) in [
        ("IPv4SecondaryAllocCIDRs", json.ipv4_secondary),
        ("IPv6SecondaryAllocCIDRs", json.ipv6_secondary),
    ] {
        for secondary in list.unwrap_or_default() {
            all.extend(cidr(what, Some(secondary))?);
        }
    }
    for (what, field) in [
        ("IPv4IngressIP", json.ipv4_ingress_ip),
        ("IPv6IngressIP", json.ipv6_ingress_ip),
    ] {
        all.extend(address(what, field)?.map(IpNet::from));
    }
    Ok(all)
}

fn cidr(what: &'static str, json: Option<CidrJson>) -> Result<Option<IpNet>, Refusal> {
    let Some(json) = json else { return Ok(None) };
    let ip = parse_ip(what, &json.ip)?;
    let len = decode_mask(&json.mask, ip)?;
    let net = IpNet::new(ip, len).map_err(|_| Refusal::malformed(what, &json.ip))?;
    Ok(Some(net.trunc()))
}

fn address(what: &'static str, field: Option<IpField>) -> Result<Option<IpAddr>, Refusal> {
    match field.as_ref().map(IpField::text) {
        None | Some("") => Ok(None),
        Some(text) => parse_ip(what, text).map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use isthmus_model::MaxConnectedClusters;
    use proptest::prelude::*;

    fn c1() -> (ClusterName, ClusterId) {
        (
            ClusterName::new("c1").unwrap(),
            ClusterId::new(1, MaxConnectedClusters::C255).unwrap(),
        )
    }

    fn node() -> Node {
        let (cluster, cluster_id) = c1();
        Node {
            name: "n1".into(),
            cluster,
            cluster_id,
            internal_ips: vec!["172.18.0.3".parse().unwrap()],
            external_ips: vec![],
            router_ips: vec!["10.1.0.1".parse().unwrap()],
            ipv4_alloc_cidr: Some("10.1.0.0/24".parse().unwrap()),
            ipv6_alloc_cidr: Some("fd00:10:1::/64".parse().unwrap()),
            ipv4_health_ip: None,
            ipv6_health_ip: None,
            encryption_key: 0,
            labels: BTreeMap::from([("a".into(), "b".into())]),
            annotations: BTreeMap::new(),
            identity: NumericIdentity::REMOTE_NODE,
            wireguard_public_key: String::new(),
            boot_id: "6f1e".into(),
        }
    }

    #[test]
    fn decode_reverses_encode() {
        let (cluster, id) = c1();
        let text = encode(&node());
        assert!(
            String::from_utf8_lossy(&text).contains(r#""IPv4AllocCIDR":{"IP":"10.1.0.0","Mask":"////AA=="}"#)
        );
        assert_eq!(decode("n1", &text, &cluster, id).unwrap(), node());
    }

    #[test]
    fn bad_nodes_are_refused_with_their_reason() {
        let (cluster, id) = c1();
        let text = String::from_utf8(encode(&node())).unwrap();
        let check = |text: &str| decode("n1", text.as_bytes(), &cluster, id).map_err(|e| e.reason());
        for (from, to, reason) in [
            ("\"Cluster\":\"c1\"", "\"Cluster\":\"c2\"", "wrong_cluster"),
            ("\"ClusterID\":1", "\"ClusterID\":9", "wrong_cluster_id"),
            ("\"Name\":\"n1\"", "\"Name\":\"n2\"", "wrong_name"),
            ("172.18.0.3", "172.18.0.333", "malformed_field"),
            ("////AA==", "!!", "malformed_field"),
            ("\"EncryptionKey\":0", "\"EncryptionKey\":256", "malformed"),
        ] {
            assert_eq!(
                check(&text.replace(from, to)).unwrap_err(),
                reason,
                "{from} -> {to}"
            );
        }
        let object = text.replace(
            "\"IPv4HealthIP\":\"\"",
            "\"IPv4HealthIP\":{\"Type\":\"x\",\"IP\":\"10.1.0.9\"}",
        );
        assert_eq!(
            check(&object).unwrap().ipv4_health_ip,
            Some("10.1.0.9".parse().unwrap())
        );
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let (cluster, id) = c1();
            let _ = decode("n1", &bytes, &cluster, id);
        }
    }
}
