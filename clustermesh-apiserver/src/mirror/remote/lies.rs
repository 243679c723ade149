//! A remote cluster that lies: whatever it sends, nothing of another cluster and nothing that was not granted to it gets in, and
//! each refusal is counted.

use std::net::IpAddr;

use ipnet::IpNet;
use isthmus_model::{
    ClusterId, IdentityRange, IpEntry, Labels, Node, NumericIdentity, ServiceFrame, ServiceName, Slice,
    SliceEndpoint, SlicePort, labels,
};
use isthmus_wire::{identity, ip, node, service, slice};
use proptest::prelude::*;

use super::{tests::World, *};
use crate::store::SubId;

const MAX: MaxConnectedClusters = MaxConnectedClusters::C255;
const GRANTS: &str = "isthmus-accept: {identities: [131072-131100], pod-cidrs: [10.2.0.0/16], \
                      node-cidrs: [172.18.2.0/24], namespaces: [shop], services: ['shop/c*'], max-bytes: 64Ki}";

/// What an object says, as indices into lists whose first element is the truth.
#[derive(Clone, Copy, Debug)]
struct Claims {
    cluster: usize,
    id: usize,
    identity: usize,
    pod: usize,
    host: usize,
    namespace: usize,
    name: usize,
    key: usize,
    large: bool,
}

const CLUSTERS: [&str; 3] = ["c2", "c1", "c20"];
const IDS: [u32; 3] = [2, 1, 3];
/// Granted; granted; in the cluster's range only; another cluster's; a privilege.
const IDENTITIES: [u32; 5] = [131_073, 131_100, 140_000, 65_537, 7];
const PODS: [&str; 5] = [
    "10.2.0.9/32",
    "10.2.7.0/24",
    "10.1.0.9/32",
    "0.0.0.0/0",
    "10.0.0.0/8",
];
const HOSTS: [&str; 3] = ["172.18.2.3", "172.18.1.3", "10.1.0.1"];
const NAMESPACES: [&str; 3] = ["shop", "kube-system", "shop2"];
const NAMES: [&str; 3] = ["cart", "db", "c2"];

fn claims() -> impl Strategy<Value = Claims> {
    // Mostly the truth, so that one lie at a time is met often.
    let lie = |len: usize| prop_oneof![8 => Just(0), 2 => 0..len];
    (
        (lie(3), lie(3), lie(5), lie(5), lie(3)),
        (lie(3), lie(3), lie(8), proptest::bool::weighted(0.05)),
    )
        .prop_map(
            |((cluster, id, identity, pod, host), (namespace, name, key, large))| Claims {
                cluster,
                id,
                identity,
                pod,
                host,
                namespace,
                name,
                key,
                large,
            },
        )
}

impl Claims {
    fn owner(self) -> (ClusterName, ClusterId) {
        (
            ClusterName::new(CLUSTERS[self.cluster]).unwrap(),
            ClusterId::new(IDS[self.id], MAX).unwrap(),
        )
    }

    fn pod(self) -> IpNet {
        PODS[self.pod].parse().unwrap()
    }

    fn host(self) -> IpAddr {
        HOSTS[self.host].parse().unwrap()
    }

    /// The last part of the key, and the value.
    fn object(self, kind: Kind) -> (String, Vec<u8>) {
        let (cluster, cluster_id) = self.owner();
        let service = ServiceName::new(NAMESPACES[self.namespace], NAMES[self.name]).unwrap();
        let frame = ServiceFrame {
            cluster: cluster.clone(),
            cluster_id,
            name: service.clone(),
            service_type: Default::default(),
            cluster_ips: vec!["10.96.7.7".parse().unwrap()],
            external_ips: vec![],
            ports: vec![],
            global: true,
            shared: true,
            affinity: Default::default(),
            session_affinity: Default::default(),
            traffic: Default::default(),
            labels: BTreeMap::new(),
            selector: BTreeMap::new(),
        };
        let backends = Slice {
            cluster: cluster.clone(),
            cluster_id,
            service: service.clone(),
            slice: "s0".into(),
            ports: vec![SlicePort {
                name: "http".into(),
                protocol: isthmus_model::Protocol::Tcp,
                port: 80,
            }],
            endpoints: vec![SliceEndpoint::ready(self.pod().addr())],
        };
        let padding = "x".repeat(if self.large { 70_000 } else { 0 });
        match kind {
            Kind::Nodes => {
                let name = NAMES[self.name].to_owned();
                let pod_cidr = match self.pod() {
                    IpNet::V4(net) => Some(net),
                    IpNet::V6(_) => None,
                };
                let node = Node {
                    name: name.clone(),
                    cluster,
                    cluster_id,
                    internal_ips: vec![self.host()],
                    external_ips: vec![],
                    router_ips: vec![],
                    ipv4_alloc_cidr: pod_cidr,
                    ipv6_alloc_cidr: None,
                    ipv4_health_ip: None,
                    ipv6_health_ip: None,
                    encryption_key: 0,
                    labels: BTreeMap::new(),
                    annotations: BTreeMap::new(),
                    identity: NumericIdentity::REMOTE_NODE,
                    wireguard_public_key: String::new(),
                    boot_id: padding,
                };
                (name, node::encode(&node))
            }
            Kind::Ip => {
                let entry = IpEntry {
                    prefix: self.pod(),
                    host_ip: Some(self.host()),
                    identity: NumericIdentity(IDENTITIES[self.identity]),
                    encryption_key: 0,
                    namespace: NAMESPACES[self.namespace].into(),
                    pod_name: padding,
                    service_account: String::new(),
                    named_ports: vec![],
                };
                (ip::key_suffix(self.pod()), ip::encode(&entry))
            }
            Kind::Identities => {
                let mut all = Labels::default();
                all.insert(labels::SOURCE_K8S, labels::POLICY_CLUSTER, cluster.as_str());
                all.insert(
                    labels::SOURCE_K8S,
                    labels::POD_NAMESPACE,
                    NAMESPACES[self.namespace],
                );
                (IDENTITIES[self.identity].to_string(), identity::encode(&all))
            }
            Kind::Services => (
                keys::service_suffix(&service),
                service::encode(&frame, [&backends]),
            ),
            Kind::Frames => (keys::service_suffix(&service), slice::encode_frame(&frame)),
            Kind::Slices => (keys::slice_suffix(&service, "s0"), slice::encode_slice(&backends)),
        }
    }

    fn key(self, prefix: &str, suffix: &str) -> String {
        match self.key {
            0 => format!("{prefix}{suffix}"),
            1 => suffix.to_owned(),
            2 => prefix.replace("c2", "c1") + "../c1/" + suffix,
            3 => format!("{prefix}../{suffix}"),
            4 => format!("{prefix}{suffix}/"),
            5 => format!("{prefix}other"),
            6 => prefix.to_owned(),
            _ => format!("{prefix}{}", "k".repeat(5_000)),
        }
    }
}

/// Everything that the store has of `kind` is c2's, and granted. Judged from what readers read, by other means than the border.
fn check_content(world: &World, kind: Kind) -> Result<(), TestCaseError> {
    let cluster = ClusterName::new("c2").unwrap();
    let id = ClusterId::new(2, MAX).unwrap();
    let range = IdentityRange::of(id, MAX);
    let sub = SubId::Remote(cluster.clone(), kind);
    let prefix = kind.prefix(Scope::Cache, &cluster).unwrap();
    let pods: IpNet = "10.2.0.0/16".parse().unwrap();
    let nodes: IpNet = "172.18.2.0/24".parse().unwrap();
    let within = |net: IpNet| pods.contains(&net) || nodes.contains(&net);
    let mut bytes = 0;
    for (key, value) in world.store.entries(&sub) {
        bytes += key.len() + value.len();
        let suffix = std::str::from_utf8(key).unwrap().strip_prefix(&prefix).unwrap();
        prop_assert!(
            suffix.split('/').all(|part| !matches!(part, "" | "." | "..")),
            "{suffix}"
        );
        match kind {
            Kind::Nodes => {
                let node = node::decode(suffix, value, &cluster, id).unwrap();
                prop_assert!(node.internal_ips.iter().all(|ip| nodes.contains(ip)));
                prop_assert!(node.alloc_cidrs().all(|net| pods.contains(&net)));
            }
            Kind::Ip => {
                let entry = ip::decode(suffix, value, range).unwrap();
                prop_assert!(within(entry.prefix) && entry.host_ip.is_none_or(|ip| nodes.contains(&ip)));
                prop_assert!(
                    entry.identity.0 <= 8 && entry.identity.0 != 7
                        || (131_072..=131_100).contains(&entry.identity.0)
                );
                prop_assert!(matches!(entry.namespace.as_str(), "" | "shop"));
            }
            Kind::Identities => {
                let number = keys::parse_identity(suffix).unwrap();
                prop_assert!((131_072..=131_100).contains(&number.0));
                let labels = identity::decode(number, value, &cluster, range).unwrap();
                prop_assert_eq!(&*labels.find(labels::POD_NAMESPACE).unwrap().value, "shop");
            }
            Kind::Services | Kind::Frames | Kind::Slices => {
                prop_assert!(suffix.starts_with("shop/c"), "{suffix}");
                let slices = match kind {
                    Kind::Services => service::decode(suffix, value, &cluster, id).unwrap().1,
                    Kind::Slices => vec![slice::decode_slice(suffix, value, &cluster, id).unwrap()],
                    _ => vec![],
                };
                prop_assert!(service::backend_ips(&slices).all(|ip| within(ip.into())));
            }
        }
    }
    prop_assert!(bytes <= 64 * 1024, "{bytes} bytes");
    Ok(())
}

fn refused(world: &World) -> u64 {
    world.remote.status().refused.values().sum()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]
    #[test]
    fn nothing_foreign_gets_in_and_each_refusal_is_counted(
        steps in proptest::collection::vec(
            (0usize..6, claims(), 0u8..12, proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4)),
            1..60,
        ),
    ) {
        let mut world = World::with_grants(Grants::parse(GRANTS).unwrap());
        let feeds = world.config_with_slices(2);
        for (revision, (number, claims, what, damage)) in (2..).zip(steps) {
            let kind = Kind::ALL[number];
            let prefix = kind.prefix(Scope::State, &ClusterName::new("c2").unwrap()).unwrap();
            let feed = feeds.iter().find(|feed| feed.key == prefix.as_bytes()).unwrap().name.clone();
            let (suffix, mut value) = claims.object(kind);
            let key: Bytes = claims.key(&prefix, &suffix).into();
            let damaged = what == 0 && !damage.is_empty() && !value.is_empty();
            if damaged {
                for (at, byte) in damage {
                    let at = at.index(value.len());
                    value[at] = byte;
                }
            }
            let change = match what {
                1 | 2 => Change::Delete { key: key.clone(), mod_revision: revision },
                3 => Change::Refused { key: key.clone(), mod_revision: revision, len: 9, surplus: false },
                4 => Change::Refused { key: key.clone(), mod_revision: revision, len: 9, surplus: true },
                _ => Change::Put {
                    key: key.clone(), value: value.clone().into(), create_revision: revision, mod_revision: revision, version: 1,
                },
            };
            let before = refused(&world);
            world.on(Update::Changes { feed, revision, changes: vec![change] }, 0);
            let count = refused(&world) - before;
            let sub = SubId::Remote(ClusterName::new("c2").unwrap(), kind);
            let to = format!("{}{suffix}", kind.prefix(Scope::Cache, &ClusterName::new("c2").unwrap()).unwrap());
            let there = world.store.entries(&sub).any(|(key, stored)| key == to.as_bytes() && stored == value);
            match what {
                1 | 2 => prop_assert_eq!(count, 0),
                3 | 4 => prop_assert_eq!(count, 1),
                _ => {
                    // Taken or refused and counted, never neither. (Damage may hit what nobody reads.)
                    prop_assert!(count == 1 || there, "{claims:?}");
                    if !damaged {
                        let owned = kind == Kind::Ip || claims.cluster == 0;
                        let numbered = matches!(kind, Kind::Ip | Kind::Identities) || claims.id == 0;
                        let named = match kind {
                            Kind::Nodes => true,
                            Kind::Ip | Kind::Identities => claims.identity < 2,
                            _ => claims.name != 1,
                        };
                        let spaced = kind == Kind::Nodes || claims.namespace == 0;
                        let placed = matches!(kind, Kind::Identities | Kind::Frames) || claims.pod < 2;
                        let hosted = !matches!(kind, Kind::Nodes | Kind::Ip) || claims.host == 0;
                        let true_key = claims.key == 0;
                        // Of that size none fits beside another.
                        let fits = !claims.large || !matches!(kind, Kind::Nodes | Kind::Ip);
                        let privileged = kind == Kind::Ip && claims.identity == 4;
                        let truth = owned && numbered && named && spaced && placed && hosted && true_key && fits && !privileged;
                        prop_assert_eq!(count == 0, truth, "{:?} {:?} {:?}", kind, claims, world.remote.status().last_refusals);
                    }
                }
            }
            check_content(&world, kind)?;
        }
        // Withdrawn as a whole: nothing stays.
        let everything = Grants::parse("isthmus-accept: {namespaces: [], pod-cidrs: [], node-cidrs: []}").unwrap();
        let before: usize = Kind::ALL.iter().map(|kind| world.store.status(&SubId::Remote(ClusterName::new("c2").unwrap(), *kind)).map_or(0, |sub| sub.keys)).sum();
        let count = refused(&world);
        world.remote.set_grants(&mut world.store, everything, 0);
        prop_assert_eq!(refused(&world) - count, before as u64);
        for kind in Kind::ALL {
            prop_assert!(world.store.entries(&SubId::Remote(ClusterName::new("c2").unwrap(), kind)).next().is_none());
        }
    }
}

#[test]
fn changed_grants_withdraw_at_once_and_list_again() {
    let mut world = World::with_grants(Grants::default());
    let feeds = world.config_with_slices(2);
    let ips = feeds
        .iter()
        .find(|feed| feed.key.starts_with(b"cilium/state/ip/"))
        .unwrap();
    let put = |address: &str, revision| {
        let entry = IpEntry {
            prefix: address.parse::<IpAddr>().unwrap().into(),
            host_ip: None,
            identity: NumericIdentity(131_073),
            encryption_key: 0,
            namespace: String::new(),
            pod_name: String::new(),
            service_account: String::new(),
            named_ports: vec![],
        };
        Change::Put {
            key: format!("cilium/state/ip/v1/default/{address}").into(),
            value: ip::encode(&entry).into(),
            create_revision: revision,
            mod_revision: revision,
            version: 1,
        }
    };
    let list = |world: &mut World, feed: &Arc<str>| {
        let feed = feed.clone();
        world.on(
            Update::Listing {
                feed: feed.clone(),
                cluster_id: 9,
                revision: 5,
                trusted: false,
                expected: 2,
            },
            0,
        );
        let changes = vec![put("10.2.0.1", 2), put("10.3.0.1", 3)];
        world.on(
            Update::Changes {
                feed: feed.clone(),
                revision: 5,
                changes,
            },
            0,
        );
        world.on(
            Update::Listed {
                feed: feed.clone(),
                cluster_id: 9,
                revision: 5,
                new_history: true,
            },
            0,
        );
        world.on(
            Update::Synced {
                feed,
                cluster_id: 9,
                revision: 5,
            },
            0,
        );
    };
    let config = keys::cluster_config(&ClusterName::new("c2").unwrap());
    world.on(
        Update::Synced {
            feed: config.as_str().into(),
            cluster_id: 9,
            revision: 5,
        },
        0,
    );
    list(&mut world, &ips.name);
    let sub = SubId::Remote(ClusterName::new("c2").unwrap(), Kind::Ip);
    let shown = |world: &World| {
        let keys: Vec<String> = world
            .store
            .entries(&sub)
            .map(|(key, _)| String::from_utf8_lossy(key).into_owned())
            .collect();
        (
            keys,
            world
                .store
                .header(&crate::store::Route::Sub(sub.clone()))
                .cluster_id,
        )
    };
    let (keys, id) = shown(&world);
    assert_eq!((keys.len(), id), (2, 9), "without grants it has its source's ID");

    let narrow = Grants::parse("isthmus-accept: {pod-cidrs: [10.2.0.0/16]}").unwrap();
    let changes = world.remote.set_grants(&mut world.store, narrow.clone(), 0);
    let (keys, between) = shown(&world);
    assert_eq!(keys, ["cilium/cache/ip/v1/c2/10.2.0.1"]);
    assert!(
        between != 9 && between != 9 ^ narrow.fingerprint(),
        "readers of before list"
    );
    assert_eq!(world.remote.status().refused["not_granted_cidr"], 1);
    let added: Vec<&Feed> = changes
        .iter()
        .filter_map(|change| match change {
            FeedChange::Add(feed) => Some(feed),
            FeedChange::Remove(_) => None,
        })
        .collect();
    assert_eq!(
        (added.len(), changes.len()),
        (6, 12),
        "every kind is listed again"
    );
    let again = added
        .iter()
        .find(|feed| feed.key == ips.key)
        .unwrap()
        .name
        .clone();
    list(&mut world, &again);
    let (keys, id) = shown(&world);
    assert_eq!(
        (keys.len(), id),
        (1, 9 ^ narrow.fingerprint()),
        "the same in every replica with these grants"
    );
    assert_eq!(world.remote.set_grants(&mut world.store, narrow, 0), []);

    // Granted again: it comes with the list, and what was there stays meanwhile.
    let changes = world.remote.set_grants(&mut world.store, Grants::default(), 0);
    assert_eq!(shown(&world).0.len(), 1);
    let again = changes.iter().find_map(|change| match change {
        FeedChange::Add(feed) if feed.key == ips.key => Some(feed.name.clone()),
        _ => None,
    });
    list(&mut world, &again.unwrap());
    assert_eq!(
        shown(&world),
        (
            vec![
                "cilium/cache/ip/v1/c2/10.2.0.1".to_owned(),
                "cilium/cache/ip/v1/c2/10.3.0.1".to_owned()
            ],
            9
        )
    );
}
