//! Service objects to [`ServiceFrame`]s.

use std::net::IpAddr;

use ipnet::IpNet;
use isthmus_model::{
    Protocol, ServiceFrame, ServiceName, ServicePort, ServiceType, SessionAffinity, Traffic, TrafficPolicy,
};
use k8s_openapi::api::core::v1::{Service, ServiceSpec};

use crate::{Cluster, ConvertError, Converted, Warning, annotations, truncate};

/// Most addresses of a frame, and most ports, that readers accept.
const ADDRESSES_MAX: usize = 64;
const PORTS_MAX: usize = 256;
/// Most source ranges that readers accept.
const SOURCE_RANGES_MAX: usize = 1024;
/// Older form of `spec.loadBalancerSourceRanges`, for when that is empty.
const SOURCE_RANGES: &str = "service.beta.kubernetes.io/load-balancer-source-ranges";
/// Kubernetes' default of `clientIP.timeoutSeconds`.
const CLIENT_IP_SECONDS: u32 = 10_800;

/// Converts a Service.
pub fn frame(service: &Service, cluster: &Cluster) -> Result<Converted<ServiceFrame>, ConvertError> {
    let name = name(service)?;
    let mut warnings = vec![];
    let marks = annotations::service(service.metadata.annotations.as_ref(), &mut warnings);
    let empty = ServiceSpec::default();
    let spec = service.spec.as_ref().unwrap_or(&empty);
    let service_type = service_type(spec);
    let mut cluster_ips = match service_type {
        ServiceType::ExternalName | ServiceType::Headless => vec![],
        _ => addresses("clusterIP", cluster_ips(spec), &mut warnings),
    };
    truncate(&mut cluster_ips, "clusterIPs", ADDRESSES_MAX, &mut warnings);
    let mut external_ips = addresses(
        "externalIP",
        spec.external_ips.iter().flatten().map(String::as_str),
        &mut warnings,
    );
    let mut load_balancer_ips = addresses("loadBalancer.ingress.ip", ingress_ips(service), &mut warnings);
    for ip in &load_balancer_ips {
        if !external_ips.contains(ip) {
            external_ips.push(*ip);
        }
    }
    truncate(&mut external_ips, "externalIPs", ADDRESSES_MAX, &mut warnings);
    load_balancer_ips.retain(|ip| external_ips.contains(ip));
    let value = ServiceFrame {
        cluster: cluster.name.clone(),
        cluster_id: cluster.id,
        name,
        service_type,
        cluster_ips,
        external_ips,
        ports: ports(spec, &mut warnings),
        global: marks.global,
        shared: marks.shared,
        affinity: marks.affinity,
        session_affinity: session_affinity(spec),
        traffic: Traffic {
            preference: marks.preference,
            internal_policy: policy(spec.internal_traffic_policy.as_deref()),
            external_policy: policy(spec.external_traffic_policy.as_deref()),
            algorithm: marks.algorithm,
            load_balancer_ips,
            source_ranges: source_ranges(service, spec, &mut warnings),
        },
        labels: service.metadata.labels.clone().unwrap_or_default(),
        selector: spec.selector.clone().unwrap_or_default(),
    };
    Ok(Converted { value, warnings })
}

/// Whether other clusters may see the service and its endpoints.
pub fn is_exported(frame: &ServiceFrame) -> bool {
    frame.global && frame.shared && frame.service_type != ServiceType::ExternalName
}

/// A Service's namespace and name.
pub fn name(service: &Service) -> Result<ServiceName, ConvertError> {
    let metadata = &service.metadata;
    let namespace = metadata
        .namespace
        .as_deref()
        .ok_or(ConvertError::Missing("namespace"))?;
    let name = metadata.name.as_deref().ok_or(ConvertError::Missing("name"))?;
    Ok(ServiceName::new(namespace, name)?)
}

fn service_type(spec: &ServiceSpec) -> ServiceType {
    match spec.type_.as_deref() {
        Some("ExternalName") => ServiceType::ExternalName,
        _ if spec.cluster_ip.as_deref() == Some("None") => ServiceType::Headless,
        Some("NodePort") => ServiceType::NodePort,
        Some("LoadBalancer") => ServiceType::LoadBalancer,
        _ => ServiceType::ClusterIp,
    }
}

fn cluster_ips(spec: &ServiceSpec) -> impl Iterator<Item = &str> {
    let many = spec.cluster_ips.as_ref().filter(|list| !list.is_empty());
    let one = spec.cluster_ip.as_ref().filter(|_| many.is_none());
    many.into_iter().flatten().chain(one).map(String::as_str)
}

/// Addresses of load balancers, except those whose traffic arrives with another destination address.
fn ingress_ips(service: &Service) -> impl Iterator<Item = &str> {
    let balancer = service
        .status
        .as_ref()
        .and_then(|status| status.load_balancer.as_ref());
    balancer
        .into_iter()
        .flat_map(|balancer| balancer.ingress.iter().flatten())
        .filter(|ingress| ingress.ip_mode.as_deref() != Some("Proxy"))
        .filter_map(|ingress| ingress.ip.as_deref())
}

fn addresses<'a>(
    field: &'static str,
    texts: impl Iterator<Item = &'a str>,
    warnings: &mut Vec<Warning>,
) -> Vec<IpAddr> {
    let mut ips: Vec<IpAddr> = vec![];
    for text in texts.filter(|text| !text.is_empty()) {
        match text.parse::<IpAddr>().map(|ip| ip.to_canonical()) {
            Ok(ip) if !ips.contains(&ip) => ips.push(ip),
            Ok(_) => {}
            Err(_) => warnings.push(Warning::field(field, text)),
        }
    }
    ips
}

fn ports(spec: &ServiceSpec, warnings: &mut Vec<Warning>) -> Vec<ServicePort> {
    let mut ports = vec![];
    for port in spec.ports.iter().flatten() {
        let protocol = port.protocol.as_deref().map_or(Ok(Protocol::Tcp), str::parse);
        match (u16::try_from(port.port), protocol) {
            (Ok(number), Ok(protocol)) if number != 0 && protocol != Protocol::Any => {
                ports.push(ServicePort {
                    name: port.name.as_deref().unwrap_or_default().into(),
                    protocol,
                    port: number,
                    node_port: port
                        .node_port
                        .and_then(|port| u16::try_from(port).ok())
                        .unwrap_or(0),
                })
            }
            _ => {
                let text = format!("{}/{}", port.port, port.protocol.as_deref().unwrap_or("TCP"));
                warnings.push(Warning::field("port", &text));
            }
        }
    }
    truncate(&mut ports, "ports", PORTS_MAX, warnings);
    ports
}

fn policy(text: Option<&str>) -> TrafficPolicy {
    match text {
        Some("Local") => TrafficPolicy::Local,
        _ => TrafficPolicy::Cluster,
    }
}

/// Ranges that may ask. One that cannot be read is left out, which lets fewer in; if none can be read, nobody may ask: a service
/// that was meant to be closed must not open.
fn source_ranges(service: &Service, spec: &ServiceSpec, warnings: &mut Vec<Warning>) -> Vec<IpNet> {
    let listed = spec.load_balancer_source_ranges.iter().flatten();
    let mut texts: Vec<&str> = listed.map(String::as_str).collect();
    if texts.is_empty() {
        let annotation = service
            .metadata
            .annotations
            .as_ref()
            .and_then(|annotations| annotations.get(SOURCE_RANGES));
        texts = annotation.map_or(vec![], |text| text.split(',').collect());
    }
    let mut ranges: Vec<IpNet> = vec![];
    let mut asked = false;
    for text in texts.into_iter().map(str::trim).filter(|text| !text.is_empty()) {
        asked = true;
        match text.parse::<IpNet>().map(|range| range.trunc()) {
            Ok(range) if !ranges.contains(&range) => ranges.push(range),
            Ok(_) => {}
            Err(_) => warnings.push(Warning::field("loadBalancerSourceRanges", text)),
        }
    }
    truncate(
        &mut ranges,
        "loadBalancerSourceRanges",
        SOURCE_RANGES_MAX,
        warnings,
    );
    if asked && ranges.is_empty() {
        // The least that can be said: an address that no packet has.
        ranges.push(IpNet::from(IpAddr::from([0, 0, 0, 0])));
    }
    ranges
}

fn session_affinity(spec: &ServiceSpec) -> SessionAffinity {
    if spec.session_affinity.as_deref() != Some("ClientIP") {
        return SessionAffinity::None;
    }
    let seconds = spec
        .session_affinity_config
        .as_ref()
        .and_then(|config| config.client_ip.as_ref()?.timeout_seconds);
    SessionAffinity::ClientIp {
        timeout_seconds: seconds
            .and_then(|seconds| u32::try_from(seconds).ok())
            .filter(|seconds| *seconds > 0)
            .unwrap_or(CLIENT_IP_SECONDS),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use isthmus_model::{Affinity, ClusterId, ClusterName, MaxConnectedClusters};
    use k8s_openapi::{
        api::core::v1::{LoadBalancerIngress, LoadBalancerStatus, ServicePort as KubePort, ServiceStatus},
        apimachinery::pkg::apis::meta::v1::ObjectMeta,
    };

    fn cluster() -> Cluster {
        Cluster {
            name: ClusterName::new("c1").unwrap(),
            id: ClusterId::new(1, MaxConnectedClusters::C255).unwrap(),
        }
    }

    fn service(spec: ServiceSpec) -> Service {
        Service {
            metadata: ObjectMeta {
                name: Some("cart".into()),
                namespace: Some("shop".into()),
                annotations: Some(
                    [
                        ("service.cilium.io/global".to_owned(), "true".to_owned()),
                        ("service.cilium.io/affinity".to_owned(), "local".to_owned()),
                    ]
                    .into(),
                ),
                ..Default::default()
            },
            spec: Some(spec),
            status: None,
        }
    }

    fn port(number: i32) -> KubePort {
        KubePort {
            name: Some("http".into()),
            port: number,
            node_port: Some(30_080),
            ..Default::default()
        }
    }

    #[test]
    fn a_node_port_service_is_read_whole() {
        let mut object = service(ServiceSpec {
            type_: Some("NodePort".into()),
            cluster_ip: Some("10.96.7.7".into()),
            cluster_ips: Some(vec!["10.96.7.7".into(), "fd00::7".into()]),
            external_ips: Some(vec!["203.0.113.1".into()]),
            ports: Some(vec![port(80)]),
            session_affinity: Some("ClientIP".into()),
            ..Default::default()
        });
        let ingress = |ip: &str, mode: Option<&str>| LoadBalancerIngress {
            ip: Some(ip.into()),
            ip_mode: mode.map(str::to_owned),
            ..Default::default()
        };
        object.status = Some(ServiceStatus {
            load_balancer: Some(LoadBalancerStatus {
                ingress: Some(vec![
                    ingress("203.0.113.2", Some("VIP")),
                    ingress("203.0.113.3", Some("Proxy")),
                ]),
            }),
            ..Default::default()
        });
        let Converted { value, warnings } = frame(&object, &cluster()).unwrap();
        assert_eq!(warnings, []);
        assert_eq!(value.service_type, ServiceType::NodePort);
        assert_eq!(value.cluster_ips.len(), 2);
        let external: Vec<_> = value.external_ips.iter().map(ToString::to_string).collect();
        assert_eq!(external, ["203.0.113.1", "203.0.113.2"]);
        let balancers: Vec<_> = value
            .traffic
            .load_balancer_ips
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(balancers, ["203.0.113.2"]);
        assert_eq!(value.traffic.external_policy, TrafficPolicy::Cluster);
        assert_eq!((value.ports[0].port, value.ports[0].node_port), (80, 30_080));
        assert_eq!(
            value.session_affinity,
            SessionAffinity::ClientIp {
                timeout_seconds: 10_800
            }
        );
        assert_eq!(
            (value.global, value.shared, value.affinity),
            (true, true, Affinity::Local)
        );
        assert!(is_exported(&value));
    }

    #[test]
    fn headless_and_external_name_services_have_no_addresses() {
        let headless = service(ServiceSpec {
            cluster_ip: Some("None".into()),
            cluster_ips: Some(vec!["None".into()]),
            ..Default::default()
        });
        let value = frame(&headless, &cluster()).unwrap();
        assert_eq!(
            (value.value.service_type, value.warnings.len()),
            (ServiceType::Headless, 0)
        );
        assert!(value.value.cluster_ips.is_empty() && is_exported(&value.value));
        let external = service(ServiceSpec {
            type_: Some("ExternalName".into()),
            ..Default::default()
        });
        assert!(!is_exported(&frame(&external, &cluster()).unwrap().value));
    }

    #[test]
    fn bad_fields_are_left_out_and_named() {
        let object = service(ServiceSpec {
            cluster_ips: Some(vec!["10.96.7.7".into(), "ten".into()]),
            ports: Some(vec![
                port(80),
                port(0),
                port(70_000),
                KubePort {
                    protocol: Some("ICMP".into()),
                    ..port(1)
                },
            ]),
            ..Default::default()
        });
        let Converted { value, warnings } = frame(&object, &cluster()).unwrap();
        assert_eq!(
            (value.cluster_ips.len(), value.ports.len(), warnings.len()),
            (1, 1, 4)
        );
        assert!(frame(&Service::default(), &cluster()).is_err());
    }

    #[test]
    fn traffic_policies_and_source_ranges_are_read() {
        let read = |ranges: &[&str]| {
            let object = service(ServiceSpec {
                internal_traffic_policy: Some("Local".into()),
                external_traffic_policy: Some("Local".into()),
                load_balancer_source_ranges: Some(ranges.iter().map(|text| (*text).to_owned()).collect()),
                ..Default::default()
            });
            let Converted { value, warnings } = frame(&object, &cluster()).unwrap();
            assert_eq!(
                (value.traffic.internal_policy, value.traffic.external_policy),
                (TrafficPolicy::Local, TrafficPolicy::Local)
            );
            let ranges: Vec<_> = value
                .traffic
                .source_ranges
                .iter()
                .map(ToString::to_string)
                .collect();
            (ranges.join(" "), warnings.len())
        };
        assert_eq!(read(&[]), (String::new(), 0));
        assert_eq!(
            read(&["10.0.0.7/8", " 2001:db8::/32", "10.0.0.0/8"]),
            ("10.0.0.0/8 2001:db8::/32".into(), 0)
        );
        assert_eq!(read(&["10.0.0.0/8", "ten"]), ("10.0.0.0/8".into(), 1));
        assert_eq!(read(&["ten"]), ("0.0.0.0/32".into(), 1), "closed, not open");
        let mut object = service(ServiceSpec::default());
        let annotations = object.metadata.annotations.get_or_insert_default();
        annotations.insert(SOURCE_RANGES.to_owned(), "10.0.0.0/8,192.0.2.0/24".to_owned());
        assert_eq!(
            frame(&object, &cluster())
                .unwrap()
                .value
                .traffic
                .source_ranges
                .len(),
            2
        );
    }

    #[test]
    fn long_lists_are_cut_at_what_readers_accept() {
        let object = service(ServiceSpec {
            ports: Some((1..=300).map(port).collect()),
            ..Default::default()
        });
        let Converted { value, warnings } = frame(&object, &cluster()).unwrap();
        assert_eq!(value.ports.len(), PORTS_MAX);
        assert_eq!(warnings[0].reason(), "too_many");
    }
}
