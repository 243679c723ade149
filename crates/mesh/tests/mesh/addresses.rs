//! The ipcache and the routes.

use std::collections::BTreeMap;

use ipnet::IpNet;
use isthmus_bpf_abi::{IpcacheKey, IpcacheValue, ipcache_flag};
use isthmus_mesh::{Ipcache, MapOp, RouteOp, Routes, Source, SourceTable, to_address};
use isthmus_model::{IpEntry, MaxConnectedClusters, Node, NumericIdentity};
use proptest::{collection::vec, prelude::*, sample::subsequence};

use crate::{
    events::{cluster, cluster_name},
    maps::Maps,
    naive::ip,
};

fn entry(prefix: &str, host: &str, identity: u32) -> IpEntry {
    let prefix: IpNet = prefix.parse().unwrap();
    IpEntry {
        prefix,
        host_ip: (!host.is_empty()).then(|| ip(host)),
        identity: NumericIdentity(identity),
        encryption_key: 0,
        namespace: String::new(),
        pod_name: String::new(),
        service_account: String::new(),
        named_ports: vec![],
    }
}

fn node(of: u16, number: u8) -> Node {
    Node {
        name: format!("n{number}"),
        cluster: cluster_name(of),
        cluster_id: cluster(of),
        internal_ips: vec![[192, 168, of as u8, number].into()],
        external_ips: vec![],
        router_ips: vec![[10, of as u8, number, 1].into()],
        ipv4_alloc_cidr: Some(format!("10.{of}.{number}.0/24").parse().unwrap()),
        ipv6_alloc_cidr: None,
        ipv4_health_ip: None,
        ipv6_health_ip: None,
        encryption_key: 0,
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        identity: NumericIdentity::REMOTE_NODE,
        wireguard_public_key: String::new(),
        boot_id: String::new(),
    }
}

fn ipcache() -> Ipcache {
    Ipcache::new(cluster(1), MaxConnectedClusters::C255, "n1")
}

fn drain(ipcache: &mut Ipcache, maps: &mut Maps) -> usize {
    let plan = ipcache.drain();
    plan.ops.iter().for_each(|op| maps.apply(op));
    plan.len()
}

fn key(prefix: &str) -> IpcacheKey {
    match prefix.parse::<IpNet>().unwrap() {
        IpNet::V4(net) => IpcacheKey::ipv4(net.network().octets(), net.prefix_len()),
        IpNet::V6(net) => IpcacheKey::ipv6(net.network().octets(), net.prefix_len()),
    }
}

fn sync(ipcache: &mut Ipcache, of: u16) {
    for table in [SourceTable::Nodes, SourceTable::IpEntries] {
        ipcache.source_synced(Source {
            cluster: cluster(of),
            table,
        });
    }
}

#[test]
fn nodes_and_pods_get_their_identity_and_tunnel() {
    let (mut cache, mut maps) = (ipcache(), Maps::default());
    cache.upsert_node(&node(1, 1));
    cache.upsert_node(&node(1, 2));
    cache.upsert_node(&node(2, 1));
    cache.upsert_entry(cluster(1), &entry("10.1.1.5/32", "192.168.1.1", 65_600));
    cache.upsert_entry(cluster(1), &entry("10.1.2.5/32", "192.168.1.2", 65_601));
    cache.upsert_entry(cluster(2), &entry("10.2.1.5/32", "192.168.2.1", 131_100));
    drain(&mut cache, &mut maps);
    let remote = ipcache_flag::REMOTE_CLUSTER;
    let tunnel = |identity, host, flags| IpcacheValue::tunnel(identity, to_address(ip(host)), 0, flags);
    for (prefix, want) in [
        ("192.168.1.1/32", IpcacheValue::direct(1, 0)),
        ("192.168.1.2/32", IpcacheValue::direct(6, 0)),
        ("192.168.2.1/32", IpcacheValue::direct(6, remote)),
        ("10.1.1.1/32", IpcacheValue::direct(1, 0)),
        ("10.1.2.1/32", tunnel(6, "192.168.1.2", 0)),
        ("10.2.1.1/32", tunnel(6, "192.168.2.1", remote)),
        ("10.1.2.0/24", tunnel(2, "192.168.1.2", 0)),
        ("10.2.1.0/24", tunnel(2, "192.168.2.1", remote)),
        ("10.1.1.5/32", IpcacheValue::direct(65_600, 0)),
        ("10.1.2.5/32", tunnel(65_601, "192.168.1.2", 0)),
        ("10.2.1.5/32", tunnel(131_100, "192.168.2.1", remote)),
    ] {
        assert_eq!(maps.ipcache.remove(&key(prefix)), Some(want), "{prefix}");
    }
    assert!(
        maps.ipcache.is_empty(),
        "no CIDR of the own node: {:?}",
        maps.ipcache
    );
}

#[test]
fn a_node_that_moves_takes_its_pods_cidr_along() {
    let (mut cache, mut maps) = (ipcache(), Maps::default());
    cache.upsert_node(&node(2, 1));
    drain(&mut cache, &mut maps);
    let mut moved = node(2, 1);
    moved.internal_ips = vec![ip("192.168.2.99")];
    cache.upsert_node(&moved);
    assert_eq!(
        drain(&mut cache, &mut maps),
        4,
        "new address, router, CIDR, and the old address gone"
    );
    assert_eq!(
        maps.ipcache[&key("10.2.1.0/24")].tunnel_endpoint,
        to_address(ip("192.168.2.99"))
    );
    cache.upsert_node(&moved);
    assert_eq!(drain(&mut cache, &mut maps), 0);
    cache.delete_node(cluster(2), "n1");
    drain(&mut cache, &mut maps);
    assert!(maps.ipcache.is_empty());
}

#[test]
fn the_local_cluster_wins_a_prefix() {
    let (mut cache, mut maps) = (ipcache(), Maps::default());
    for of in [3, 2, 1] {
        cache.upsert_entry(cluster(of), &entry("10.9.0.1/32", "", u32::from(of) << 16 | 7));
        drain(&mut cache, &mut maps);
        assert_eq!(
            maps.ipcache[&key("10.9.0.1/32")].identity,
            u32::from(of) << 16 | 7
        );
    }
    assert_eq!(cache.conflicts(), 1);
    cache.delete_entry(cluster(1), "10.9.0.1/32".parse().unwrap());
    cache.cluster_removed(cluster(2));
    drain(&mut cache, &mut maps);
    assert_eq!(
        (maps.ipcache[&key("10.9.0.1/32")].identity, cache.conflicts()),
        (3 << 16 | 7, 0)
    );
}

#[test]
fn own_addresses_may_come_late() {
    let (mut cache, mut maps) = (ipcache(), Maps::default());
    cache.upsert_entry(cluster(1), &entry("10.1.1.5/32", "192.168.1.1", 65_600));
    drain(&mut cache, &mut maps);
    cache.set_own_addresses([ip("192.168.1.1")]);
    drain(&mut cache, &mut maps);
    assert_eq!(maps.ipcache[&key("10.1.1.5/32")], IpcacheValue::direct(65_600, 0));
}

#[test]
fn a_restored_entry_waits_for_its_cluster() {
    let remote = |identity| IpcacheValue::direct(identity, ipcache_flag::REMOTE_CLUSTER);
    let dump = [
        (key("10.1.0.1/32"), IpcacheValue::direct(65_600, 0)),
        (key("10.2.0.1/32"), remote(131_100)),
        (key("10.2.0.2/32"), remote(131_101)),
        (key("192.168.2.1/32"), remote(6)),
    ];
    let (mut cache, mut maps) = (ipcache(), Maps::default());
    maps.ipcache = dump.into_iter().collect();
    cache.restore(&dump);
    cache.upsert_entry(cluster(2), &entry("10.2.0.2/32", "", 131_101));
    assert_eq!(drain(&mut cache, &mut maps), 0, "named as it is in the map");
    assert!(cache.knows(ip("10.2.0.1")) && cache.knows(ip("10.2.0.2")) && !cache.knows(ip("10.2.0.3")));
    sync(&mut cache, 1);
    assert_eq!(drain(&mut cache, &mut maps), 1);
    sync(&mut cache, 2);
    assert!(!cache.knows(ip("10.2.0.1")), "its cluster has told all");
    assert_eq!(drain(&mut cache, &mut maps), 1);
    let left: Vec<_> = maps.ipcache.values().map(|value| value.identity).collect();
    assert_eq!(left, [131_101, 6], "a node's address may be any cluster's");
    cache.clusters_listed([cluster(2)]);
    drain(&mut cache, &mut maps);
    assert_eq!(maps.ipcache.len(), 1);
    assert!(cache.prune_ready() && cache.audit(&[(key("10.2.0.2/32"), remote(131_101))]).is_empty());
}

#[test]
fn routes_lead_to_other_nodes_and_stay_until_all_is_listed() {
    let mut routes = Routes::new(cluster(1), "n1");
    let net = |text: &str| text.parse::<IpNet>().unwrap();
    routes.restore([net("10.2.1.0/24"), net("10.7.0.0/24")]);
    for node in [node(1, 1), node(1, 2), node(2, 1)] {
        routes.upsert_node(&node);
    }
    assert_eq!(routes.drain(), [RouteOp::Add(net("10.1.2.0/24"))]);
    for of in 1..=2 {
        routes.source_synced(Source {
            cluster: cluster(of),
            table: SourceTable::Nodes,
        });
    }
    assert_eq!(routes.drain(), []);
    routes.clusters_listed([cluster(2)]);
    assert_eq!(routes.drain(), [RouteOp::Remove(net("10.7.0.0/24"))]);
    let mut twin = node(3, 9);
    twin.ipv4_alloc_cidr = Some("10.2.1.0/24".parse().unwrap());
    routes.upsert_node(&twin);
    assert_eq!((routes.drain(), routes.conflicts()), (vec![], 1));
    assert_eq!(
        routes.routes().map(|route| route.cluster_id).collect::<Vec<_>>(),
        [1, 2]
    );
    routes.cluster_removed(cluster(2));
    assert_eq!(routes.drain(), [], "the other cluster's node has it now");
    routes.delete_node(cluster(3), "n9");
    assert_eq!(routes.drain(), [RouteOp::Remove(net("10.2.1.0/24"))]);
    assert_eq!(routes.audit([net("10.7.0.0/24")]).len(), 2);
}

#[derive(Clone, Debug)]
enum Event {
    Entry(u16, u8, u8, u32),
    DeleteEntry(u16, u8),
    Node(u16, u8, Vec<u8>),
    DeleteNode(u16, u8),
    ClusterRemoved(u16),
    Drain,
}

fn some_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (1u16..4, 0u8..6, 0u8..4, 0u32..3).prop_map(|(of, host, node, identity)| Event::Entry(of, host, node, identity)),
        2 => (1u16..4, 0u8..6).prop_map(|(of, host)| Event::DeleteEntry(of, host)),
        2 => (1u16..4, 1u8..3, subsequence((0u8..6).collect::<Vec<_>>(), 0..3)).prop_map(|(of, number, ips)| Event::Node(of, number, ips)),
        1 => (1u16..4, 1u8..3).prop_map(|(of, number)| Event::DeleteNode(of, number)),
        1 => (2u16..4).prop_map(Event::ClusterRemoved),
        2 => Just(Event::Drain),
    ]
}

fn host(number: u8) -> std::net::IpAddr {
    [10, 0, 0, number].into()
}

/// The tables, and the merge of one address in the words of the rules.
#[derive(Default)]
struct Tables {
    entries: BTreeMap<(u16, u8), IpEntry>,
    nodes: BTreeMap<(u16, u8), Node>,
}

impl Tables {
    fn act(&mut self, event: &Event, cache: &mut Ipcache) {
        match event {
            Event::Entry(of, at, on, identity) => {
                let host_ip = if *on == 0 {
                    String::new()
                } else {
                    format!("10.0.0.{on}")
                };
                let entry = entry(
                    &format!("10.0.0.{at}/32"),
                    &host_ip,
                    (u32::from(*of) << 16) + identity,
                );
                cache.upsert_entry(cluster(*of), &entry);
                self.entries.insert((*of, *at), entry);
            }
            Event::DeleteEntry(of, at) => {
                cache.delete_entry(cluster(*of), IpNet::from(host(*at)));
                self.entries.remove(&(*of, *at));
            }
            Event::Node(of, number, ips) => {
                let mut node = node(*of, *number);
                node.internal_ips = ips.iter().map(|at| host(*at)).collect();
                node.router_ips = vec![host(3)];
                node.ipv4_alloc_cidr = None;
                cache.upsert_node(&node);
                self.nodes.insert((*of, *number), node);
            }
            Event::DeleteNode(of, number) => {
                cache.delete_node(cluster(*of), &format!("n{number}"));
                self.nodes.remove(&(*of, *number));
            }
            Event::ClusterRemoved(of) => {
                cache.cluster_removed(cluster(*of));
                self.entries.retain(|(cluster, _), _| cluster != of);
                self.nodes.retain(|(cluster, _), _| cluster != of);
            }
            Event::Drain => {}
        }
    }

    /// An endpoint or a node has this address.
    fn names(&self, address: std::net::IpAddr) -> bool {
        let mut nodes = self
            .nodes
            .values()
            .flat_map(|node| node.internal_ips.iter().chain(&node.router_ips));
        self.entries.values().any(|entry| entry.prefix.addr() == address) || nodes.any(|ip| *ip == address)
    }

    fn expected(&self, own: &[std::net::IpAddr]) -> BTreeMap<IpcacheKey, IpcacheValue> {
        let mut all: BTreeMap<IpcacheKey, IpcacheValue> = BTreeMap::new();
        for of in 1..4 {
            let flags = if of == 1 { 0 } else { ipcache_flag::REMOTE_CLUSTER };
            let mine = || self.nodes.iter().filter(move |((cluster, _), _)| *cluster == of);
            let behind = |identity, host: Option<std::net::IpAddr>| match host {
                Some(host) if !own.contains(&host) => {
                    IpcacheValue::tunnel(identity, to_address(host), 0, flags)
                }
                _ => IpcacheValue::direct(identity, flags),
            };
            let is_own = |number: u8| of == 1 && number == 1;
            let identity = |number| if is_own(number) { 1 } else { 6 };
            for ((_, number), node) in mine() {
                for ip in &node.internal_ips {
                    let key = IpcacheKey::host(&to_address(*ip));
                    all.entry(key)
                        .or_insert(IpcacheValue::direct(identity(*number), flags));
                }
            }
            for ((_, number), node) in mine() {
                for ip in &node.router_ips {
                    let host = node.tunnel_endpoint().filter(|_| !is_own(*number));
                    let key = IpcacheKey::host(&to_address(*ip));
                    all.entry(key).or_insert(behind(identity(*number), host));
                }
            }
            for (_, entry) in self.entries.iter().filter(|((cluster, _), _)| *cluster == of) {
                let key = IpcacheKey::host(&to_address(entry.prefix.addr()));
                all.entry(key).or_insert(behind(entry.identity.0, entry.host_ip));
            }
        }
        all
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_ipcache_equals_one_from_scratch(old in vec(some_event(), 0..30), events in vec(some_event(), 0..40), restart in any::<bool>()) {
        let mut maps = Maps::default();
        let mut cache = ipcache();
        if restart {
            let mut tables = Tables::default();
            old.iter().for_each(|event| tables.act(event, &mut cache));
            drain(&mut cache, &mut maps);
            let dump: Vec<_> = maps.ipcache.iter().map(|(key, value)| (*key, *value)).collect();
            cache = ipcache();
            cache.restore(&dump);
        }
        let mut tables = Tables::default();
        let mut own = vec![];
        for event in events.iter().chain([&Event::Drain]) {
            tables.act(event, &mut cache);
            for at in 0..6 {
                let (named, known) = (tables.names(host(at)), cache.knows(host(at)));
                prop_assert!(if restart { known || !named } else { known == named }, "{} after {:?}", host(at), event);
            }
            if let Event::Node(1, 1, ips) = event {
                own = ips.iter().map(|at| host(*at)).collect();
            }
            if let Event::Drain = event {
                let plan = cache.drain();
                let first_delete = plan.ops.iter().position(|op| matches!(op, MapOp::IpcacheDelete(_))).unwrap_or(plan.len());
                prop_assert!(plan.ops[first_delete..].iter().all(|op| matches!(op, MapOp::IpcacheDelete(_))));
                plan.ops.iter().for_each(|op| maps.apply(op));
                prop_assert_eq!(cache.desired().into_iter().collect::<BTreeMap<_, _>>(), maps.ipcache.clone());
            }
        }
        cache.clusters_listed((1..4).map(cluster));
        (1..4).for_each(|of| sync(&mut cache, of));
        drain(&mut cache, &mut maps);
        for at in 0..6 {
            prop_assert_eq!(cache.knows(host(at)), tables.names(host(at)), "{} at the end", host(at));
        }
        prop_assert_eq!(maps.ipcache, tables.expected(&own));
    }
}
