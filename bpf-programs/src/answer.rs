//! Says no at once: turns a packet to a frontend that leads nowhere into the answer to it, a TCP reset or an ICMP "port
//! unreachable", as from the frontend itself. The caller sends it back where it came from.
//!
//! Checksums are computed here, over short headers. A packet whose checksum a device was to compute keeps that mark, which
//! says "not yet computed, but sure": it is true of an answer that does not leave the node.

use aya_ebpf::{
    helpers::{bpf_csum_diff, bpf_skb_change_tail},
    programs::TcContext,
};
use isthmus_bpf_abi::{
    Address, DropReason, PROTO_ICMP, PROTO_ICMPV6, PROTO_TCP, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, ipv4_of,
};

use crate::{
    nat::store,
    parse::{ETH_LEN, Fragment, IPV4_LEN, IPV6_LEN, Packet, load},
};

const TTL: u8 = 64;
const TCP_LEN: usize = 20;
const ICMP_LEN: usize = 8;
/// Bytes of the transport's header that an ICMP error quotes.
const QUOTED_LEN: usize = 8;
const ICMP4_LEN: usize = ICMP_LEN + IPV4_LEN + QUOTED_LEN;
const ICMP6_LEN: usize = ICMP_LEN + IPV6_LEN + QUOTED_LEN;
/// Type and code of "port unreachable".
const ICMP_PORT_UNREACHABLE: [u8; 2] = [3, 3];
/// The same for ICMPv6.
const ICMPV6_PORT_UNREACHABLE: [u8; 2] = [1, 4];

/// Makes the answer. Packets that must not be answered (resets, ICMP, later fragments) are dropped for the reason for
/// which they are refused.
#[inline(always)]
pub fn refuse(ctx: &TcContext, packet: &Packet) -> Result<(), DropReason> {
    let plain = packet.l4 == ETH_LEN + if packet.ipv4 { IPV4_LEN } else { IPV6_LEN };
    if packet.fragment != Fragment::Whole || !plain {
        return Err(packet.outcome);
    }
    if packet.proto == PROTO_TCP {
        reset(ctx, packet)
    } else if packet.ipv4 {
        unreachable4(ctx, packet)
    } else {
        unreachable6(ctx, packet)
    }
}

/// RFC 9293, 3.5.2: a reset that the other side takes for one of its own connection.
#[inline(never)]
fn reset(ctx: &TcContext, packet: &Packet) -> Result<(), DropReason> {
    let h: [u8; TCP_LEN] = load(ctx, packet.l4)?;
    let flags = h[13];
    if flags & TCP_RST != 0 {
        return Err(packet.outcome);
    }
    let mut tcp = [0_u8; TCP_LEN];
    (tcp[0], tcp[1], tcp[2], tcp[3]) = (h[2], h[3], h[0], h[1]);
    tcp[12] = (TCP_LEN as u8 / 4) << 4;
    if flags & TCP_ACK != 0 {
        (tcp[4], tcp[5], tcp[6], tcp[7]) = (h[8], h[9], h[10], h[11]);
        tcp[13] = TCP_RST;
    } else {
        let payload = ctx
            .len()
            .wrapping_sub(packet.l4 as u32)
            .wrapping_sub(u32::from(h[12] >> 4) * 4);
        let marks = u32::from(flags & TCP_SYN != 0) + u32::from(flags & TCP_FIN != 0);
        let sequence = u32::from_be_bytes([h[4], h[5], h[6], h[7]]);
        let a = sequence.wrapping_add(payload).wrapping_add(marks).to_be_bytes();
        (tcp[8], tcp[9], tcp[10], tcp[11]) = (a[0], a[1], a[2], a[3]);
        tcp[13] = TCP_RST | TCP_ACK;
    }
    let seed = pseudo_header(packet, PROTO_TCP, TCP_LEN as u32);
    let sum = checksum(&tcp, seed);
    (tcp[16], tcp[17]) = (sum[0], sum[1]);
    resize(ctx, packet, TCP_LEN)?;
    if packet.ipv4 {
        header4(ctx, packet, PROTO_TCP, TCP_LEN)?;
    } else {
        header6(ctx, packet, PROTO_TCP, TCP_LEN)?;
    }
    store(ctx, packet.l4, &tcp)
}

#[inline(never)]
fn unreachable4(ctx: &TcContext, packet: &Packet) -> Result<(), DropReason> {
    let quote: [u8; IPV4_LEN + QUOTED_LEN] = load(ctx, ETH_LEN)?;
    let mut icmp = [0_u8; ICMP4_LEN];
    [icmp[0], icmp[1]] = ICMP_PORT_UNREACHABLE;
    icmp[ICMP_LEN..].copy_from_slice(&quote);
    let sum = checksum(&icmp, 0);
    (icmp[2], icmp[3]) = (sum[0], sum[1]);
    resize(ctx, packet, ICMP4_LEN)?;
    header4(ctx, packet, PROTO_ICMP, ICMP4_LEN)?;
    store(ctx, packet.l4, &icmp)
}

#[inline(never)]
fn unreachable6(ctx: &TcContext, packet: &Packet) -> Result<(), DropReason> {
    let quote: [u8; IPV6_LEN + QUOTED_LEN] = load(ctx, ETH_LEN)?;
    let mut icmp = [0_u8; ICMP6_LEN];
    [icmp[0], icmp[1]] = ICMPV6_PORT_UNREACHABLE;
    icmp[ICMP_LEN..].copy_from_slice(&quote);
    let seed = pseudo_header(packet, PROTO_ICMPV6, ICMP6_LEN as u32);
    let sum = checksum(&icmp, seed);
    (icmp[2], icmp[3]) = (sum[0], sum[1]);
    resize(ctx, packet, ICMP6_LEN)?;
    header6(ctx, packet, PROTO_ICMPV6, ICMP6_LEN)?;
    store(ctx, packet.l4, &icmp)
}

/// Cuts or lengthens the packet to a transport of `length` bytes; all after the IP header is to be written then.
#[inline(always)]
fn resize(ctx: &TcContext, packet: &Packet, length: usize) -> Result<(), DropReason> {
    // SAFETY: takes the program's context and numbers.
    match unsafe { bpf_skb_change_tail(ctx.skb.skb, (packet.l4 + length) as u32, 0) } {
        0 => Ok(()),
        _ => Err(DropReason::WriteFailed),
    }
}

/// The IPv4 header of an answer to `packet`.
#[inline(always)]
fn header4(ctx: &TcContext, packet: &Packet, proto: u8, length: usize) -> Result<(), DropReason> {
    let l = ((IPV4_LEN + length) as u16).to_be_bytes();
    let [s0, s1, s2, s3] = ipv4_of(&packet.destination);
    let [d0, d1, d2, d3] = ipv4_of(&packet.source);
    let mut header = [
        0x45, 0, l[0], l[1], 0, 0, 0x40, 0, TTL, proto, 0, 0, s0, s1, s2, s3, d0, d1, d2, d3,
    ];
    let sum = checksum(&header, 0);
    (header[10], header[11]) = (sum[0], sum[1]);
    store(ctx, ETH_LEN, &header)
}

/// The IPv6 header of an answer to `packet`.
#[inline(always)]
fn header6(ctx: &TcContext, packet: &Packet, proto: u8, length: usize) -> Result<(), DropReason> {
    let l = (length as u16).to_be_bytes();
    store(ctx, ETH_LEN, &[0x60_u8, 0, 0, 0, l[0], l[1], proto, TTL])?;
    store(ctx, ETH_LEN + 8, &packet.destination)?;
    store(ctx, ETH_LEN + 24, &packet.source)
}

/// Sum over the pseudo-header. The prefix of IPv4-mapped addresses adds 0xffff each, which is zero in such sums, so one
/// form serves both families; nor does the order of addresses matter.
#[inline(always)]
fn pseudo_header(packet: &Packet, proto: u8, length: u32) -> u32 {
    let rest: [u8; 8] = {
        let l = length.to_be_bytes();
        [l[0], l[1], l[2], l[3], 0, 0, 0, proto]
    };
    sum(
        &rest,
        sum_of_address(&packet.destination, sum_of_address(&packet.source, 0)),
    )
}

#[inline(always)]
fn sum_of_address(address: &Address, seed: u32) -> u32 {
    sum(address, seed)
}

/// One's complement sum of bytes, not yet folded. N is a multiple of 4.
#[inline(always)]
fn sum<const N: usize>(bytes: &[u8; N], seed: u32) -> u32 {
    const { assert!(N.is_multiple_of(4)) };
    // SAFETY: N bytes that the helper only reads.
    let sum = unsafe {
        bpf_csum_diff(
            core::ptr::null_mut(),
            0,
            bytes.as_ptr().cast_mut().cast(),
            N as u32,
            seed,
        )
    };
    sum as u32
}

/// The checksum of bytes, in the order in which it is stored.
#[inline(always)]
fn checksum<const N: usize>(bytes: &[u8; N], seed: u32) -> [u8; 2] {
    let mut sum = sum(bytes, seed);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    (!(sum as u16)).to_ne_bytes()
}
