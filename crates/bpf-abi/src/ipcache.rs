//! The ipcache: from an address, by longest prefix, to its security identity and the node to tunnel to.
//! The key's form is Cilium's (24 bytes, 32 static bits before the address).

use crate::Address;

/// [`IpcacheKey::family`] of IPv4.
pub const FAMILY_IPV4: u8 = 1;
/// [`IpcacheKey::family`] of IPv6.
pub const FAMILY_IPV6: u8 = 2;
/// Bits between the prefix length and the address (cluster ID, padding, family): always part of the prefix.
pub const IPCACHE_STATIC_BITS: u32 = 32;
/// Prefix length of one IPv4 address.
pub const IPCACHE_V4_BITS_MAX: u32 = IPCACHE_STATIC_BITS + 32;
/// Prefix length of one IPv6 address.
pub const IPCACHE_V6_BITS_MAX: u32 = IPCACHE_STATIC_BITS + 128;

/// Key of `isthmus_ipcache` (LPM trie).
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::Immutable, zerocopy::IntoBytes)
)]
pub struct IpcacheKey {
    /// Bits that count, from `cluster_id` on: [`IPCACHE_STATIC_BITS`] plus the address's.
    pub prefix_len: u32,
    /// 0, unless clusters have overlapping pod addresses.
    pub cluster_id: u16,
    /// Zero.
    pub pad: u8,
    /// [`FAMILY_IPV4`] or [`FAMILY_IPV6`].
    pub family: u8,
    /// IPv4 in the first four bytes and zero after, or IPv6.
    pub address: [u8; 16],
}
const _: () = assert!(size_of::<IpcacheKey>() == 24);

impl IpcacheKey {
    /// Key of an IPv4 prefix with `bits` (0..=32). Bits after it must be zero.
    #[inline(always)]
    pub const fn ipv4(octets: [u8; 4], bits: u8) -> Self {
        let mut address = [0; 16];
        address[0] = octets[0];
        address[1] = octets[1];
        address[2] = octets[2];
        address[3] = octets[3];
        Self {
            prefix_len: IPCACHE_STATIC_BITS + bits as u32,
            cluster_id: 0,
            pad: 0,
            family: FAMILY_IPV4,
            address,
        }
    }

    /// Key of an IPv6 prefix with `bits` (0..=128). Bits after it must be zero.
    #[inline(always)]
    pub const fn ipv6(address: [u8; 16], bits: u8) -> Self {
        Self {
            prefix_len: IPCACHE_STATIC_BITS + bits as u32,
            cluster_id: 0,
            pad: 0,
            family: FAMILY_IPV6,
            address,
        }
    }

    /// Key of one address in the maps' common form.
    #[inline(always)]
    pub const fn host(address: &Address) -> Self {
        if crate::is_ipv4_mapped(address) {
            Self::ipv4(crate::ipv4_of(address), 32)
        } else {
            Self::ipv6(*address, 128)
        }
    }

    /// Number of address bits, if the static part is whole and the family allows that many.
    pub const fn address_bits(&self) -> Option<u8> {
        let max = match self.family {
            FAMILY_IPV4 => IPCACHE_V4_BITS_MAX,
            FAMILY_IPV6 => IPCACHE_V6_BITS_MAX,
            _ => return None,
        };
        if self.prefix_len < IPCACHE_STATIC_BITS || self.prefix_len > max {
            return None;
        }
        Some((self.prefix_len - IPCACHE_STATIC_BITS) as u8)
    }
}

/// Bits of [`IpcacheValue::flags`], Cilium's.
pub mod ipcache_flag {
    /// Send without encapsulation although there is a tunnel endpoint.
    pub const SKIP_TUNNEL: u8 = 1;
    /// `tunnel_endpoint` is set.
    pub const HAS_TUNNEL_ENDPOINT: u8 = 2;
    /// `tunnel_endpoint` is an IPv6 address.
    pub const TUNNEL_ENDPOINT_IPV6: u8 = 4;
    /// The address belongs to another cluster.
    pub const REMOTE_CLUSTER: u8 = 8;
    /// Nothing answers there: drop.
    pub const UNROUTABLE: u8 = 16;
}

/// Value of `isthmus_ipcache`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::Immutable, zerocopy::IntoBytes)
)]
pub struct IpcacheValue {
    /// Security identity of the address.
    pub identity: u32,
    /// The node that hosts it (IPv4-mapped or IPv6), all zero if none.
    pub tunnel_endpoint: Address,
    /// Zero.
    pub pad: [u8; 2],
    /// Encryption key index, 255 for WireGuard, 0 for none.
    pub key: u8,
    /// Bits of [`ipcache_flag`].
    pub flags: u8,
}
const _: () = assert!(size_of::<IpcacheValue>() == 24);

impl IpcacheValue {
    /// An address without a tunnel endpoint: on this node, or reached by plain routing.
    pub const fn direct(identity: u32, flags: u8) -> Self {
        Self {
            identity,
            tunnel_endpoint: [0; 16],
            pad: [0; 2],
            key: 0,
            flags,
        }
    }

    /// An address behind the node `tunnel_endpoint`; the endpoint's own flag bits are added to `flags`.
    pub const fn tunnel(identity: u32, tunnel_endpoint: Address, key: u8, flags: u8) -> Self {
        let family = if crate::is_ipv4_mapped(&tunnel_endpoint) {
            0
        } else {
            ipcache_flag::TUNNEL_ENDPOINT_IPV6
        };
        Self {
            identity,
            tunnel_endpoint,
            pad: [0; 2],
            key,
            flags: flags | ipcache_flag::HAS_TUNNEL_ENDPOINT | family,
        }
    }

    /// Whether who is there knows the way to pods: pods do, and whoever is reached through the overlay. Nodes, which are
    /// reached without it, know it only through the overlay, and drop what has a pod's address and came another way.
    #[inline(always)]
    pub const fn knows_pods(&self) -> bool {
        self.flags & ipcache_flag::HAS_TUNNEL_ENDPOINT != 0
            || !matches!(
                self.identity,
                crate::IDENTITY_HOST
                    | crate::IDENTITY_WORLD
                    | crate::IDENTITY_REMOTE_NODE
                    | crate::IDENTITY_KUBE_APISERVER
            )
    }
}
