//! IPIdentityPair JSON: `cilium/state/ip/v1/default/<ip>`.
//!
//! Source: Cilium's `pkg/identity/identity.go` and `pkg/ipcache/kvstore.go`. A mask of null is a single address.

use std::net::IpAddr;

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use ipnet::IpNet;
use isthmus_model::{IdentityRange, IpEntry, NamedPort, NumericIdentity};
use serde::{Deserialize, Serialize};

use crate::refusal::{Refusal, VALUE_LEN_MAX};

/// Most named ports of one entry.
const NAMED_PORTS_MAX: usize = 256;

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "PascalCase")]
struct PairJson {
    #[serde(rename = "IP", default)]
    ip: String,
    #[serde(default)]
    mask: Option<String>,
    #[serde(rename = "HostIP", default)]
    host_ip: String,
    #[serde(rename = "ID", default)]
    id: u32,
    #[serde(default)]
    key: u8,
    #[serde(default)]
    metadata: String,
    #[serde(rename = "K8sNamespace", default, skip_serializing_if = "String::is_empty")]
    namespace: String,
    #[serde(rename = "K8sPodName", default, skip_serializing_if = "String::is_empty")]
    pod_name: String,
    #[serde(
        rename = "K8sServiceAccount",
        default,
        skip_serializing_if = "String::is_empty"
    )]
    service_account: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    named_ports: Option<Vec<NamedPortJson>>,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "PascalCase")]
struct NamedPortJson {
    name: String,
    port: u16,
    protocol: String,
}

/// Last part of the key: the address, or `address/len` for a prefix.
pub fn key_suffix(prefix: IpNet) -> String {
    if prefix.prefix_len() == prefix.max_prefix_len() {
        prefix.addr().to_string()
    } else {
        prefix.to_string()
    }
}

/// Writes an entry.
pub fn encode(entry: &IpEntry) -> Vec<u8> {
    let named_ports = entry.named_ports.iter().map(|port| NamedPortJson {
        name: port.name.clone(),
        port: port.port,
        protocol: port.protocol.as_str().to_owned(),
    });
    crate::json(&PairJson {
        ip: entry.prefix.network().to_string(),
        mask: (entry.prefix.prefix_len() != entry.prefix.max_prefix_len()).then(|| encode_mask(entry.prefix)),
        host_ip: entry.host_ip.map(|ip| ip.to_string()).unwrap_or_default(),
        id: entry.identity.0,
        key: entry.encryption_key,
        metadata: String::new(),
        namespace: entry.namespace.clone(),
        pod_name: entry.pod_name.clone(),
        service_account: entry.service_account.clone(),
        named_ports: (!entry.named_ports.is_empty()).then(|| named_ports.collect()),
    })
}

/// Reads the entry of key suffix `suffix`. `range` is the publishing cluster's identity range.
/// The reader's rule for identity 1 (host) is applied here: it becomes 6 (remote-node).
pub fn decode(suffix: &str, value: &[u8], range: IdentityRange) -> Result<IpEntry, Refusal> {
    Refusal::check_len(value, VALUE_LEN_MAX)?;
    let json: PairJson = serde_json::from_slice(value).map_err(Refusal::Json)?;
    if json.ip.is_empty() {
        return Err(Refusal::Missing("IP"));
    }
    let ip = parse_ip("IP", &json.ip)?;
    let prefix = match &json.mask {
        None => IpNet::from(ip),
        Some(mask) => {
            let len = decode_mask(mask, ip)?;
            IpNet::new(ip, len)
                .map_err(|_| Refusal::malformed("Mask", mask))?
                .trunc()
        }
    };
    if key_suffix(prefix) != suffix {
        return Err(Refusal::WrongName {
            got: key_suffix(prefix),
            want: crate::refusal::shorten(suffix),
        });
    }
    let identity = NumericIdentity(json.id);
    if !identity.is_reserved() && !range.contains(identity) {
        return Err(Refusal::IdentityRange(json.id));
    }
    let ports = json.named_ports.unwrap_or_default();
    if ports.len() > NAMED_PORTS_MAX {
        return Err(Refusal::TooMany {
            what: "NamedPorts",
            len: ports.len(),
            limit: NAMED_PORTS_MAX,
        });
    }
    let named_ports = ports.into_iter().map(|port| {
        let protocol = port
            .protocol
            .parse()
            .map_err(|_| Refusal::malformed("NamedPorts.Protocol", &port.protocol))?;
        Ok(NamedPort {
            name: port.name,
            port: port.port,
            protocol,
        })
    });
    Ok(IpEntry {
        prefix,
        host_ip: if json.host_ip.is_empty() {
            None
        } else {
            Some(parse_ip("HostIP", &json.host_ip)?)
        },
        identity: if identity == NumericIdentity::HOST {
            NumericIdentity::REMOTE_NODE
        } else {
            identity
        },
        encryption_key: json.key,
        namespace: json.namespace,
        pod_name: json.pod_name,
        service_account: json.service_account,
        named_ports: named_ports.collect::<Result<_, Refusal>>()?,
    })
}

/// Reads an address. Zones are refused; a v4-mapped IPv6 address becomes the IPv4 address, as Go prints it.
pub(crate) fn parse_ip(what: &'static str, text: &str) -> Result<IpAddr, Refusal> {
    text.parse::<IpAddr>()
        .map(|ip| ip.to_canonical())
        .map_err(|_| Refusal::malformed(what, text))
}

/// Base64 of the mask's bytes, as Go writes a `net.IPMask`.
pub(crate) fn encode_mask(prefix: IpNet) -> String {
    match prefix.netmask() {
        IpAddr::V4(mask) => BASE64.encode(mask.octets()),
        IpAddr::V6(mask) => BASE64.encode(mask.octets()),
    }
}

/// Prefix length of a base64 mask that fits `ip`'s family.
pub(crate) fn decode_mask(text: &str, ip: IpAddr) -> Result<u8, Refusal> {
    let malformed = || Refusal::malformed("Mask", text);
    if text.len() > 64 {
        return Err(malformed());
    }
    let bytes = BASE64.decode(text).map_err(|_| malformed())?;
    let mask = match ip {
        IpAddr::V4(_) => IpAddr::from(<[u8; 4]>::try_from(bytes.as_slice()).map_err(|_| malformed())?),
        IpAddr::V6(_) => IpAddr::from(<[u8; 16]>::try_from(bytes.as_slice()).map_err(|_| malformed())?),
    };
    ipnet::ip_mask_to_prefix(mask).map_err(|_| malformed())
}

#[cfg(test)]
mod tests {
    use super::*;
    use isthmus_model::{ClusterId, MaxConnectedClusters};
    use proptest::prelude::*;

    fn range() -> IdentityRange {
        let max = MaxConnectedClusters::C255;
        IdentityRange::of(ClusterId::new(1, max).unwrap(), max)
    }

    #[test]
    fn reads_and_writes_ciliums_example() {
        let text = r#"{"IP":"10.1.0.21","Mask":null,"HostIP":"172.18.0.3","ID":65553,"Key":0,"Metadata":"","K8sNamespace":"shop","K8sPodName":"cart-0"}"#;
        let entry = decode("10.1.0.21", text.as_bytes(), range()).unwrap();
        assert_eq!(entry.pod_name, "cart-0");
        assert_eq!(String::from_utf8(encode(&entry)).unwrap(), text);
    }

    #[test]
    fn masks_agree_with_the_vectors() {
        for (cidr, mask) in [("10.0.0.0/24", "////AA=="), ("10.0.0.0/16", "//8AAA==")] {
            let cidr: IpNet = cidr.parse().unwrap();
            assert_eq!(encode_mask(cidr), mask);
            assert_eq!(decode_mask(mask, cidr.addr()).unwrap(), cidr.prefix_len());
        }
        assert!(
            decode_mask("/wD/AA==", "10.0.0.0".parse().unwrap()).is_err(),
            "holes"
        );
    }

    #[test]
    fn bad_entries_are_refused_with_their_reason() {
        let check = |suffix, text: &str| decode(suffix, text.as_bytes(), range()).map_err(|e| e.reason());
        assert_eq!(check("x", r#"{"IP":"","ID":2}"#).unwrap_err(), "missing_field");
        assert_eq!(
            check("10.1.0.1", r#"{"IP":"10.1.0.2","ID":2}"#).unwrap_err(),
            "wrong_name"
        );
        assert_eq!(
            check("10.1.0.1", r#"{"IP":"10.1.0.1","ID":131072}"#).unwrap_err(),
            "identity_range"
        );
        assert_eq!(
            check("fe80::1%eth0", r#"{"IP":"fe80::1%eth0","ID":2}"#).unwrap_err(),
            "malformed_field"
        );
        assert_eq!(check("10.1.0.1", "{").unwrap_err(), "malformed");
        assert_eq!(
            check("10.1.0.1", r#"{"IP":"10.1.0.1","ID":1}"#).unwrap().identity,
            NumericIdentity::REMOTE_NODE
        );
    }

    proptest! {
        #[test]
        fn decode_reverses_encode(address in any::<[u8; 16]>(), v4 in any::<bool>(), len in 0u8..=128, id in 65_536u32..131_072, key in any::<u8>()) {
            let prefix = if v4 {
                IpNet::new(IpAddr::from(<[u8; 4]>::try_from(&address[..4]).unwrap()), len % 33).unwrap()
            } else {
                IpNet::new(IpAddr::from(address), len).unwrap()
            };
            // A v4-mapped IPv6 prefix prints as IPv4; it is not what anybody publishes.
            prop_assume!(prefix.network() == prefix.network().to_canonical());
            let entry = IpEntry {
                prefix: prefix.trunc(), host_ip: None, identity: NumericIdentity(id), encryption_key: key,
                namespace: "a".into(), pod_name: String::new(), service_account: String::new(), named_ports: vec![],
            };
            prop_assert_eq!(decode(&key_suffix(entry.prefix), &encode(&entry), range()).unwrap(), entry);
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode("10.1.0.1", &bytes, range());
        }
    }
}
