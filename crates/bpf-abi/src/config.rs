//! What the programs know about their node: the only entry of `isthmus_config`; its devices to the outside
//! (`isthmus_devices`); and what pods may reach from their own addresses (`isthmus_no_masquerade`).

use crate::Address;

/// Index of the only entry.
pub const CONFIG_INDEX: u32 = 0;

/// Bits of [`NodeConfig::features`].
pub mod feature {
    /// Packets of pods must carry one of the endpoint's own addresses as their source.
    pub const SOURCE_CHECK: u32 = 1;
    /// Packets of pods to frontends are translated: those that no socket hook has.
    pub const PACKET_LB: u32 = 2;
    /// Packets to a frontend without backends get no answer (a reset or ICMP unreachable) but vanish.
    pub const NO_BACKEND_DROP: u32 = 4;
    /// Packets from outside to frontends (node ports, load balancers' addresses, external IPs) are translated.
    pub const NODE_PORT: u32 = 8;
    /// Packets of pods that leave the mesh get the node's address as their source, IPv4.
    pub const MASQUERADE_IPV4: u32 = 16;
    /// The same, IPv6.
    pub const MASQUERADE_IPV6: u32 = 32;
}

/// Value of `isthmus_config` (array with one entry, all zero until the agent wrote it).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::Immutable, zerocopy::IntoBytes)
)]
pub struct NodeConfig {
    /// The node's IPv4 address, IPv4-mapped; zero if none.
    pub node_ipv4: Address,
    /// The node's IPv6 address; zero if none.
    pub node_ipv6: Address,
    /// Router IP (CiliumInternalIP) for IPv4, IPv4-mapped; zero if none.
    pub router_ipv4: Address,
    /// Router IP for IPv6; zero if none.
    pub router_ipv6: Address,
    /// Interface index of the VXLAN device.
    pub vxlan_ifindex: u32,
    /// Identity that the node's own traffic carries in the overlay, normally [`crate::IDENTITY_REMOTE_NODE`].
    pub node_identity: u32,
    /// Bits of [`feature`].
    pub features: u32,
    /// The cluster's ID.
    pub cluster_id: u16,
    /// Zero.
    pub pad: u16,
    /// Entries of each Maglev table: 0 (then none is used) or a prime.
    pub maglev_table_size: u32,
    /// Least port of the node's addresses to which the programs translate sources, host order; 0 if they may not.
    pub snat_port_min: u16,
    /// Largest such port.
    pub snat_port_max: u16,
    /// UDP port of the tunnels between nodes, host order.
    pub tunnel_port: u16,
    /// Zero.
    pub pad_end: u16,
}
const _: () = assert!(size_of::<NodeConfig>() == 92);

/// Value of `isthmus_devices` (hash map, by interface index): a device to the outside.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::Immutable, zerocopy::IntoBytes)
)]
pub struct Device {
    /// What pods' packets that leave here have as their source, IPv4-mapped; zero if the device has no IPv4.
    pub ipv4: Address,
    /// The same, IPv6.
    pub ipv6: Address,
}
const _: () = assert!(size_of::<Device>() == 32);

/// Key of `isthmus_no_masquerade` (LPM trie): a prefix that pods reach from their own addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::Immutable, zerocopy::IntoBytes)
)]
pub struct PrefixKey {
    /// Bits that count; an IPv4 prefix of n bits has 96 + n.
    pub prefix_len: u32,
    /// The prefix, IPv4 as IPv4-mapped; bits past it are zero.
    pub address: Address,
}
const _: () = assert!(size_of::<PrefixKey>() == 20);

/// Value of `isthmus_no_masquerade`: an entry that is there counts.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::Immutable, zerocopy::IntoBytes)
)]
pub struct PrefixValue {
    /// 1.
    pub there: u32,
}
const _: () = assert!(size_of::<PrefixValue>() == 4);
