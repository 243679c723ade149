//! Conntrack of translated flows: `isthmus_ct`, and ports of fragmented ones: `isthmus_fragments`.
//!
//! Only flows that a packet program translates are tracked. Each has two entries that hold the same story: one for
//! packets to the frontend, one for the packets that come back from the backend. Either is enough to make the other
//! ([`ct_pair`]), so an entry that an LRU map evicted comes back with the next packet of the other direction, and no third
//! table must agree with them: a frontend that is deleted, or whose number is used again, does not bend a flow that is open.
//!
//! With [`ct_flag::SNAT`] both sides of a flow's packets are replaced: the backend sees an address and port of the node. The
//! entry of the way back then holds that port: who makes it without replacing another has the port. A pod's flow that is
//! masqueraded is the same with a frontend that is its own backend.
//!
//! What a packet does to an entry ([`ct_step`]) and when one is over ([`ct_is_expired`]) are pure.

use crate::{Address, PROTO_TCP, is_ipv4_mapped};

/// Key of `isthmus_ct`: a packet's addresses and ports as the program meets them.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::Immutable, zerocopy::IntoBytes)
)]
pub struct CtKey {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Source port, network order.
    pub source_port: [u8; 2],
    /// Destination port, network order.
    pub destination_port: [u8; 2],
    /// IANA protocol number.
    pub proto: u8,
    /// Zero; 1 in the first byte while a program claims the entry with this key for a new flow.
    pub pad: [u8; 3],
}
const _: () = assert!(size_of::<CtKey>() == 40);

/// Bits of [`CtValue::flags`].
pub mod ct_flag {
    /// The entry is for packets from the backend; without, for packets to the frontend.
    pub const REVERSE: u8 = 1;
    /// Client and backend are the same pod: it talks to the loopback address of its family instead of itself.
    pub const HAIRPIN: u8 = 2;
    /// The client has sent a FIN.
    pub const FIN_FORWARD: u8 = 4;
    /// The backend has sent a FIN.
    pub const FIN_REVERSE: u8 = 8;
    /// The other side of packets is replaced too, by [`super::CtValue::peer_address`] and port.
    pub const SNAT: u8 = 16;
}

/// Values of [`CtValue::state`].
pub mod ct_state {
    /// Nothing but the beginning was seen: a SYN, or datagrams without an answer.
    pub const OPENING: u8 = 0;
    /// Both sides talk.
    pub const ESTABLISHED: u8 = 1;
    /// Reset, or both sides have sent their FIN.
    pub const CLOSING: u8 = 2;
}

/// Value of `isthmus_ct`.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::Immutable, zerocopy::IntoBytes)
)]
pub struct CtValue {
    /// What the packet's destination (source, with [`ct_flag::REVERSE`]) becomes: the backend (the frontend).
    pub nat_address: Address,
    /// Its port, network order.
    pub nat_port: [u8; 2],
    /// One of [`ct_state`].
    pub state: u8,
    /// Bits of [`ct_flag`].
    pub flags: u8,
    /// Seconds of the monotonic clock at which a packet was last seen, of either direction, to the second.
    pub last_seen: u32,
    /// The backend's number.
    pub backend_id: u32,
    /// The service's number; 0 for a flow through no service.
    pub service_id: u32,
    /// With [`ct_flag::SNAT`]: what the packet's source (destination, with [`ct_flag::REVERSE`]) becomes: an address of this node
    /// (the client). Else zero.
    pub peer_address: Address,
    /// Its port, network order.
    pub peer_port: [u8; 2],
    /// Zero.
    pub pad: [u8; 2],
    /// Index of the device through which the client's packets come, and the server's of a masqueraded flow; 0 where a pod asks
    /// a service.
    pub ifindex: u32,
}
const _: () = assert!(size_of::<CtValue>() == 56);

/// Key of `isthmus_fragments`: what the fragments of one datagram share.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::Immutable, zerocopy::IntoBytes)
)]
pub struct FragmentKey {
    /// Source address, before translation.
    pub source: Address,
    /// Destination address, before translation.
    pub destination: Address,
    /// The datagram's number: IPv4's in the last two bytes, or IPv6's.
    pub id: [u8; 4],
    /// IANA protocol number.
    pub proto: u8,
    /// Zero.
    pub pad: [u8; 3],
}
const _: () = assert!(size_of::<FragmentKey>() == 40);

/// Value of `isthmus_fragments`: what only the first fragment carries.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::Immutable, zerocopy::IntoBytes)
)]
pub struct FragmentValue {
    /// Source port, network order.
    pub source_port: [u8; 2],
    /// Destination port, network order.
    pub destination_port: [u8; 2],
}
const _: () = assert!(size_of::<FragmentValue>() == 4);

/// Stands for the pod itself where it is the backend of its own flow, IPv4 (Cilium's default). It is link-local to nobody
/// but the pair of pod and programs; no packet with it leaves the node.
pub const LOOPBACK_IPV4: Address = crate::ipv4_mapped([169, 254, 42, 1]);
/// The same, IPv6. Of the unique local range and not link-local, so that pods route it through their gateway.
pub const LOOPBACK_IPV6: Address = [
    0xfd, 0x69, 0x73, 0x74, 0x68, 0x6d, 0x75, 0x73, 0, 0, 0, 0, 0, 0, 0, 1,
];

/// The loopback address of the family of `address`.
#[inline(always)]
pub const fn loopback_of(address: &Address) -> Address {
    if is_ipv4_mapped(address) {
        LOOPBACK_IPV4
    } else {
        LOOPBACK_IPV6
    }
}

/// Bit of a TCP header's flags.
pub const TCP_FIN: u8 = 0x01;
/// Bit of a TCP header's flags.
pub const TCP_SYN: u8 = 0x02;
/// Bit of a TCP header's flags.
pub const TCP_RST: u8 = 0x04;
/// Bit of a TCP header's flags.
pub const TCP_ACK: u8 = 0x10;

/// Seconds that an established TCP flow may be silent.
pub const CT_SECONDS_TCP: u32 = 8000;
/// Seconds for the answer to a SYN.
pub const CT_SECONDS_TCP_OPENING: u32 = 60;
/// Seconds for the last packets of a TCP flow that ended.
pub const CT_SECONDS_TCP_CLOSING: u32 = 10;
/// Seconds that other flows may be silent.
pub const CT_SECONDS_OTHER: u32 = 60;

/// Writes the other entry of a flow: from a forward entry the reverse one, and back. In place, since a BPF program has no
/// room on its stack for more copies; and zeros are copied where they are, since the BPF compiler calls a function to make them.
#[inline(always)]
pub const fn ct_pair(key: &CtKey, value: &CtValue, pair_key: &mut CtKey, pair: &mut CtValue) {
    pair_key.proto = key.proto;
    pair_key.pad = key.pad;
    pair.state = value.state;
    pair.last_seen = value.last_seen;
    pair.backend_id = value.backend_id;
    pair.service_id = value.service_id;
    pair.flags = value.flags ^ ct_flag::REVERSE;
    pair.ifindex = value.ifindex;
    pair.pad = value.pad;
    // Zero without SNAT.
    pair.peer_address = value.peer_address;
    pair.peer_port = value.peer_port;
    let hairpin = value.flags & ct_flag::HAIRPIN != 0;
    let snat = value.flags & ct_flag::SNAT != 0;
    if value.flags & ct_flag::REVERSE == 0 {
        pair_key.source = value.nat_address;
        pair_key.source_port = value.nat_port;
        pair_key.destination = key.source;
        pair_key.destination_port = key.source_port;
        pair.nat_address = key.destination;
        pair.nat_port = key.destination_port;
        if hairpin {
            pair_key.destination = loopback_of(&key.source);
        }
        if snat {
            pair_key.destination = value.peer_address;
            pair_key.destination_port = value.peer_port;
            pair.peer_address = key.source;
            pair.peer_port = key.source_port;
        }
    } else {
        pair_key.source = key.destination;
        pair_key.source_port = key.destination_port;
        pair_key.destination = value.nat_address;
        pair_key.destination_port = value.nat_port;
        pair.nat_address = key.source;
        pair.nat_port = key.source_port;
        if hairpin {
            pair_key.source = key.source;
        }
        if snat {
            pair_key.source = value.peer_address;
            pair_key.source_port = value.peer_port;
            pair.peer_address = key.destination;
            pair.peer_port = key.destination_port;
        }
    }
}

/// State and flags after a packet that the entry with `state` and `flags` is for; `tcp_flags` is 0 for other protocols.
#[inline(always)]
pub const fn ct_step(proto: u8, state: u8, flags: u8, tcp_flags: u8) -> (u8, u8) {
    let reverse = flags & ct_flag::REVERSE != 0;
    if proto != PROTO_TCP {
        let state = if reverse { ct_state::ESTABLISHED } else { state };
        return (state, flags);
    }
    if tcp_flags & TCP_RST != 0 {
        return (ct_state::CLOSING, flags);
    }
    if !reverse && tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN {
        // The first one, the same again, or a new flow with the ports of an old one.
        return (
            ct_state::OPENING,
            flags & !(ct_flag::FIN_FORWARD | ct_flag::FIN_REVERSE),
        );
    }
    let mut flags = flags;
    if tcp_flags & TCP_FIN != 0 {
        flags |= if reverse {
            ct_flag::FIN_REVERSE
        } else {
            ct_flag::FIN_FORWARD
        };
    }
    let both = ct_flag::FIN_FORWARD | ct_flag::FIN_REVERSE;
    if flags & both == both {
        return (ct_state::CLOSING, flags);
    }
    // The client's first packet that is no SYN: it has the backend's answer.
    if state == ct_state::OPENING && !reverse && tcp_flags & TCP_SYN == 0 && tcp_flags & TCP_ACK != 0 {
        return (ct_state::ESTABLISHED, flags);
    }
    (state, flags)
}

/// Seconds for which an entry counts after its last packet.
#[inline(always)]
pub const fn ct_seconds(proto: u8, state: u8) -> u32 {
    match (proto, state) {
        (PROTO_TCP, ct_state::ESTABLISHED) => CT_SECONDS_TCP,
        (PROTO_TCP, ct_state::CLOSING) => CT_SECONDS_TCP_CLOSING,
        (PROTO_TCP, _) => CT_SECONDS_TCP_OPENING,
        _ => CT_SECONDS_OTHER,
    }
}

/// Whether the entry is over at `now`, in seconds of the monotonic clock. One that seems to come from the future (its
/// program read the clock later than we did) is not.
#[inline(always)]
pub const fn ct_is_expired(key: &CtKey, value: &CtValue, now: u32) -> bool {
    let age = now.wrapping_sub(value.last_seen);
    age < 1 << 31 && age > ct_seconds(key.proto, value.state)
}

/// A number of the flow that depends on nothing else: the same on every node, and after a restart.
#[inline(always)]
pub const fn tuple_hash(key: &CtKey) -> u32 {
    let mut hash = 0x9e37_79b9_7f4a_7c15_u64 ^ key.proto as u64;
    hash = crate::lb::mix(hash ^ half(&key.source, 0));
    hash = crate::lb::mix(hash ^ half(&key.source, 8));
    hash = crate::lb::mix(hash ^ half(&key.destination, 0));
    hash = crate::lb::mix(hash ^ half(&key.destination, 8));
    let ports = u32::from_be_bytes([
        key.source_port[0],
        key.source_port[1],
        key.destination_port[0],
        key.destination_port[1],
    ]);
    (crate::lb::mix(hash ^ ports as u64) >> 32) as u32
}

/// How many ports are tried for a flow before it is refused.
pub const SNAT_TRIES_MAX: u32 = 32;

/// The port (network order) to try for the flow with `hash` ([`tuple_hash`]) at `attempt`, in `min..=max` (host order, `min` not
/// above `max`). The same for the same: a flow whose entry was evicted meets its own port first.
#[inline(always)]
pub const fn snat_port(hash: u32, attempt: u32, min: u16, max: u16) -> [u8; 2] {
    let room = max as u32 - min as u32 + 1;
    // An odd step: neighbours in the table are no likelier taken than others.
    let at = hash.wrapping_add(attempt.wrapping_mul(0x9e37_79b1)) as u64;
    // Multiplies and shifts: no division.
    let offset = (at * room as u64) >> 32;
    (min + offset as u16).to_be_bytes()
}

/// Eight bytes of an address as a number, the same on every machine.
#[inline(always)]
const fn half(address: &Address, at: usize) -> u64 {
    u64::from_be_bytes([
        address[at],
        address[at + 1],
        address[at + 2],
        address[at + 3],
        address[at + 4],
        address[at + 5],
        address[at + 6],
        address[at + 7],
    ])
}

#[cfg(test)]
mod tests;
