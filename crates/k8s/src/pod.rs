//! Pod objects to [`Workload`]s: what a pod's addresses mean.
//!
//! In: a Pod. Out: a workload, or none for a pod that owns no address: on the host's network, finished, or not yet addressed.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use isthmus_model::{IpEntry, NamedPort, NumericIdentity, Protocol};
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

use crate::{ConvertError, Converted, Warning, check_name, labels::PodLabels, truncate};

/// Most named ports of a pod that readers accept.
const NAMED_PORTS_MAX: usize = 256;
/// Most addresses of a pod; Kubernetes has one of a family.
const IPS_MAX: usize = 16;

/// A pod that owns addresses.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Workload {
    /// Namespace.
    pub namespace: Box<str>,
    /// Pod name.
    pub name: Box<str>,
    /// Service account, empty if none.
    pub service_account: Box<str>,
    /// The pod's own labels.
    pub labels: BTreeMap<String, String>,
    /// Addresses, at least one.
    pub ips: Vec<IpAddr>,
    /// Address of the node that runs it.
    pub host_ip: Option<IpAddr>,
    /// Named ports, by name.
    pub named_ports: Vec<NamedPort>,
    /// Is being deleted.
    pub terminating: bool,
    /// When it was created, Unix milliseconds.
    pub created_ms: i64,
}

impl Workload {
    /// What an address of the workload means.
    pub fn entry(&self, ip: IpAddr, identity: NumericIdentity) -> IpEntry {
        IpEntry {
            prefix: IpNet::from(ip),
            host_ip: self.host_ip,
            identity,
            encryption_key: 0,
            namespace: self.namespace.to_string(),
            pod_name: self.name.to_string(),
            service_account: self.service_account.to_string(),
            named_ports: self.named_ports.clone(),
        }
    }

    /// What counts for the identity.
    pub fn pod_labels(&self) -> PodLabels<'_> {
        PodLabels {
            namespace: &self.namespace,
            service_account: &self.service_account,
            own: &self.labels,
        }
    }

    /// Orders workloads that claim the same address: the greatest one has it. While an address moves from one pod to the next, both
    /// may be listed; the one that stays and was created last is right.
    pub fn claim(&self) -> impl Ord + use<> {
        (
            !self.terminating,
            self.created_ms,
            self.namespace.clone(),
            self.name.clone(),
        )
    }
}

/// Converts a Pod.
pub fn workload(pod: &Pod) -> Result<Option<Converted<Workload>>, ConvertError> {
    let name = check_name(pod.metadata.name.as_ref())?;
    let namespace = pod
        .metadata
        .namespace
        .as_ref()
        .ok_or(ConvertError::Missing("namespace"))?;
    let (Some(spec), Some(status)) = (&pod.spec, &pod.status) else {
        return Ok(None);
    };
    let finished = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    if finished || spec.host_network == Some(true) {
        return Ok(None);
    }
    let mut warnings = vec![];
    let mut parse = |field: &'static str, text: &str| {
        let ip = text.parse::<IpAddr>().map(|ip| ip.to_canonical());
        ip.inspect_err(|_| warnings.push(Warning::field(field, text)))
            .ok()
    };
    let mut ips: Vec<IpAddr> = vec![];
    let listed = status.pod_ips.iter().flatten().map(|pod_ip| pod_ip.ip.as_str());
    for text in listed
        .chain(status.pod_ip.as_deref())
        .filter(|text| !text.is_empty())
    {
        ips.extend(parse("podIP", text).filter(|ip| !ips.contains(ip)));
    }
    let host_ip = status
        .host_ip
        .as_deref()
        .filter(|text| !text.is_empty())
        .and_then(|text| parse("hostIP", text));
    if ips.is_empty() {
        return Ok(None);
    }
    truncate(&mut ips, "podIPs", IPS_MAX, &mut warnings);
    let named_ports = named_ports(spec, &mut warnings);
    let value = Workload {
        namespace: namespace.as_str().into(),
        name: name.into(),
        service_account: spec.service_account_name.as_deref().unwrap_or_default().into(),
        labels: pod.metadata.labels.clone().unwrap_or_default(),
        ips,
        host_ip,
        named_ports,
        terminating: pod.metadata.deletion_timestamp.is_some(),
        created_ms: pod
            .metadata
            .creation_timestamp
            .as_ref()
            .map_or(0, |time| time.0.as_millisecond()),
    };
    Ok(Some(Converted { value, warnings }))
}

/// Ports with names, by name; the first of a name counts. Init containers count if they go on beside the others.
fn named_ports(spec: &PodSpec, warnings: &mut Vec<Warning>) -> Vec<NamedPort> {
    let sidecars = spec
        .init_containers
        .iter()
        .flatten()
        .filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let ports = |container: &Container| container.ports.clone().unwrap_or_default();
    let mut by_name = BTreeMap::new();
    for port in spec.containers.iter().chain(sidecars).flat_map(ports) {
        let Some(name) = port.name.filter(|name| !name.is_empty()) else {
            continue;
        };
        let protocol = port.protocol.as_deref().map_or(Ok(Protocol::Tcp), str::parse);
        match (u16::try_from(port.container_port), protocol) {
            (Ok(number), Ok(protocol)) if number != 0 => {
                by_name.entry(name.clone()).or_insert(NamedPort {
                    name,
                    port: number,
                    protocol,
                });
            }
            _ => warnings.push(Warning::field("containerPort", &name)),
        }
    }
    let mut ports = by_name.into_values().collect();
    truncate(&mut ports, "containerPorts", NAMED_PORTS_MAX, warnings);
    ports
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::{
        api::core::v1::{ContainerPort, PodIP, PodStatus},
        apimachinery::pkg::apis::meta::v1::ObjectMeta,
    };

    fn pod(ips: &[&str]) -> Pod {
        let port = |name: &str, number| ContainerPort {
            name: Some(name.to_owned()),
            container_port: number,
            ..Default::default()
        };
        Pod {
            metadata: ObjectMeta {
                name: Some("cart-0".into()),
                namespace: Some("shop".into()),
                ..Default::default()
            },
            spec: Some(PodSpec {
                service_account_name: Some("cart".into()),
                containers: vec![Container {
                    ports: Some(vec![
                        port("web", 8080),
                        port("admin", 9090),
                        port("web", 1),
                        port("bad", 70_000),
                    ]),
                    ..Default::default()
                }],
                ..Default::default()
            }),
            status: Some(PodStatus {
                phase: Some("Running".into()),
                pod_ip: ips.first().map(|ip| (*ip).to_owned()),
                pod_ips: Some(ips.iter().map(|ip| PodIP { ip: (*ip).to_owned() }).collect()),
                host_ip: Some("172.18.0.3".into()),
                ..Default::default()
            }),
        }
    }

    #[test]
    fn a_running_pod_owns_its_addresses() {
        let Converted { value, warnings } = workload(&pod(&["10.1.0.21", "fd00::21"])).unwrap().unwrap();
        assert_eq!(value.ips.len(), 2);
        let entry = value.entry(value.ips[0], NumericIdentity(65_553));
        assert_eq!(entry.prefix.to_string(), "10.1.0.21/32");
        assert_eq!(entry.host_ip.unwrap().to_string(), "172.18.0.3");
        let ports: Vec<_> = entry
            .named_ports
            .iter()
            .map(|p| (p.name.as_str(), p.port))
            .collect();
        assert_eq!(ports, [("admin", 9090), ("web", 8080)]);
        assert_eq!(warnings, [Warning::field("containerPort", "bad")]);
    }

    #[test]
    fn pods_without_own_addresses_are_none() {
        for phase in ["Succeeded", "Failed"] {
            let mut pod = pod(&["10.1.0.21"]);
            pod.status.as_mut().unwrap().phase = Some(phase.into());
            assert_eq!(workload(&pod).unwrap(), None, "{phase}");
        }
        let mut on_host = pod(&["172.18.0.3"]);
        on_host.spec.as_mut().unwrap().host_network = Some(true);
        assert_eq!(workload(&on_host).unwrap(), None);
        assert_eq!(workload(&pod(&[])).unwrap(), None);
        assert_eq!(workload(&pod(&["nonsense"])).unwrap(), None);
        assert!(workload(&Pod::default()).is_err());
    }

    #[test]
    fn the_pod_that_stays_has_the_address() {
        let make = |name: &str, terminating, created_ms| Workload {
            terminating,
            created_ms,
            name: name.into(),
            ..workload(&pod(&["10.1.0.21"])).unwrap().unwrap().value
        };
        assert!(make("a", false, 1).claim() > make("b", true, 2).claim());
        assert!(make("a", false, 2).claim() > make("b", false, 1).claim());
        assert!(make("b", false, 1).claim() > make("a", false, 1).claim());
    }
}
