//! Services for benchmarks of the datapath: number n has a cluster IP of its own and a few backends.
//!
//! In: how many backends, and which services somebody really answers for. Out: the same services for our merge (frames and
//! slices) and for kube-proxy's rules.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddrV4},
};

use anyhow::Result;
use isthmus_model::{
    Affinity, ClusterId, ClusterName, MaxConnectedClusters, Protocol, ServiceFrame, ServiceName, ServicePort,
    ServiceType, SessionAffinity, Slice, SliceEndpoint, SlicePort,
};

/// Where all cluster IPs are.
pub const CLUSTER_IPS: &str = "172.30.0.0/16";
/// Where all pods are.
pub const PODS: &str = "10.0.0.0/8";
/// Port of the cluster IPs.
pub const PORT: u16 = 80;
/// Addresses of backends that do not exist.
const ABSENT: u32 = 0x0a80_0000;
/// A service's own share of them: backends it may have.
const STRIDE: u32 = 16;
const CLUSTER: &str = "bench";

/// Many services.
#[derive(Clone, Debug)]
pub struct Services {
    /// Backends of each, at most 16.
    pub backends: usize,
    /// Where backends of services in `real` are.
    pub servers: Vec<Ipv4Addr>,
    /// Port of all backends.
    pub target_port: u16,
    /// Services with backends that answer.
    pub real: BTreeSet<u32>,
}

impl Services {
    /// Services without backends that answer.
    pub fn absent(backends: usize) -> Self {
        Self {
            backends,
            servers: vec![],
            target_port: 8080,
            real: BTreeSet::new(),
        }
    }

    /// Where service `number` is asked.
    pub fn frontend(number: u32) -> SocketAddrV4 {
        let base = u32::from(Ipv4Addr::new(172, 30, 0, 1));
        SocketAddrV4::new(Ipv4Addr::from(base + number), PORT)
    }

    /// Backends of service `number`.
    pub fn targets(&self, number: u32) -> Vec<SocketAddrV4> {
        let address = |at: usize| match self.real.contains(&number) {
            true => self.servers[at % self.servers.len()],
            false => Ipv4Addr::from(ABSENT + number * STRIDE + at as u32),
        };
        (0..self.backends)
            .map(|at| SocketAddrV4::new(address(at), self.target_port))
            .collect()
    }

    /// Its name, without namespace.
    pub fn name(number: u32) -> String {
        format!("service-{number}")
    }

    /// Its frame.
    pub fn frame(number: u32) -> Result<ServiceFrame> {
        Ok(ServiceFrame {
            cluster: ClusterName::new(CLUSTER)?,
            cluster_id: cluster()?,
            name: ServiceName::new("bench", &Self::name(number))?,
            service_type: ServiceType::ClusterIp,
            cluster_ips: vec![IpAddr::V4(*Self::frontend(number).ip())],
            external_ips: vec![],
            ports: vec![ServicePort {
                name: "p80".into(),
                protocol: Protocol::Tcp,
                port: PORT,
                node_port: 0,
            }],
            global: false,
            shared: false,
            affinity: Affinity::None,
            session_affinity: SessionAffinity::None,
            traffic: Default::default(),
            labels: BTreeMap::new(),
            selector: BTreeMap::new(),
        })
    }

    /// Its slice.
    pub fn slice(&self, number: u32) -> Result<Slice> {
        let endpoints = self.targets(number).into_iter();
        Ok(Slice {
            cluster: ClusterName::new(CLUSTER)?,
            cluster_id: cluster()?,
            service: ServiceName::new("bench", &Self::name(number))?,
            slice: format!("{}-x", Self::name(number)).into(),
            ports: vec![SlicePort {
                name: "p80".into(),
                protocol: Protocol::Tcp,
                port: self.target_port,
            }],
            endpoints: endpoints
                .map(|target| SliceEndpoint::ready(IpAddr::V4(*target.ip())))
                .collect(),
        })
    }
}

/// The cluster that has them.
pub fn cluster() -> Result<ClusterId> {
    Ok(ClusterId::new(1, MaxConnectedClusters::C255)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_each_services_own_within_their_range() {
        let services = Services {
            servers: vec![Ipv4Addr::new(10, 1, 0, 32)],
            real: BTreeSet::from([7]),
            ..Services::absent(5)
        };
        assert_eq!(Services::frontend(0).to_string(), "172.30.0.1:80");
        assert_eq!(Services::frontend(49_999).to_string(), "172.30.195.80:80");
        assert_eq!(services.targets(1)[4].to_string(), "10.128.0.20:8080");
        assert_eq!(services.targets(2)[0].to_string(), "10.128.0.32:8080");
        assert_eq!(services.targets(7), ["10.1.0.32:8080".parse().unwrap(); 5]);
        assert_eq!(services.slice(3).unwrap().endpoints.len(), 5);
    }
}
