//! Source tables in compact form: what each cluster says about a service.
//!
//! An endpoint is 32 bytes; names of nodes, hosts and ports are interned. What the merge and `isthmus service` do not
//! use (labels, selectors, a remote frame's addresses) is not kept.

use std::sync::Arc;

use ipnet::IpNet;
use isthmus_bpf_abi::Address;
use isthmus_model::{
    Affinity, Algorithm, Preference, Protocol, ServiceFrame, ServiceName, SessionAffinity, Slice,
};

use super::{
    candidate::{Context, View},
    exposed::{FrontendRecord, frontends},
    select::Class,
    zones::Zones,
};
use crate::{
    Family,
    address::to_address,
    intern::{Interner, Texts},
};

const READY: u8 = 1;
const SERVING: u8 = 2;
const TERMINATING: u8 = 4;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct EndpointRecord {
    pub(crate) address: Address,
    pub(crate) node: u32,
    pub(crate) hostname: u32,
    pub(crate) weight: u16,
    pub(crate) zone: u8,
    /// A set of zones, 0 if there is no hint.
    pub(crate) hint: u8,
    conditions: u8,
}

impl EndpointRecord {
    pub(crate) const fn ready(&self) -> bool {
        self.conditions & READY != 0
    }

    pub(crate) const fn serving(&self) -> bool {
        self.conditions & SERVING != 0
    }

    pub(crate) const fn terminating(&self) -> bool {
        self.conditions & TERMINATING != 0
    }

    pub(crate) const fn class(&self) -> Class {
        match (self.weight, self.terminating()) {
            (0, _) => Class::Unusable,
            (_, true) if self.serving() => Class::Terminating,
            (_, false) if self.ready() => Class::Active,
            _ => Class::Unusable,
        }
    }

    pub(crate) const fn view(&self, cluster: u16) -> View {
        // One that terminates and no longer answers is not part of what its cluster is meant to have.
        let leaving = self.terminating() && !self.serving();
        View {
            cluster,
            class: self.class(),
            zone: self.zone,
            hint: self.hint,
            weight: if leaving { 0 } else { self.weight },
            conflict: false,
        }
    }
}

/// A port of a slice; `name` is interned.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) struct PortRecord {
    pub(crate) name: u32,
    pub(crate) protocol: Protocol,
    pub(crate) port: u16,
}

/// Ascending and unique by address.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct SliceRecord {
    pub(crate) name: Box<str>,
    pub(crate) ports: u32,
    pub(crate) endpoints: Box<[EndpointRecord]>,
}

impl SliceRecord {
    pub(crate) fn endpoint(&self, address: &Address) -> Option<&EndpointRecord> {
        let at = self
            .endpoints
            .binary_search_by(|endpoint| endpoint.address.cmp(address))
            .ok()?;
        self.endpoints.get(at)
    }
}

/// Which endpoints a frontend may use.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum Reach {
    All,
    /// Those on this node.
    Node,
}

/// The port of a backend group: service ports of one name and protocol, in one address family, that reach alike.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) struct GroupPort {
    pub(crate) name: u32,
    pub(crate) protocol: Protocol,
    pub(crate) family: Family,
    pub(crate) reach: Reach,
}

impl GroupPort {
    /// The backends' port in a slice with `ports`: by name and protocol. Old Cilium writes ANY for the protocol.
    pub(crate) fn number_in(self, ports: &[PortRecord]) -> Option<u16> {
        let matches = |port: &&PortRecord| {
            port.name == self.name && (port.protocol == self.protocol || port.protocol == Protocol::Any)
        };
        ports.iter().find(matches).map(|port| port.port)
    }

    /// Whether an endpoint of `cluster` may be a backend, its port apart.
    pub(crate) fn reaches(self, context: &Context, cluster: u16, endpoint: &EndpointRecord) -> bool {
        match self.reach {
            Reach::All => true,
            Reach::Node => cluster == context.local && endpoint.node == context.node,
        }
    }
}

/// The local cluster's frame.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct LocalFrame {
    pub(crate) global: bool,
    pub(crate) shared: bool,
    pub(crate) affinity: Affinity,
    pub(crate) preference: Preference,
    pub(crate) algorithm: Algorithm,
    /// For how long a client keeps its backend, 0 if it does not.
    pub(crate) affinity_seconds: u32,
    /// Who may ask at load balancers' addresses; everybody if empty.
    pub(crate) source_ranges: Arc<[IpNet]>,
    /// Ascending by group, then address and port. Those of node ports have the address [`super::exposed::NODE`].
    pub(crate) frontends: Box<[FrontendRecord]>,
    /// Held port names, one holder each.
    port_names: Box<[u32]>,
}

/// What one cluster says about a service.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) cluster: u16,
    /// A remote cluster's frame: (global, shared). The local one's is [`Service::local`].
    pub(crate) remote: Option<(bool, bool)>,
    /// Ascending by name.
    pub(crate) slices: Vec<SliceRecord>,
}

#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) name: ServiceName,
    pub(crate) local: Option<Box<LocalFrame>>,
    /// Ascending by cluster.
    pub(crate) parts: Vec<Part>,
    /// Backend groups, in no order. Empty without a local frame.
    pub(crate) groups: Vec<u32>,
    /// Frontends claimed.
    pub(crate) frontends: Vec<u32>,
}

impl Service {
    pub(crate) const fn new(name: ServiceName) -> Self {
        Self {
            name,
            local: None,
            parts: Vec::new(),
            groups: Vec::new(),
            frontends: Vec::new(),
        }
    }

    pub(crate) fn part(&self, cluster: u16) -> Option<&Part> {
        let at = self
            .parts
            .binary_search_by_key(&cluster, |part| part.cluster)
            .ok()?;
        self.parts.get(at)
    }

    pub(crate) fn part_mut(&mut self, cluster: u16) -> Option<&mut Part> {
        let at = self
            .parts
            .binary_search_by_key(&cluster, |part| part.cluster)
            .ok()?;
        self.parts.get_mut(at)
    }

    /// The part of `cluster`, made if it is not there.
    pub(crate) fn part_entry(&mut self, cluster: u16) -> &mut Part {
        let at = match self.parts.binary_search_by_key(&cluster, |part| part.cluster) {
            Ok(at) => at,
            Err(at) => {
                let room = (self.parts.len() / 4).max(1);
                if self.parts.len() == self.parts.capacity() {
                    self.parts.reserve_exact(room);
                }
                let part = Part {
                    cluster,
                    remote: None,
                    slices: Vec::new(),
                };
                self.parts.insert(at, part);
                at
            }
        };
        &mut self.parts[at]
    }

    /// Whether the backends of `part` may serve this service's frontends.
    pub(crate) fn eligible(&self, part: &Part, local: u16) -> bool {
        part.cluster == local
            || (part.remote == Some((true, true)) && self.local.as_ref().is_some_and(|frame| frame.global))
    }

    /// Drops parts about which nothing is said any more; true if nothing is left.
    pub(crate) fn tidy(&mut self) -> bool {
        self.parts
            .retain(|part| part.remote.is_some() || !part.slices.is_empty());
        self.local.is_none() && self.parts.is_empty()
    }
}

/// Everything interned.
#[derive(Debug)]
pub(crate) struct Pools {
    pub(crate) texts: Texts,
    ports: Interner<Box<[PortRecord]>>,
}

impl Pools {
    pub(crate) fn new() -> Self {
        Self {
            texts: Texts::new(),
            ports: Interner::new(),
        }
    }

    pub(crate) fn ports(&self, list: u32) -> &[PortRecord] {
        self.ports.resolve(list)
    }

    pub(crate) fn acquire_slice(&mut self, zones: &mut Zones, slice: &Slice) -> SliceRecord {
        let mut endpoints = Vec::with_capacity(slice.endpoints.len());
        let mut last: Option<(&str, u32, &str, u8)> = None;
        for endpoint in &slice.endpoints {
            // Neighbours are often on one node and mostly in one zone.
            let (node, zone) = match last {
                Some((text, node, zone_text, zone))
                    if text == &*endpoint.node && zone_text == &*endpoint.zone =>
                {
                    self.texts.retain(node);
                    (node, zone)
                }
                _ => (self.texts.acquire(&endpoint.node), zones.number(&endpoint.zone)),
            };
            last = Some((&endpoint.node, node, &endpoint.zone, zone));
            endpoints.push(EndpointRecord {
                address: to_address(endpoint.ip),
                node,
                hostname: self.texts.acquire(&endpoint.hostname),
                weight: endpoint.weight,
                zone,
                hint: zones.set_number(&endpoint.zone_hints),
                conditions: if endpoint.ready { READY } else { 0 }
                    | if endpoint.serving { SERVING } else { 0 }
                    | if endpoint.terminating { TERMINATING } else { 0 },
            });
        }
        // Stable: of two alike, the first one named stays.
        endpoints.sort_by_key(|endpoint: &EndpointRecord| (endpoint.address, endpoint.class()));
        endpoints.dedup_by(|later, kept| {
            let same = later.address == kept.address;
            if same {
                self.texts.release(later.node);
                self.texts.release(later.hostname);
            }
            same
        });
        SliceRecord {
            name: slice.slice.clone(),
            ports: self.acquire_ports(slice),
            endpoints: endpoints.into_boxed_slice(),
        }
    }

    fn acquire_ports(&mut self, slice: &Slice) -> u32 {
        let mut ports: Vec<PortRecord> = slice
            .ports
            .iter()
            .map(|port| PortRecord {
                name: self.texts.acquire(&port.name),
                protocol: port.protocol,
                port: port.port,
            })
            .collect();
        ports.sort_unstable();
        let (list, new) = self
            .ports
            .acquire(ports.as_slice(), || ports.clone().into_boxed_slice());
        if !new {
            ports.iter().for_each(|port| self.texts.release(port.name));
        }
        list
    }

    pub(crate) fn release_slice(&mut self, slice: &SliceRecord) {
        for endpoint in &slice.endpoints {
            self.texts.release(endpoint.node);
            self.texts.release(endpoint.hostname);
        }
        if let Some(ports) = self.ports.release(slice.ports) {
            ports.iter().for_each(|port| self.texts.release(port.name));
        }
    }

    pub(crate) fn acquire_frame(&mut self, frame: &ServiceFrame) -> LocalFrame {
        let names: Box<[u32]> = frame
            .ports
            .iter()
            .map(|port| self.texts.acquire(&port.name))
            .collect();
        let traffic = &frame.traffic;
        LocalFrame {
            global: frame.global,
            shared: frame.global && frame.shared,
            affinity: if frame.global {
                frame.affinity
            } else {
                Affinity::None
            },
            preference: if frame.global {
                traffic.preference.clone()
            } else {
                Preference {
                    slow_start_seconds: traffic.preference.slow_start_seconds,
                    ..Preference::default()
                }
            },
            algorithm: traffic.algorithm,
            affinity_seconds: match frame.session_affinity {
                SessionAffinity::None => 0,
                SessionAffinity::ClientIp { timeout_seconds } => timeout_seconds,
            },
            source_ranges: traffic.source_ranges.as_slice().into(),
            frontends: frontends(frame, &names).into_boxed_slice(),
            port_names: names,
        }
    }

    pub(crate) fn release_frame(&mut self, frame: &LocalFrame) {
        frame.port_names.iter().for_each(|name| self.texts.release(*name));
    }
}
