//! Packets that another node sent through the overlay: ingress of the VXLAN device.
//!
//! The VNI is the source's identity, which the sending node vouches for. Destinations are pods of this node and the
//! node's own addresses; nothing is forwarded further. A backend's answer to a pod seems to come from the frontend.

use aya_ebpf::{
    bindings::{TC_ACT_OK, TC_ACT_SHOT},
    helpers::bpf_skb_change_type,
    macros::classifier,
    programs::TcContext,
};
use isthmus_bpf_abi::{Address, Direction, DropReason, NodeConfig, endpoint_flag};

use crate::{
    deliver, flow,
    metrics::count,
    overlay,
    parse::{Frame, parse},
    tables,
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
    if overlay::vni(ctx).ok_or(DropReason::NoTunnelKey)? == 0 {
        return Err(DropReason::InvalidVni);
    }
    let work = tables::work()?;
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
    if let Some(endpoint) = tables::endpoint(&work.packet.destination) {
        if endpoint.flags & endpoint_flag::HOST != 0 {
            return Ok((DropReason::Forwarded, TC_ACT_OK));
        }
        if flow::enabled() {
            flow::backward(ctx, work)?;
        }
        return Ok((work.packet.outcome, deliver::to_pod(ctx, endpoint)?));
    }
    match tables::config() {
        Some(config) if is_of_node(config, &work.packet.destination) => {
            Ok((DropReason::Forwarded, TC_ACT_OK))
        }
        _ => Err(DropReason::UnknownDestination),
    }
}

/// Whether `address` is one of the node's own. "None" is all zero, which no packet carries as destination.
#[inline(always)]
fn is_of_node(config: &NodeConfig, address: &Address) -> bool {
    *address == config.router_ipv4
        || *address == config.router_ipv6
        || *address == config.node_ipv4
        || *address == config.node_ipv6
}
