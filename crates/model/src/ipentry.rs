//! What an address means: its identity, and the node that hosts it.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::{NumericIdentity, Protocol};

/// One address or prefix with the identity of what is behind it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct IpEntry {
    /// Single address (full prefix length) or CIDR. Host bits are zero.
    pub prefix: IpNet,
    /// Node that hosts it: the tunnel endpoint.
    pub host_ip: Option<IpAddr>,
    /// Identity of the workload behind it.
    pub identity: NumericIdentity,
    /// Encryption key index; 0 = do not encrypt, 255 = WireGuard.
    pub encryption_key: u8,
    /// Kubernetes namespace, empty if unknown.
    pub namespace: String,
    /// Pod name, empty if unknown.
    pub pod_name: String,
    /// Service account, empty if unknown.
    pub service_account: String,
    /// The pod's named ports, by name.
    pub named_ports: Vec<NamedPort>,
}

/// A port that a pod gives a name.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct NamedPort {
    /// Name, as in the container's port list.
    pub name: String,
    /// Number, host order.
    pub port: u16,
    /// Protocol.
    pub protocol: Protocol,
}
