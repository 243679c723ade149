//! Room that a packet program works in, beside its stack. One for each CPU: packet programs run with softirqs off, so none
//! meets another's.
//!
//! Two reasons. The functions of a call chain share a stack of 512 bytes, of which a flow's keys and values would take most. And
//! the verifier follows every value on the stack through every branch after it; what lies in a map is just bytes to it, so
//! that the ways to parse a packet are not multiplied by all that follows.

use isthmus_bpf_abi::{AffinityKey, CtKey, CtValue, ServiceKey};

use crate::{nat::Change, parse::Packet, send::Lookup};

/// See the module. What is in it at the start is another packet's.
#[repr(C, align(8))]
pub struct Work {
    /// The packet as it stands.
    pub packet: Packet,
    /// The packet's flow, as the packet came.
    pub tuple: CtKey,
    /// Where that goes.
    pub flow: CtValue,
    /// The flow's other entry.
    pub pair_key: CtKey,
    /// The flow's other entry.
    pub pair: CtValue,
    /// The frontend that the packet is for.
    pub frontend: ServiceKey,
    /// The entry of another flow that may be in the way.
    pub other: CtValue,
    /// That flow's other entry.
    pub other_key: CtKey,
    /// That flow's other entry.
    pub other_pair: CtValue,
    /// The frontend's flags, where the packet comes from outside.
    pub service_flags: u16,
    /// Who sent it.
    pub client: AffinityKey,
    /// What is just being replaced.
    pub change: Change,
    /// A question to the kernel's routes.
    pub lookup: Lookup,
    /// The device to the outside that the packet came through or leaves through; 0 at all other hooks.
    pub outside: u32,
    /// What becomes of the packet, where a function decides it.
    pub verdict: i32,
    /// Offset of the IP header that an ICMP error quotes.
    pub quoted_l3: usize,
    /// Offset of the transport's header that it quotes.
    pub quoted_l4: usize,
}
