//! The merge from scratch, in the words of the rules: slow, and written without a look at the real one.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use isthmus_bpf_abi::{Address, Backend, ServiceKey, backend_state, service_flag};
use isthmus_mesh::to_address;
use isthmus_model::{Affinity, Protocol, ServiceFrame, ServiceName, Slice, SliceEndpoint};

pub const LOCAL: u16 = 1;

#[derive(Clone, Debug, Default)]
pub struct Tables {
    pub frames: BTreeMap<(u16, ServiceName), ServiceFrame>,
    pub slices: BTreeMap<(u16, ServiceName, String), Slice>,
    pub unhealthy: BTreeSet<u16>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Known {
    cluster: u16,
    active: bool,
    terminating: bool,
}

/// What the maps must hold, numbers and zones apart.
#[derive(Debug, Default, Eq, PartialEq)]
pub struct Expected {
    /// For each frontend its flags and its backends.
    pub frontends: BTreeMap<ServiceKey, (u16, BTreeSet<(Address, u16)>)>,
    /// Entries of the backend map without zone, sorted.
    pub backends: Vec<Backend>,
}

pub fn expected(tables: &Tables) -> Expected {
    let mut claims: BTreeMap<ServiceKey, Vec<(&ServiceName, &str, Protocol)>> = BTreeMap::new();
    let mut groups: BTreeSet<(&ServiceName, &str, Protocol, bool)> = BTreeSet::new();
    for ((cluster, name), frame) in &tables.frames {
        if *cluster != LOCAL {
            continue;
        }
        for ip in &frame.cluster_ips {
            for port in &frame.ports {
                if matches!(port.protocol, Protocol::Tcp | Protocol::Udp) {
                    let key = ServiceKey::frontend(to_address(*ip), port.port, port.protocol.number());
                    claims
                        .entry(key)
                        .or_default()
                        .push((name, &port.name, port.protocol));
                    groups.insert((name, &port.name, port.protocol, ip.is_ipv4()));
                }
            }
        }
    }
    let mut result = Expected::default();
    let mut selected = BTreeMap::new();
    for (name, port_name, protocol, v4) in groups {
        let frame = &tables.frames[&(LOCAL, name.clone())];
        let known = candidates(tables, frame, port_name, protocol, v4);
        for ((address, port), known) in &known {
            if known.active || known.terminating {
                let state = if tables.unhealthy.contains(&known.cluster) {
                    backend_state::QUARANTINED
                } else if known.terminating {
                    backend_state::TERMINATING
                } else {
                    backend_state::ACTIVE
                };
                result.backends.push(Backend {
                    address: *address,
                    port: port.to_be_bytes(),
                    proto: protocol.number(),
                    state,
                    cluster_id: known.cluster,
                    zone: 0,
                    pad: 0,
                });
            }
        }
        let affinity = if frame.global {
            frame.affinity
        } else {
            Affinity::None
        };
        selected.insert(
            (name, port_name, protocol, v4),
            select(affinity, &known, &tables.unhealthy),
        );
    }
    result.backends.sort();
    for (key, mut claims) in claims {
        claims.sort();
        let (name, port_name, protocol) = claims[0];
        let v4 = isthmus_bpf_abi::is_ipv4_mapped(&key.address);
        let global = tables.frames[&(LOCAL, name.clone())].global;
        let flags = service_flag::CLUSTER_IP | if global { service_flag::GLOBAL } else { 0 };
        result
            .frontends
            .insert(key, (flags, selected[&(name, port_name, protocol, v4)].clone()));
    }
    result
}

fn candidates(
    tables: &Tables,
    frame: &ServiceFrame,
    port_name: &str,
    protocol: Protocol,
    v4: bool,
) -> BTreeMap<(Address, u16), Known> {
    let mut all: BTreeMap<(Address, u16), Vec<Known>> = BTreeMap::new();
    for ((cluster, name, _), slice) in &tables.slices {
        let joins = *cluster == LOCAL
            || (frame.global
                && tables
                    .frames
                    .get(&(*cluster, name.clone()))
                    .is_some_and(|remote| remote.global && remote.shared));
        if *name != frame.name || !joins {
            continue;
        }
        let port = slice
            .ports
            .iter()
            .find(|port| *port.name == *port_name && port.protocol == protocol);
        let Some(port) = port else { continue };
        for endpoint in slice
            .endpoints
            .iter()
            .filter(|endpoint| endpoint.ip.is_ipv4() == v4)
        {
            let (active, terminating) = conditions(endpoint);
            all.entry((to_address(endpoint.ip), port.port))
                .or_default()
                .push(Known {
                    cluster: *cluster,
                    active,
                    terminating,
                });
        }
    }
    let owner = |mut known: Vec<Known>| {
        let cluster = known
            .iter()
            .map(|known| (known.cluster != LOCAL, known.cluster))
            .min()
            .map_or(0, |(_, cluster)| cluster);
        known.retain(|known| known.cluster == cluster);
        let best = known
            .iter()
            .find(|known| known.active)
            .or(known.iter().find(|known| known.terminating));
        *best.unwrap_or(&known[0])
    };
    all.into_iter().map(|(key, known)| (key, owner(known))).collect()
}

/// (takes new connections, finishes what it has)
fn conditions(endpoint: &SliceEndpoint) -> (bool, bool) {
    let counts = endpoint.weight > 0;
    (
        counts && endpoint.ready && !endpoint.terminating,
        counts && endpoint.serving && endpoint.terminating,
    )
}

fn select(
    affinity: Affinity,
    known: &BTreeMap<(Address, u16), Known>,
    unhealthy: &BTreeSet<u16>,
) -> BTreeSet<(Address, u16)> {
    let alive = || {
        known
            .iter()
            .filter(|(_, known)| known.active || known.terminating)
    };
    let healthy = || alive().filter(|(_, known)| !unhealthy.contains(&known.cluster));
    let local_active = healthy()
        .filter(|(_, known)| known.cluster == LOCAL && known.active)
        .count();
    let local = healthy().filter(|(_, known)| known.cluster == LOCAL).count();
    let remote = healthy().count() - local;
    let (use_local, use_remote) = match affinity {
        Affinity::None => (true, true),
        Affinity::Local => (true, local_active == 0 && remote > 0),
        Affinity::Remote => (remote == 0 && local > 0, true),
    };
    let in_scope = || {
        healthy().filter(|(_, known)| {
            if known.cluster == LOCAL {
                use_local
            } else {
                use_remote
            }
        })
    };
    let keys = |list: Vec<(&(Address, u16), &Known)>| list.into_iter().map(|(key, _)| *key).collect();
    for choice in [
        in_scope().filter(|(_, known)| known.active).collect::<Vec<_>>(),
        in_scope().collect(),
        alive().filter(|(_, known)| known.active).collect(),
    ] {
        if !choice.is_empty() {
            return keys(choice);
        }
    }
    keys(alive().collect())
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}
