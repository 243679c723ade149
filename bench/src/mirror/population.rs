//! What a mocked cluster holds, and how it changes: all of it follows from a seed. Pure.
//!
//! The shape is that of Cilium's nightly scale test of clustermesh: nodes, endpoints (one `cilium/state/ip` entry each) and
//! identities, no services.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result};
use ipnet::{IpNet, Ipv4Net};
use isthmus_clustermesh_apiserver::store::SourceChange;
use isthmus_model::{
    ClusterId, ClusterName, IdentityRange, IpEntry, Labels, MaxConnectedClusters, Node, NumericIdentity,
};
use isthmus_wire::{
    config::ClusterConfig,
    identity, ip,
    keys::{self, HEARTBEAT, Kind, Scope},
    node,
};

/// Objects of a cluster, by kind.
pub const NODES: u32 = 100;
pub const ENDPOINTS: u32 = 1000;
pub const IDENTITIES: u32 = 100;
/// The kinds that there are objects of.
pub const KINDS: [Kind; 3] = [Kind::Nodes, Kind::Ip, Kind::Identities];
/// What changes in so many changes of a cluster: endpoints once, identities 0.2 and nodes 0.1 times a second are 1.3 changes.
const CYCLE: [Kind; 13] = {
    let mut cycle = [Kind::Ip; 13];
    cycle[3] = Kind::Identities;
    cycle[9] = Kind::Identities;
    cycle[6] = Kind::Nodes;
    cycle
};
/// Changes a second of one cluster.
pub const CHANGES_PER_SECOND: f64 = 1.3;
/// Size of the mesh.
const MAX: MaxConnectedClusters = MaxConnectedClusters::C255;
/// The first identities of a cluster are others' (Cilium's smallest for workloads is 256).
const IDENTITY_MIN: u32 = 256;

/// Numbers that look random and are the same each time: SplitMix64.
#[derive(Debug)]
pub struct Random(pub u64);

impl Random {
    /// Below `bound`, which is not 0.
    pub fn below(&mut self, bound: u32) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % u64::from(bound)) as u32
    }
}

/// An object's place: it is there or not.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    create_revision: i64,
    version: i64,
}

/// A cluster.
#[derive(Debug)]
pub struct Population {
    pub name: ClusterName,
    id: ClusterId,
    random: Random,
    revision: i64,
    changes: usize,
    slots: [Vec<Slot>; 3],
    /// At most one object of a kind is deleted at a time; the next change of its kind brings it back.
    absent: [Option<u32>; 3],
}

impl Population {
    /// Cluster `id` (2 and up) as it begins.
    pub fn new(id: u32, seed: u64) -> Result<Self> {
        Ok(Self {
            name: ClusterName::new(&format!("mock-{id:03}"))?,
            id: ClusterId::new(id, MAX)?,
            random: Random(seed ^ (u64::from(id) << 32)),
            revision: 1,
            changes: id as usize,
            slots: [NODES, ENDPOINTS, IDENTITIES].map(|len| vec![Slot::default(); len as usize]),
            absent: [None; 3],
        })
    }

    /// Revision of the last change.
    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// Everything there is at first, what is said about it before the objects, and the canaries after them.
    pub fn begin(&mut self) -> Result<Vec<SourceChange>> {
        let config = ClusterConfig {
            isthmus: None,
            ..ClusterConfig::of_cluster(self.id, MAX)
        };
        let mut changes = vec![
            self.put_once(keys::cluster_config(&self.name), config.encode()),
            self.put_once(HEARTBEAT.to_owned(), b"begun".to_vec()),
        ];
        for (index, kind) in KINDS.into_iter().enumerate() {
            for number in 0..self.slots[index].len() as u32 {
                changes.push(self.put(index, kind, number)?);
            }
        }
        for kind in KINDS.into_iter().chain([Kind::Services]) {
            let canary = keys::canary(&self.name, kind, Scope::State).context("no canary")?;
            changes.push(self.put_once(canary, b"true".to_vec()));
        }
        Ok(changes)
    }

    /// The next change: an object gets another value, goes, or comes back.
    pub fn change(&mut self) -> Result<SourceChange> {
        let kind = CYCLE[self.changes % CYCLE.len()];
        self.changes += 1;
        let index = KINDS
            .iter()
            .position(|other| *other == kind)
            .context("no such kind")?;
        if let Some(number) = self.absent[index].take() {
            return self.put(index, kind, number);
        }
        let number = self.random.below(self.slots[index].len() as u32);
        // An identity's labels never change: another one takes its place.
        if kind == Kind::Identities || self.random.below(4) == 0 {
            self.absent[index] = Some(number);
            self.slots[index][number as usize] = Slot::default();
            self.revision += 1;
            return Ok(SourceChange::Delete {
                key: self.key(kind, number)?.into(),
                mod_revision: self.revision,
            });
        }
        self.put(index, kind, number)
    }

    /// The heartbeat, at `now`.
    pub fn beat(&mut self, now: u64) -> SourceChange {
        self.put_once(HEARTBEAT.to_owned(), now.to_string().into_bytes())
    }

    fn put_once(&mut self, key: String, value: Vec<u8>) -> SourceChange {
        self.revision += 1;
        SourceChange::Put {
            key: key.into(),
            value: value.into(),
            create_revision: self.revision,
            mod_revision: self.revision,
            version: 1,
        }
    }

    fn put(&mut self, index: usize, kind: Kind, number: u32) -> Result<SourceChange> {
        self.revision += 1;
        let slot = &mut self.slots[index][number as usize];
        slot.version += 1;
        if slot.version == 1 {
            slot.create_revision = self.revision;
        }
        let Slot {
            create_revision,
            version,
        } = *slot;
        Ok(SourceChange::Put {
            key: self.key(kind, number)?.into(),
            value: self.value(kind, number)?.into(),
            create_revision,
            mod_revision: self.revision,
            version,
        })
    }

    fn key(&self, kind: Kind, number: u32) -> Result<String> {
        let prefix = kind.prefix(Scope::State, &self.name).context("no prefix")?;
        Ok(match kind {
            Kind::Nodes => format!("{prefix}{}", node_name(number)),
            Kind::Ip => format!(
                "{prefix}{}",
                ip::key_suffix(IpNet::from(self.endpoint_ip(number)))
            ),
            _ => format!("{prefix}{}", self.identity(number).0),
        })
    }

    fn value(&mut self, kind: Kind, number: u32) -> Result<Vec<u8>> {
        Ok(match kind {
            Kind::Nodes => node::encode(&self.node(number)?),
            Kind::Ip => {
                let identity = self.random.below(IDENTITIES);
                ip::encode(&IpEntry {
                    prefix: self.endpoint_ip(number).into(),
                    host_ip: Some(self.node_ip(number % NODES).into()),
                    identity: self.identity(identity),
                    encryption_key: 0,
                    namespace: format!("namespace-{}", identity % 10),
                    pod_name: format!("app-{identity}-{:08x}-{number}", self.random.below(u32::MAX)),
                    service_account: "default".to_owned(),
                    named_ports: vec![],
                })
            }
            _ => identity::encode(&self.labels(number)?),
        })
    }

    fn node(&mut self, number: u32) -> Result<Node> {
        let [a, b, c, _] = self.pod_cidr(number).octets();
        let hash =
            |random: &mut Random| format!("{:08x}{:08x}", random.below(u32::MAX), random.below(u32::MAX));
        let boot_id = hash(&mut self.random);
        let label = |key: &str, value: String| (key.to_owned(), value);
        Ok(Node {
            name: node_name(number),
            cluster: self.name.clone(),
            cluster_id: self.id,
            internal_ips: vec![self.node_ip(number).into()],
            external_ips: vec![],
            router_ips: vec![IpAddr::from([a, b, c, 1])],
            ipv4_alloc_cidr: Some(Ipv4Net::new(self.pod_cidr(number), 24)?),
            ipv6_alloc_cidr: None,
            ipv4_health_ip: Some(Ipv4Addr::new(a, b, c, 2)),
            ipv6_health_ip: None,
            encryption_key: 0,
            labels: [
                label("kubernetes.io/arch", "amd64".to_owned()),
                label("kubernetes.io/os", "linux".to_owned()),
                label("kubernetes.io/hostname", node_name(number)),
                label("topology.kubernetes.io/zone", format!("zone-{}", number % 3)),
            ]
            .into(),
            annotations: [].into(),
            identity: NumericIdentity(6),
            wireguard_public_key: String::new(),
            boot_id,
        })
    }

    fn labels(&self, number: u32) -> Result<Labels> {
        let namespace = format!("namespace-{}", number % 10);
        let name = &self.name;
        Ok(Labels::parse(&format!(
            "k8s:app=app-{number};k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name={namespace};\
             k8s:io.cilium.k8s.policy.cluster={name};k8s:io.cilium.k8s.policy.serviceaccount=default;\
             k8s:io.kubernetes.pod.namespace={namespace};"
        ))?)
    }

    fn identity(&self, number: u32) -> NumericIdentity {
        NumericIdentity(*IdentityRange::of(self.id, MAX).numbers().start() + IDENTITY_MIN + number)
    }

    /// Number of a node among those of all clusters.
    fn place(&self, node: u32) -> u32 {
        u32::from(self.id.get()) * NODES + node
    }

    fn node_ip(&self, node: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(Ipv4Addr::new(172, 16, 0, 0).to_bits() + self.place(node))
    }

    fn pod_cidr(&self, node: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(Ipv4Addr::new(10, 0, 0, 0).to_bits() + self.place(node) * 256)
    }

    fn endpoint_ip(&self, number: u32) -> IpAddr {
        let cidr = self.pod_cidr(number % NODES).to_bits();
        Ipv4Addr::from_bits(cidr + 10 + number / NODES).into()
    }
}

fn node_name(number: u32) -> String {
    format!("node-{number:03}")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn a_seed_gives_one_history_that_keeps_its_size() {
        let play = |seed| {
            let mut cluster = Population::new(2, seed).unwrap();
            let mut changes = cluster.begin().unwrap();
            changes.extend((0..3000).map(|_| cluster.change().unwrap()));
            changes
        };
        let changes = play(7);
        assert_eq!(changes, play(7));
        assert_ne!(changes, play(8));
        let (mut present, mut revision) = (BTreeMap::new(), 1);
        for change in changes {
            match change {
                SourceChange::Put {
                    key,
                    create_revision,
                    mod_revision,
                    version,
                    ..
                } => {
                    revision += 1;
                    assert_eq!(mod_revision, revision);
                    let before = present.insert(key, (create_revision, version));
                    let want = before.map_or((revision, 1), |(create, version)| (create, version + 1));
                    assert_eq!((create_revision, version), want);
                }
                SourceChange::Delete { key, mod_revision } => {
                    revision += 1;
                    assert_eq!(mod_revision, revision);
                    assert!(present.remove(&key).is_some());
                }
                SourceChange::Shared(_) => panic!("nobody shares"),
            }
        }
        let objects = (NODES + ENDPOINTS + IDENTITIES) as usize;
        // Config, heartbeat and canaries; an object of each kind may be away.
        assert!(
            (objects + 3..=objects + 6).contains(&present.len()),
            "{}",
            present.len()
        );
    }
}
