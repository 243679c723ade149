//! Isthmus' own form of a service: a frame and slices of at most 100 endpoints, as protobuf.
//!
//! One changed endpoint rewrites one slice (a few kilobytes) where Cilium's JSON rewrites the whole service, and the conditions
//! ready, serving and terminating travel, so that termination is graceful across clusters. The schema is `proto/slice.proto`;
//! the messages are derived here, since generated code would pull tonic under the pure crates.

use std::net::IpAddr;

use isthmus_model::{
    Affinity, Algorithm, ClusterId, ClusterName, MinHealthy, Preference, Protocol, ServiceFrame, ServiceName,
    ServicePort, ServiceType, SessionAffinity, Slice, SliceEndpoint, SlicePort, Traffic, TrafficPolicy,
};
use prost::Message;

use crate::{
    refusal::{Refusal, VALUE_LEN_MAX, shorten},
    service::check_owner,
};

/// Most endpoints of a slice that is read. Ours have at most [`Slice::MAX_ENDPOINTS`].
const ENDPOINTS_MAX: usize = 1000;
/// Most ports of a frame or slice.
const PORTS_MAX: usize = 256;
/// Most addresses of a frame.
const ADDRESSES_MAX: usize = 64;
/// Most source ranges of a frame.
const SOURCE_RANGES_MAX: usize = 1024;
/// Most zones that an endpoint should serve: Kubernetes' own limit.
const ZONE_HINTS_MAX: usize = 8;

#[derive(Clone, PartialEq, Message)]
struct FrameProto {
    #[prost(string, tag = "1")]
    cluster: String,
    #[prost(uint32, tag = "2")]
    cluster_id: u32,
    #[prost(string, tag = "3")]
    namespace: String,
    #[prost(string, tag = "4")]
    name: String,
    #[prost(uint32, tag = "5")]
    service_type: u32,
    #[prost(bytes = "vec", repeated, tag = "6")]
    cluster_ips: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "7")]
    external_ips: Vec<Vec<u8>>,
    #[prost(message, repeated, tag = "8")]
    ports: Vec<PortProto>,
    #[prost(bool, tag = "9")]
    global: bool,
    #[prost(bool, tag = "10")]
    shared: bool,
    #[prost(uint32, tag = "11")]
    affinity: u32,
    #[prost(uint32, tag = "12")]
    session_affinity_seconds: u32,
    #[prost(btree_map = "string, string", tag = "13")]
    labels: std::collections::BTreeMap<String, String>,
    #[prost(btree_map = "string, string", tag = "14")]
    selector: std::collections::BTreeMap<String, String>,
    #[prost(string, tag = "15")]
    tiers: String,
    #[prost(string, tag = "16")]
    min_healthy: String,
    #[prost(bool, tag = "17")]
    no_spill_over: bool,
    #[prost(uint32, tag = "18")]
    slow_start_seconds: u32,
    #[prost(uint32, tag = "19")]
    internal_traffic_policy: u32,
    #[prost(uint32, tag = "20")]
    external_traffic_policy: u32,
    #[prost(uint32, tag = "21")]
    algorithm: u32,
    #[prost(bytes = "vec", repeated, tag = "22")]
    load_balancer_ips: Vec<Vec<u8>>,
    #[prost(string, repeated, tag = "23")]
    source_ranges: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct PortProto {
    #[prost(string, tag = "1")]
    name: String,
    /// IP protocol number, 0 = any.
    #[prost(uint32, tag = "2")]
    protocol: u32,
    #[prost(uint32, tag = "3")]
    port: u32,
    #[prost(uint32, tag = "4")]
    node_port: u32,
}

#[derive(Clone, PartialEq, Message)]
struct SliceProto {
    #[prost(string, tag = "1")]
    cluster: String,
    #[prost(uint32, tag = "2")]
    cluster_id: u32,
    #[prost(message, repeated, tag = "3")]
    ports: Vec<PortProto>,
    #[prost(message, repeated, tag = "4")]
    endpoints: Vec<EndpointProto>,
}

#[derive(Clone, PartialEq, Message)]
struct EndpointProto {
    /// 4 or 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    ip: Vec<u8>,
    /// Bit 0 ready, 1 serving, 2 terminating.
    #[prost(uint32, tag = "2")]
    conditions: u32,
    #[prost(string, tag = "3")]
    node: String,
    #[prost(string, tag = "4")]
    zone: String,
    #[prost(string, tag = "5")]
    hostname: String,
    /// Weight plus one; 0 = the default of 1.
    #[prost(uint32, tag = "6")]
    weight_plus_one: u32,
    #[prost(string, repeated, tag = "7")]
    zone_hints: Vec<String>,
}

/// Writes a frame.
pub fn encode_frame(frame: &ServiceFrame) -> Vec<u8> {
    let traffic = &frame.traffic;
    let preference = &traffic.preference;
    FrameProto {
        cluster: frame.cluster.to_string(),
        cluster_id: frame.cluster_id.get().into(),
        namespace: frame.name.namespace.to_string(),
        name: frame.name.name.to_string(),
        service_type: match frame.service_type {
            ServiceType::ClusterIp => 0,
            ServiceType::NodePort => 1,
            ServiceType::LoadBalancer => 2,
            ServiceType::Headless => 3,
            ServiceType::ExternalName => 4,
        },
        cluster_ips: frame.cluster_ips.iter().map(|ip| octets(*ip)).collect(),
        external_ips: frame.external_ips.iter().map(|ip| octets(*ip)).collect(),
        ports: frame
            .ports
            .iter()
            .map(|port| PortProto {
                name: port.name.to_string(),
                protocol: port.protocol.number().into(),
                port: port.port.into(),
                node_port: port.node_port.into(),
            })
            .collect(),
        global: frame.global,
        shared: frame.shared,
        affinity: match frame.affinity {
            Affinity::None => 0,
            Affinity::Local => 1,
            Affinity::Remote => 2,
        },
        session_affinity_seconds: match frame.session_affinity {
            SessionAffinity::None => 0,
            SessionAffinity::ClientIp { timeout_seconds } => timeout_seconds.max(1),
        },
        labels: frame.labels.clone(),
        selector: frame.selector.clone(),
        tiers: preference.tiers.to_string(),
        min_healthy: if preference.min_healthy == MinHealthy::default() {
            String::new()
        } else {
            preference.min_healthy.to_string()
        },
        no_spill_over: !preference.spill_over,
        slow_start_seconds: preference.slow_start_seconds.into(),
        internal_traffic_policy: (traffic.internal_policy == TrafficPolicy::Local).into(),
        external_traffic_policy: (traffic.external_policy == TrafficPolicy::Local).into(),
        algorithm: match traffic.algorithm {
            Algorithm::Unspecified => 0,
            Algorithm::Random => 1,
            Algorithm::Maglev => 2,
        },
        load_balancer_ips: traffic.load_balancer_ips.iter().map(|ip| octets(*ip)).collect(),
        source_ranges: traffic.source_ranges.iter().map(ToString::to_string).collect(),
    }
    .encode_to_vec()
}

/// Reads the frame of key suffix `suffix` (`ns/name`), published by `cluster`.
pub fn decode_frame(
    suffix: &str,
    value: &[u8],
    cluster: &ClusterName,
    cluster_id: ClusterId,
) -> Result<ServiceFrame, Refusal> {
    Refusal::check_len(value, VALUE_LEN_MAX)?;
    let proto = FrameProto::decode(value).map_err(Refusal::Protobuf)?;
    check_owner(&proto.cluster, proto.cluster_id, cluster, cluster_id)?;
    let name = ServiceName::new(&proto.namespace, &proto.name)?;
    if name.to_string() != suffix {
        return Err(Refusal::WrongName {
            got: name.to_string(),
            want: shorten(suffix),
        });
    }
    check_count("cluster_ips", proto.cluster_ips.len(), ADDRESSES_MAX)?;
    check_count("external_ips", proto.external_ips.len(), ADDRESSES_MAX)?;
    check_count("ports", proto.ports.len(), PORTS_MAX)?;
    let traffic = traffic(&proto)?;
    let ports = proto.ports.into_iter().map(|port| {
        Ok(ServicePort {
            protocol: protocol(port.protocol)?,
            port: port_number(port.port)?,
            node_port: u16::try_from(port.node_port)
                .map_err(|_| Refusal::malformed("node_port", &port.node_port.to_string()))?,
            name: port.name.into(),
        })
    });
    Ok(ServiceFrame {
        cluster: cluster.clone(),
        cluster_id,
        name,
        service_type: match proto.service_type {
            0 => ServiceType::ClusterIp,
            1 => ServiceType::NodePort,
            2 => ServiceType::LoadBalancer,
            3 => ServiceType::Headless,
            4 => ServiceType::ExternalName,
            other => return Err(Refusal::malformed("service_type", &other.to_string())),
        },
        cluster_ips: proto
            .cluster_ips
            .iter()
            .map(|ip| address(ip))
            .collect::<Result<_, _>>()?,
        external_ips: proto
            .external_ips
            .iter()
            .map(|ip| address(ip))
            .collect::<Result<_, _>>()?,
        ports: ports.collect::<Result<_, Refusal>>()?,
        global: proto.global,
        shared: proto.global && proto.shared,
        affinity: match (proto.global, proto.affinity) {
            (true, 1) => Affinity::Local,
            (true, 2) => Affinity::Remote,
            // Unknown values mean none, as with the annotation.
            _ => Affinity::None,
        },
        session_affinity: match proto.session_affinity_seconds {
            0 => SessionAffinity::None,
            timeout_seconds => SessionAffinity::ClientIp { timeout_seconds },
        },
        traffic,
        labels: proto.labels,
        selector: proto.selector,
    })
}

/// Reads what only the service's own cluster uses. Numbers that a newer writer may use mean the default, as with affinity.
fn traffic(proto: &FrameProto) -> Result<Traffic, Refusal> {
    check_count("load_balancer_ips", proto.load_balancer_ips.len(), ADDRESSES_MAX)?;
    check_count("source_ranges", proto.source_ranges.len(), SOURCE_RANGES_MAX)?;
    let policy = |number| match number {
        1 => TrafficPolicy::Local,
        _ => TrafficPolicy::Cluster,
    };
    let min_healthy = match proto.min_healthy.as_str() {
        "" => MinHealthy::default(),
        text => text
            .parse()
            .map_err(|_| Refusal::malformed("min_healthy", text))?,
    };
    Ok(Traffic {
        preference: Preference {
            tiers: proto
                .tiers
                .parse()
                .map_err(|_| Refusal::malformed("tiers", &proto.tiers))?,
            min_healthy,
            spill_over: !proto.no_spill_over,
            slow_start_seconds: u16::try_from(proto.slow_start_seconds).map_err(|_| {
                Refusal::malformed("slow_start_seconds", &proto.slow_start_seconds.to_string())
            })?,
        },
        internal_policy: policy(proto.internal_traffic_policy),
        external_policy: policy(proto.external_traffic_policy),
        algorithm: match proto.algorithm {
            1 => Algorithm::Random,
            2 => Algorithm::Maglev,
            _ => Algorithm::Unspecified,
        },
        load_balancer_ips: proto
            .load_balancer_ips
            .iter()
            .map(|ip| address(ip))
            .collect::<Result<_, _>>()?,
        source_ranges: proto
            .source_ranges
            .iter()
            .map(|text| {
                text.parse()
                    .map_err(|_| Refusal::malformed("source_ranges", text))
            })
            .collect::<Result<_, _>>()?,
    })
}

/// Writes a slice.
pub fn encode_slice(slice: &Slice) -> Vec<u8> {
    let port = |port: &SlicePort| PortProto {
        name: port.name.to_string(),
        protocol: port.protocol.number().into(),
        port: port.port.into(),
        node_port: 0,
    };
    let endpoint = |endpoint: &SliceEndpoint| EndpointProto {
        ip: octets(endpoint.ip),
        conditions: u32::from(endpoint.ready)
            | u32::from(endpoint.serving) << 1
            | u32::from(endpoint.terminating) << 2,
        node: endpoint.node.to_string(),
        zone: endpoint.zone.to_string(),
        hostname: endpoint.hostname.to_string(),
        weight_plus_one: if endpoint.weight == 1 {
            0
        } else {
            u32::from(endpoint.weight) + 1
        },
        zone_hints: endpoint.zone_hints.iter().map(ToString::to_string).collect(),
    };
    SliceProto {
        cluster: slice.cluster.to_string(),
        cluster_id: slice.cluster_id.get().into(),
        ports: slice.ports.iter().map(port).collect(),
        endpoints: slice.endpoints.iter().map(endpoint).collect(),
    }
    .encode_to_vec()
}

/// Reads the slice of key suffix `suffix` (`ns/name/slice`), published by `cluster`.
pub fn decode_slice(
    suffix: &str,
    value: &[u8],
    cluster: &ClusterName,
    cluster_id: ClusterId,
) -> Result<Slice, Refusal> {
    Refusal::check_len(value, VALUE_LEN_MAX)?;
    let (service, name) = crate::keys::parse_slice(suffix)?;
    let proto = SliceProto::decode(value).map_err(Refusal::Protobuf)?;
    check_owner(&proto.cluster, proto.cluster_id, cluster, cluster_id)?;
    check_count("ports", proto.ports.len(), PORTS_MAX)?;
    check_count("endpoints", proto.endpoints.len(), ENDPOINTS_MAX)?;
    let ports = proto.ports.into_iter().map(|port| {
        Ok(SlicePort {
            protocol: protocol(port.protocol)?,
            port: port_number(port.port)?,
            name: port.name.into(),
        })
    });
    let endpoints = proto.endpoints.into_iter().map(|endpoint| {
        check_count("zone_hints", endpoint.zone_hints.len(), ZONE_HINTS_MAX)?;
        Ok(SliceEndpoint {
            ip: address(&endpoint.ip)?,
            ready: endpoint.conditions & 1 != 0,
            serving: endpoint.conditions & 2 != 0,
            terminating: endpoint.conditions & 4 != 0,
            node: endpoint.node.into(),
            zone: endpoint.zone.into(),
            zone_hints: endpoint.zone_hints.into_iter().map(Into::into).collect(),
            hostname: endpoint.hostname.into(),
            weight: match endpoint.weight_plus_one {
                0 => 1,
                more => {
                    u16::try_from(more - 1).map_err(|_| Refusal::malformed("weight", &more.to_string()))?
                }
            },
        })
    });
    Ok(Slice {
        cluster: cluster.clone(),
        cluster_id,
        service,
        slice: name.into(),
        ports: ports.collect::<Result<_, Refusal>>()?,
        endpoints: endpoints.collect::<Result<_, Refusal>>()?,
    })
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn address(bytes: &[u8]) -> Result<IpAddr, Refusal> {
    match (<[u8; 4]>::try_from(bytes), <[u8; 16]>::try_from(bytes)) {
        (Ok(v4), _) => Ok(IpAddr::from(v4)),
        (_, Ok(v6)) => Ok(IpAddr::from(v6).to_canonical()),
        _ => Err(Refusal::malformed("address", &format!("{} bytes", bytes.len()))),
    }
}

fn protocol(number: u32) -> Result<Protocol, Refusal> {
    [Protocol::Tcp, Protocol::Udp, Protocol::Sctp, Protocol::Any]
        .into_iter()
        .find(|protocol| u32::from(protocol.number()) == number)
        .ok_or_else(|| Refusal::malformed("protocol", &number.to_string()))
}

fn port_number(number: u32) -> Result<u16, Refusal> {
    u16::try_from(number)
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| Refusal::malformed("port", &number.to_string()))
}

fn check_count(what: &'static str, len: usize, limit: usize) -> Result<(), Refusal> {
    if len > limit {
        Err(Refusal::TooMany { what, len, limit })
    } else {
        Ok(())
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

    fn frame() -> ServiceFrame {
        let (cluster, cluster_id) = c1();
        ServiceFrame {
            cluster,
            cluster_id,
            name: ServiceName::new("shop", "cart").unwrap(),
            service_type: ServiceType::NodePort,
            cluster_ips: vec!["10.96.7.7".parse().unwrap(), "fd00::7".parse().unwrap()],
            external_ips: vec![],
            ports: vec![ServicePort {
                name: "http".into(),
                protocol: Protocol::Tcp,
                port: 80,
                node_port: 30_080,
            }],
            global: true,
            shared: true,
            affinity: Affinity::Local,
            session_affinity: SessionAffinity::ClientIp {
                timeout_seconds: 10_800,
            },
            traffic: Traffic {
                preference: Preference {
                    tiers: "local,us-east|us-west,*".parse().unwrap(),
                    min_healthy: MinHealthy::Percent(50),
                    spill_over: false,
                    slow_start_seconds: 30,
                },
                internal_policy: TrafficPolicy::Local,
                external_policy: TrafficPolicy::Local,
                algorithm: Algorithm::Maglev,
                load_balancer_ips: vec!["203.0.113.7".parse().unwrap()],
                source_ranges: vec![
                    "198.51.100.0/24".parse().unwrap(),
                    "2001:db8::/32".parse().unwrap(),
                ],
            },
            labels: [("a".to_owned(), "b".to_owned())].into(),
            selector: Default::default(),
        }
    }

    #[test]
    fn frames_survive_the_round_trip_and_foreign_ones_are_refused() {
        let (cluster, id) = c1();
        let bytes = encode_frame(&frame());
        assert_eq!(decode_frame("shop/cart", &bytes, &cluster, id).unwrap(), frame());
        assert_eq!(
            decode_frame("shop/x", &bytes, &cluster, id).unwrap_err().reason(),
            "wrong_name"
        );
        let other = ClusterName::new("c2").unwrap();
        assert_eq!(
            decode_frame("shop/cart", &bytes, &other, id)
                .unwrap_err()
                .reason(),
            "wrong_cluster"
        );
    }

    fn endpoints() -> impl Strategy<Value = Vec<SliceEndpoint>> {
        let endpoint = (any::<[u8; 4]>(), any::<[bool; 3]>(), 0u16..300, "[a-z]{0,4}").prop_map(
            |(ip, [ready, serving, terminating], weight, text)| SliceEndpoint {
                ip: IpAddr::from(ip),
                ready,
                serving,
                terminating,
                node: text.as_str().into(),
                zone: text.as_str().into(),
                zone_hints: vec![text.as_str().into()],
                hostname: text.into(),
                weight,
            },
        );
        proptest::collection::vec(endpoint, 0..20)
    }

    proptest! {
        #[test]
        fn slices_survive_the_round_trip(endpoints in endpoints(), port in 1u16..) {
            let (cluster, cluster_id) = c1();
            let slice = Slice {
                cluster: cluster.clone(), cluster_id, service: ServiceName::new("shop", "cart").unwrap(), slice: "s0".into(),
                ports: vec![SlicePort { name: "".into(), protocol: Protocol::Udp, port }], endpoints,
            };
            let bytes = encode_slice(&slice);
            prop_assert_eq!(decode_slice("shop/cart/s0", &bytes, &cluster, cluster_id).unwrap(), slice);
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let (cluster, id) = c1();
            let _ = decode_slice("shop/cart/s0", &bytes, &cluster, id);
            let _ = decode_frame("shop/cart", &bytes, &cluster, id);
        }
    }
}
