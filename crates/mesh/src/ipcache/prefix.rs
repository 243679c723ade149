//! A prefix in 17 bytes, and its two other forms.

use std::net::IpAddr;

use ipnet::IpNet;
use isthmus_bpf_abi::{Address, FAMILY_IPV4, IpcacheKey, ipv4_mapped, ipv4_of, is_ipv4_mapped};

use crate::address::{to_address, to_ip};

/// An address in the maps' form with zero host bits, and the length within its family.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) struct Prefix {
    address: Address,
    bits: u8,
}

impl Prefix {
    pub(super) fn of_ip(ip: IpAddr) -> Self {
        let address = to_address(ip);
        let bits = if is_ipv4_mapped(&address) { 32 } else { 128 };
        Self { address, bits }
    }

    pub(super) fn of_net(net: IpNet) -> Self {
        let address = to_address(net.network());
        match net {
            // IPv4 written as IPv6 is IPv4.
            IpNet::V6(_) if is_ipv4_mapped(&address) && net.prefix_len() >= 96 => Self {
                address,
                bits: net.prefix_len() - 96,
            },
            _ => Self {
                address,
                bits: net.prefix_len(),
            },
        }
    }

    pub(super) fn of_key(key: &IpcacheKey) -> Option<Self> {
        let bits = key.address_bits()?;
        if key.cluster_id != 0 || key.pad != 0 {
            return None;
        }
        let address = if key.family == FAMILY_IPV4 {
            let [a, b, c, d, rest @ ..] = key.address;
            if rest != [0; 12] {
                return None;
            }
            ipv4_mapped([a, b, c, d])
        } else {
            key.address
        };
        let prefix = Self { address, bits };
        // Host bits, or IPv4 in an IPv6 key: not ours.
        (prefix.to_key() == *key && Self::of_net(prefix.to_net()) == prefix).then_some(prefix)
    }

    pub(super) fn to_key(self) -> IpcacheKey {
        if self.is_v4() {
            IpcacheKey::ipv4(ipv4_of(&self.address), self.bits)
        } else {
            IpcacheKey::ipv6(self.address, self.bits)
        }
    }

    pub(super) fn to_net(self) -> IpNet {
        let ip = if self.is_v4() {
            to_ip(&self.address)
        } else {
            IpAddr::from(self.address)
        };
        IpNet::new_assert(ip, self.bits)
    }

    /// `::ffff:0:0/x` with x above 32 cannot be made from a valid prefix: host bits would not be zero or it is IPv4.
    fn is_v4(self) -> bool {
        is_ipv4_mapped(&self.address) && self.bits <= 32
    }
}
