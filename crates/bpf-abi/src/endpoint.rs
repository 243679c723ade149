//! Endpoints: the workloads of this node, by address, and the node's own addresses.

use crate::Address;

/// Key of `isthmus_endpoints`. An endpoint with two addresses has two entries.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::Immutable, zerocopy::IntoBytes)
)]
pub struct EndpointKey {
    /// The endpoint's address.
    pub address: Address,
}
const _: () = assert!(size_of::<EndpointKey>() == 16);

/// Bits of [`Endpoint::flags`].
pub mod endpoint_flag {
    /// An address of the node itself: packets for it go to the node's stack.
    pub const HOST: u32 = 1;
}

/// Value of `isthmus_endpoints`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::Immutable, zerocopy::IntoBytes)
)]
pub struct Endpoint {
    /// Interface index of the host's side of the endpoint's veth pair; 0 for the node's own addresses.
    pub ifindex: u32,
    /// The endpoint's number on this node.
    pub endpoint_id: u32,
    /// Its security identity.
    pub identity: u32,
    /// Bits of [`endpoint_flag`].
    pub flags: u32,
    /// MAC address of the pod's side.
    pub pod_mac: [u8; 6],
    /// MAC address of the host's side.
    pub host_mac: [u8; 6],
}
const _: () = assert!(size_of::<Endpoint>() == 28);

impl Endpoint {
    /// The node's own address, for example its router IP.
    pub const fn host(identity: u32) -> Self {
        Self {
            ifindex: 0,
            endpoint_id: 0,
            identity,
            flags: endpoint_flag::HOST,
            pod_mac: [0; 6],
            host_mac: [0; 6],
        }
    }
}
