//! Packets that the node itself sends into the overlay: egress of the VXLAN device, to which the node's stack has a
//! route for every remote pod CIDR. They get their tunnel data here; packets of pods have it already. A process that answers a
//! remote pod which asked a frontend of this node seems to be that frontend.

use aya_ebpf::{
    bindings::{TC_ACT_OK, TC_ACT_SHOT},
    macros::classifier,
    programs::TcContext,
};
use isthmus_bpf_abi::{Direction, DropReason};

use crate::{
    metrics::count,
    outside,
    overlay::{self, Route},
    parse::{Frame, parse},
    tables,
};

#[classifier]
fn isthmus_to_overlay(ctx: TcContext) -> i32 {
    if overlay::vni(&ctx).is_some() {
        // Counted when the pod sent it.
        return TC_ACT_OK;
    }
    let bytes = ctx.len();
    let (reason, verdict) = match decide(&ctx) {
        Ok(reason) => (reason, TC_ACT_OK),
        Err(reason) => (reason, TC_ACT_SHOT),
    };
    count(reason, Direction::ToOverlay, bytes);
    verdict
}

#[inline(always)]
fn decide(ctx: &TcContext) -> Result<DropReason, DropReason> {
    let work = tables::work()?;
    work.outside = 0;
    if parse(ctx, &mut work.packet)? == Frame::Arp {
        return Err(DropReason::UnsupportedProtocol);
    }
    let Route::Tunnel(entry) = overlay::route(tables::ipcache(&work.packet.destination))? else {
        return Err(DropReason::NoTunnelEndpoint);
    };
    let identity = identity(&work.packet.source);
    if outside::enabled() {
        outside::from_node(ctx, work)?;
    }
    overlay::encapsulate(ctx, identity, &entry)?;
    Ok(work.packet.outcome)
}

/// A pod's identity if the stack forwards for one, else the node's.
#[inline(always)]
fn identity(source: &[u8; 16]) -> u32 {
    if let Some(endpoint) = tables::endpoint(source)
        && endpoint.identity != 0
    {
        return endpoint.identity;
    }
    overlay::node_identity()
}
