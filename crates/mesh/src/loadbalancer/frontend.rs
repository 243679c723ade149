//! Frontends: who claims an address and port, and what the map has of it.
//!
//! Two services of the local cluster may claim one frontend for a moment (one is deleted, another gets its address, and
//! the two events arrive in either order): the service with the lower name has it. A frontend keeps its number while it
//! is in the map, whoever has it.

use std::{collections::BTreeSet, net::IpAddr};

use isthmus_bpf_abi::{Address, ServiceKey};
use isthmus_model::Protocol;

use super::{LoadBalancer, candidate::Context};
use crate::to_ip;

/// Address, port (host order) and IANA protocol number.
pub(crate) type FrontendKey = (Address, u16, u8);

#[derive(Debug)]
pub(crate) struct Frontend {
    pub(crate) key: FrontendKey,
    pub(crate) service_id: u32,
    /// (service, group) of all that ask for it; the first one has it.
    pub(crate) claims: Vec<(u32, u32)>,
    /// Group whose slots it has.
    pub(crate) group: Option<u32>,
    /// Slot 0 as written: count and flags.
    pub(crate) written: Option<(u16, u16)>,
    /// The slots in the map may differ from the group's: write all of them.
    pub(crate) fresh: bool,
    pub(crate) domain: u32,
    /// Found in the maps, and no frame has asked for it yet.
    pub(crate) restored: bool,
}

impl Frontend {
    pub(crate) const fn map_key(&self) -> ServiceKey {
        ServiceKey::frontend(self.key.0, self.key.1, self.key.2)
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
        let wanted: Vec<_> = match &self.services[at].local {
            Some(frame) => frame.frontends.to_vec(),
            None => Vec::new(),
        };
        let mut claimed = BTreeSet::new();
        for want in wanted {
            let known = self.services[at]
                .groups
                .iter()
                .copied()
                .find(|number| self.groups[*number].port == want.group);
            let group = known.unwrap_or_else(|| self.add_group(at, want.group));
            let number = self.frontend_entry((want.address, want.port, want.group.protocol.number()));
            let frontend = &mut self.frontends[number];
            frontend
                .claims
                .retain(|(service, _)| *service != at || claimed.contains(&number));
            if !frontend.claims.contains(&(at, group)) {
                frontend.claims.push((at, group));
            }
            claimed.insert(number);
        }
        let list = claimed.iter().copied().collect();
        let before = std::mem::replace(&mut self.services[at].frontends, list);
        for &number in &before {
            if !claimed.contains(&number) {
                self.frontends[number]
                    .claims
                    .retain(|(service, _)| *service != at);
                self.assign(number);
            }
        }
        for number in claimed {
            self.assign(number);
        }
    }

    fn frontend_entry(&mut self, key: FrontendKey) -> u32 {
        if let Some(&number) = self.frontend_index.get(&key) {
            return number;
        }
        let number = self.frontends.insert(Frontend {
            key,
            service_id: self.service_ids.allocate().unwrap_or(0),
            claims: Vec::new(),
            group: None,
            written: None,
            fresh: true,
            domain: 0,
            restored: false,
        });
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
            let name = |claim: &(u32, u32)| {
                (
                    &services[claim.0].name,
                    pools.texts.resolve(groups[claim.1].port.name),
                )
            };
            name(a).cmp(&name(b))
        });
        let owner = frontend.claims.first().map(|(_, group)| *group);
        if owner.is_some() {
            frontend.restored = false;
        }
        if frontend.group == owner {
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
        let context = Context {
            local: self.local,
            quarantined: &self.quarantined,
            hasher: &self.hasher,
        };
        let into = &mut self.groups[group];
        let before = into.slots.len();
        let (spare, exact) = into.absorb(context, &mut from);
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
            local,
            quarantined,
            hasher,
            ..
        } = self;
        let group = &mut groups[number];
        let Some(service) = group.service.filter(|_| group.filled) else {
            return;
        };
        let global = services[service].local.as_ref().is_some_and(|frame| frame.global);
        let context = Context {
            local: *local,
            quarantined,
            hasher,
        };
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
        if self.sync.complete(self.local) {
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
        if self.sync.complete(self.local) {
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
        let mine = frontend.claims.iter().filter(|(of, _)| *of == service);
        mine.map(|claim| {
            let port = self.groups[claim.1].port;
            FrontendView {
                address: to_ip(&frontend.key.0),
                port: frontend.key.1,
                protocol: port.protocol,
                port_name: self.pools.texts.resolve(port.name).to_owned(),
                service_id: frontend.service_id,
                backends: frontend.written.map_or(0, |(count, _)| count),
                owned: owner == Some(*claim),
            }
        })
        .collect()
    }
}
