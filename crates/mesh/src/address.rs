//! Addresses between the standard library's form and the maps' 16 bytes.

use std::net::{IpAddr, Ipv6Addr};

use isthmus_bpf_abi::{Address, ipv4_mapped, is_ipv4_mapped};

/// Address family of a frontend and of the backends it may use.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Family of an address in the maps' form.
    pub const fn of(address: &Address) -> Self {
        if is_ipv4_mapped(address) {
            Self::V4
        } else {
            Self::V6
        }
    }
}

/// The maps' form: IPv4 becomes `::ffff:a.b.c.d`.
pub const fn to_address(ip: IpAddr) -> Address {
    match ip {
        IpAddr::V4(ip) => ipv4_mapped(ip.octets()),
        IpAddr::V6(ip) => ip.octets(),
    }
}

/// The standard library's form: IPv4-mapped addresses become IPv4.
pub const fn to_ip(address: &Address) -> IpAddr {
    Ipv6Addr::from_octets(*address).to_canonical()
}
