//! What the merge knows, for people: services with their frontends, and every known backend with the reason why it is
//! not used, if it is not.

use std::{fmt, net::IpAddr};

use isthmus_model::{Affinity, Protocol, ServiceName};

use super::{
    FrontendView, LoadBalancer,
    candidate::{Candidate, Context},
    group::Group,
    record::{EndpointRecord, LocalFrame, Part, PortRecord, Reach, Service},
    select::{Class, Hint},
};
use crate::{Family, to_ip};

/// A service of the local cluster, or one that only others have.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ServiceView {
    /// Namespace and name.
    pub name: ServiceName,
    /// The local cluster has it.
    pub local: bool,
    /// Marked global here.
    pub global: bool,
    /// Marked shared here.
    pub shared: bool,
    /// Preference of the local cluster.
    pub affinity: Affinity,
    /// Frontends, ascending.
    pub frontends: Vec<FrontendView>,
    /// Known backends, by cluster, slice and address: one for each port of the slice.
    pub backends: Vec<BackendView>,
}

/// A backend that a slice names.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BackendView {
    /// ID of the cluster it runs in.
    pub cluster_id: u16,
    /// Name of that cluster; empty if only its ID is known.
    pub cluster: String,
    /// The slice that names it.
    pub slice: String,
    /// Address.
    pub address: IpAddr,
    /// Port.
    pub port: u16,
    /// Protocol.
    pub protocol: Protocol,
    /// Name of the slice's port.
    pub port_name: String,
    /// Node, empty if unknown.
    pub node: String,
    /// Zone, empty if unknown.
    pub zone: String,
    /// Host name, empty if none.
    pub hostname: String,
    /// Weight.
    pub weight: u16,
    /// Condition ready.
    pub ready: bool,
    /// Condition serving.
    pub serving: bool,
    /// Condition terminating.
    pub terminating: bool,
    /// Its number in the backend map, if it is there.
    pub backend_id: Option<u32>,
    /// Why it takes no traffic; `None` if it does. As of the last drain.
    pub unused: Option<Unused>,
}

/// Why a known backend takes no traffic.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Unused {
    /// The local cluster has no such service.
    NoLocalService,
    /// The service is not global in the local cluster.
    NotGlobal,
    /// The other cluster has no frame for it, or not a global one.
    RemoteNotGlobal,
    /// The other cluster does not share it.
    NotShared,
    /// No frontend has a port of this name and protocol and an address of this family.
    NoMatchingPort,
    /// Not ready.
    Unready,
    /// Weight 0.
    WeightZero,
    /// Terminating, and active ones are left.
    Terminating,
    /// Another cluster owns this address and port.
    OwnedElsewhere,
    /// A tier of clusters before its own carries all.
    LaterTier,
    /// Its hints name other zones, and there are some for this one.
    OtherZone,
    /// The service may be asked through backends on this node only.
    OtherNode,
    /// Affinity local, and the local cluster has active ones.
    AffinityLocal,
    /// Affinity remote, and other clusters have healthy ones.
    AffinityRemote,
    /// Its cluster does not answer, and there are others.
    ClusterUnhealthy,
    /// The maps have no room for more slots or numbers.
    NoRoom,
    /// Another service has the frontends.
    FrontendTaken,
}

impl Unused {
    /// Short text.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NoLocalService => "no local service",
            Self::NotGlobal => "not global here",
            Self::RemoteNotGlobal => "not global there",
            Self::NotShared => "not shared",
            Self::NoMatchingPort => "no matching port",
            Self::Unready => "unready",
            Self::WeightZero => "weight 0",
            Self::Terminating => "terminating",
            Self::OwnedElsewhere => "address owned by another cluster",
            Self::LaterTier => "tier before it carries all",
            Self::OtherZone => "hints name other zones",
            Self::OtherNode => "not on this node",
            Self::AffinityLocal => "affinity local",
            Self::AffinityRemote => "affinity remote",
            Self::ClusterUnhealthy => "cluster unhealthy",
            Self::NoRoom => "no room in maps",
            Self::FrontendTaken => "frontend taken by another service",
        }
    }
}

impl fmt::Display for Unused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_str().fmt(f)
    }
}

/// Sizes, for metrics and status.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Stats {
    /// Services known, of any cluster.
    pub services: usize,
    /// Frontends in the map.
    pub frontends: usize,
    /// Backends with a number.
    pub backends: usize,
    /// Endpoints in all source tables.
    pub endpoints: usize,
    /// Backends that more than one cluster names.
    pub backend_conflicts: usize,
    /// Frontends that more than one service claims.
    pub frontend_conflicts: usize,
    /// Backends restored and not yet named by a source.
    pub restored_backends: usize,
    /// Frontends restored and not yet claimed.
    pub restored_frontends: usize,
    /// Usable backends for which no slot is left.
    pub overflow: usize,
}

impl LoadBalancer {
    /// All services, by name.
    pub fn services(&self) -> impl Iterator<Item = ServiceView> + '_ {
        let mut order: Vec<(&ServiceName, u32)> = self.services.iter().map(|(at, s)| (&s.name, at)).collect();
        order.sort_unstable();
        order.into_iter().map(|(_, at)| self.view(at))
    }

    /// One service.
    pub fn service(&self, name: &ServiceName) -> Option<ServiceView> {
        self.service_index.get(name).map(|at| self.view(*at))
    }

    /// Sizes. Walks all tables: for scrapes, not for each event.
    pub fn stats(&self) -> Stats {
        let mut stats = Stats {
            services: self.services.len(),
            frontends: self.frontends.len(),
            backends: self.backend_ids.len() as usize,
            ..Stats::default()
        };
        for (_, group) in self.groups.iter() {
            stats.backend_conflicts += group.conflicts as usize;
            stats.restored_backends += group.ghosts as usize;
            stats.overflow += group.overflow as usize;
        }
        for (_, frontend) in self.frontends.iter() {
            let first = frontend.claims.first();
            stats.frontend_conflicts += usize::from(frontend.claims.iter().any(|claim| Some(claim) != first));
            stats.restored_frontends += usize::from(frontend.restored);
        }
        let slices = self
            .services
            .iter()
            .flat_map(|(_, s)| &s.parts)
            .flat_map(|part| &part.slices);
        stats.endpoints = slices.map(|slice| slice.endpoints.len()).sum();
        stats
    }

    fn view(&self, at: u32) -> ServiceView {
        let service = &self.services[at];
        let mut frontends: Vec<FrontendView> = service
            .frontends
            .iter()
            .flat_map(|number| self.frontend_view(at, *number))
            .collect();
        frontends.sort_by_key(|frontend| (frontend.address, frontend.port, frontend.protocol));
        let mut backends = Vec::new();
        for part in &service.parts {
            for slice in &part.slices {
                for port in self.pools.ports(slice.ports) {
                    let view = |endpoint| self.backend_view(service, part, &slice.name, *port, endpoint);
                    backends.extend(slice.endpoints.iter().map(view));
                }
            }
        }
        let frame = service.local.as_ref();
        ServiceView {
            name: service.name.clone(),
            local: frame.is_some(),
            global: frame.is_some_and(|frame| frame.global),
            shared: frame.is_some_and(|frame| frame.shared),
            affinity: frame.map_or(Affinity::None, |frame| frame.affinity),
            frontends,
            backends,
        }
    }

    fn backend_view(
        &self,
        service: &Service,
        part: &Part,
        slice: &str,
        port: PortRecord,
        endpoint: &EndpointRecord,
    ) -> BackendView {
        let (backend_id, unused) = match self.usage(service, part, port, endpoint) {
            Ok(id) => (Some(id), None),
            Err((id, reason)) => (id, Some(reason)),
        };
        BackendView {
            cluster_id: part.cluster,
            cluster: self
                .names
                .get(&part.cluster)
                .map(ToString::to_string)
                .unwrap_or_default(),
            slice: slice.to_owned(),
            address: to_ip(&endpoint.address),
            port: port.port,
            protocol: port.protocol,
            port_name: self.pools.texts.resolve(port.name).to_owned(),
            node: self.pools.texts.resolve(endpoint.node).to_owned(),
            zone: self.context.zones.name(endpoint.zone).to_owned(),
            hostname: self.pools.texts.resolve(endpoint.hostname).to_owned(),
            weight: endpoint.weight,
            ready: endpoint.ready(),
            serving: endpoint.serving(),
            terminating: endpoint.terminating(),
            backend_id,
            unused,
        }
    }

    /// The backend's number if it takes traffic; else its number, if it has one, and the reason.
    fn usage(
        &self,
        service: &Service,
        part: &Part,
        port: PortRecord,
        endpoint: &EndpointRecord,
    ) -> Result<u32, (Option<u32>, Unused)> {
        let Some(frame) = &service.local else {
            return Err((None, Unused::NoLocalService));
        };
        if part.cluster != self.context.local {
            match part.remote {
                _ if !frame.global => return Err((None, Unused::NotGlobal)),
                None | Some((false, _)) => return Err((None, Unused::RemoteNotGlobal)),
                Some((true, false)) => return Err((None, Unused::NotShared)),
                Some((true, true)) => {}
            }
        }
        let family = Family::of(&endpoint.address);
        let fits =
            |group: &&Group| group.port.family == family && group.port.number_in(&[port]) == Some(port.port);
        // Where all backends count, if there is such a frontend: what only this node's are for says less.
        let group = service
            .groups
            .iter()
            .map(|number| &self.groups[*number])
            .filter(fits)
            .min_by_key(|group| group.port.reach);
        let Some(group) = group else {
            return Err((None, Unused::NoMatchingPort));
        };
        let found = group
            .candidates
            .find(&self.context.hasher, (endpoint.address, port.port));
        let Some(candidate) = found.map(|at| &group.candidates[at]) else {
            let reason = match group.port.reach {
                Reach::Node => Unused::OtherNode,
                Reach::All => Unused::NoMatchingPort,
            };
            return Err((None, reason));
        };
        let id = (candidate.id != 0).then_some(candidate.id);
        if candidate.cluster != part.cluster {
            return Err((id, Unused::OwnedElsewhere));
        }
        if endpoint.class() == Class::Unusable {
            let reason = if endpoint.weight == 0 {
                Unused::WeightZero
            } else {
                Unused::Unready
            };
            return Err((id, reason));
        }
        if group.frontends.is_empty() {
            return Err((id, Unused::FrontendTaken));
        }
        if candidate.has_slot() {
            return Ok(candidate.id);
        }
        Err((id, group.why_not(&self.context, frame, candidate)))
    }
}

impl Group {
    /// Why a backend that could take traffic was not selected.
    fn why_not(&self, context: &Context, frame: &LocalFrame, candidate: &Candidate) -> Unused {
        let tally = context.tally(&self.order, &candidate.view());
        if self.takes(context, candidate) {
            return Unused::NoRoom;
        }
        if self.hinted() && tally.hint == Hint::Elsewhere && self.picked().takes(tally) {
            return Unused::OtherZone;
        }
        if tally.quarantined {
            return Unused::ClusterUnhealthy;
        }
        let first = self.first_rank();
        if !frame.preference.tiers.is_empty() && tally.class == Class::Active {
            return Unused::LaterTier;
        }
        match (frame.affinity, tally.rank) {
            (Affinity::Local, 1) if first.active > 0 => Unused::AffinityLocal,
            (Affinity::Remote, 1) if first.active > 0 || first.terminating > 0 => Unused::AffinityRemote,
            _ => Unused::Terminating,
        }
    }
}
