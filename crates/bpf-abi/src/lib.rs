//! Keys, values and constants that the BPF programs and the user side share.
//!
//! In: nothing. Out: one definition of every map's layout, name and size, the drop reasons, and the few pure
//! calculations (slot choice, hashes, a flow's life, metric index) that BPF makes and that the host tests.
//!
//! Invariants:
//! - No layout has hidden padding: padding is a named field that constructors zero, since a hash map compares every
//!   byte of a key. With feature `user` the zerocopy derives prove it; without, the size assertions do.
//! - Keys and values that programs copy are aligned to 8, so that an address moves in two loads and not in sixteen.
//! - Addresses are 16 bytes in network order, IPv4 as `::ffff:a.b.c.d` ([`Address`]), so that both families go
//!   through one map and one code path; the ipcache key alone follows Cilium's own form, see [`IpcacheKey`].
//! - Ports are two bytes in network order; every other number is in host order.
//! - A layout that changes bumps [`ABI_VERSION`]: it is pinned beside the maps and the agent compares.
#![no_std]

mod address;
mod choice;
mod config;
mod ct;
mod endpoint;
mod ipcache;
mod lb;
pub mod maps;
mod metrics;

pub use address::{Address, ipv4_mapped, ipv4_of, is_ipv4_mapped};
pub use choice::{
    AffinityKey, AffinityValue, MAGLEV_CHUNK, MAGLEV_TABLE_SIZE_DEFAULT, MaglevChunk, MaglevKey,
    SOURCE_RANGE_STATIC_BITS, SourceRangeKey, SourceRangeValue, affinity_holds, affinity_kind,
    maglev_position,
};
pub use config::{CONFIG_INDEX, Device, NodeConfig, PrefixKey, PrefixValue, feature};
pub use ct::{
    CT_SECONDS_OTHER, CT_SECONDS_TCP, CT_SECONDS_TCP_CLOSING, CT_SECONDS_TCP_OPENING, CtKey, CtValue,
    FragmentKey, FragmentValue, LOOPBACK_IPV4, LOOPBACK_IPV6, SNAT_TRIES_MAX, TCP_ACK, TCP_FIN, TCP_RST,
    TCP_SYN, ct_flag, ct_is_expired, ct_pair, ct_seconds, ct_state, ct_step, loopback_of, snat_port,
    tuple_hash,
};
pub use endpoint::{Endpoint, EndpointKey, endpoint_flag};
pub use ipcache::{
    FAMILY_IPV4, FAMILY_IPV6, IPCACHE_STATIC_BITS, IPCACHE_V4_BITS_MAX, IPCACHE_V6_BITS_MAX, IpcacheKey,
    IpcacheValue, ipcache_flag,
};
pub use lb::{
    Backend, BackendKey, ReverseSkKey, ReverseSkValue, SCOPE_EXTERNAL, SCOPE_INTERNAL, SELECT_TRIES_MAX,
    ServiceKey, ServiceValue, backend_state, flow_hash, next_slot, pick_slot, service_flag,
};
pub use metrics::{DIRECTIONS, Direction, DropReason, MetricsValue, REASONS, metric_index, metric_of};

/// Version of every layout, map name and meaning in this crate. Bumped when one of them changes.
pub const ABI_VERSION: u32 = 3;

/// IANA protocol number of TCP, as in [`ServiceKey::proto`].
pub const PROTO_TCP: u8 = 6;
/// IANA protocol number of UDP.
pub const PROTO_UDP: u8 = 17;
/// IANA protocol number of SCTP.
pub const PROTO_SCTP: u8 = 132;
/// IANA protocol number of ICMP.
pub const PROTO_ICMP: u8 = 1;
/// IANA protocol number of ICMPv6.
pub const PROTO_ICMPV6: u8 = 58;

/// Security identity of the node itself (`reserved:host`).
pub const IDENTITY_HOST: u32 = 1;
/// Security identity of whatever is outside the mesh (`reserved:world`).
pub const IDENTITY_WORLD: u32 = 2;
/// Security identity of traffic that a node itself sends to another node (`reserved:remote-node`).
pub const IDENTITY_REMOTE_NODE: u32 = 6;
/// Security identity of the API server of Kubernetes (`reserved:kube-apiserver`).
pub const IDENTITY_KUBE_APISERVER: u32 = 7;
/// Largest number that fits the 24 bits of a VXLAN network identifier.
pub const VNI_MAX: u32 = 0x00ff_ffff;

#[cfg(test)]
mod tests;
