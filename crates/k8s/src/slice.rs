//! EndpointSlice objects to [`Slice`]s of at most 100 endpoints.
//!
//! In: an EndpointSlice, which Kubernetes allows 1,000 endpoints. Out: one slice of the same name, or several when it is larger:
//! endpoints are then split by the leading bits of a hash of their address, as deep as each part needs, and a part is named
//! `<EndpointSlice>~<bits>`.
//!
//! Invariants: the split follows from the set of addresses alone, so a restart makes the same parts; an endpoint that comes, goes or
//! changes rewrites the one part that holds it, except when that part splits or merges with its sibling.

use std::{collections::BTreeMap, net::IpAddr};

use isthmus_model::{Protocol, ServiceName, Slice, SliceEndpoint, SlicePort};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};

use crate::{Cluster, ConvertError, Converted, Warning, annotations, check_name, truncate};

/// Label that names the Service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Label that names the controller that wrote the EndpointSlice.
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
/// Cilium's controller that mirrors other clusters' backends: they are not this cluster's to publish.
const MESH_CONTROLLER: &str = "endpointslice-mesh-controller.cilium.io";
/// Most ports of a slice that readers accept.
const PORTS_MAX: usize = 256;
/// Most zones in an endpoint's hints: Kubernetes' own limit.
const ZONE_HINTS_MAX: usize = 8;
/// Bits that tell two addresses apart: 64 of a hash, then the address itself.
const DEPTH_MAX: usize = 64 + 128;
/// Longest name of a slice in a key.
const NAME_LEN_MAX: usize = 253;

/// An EndpointSlice's endpoints.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PackedSlice {
    /// Service they belong to.
    pub service: ServiceName,
    /// None if there are no endpoints.
    pub slices: Vec<Slice>,
}

/// Converts an EndpointSlice. `None` if it is not this cluster's to publish: no service, names in place of addresses, or a mirror.
pub fn pack(
    object: &EndpointSlice,
    cluster: &Cluster,
) -> Result<Option<Converted<PackedSlice>>, ConvertError> {
    let name = check_name(object.metadata.name.as_ref())?;
    let label = |key| object.metadata.labels.as_ref().and_then(|labels| labels.get(key));
    let Some(service) = label(SERVICE_NAME) else {
        return Ok(None);
    };
    let v4 = match object.address_type.as_str() {
        "IPv4" => true,
        "IPv6" => false,
        _ => return Ok(None),
    };
    if label(MANAGED_BY).is_some_and(|controller| controller == MESH_CONTROLLER) {
        return Ok(None);
    }
    let namespace = object
        .metadata
        .namespace
        .as_deref()
        .ok_or(ConvertError::Missing("namespace"))?;
    let service = ServiceName::new(namespace, service)?;
    let mut warnings = vec![];
    let weight = annotations::weight(object.metadata.annotations.as_ref(), &mut warnings);
    let ports = ports(object, &mut warnings);
    let mut by_ip = BTreeMap::<IpAddr, SliceEndpoint>::new();
    for endpoint in &object.endpoints {
        for text in &endpoint.addresses {
            let Some(ip) = text.parse().ok().filter(|ip: &IpAddr| ip.is_ipv4() == v4) else {
                warnings.push(Warning::field("address", text));
                continue;
            };
            let endpoint = convert(endpoint, ip, weight);
            // The same address twice: a pod on the host's network whose predecessor still terminates. The better one counts.
            by_ip
                .entry(ip)
                .and_modify(|known| {
                    if rank(&endpoint) > rank(known) {
                        *known = endpoint.clone();
                    }
                })
                .or_insert(endpoint);
        }
    }
    let mut parts = vec![];
    if !by_ip.is_empty() {
        split(by_ip.into_values().collect(), String::new(), &mut parts);
    }
    let slices = parts.into_iter().map(|(bits, endpoints)| Slice {
        cluster: cluster.name.clone(),
        cluster_id: cluster.id,
        service: service.clone(),
        slice: part_name(name, &bits).into(),
        ports: ports.clone(),
        endpoints,
    });
    let value = PackedSlice {
        slices: slices.collect(),
        service: service.clone(),
    };
    Ok(Some(Converted { value, warnings }))
}

fn ports(object: &EndpointSlice, warnings: &mut Vec<Warning>) -> Vec<SlicePort> {
    let mut ports = vec![];
    for port in object.ports.iter().flatten() {
        let protocol = port.protocol.as_deref().map_or(Ok(Protocol::Tcp), str::parse);
        let number = port.port.and_then(|number| u16::try_from(number).ok());
        match (number, protocol) {
            (Some(number), Ok(protocol)) if number != 0 && protocol != Protocol::Any => {
                ports.push(SlicePort {
                    name: port.name.as_deref().unwrap_or_default().into(),
                    protocol,
                    port: number,
                })
            }
            _ => {
                let text = format!("{:?}/{}", port.port, port.protocol.as_deref().unwrap_or("TCP"));
                warnings.push(Warning::field("port", &text));
            }
        }
    }
    truncate(&mut ports, "ports", PORTS_MAX, warnings);
    ports
}

/// Kubernetes' rules for what is not said: ready, serving as it is ready, not terminating.
fn convert(endpoint: &Endpoint, ip: IpAddr, weight: u16) -> SliceEndpoint {
    let conditions = endpoint.conditions.as_ref();
    let ready = conditions.and_then(|conditions| conditions.ready).unwrap_or(true);
    SliceEndpoint {
        ip,
        ready,
        serving: conditions
            .and_then(|conditions| conditions.serving)
            .unwrap_or(ready),
        terminating: conditions
            .and_then(|conditions| conditions.terminating)
            .unwrap_or(false),
        node: endpoint.node_name.as_deref().unwrap_or_default().into(),
        zone: endpoint.zone.as_deref().unwrap_or_default().into(),
        zone_hints: zone_hints(endpoint),
        hostname: endpoint.hostname.as_deref().unwrap_or_default().into(),
        weight,
    }
}

/// Topology-aware hints: ascending, so that the same hints are the same bytes.
fn zone_hints(endpoint: &Endpoint) -> Vec<Box<str>> {
    let hints = endpoint.hints.as_ref().and_then(|hints| hints.for_zones.as_ref());
    let mut zones: Vec<Box<str>> = hints
        .into_iter()
        .flatten()
        .filter(|zone| !zone.name.is_empty())
        .map(|zone| zone.name.as_str().into())
        .collect();
    zones.sort_unstable();
    zones.dedup();
    zones.truncate(ZONE_HINTS_MAX);
    zones
}

fn rank(endpoint: &SliceEndpoint) -> (bool, bool, &str, &str, &str) {
    (
        endpoint.ready && !endpoint.terminating,
        endpoint.serving,
        &endpoint.node,
        &endpoint.zone,
        &endpoint.hostname,
    )
}

/// Splits until each part is small enough. `bits` is the path to this part.
fn split(endpoints: Vec<SliceEndpoint>, bits: String, parts: &mut Vec<(String, Vec<SliceEndpoint>)>) {
    if endpoints.len() <= Slice::MAX_ENDPOINTS || bits.len() == DEPTH_MAX {
        if !endpoints.is_empty() {
            parts.push((bits, endpoints));
        }
        return;
    }
    let (ones, zeros) = endpoints
        .into_iter()
        .partition(|endpoint| bit(endpoint.ip, bits.len()));
    split(zeros, format!("{bits}0"), parts);
    split(ones, format!("{bits}1"), parts);
}

/// Bit `depth` of an address' hash, and of the address itself after the hash is used up: no two addresses agree in all.
fn bit(ip: IpAddr, depth: usize) -> bool {
    let raw = match ip {
        IpAddr::V4(ip) => u128::from(u32::from(ip)) << 96,
        IpAddr::V6(ip) => u128::from(ip),
    };
    if depth < 64 {
        let folded = (raw >> 64) as u64 ^ mix(raw as u64);
        mix(folded) >> (63 - depth) & 1 == 1
    } else {
        raw >> (127 - (depth - 64)) & 1 == 1
    }
}

/// The finaliser of splitmix64: every input bit moves every output bit. Part of the format: another one would rewrite all parts.
const fn mix(mut word: u64) -> u64 {
    word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// `~` is in no Kubernetes name, so a part never takes another EndpointSlice's name.
fn part_name(name: &str, bits: &str) -> String {
    if bits.is_empty() {
        return name.to_owned();
    }
    let whole = format!("{name}~{bits}");
    if whole.len() <= NAME_LEN_MAX {
        return whole;
    }
    let hash = name.bytes().fold(0, |hash, byte| mix(hash ^ u64::from(byte)));
    let tail = format!("~{hash:016x}~{bits}");
    // Names are ASCII (checked), and the tail is at most 210 bytes.
    format!("{}{tail}", &name[..NAME_LEN_MAX - tail.len()])
}

#[cfg(test)]
mod tests;
