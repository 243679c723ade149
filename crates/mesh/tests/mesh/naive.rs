//! The merge from scratch, in the words of the rules: slow, and written without a look at the real one.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use isthmus_bpf_abi::{
    Address, Backend, SCOPE_EXTERNAL, SCOPE_INTERNAL, ServiceKey, backend_state, service_flag,
};
use isthmus_mesh::{loadbalancer::Verdict, to_address};
use isthmus_model::{
    Affinity, Algorithm, MinHealthy, Protocol, ServiceFrame, ServiceName, SessionAffinity, Slice,
    SliceEndpoint, TierCluster, TrafficPolicy,
};

use crate::events::{NODE, cluster_name};

pub const LOCAL: u16 = 1;

#[derive(Clone, Debug, Default)]
pub struct Tables {
    pub frames: BTreeMap<(u16, ServiceName), ServiceFrame>,
    pub slices: BTreeMap<(u16, ServiceName, String), Slice>,
    pub unhealthy: BTreeSet<u16>,
    pub node_addresses: Vec<IpAddr>,
    pub zone: String,
}

#[derive(Clone, Debug, PartialEq)]
struct Known {
    cluster: u16,
    active: bool,
    terminating: bool,
    weight: u16,
    /// Counts as part of what its cluster is meant to have.
    meant: bool,
    /// Terminating, serving or not.
    leaving: bool,
    hints: Vec<Box<str>>,
}

pub type Target = (Address, u16);

/// A frontend as it must be. Shares add up to 1; a backend that must not be used has none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExpectedFrontend {
    pub flags: u16,
    pub affinity_seconds: u32,
    pub shares: BTreeMap<Target, f64>,
    /// Prefix lengths and addresses, for frontends that not everybody may ask.
    pub allowed: Option<BTreeSet<(u32, Address)>>,
}

/// What the maps must hold, numbers and zones apart.
#[derive(Debug, Default)]
pub struct Expected {
    pub frontends: BTreeMap<ServiceKey, ExpectedFrontend>,
    /// Entries of the backend map without zone, sorted.
    pub backends: Vec<Backend>,
}

/// Service, port name, protocol, IPv4, this node's backends only.
type Group<'a> = (&'a ServiceName, &'a str, Protocol, bool, bool);

/// Kind (cluster IP, node port, load balancer, external IP), group, flags.
type Claim<'a> = (u8, Group<'a>, u16);

fn claims(tables: &Tables) -> BTreeMap<ServiceKey, Vec<Claim<'_>>> {
    let mut claims: BTreeMap<ServiceKey, Vec<Claim<'_>>> = BTreeMap::new();
    let local = tables.frames.iter().filter(|((cluster, _), _)| *cluster == LOCAL);
    for ((_, name), frame) in local {
        let traffic = &frame.traffic;
        let families: BTreeSet<bool> = frame.cluster_ips.iter().map(IpAddr::is_ipv4).collect();
        for port in &frame.ports {
            if !matches!(port.protocol, Protocol::Tcp | Protocol::Udp) {
                continue;
            }
            let mut claim = |ip: IpAddr, number: u16, scope: u8, kind: u8, node_only: bool, flags: u16| {
                let mut key = ServiceKey::frontend(to_address(ip), number, port.protocol.number());
                key.scope = scope;
                let group = (name, &*port.name, port.protocol, ip.is_ipv4(), node_only);
                claims.entry(key).or_default().push((kind, group, flags));
            };
            for ip in &frame.cluster_ips {
                let node_only = traffic.internal_policy == TrafficPolicy::Local;
                claim(
                    *ip,
                    port.port,
                    SCOPE_EXTERNAL,
                    0,
                    node_only,
                    service_flag::CLUSTER_IP,
                );
            }
            let mut outside: Vec<(IpAddr, u16, u8)> = vec![];
            if port.node_port != 0 {
                let asked = tables
                    .node_addresses
                    .iter()
                    .filter(|ip| families.contains(&ip.is_ipv4()));
                outside.extend(asked.map(|ip| (*ip, port.node_port, 1)));
            }
            for ip in &frame.external_ips {
                let kind = if traffic.load_balancer_ips.contains(ip) {
                    2
                } else {
                    3
                };
                outside.push((*ip, port.port, kind));
            }
            for (ip, number, kind) in outside {
                let mut flags = service_flag::EXTERNAL;
                if kind == 2 && !traffic.source_ranges.is_empty() {
                    flags |= service_flag::SOURCE_RANGES;
                }
                if traffic.external_policy == TrafficPolicy::Local {
                    let local = flags | service_flag::EXTERNAL_LOCAL;
                    claim(ip, number, SCOPE_EXTERNAL, kind, true, local);
                    claim(ip, number, SCOPE_INTERNAL, kind, false, service_flag::EXTERNAL);
                } else {
                    claim(ip, number, SCOPE_EXTERNAL, kind, false, flags);
                }
            }
        }
    }
    claims
}

pub fn expected(tables: &Tables) -> Expected {
    let claims = claims(tables);
    let groups: BTreeSet<Group<'_>> = claims.values().flatten().map(|(_, group, _)| *group).collect();
    let mut result = Expected::default();
    let mut selected = BTreeMap::new();
    for group in groups {
        let (name, port_name, protocol, v4, node_only) = group;
        let frame = &tables.frames[&(LOCAL, name.clone())];
        let known = candidates(tables, frame, port_name, protocol, v4, node_only);
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
        selected.insert(group, select(tables, frame, &known));
    }
    result.backends.sort();
    for (key, mut claims) in claims {
        claims.sort();
        let (_, group, own_flags) = claims[0];
        let frame = &tables.frames[&(LOCAL, group.0.clone())];
        let shares = selected[&group].clone();
        let mut flags = own_flags;
        if frame.global {
            flags |= service_flag::GLOBAL;
        }
        if frame.traffic.algorithm == Algorithm::Maglev && !shares.is_empty() {
            flags |= service_flag::MAGLEV;
        }
        let mut affinity_seconds = 0;
        if let SessionAffinity::ClientIp { timeout_seconds } = frame.session_affinity {
            flags |= service_flag::AFFINITY;
            affinity_seconds = timeout_seconds;
        }
        let ranges = || {
            let ranges = frame.traffic.source_ranges.iter();
            ranges
                .map(|range| {
                    let bits = if range.network().is_ipv4() { 32 + 96 } else { 32 };
                    (bits + u32::from(range.prefix_len()), to_address(range.network()))
                })
                .collect()
        };
        let allowed = (flags & service_flag::SOURCE_RANGES != 0).then(ranges);
        let frontend = ExpectedFrontend {
            flags,
            affinity_seconds,
            shares,
            allowed,
        };
        result.frontends.insert(key, frontend);
    }
    result
}

/// What becomes of an open flow through a frontend.
pub fn flow_verdict(tables: &Tables, (ip, port): (Address, u16), proto: u8, target: &Target) -> Verdict {
    let claims = claims(tables);
    let found = [SCOPE_EXTERNAL, SCOPE_INTERNAL].into_iter().filter_map(|scope| {
        let key = ServiceKey {
            scope,
            ..ServiceKey::frontend(ip, port, proto)
        };
        claims.get(&key)?.iter().min()
    });
    let verdicts = found.map(|(_, (name, port_name, protocol, v4, node_only), _)| {
        let frame = &tables.frames[&(LOCAL, (*name).clone())];
        let said = named(tables, frame, port_name, *protocol, *v4, *node_only);
        let known: BTreeMap<Target, Known> = said
            .iter()
            .map(|(key, known)| (*key, owner(known.clone())))
            .collect();
        let used = select(tables, frame, &known);
        let lost = known
            .get(target)
            .is_some_and(|known| tables.unhealthy.contains(&known.cluster));
        if used.contains_key(target) {
            Verdict::GoesOn
        } else if lost && !used.is_empty() {
            Verdict::Ends
        } else {
            let leaving = said
                .get(target)
                .is_some_and(|said| said.iter().any(|one| one.leaving));
            let usable = known
                .get(target)
                .is_some_and(|known| known.active || known.terminating);
            if usable || leaving {
                Verdict::GoesOn
            } else if said.contains_key(target) {
                Verdict::Ends
            } else {
                Verdict::Withdrawn
            }
        }
    });
    // The gentlest of them.
    verdicts.min().unwrap_or(Verdict::GoesOn)
}

fn candidates(
    tables: &Tables,
    frame: &ServiceFrame,
    port_name: &str,
    protocol: Protocol,
    v4: bool,
    node_only: bool,
) -> BTreeMap<Target, Known> {
    named(tables, frame, port_name, protocol, v4, node_only)
        .into_iter()
        .map(|(key, known)| (key, owner(known)))
        .collect()
}

/// What each slice that counts says of a backend.
fn named(
    tables: &Tables,
    frame: &ServiceFrame,
    port_name: &str,
    protocol: Protocol,
    v4: bool,
    node_only: bool,
) -> BTreeMap<Target, Vec<Known>> {
    let mut all: BTreeMap<Target, Vec<Known>> = BTreeMap::new();
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
        let here = |endpoint: &&SliceEndpoint| !node_only || (*cluster == LOCAL && *endpoint.node == *NODE);
        // The best that a slice says of one address counts, as if it were all it says.
        let mut said: BTreeMap<IpAddr, Known> = BTreeMap::new();
        for endpoint in slice
            .endpoints
            .iter()
            .filter(|endpoint| endpoint.ip.is_ipv4() == v4)
        {
            let known = known(*cluster, endpoint);
            let better = said
                .get(&endpoint.ip)
                .is_none_or(|before| rank(&known) < rank(before));
            if better {
                let marker = Known {
                    meant: known.meant,
                    ..known
                };
                said.insert(endpoint.ip, marker);
            }
        }
        let kept = |ip: &IpAddr| {
            let mut same = slice.endpoints.iter().filter(|endpoint| endpoint.ip == *ip);
            same.find(|endpoint| rank(&known(*cluster, endpoint)) == rank(&said[ip]))
                .filter(here)
                .is_some()
        };
        for (ip, known) in said.iter().filter(|(ip, _)| kept(ip)) {
            all.entry((to_address(*ip), port.port))
                .or_default()
                .push(known.clone());
        }
    }
    all
}

/// The owner's word, the best of it.
fn owner(mut known: Vec<Known>) -> Known {
    let cluster = known
        .iter()
        .map(|known| (known.cluster != LOCAL, known.cluster))
        .min()
        .map_or(0, |(_, cluster)| cluster);
    known.retain(|known| known.cluster == cluster);
    let best = known.iter().map(rank).min().unwrap_or(2);
    let first = known.iter().find(|known| rank(known) == best);
    first.unwrap_or(&known[0]).clone()
}

fn rank(known: &Known) -> u8 {
    match (known.active, known.terminating) {
        (true, _) => 0,
        (_, true) => 1,
        _ => 2,
    }
}

fn known(cluster: u16, endpoint: &SliceEndpoint) -> Known {
    let counts = endpoint.weight > 0;
    let terminating = counts && endpoint.serving && endpoint.terminating;
    Known {
        cluster,
        active: counts && endpoint.ready && !endpoint.terminating,
        terminating,
        weight: endpoint.weight,
        meant: !endpoint.terminating,
        leaving: endpoint.terminating,
        hints: endpoint.zone_hints.clone(),
    }
}

/// Clusters in the order in which they are asked; the rest of the mesh is in the last one.
fn ranks(frame: &ServiceFrame, cluster: u16) -> usize {
    let tiers = frame.traffic.preference.tiers.list();
    if !frame.global {
        return 0;
    }
    if tiers.is_empty() {
        return match frame.affinity {
            Affinity::None => 0,
            Affinity::Local => usize::from(cluster != LOCAL),
            Affinity::Remote => usize::from(cluster == LOCAL),
        };
    }
    let named = |wanted: &TierCluster| tiers.iter().position(|tier| tier.contains(wanted));
    let as_local = (cluster == LOCAL).then(|| named(&TierCluster::Local)).flatten();
    as_local
        .or_else(|| named(&TierCluster::Named(cluster_name(cluster))))
        .or_else(|| named(&TierCluster::Others))
        .unwrap_or(tiers.len())
}

fn select(tables: &Tables, frame: &ServiceFrame, known: &BTreeMap<Target, Known>) -> BTreeMap<Target, f64> {
    let lost = |known: &Known| tables.unhealthy.contains(&known.cluster);
    let preference = &frame.traffic.preference;
    let evenly = |wanted: &dyn Fn(&Known) -> bool| -> BTreeMap<Target, f64> {
        let keys: Vec<_> = known
            .iter()
            .filter(|(_, known)| wanted(known))
            .map(|(key, _)| *key)
            .collect();
        keys.iter().map(|key| (*key, 1.0 / keys.len() as f64)).collect()
    };
    let remote = frame.global && preference.tiers.is_empty() && frame.affinity == Affinity::Remote;
    let first = |known: &Known| ranks(frame, known.cluster) == 0 && !lost(known);
    if remote
        && !known.values().any(|known| first(known) && known.active)
        && known.values().any(|known| first(known) && known.terminating)
    {
        return evenly(&|known| first(known) && known.terminating);
    }
    let shares = tier_shares(frame, known, &lost);
    if shares.is_empty() {
        for wanted in [
            &(|known: &Known| known.terminating && !lost(known)) as &dyn Fn(&Known) -> bool,
            &|known: &Known| known.active,
            &|known: &Known| known.terminating,
        ] {
            let found = evenly(wanted);
            if !found.is_empty() {
                return found;
            }
        }
        return BTreeMap::new();
    }
    let here = |known: &Known| known.hints.iter().any(|zone| **zone == *tables.zone);
    let own = || {
        known
            .values()
            .filter(|known| known.cluster == LOCAL && known.active)
    };
    let hinted = own().all(|known| !known.hints.is_empty()) && own().any(here);
    let mut result = BTreeMap::new();
    for (tier, share) in shares {
        let members: Vec<_> = known
            .iter()
            .filter(|(_, known)| known.active && !lost(known) && ranks(frame, known.cluster) == tier)
            .filter(|(_, known)| !(hinted && known.cluster == LOCAL && !here(known)))
            .collect();
        let sum: f64 = members.iter().map(|(_, known)| f64::from(known.weight)).sum();
        result.extend(
            members
                .iter()
                .map(|(key, known)| (**key, share * f64::from(known.weight) / sum)),
        );
    }
    result
}

fn tier_shares(
    frame: &ServiceFrame,
    known: &BTreeMap<Target, Known>,
    lost: &dyn Fn(&Known) -> bool,
) -> BTreeMap<usize, f64> {
    let preference = &frame.traffic.preference;
    let (min, spill_over) = if frame.global {
        (preference.min_healthy, preference.spill_over)
    } else {
        (MinHealthy::Count(1), true)
    };
    // Tier, number and weight of those that are healthy, weight of all that are meant to be there.
    let mut tiers: BTreeMap<usize, (f64, f64, f64)> = BTreeMap::new();
    for known in known.values() {
        let tier = tiers.entry(ranks(frame, known.cluster)).or_default();
        if known.active && !lost(known) {
            tier.0 += 1.0;
            tier.1 += f64::from(known.weight);
        }
        if known.meant {
            tier.2 += f64::from(known.weight);
        }
    }
    tiers.retain(|_, (number, ..)| *number > 0.0);
    let enough = |(number, healthy, all): &(f64, f64, f64)| match min {
        MinHealthy::Count(count) => *number >= f64::from(count),
        MinHealthy::Percent(percent) => healthy * 100.0 >= all * f64::from(percent),
    };
    if !spill_over && let Some((tier, _)) = tiers.iter().find(|(_, tier)| enough(tier)) {
        return [(*tier, 1.0)].into();
    }
    let mut left = 1.0;
    let mut shares = BTreeMap::new();
    for (number, tier) in &tiers {
        let mut fit = tier.1 / tier.2;
        if let MinHealthy::Count(count) = min {
            fit = f64::min(fit, tier.0 / f64::from(count));
        }
        let takes = if enough(tier) { left } else { f64::min(left, fit) };
        if takes > 0.0 {
            shares.insert(*number, takes);
        }
        left -= takes;
    }
    let given: f64 = shares.values().sum();
    shares.values_mut().for_each(|share| *share /= given);
    shares
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}
