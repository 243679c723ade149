//! What a remote cluster may publish here, as said by us, the receiver: `isthmus-accept` in its file. Pure.
//!
//! In: decoded objects that passed the checks of every reader (their cluster, its ID, its identity range). Out: a refusal
//! that names the grant which does not cover them. A field that is not given restricts nothing; an empty list grants nothing.
//!
//! Where an address may lie: pod CIDRs of nodes in `pod-cidrs`, nodes' own addresses and tunnel endpoints in `node-cidrs`. An
//! endpoint or backend lies in `pod-cidrs`; where it can be a node's own address, in one of the two.

mod parse;

use std::{collections::BTreeMap, net::IpAddr, ops::RangeInclusive};

use ipnet::IpNet;
use isthmus_model::{IpEntry, Labels, Node, NumericIdentity, ServiceFrame, ServiceName, Slice, labels};
use isthmus_wire::{Grant, Refusal, keys::Kind, node};

pub use parse::GrantsError;

/// Bytes that are mirrored of a remote cluster unless its file says otherwise: some ten times what a cluster of 5,000 nodes
/// publishes.
pub const BYTES_MAX_DEFAULT: u64 = 1024 * 1024 * 1024;

/// The reserved identities that a cluster gives to its nodes, health endpoints, ingress and endpoints without labels. Those
/// above, such as kube-apiserver, mean privileges.
const RESERVED_ALWAYS: [u32; 8] = [0, 1, 2, 3, 4, 5, 6, 8];

/// Names with `*` for any run of characters.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Pattern(String);

impl Pattern {
    fn matches(&self, name: &str) -> bool {
        let mut parts = self.0.split('*');
        let first = parts.next().unwrap_or_default();
        let Some(mut rest) = name.strip_prefix(first) else {
            return false;
        };
        let Some(last) = parts.next_back() else {
            return rest.is_empty();
        };
        for part in parts {
            match rest.find(part) {
                None => return false,
                Some(at) => rest = &rest[at + part.len()..],
            }
        }
        rest.ends_with(last)
    }
}

/// What one remote cluster may publish. The default restricts nothing.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Grants {
    identities: Option<Vec<RangeInclusive<u32>>>,
    pod_cidrs: Option<Vec<IpNet>>,
    node_cidrs: Option<Vec<IpNet>>,
    namespaces: Option<Vec<Pattern>>,
    services: Option<Vec<(Pattern, Pattern)>>,
    entries_max: BTreeMap<Kind, usize>,
    bytes_max: Option<u64>,
}

impl Grants {
    /// Bytes that may be mirrored of all kinds together.
    pub fn bytes_max(&self) -> u64 {
        self.bytes_max.unwrap_or(BYTES_MAX_DEFAULT)
    }

    /// Entries of `kind` that may be mirrored, if it is said.
    pub fn entries_max(&self, kind: Kind) -> Option<usize> {
        self.entries_max.get(&kind).copied()
    }

    /// Equal grants have equal numbers, also in other replicas; without grants it is 0. Mixed into the cluster ID that readers
    /// see, it keeps "equal ID and revision mean equal content" true where replicas have different grants.
    pub fn fingerprint(&self) -> u64 {
        if *self == Self::default() {
            return 0;
        }
        // FNV-1a: it has to be the same in every process, and nobody gains by a collision with his own receiver's file.
        format!("{self:?}")
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            })
    }

    /// Judges a node. `value` is what it was read from.
    pub fn node(&self, node: &Node, value: &[u8]) -> Result<(), Refusal> {
        self.identity(node.identity)?;
        for ip in node.internal_ips.iter().chain(&node.external_ips) {
            self.within(&[Grant::NodeCidrs], "node address", IpNet::from(*ip))?;
        }
        for cidr in node.alloc_cidrs() {
            self.within(&[Grant::PodCidrs], "pod CIDR", cidr)?;
        }
        let health = [
            node.ipv4_health_ip.map(IpAddr::from),
            node.ipv6_health_ip.map(IpAddr::from),
        ];
        for ip in node
            .router_ips
            .iter()
            .copied()
            .chain(health.into_iter().flatten())
        {
            self.pod_or_node("address in the pod network", IpNet::from(ip))?;
        }
        if self.pod_cidrs.is_some() {
            for net in node::other_addresses(value)? {
                self.within(&[Grant::PodCidrs], "address in the pod network", net)?;
            }
        }
        Ok(())
    }

    /// Judges an address' entry.
    pub fn ip(&self, entry: &IpEntry) -> Result<(), Refusal> {
        self.identity(entry.identity)?;
        if entry.identity.is_reserved() {
            self.pod_or_node("address", entry.prefix)?;
        } else {
            self.within(&[Grant::PodCidrs], "address", entry.prefix)?;
        }
        if let Some(host) = entry.host_ip {
            self.within(&[Grant::NodeCidrs], "tunnel endpoint", IpNet::from(host))?;
        }
        if !entry.namespace.is_empty() {
            self.namespace(&entry.namespace)?;
        }
        Ok(())
    }

    /// Judges an identity. One without a namespace could stand for pods of any.
    pub fn identity_labels(&self, number: NumericIdentity, identity: &Labels) -> Result<(), Refusal> {
        self.identity(number)?;
        if self.namespaces.is_none() {
            return Ok(());
        }
        let namespace = identity
            .find(labels::POD_NAMESPACE)
            .filter(|label| label.source == labels::SOURCE_K8S)
            .map_or("", |label| &label.value);
        self.namespace(namespace)
    }

    /// Judges a service, without its backends.
    pub fn frame(&self, frame: &ServiceFrame) -> Result<(), Refusal> {
        self.service(&frame.name)
    }

    /// Judges backends.
    pub fn slice(&self, slice: &Slice) -> Result<(), Refusal> {
        self.service(&slice.service)?;
        slice
            .endpoints
            .iter()
            .try_for_each(|endpoint| self.pod_or_node("backend", IpNet::from(endpoint.ip)))
    }

    fn identity(&self, identity: NumericIdentity) -> Result<(), Refusal> {
        let Some(ranges) = &self.identities else {
            return Ok(());
        };
        if RESERVED_ALWAYS.contains(&identity.0) || ranges.iter().any(|range| range.contains(&identity.0)) {
            return Ok(());
        }
        Err(Refusal::not_granted(Grant::Identities, "identity", identity))
    }

    fn namespace(&self, namespace: &str) -> Result<(), Refusal> {
        match &self.namespaces {
            Some(patterns) if !patterns.iter().any(|pattern| pattern.matches(namespace)) => Err(
                Refusal::not_granted(Grant::Namespaces, "namespace", format_args!("{namespace:?}")),
            ),
            _ => Ok(()),
        }
    }

    fn service(&self, name: &ServiceName) -> Result<(), Refusal> {
        self.namespace(&name.namespace)?;
        let matches = |(namespace, service): &(Pattern, Pattern)| {
            namespace.matches(&name.namespace) && service.matches(&name.name)
        };
        match &self.services {
            Some(patterns) if !patterns.iter().any(matches) => {
                Err(Refusal::not_granted(Grant::Services, "service", name))
            }
            _ => Ok(()),
        }
    }

    /// An address of a pod, or of a node whose own network its pods use.
    fn pod_or_node(&self, what: &'static str, net: IpNet) -> Result<(), Refusal> {
        // Without pod-cidrs pods may be anywhere.
        match &self.pod_cidrs {
            None => Ok(()),
            Some(_) if self.node_cidrs.is_none() => self.within(&[Grant::PodCidrs], what, net),
            Some(_) => self.within(&[Grant::PodCidrs, Grant::NodeCidrs], what, net),
        }
    }

    /// Whether `net` lies in one of `grants`; those that are not given restrict nothing.
    fn within(&self, grants: &[Grant], what: &'static str, net: IpNet) -> Result<(), Refusal> {
        let net = net.trunc();
        for grant in grants {
            let cidrs = match grant {
                Grant::NodeCidrs => &self.node_cidrs,
                _ => &self.pod_cidrs,
            };
            match cidrs {
                None => return Ok(()),
                Some(cidrs) if cidrs.iter().any(|cidr| cidr.contains(&net)) => return Ok(()),
                Some(_) => {}
            }
        }
        let grant = grants.first().copied().unwrap_or(Grant::PodCidrs);
        Err(Refusal::not_granted(grant, what, shown(net)))
    }
}

/// A single address without its length.
fn shown(net: IpNet) -> String {
    if net.prefix_len() == net.max_prefix_len() {
        net.addr().to_string()
    } else {
        net.to_string()
    }
}

#[cfg(test)]
mod tests;
