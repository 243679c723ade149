//! Load balancing: services, backends, and the way back from a backend to the frontend a socket asked for.
//!
//! A service is slot 0 (the frontend: how many backends, which flags) and slots 1..=count (each names a backend).
//! Readers take slot 0, choose a slot and follow it; writers order their changes so that this always resolves
//! (new backends, then slots, then the count; on the way down count, slots, orphaned backends). A reader that meets
//! a change in the middle starts again at slot 0, [`SELECT_TRIES_MAX`] times at most.

use crate::Address;

/// [`ServiceKey::scope`] for traffic from anywhere.
pub const SCOPE_EXTERNAL: u8 = 0;
/// [`ServiceKey::scope`] for lookups of cluster-internal traffic, where the two differ.
pub const SCOPE_INTERNAL: u8 = 1;

/// How often a reader may start again at slot 0 before it refuses the connection.
pub const SELECT_TRIES_MAX: u32 = 8;

/// Key of `isthmus_services`.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::Immutable, zerocopy::IntoBytes)
)]
pub struct ServiceKey {
    /// The frontend's address (a cluster IP).
    pub address: Address,
    /// The frontend's port, network order.
    pub port: [u8; 2],
    /// 0 is the frontend, 1..=count its backends.
    pub slot: u16,
    /// IANA protocol number.
    pub proto: u8,
    /// [`SCOPE_EXTERNAL`] or [`SCOPE_INTERNAL`].
    pub scope: u8,
    /// Zero.
    pub pad: [u8; 2],
}
const _: () = assert!(size_of::<ServiceKey>() == 24);

impl ServiceKey {
    /// Key of the frontend itself (slot 0) in the external scope. `port` is in host order.
    #[inline(always)]
    pub const fn frontend(address: Address, port: u16, proto: u8) -> Self {
        Self {
            address,
            port: port.to_be_bytes(),
            slot: 0,
            proto,
            scope: SCOPE_EXTERNAL,
            pad: [0; 2],
        }
    }

    /// The same frontend's key at another slot.
    #[inline(always)]
    pub const fn at_slot(self, slot: u16) -> Self {
        Self { slot, ..self }
    }
}

/// Bits of [`ServiceValue::flags`].
pub mod service_flag {
    /// The frontend came from a Service marked global.
    pub const GLOBAL: u16 = 1;
    /// The frontend is a cluster IP: it does not route outside the node.
    pub const CLUSTER_IP: u16 = 2;
    /// The service has a Maglev table in `isthmus_maglev`; without, slots are chosen by number.
    pub const MAGLEV: u16 = 4;
    /// A client stays on its backend for as long as slot 0 says ([`super::ServiceValue::affinity_seconds`]).
    pub const AFFINITY: u16 = 8;
    /// Only sources in `isthmus_source_ranges` may ask, where they come from outside.
    pub const SOURCE_RANGES: u16 = 16;
    /// The frontend is reached from outside the cluster: node port, load balancer, external IP or host port.
    pub const EXTERNAL: u16 = 32;
    /// Traffic from outside goes to backends of this node alone and keeps its source (external traffic policy Local).
    pub const EXTERNAL_LOCAL: u16 = 64;
}

/// Value of `isthmus_services`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::Immutable, zerocopy::IntoBytes)
)]
pub struct ServiceValue {
    /// In slots above 0: key of `isthmus_backends`. In slot 0: [`Self::affinity_seconds`].
    pub backend_id: u32,
    /// Number of the service on this node; the same in all its slots.
    pub service_id: u32,
    /// In slot 0: how many slots follow. In others: zero.
    pub count: u16,
    /// Bits of [`service_flag`].
    pub flags: u16,
}
const _: () = assert!(size_of::<ServiceValue>() == 12);

impl ServiceValue {
    /// Value of slot 0.
    pub const fn frontend(service_id: u32, count: u16, flags: u16) -> Self {
        Self {
            backend_id: 0,
            service_id,
            count,
            flags,
        }
    }

    /// In slot 0, with [`service_flag::AFFINITY`]: seconds for which a client stays on its backend after its last new flow.
    #[inline(always)]
    pub const fn affinity_seconds(&self) -> u32 {
        self.backend_id
    }

    /// Slot 0 with session affinity.
    pub const fn with_affinity(self, seconds: u32) -> Self {
        Self {
            backend_id: seconds,
            flags: self.flags | service_flag::AFFINITY,
            ..self
        }
    }

    /// Value of a slot that names a backend.
    pub const fn slot(service_id: u32, backend_id: u32) -> Self {
        Self {
            backend_id,
            service_id,
            count: 0,
            flags: 0,
        }
    }
}

/// Key of `isthmus_backends`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::Immutable, zerocopy::IntoBytes)
)]
pub struct BackendKey {
    /// The backend's number on this node, from 1.
    pub id: u32,
}
const _: () = assert!(size_of::<BackendKey>() == 4);

/// Values of [`Backend::state`].
pub mod backend_state {
    /// Takes new connections.
    pub const ACTIVE: u8 = 0;
    /// Finishes what it has; named by a slot only when no active one is left.
    pub const TERMINATING: u8 = 1;
    /// Of a cluster that does not answer: named by a slot only as last resort.
    pub const QUARANTINED: u8 = 2;
}

/// Value of `isthmus_backends`.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::Immutable, zerocopy::IntoBytes)
)]
pub struct Backend {
    /// Where to send.
    pub address: Address,
    /// Port, network order.
    pub port: [u8; 2],
    /// IANA protocol number.
    pub proto: u8,
    /// One of [`backend_state`].
    pub state: u8,
    /// Cluster that the backend runs in.
    pub cluster_id: u16,
    /// Number of the zone on this node, 0 if unknown.
    pub zone: u8,
    /// Zero.
    pub pad: u8,
}
const _: () = assert!(size_of::<Backend>() == 24);

/// Key of `isthmus_reverse_sk`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::Immutable, zerocopy::IntoBytes)
)]
pub struct ReverseSkKey {
    /// The kernel's number of the socket, never reused.
    pub cookie: u64,
    /// Backend's address.
    pub address: Address,
    /// Backend's port, network order.
    pub port: [u8; 2],
    /// IANA protocol number.
    pub proto: u8,
    /// Zero.
    pub pad: [u8; 5],
}
const _: () = assert!(size_of::<ReverseSkKey>() == 32);

/// Value of `isthmus_reverse_sk`: the frontend that the socket's owner asked for.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::Immutable, zerocopy::IntoBytes)
)]
pub struct ReverseSkValue {
    /// Frontend's address.
    pub address: Address,
    /// Number of the service on this node.
    pub service_id: u32,
    /// Frontend's port, network order.
    pub port: [u8; 2],
    /// Zero.
    pub pad: [u8; 2],
}
const _: () = assert!(size_of::<ReverseSkValue>() == 24);

/// A slot in 1..=`count`, each as likely as the others for an evenly spread `random`. `count` must not be 0.
///
/// Multiplies and shifts: unlike `%` it needs no division, and its bias is below `count / 2^32`.
#[inline(always)]
pub const fn pick_slot(random: u32, count: u16) -> u16 {
    ((random as u64 * count as u64) >> 32) as u16 + 1
}

/// The slot to try after `slot` turned out to lead nowhere: walks all of 1..=`count`, so that one that leads
/// somewhere is found however few they are. `count` may have changed since `slot` was picked.
#[inline(always)]
pub const fn next_slot(slot: u16, count: u16) -> u16 {
    if slot >= count { 1 } else { slot + 1 }
}

/// A number that stays the same for a socket and a frontend: keeps a conversation over an unconnected UDP socket on
/// one backend.
#[inline(always)]
pub fn flow_hash(cookie: u64, address: &Address, port: [u8; 2]) -> u32 {
    let low = u64::from_ne_bytes([
        address[8],
        address[9],
        address[10],
        address[11],
        address[12],
        address[13],
        address[14],
        address[15],
    ]);
    let high = u64::from_ne_bytes([
        address[0], address[1], address[2], address[3], address[4], address[5], address[6], address[7],
    ]);
    let mut hash = cookie ^ 0x9e37_79b9_7f4a_7c15;
    hash = mix(hash ^ low);
    hash = mix(hash ^ high);
    hash = mix(hash ^ (u16::from_ne_bytes(port) as u64));
    (hash >> 32) as u32
}

/// The finalizer of splitmix64: every input bit reaches every output bit.
#[inline(always)]
pub(crate) const fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
