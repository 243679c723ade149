//! Events, how to generate them, and how they act on the merge and on the tables of the naive model.

use std::net::IpAddr;

use isthmus_mesh::{LoadBalancer, Source, SourceTable};
use isthmus_model::{
    Affinity, ClusterId, ClusterName, MaxConnectedClusters, Protocol, ServiceFrame, ServiceName, ServicePort,
    ServiceType, SessionAffinity, Slice, SliceEndpoint, SlicePort,
};
use proptest::{collection::vec, prelude::*, sample::subsequence};

use crate::naive::{LOCAL, Tables, ip};

pub fn cluster(id: u16) -> ClusterId {
    ClusterId::new(id.into(), MaxConnectedClusters::C255).unwrap()
}

pub fn cluster_name(id: u16) -> ClusterName {
    ClusterName::new(&format!("c{id}")).unwrap()
}

pub fn service(number: u8) -> ServiceName {
    ServiceName::new("shop", &format!("s{number}")).unwrap()
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
    ) -> SliceEndpoint {
        let address: IpAddr = if v6 { format!("fd00::{host}").parse().unwrap() } else { IpAddr::from([10, 1, 0, host]) };
        SliceEndpoint {
            ready, serving, terminating, weight,
            zone: ["", "a", "b"][usize::from(zone)].into(),
            node: format!("n{host}").into(),
            ..SliceEndpoint::ready(address)
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
    ) -> ServiceFrame {
        ServiceFrame {
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
        4 => Just(Event::Drain),
    ]
}

pub fn some_events(len: usize) -> impl Strategy<Value = Vec<Event>> {
    vec(some_event(), 0..len)
}
