//! Packets that another node sent through the overlay: ingress of the VXLAN device.
//!
//! The VNI is the source's identity, which the sending node vouches for. Destinations are pods of this node and the
//! node's own addresses; a backend's answer to a pod seems to come from the frontend, and its answer to a client outside, which
//! knew this node instead, goes there. Nothing else is forwarded further.

use aya_ebpf::{
    bindings::{TC_ACT_OK, TC_ACT_SHOT},
    helpers::bpf_skb_change_type,
    macros::classifier,
    programs::TcContext,
};
use isthmus_bpf_abi::{Address, Direction, DropReason, IDENTITY_HOST, IDENTITY_REMOTE_NODE, endpoint_flag};

use crate::{
    deliver, flow,
    metrics::count,
    outside, overlay,
    parse::{Frame, parse},
    send, tables,
};

/// `skb->pkt_type` of a packet for this node.
const PACKET_HOST: u32 = 0;

#[classifier]
fn isthmus_from_overlay(ctx: TcContext) -> i32 {
    let bytes = ctx.len();
    let (reason, verdict) = match decide(&ctx) {
        Ok(done) => done,
        Err(reason) => (reason, TC_ACT_SHOT),
    };
    count(reason, Direction::FromOverlay, bytes);
    verdict
}

#[inline(always)]
fn decide(ctx: &TcContext) -> Result<(DropReason, i32), DropReason> {
    // A VNI has 24 bits, so every other number is a cluster's identity or a reserved one.
    let identity = overlay::vni(ctx).ok_or(DropReason::NoTunnelKey)?;
    if identity == 0 {
        return Err(DropReason::InvalidVni);
    }
    let work = tables::work()?;
    work.outside = 0;
    if parse(ctx, &mut work.packet)? == Frame::Arp {
        return Err(DropReason::UnsupportedProtocol);
    }
    if tables::endpoint(&work.packet.source).is_some() {
        // No other node may speak for a pod of this one.
        return Err(DropReason::InvalidSource);
    }
    // The sender does not know this device's MAC address, so the kernel took the packet for a stranger's.
    // SAFETY: `skb` is the program's context.
    if unsafe { bpf_skb_change_type(ctx.skb.skb, PACKET_HOST) } != 0 {
        return Err(DropReason::WriteFailed);
    }
    match tables::endpoint(&work.packet.destination) {
        Some(endpoint) if endpoint.flags & endpoint_flag::HOST == 0 => {
            if flow::enabled() {
                flow::backward(ctx, work)?;
            }
            let is_node = matches!(identity, IDENTITY_HOST | IDENTITY_REMOTE_NODE);
            if is_node && work.packet.outcome == DropReason::Forwarded && outside::enabled() {
                outside::from_other_node(ctx, work)?;
            }
            return Ok((work.packet.outcome, deliver::to_pod(ctx, endpoint)?));
        }
        Some(_) => {}
        None if is_of_node(&work.packet.destination) => {}
        None => return Err(DropReason::UnknownDestination),
    }
    if !outside::enabled() {
        return Ok((DropReason::Forwarded, TC_ACT_OK));
    }
    outside::returning(ctx, work)?;
    if work.packet.outcome == DropReason::Forwarded {
        return Ok((DropReason::Forwarded, TC_ACT_OK));
    }
    send::onward(ctx, work)?;
    Ok((work.packet.outcome, work.verdict))
}

/// Whether `address` is one of the node's own. "None" is all zero, which no packet carries as destination.
#[inline(always)]
fn is_of_node(address: &Address) -> bool {
    tables::config().is_some_and(|config| {
        *address == config.router_ipv4
            || *address == config.router_ipv6
            || *address == config.node_ipv4
            || *address == config.node_ipv6
    })
}
