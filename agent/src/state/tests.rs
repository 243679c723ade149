//! The glue under events in any order: a small mesh of two clusters is written as kvstore keys, delivered in some order,
//! and what the plans leave in pretend maps is compared.

use std::{collections::BTreeSet, net::IpAddr};

use isthmus_bpf_abi::{Backend, ServiceKey, ServiceValue};
use isthmus_mesh::MapOp;
use isthmus_model::{
    Affinity, IpEntry, ServiceFrame, ServicePort, ServiceType, Slice, SliceEndpoint, SlicePort,
};
use isthmus_wire::{ip, keys::Kind, node, slice};
use proptest::prelude::*;

use super::*;
use crate::endpoints::{Attachment, Device, Endpoint, Pod};

const MAX: MaxConnectedClusters = MaxConnectedClusters::C255;

fn name(name: &str) -> ClusterName {
    ClusterName::new(name).unwrap()
}

fn id(cluster: &str) -> ClusterId {
    ClusterId::new(cluster[1..].parse().unwrap(), MAX).unwrap()
}

fn service() -> ServiceName {
    ServiceName::new("default", "web").unwrap()
}

fn a_node(cluster: &str, number: u8) -> Node {
    let (id, c) = (id(cluster), id(cluster).get() as u8);
    Node {
        name: format!("n{number}"),
        cluster: name(cluster),
        cluster_id: id,
        internal_ips: vec![[172, 18, c, number].into()],
        external_ips: vec![],
        router_ips: vec![[10, c, number, 1].into()],
        ipv4_alloc_cidr: Some(format!("10.{c}.{number}.0/24").parse().unwrap()),
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

fn frame(cluster: &str) -> ServiceFrame {
    ServiceFrame {
        cluster: name(cluster),
        cluster_id: id(cluster),
        name: service(),
        service_type: ServiceType::ClusterIp,
        cluster_ips: vec![[10, 96, id(cluster).get() as u8, 1].into()],
        external_ips: vec![],
        ports: vec![ServicePort {
            name: "".into(),
            protocol: isthmus_model::Protocol::Tcp,
            port: 80,
            node_port: 0,
        }],
        global: true,
        shared: true,
        affinity: Affinity::None,
        session_affinity: Default::default(),
        traffic: Default::default(),
        labels: BTreeMap::new(),
        selector: BTreeMap::new(),
    }
}

fn a_slice(cluster: &str, hosts: &[u8]) -> Slice {
    let c = id(cluster).get() as u8;
    Slice {
        cluster: name(cluster),
        cluster_id: id(cluster),
        service: service(),
        slice: "s".into(),
        ports: vec![SlicePort {
            name: "".into(),
            protocol: isthmus_model::Protocol::Tcp,
            port: 8080,
        }],
        endpoints: hosts
            .iter()
            .map(|host| SliceEndpoint::ready([10, c, 1, *host].into()))
            .collect(),
    }
}

fn pod_entry(cluster: &str, host: u8) -> IpEntry {
    let c = id(cluster).get() as u8;
    IpEntry {
        prefix: format!("10.{c}.1.{host}/32").parse().unwrap(),
        host_ip: Some([172, 18, c, 1].into()),
        identity: NumericIdentity((u32::from(c) << 16) + 7),
        encryption_key: 0,
        namespace: "default".into(),
        pod_name: "web".into(),
        service_account: String::new(),
        named_ports: vec![],
    }
}

type Store = BTreeMap<String, Vec<u8>>;

/// What an API server holds of a cluster with one node and a service with pods on these hosts.
fn publish(store: &mut Store, cluster: &str, hosts: &[u8]) {
    let own = cluster == "c1";
    let config = ClusterConfig::of_cluster(id(cluster), MAX);
    let config = if own { config } else { config.mirrored() };
    store.insert(keys::cluster_config(&name(cluster)), config.encode());
    if !own {
        let status = RemoteStatus {
            name: cluster.into(),
            connected: true,
            ready: true,
            cluster_id: id(cluster).get().into(),
            ..RemoteStatus::default()
        };
        store.insert(format!("{}{cluster}", keys::REMOTE_STATUS), status.encode());
    }
    for kind in Kind::ALL {
        let source = source(cluster, kind);
        let canary = keys::canary(&name(cluster), kind, source.scope).unwrap_or_default();
        store.insert(canary, b"now".to_vec());
        let prefix = source.prefix();
        let mut put = |suffix: &str, value: Vec<u8>| store.insert(format!("{prefix}{suffix}"), value);
        match kind {
            Kind::Nodes => drop(put("n1", node::encode(&a_node(cluster, 1)))),
            Kind::Frames => drop(put("default/web", slice::encode_frame(&frame(cluster)))),
            Kind::Slices => drop(put(
                "default/web/s",
                slice::encode_slice(&a_slice(cluster, hosts)),
            )),
            Kind::Ip => {
                for host in hosts {
                    let entry = pod_entry(cluster, *host);
                    put(&ip::key_suffix(entry.prefix), ip::encode(&entry));
                }
            }
            Kind::Identities | Kind::Services => {}
        }
    }
}

fn source(cluster: &str, kind: Kind) -> Source {
    let own = cluster == "c1";
    let scope = match (own, kind) {
        (false, _) => keys::Scope::Cache,
        (true, Kind::Frames | Kind::Slices) => keys::Scope::Local,
        (true, _) => keys::Scope::State,
    };
    Source {
        cluster: name(cluster),
        cluster_id: id(cluster),
        kind,
        scope,
    }
}

/// The maps, as the kernel would have them.
#[derive(Clone, Debug, Default, PartialEq)]
struct Maps {
    services: BTreeMap<ServiceKey, ServiceValue>,
    backends: BTreeMap<u32, Backend>,
    ipcache: BTreeMap<IpcacheKey, IpcacheValue>,
    endpoints: BTreeMap<EndpointKey, EndpointEntry>,
}

impl Maps {
    fn apply(&mut self, op: &MapOp) {
        match op.clone() {
            MapOp::ServicePut(key, value) => drop(self.services.insert(key, value)),
            MapOp::ServiceDelete(key) => drop(self.services.remove(&key)),
            MapOp::BackendPut(id, value) => drop(self.backends.insert(id, value)),
            MapOp::BackendDelete(id) => drop(self.backends.remove(&id)),
            MapOp::IpcachePut(key, value) => drop(self.ipcache.insert(key, value)),
            MapOp::IpcacheDelete(key) => drop(self.ipcache.remove(&key)),
            MapOp::EndpointPut(key, value) => drop(self.endpoints.insert(key, value)),
            MapOp::EndpointDelete(key) => drop(self.endpoints.remove(&key)),
            other => panic!("no service asks for {other:?}"),
        }
    }

    fn dump(&self) -> MapDump {
        MapDump {
            lb: LbDump {
                services: self.services.clone().into_iter().collect(),
                backends: self.backends.clone().into_iter().collect(),
                ..LbDump::default()
            },
            ipcache: self.ipcache.clone().into_iter().collect(),
            endpoints: self.endpoints.clone().into_iter().collect(),
        }
    }

    /// Where each frontend leads: addresses of the backends in its slots. Numbers do not matter.
    fn view(&self) -> BTreeMap<(IpAddr, u16), BTreeSet<IpAddr>> {
        let frontends = self.services.iter().filter(|(key, _)| key.slot == 0);
        frontends
            .map(|(key, value)| {
                let slots = (1..=value.count).map(|slot| self.services[&key.at_slot(slot)]);
                let backends =
                    slots.map(|slot| isthmus_mesh::to_ip(&self.backends[&slot.backend_id].address));
                let frontend = isthmus_mesh::to_ip(&key.address);
                ((frontend, u16::from_be_bytes(key.port)), backends.collect())
            })
            .collect()
    }
}

/// An agent, its maps, and the upstream that it follows.
struct Agent {
    state: State,
    maps: Maps,
    feeds: BTreeMap<Arc<str>, String>,
}

impl Agent {
    fn new(maps: Maps) -> Self {
        let identity = Identity {
            cluster: name("c1"),
            cluster_id: id("c1"),
            max: MAX,
            node: "n1".into(),
            maglev: Default::default(),
        };
        let mut agent = Self {
            state: State::new(identity, maps.dump()),
            maps,
            feeds: BTreeMap::new(),
        };
        let first = agent.state.first_feeds();
        agent.change(first);
        agent
    }

    fn change(&mut self, changes: Vec<FeedChange>) -> Vec<Arc<str>> {
        let mut added = vec![];
        for change in changes {
            match change {
                FeedChange::Add { name, prefix, .. } => {
                    assert!(self.feeds.insert(Arc::clone(&name), prefix).is_none());
                    added.push(name);
                }
                FeedChange::Remove(name) => assert!(self.feeds.remove(&name).is_some()),
            }
        }
        added
    }

    fn drain(&mut self) {
        while self.state.has_changes() {
            let plan = self.state.drain(3);
            for op in &plan.ops {
                self.maps.apply(op);
            }
        }
        self.state.on_settled();
    }

    fn put(&mut self, feed: &str, key: &str, value: &[u8]) -> Vec<Arc<str>> {
        let changes = self.state.on(Event::Put {
            feed,
            key: key.as_bytes(),
            value,
        });
        self.change(changes)
    }

    fn delete(&mut self, key: &str) -> Vec<Arc<str>> {
        let feeds: Vec<_> = self.feeds_of(key);
        let mut added = vec![];
        for feed in feeds {
            let key = key.as_bytes();
            let changes = self.state.on(Event::Delete { feed: &feed, key });
            added.extend(self.change(changes));
        }
        added
    }

    fn feeds_of(&self, key: &str) -> Vec<Arc<str>> {
        let matches = self
            .feeds
            .iter()
            .filter(|(_, prefix)| key.starts_with(prefix.as_str()));
        matches.map(|(name, _)| Arc::clone(name)).collect()
    }

    /// Lists every feed, those that begin on the way too, in an order that `choose` decides.
    fn list_all(&mut self, store: &Store, mut choose: impl FnMut(usize) -> usize) {
        let mut open: Vec<Arc<str>> = self.feeds.keys().cloned().collect();
        while !open.is_empty() {
            let feed = open.swap_remove(choose(open.len()));
            open.extend(self.list(store, &feed));
            open.retain(|feed| self.feeds.contains_key(feed));
        }
    }

    fn list(&mut self, store: &Store, feed: &Arc<str>) -> Vec<Arc<str>> {
        let Some(prefix) = self.feeds.get(feed).cloned() else {
            return vec![];
        };
        let mut added = vec![];
        for (key, value) in store
            .range(prefix.clone()..)
            .take_while(|(key, _)| key.starts_with(&prefix))
        {
            added.extend(self.put(feed, key, value));
        }
        let changes = self.state.on(Event::Synced { feed });
        added.extend(self.change(changes));
        added
    }

    fn remote(&self, cluster: &str) -> RemoteView {
        let mut all = self.state.remotes().into_iter();
        all.find(|remote| remote.name.as_str() == cluster).unwrap()
    }
}

fn mesh(hosts: &[u8]) -> Store {
    let mut store = Store::new();
    publish(&mut store, "c1", hosts);
    publish(&mut store, "c2", hosts);
    store
}

fn frontend() -> (IpAddr, u16) {
    ([10, 96, 1, 1].into(), 80)
}

fn ips(ips: &[&str]) -> BTreeSet<IpAddr> {
    ips.iter().map(|ip| ip.parse().unwrap()).collect()
}

fn synced(store: &Store) -> Agent {
    let mut agent = Agent::new(Maps::default());
    agent.list_all(store, |_| 0);
    agent.drain();
    agent
}

fn an_endpoint(host: u8) -> Endpoint {
    Endpoint {
        id: host.into(),
        attachment: Attachment {
            container_id: format!("c{host}"),
            ifname: "eth0".into(),
        },
        pod: Pod::default(),
        ipv4: Some([10, 1, 1, host].into()),
        ipv6: None,
        host_ifname: format!("lxc{host}"),
        device: Some(Device {
            netns: String::new(),
            host_ifindex: u32::from(host) + 100,
            host_mac: [2; 6],
            pod_mac: [4; 6],
        }),
    }
}

fn identity_in_map(agent: &Agent, host: u8) -> Option<u32> {
    let address = isthmus_mesh::to_address([10, 1, 1, host].into());
    let entry = agent.maps.endpoints.get(&EndpointKey { address });
    entry.map(|entry| entry.identity)
}

#[test]
fn a_global_service_has_backends_of_both_clusters() {
    let agent = synced(&mesh(&[10, 11]));
    let want = ips(&["10.1.1.10", "10.1.1.11", "10.2.1.10", "10.2.1.11"]);
    assert_eq!(agent.maps.view(), [(frontend(), want)].into());
    assert!(agent.state.own().unwrap().applied);
    assert!(agent.remote("c2").is_ready());
    assert_eq!(agent.state.global_services(), 1);
}

#[test]
fn a_changed_slice_changes_only_its_service() {
    let store = mesh(&[10, 11]);
    let mut agent = synced(&store);
    let feed = agent.feeds_of("isthmus/cache/slices/v1/c2/default/web/s")[0].clone();
    let key = "isthmus/cache/slices/v1/c2/default/web/s";
    agent.put(&feed, key, &slice::encode_slice(&a_slice("c2", &[11])));
    let plan = agent.state.drain(100);
    let on_services = |op: &MapOp| !matches!(op, MapOp::IpcachePut(..) | MapOp::IpcacheDelete(_));
    assert!(plan.ops.iter().all(on_services));
    plan.ops.iter().for_each(|op| agent.maps.apply(op));
    assert_eq!(
        agent.maps.view()[&frontend()],
        ips(&["10.1.1.10", "10.1.1.11", "10.2.1.11"])
    );
}

#[test]
fn a_cluster_goes_when_config_and_status_are_gone_and_not_before() {
    let store = mesh(&[10]);
    let mut agent = synced(&store);
    let before = agent.maps.clone();
    agent.delete("cilium/cluster-config/c2");
    agent.drain();
    assert_eq!(agent.maps, before, "the mirror began anew: nothing goes");
    assert!(!agent.remote("c2").is_ready());
    agent.delete("isthmus/status/v1/remotes/c2");
    agent.drain();
    assert_eq!(agent.maps.view()[&frontend()], ips(&["10.1.1.10"]));
    assert!(agent.state.remotes().is_empty());
    assert!(agent.feeds.keys().all(|feed| !feed.contains("/c2/")));
    let mut alone = Store::new();
    publish(&mut alone, "c1", &[10]);
    assert_eq!(agent.maps.ipcache, synced(&alone).maps.ipcache);
}

#[test]
fn refused_objects_change_nothing_and_are_told_of_once() {
    let store = mesh(&[10]);
    let mut agent = synced(&store);
    agent.state.take_notices();
    let before = agent.maps.clone();
    let key = "isthmus/cache/slices/v1/c2/default/web/s";
    let feed = agent.feeds_of(key)[0].clone();
    agent.put(&feed, key, &slice::encode_slice(&a_slice("c1", &[66])));
    agent.put(&feed, key, b"\xff\xff");
    agent.put(&feed, "isthmus/cache/slices/v1/c3/default/web/s", b"");
    agent.drain();
    assert_eq!(agent.maps, before);
    let notices = agent.state.take_notices();
    assert_eq!(notices.len(), 2, "{notices:?}");
    let counted: u64 = agent.state.refusals().counts().map(|(_, _, count)| count).sum();
    assert_eq!(counted, 3);
}

#[test]
fn events_of_a_removed_feed_are_ignored() {
    let store = mesh(&[10]);
    let mut agent = synced(&store);
    let key = "cilium/cache/ip/v1/c2/10.2.1.99";
    let late = agent.feeds_of(key)[0].clone();
    agent.delete("cilium/cluster-config/c2");
    agent.delete("isthmus/status/v1/remotes/c2");
    agent.put(&late, key, &ip::encode(&pod_entry("c2", 99)));
    agent.drain();
    assert!(agent.maps.ipcache.values().all(|value| value.identity >> 16 != 2));
}

#[test]
fn another_form_of_services_is_taken_over_without_a_gap() {
    let mut store = mesh(&[10]);
    let mut agent = synced(&store);
    let before = agent.maps.view();
    // The same service in Cilium's form, of a cluster that no longer announces ours.
    let mut config = ClusterConfig::of_cluster(id("c2"), MAX).mirrored();
    config.isthmus = None;
    store.insert("cilium/cluster-config/c2".into(), config.encode());
    let json = |ip: &str| {
        format!(
            r#"{{"cluster":"c2","namespace":"default","name":"web","frontends":{{"10.96.2.1":{{"":{{"Protocol":"TCP","Port":80}}}}}},
            "backends":{{"{ip}":{{"":{{"Protocol":"TCP","Port":8080}}}}}},"labels":{{}},"selector":{{}},
            "includeExternal":true,"shared":true,"clusterID":2}}"#
        )
    };
    let key = "cilium/cache/services/v1/c2/default/web";
    store.insert(key.into(), json("10.2.1.10").into_bytes());
    let feed = agent.feeds_of("cilium/cluster-config/c2")[0].clone();
    let added = agent.put(&feed, "cilium/cluster-config/c2", &config.encode());
    agent.drain();
    assert_eq!(
        agent.maps.view(),
        before,
        "until the new form is listed the old one counts"
    );
    for feed in added {
        agent.list(&store, &feed);
    }
    agent.drain();
    assert_eq!(agent.maps.view(), before);
    let feed = agent.feeds_of(key)[0].clone();
    agent.put(&feed, key, json("10.2.1.12").as_bytes());
    agent.drain();
    assert_eq!(agent.maps.view()[&frontend()], ips(&["10.1.1.10", "10.2.1.12"]));
    agent.delete(key);
    agent.drain();
    assert_eq!(agent.maps.view()[&frontend()], ips(&["10.1.1.10"]));
}

#[test]
fn endpoints_get_their_identity_when_it_is_known_and_keep_it_over_a_restart() {
    let store = mesh(&[10]);
    let mut agent = Agent::new(Maps::default());
    agent.state.on(Event::Endpoints([an_endpoint(10)].into()));
    agent.drain();
    assert_eq!(identity_in_map(&agent, 10), Some(NumericIdentity::INIT.0));
    agent.list_all(&store, |_| 0);
    agent.drain();
    assert_eq!(identity_in_map(&agent, 10), Some((1 << 16) + 7));
    // The node's own addresses are there too.
    assert_eq!(agent.maps.endpoints.len(), 3);

    let mut restarted = Agent::new(agent.maps.clone());
    restarted.state.on(Event::Endpoints([an_endpoint(10)].into()));
    restarted.drain();
    assert_eq!(restarted.maps.endpoints, agent.maps.endpoints);
    // The endpoint is deleted, and another gets its address: nothing is inherited.
    restarted.state.on(Event::Endpoints([].into()));
    restarted.drain();
    restarted.state.on(Event::Endpoints([an_endpoint(10)].into()));
    restarted.drain();
    assert_eq!(identity_in_map(&restarted, 10), Some(NumericIdentity::INIT.0));
}

#[test]
fn the_own_node_gives_network_and_probe_targets() {
    let agent = synced(&mesh(&[10]));
    let mut agent = agent;
    let node = agent.state.local().node().unwrap().clone().unwrap();
    assert_eq!(node.router_ips, ["10.1.1.1".parse::<IpAddr>().unwrap()]);
    let routes = agent.state.take_routes().unwrap();
    assert_eq!(routes.cidrs, ["10.2.1.0/24".parse().unwrap()].into());
    assert!(routes.complete);
    assert!(agent.state.take_routes().is_none());
    let targets: Vec<_> = agent.state.probe_targets().into_values().collect();
    assert_eq!(targets, ["10.2.1.1".parse::<IpAddr>().unwrap()]);
    // The operator loses the node object: the node works on.
    agent.delete("cilium/state/nodes/v1/c1/n1");
    assert!(agent.state.local().node().unwrap().is_ok());
}

proptest! {
    /// Whatever the order in which feeds are listed, and wherever rounds fall in between: the same maps.
    #[test]
    fn order_of_arrival_does_not_matter(choices in proptest::collection::vec(any::<u16>(), 32), rounds in any::<u32>()) {
        let store = mesh(&[10, 11]);
        let want = synced(&store);
        let mut agent = Agent::new(Maps::default());
        let mut turn = 0;
        let mut open: Vec<Arc<str>> = agent.feeds.keys().cloned().collect();
        while !open.is_empty() {
            let choice = usize::from(choices[turn % choices.len()]);
            let feed = open.swap_remove(choice % open.len());
            open.extend(agent.list(&store, &feed));
            if rounds >> (turn % 32) & 1 == 1 {
                agent.drain();
            }
            turn += 1;
        }
        agent.drain();
        prop_assert_eq!(agent.maps.view(), want.maps.view());
        prop_assert_eq!(&agent.maps.ipcache, &want.maps.ipcache);
        prop_assert_eq!(&agent.maps.endpoints, &want.maps.endpoints);
        prop_assert!(agent.remote("c2").is_ready());
    }

    /// A restarted agent finds maps of an older content, lists in any order, and stops at any moment. Nothing that is
    /// still true ever leaves the maps; in the end what is no longer true is gone.
    #[test]
    fn a_restart_never_loses_what_is_still_true(
        choices in proptest::collection::vec(any::<u16>(), 32),
        before in proptest::collection::btree_set(10u8..16, 1..5),
        after in proptest::collection::btree_set(10u8..16, 1..5),
    ) {
        let before: Vec<u8> = before.into_iter().collect();
        let after: Vec<u8> = after.into_iter().collect();
        let old = synced(&mesh(&before));
        let store = mesh(&after);
        let want = synced(&store);
        let mut agent = Agent::new(old.maps.clone());
        let mut turn = 0;
        let stays = |agent: &Agent| {
            let view = agent.maps.view();
            let kept: BTreeSet<IpAddr> = old.maps.view()[&frontend()]
                .intersection(&want.maps.view()[&frontend()])
                .copied()
                .collect();
            let services = view.get(&frontend()).is_some_and(|now| now.is_superset(&kept));
            let entries = old.maps.ipcache.iter().filter(|(key, _)| want.maps.ipcache.contains_key(key));
            services && entries.clone().all(|(key, _)| agent.maps.ipcache.contains_key(key))
        };
        agent.drain();
        prop_assert_eq!(&agent.maps.view(), &old.maps.view(), "nothing is known, so nothing changes");
        let mut open: Vec<Arc<str>> = agent.feeds.keys().cloned().collect();
        while !open.is_empty() {
            let feed = open.swap_remove(usize::from(choices[turn % choices.len()]) % open.len());
            open.extend(agent.list(&store, &feed));
            agent.drain();
            prop_assert!(stays(&agent));
            turn += 1;
        }
        prop_assert_eq!(agent.maps.view(), want.maps.view());
        prop_assert_eq!(agent.maps.ipcache.clone(), want.maps.ipcache);
        prop_assert!(agent.state.audit(&agent.maps.dump()).is_empty());
    }
}
