//! Where a service can be asked: cluster IPs, node ports, external IPs and load balancers' addresses, with the traffic
//! policies that say which backends each may use.
//!
//! In: the local cluster's frame. Out: [`FrontendRecord`]s, in order.
//!
//! Rules (Kubernetes): internal traffic policy Local restricts cluster IPs to backends of this node. External traffic policy
//! Local restricts what is reached from outside in the same way; inside the cluster such a frontend has all backends, so it
//! is there twice, in two scopes.

use isthmus_bpf_abi::{Address, SCOPE_EXTERNAL, SCOPE_INTERNAL, service_flag};
use isthmus_model::{Protocol, ServiceFrame, ServicePort, ServiceType, TrafficPolicy};

use super::record::{GroupPort, Reach};
use crate::{Family, address::to_address, indexed::push_tight};

/// Stands for each of the node's addresses of the group's family.
pub(crate) const NODE: Address = [0; 16];

/// What a frontend's address is. Of two services that claim one, the lower kind has it: nobody takes another service's cluster
/// IP, or a node's port, by naming it as an external IP.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum FrontendKind {
    /// A cluster IP.
    ClusterIp,
    /// A port of this node.
    NodePort,
    /// A load balancer's address.
    LoadBalancer,
    /// An external IP.
    ExternalIp,
}

/// A frontend that the local cluster's frame asks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct FrontendRecord {
    pub(crate) group: GroupPort,
    pub(crate) address: Address,
    /// Host order.
    pub(crate) port: u16,
    pub(crate) scope: u8,
    pub(crate) kind: FrontendKind,
    /// Bits of [`service_flag`] that are its own.
    pub(crate) flags: u16,
}

/// The frontends of a frame, for its TCP and UDP ports.
pub(super) fn frontends(frame: &ServiceFrame, names: &[u32]) -> Vec<FrontendRecord> {
    let mut list = Vec::new();
    if matches!(
        frame.service_type,
        ServiceType::Headless | ServiceType::ExternalName
    ) {
        return list;
    }
    let traffic = &frame.traffic;
    for (port, name) in frame.ports.iter().zip(names) {
        if !matches!(port.protocol, Protocol::Tcp | Protocol::Udp) {
            continue;
        }
        for address in frame.cluster_ips.iter().copied().map(to_address) {
            push_tight(
                &mut list,
                FrontendRecord {
                    group: group(port, *name, Family::of(&address), reach(traffic.internal_policy)),
                    address,
                    port: port.port,
                    scope: SCOPE_EXTERNAL,
                    kind: FrontendKind::ClusterIp,
                    flags: service_flag::CLUSTER_IP,
                },
            );
        }
        let mut expose = |address: Address, family: Family, number: u16, kind: FrontendKind| {
            let ranges = kind == FrontendKind::LoadBalancer && !traffic.source_ranges.is_empty();
            let outside = service_flag::EXTERNAL | if ranges { service_flag::SOURCE_RANGES } else { 0 };
            let record = |scope, reach, flags| FrontendRecord {
                group: group(port, *name, family, reach),
                address,
                port: number,
                scope,
                kind,
                flags,
            };
            match traffic.external_policy {
                TrafficPolicy::Cluster => {
                    push_tight(&mut list, record(SCOPE_EXTERNAL, Reach::All, outside));
                }
                TrafficPolicy::Local => {
                    let local = outside | service_flag::EXTERNAL_LOCAL;
                    push_tight(&mut list, record(SCOPE_EXTERNAL, Reach::Node, local));
                    push_tight(
                        &mut list,
                        record(SCOPE_INTERNAL, Reach::All, service_flag::EXTERNAL),
                    );
                }
            }
        };
        for ip in &frame.external_ips {
            let kind = if traffic.load_balancer_ips.contains(ip) {
                FrontendKind::LoadBalancer
            } else {
                FrontendKind::ExternalIp
            };
            let address = to_address(*ip);
            expose(address, Family::of(&address), port.port, kind);
        }
        if port.node_port != 0 {
            let mut families: Vec<Family> = frame
                .cluster_ips
                .iter()
                .map(|ip| Family::of(&to_address(*ip)))
                .collect();
            families.sort_unstable();
            families.dedup();
            for family in families {
                expose(NODE, family, port.node_port, FrontendKind::NodePort);
            }
        }
    }
    let key = |frontend: &FrontendRecord| {
        (
            frontend.group,
            frontend.address,
            frontend.port,
            frontend.scope,
            frontend.kind,
        )
    };
    list.sort_by_key(key);
    list.dedup_by_key(|frontend| key(frontend));
    list
}

const fn reach(policy: TrafficPolicy) -> Reach {
    match policy {
        TrafficPolicy::Cluster => Reach::All,
        TrafficPolicy::Local => Reach::Node,
    }
}

const fn group(port: &ServicePort, name: u32, family: Family, reach: Reach) -> GroupPort {
    GroupPort {
        name,
        protocol: port.protocol,
        family,
        reach,
    }
}
