//! What an operator and a mirror would have written, put into etcd directly.

use std::net::IpAddr;

use isthmus_model::{
    Affinity, ClusterId, ClusterName, MaxConnectedClusters, Node, NumericIdentity, Protocol, ServiceFrame,
    ServiceName, ServicePort, ServiceType, SessionAffinity, Slice, SliceEndpoint, SlicePort,
};
use isthmus_wire::{
    ClusterConfig,
    keys::{self, Kind, Scope},
    node, slice,
    status::RemoteStatus,
};

use crate::lab::Lab;

const MAX: MaxConnectedClusters = MaxConnectedClusters::C255;

pub fn name(cluster: &str) -> ClusterName {
    ClusterName::new(cluster).unwrap()
}

pub fn id(cluster: &str) -> ClusterId {
    ClusterId::new(cluster[1..].parse().unwrap(), MAX).unwrap()
}

fn scope(cluster: &str, kind: Kind) -> Scope {
    match (cluster, kind) {
        ("c1", Kind::Frames | Kind::Slices) => Scope::Local,
        ("c1", _) => Scope::State,
        _ => Scope::Cache,
    }
}

pub fn put(lab: &Lab, cluster: &str, kind: Kind, suffix: &str, value: &[u8]) {
    let prefix = kind.prefix(scope(cluster, kind), &name(cluster)).unwrap();
    lab.put(&format!("{prefix}{suffix}"), value);
}

/// A node.
pub fn node(lab: &Lab, cluster: &str, number: u8) {
    let c = id(cluster).get() as u8;
    // Node 1 of cluster 1 is 172.18.0.1, node 2 is 172.18.0.2, node 1 of cluster 2 is 172.18.0.11.
    let host = number + 10 * (c - 1);
    let object = Node {
        name: format!("n{number}"),
        cluster: name(cluster),
        cluster_id: id(cluster),
        internal_ips: vec![[172, 18, 0, host].into()],
        external_ips: vec![],
        router_ips: vec![[10, c, number, 1].into()],
        ipv4_alloc_cidr: Some(format!("10.{c}.{number}.0/24").parse().unwrap()),
        ipv6_alloc_cidr: None,
        ipv4_health_ip: None,
        ipv6_health_ip: None,
        encryption_key: 0,
        labels: Default::default(),
        annotations: Default::default(),
        identity: NumericIdentity::REMOTE_NODE,
        wireguard_public_key: String::new(),
        boot_id: String::new(),
    };
    put(lab, cluster, Kind::Nodes, &object.name, &node::encode(&object));
}

/// A cluster with node n1 and the service default/web, and every canary.
pub fn cluster(lab: &Lab, cluster: &str) {
    let c = id(cluster).get() as u8;
    node(lab, cluster, 1);
    let frame = ServiceFrame {
        cluster: name(cluster),
        cluster_id: id(cluster),
        name: ServiceName::new("default", "web").unwrap(),
        service_type: ServiceType::ClusterIp,
        cluster_ips: vec![[10, 96, c, 1].into()],
        external_ips: vec![],
        ports: vec![ServicePort {
            name: "".into(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: 0,
        }],
        global: true,
        shared: true,
        affinity: Affinity::Local,
        session_affinity: SessionAffinity::None,
        traffic: Default::default(),
        labels: Default::default(),
        selector: Default::default(),
    };
    put(
        lab,
        cluster,
        Kind::Frames,
        "default/web",
        &slice::encode_frame(&frame),
    );
    for kind in Kind::ALL {
        lab.put(
            &keys::canary(&name(cluster), kind, scope(cluster, kind)).unwrap_or_default(),
            b"now",
        );
    }
    let config = ClusterConfig::of_cluster(id(cluster), MAX);
    if cluster != "c1" {
        let status = RemoteStatus {
            name: cluster.into(),
            connected: true,
            ready: true,
            cluster_id: c.into(),
            slices: true,
            ..RemoteStatus::default()
        };
        lab.put(&format!("{}{cluster}", keys::REMOTE_STATUS), &status.encode());
    }
    lab.put(keys::HEARTBEAT, b"now");
    lab.put(&keys::cluster_config(&name(cluster)), &config.encode());
}

/// The only slice of default/web.
pub fn slice(lab: &Lab, cluster: &str, ips: &[&str]) {
    let object = Slice {
        cluster: name(cluster),
        cluster_id: id(cluster),
        service: ServiceName::new("default", "web").unwrap(),
        slice: "s".into(),
        ports: vec![SlicePort {
            name: "".into(),
            protocol: Protocol::Tcp,
            port: 8080,
        }],
        endpoints: ips
            .iter()
            .map(|ip| SliceEndpoint::ready(ip.parse::<IpAddr>().unwrap()))
            .collect(),
    };
    put(
        lab,
        cluster,
        Kind::Slices,
        "default/web/s",
        &slice::encode_slice(&object),
    );
}
