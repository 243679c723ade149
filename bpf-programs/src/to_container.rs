//! Packets that the node's stack sends to a pod: egress of the host's side of its veth pair. Answers of backends that the
//! stack reached (the node's own processes, other networks) get their frontend back here. What other hooks deliver goes
//! another way and has it already.

use aya_ebpf::{
    bindings::{TC_ACT_OK, TC_ACT_SHOT},
    macros::classifier,
    programs::TcContext,
};
use isthmus_bpf_abi::{Direction, DropReason};

use crate::{
    flow,
    metrics::count,
    parse::{Frame, parse},
    tables,
};

#[classifier]
fn isthmus_to_container(ctx: TcContext) -> i32 {
    let bytes = ctx.len();
    let (reason, verdict) = match decide(&ctx) {
        Ok(reason) => (reason, TC_ACT_OK),
        Err(reason) => (reason, TC_ACT_SHOT),
    };
    count(reason, Direction::ToContainer, bytes);
    verdict
}

#[inline(always)]
fn decide(ctx: &TcContext) -> Result<DropReason, DropReason> {
    let work = tables::work()?;
    work.outside = 0;
    if parse(ctx, &mut work.packet)? == Frame::Arp {
        return Ok(DropReason::Forwarded);
    }
    if flow::enabled() {
        flow::backward(ctx, work)?;
    }
    Ok(work.packet.outcome)
}
