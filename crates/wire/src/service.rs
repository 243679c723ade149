//! Cilium's ClusterService JSON: `cilium/state/services/v1/<c>/<ns>/<name>`, one blob for a service and all its backends.
//!
//! Source: Cilium's `pkg/clustermesh/store/store.go`. Written for Cilium's readers; ours prefer [`crate::slice`].

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
};

use isthmus_model::{
    Affinity, ClusterId, ClusterName, Protocol, ServiceFrame, ServiceName, ServicePort, ServiceType,
    SessionAffinity, Slice, SliceEndpoint, SlicePort,
};
use serde::{Deserialize, Serialize};

use crate::{
    ip::parse_ip,
    refusal::{Refusal, SERVICE_JSON_LEN_MAX},
};

type PortMap = BTreeMap<String, L4AddrJson>;

#[derive(Clone, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
struct L4AddrJson {
    #[serde(rename = "Protocol", alias = "protocol")]
    protocol: String,
    #[serde(rename = "Port", alias = "port")]
    port: u16,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct ServiceJson {
    #[serde(default)]
    cluster: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    name: String,
    #[serde(default, deserialize_with = "null_as_default")]
    frontends: BTreeMap<String, PortMap>,
    #[serde(default, deserialize_with = "null_as_default")]
    backends: BTreeMap<String, PortMap>,
    #[serde(
        default,
        deserialize_with = "null_as_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    hostnames: BTreeMap<String, String>,
    #[serde(
        default,
        deserialize_with = "null_as_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    zones: BTreeMap<String, ZoneJson>,
    #[serde(default, deserialize_with = "null_as_default")]
    labels: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "null_as_default")]
    selector: BTreeMap<String, String>,
    #[serde(default)]
    include_external: bool,
    #[serde(default)]
    shared: bool,
    #[serde(rename = "clusterID", default)]
    cluster_id: u32,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct ZoneJson {
    #[serde(default)]
    zone: String,
    #[serde(default, deserialize_with = "null_as_default")]
    for_zones: Vec<ForZoneJson>,
}

#[derive(Deserialize, Serialize)]
struct ForZoneJson {
    name: String,
}

/// Go writes nil maps and slices as null.
fn null_as_default<'de, D: serde::Deserializer<'de>, T: Default + Deserialize<'de>>(
    from: D,
) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(from)?.unwrap_or_default())
}

/// Writes a service with the endpoints that Cilium counts as backends: ready ones with a weight above 0.
pub fn encode<'s>(frame: &ServiceFrame, slices: impl IntoIterator<Item = &'s Slice>) -> Vec<u8> {
    let l4 = |protocol: Protocol, port| L4AddrJson {
        protocol: protocol.as_str().to_owned(),
        port,
    };
    let frontend_ports: PortMap = frame
        .ports
        .iter()
        .map(|port| (port.name.to_string(), l4(port.protocol, port.port)))
        .collect();
    let mut json = ServiceJson {
        cluster: frame.cluster.to_string(),
        namespace: frame.name.namespace.to_string(),
        name: frame.name.name.to_string(),
        frontends: frame
            .cluster_ips
            .iter()
            .map(|ip| (ip.to_string(), frontend_ports.clone()))
            .collect(),
        backends: BTreeMap::new(),
        hostnames: BTreeMap::new(),
        zones: BTreeMap::new(),
        labels: frame.labels.clone(),
        selector: frame.selector.clone(),
        include_external: frame.global,
        shared: frame.shared,
        cluster_id: frame.cluster_id.get().into(),
    };
    for slice in slices {
        let usable =
            |endpoint: &&SliceEndpoint| endpoint.ready && !endpoint.terminating && endpoint.weight > 0;
        for endpoint in slice.endpoints.iter().filter(usable) {
            let ip = endpoint.ip.to_string();
            let ports = json.backends.entry(ip.clone()).or_default();
            ports.extend(
                slice
                    .ports
                    .iter()
                    .map(|port| (port.name.to_string(), l4(port.protocol, port.port))),
            );
            if !endpoint.hostname.is_empty() {
                json.hostnames.insert(ip.clone(), endpoint.hostname.to_string());
            }
            if !endpoint.zone.is_empty() {
                json.zones.insert(
                    ip,
                    ZoneJson {
                        zone: endpoint.zone.to_string(),
                        for_zones: vec![],
                    },
                );
            }
        }
    }
    crate::json(&json)
}

/// Reads the service of key suffix `suffix` (`ns/name`), published by `cluster`. Backends with the same ports become one slice.
pub fn decode(
    suffix: &str,
    value: &[u8],
    cluster: &ClusterName,
    cluster_id: ClusterId,
) -> Result<(ServiceFrame, Vec<Slice>), Refusal> {
    Refusal::check_len(value, SERVICE_JSON_LEN_MAX)?;
    let json: ServiceJson = serde_json::from_slice(value).map_err(Refusal::Json)?;
    for (field, text) in [
        ("cluster", &json.cluster),
        ("namespace", &json.namespace),
        ("name", &json.name),
    ] {
        if text.is_empty() {
            return Err(Refusal::Missing(field));
        }
    }
    check_owner(&json.cluster, json.cluster_id, cluster, cluster_id)?;
    let name = ServiceName::new(&json.namespace, &json.name)?;
    if name.to_string() != suffix {
        return Err(Refusal::WrongName {
            got: name.to_string(),
            want: crate::refusal::shorten(suffix),
        });
    }
    let mut cluster_ips = Vec::with_capacity(json.frontends.len());
    let mut ports = HashSet::new();
    for (ip, port_map) in &json.frontends {
        cluster_ips.push(parse_ip("frontend", ip)?);
        for port in slice_ports(port_map)? {
            ports.insert(ServicePort {
                name: port.name,
                protocol: port.protocol,
                port: port.port,
                node_port: 0,
            });
        }
    }
    let mut ports: Vec<_> = ports.into_iter().collect();
    ports.sort();
    let frame = ServiceFrame {
        cluster: cluster.clone(),
        cluster_id,
        name: name.clone(),
        service_type: if cluster_ips.is_empty() {
            ServiceType::Headless
        } else {
            ServiceType::ClusterIp
        },
        cluster_ips,
        external_ips: vec![],
        ports,
        global: json.include_external,
        shared: json.shared,
        affinity: Affinity::None,
        session_affinity: SessionAffinity::None,
        traffic: Default::default(),
        labels: json.labels,
        selector: json.selector,
    };
    let mut by_ports: BTreeMap<Vec<SlicePort>, Vec<SliceEndpoint>> = BTreeMap::new();
    for (ip, port_map) in &json.backends {
        let mut endpoint = SliceEndpoint::ready(parse_ip("backend", ip)?);
        endpoint.zone = json
            .zones
            .get(ip)
            .map(|zone| zone.zone.as_str().into())
            .unwrap_or_default();
        endpoint.hostname = json
            .hostnames
            .get(ip)
            .map(|name| name.as_str().into())
            .unwrap_or_default();
        by_ports.entry(slice_ports(port_map)?).or_default().push(endpoint);
    }
    let slices = by_ports
        .into_iter()
        .enumerate()
        .map(|(number, (ports, endpoints))| Slice {
            cluster: cluster.clone(),
            cluster_id,
            service: name.clone(),
            slice: format!("json-{number}").into(),
            ports,
            endpoints,
        });
    Ok((frame, slices.collect()))
}

/// Refuses an object that names another cluster, or another ID, than the one it came from.
pub(crate) fn check_owner(
    got_name: &str,
    got_id: u32,
    want_name: &ClusterName,
    want_id: ClusterId,
) -> Result<(), Refusal> {
    if got_name != want_name.as_str() {
        return Err(Refusal::WrongCluster {
            got: crate::refusal::shorten(got_name),
            want: want_name.to_string(),
        });
    }
    if got_id != u32::from(want_id.get()) {
        return Err(Refusal::WrongClusterId {
            got: got_id,
            want: want_id.get().into(),
        });
    }
    Ok(())
}

fn slice_ports(ports: &PortMap) -> Result<Vec<SlicePort>, Refusal> {
    let parse = |(name, l4): (&String, &L4AddrJson)| {
        let protocol = l4
            .protocol
            .parse()
            .map_err(|_| Refusal::malformed("Protocol", &l4.protocol))?;
        if l4.port == 0 {
            return Err(Refusal::malformed("Port", "0"));
        }
        Ok(SlicePort {
            name: name.as_str().into(),
            protocol,
            port: l4.port,
        })
    };
    ports.iter().map(parse).collect()
}

/// All addresses of a service's slices, for tests and counts.
pub fn backend_ips(slices: &[Slice]) -> impl Iterator<Item = IpAddr> + '_ {
    slices
        .iter()
        .flat_map(|slice| slice.endpoints.iter().map(|endpoint| endpoint.ip))
}

#[cfg(test)]
mod tests {
    use super::*;
    use isthmus_model::MaxConnectedClusters;
    use proptest::prelude::*;

    const EXAMPLE: &str = r#"{"cluster":"c1","namespace":"shop","name":"cart","frontends":{"10.96.7.7":{"http":{"Protocol":"TCP","Port":80}}},"backends":{"10.1.0.21":{"http":{"Protocol":"TCP","Port":8080}}},"labels":{},"selector":{"app":"cart"},"includeExternal":true,"shared":true,"clusterID":1}"#;

    fn c1() -> (ClusterName, ClusterId) {
        (
            ClusterName::new("c1").unwrap(),
            ClusterId::new(1, MaxConnectedClusters::C255).unwrap(),
        )
    }

    fn check(suffix: &str, text: &str) -> Result<(ServiceFrame, Vec<Slice>), &'static str> {
        let (name, id) = c1();
        decode(suffix, text.as_bytes(), &name, id).map_err(|refusal| refusal.reason())
    }

    #[test]
    fn reads_and_writes_ciliums_example() {
        let (frame, slices) = check("shop/cart", EXAMPLE).unwrap();
        assert!(frame.global && frame.shared);
        assert_eq!(
            backend_ips(&slices).collect::<Vec<_>>(),
            ["10.1.0.21".parse::<IpAddr>().unwrap()]
        );
        assert_eq!(String::from_utf8(encode(&frame, &slices)).unwrap(), EXAMPLE);
    }

    #[test]
    fn lower_case_ports_and_nulls_are_accepted() {
        let text = EXAMPLE
            .replace("\"Protocol\"", "\"protocol\"")
            .replace("\"Port\"", "\"port\"")
            .replace("\"labels\":{}", "\"labels\":null");
        assert!(check("shop/cart", &text).is_ok());
    }

    #[test]
    fn bad_services_are_refused_with_their_reason() {
        for (from, to, reason) in [
            ("\"cluster\":\"c1\"", "\"cluster\":\"c2\"", "wrong_cluster"),
            ("\"clusterID\":1", "\"clusterID\":2", "wrong_cluster_id"),
            ("\"name\":\"cart\"", "\"name\":\"other\"", "wrong_name"),
            ("\"namespace\":\"shop\"", "\"namespace\":\"\"", "missing_field"),
            ("10.1.0.21", "10.1.0.300", "malformed_field"),
            ("10.1.0.21", "fe80::1%eth0", "malformed_field"),
            (
                "\"TCP\",\"Port\":8080",
                "\"ICMP\",\"Port\":8080",
                "malformed_field",
            ),
            ("8080", "70000", "malformed"),
        ] {
            assert_eq!(
                check("shop/cart", &EXAMPLE.replace(from, to)).unwrap_err(),
                reason,
                "{from} -> {to}"
            );
        }
        assert_eq!(
            check("shop/cart", &" ".repeat(10 << 20)).unwrap_err(),
            "too_large"
        );
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let (name, id) = c1();
            let _ = decode("shop/cart", &bytes, &name, id);
        }

        #[test]
        fn backends_survive_the_round_trip(hosts in proptest::collection::btree_set(any::<[u8; 4]>(), 0..40)) {
            let (frame, mut slices) = check("shop/cart", EXAMPLE).unwrap();
            slices[0].endpoints = hosts.iter().map(|ip| SliceEndpoint::ready(IpAddr::from(*ip))).collect();
            let text = encode(&frame, &slices);
            let (name, id) = c1();
            let (again, read) = decode("shop/cart", &text, &name, id).unwrap();
            prop_assert_eq!(again, frame);
            let mut got: Vec<_> = backend_ips(&read).collect();
            got.sort();
            let mut want: Vec<_> = hosts.into_iter().map(IpAddr::from).collect();
            want.sort();
            prop_assert_eq!(got, want);
        }
    }
}
