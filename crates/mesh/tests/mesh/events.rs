//! Events, how to generate them, and how they act on the merge and on the tables of the naive model.

use std::net::IpAddr;

use isthmus_mesh::{LoadBalancer, MaglevConfig, Source, SourceTable};
use isthmus_model::{
    Affinity, Algorithm, ClusterId, ClusterName, MaxConnectedClusters, MinHealthy, Preference, Protocol,
    ServiceFrame, ServiceName, ServicePort, ServiceType, SessionAffinity, Slice, SliceEndpoint, SlicePort,
    Traffic, TrafficPolicy,
};
use proptest::{collection::vec, prelude::*, sample::subsequence};

use crate::{
    maps::TABLE_SIZE,
    naive::{LOCAL, Tables, ip},
};

pub fn cluster(id: u16) -> ClusterId {
    ClusterId::new(id.into(), MaxConnectedClusters::C255).unwrap()
}

pub fn cluster_name(id: u16) -> ClusterName {
    ClusterName::new(&format!("c{id}")).unwrap()
}

pub fn service(number: u8) -> ServiceName {
    ServiceName::new("shop", &format!("s{number}")).unwrap()
}

/// The node that the merge of the tests is on.
pub const NODE: &str = "n3";

/// A merge on a node, with small Maglev tables.
pub fn new_merge() -> LoadBalancer {
    let maglev = MaglevConfig {
        table_size: TABLE_SIZE,
        ..MaglevConfig::default()
    };
    LoadBalancer::on_node(cluster(LOCAL), NODE, maglev)
}

pub fn service_port(name: &str, protocol: Protocol, port: u16) -> ServicePort {
    ServicePort {
        name: name.into(),
        protocol,
        port,
        node_port: 0,
    }
}

pub fn slice_port(name: &str, protocol: Protocol, port: u16) -> SlicePort {
    SlicePort {
        name: name.into(),
        protocol,
        port,
    }
}

/// A frame of service 0 with one frontend, 10.96.0.1:80 `http`.
pub fn frame(of: u16) -> ServiceFrame {
    ServiceFrame {
        cluster: cluster_name(of),
        cluster_id: cluster(of),
        name: service(0),
        service_type: ServiceType::ClusterIp,
        cluster_ips: vec![ip("10.96.0.1")],
        external_ips: vec![],
        ports: vec![service_port("http", Protocol::Tcp, 80)],
        global: true,
        shared: true,
        affinity: Affinity::None,
        session_affinity: SessionAffinity::None,
        traffic: Default::default(),
        labels: Default::default(),
        selector: Default::default(),
    }
}

/// A slice of service 0 with port 8080 `http`.
pub fn slice(of: u16, name: &str, endpoints: Vec<SliceEndpoint>) -> Slice {
    Slice {
        cluster: cluster_name(of),
        cluster_id: cluster(of),
        service: service(0),
        slice: name.into(),
        ports: vec![slice_port("http", Protocol::Tcp, 8080)],
        endpoints,
    }
}

#[derive(Clone, Debug)]
pub enum Event {
    Frame(ServiceFrame),
    DeleteFrame(u16, u8),
    Slice(Slice),
    DeleteSlice(u16, u8, u8),
    ClusterRemoved(u16),
    Health(u16, bool),
    /// This node's addresses and zone.
    Node(Vec<IpAddr>, String),
    Drain,
}

impl Event {
    pub fn act(&self, merge: &mut LoadBalancer, tables: &mut Tables) {
        match self {
            Self::Frame(frame) => {
                merge.upsert_frame(frame);
                tables
                    .frames
                    .insert((frame.cluster_id.get(), frame.name.clone()), frame.clone());
            }
            Self::DeleteFrame(of, number) => {
                merge.delete_frame(cluster(*of), &service(*number));
                tables.frames.remove(&(*of, service(*number)));
            }
            Self::Slice(slice) => {
                merge.upsert_slice(slice);
                let key = (
                    slice.cluster_id.get(),
                    slice.service.clone(),
                    slice.slice.to_string(),
                );
                tables.slices.insert(key, slice.clone());
            }
            Self::DeleteSlice(of, number, name) => {
                let name = format!("e{name}");
                merge.delete_slice(cluster(*of), &service(*number), &name);
                tables.slices.remove(&(*of, service(*number), name));
            }
            Self::ClusterRemoved(of) => {
                merge.cluster_removed(cluster(*of));
                if *of != LOCAL {
                    tables.frames.retain(|(cluster, _), _| cluster != of);
                    tables.slices.retain(|(cluster, ..), _| cluster != of);
                    tables.unhealthy.remove(of);
                }
            }
            Self::Health(of, healthy) => {
                merge.set_cluster_health(cluster(*of), *healthy);
                if *healthy {
                    tables.unhealthy.remove(of);
                } else if *of != LOCAL {
                    tables.unhealthy.insert(*of);
                }
            }
            Self::Node(addresses, zone) => {
                merge.set_node_addresses(addresses.iter().copied());
                merge.set_zone(zone);
                tables.node_addresses = addresses.clone();
                tables.zone = zone.clone();
            }
            Self::Drain => {}
        }
    }
}

pub fn sync(merge: &mut LoadBalancer, of: u16) {
    for table in [SourceTable::Frames, SourceTable::Slices] {
        merge.source_synced(Source {
            cluster: cluster(of),
            table,
        });
    }
}

fn some_cluster() -> impl Strategy<Value = u16> {
    1u16..=3
}

fn some_service() -> impl Strategy<Value = u8> {
    0u8..3
}

prop_compose! {
    pub fn some_endpoint()(
        host in 1u8..8,
        v6 in proptest::bool::weighted(0.2),
        // Mostly healthy, or nothing else would ever be seen.
        ready in proptest::bool::weighted(0.7),
        serving in any::<bool>(),
        terminating in proptest::bool::weighted(0.2),
        weight in prop_oneof![1 => Just(0u16), 6 => Just(1), 1 => Just(9)],
        zone in 0u8..3,
        hints in prop_oneof![3 => Just(vec![]), 1 => subsequence(vec!["a", "b"], 1..=2)],
    ) -> SliceEndpoint {
        let address: IpAddr = if v6 { format!("fd00::{host}").parse().unwrap() } else { IpAddr::from([10, 1, 0, host]) };
        SliceEndpoint {
            ready, serving, terminating, weight,
            zone: ["", "a", "b"][usize::from(zone)].into(),
            node: format!("n{host}").into(),
            zone_hints: hints.into_iter().map(Into::into).collect(),
            ..SliceEndpoint::ready(address)
        }
    }
}

fn some_policy() -> impl Strategy<Value = TrafficPolicy> {
    prop_oneof![3 => Just(TrafficPolicy::Cluster), 1 => Just(TrafficPolicy::Local)]
}

fn some_tiers() -> impl Strategy<Value = &'static str> {
    prop_oneof![
        4 => Just(""),
        1 => Just("local"),
        1 => Just("local,c2,*"),
        1 => Just("c3|local,c2"),
        1 => Just("*,local"),
        1 => Just("c2,c3,nowhere"),
    ]
}

prop_compose! {
    pub fn some_preference()(
        tiers in some_tiers(),
        min_healthy in prop_oneof![
            2 => Just(MinHealthy::Count(1)),
            1 => (2u16..5).prop_map(MinHealthy::Count),
            1 => (1u8..=100).prop_map(MinHealthy::Percent),
        ],
        spill_over in proptest::bool::weighted(0.7),
    ) -> Preference {
        Preference { tiers: tiers.parse().unwrap(), min_healthy, spill_over, slow_start_seconds: 0 }
    }
}

prop_compose! {
    fn some_traffic()(
        preference in some_preference(),
        internal_policy in some_policy(),
        external_policy in some_policy(),
        algorithm in prop_oneof![2 => Just(Algorithm::Unspecified), 1 => Just(Algorithm::Maglev)],
        source_ranges in subsequence(vec!["198.51.100.0/24", "0.0.0.0/0", "2001:db8::/32"], 0..=2),
    ) -> Traffic {
        Traffic {
            preference, internal_policy, external_policy, algorithm,
            load_balancer_ips: vec![ip("203.0.113.1")],
            source_ranges: source_ranges.into_iter().map(|range| range.parse().unwrap()).collect(),
        }
    }
}

prop_compose! {
    pub fn some_frame()(
        of in some_cluster(),
        number in some_service(),
        ips in subsequence(vec!["10.96.0.1", "10.96.0.2", "10.96.0.3", "fd00:96::1"], 0..=3),
        ports in subsequence(vec![
            service_port("http", Protocol::Tcp, 80),
            service_port("", Protocol::Tcp, 81),
            service_port("dns", Protocol::Udp, 53),
            service_port("alt", Protocol::Tcp, 80),
            service_port("sctp", Protocol::Sctp, 80),
        ], 0..=5),
        global in proptest::bool::weighted(0.8),
        shared in proptest::bool::weighted(0.8),
        affinity in prop_oneof![Just(Affinity::None), Just(Affinity::Local), Just(Affinity::Remote)],
        // One address is a cluster IP of others.
        external_ips in subsequence(vec!["203.0.113.1", "203.0.113.2", "10.96.0.1"], 0..=2),
        node_port in prop_oneof![3 => Just(0u16), 1 => 30_000u16..30_002],
        session_affinity in prop_oneof![
            3 => Just(SessionAffinity::None), 1 => (1u32..3).prop_map(|timeout_seconds| SessionAffinity::ClientIp { timeout_seconds }),
        ],
        traffic in prop_oneof![1 => Just(Traffic::default()), 2 => some_traffic()],
    ) -> ServiceFrame {
        let mut ports = ports;
        ports.iter_mut().filter(|port| *port.name == *"http").for_each(|port| port.node_port = node_port);
        ServiceFrame {
            external_ips: external_ips.into_iter().map(ip).collect(),
            session_affinity, traffic,
            name: service(number),
            cluster_ips: ips.into_iter().map(ip).collect(),
            ports, global,
            shared: global && shared,
            affinity: if global { affinity } else { Affinity::None },
            ..frame(of)
        }
    }
}

prop_compose! {
    pub fn some_slice()(
        of in some_cluster(),
        number in some_service(),
        name in 0u8..3,
        ports in subsequence(vec![
            slice_port("http", Protocol::Tcp, 8080),
            slice_port("", Protocol::Tcp, 8081),
            slice_port("dns", Protocol::Udp, 5353),
            slice_port("alt", Protocol::Tcp, 8080),
        ], 1..=4),
        other_port in proptest::bool::weighted(0.2),
        endpoints in vec(some_endpoint(), 0..7),
    ) -> Slice {
        let mut ports = ports;
        if other_port {
            ports[0].port += 1;
        }
        Slice { service: service(number), ports, ..slice(of, &format!("e{name}"), endpoints) }
    }
}

pub fn some_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => some_frame().prop_map(Event::Frame),
        1 => (some_cluster(), some_service()).prop_map(|(of, number)| Event::DeleteFrame(of, number)),
        8 => some_slice().prop_map(Event::Slice),
        1 => (some_cluster(), some_service(), 0u8..3).prop_map(|(of, number, name)| Event::DeleteSlice(of, number, name)),
        1 => (2u16..=3).prop_map(Event::ClusterRemoved),
        1 => (some_cluster(), any::<bool>()).prop_map(|(of, healthy)| Event::Health(of, healthy)),
        1 => (subsequence(vec![ip("192.0.2.1"), ip("192.0.2.2"), ip("2001:db8::1")], 0..=3), 0usize..3)
            .prop_map(|(addresses, zone)| Event::Node(addresses, ["", "a", "b"][zone].to_owned())),
        4 => Just(Event::Drain),
    ]
}

pub fn some_events(len: usize) -> impl Strategy<Value = Vec<Event>> {
    vec(some_event(), 0..len)
}
