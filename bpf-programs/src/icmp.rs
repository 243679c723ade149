//! ICMP errors about translated packets: the header that an error quotes must be the one that its reader sent.
//!
//! Only errors that quote a transport's header are looked at; all others pass as they are. The quoted packet's own checksums:
//! IPv4's is kept true, the transport's is not touched, since what it is over is not quoted whole and nobody compares it.

use aya_ebpf::programs::TcContext;
use isthmus_bpf_abi::{DropReason, PROTO_ICMP, PROTO_ICMPV6, ct_flag, ipv4_mapped};

use crate::{
    l4,
    nat::{IPV4_CHECKSUM, Side, port, rewrite, store},
    parse::{Fragment, IPV4_FRAGMENT_OFFSET, IPV4_LEN, IPV6_LEN, Packet, load},
    tables,
    work::Work,
};

/// Bytes before the quoted packet.
const HEADER_LEN: usize = 8;
/// Offset of the checksum.
const CHECKSUM: usize = 2;
const DESTINATION_UNREACHABLE: u8 = 3;
const TIME_EXCEEDED: u8 = 11;
const PARAMETER_PROBLEM: u8 = 12;
/// ICMPv6's errors are numbered 1 to 127; these are in use.
const ICMPV6_ERRORS: core::ops::RangeInclusive<u8> = 1..=4;

/// Whether the packet is an ICMP error.
#[inline(always)]
pub fn is_error(ctx: &TcContext, packet: &Packet) -> bool {
    let expected = if packet.ipv4 { PROTO_ICMP } else { PROTO_ICMPV6 };
    if packet.proto != expected || packet.fragment != Fragment::Whole {
        return false;
    }
    let Ok(kind) = load::<u8>(ctx, packet.l4) else {
        return false;
    };
    if packet.ipv4 {
        matches!(kind, DESTINATION_UNREACHABLE | TIME_EXCEEDED | PARAMETER_PROBLEM)
    } else {
        ICMPV6_ERRORS.contains(&kind)
    }
}

/// A pod's error about what a frontend seemed to send it goes to the backend that sent it.
#[inline(always)]
pub fn forward(ctx: &TcContext, work: &mut Work) -> Result<(), DropReason> {
    if !find(ctx, work) || work.flow.flags & (ct_flag::REVERSE | ct_flag::HAIRPIN) != 0 {
        return Ok(());
    }
    if work.flow.service_id == 0 {
        return Ok(());
    }
    if work.tuple.destination != work.packet.destination {
        return Ok(());
    }
    translate(ctx, work)
}

/// An error about what a client's packet met on its way to a backend names the frontend. Who sent it stays,
/// unless that is the backend.
#[inline(always)]
pub fn backward(ctx: &TcContext, work: &mut Work) -> Result<(), DropReason> {
    if !find(ctx, work) || work.flow.flags & (ct_flag::REVERSE | ct_flag::HAIRPIN) != ct_flag::REVERSE {
        return Ok(());
    }
    if work.flow.service_id == 0 {
        return Ok(());
    }
    translate(ctx, work)
}

/// An error that came to an address of the node: about an answer to a client outside, or about a packet that left with the
/// node's address.
#[inline(always)]
pub fn outside(ctx: &TcContext, work: &mut Work) -> Result<(), DropReason> {
    if !find(ctx, work) || work.tuple.destination != work.packet.destination {
        return Ok(());
    }
    // Of a flow that keeps its client's address it is on its way to the client, which has a hook.
    if work.flow.flags & (ct_flag::REVERSE | ct_flag::SNAT) == ct_flag::REVERSE {
        return Ok(());
    }
    translate(ctx, work)
}

/// A masqueraded pod's error about an answer to it.
#[inline(always)]
pub fn masqueraded(ctx: &TcContext, work: &mut Work) -> Result<(), DropReason> {
    if !find(ctx, work) || work.flow.flags & (ct_flag::REVERSE | ct_flag::SNAT) != ct_flag::SNAT {
        return Ok(());
    }
    translate(ctx, work)
}

/// Lets the error be about what its reader sent, and come to that one. Its sender becomes who the reader knows: the frontend
/// instead of the backend; and for a backend that knows the client by an address of the node, that address, whoever on the
/// client's side sent it.
#[inline(never)]
fn translate(ctx: &TcContext, work: &mut Work) -> Result<(), DropReason> {
    let reverse = work.flow.flags & ct_flag::REVERSE != 0;
    let snat = work.flow.flags & ct_flag::SNAT != 0;
    let (nat, peer) = if reverse {
        (Side::Destination, Side::Source)
    } else {
        (Side::Source, Side::Destination)
    };
    // The quoted packet went the other way: its destination is who sends here.
    set_change(work, nat, reverse);
    quote(ctx, work)?;
    if snat {
        set_change(work, peer, reverse);
        quote(ctx, work)?;
    }
    work.packet.outcome = DropReason::Translated;
    if !reverse || work.packet.source == work.tuple.source {
        let (side, old) = if reverse {
            (Side::Source, work.packet.source)
        } else {
            (Side::Destination, work.packet.destination)
        };
        work.change.set_address(side, &old, &work.flow.nat_address);
        rewrite(ctx, &work.packet, &work.change)?;
        match side {
            Side::Source => work.packet.source = work.flow.nat_address,
            Side::Destination => work.packet.destination = work.flow.nat_address,
        }
    }
    if snat {
        let (side, old) = if reverse {
            (Side::Destination, work.packet.destination)
        } else {
            (Side::Source, work.packet.source)
        };
        work.change.set_address(side, &old, &work.flow.peer_address);
        rewrite(ctx, &work.packet, &work.change)?;
        match side {
            Side::Source => work.packet.source = work.flow.peer_address,
            Side::Destination => work.packet.destination = work.flow.peer_address,
        }
    }
    Ok(())
}

/// What is to be replaced on one side of the quoted header.
#[inline(always)]
fn set_change(work: &mut Work, side: Side, reverse: bool) {
    let nat = (side == Side::Destination) == reverse;
    let new = if nat {
        (&work.flow.nat_address, work.flow.nat_port)
    } else {
        (&work.flow.peer_address, work.flow.peer_port)
    };
    let old = match side {
        Side::Destination => (&work.tuple.source, work.tuple.source_port),
        Side::Source => (&work.tuple.destination, work.tuple.destination_port),
    };
    work.change.set(side, old, new);
}

/// Writes the flow of the quoted packet, as packets in the error's own direction have it (the quoted one went the other way).
/// Returns whether there is one. A pod's flow to itself is left alone by all callers: such an error never reaches anybody but
/// the pod, through no device.
#[inline(never)]
fn find(ctx: &TcContext, work: &mut Work) -> bool {
    if read_quote(ctx, work).is_err() {
        return false;
    }
    let Some(entry) = tables::flow(&work.tuple) else {
        return false;
    };
    entry.copy_to(&mut work.flow);
    true
}

#[inline(always)]
fn read_quote(ctx: &TcContext, work: &mut Work) -> Result<(), DropReason> {
    let l3 = work.packet.l4 + HEADER_LEN;
    work.quoted_l3 = l3;
    if work.packet.ipv4 {
        let h: [u8; IPV4_LEN] = load(ctx, l3)?;
        if u16::from_be_bytes([h[6], h[7]]) & IPV4_FRAGMENT_OFFSET != 0 {
            return Err(DropReason::Truncated);
        }
        work.tuple.destination = ipv4_mapped([h[12], h[13], h[14], h[15]]);
        work.tuple.source = ipv4_mapped([h[16], h[17], h[18], h[19]]);
        work.tuple.proto = h[9];
        work.quoted_l4 = l3 + usize::from(h[0] & 0xf) * 4;
    } else {
        work.tuple.proto = load(ctx, l3 + 6)?;
        work.tuple.destination = load(ctx, l3 + 8)?;
        work.tuple.source = load(ctx, l3 + 24)?;
        work.quoted_l4 = l3 + IPV6_LEN;
    }
    let p: [u8; 4] = if l4::has_ports(work.tuple.proto) {
        load(ctx, work.quoted_l4)?
    } else if l4::may_echo(work.tuple.proto, work.packet.ipv4) {
        l4::echo(ctx, work.quoted_l4)?.ok_or(DropReason::UnsupportedProtocol)?
    } else {
        return Err(DropReason::UnsupportedProtocol);
    };
    work.tuple.destination_port = [p[0], p[1]];
    work.tuple.source_port = [p[2], p[3]];
    work.tuple.pad = [0; 3];
    Ok(())
}

/// Carries out the change in the quoted header.
#[inline(never)]
fn quote(ctx: &TcContext, work: &mut Work) -> Result<(), DropReason> {
    let change = &work.change;
    let checksum = work.packet.l4 + CHECKSUM;
    let offset = work.quoted_l3 + change.offset(work.packet.ipv4);
    if work.packet.ipv4 {
        // The quoted header's own checksum takes up the change, so the sum over both stays.
        let (old, new) = change.ipv4();
        ctx.l3_csum_replace(work.quoted_l3 + IPV4_CHECKSUM, old.into(), new.into(), 4)
            .map_err(|_| DropReason::WriteFailed)?;
        store(ctx, offset, &new)?;
    } else {
        ctx.l4_csum_replace(checksum, 0, change.ipv6_sum(), 0)
            .map_err(|_| DropReason::WriteFailed)?;
        store(ctx, offset, &change.new)?;
    }
    if change.old_port != change.new_port {
        ctx.l4_csum_replace(checksum, port(change.old_port), port(change.new_port), 2)
            .map_err(|_| DropReason::WriteFailed)?;
        let offset = match change.side {
            _ if !l4::has_ports(work.tuple.proto) => work.quoted_l4 + l4::ECHO_NUMBER,
            Side::Source => work.quoted_l4,
            Side::Destination => work.quoted_l4 + 2,
        };
        store(ctx, offset, &change.new_port)?;
    }
    Ok(())
}
