//! Services and the endpoints behind them, as one cluster publishes them.
//!
//! A service is a [`ServiceFrame`] and any number of [`Slice`]s, so that a changed endpoint moves one slice and not the whole.
//! The rules of the annotations are Cilium's: `shared` defaults to true for a global service and is ignored otherwise.

use std::{collections::BTreeMap, fmt, net::IpAddr, str::FromStr};

use crate::{ClusterId, ClusterName, Traffic};

/// Namespace and name: the same pair means the same service in every cluster.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ServiceName {
    /// Kubernetes namespace.
    pub namespace: Box<str>,
    /// Kubernetes name.
    pub name: Box<str>,
}

/// A text that cannot be a service's namespace and name.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{0:?} is no namespace/name: both parts are 1 to 253 characters of a-z, 0-9, '-' and '.'")]
pub struct ServiceNameError(String);

impl ServiceName {
    /// Checks both parts.
    pub fn new(namespace: &str, name: &str) -> Result<Self, ServiceNameError> {
        let valid = |part: &str| {
            (1..=253).contains(&part.len())
                && part
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.')
                && part != "."
                && part != ".."
        };
        if valid(namespace) && valid(name) {
            Ok(Self {
                namespace: namespace.into(),
                name: name.into(),
            })
        } else {
            Err(ServiceNameError(
                format!("{namespace}/{name}").chars().take(128).collect(),
            ))
        }
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl FromStr for ServiceName {
    type Err = ServiceNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (namespace, name) = text
            .split_once('/')
            .ok_or_else(|| ServiceNameError(text.chars().take(128).collect()))?;
        Self::new(namespace, name)
    }
}

/// Transport protocol.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
    /// Any of them (only in Cilium's port maps).
    Any,
}

impl Protocol {
    /// Upper-case name, as Kubernetes and Cilium write it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
            Self::Any => "ANY",
        }
    }

    /// IP protocol number; 0 for any.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
            Self::Any => 0,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_str().fmt(f)
    }
}

/// A protocol name that is not known.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("protocol {0:?} is not one of TCP, UDP, SCTP, ANY")]
pub struct ProtocolError(String);

impl FromStr for Protocol {
    type Err = ProtocolError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        [Self::Tcp, Self::Udp, Self::Sctp, Self::Any]
            .into_iter()
            .find(|protocol| protocol.as_str().eq_ignore_ascii_case(text))
            .ok_or_else(|| ProtocolError(text.chars().take(32).collect()))
    }
}

/// Which clusters' backends a global service prefers; the local cluster's own choice.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Affinity {
    /// All alike.
    #[default]
    None,
    /// Own ones while at least one is active and healthy.
    Local,
    /// Others' while at least one is healthy.
    Remote,
}

impl Affinity {
    /// The annotation's value.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Local => "local",
            Self::Remote => "remote",
        }
    }
}

/// Kubernetes service type.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum ServiceType {
    /// Cluster IP only.
    #[default]
    ClusterIp,
    /// Also a port on each node.
    NodePort,
    /// Also an external load balancer's address.
    LoadBalancer,
    /// No cluster IP; not part of BPF load balancing.
    Headless,
    /// A DNS alias; not part of BPF load balancing.
    ExternalName,
}

/// Kubernetes session affinity.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum SessionAffinity {
    /// Each connection picks anew.
    #[default]
    None,
    /// A client keeps its backend for so many seconds.
    ClientIp {
        /// Seconds since the last use.
        timeout_seconds: u32,
    },
}

/// One port of a service.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ServicePort {
    /// Name; empty if unnamed. Backends' ports match by name and protocol.
    pub name: Box<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// Frontend port, host order.
    pub port: u16,
    /// Port on each node, 0 if none.
    pub node_port: u16,
}

/// A service without its endpoints.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ServiceFrame {
    /// Cluster that publishes it.
    pub cluster: ClusterName,
    /// The ID of that cluster.
    pub cluster_id: ClusterId,
    /// Namespace and name.
    pub name: ServiceName,
    /// Type.
    pub service_type: ServiceType,
    /// Cluster IPs in that cluster.
    pub cluster_ips: Vec<IpAddr>,
    /// External IPs and load balancer addresses in that cluster.
    pub external_ips: Vec<IpAddr>,
    /// Ports.
    pub ports: Vec<ServicePort>,
    /// Global in its own cluster: uses other clusters' backends.
    pub global: bool,
    /// Its backends may be used by others. False unless global.
    pub shared: bool,
    /// Preference of its own cluster. `None` unless global.
    pub affinity: Affinity,
    /// Session affinity.
    pub session_affinity: SessionAffinity,
    /// How traffic is spread, and who may send it.
    pub traffic: Traffic,
    /// The Service's labels.
    pub labels: BTreeMap<String, String>,
    /// The Service's selector.
    pub selector: BTreeMap<String, String>,
}

/// A port of a slice: its endpoints all listen on it.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct SlicePort {
    /// Name; empty if unnamed.
    pub name: Box<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// Port of the backend, host order.
    pub port: u16,
}

/// One endpoint of a slice.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct SliceEndpoint {
    /// Address.
    pub ip: IpAddr,
    /// Takes new connections.
    pub ready: bool,
    /// Still answers (also while terminating).
    pub serving: bool,
    /// Is being deleted.
    pub terminating: bool,
    /// Node that hosts it, empty if unknown.
    pub node: Box<str>,
    /// Zone, empty if unknown.
    pub zone: Box<str>,
    /// Zones whose clients it should serve (topology-aware hints); none if there is no hint.
    pub zone_hints: Vec<Box<str>>,
    /// Stable host name, empty if none.
    pub hostname: Box<str>,
    /// Weight; 0 takes it out of rotation. 1 by default.
    pub weight: u16,
}

impl SliceEndpoint {
    /// A ready endpoint and nothing more.
    pub fn ready(ip: IpAddr) -> Self {
        Self {
            ip,
            ready: true,
            serving: true,
            terminating: false,
            node: "".into(),
            zone: "".into(),
            zone_hints: Vec::new(),
            hostname: "".into(),
            weight: 1,
        }
    }
}

/// A part of a service's endpoints in one cluster; at most [`Slice::MAX_ENDPOINTS`] when we write it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Slice {
    /// Cluster that publishes it.
    pub cluster: ClusterName,
    /// The ID of that cluster.
    pub cluster_id: ClusterId,
    /// Service it belongs to.
    pub service: ServiceName,
    /// Its own name, unique within the service and stable.
    pub slice: Box<str>,
    /// Ports of all its endpoints.
    pub ports: Vec<SlicePort>,
    /// Endpoints.
    pub endpoints: Vec<SliceEndpoint>,
}

impl Slice {
    /// Most endpoints in a slice that we write.
    pub const MAX_ENDPOINTS: usize = 100;
}
