//! Where a packet goes that was translated on its way from or to the outside, or that a pod sent: to a pod here, through the
//! overlay, out of a device, or to the node's stack.
//!
//! A packet that carries one of the node's own addresses as its source must not go through the stack, which would take it
//! for forged: it leaves through its device right here, and the kernel finds the neighbour's MAC address. That is a hop, which
//! costs one of its TTL.

use core::mem::offset_of;

use aya_ebpf::{
    bindings::{TC_ACT_OK, TC_ACT_REDIRECT, bpf_fib_lookup},
    helpers::{bpf_fib_lookup as fib_lookup, bpf_redirect_neigh},
    programs::TcContext,
};
use isthmus_bpf_abi::{DropReason, IDENTITY_WORLD, ct_flag, endpoint_flag, ipv4_of};

use crate::{
    deliver,
    nat::{IPV4_CHECKSUM, store},
    overlay::{self, Route},
    parse::{ETH_LEN, Packet, load},
    tables, words,
    work::Work,
};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// Offset of the TTL in an IPv4 header.
const IPV4_TTL: usize = 8;
/// Offset of the hop limit in an IPv6 header.
const IPV6_HOP_LIMIT: usize = 7;
/// Answers of the kernel's routes.
const FIB_FOUND: i64 = 0;
const FIB_NOT_FORWARDED: i64 = 4;
const FIB_NO_NEIGHBOUR: i64 = 7;

/// A question to the kernel's routes: `struct bpf_fib_lookup`, in words, so that it needs no unions. Network order but `ifindex`.
#[repr(C, align(8))]
pub struct Lookup {
    family: u8,
    proto: u8,
    ports: [u8; 4],
    length: u16,
    ifindex: u32,
    flow_label: u32,
    source: [u8; 16],
    destination: [u8; 16],
    vlan: [u8; 4],
    macs: [u8; 12],
}
const _: () = assert!(size_of::<Lookup>() == size_of::<bpf_fib_lookup>());

/// Decides about the packet of the flow in `work`, both as they are now: writes `work.verdict`.
#[inline(never)]
pub fn onward(ctx: &TcContext, work: &mut Work) -> Result<(), DropReason> {
    let back = work.flow.flags & ct_flag::REVERSE != 0;
    if let Some(endpoint) = tables::endpoint(&work.packet.destination) {
        // What the stack has sent for a pod comes back through the stack: it may have tables of its own.
        let stack = endpoint.flags & endpoint_flag::HOST != 0 || back && work.flow.service_id == 0;
        work.verdict = if stack {
            TC_ACT_OK
        } else {
            deliver::to_pod(ctx, endpoint)?
        };
        return Ok(());
    }
    let route = overlay::route(tables::ipcache(&work.packet.destination))?;
    work.verdict = match route {
        Route::Tunnel(entry) => {
            // What comes from outside has a source that nobody vouches for.
            let identity = if back {
                overlay::node_identity()
            } else {
                IDENTITY_WORLD
            };
            overlay::send(ctx, identity, &entry)?
        }
        Route::Stack if !back => towards(ctx, work)?,
        Route::Stack if work.flow.ifindex != 0 => {
            hop(ctx, &work.packet)?;
            out_of(work.flow.ifindex)?
        }
        Route::Stack => TC_ACT_OK,
    };
    Ok(())
}

/// Decides about a pod's packet to nobody on this node: into the overlay as from `identity`, or to the stack.
#[inline(never)]
pub fn of_pod(ctx: &TcContext, work: &mut Work, identity: u32) -> Result<(), DropReason> {
    work.verdict = match overlay::route(tables::ipcache(&work.packet.destination))? {
        Route::Stack => TC_ACT_OK,
        Route::Tunnel(entry) => overlay::send(ctx, identity, &entry)?,
    };
    Ok(())
}

/// Sends the answer that a packet from outside was turned into back to where that came from.
#[inline(never)]
pub fn answer(ctx: &TcContext, work: &mut Work) -> Result<(), DropReason> {
    // `work.packet` is the packet that is answered.
    let route = overlay::route(tables::ipcache(&work.packet.source))?;
    work.verdict = match route {
        Route::Tunnel(entry) => overlay::send(ctx, overlay::node_identity(), &entry)?,
        Route::Stack => out_of(work.outside)?,
    };
    Ok(())
}

/// Out of the device that the kernel's routes name for the packet's destination.
#[inline(always)]
fn towards(ctx: &TcContext, work: &mut Work) -> Result<i32, DropReason> {
    let lookup = &mut work.lookup;
    lookup.proto = work.packet.proto;
    lookup.ports = [0; 4];
    lookup.length = 0;
    lookup.ifindex = work.outside;
    lookup.flow_label = 0;
    lookup.vlan = [0; 4];
    lookup.macs = [0; 12];
    if work.packet.ipv4 {
        let (s, d) = (ipv4_of(&work.packet.source), ipv4_of(&work.packet.destination));
        lookup.family = AF_INET;
        const { assert!(offset_of!(Lookup, source) % 8 == 0 && offset_of!(Lookup, destination) % 8 == 0) };
        // SAFETY: aligned to 8, as `Lookup` is.
        unsafe {
            words::clear(&mut lookup.source);
            words::clear(&mut lookup.destination);
        }
        (
            lookup.source[0],
            lookup.source[1],
            lookup.source[2],
            lookup.source[3],
        ) = (s[0], s[1], s[2], s[3]);
        (
            lookup.destination[0],
            lookup.destination[1],
            lookup.destination[2],
            lookup.destination[3],
        ) = (d[0], d[1], d[2], d[3]);
    } else {
        lookup.family = AF_INET6;
        lookup.source = work.packet.source;
        lookup.destination = work.packet.destination;
    }
    // SAFETY: the context, and a structure of the kernel's size in a map's value.
    let found = unsafe {
        fib_lookup(
            ctx.skb.skb.cast(),
            core::ptr::from_mut(lookup).cast(),
            size_of::<Lookup>() as i32,
            0,
        )
    };
    match found as i64 {
        FIB_FOUND | FIB_NO_NEIGHBOUR => {
            hop(ctx, &work.packet)?;
            out_of(work.lookup.ifindex)
        }
        // An address of the node that the agent has not told of. The stack would take what has a source of the node for forged.
        FIB_NOT_FORWARDED if work.flow.flags & ct_flag::SNAT == 0 => Ok(TC_ACT_OK),
        _ => Err(DropReason::NoRoute),
    }
}

/// Counts a hop, as who routes from device to device must: two nodes may have each other's frontends as backends.
#[inline(never)]
fn hop(ctx: &TcContext, packet: &Packet) -> Result<(), DropReason> {
    let offset = ETH_LEN + if packet.ipv4 { IPV4_TTL } else { IPV6_HOP_LIMIT };
    let ttl: u8 = load(ctx, offset)?;
    if ttl <= 1 {
        return Err(DropReason::TtlExpired);
    }
    let left = ttl - 1;
    if packet.ipv4 {
        // The checksum is over words; TTL and protocol are one.
        let word = |ttl| u64::from(u16::from_ne_bytes([ttl, packet.proto]));
        ctx.l3_csum_replace(ETH_LEN + IPV4_CHECKSUM, word(ttl), word(left), 2)
            .map_err(|_| DropReason::WriteFailed)?;
    }
    store(ctx, offset, &left)
}

/// Out of a device, to the neighbour that leads to the packet's destination.
#[inline(always)]
fn out_of(ifindex: u32) -> Result<i32, DropReason> {
    // SAFETY: takes numbers; without a next hop the kernel finds it.
    match unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) } as i64 {
        verdict if verdict == i64::from(TC_ACT_REDIRECT) => Ok(TC_ACT_REDIRECT),
        _ => Err(DropReason::RedirectFailed),
    }
}
