//! What commands show: one module per kind, from the agent's messages or the maps' entries to text.
//!
//! All pure. Each has a struct that is the stable JSON form, made from what was read, and `render`.

pub mod clustermesh;
pub mod endpoint;
pub mod ipcache;
pub mod lb;
pub mod metrics;
pub mod service;
pub mod status;
pub mod table;
pub mod troubleshoot;
pub mod version;

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use isthmus_bpf_abi::{Address, PROTO_SCTP, PROTO_TCP, PROTO_UDP, ipv4_of, is_ipv4_mapped};

/// An address of the maps; nothing if it is all zero.
fn ip(address: &Address) -> Option<IpAddr> {
    if *address == [0; 16] {
        None
    } else if is_ipv4_mapped(address) {
        Some(IpAddr::from(ipv4_of(address)))
    } else {
        Some(IpAddr::V6(Ipv6Addr::from(*address)))
    }
}

/// `address:port` of the maps, IPv6 in brackets.
fn socket_address(address: &Address, port: [u8; 2]) -> String {
    let ip = ip(address).unwrap_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED));
    SocketAddr::new(ip, u16::from_be_bytes(port)).to_string()
}

/// A protocol's name, or its number.
fn protocol(number: u8) -> String {
    match number {
        PROTO_TCP => "TCP".into(),
        PROTO_UDP => "UDP".into(),
        PROTO_SCTP => "SCTP".into(),
        0 => "ANY".into(),
        other => other.to_string(),
    }
}

/// A MAC address's text; empty if it is all zero.
fn mac(bytes: &[u8; 6]) -> String {
    if *bytes == [0; 6] {
        return String::new();
    }
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}
