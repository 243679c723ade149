//! Replaces an address and port of a packet and keeps every checksum true.
//!
//! Also where the checksum is still to be computed by a device, or was computed over the whole packet by one: the
//! kernel's helpers know, so nothing here reads or writes a checksum itself.

use aya_ebpf::{
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    helpers::{bpf_csum_diff, bpf_l4_csum_replace},
    programs::TcContext,
};
use isthmus_bpf_abi::{Address, DropReason, PROTO_ICMP, PROTO_ICMPV6, PROTO_SCTP, PROTO_TCP, PROTO_UDP};

use crate::{
    l4,
    parse::{ETH_LEN, Fragment, Packet},
};

/// Offset of the checksum in an IPv4 header.
pub const IPV4_CHECKSUM: usize = 10;
/// "The change is of an IPv6 address": that of the header and that of the checksum cancel out in a checksum over the
/// whole packet (`BPF_F_IPV6`, Linux 6.16 and the stable kernels it went to).
const BPF_F_IPV6: u64 = 1 << 7;
const EINVAL: i64 = 22;

/// Which address of a packet.
#[derive(Clone, Copy, PartialEq)]
pub enum Side {
    /// Where it comes from.
    Source,
    /// Where it goes.
    Destination,
}

/// A replacement.
#[repr(C, align(8))]
pub struct Change {
    /// The address as it is.
    pub old: Address,
    /// As it shall be, of the same family.
    pub new: Address,
    /// The port as it is, network order.
    pub old_port: [u8; 2],
    /// As it shall be. Only looked at if the protocol has ports, or echoes with a number.
    pub new_port: [u8; 2],
    /// Which.
    pub side: Side,
}

impl Change {
    /// Another address, the same port.
    #[inline(always)]
    pub fn set_address(&mut self, side: Side, old: &Address, new: &Address) {
        self.old = *old;
        self.new = *new;
        self.old_port = [0; 2];
        self.new_port = [0; 2];
        self.side = side;
    }

    /// Another address and port.
    #[inline(always)]
    pub fn set(&mut self, side: Side, old: (&Address, [u8; 2]), new: (&Address, [u8; 2])) {
        self.set_address(side, old.0, new.0);
        self.old_port = old.1;
        self.new_port = new.1;
    }

    /// The old and the new address as words of the IPv4 header.
    #[inline(always)]
    pub fn ipv4(&self) -> (u32, u32) {
        let word = |a: &Address| u32::from_ne_bytes([a[12], a[13], a[14], a[15]]);
        (word(&self.old), word(&self.new))
    }

    /// What the change of an IPv6 address adds to a sum.
    #[inline(always)]
    pub fn ipv6_sum(&self) -> u64 {
        // SAFETY: both are 16 bytes on the stack, and the helper only reads.
        let sum = unsafe {
            bpf_csum_diff(
                self.old.as_ptr().cast_mut().cast(),
                16,
                self.new.as_ptr().cast_mut().cast(),
                16,
                0,
            )
        };
        sum as u64
    }

    /// Offset of the address in its IP header.
    #[inline(always)]
    pub fn offset(&self, ipv4: bool) -> usize {
        match (ipv4, self.side) {
            (true, Side::Source) => 12,
            (true, Side::Destination) => 16,
            (false, Side::Source) => 8,
            (false, Side::Destination) => 24,
        }
    }
}

/// Carries out a change.
#[inline(never)]
pub fn rewrite(ctx: &TcContext, packet: &Packet, change: &Change) -> Result<(), DropReason> {
    let has_header = packet.fragment != Fragment::Later;
    let echoes = l4::may_echo(packet.proto, packet.ipv4);
    let moves_port = (echoes || l4::has_ports(packet.proto)) && change.old_port != change.new_port;
    if moves_port && packet.proto == PROTO_SCTP {
        // Its checksum (CRC32c) is over the whole packet, and no helper computes it.
        return Err(DropReason::UnsupportedTransport);
    }
    if has_header {
        // A UDP checksum of zero means that there is none, and stays so.
        let (checksum, flags) = match packet.proto {
            PROTO_TCP => (packet.l4 + 16, 0),
            PROTO_UDP => (packet.l4 + 6, u64::from(BPF_F_MARK_MANGLED_0)),
            PROTO_ICMPV6 => (packet.l4 + 2, 0),
            _ => (0, 0),
        };
        if checksum != 0 {
            pseudo_header(ctx, packet, change, checksum, flags)?;
        }
        if moves_port {
            // ICMP's checksum is over no address, but over the number.
            let checksum = match packet.proto {
                PROTO_ICMP => packet.l4 + 2,
                _ => checksum,
            };
            if checksum != 0 {
                let (old, new) = (port(change.old_port), port(change.new_port));
                ctx.l4_csum_replace(checksum, old, new, flags | 2)
                    .map_err(|_| DropReason::WriteFailed)?;
            }
            let offset = match change.side {
                _ if echoes => packet.l4 + l4::ECHO_NUMBER,
                Side::Source => packet.l4,
                Side::Destination => packet.l4 + 2,
            };
            store(ctx, offset, &change.new_port)?;
        }
    }
    let offset = ETH_LEN + change.offset(packet.ipv4);
    if packet.ipv4 {
        let (old, new) = change.ipv4();
        ctx.l3_csum_replace(ETH_LEN + IPV4_CHECKSUM, old.into(), new.into(), 4)
            .map_err(|_| DropReason::WriteFailed)?;
        store(ctx, offset, &new)
    } else {
        store(ctx, offset, &change.new)
    }
}

/// Corrects a transport's checksum for an address that it covers.
#[inline(always)]
fn pseudo_header(
    ctx: &TcContext,
    packet: &Packet,
    change: &Change,
    checksum: usize,
    flags: u64,
) -> Result<(), DropReason> {
    let flags = flags | u64::from(BPF_F_PSEUDO_HDR);
    if packet.ipv4 {
        let (old, new) = change.ipv4();
        return ctx
            .l4_csum_replace(checksum, old.into(), new.into(), flags | 4)
            .map_err(|_| DropReason::WriteFailed);
    }
    let sum = change.ipv6_sum();
    let replace = |flags| {
        // SAFETY: takes the program's context and numbers.
        unsafe { bpf_l4_csum_replace(ctx.skb.skb, checksum as u32, 0, sum, flags) }
    };
    let mut result = replace(flags | BPF_F_IPV6);
    if result == -EINVAL {
        // A kernel that does not know the flag changes nothing then.
        result = replace(flags);
    }
    if result == 0 {
        Ok(())
    } else {
        Err(DropReason::WriteFailed)
    }
}

/// A port as a checksum helper takes it.
#[inline(always)]
pub fn port(port: [u8; 2]) -> u64 {
    u64::from(u16::from_ne_bytes(port))
}

/// Writes bytes into the packet.
#[inline(always)]
pub fn store<T>(ctx: &TcContext, offset: usize, value: &T) -> Result<(), DropReason> {
    ctx.store(offset, value, 0).map_err(|_| DropReason::WriteFailed)
}
