//! Frontends: who claims an address and port, and what the map has of it.
//!
//! Two services of the local cluster may claim one frontend for a moment (one is deleted, another gets its address, and
//! the two events arrive in either order): the service with the lower name has it. A frontend keeps its number while it
//! is in the map, whoever has it.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use isthmus_bpf_abi::{
    Address, SOURCE_RANGE_STATIC_BITS, ServiceKey, ServiceValue, SourceRangeKey, service_flag,
};
use isthmus_model::Protocol;

use super::{
    LoadBalancer,
    exposed::{FrontendKind, FrontendRecord, NODE},
    record::LocalFrame,
};
use crate::{Family, to_address, to_ip};

/// Address, port (host order), IANA protocol number and scope.
pub(crate) type FrontendKey = (Address, u16, u8, u8);

/// Who asks for a frontend.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Claim {
    pub(crate) service: u32,
    pub(crate) group: u32,
    pub(crate) kind: FrontendKind,
    pub(crate) flags: u16,
}

#[derive(Debug)]
pub(crate) struct Frontend {
    pub(crate) key: FrontendKey,
    pub(crate) service_id: u32,
    /// All that ask for it; the first one has it.
    pub(crate) claims: Vec<Claim>,
    /// Group whose slots it has.
    pub(crate) group: Option<u32>,
    /// Flags beside the group's.
    pub(crate) flags: u16,
    /// Who may ask, if the flags say that not everybody may.
    pub(crate) ranges: Arc<[IpNet]>,
    /// Slot 0 as written.
    pub(crate) written: Option<ServiceValue>,
    /// Source ranges as written, ascending.
    pub(crate) written_ranges: Vec<SourceRangeKey>,
    /// Chunks of its Maglev table, as written.
    pub(crate) table_chunks: u32,
    /// The slots in the map may differ from the group's: write all of them.
    pub(crate) fresh: bool,
    pub(crate) domain: u32,
    /// Found in the maps, and no frame has asked for it yet.
    pub(crate) restored: bool,
}

impl Frontend {
    pub(crate) const fn map_key(&self) -> ServiceKey {
        ServiceKey {
            scope: self.key.3,
            ..ServiceKey::frontend(self.key.0, self.key.1, self.key.2)
        }
    }

    /// A frontend that nobody has asked for yet.
    pub(crate) fn new(key: FrontendKey, service_id: u32) -> Self {
        Self {
            key,
            service_id,
            claims: Vec::new(),
            group: None,
            flags: 0,
            ranges: Arc::new([]),
            written: None,
            written_ranges: Vec::new(),
            table_chunks: 0,
            fresh: true,
            domain: 0,
            restored: false,
        }
    }

    /// The entries of `isthmus_source_ranges` that it should have, ascending.
    pub(crate) fn range_keys(&self) -> Vec<SourceRangeKey> {
        if self.flags & service_flag::SOURCE_RANGES == 0 {
            return Vec::new();
        }
        let key = |range: &IpNet| {
            let bits = if range.network().is_ipv4() { 96 } else { 0 };
            SourceRangeKey {
                prefix_len: SOURCE_RANGE_STATIC_BITS + bits + u32::from(range.prefix_len()),
                service_id: self.service_id,
                address: to_address(range.network()),
            }
        };
        let mut keys: Vec<SourceRangeKey> = self.ranges.iter().map(key).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }
}

/// A frontend as `isthmus service` shows it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FrontendView {
    /// Cluster IP.
    pub address: IpAddr,
    /// Port.
    pub port: u16,
    /// Protocol.
    pub protocol: Protocol,
    /// Name of the service's port; empty if unnamed.
    pub port_name: String,
    /// Its number in the maps.
    pub service_id: u32,
    /// Backends in its slots, as of the last drain.
    pub backends: u16,
    /// False if a service with a lower name has the frontend instead.
    pub owned: bool,
}

impl LoadBalancer {
    /// Makes a service's claims those of its frame, with the groups they need.
    pub(super) fn claim_frontends(&mut self, at: u32) {
        let wanted = self.wanted_frontends(self.services[at].local.as_deref());
        let mut claimed = BTreeSet::new();
        for want in wanted {
            let known = self.services[at]
                .groups
                .iter()
                .copied()
                .find(|number| self.groups[*number].port == want.group);
            let group = known.unwrap_or_else(|| self.add_group(at, want.group));
            let key = (want.address, want.port, want.group.protocol.number(), want.scope);
            let number = self.frontend_entry(key);
            let frontend = &mut self.frontends[number];
            let claim = Claim {
                service: at,
                group,
                kind: want.kind,
                flags: want.flags,
            };
            frontend
                .claims
                .retain(|claim| claim.service != at || claimed.contains(&number));
            if !frontend.claims.contains(&claim) {
                frontend.claims.push(claim);
            }
            claimed.insert(number);
        }
        let list = claimed.iter().copied().collect();
        let before = std::mem::replace(&mut self.services[at].frontends, list);
        for &number in &before {
            if !claimed.contains(&number) {
                self.frontends[number].claims.retain(|claim| claim.service != at);
                self.assign(number);
            }
        }
        for number in claimed {
            self.assign(number);
        }
    }

    /// The frontends of a frame, node ports at each of the node's addresses.
    pub(super) fn wanted_frontends(&self, frame: Option<&LocalFrame>) -> Vec<FrontendRecord> {
        let Some(frame) = frame else {
            return Vec::new();
        };
        let mut wanted = Vec::with_capacity(frame.frontends.len());
        for record in &frame.frontends {
            if record.kind != FrontendKind::NodePort || record.address != NODE {
                wanted.push(*record);
                continue;
            }
            let addresses = self
                .node_addresses
                .iter()
                .filter(|address| Family::of(address) == record.group.family);
            wanted.extend(addresses.map(|address| FrontendRecord {
                address: *address,
                ..*record
            }));
        }
        wanted
    }

    /// Says where this node's ports are asked for.
    pub fn set_node_addresses(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        let mut addresses: Vec<Address> = addresses.into_iter().map(to_address).collect();
        addresses.sort_unstable();
        addresses.dedup();
        if self.node_addresses == addresses {
            return;
        }
        self.node_addresses = addresses;
        let with_ports: Vec<u32> = self
            .services
            .iter()
            .filter(|(_, service)| {
                let frontends = service.local.iter().flat_map(|frame| &frame.frontends);
                frontends
                    .map(|frontend| frontend.kind)
                    .any(|kind| kind == FrontendKind::NodePort)
            })
            .map(|(at, _)| at)
            .collect();
        for at in with_ports {
            let gone = self.split_groups(at, &self.wanted_frontends(self.services[at].local.as_deref()));
            self.claim_frontends(at);
            for number in gone {
                self.kill_group(number);
            }
            self.describe_groups(at);
        }
    }

    fn frontend_entry(&mut self, key: FrontendKey) -> u32 {
        if let Some(&number) = self.frontend_index.get(&key) {
            return number;
        }
        let service_id = self.service_ids.allocate().unwrap_or(0);
        let number = self.frontends.insert(Frontend::new(key, service_id));
        self.frontend_index.insert(key, number);
        number
    }

    /// Gives a frontend to the first of those that claim it.
    pub(super) fn assign(&mut self, number: u32) {
        let Self {
            frontends,
            services,
            groups,
            pools,
            ..
        } = self;
        let frontend = &mut frontends[number];
        frontend.claims.sort_by(|a, b| {
            let rank = |claim: &Claim| {
                (
                    claim.kind,
                    &services[claim.service].name,
                    pools.texts.resolve(groups[claim.group].port.name),
                )
            };
            rank(a).cmp(&rank(b))
        });
        let first = frontend.claims.first().copied();
        let owner = first.map(|claim| claim.group);
        let mut described = false;
        if let Some(claim) = first {
            frontend.restored = false;
            let ranges = match &services[claim.service].local {
                Some(frame) if claim.flags & service_flag::SOURCE_RANGES != 0 => {
                    Arc::clone(&frame.source_ranges)
                }
                _ => Arc::new([]),
            };
            described = (frontend.flags, &frontend.ranges) != (claim.flags, &ranges);
            frontend.flags = claim.flags;
            frontend.ranges = ranges;
        }
        if frontend.group == owner {
            if let Some(group) = owner.filter(|_| described) {
                self.enqueue(group);
            }
            return;
        }
        let before = std::mem::replace(&mut frontend.group, owner);
        let Some(group) = owner else {
            self.leave(number, before);
            self.unclaimed.push(number);
            return;
        };
        let orphan =
            before.filter(|before| self.groups[*before].service.is_none() && !self.groups[*before].dead);
        if let Some(orphan) = orphan {
            self.absorb(group, orphan);
            return;
        }
        self.leave(number, before);
        let frontend = &mut self.frontends[number];
        frontend.fresh = true;
        let domain = self.groups[group].domain;
        if frontend.written.is_some() && frontend.domain != domain {
            // Its slots still name backends of the other domain.
            self.links.push((frontend.domain, domain));
        }
        frontend.domain = domain;
        self.groups[group].frontends.push(number);
        self.enqueue(group);
    }

    fn leave(&mut self, number: u32, group: Option<u32>) {
        if let Some(group) = group {
            self.groups[group].frontends.retain(|other| *other != number);
        }
    }

    /// A restored group, with all its frontends and backends, becomes part of a service's.
    fn absorb(&mut self, group: u32, orphan: u32) {
        let Some(mut from) = self.groups.remove(orphan) else {
            return;
        };
        if from.queued {
            self.queue.retain(|queued| *queued != orphan);
        }
        let into = &mut self.groups[group];
        let before = into.slots.len();
        let (spare, exact) = into.absorb(&self.context, &mut from);
        if into.slots.len() != before {
            // Slots that came along are in place for the frontends that came along, and for no other.
            for &number in &into.frontends {
                self.frontends[number].fresh = true;
            }
        }
        let domain = into.domain;
        self.links.push((from.domain, domain));
        self.spare.extend(spare.into_iter().map(|id| (id, domain)));
        for number in from.frontends {
            let frontend = &mut self.frontends[number];
            frontend.group = Some(group);
            frontend.domain = domain;
            frontend.fresh |= !exact;
            self.groups[group].frontends.push(number);
        }
        self.drop_stale_ghosts(group);
        self.enqueue(group);
    }

    /// Takes a group out of the maps at the next drain, with the frontends that nobody else claims.
    pub(super) fn kill_group(&mut self, number: u32) {
        let left = std::mem::take(&mut self.groups[number].frontends);
        for frontend in left {
            self.frontends[frontend].group = None;
            self.frontends[frontend].restored = false;
            self.unclaimed.push(frontend);
        }
        self.groups[number].dead = true;
        self.groups[number].service = None;
        self.groups[number].conflicts = 0;
        self.enqueue(number);
    }

    /// Drops ghosts of which it is known by now that no source names them. Of a group without its slices that is not known.
    pub(super) fn drop_stale_ghosts(&mut self, number: u32) {
        let Self {
            groups,
            services,
            sync,
            context,
            ..
        } = self;
        let local = &context.local;
        let group = &mut groups[number];
        let Some(service) = group.service.filter(|_| group.filled) else {
            return;
        };
        let global = services[service].local.as_ref().is_some_and(|frame| frame.global);
        group.drop_ghosts(context, |cluster| {
            sync.complete(cluster) || (cluster != *local && !global)
        });
        if sync.complete(*local) && (!global || sync.all_complete()) {
            group.release_held();
        }
        if group.has_changes() {
            self.enqueue(number);
        }
    }

    /// Drops everything restored that turned out stale.
    pub(super) fn prune(&mut self) {
        if self.sync.complete(self.context.local) {
            let stale: Vec<u32> = self
                .frontends
                .iter()
                .filter(|(_, frontend)| frontend.restored)
                .map(|(number, _)| number)
                .collect();
            for number in stale {
                let frontend = &mut self.frontends[number];
                frontend.restored = false;
                let group = frontend.group.take();
                self.leave(number, group);
                self.unclaimed.push(number);
                if let Some(group) = group
                    && self.groups[group].service.is_none()
                    && self.groups[group].frontends.is_empty()
                {
                    self.kill_group(group);
                }
            }
        }
        for number in self.groups.keys().collect::<Vec<_>>() {
            self.drop_stale_ghosts(number);
        }
        // Nobody will name them: without the local cluster's frames no service asks, and its own cluster has told all.
        if self.sync.complete(self.context.local) {
            let mut stale = Vec::new();
            let sync = &self.sync;
            self.loose.retain(|_, ids| {
                stale.extend(ids.extract_if(.., |(_, cluster)| sync.complete(*cluster)));
                !ids.is_empty()
            });
            stale.sort_unstable();
            self.spare.extend(stale.into_iter().map(|(id, _)| (id, 0)));
        }
    }

    pub(super) fn frontend_view(&self, service: u32, number: u32) -> Vec<FrontendView> {
        let frontend = &self.frontends[number];
        let owner = frontend.claims.first().copied();
        let mine = frontend.claims.iter().filter(|claim| claim.service == service);
        mine.map(|claim| {
            let port = self.groups[claim.group].port;
            FrontendView {
                address: to_ip(&frontend.key.0),
                port: frontend.key.1,
                protocol: port.protocol,
                port_name: self.pools.texts.resolve(port.name).to_owned(),
                service_id: frontend.service_id,
                backends: frontend.written.map_or(0, |value| value.count),
                owned: owner == Some(*claim),
            }
        })
        .collect()
    }
}
