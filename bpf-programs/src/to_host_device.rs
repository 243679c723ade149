//! Packets to the outside: egress of the node's devices that lead there.
//!
//! A pod's packet that leaves the mesh gets an address of the node as its source; the answer of a process of the node to a client
//! that asked a frontend gets the frontend's; all else leaves as it is.

use aya_ebpf::{
    bindings::{TC_ACT_OK, TC_ACT_SHOT},
    macros::classifier,
    programs::TcContext,
};
use isthmus_bpf_abi::{Direction, DropReason, endpoint_flag, feature};

use crate::{
    masquerade,
    metrics::count,
    outside,
    parse::{Frame, parse},
    tables,
};

#[classifier]
fn isthmus_to_host_device(ctx: TcContext) -> i32 {
    let bytes = ctx.len();
    let (reason, verdict) = match decide(&ctx) {
        Ok(reason) => (reason, TC_ACT_OK),
        Err(reason) => (reason, TC_ACT_SHOT),
    };
    count(reason, Direction::ToHostDevice, bytes);
    verdict
}

#[inline(always)]
fn decide(ctx: &TcContext) -> Result<DropReason, DropReason> {
    if !outside::enabled() {
        return Ok(DropReason::Forwarded);
    }
    let work = tables::work()?;
    // SAFETY: `skb` is the program's context; the verifier allows this load.
    work.outside = unsafe { (*ctx.skb.skb).ifindex };
    if !matches!(parse(ctx, &mut work.packet), Ok(Frame::Ip)) || work.packet.is_link_control() {
        return Ok(DropReason::Forwarded);
    }
    match tables::endpoint(&work.packet.source) {
        // Forwarded for others, or ours and translated already.
        None => {}
        Some(endpoint) if endpoint.flags & endpoint_flag::HOST != 0 => {
            if tables::has_feature(feature::NODE_PORT) {
                outside::from_node(ctx, work)?;
            }
        }
        Some(_) => masquerade::outbound(ctx, work)?,
    }
    Ok(work.packet.outcome)
}
