//! What a node contributes to the ipcache: its own addresses, those inside the pod network, its pod CIDRs.

use std::net::IpAddr;

use isthmus_bpf_abi::Address;
use isthmus_model::{ClusterId, Node, NumericIdentity};

use super::{Contribution, Ipcache, Kind, prefix::Prefix, same_source};
use crate::address::to_address;

#[derive(Debug)]
pub(super) struct NodeRecord {
    pub(super) cluster: u16,
    pub(super) name: Box<str>,
    pub(super) tunnel: Option<Address>,
    pub(super) own: bool,
    prefixes: Vec<(Prefix, Contribution)>,
}

impl Ipcache {
    /// Adds or replaces a node.
    pub fn upsert_node(&mut self, node: &Node) {
        let cluster = node.cluster_id.get();
        let key = (cluster, Box::from(node.name.as_str()));
        let own = cluster == self.local && *node.name == *self.own_node;
        let at = match self.node_index.get(&key) {
            Some(&at) => at,
            None => {
                let at = self.nodes.insert(NodeRecord {
                    cluster,
                    name: key.1.clone(),
                    tunnel: None,
                    own,
                    prefixes: Vec::new(),
                });
                self.node_index.insert(key, at);
                at
            }
        };
        let tunnel = node.tunnel_endpoint().map(to_address);
        let prefixes = self.node_prefixes(at, node, own);
        let record = &mut self.nodes[at];
        let moved = record.tunnel != tunnel;
        record.tunnel = tunnel;
        let before = std::mem::replace(&mut record.prefixes, prefixes.clone());
        for (prefix, contribution) in &before {
            if !prefixes
                .iter()
                .any(|(other, new)| other == prefix && new.kind == contribution.kind)
            {
                self.take(*prefix, |other| same_source(other, contribution));
            }
        }
        for (prefix, contribution) in prefixes {
            self.put(prefix, contribution);
            if moved && let Some(at) = self.entries.find(&self.hasher, prefix) {
                self.mark(at);
            }
        }
        if own {
            let own = node
                .internal_ips
                .iter()
                .chain(&node.external_ips)
                .copied()
                .map(to_address);
            self.set_own(1, own.collect());
        }
    }

    fn node_prefixes(&self, at: u32, node: &Node, own: bool) -> Vec<(Prefix, Contribution)> {
        let (identity, world) = if own {
            (NumericIdentity::HOST, None)
        } else {
            (NumericIdentity::REMOTE_NODE, Some(NumericIdentity::WORLD))
        };
        let contribution = |kind, identity: NumericIdentity| Contribution {
            peer: at,
            identity: identity.0,
            cluster: node.cluster_id.get(),
            key: node.encryption_key,
            kind,
        };
        let addresses = node.internal_ips.iter().chain(&node.external_ips);
        let mut list: Vec<_> = addresses
            .map(|ip| (Prefix::of_ip(*ip), contribution(Kind::Node, identity)))
            .collect();
        list.extend(
            node.router_ips
                .iter()
                .map(|ip| (Prefix::of_ip(*ip), contribution(Kind::Tunnel, identity))),
        );
        let health = node
            .ipv4_health_ip
            .map(IpAddr::V4)
            .into_iter()
            .chain(node.ipv6_health_ip.map(IpAddr::V6));
        list.extend(health.map(|ip| {
            (
                Prefix::of_ip(ip),
                contribution(Kind::Tunnel, NumericIdentity::HEALTH),
            )
        }));
        if let Some(world) = world {
            list.extend(
                node.alloc_cidrs()
                    .map(|cidr| (Prefix::of_net(cidr), contribution(Kind::Cidr, world))),
            );
        }
        // A node may name an address twice; the first kind counts.
        list.sort_by_key(|(prefix, contribution)| (*prefix, contribution.kind));
        list.dedup_by_key(|(prefix, _)| *prefix);
        list
    }

    /// Removes a node. Unknown ones are ignored.
    pub fn delete_node(&mut self, cluster: ClusterId, name: &str) {
        let Some(at) = self.node_index.remove(&(cluster.get(), Box::from(name))) else {
            return;
        };
        let prefixes = std::mem::take(&mut self.nodes[at].prefixes);
        for (prefix, contribution) in prefixes {
            self.take(prefix, |other| same_source(other, &contribution));
        }
        self.nodes.remove(at);
    }
}
