//! This node's own part of the state: what the node is, its endpoints with their identities, and the endpoints map.
//!
//! In: the node's object, the endpoints, identities of the own cluster's addresses, the map's contents at the start.
//! Out: operations on the endpoints map.
//!
//! Invariants: an endpoint is in the map as long as it is in the list, from before its identity is known; an identity that
//! is not known yet does not replace the one that the map has from before a restart.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use isthmus_bpf_abi::{Endpoint as Entry, EndpointKey, endpoint_flag};
use isthmus_mesh::{MapOp, Plan, to_address};
use isthmus_model::NumericIdentity;

use crate::{
    endpoints::{Endpoint, keeper::EndpointList},
    node::{LocalNode, LocalNodeError},
};

/// See the module.
#[derive(Debug, Default)]
pub struct LocalTables {
    node: Option<Result<LocalNode, LocalNodeError>>,
    /// Of the own cluster: about 40 bytes an address.
    identities: BTreeMap<IpAddr, NumericIdentity>,
    endpoints: EndpointListOrEmpty,
    /// Identities that the map had at the start.
    restored: BTreeMap<EndpointKey, NumericIdentity>,
    /// What the map holds once every drained plan is applied.
    written: BTreeMap<EndpointKey, Entry>,
    changed: bool,
}

/// `Arc<[T]>` has no default.
#[derive(Debug)]
struct EndpointListOrEmpty(EndpointList);

impl Default for EndpointListOrEmpty {
    fn default() -> Self {
        Self(std::sync::Arc::new([]))
    }
}

impl LocalTables {
    pub(super) fn new(dump: Vec<(EndpointKey, Entry)>) -> Self {
        Self {
            restored: dump
                .iter()
                .filter(|(_, entry)| entry.flags & endpoint_flag::HOST == 0)
                .map(|(key, entry)| (*key, NumericIdentity(entry.identity)))
                .collect(),
            written: dump.into_iter().collect(),
            changed: true,
            ..Self::default()
        }
    }

    /// The node, an error if its object is not usable, `None` while there is no object.
    pub fn node(&self) -> Option<&Result<LocalNode, LocalNodeError>> {
        self.node.as_ref()
    }

    /// The endpoints.
    pub fn endpoints(&self) -> &EndpointList {
        &self.endpoints.0
    }

    pub(super) fn set_node(&mut self, node: Result<LocalNode, LocalNodeError>) {
        // An object that became unusable is reported, but a node that works goes on working.
        if node.is_ok() || !matches!(self.node, Some(Ok(_))) {
            self.node = Some(node);
            self.changed = true;
        }
    }

    pub(super) fn set_endpoints(&mut self, endpoints: EndpointList) {
        self.endpoints.0 = endpoints;
        self.changed = true;
    }

    /// The identity of one of the own cluster's addresses. Prefixes concern no endpoint.
    pub(super) fn set_identity(&mut self, prefix: IpNet, identity: Option<NumericIdentity>) {
        if prefix.prefix_len() != prefix.max_prefix_len() {
            return;
        }
        let ip = prefix.addr();
        match identity {
            Some(identity) => self.identities.insert(ip, identity),
            None => self.identities.remove(&ip),
        };
        let concerns = |endpoint: &Endpoint| endpoint.ips().any(|own| own == ip);
        self.changed |= self.endpoints.0.iter().any(concerns);
    }

    /// The identity that an endpoint has now.
    pub fn identity_of(&self, endpoint: &Endpoint) -> NumericIdentity {
        let known = endpoint.ips().find_map(|ip| self.identities.get(&ip));
        let restored = || {
            endpoint.ips().find_map(|ip| {
                self.restored.get(&EndpointKey {
                    address: to_address(ip),
                })
            })
        };
        known.or_else(restored).copied().unwrap_or(NumericIdentity::INIT)
    }

    pub(super) fn has_changes(&self) -> bool {
        self.changed
    }

    pub(super) fn drain(&mut self) -> Plan {
        if !std::mem::take(&mut self.changed) {
            return Plan::default();
        }
        let desired = self.desired();
        let plan = plan(&self.written, &desired);
        self.written = desired;
        // An address that is free again must not lend its identity to its next owner.
        let in_use: BTreeSet<EndpointKey> = self.written.keys().copied().collect();
        self.restored.retain(|key, _| in_use.contains(key));
        plan
    }

    /// What the map should hold.
    fn desired(&self) -> BTreeMap<EndpointKey, Entry> {
        let mut desired: BTreeMap<EndpointKey, Entry> = match &self.node {
            Some(Ok(node)) => node.host_entries().collect(),
            // Before the node is known its addresses stay as they were found.
            _ => self
                .written
                .iter()
                .filter(|(_, entry)| entry.flags & endpoint_flag::HOST != 0)
                .map(|(key, entry)| (*key, *entry))
                .collect(),
        };
        for endpoint in self.endpoints.0.iter() {
            let Some(device) = &endpoint.device else { continue };
            let entry = Entry {
                ifindex: device.host_ifindex,
                endpoint_id: endpoint.id.into(),
                identity: self.identity_of(endpoint).0,
                flags: 0,
                pod_mac: device.pod_mac,
                host_mac: device.host_mac,
            };
            desired.extend(endpoint.ips().map(|ip| {
                let address = to_address(ip);
                (EndpointKey { address }, entry)
            }));
        }
        desired
    }

    pub(super) fn audit(&self, dump: &[(EndpointKey, Entry)]) -> Plan {
        plan(&dump.iter().copied().collect(), &self.written)
    }
}

fn plan(actual: &BTreeMap<EndpointKey, Entry>, desired: &BTreeMap<EndpointKey, Entry>) -> Plan {
    let puts = desired
        .iter()
        .filter(|(key, entry)| actual.get(key) != Some(entry))
        .map(|(key, entry)| MapOp::EndpointPut(*key, *entry));
    let deletes = actual
        .keys()
        .filter(|key| !desired.contains_key(key))
        .map(|key| MapOp::EndpointDelete(*key));
    Plan::independent(puts.chain(deletes).collect())
}
