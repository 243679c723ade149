//! Packets from outside: ingress of the node's devices that lead there.
//!
//! One for a frontend gets a backend, or is answered at once if there is none; an answer to what left with an address of the
//! node goes to who sent that; all else is the stack's, as if nobody had looked.

use aya_ebpf::{
    bindings::{TC_ACT_OK, TC_ACT_SHOT},
    macros::classifier,
    programs::TcContext,
};
use isthmus_bpf_abi::{Direction, DropReason};

use crate::{
    answer, flow,
    metrics::count,
    outside,
    parse::{Frame, parse},
    send, tables,
};

#[classifier]
fn isthmus_from_host_device(ctx: TcContext) -> i32 {
    let bytes = ctx.len();
    let (reason, verdict) = match decide(&ctx) {
        Ok(done) => done,
        Err(reason) => (reason, TC_ACT_SHOT),
    };
    count(reason, Direction::FromHostDevice, bytes);
    verdict
}

/// What the packet came to, and the verdict.
#[inline(always)]
fn decide(ctx: &TcContext) -> Result<(DropReason, i32), DropReason> {
    const STACK: Result<(DropReason, i32), DropReason> = Ok((DropReason::Forwarded, TC_ACT_OK));
    if !outside::enabled() {
        return STACK;
    }
    let work = tables::work()?;
    // SAFETY: `skb` is the program's context; the verifier allows this load.
    work.outside = unsafe { (*ctx.skb.skb).ifindex };
    // Frames of other protocols, or cut short, are none of ours.
    if !matches!(parse(ctx, &mut work.packet), Ok(Frame::Ip)) || work.packet.is_link_control() {
        return STACK;
    }
    if outside::frontend(ctx, work)? {
        flow::to_backend::<true>(ctx, work)?;
    }
    if work.packet.outcome == DropReason::Forwarded {
        return STACK;
    }
    if work.packet.outcome.is_drop() {
        if outside::vanishes(work) {
            return Err(work.packet.outcome);
        }
        answer::refuse(ctx, &work.packet)?;
        send::answer(ctx, work)?;
    } else {
        send::onward(ctx, work)?;
    }
    Ok((work.packet.outcome, work.verdict))
}
