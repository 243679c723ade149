//! Packets that a pod sends: ingress of the host's side of its veth pair.
//!
//! A packet with a source that is not the pod's is dropped; one for a frontend gets a backend, or is answered at once if
//! there is none. An answer to a client outside gets the frontend's address and leaves. Then one for a pod of this node goes there directly; one for an address behind another node goes into
//! the overlay with the pod's identity; the rest is the stack's.

use aya_ebpf::{
    bindings::{TC_ACT_OK, TC_ACT_SHOT},
    macros::classifier,
    programs::TcContext,
};
use isthmus_bpf_abi::{Direction, DropReason, Endpoint, endpoint_flag, feature};

use crate::{
    answer, deliver, flow,
    metrics::count,
    outside,
    parse::{Frame, Packet, parse},
    send, tables,
    work::Work,
};

#[classifier]
fn isthmus_from_container(ctx: TcContext) -> i32 {
    let bytes = ctx.len();
    let (reason, verdict) = match tables::work() {
        Ok(work) => match decide(&ctx, work) {
            Ok(verdict) => (work.packet.outcome, verdict),
            Err(reason) => (reason, TC_ACT_SHOT),
        },
        Err(reason) => (reason, TC_ACT_SHOT),
    };
    count(reason, Direction::FromContainer, bytes);
    verdict
}

/// The verdict; `work.packet.outcome` says what the packet came to.
#[inline(always)]
fn decide(ctx: &TcContext, work: &mut Work) -> Result<i32, DropReason> {
    work.outside = 0;
    if parse(ctx, &mut work.packet)? == Frame::Arp {
        return Ok(TC_ACT_OK);
    }
    if work.packet.is_link_control() {
        return Ok(TC_ACT_OK);
    }
    let source = sender(ctx, &work.packet)?;
    if flow::enabled() {
        if flow::is_for_frontend(ctx, work)? {
            flow::to_backend::<false>(ctx, work)?;
        }
        if work.packet.outcome.is_drop() {
            return refuse(ctx, &work.packet, source);
        }
    }
    let endpoint = tables::endpoint(&work.packet.destination);
    if let Some(endpoint) = endpoint
        && endpoint.flags & endpoint_flag::HOST == 0
    {
        if work.packet.outcome == DropReason::Forwarded && flow::enabled() {
            flow::backward(ctx, work)?;
        }
        return deliver::to_pod(ctx, endpoint);
    }
    if work.packet.outcome == DropReason::Forwarded && outside::enabled() {
        flow::backward(ctx, work)?;
        if work.packet.outcome != DropReason::Forwarded {
            // An answer to a client outside: it has the frontend's address, and no way through the stack.
            send::onward(ctx, work)?;
            return Ok(work.verdict);
        }
    }
    if endpoint.is_some() {
        // The node itself.
        return Ok(TC_ACT_OK);
    }
    send::of_pod(ctx, work, source.identity)?;
    Ok(work.verdict)
}

/// The answer to a packet whose frontend leads nowhere, back to the pod that sent it.
#[inline(always)]
fn refuse(ctx: &TcContext, packet: &Packet, source: &Endpoint) -> Result<i32, DropReason> {
    if tables::has_feature(feature::NO_BACKEND_DROP) {
        return Err(packet.outcome);
    }
    answer::refuse(ctx, packet)?;
    deliver::to_pod(ctx, source)
}

/// The endpoint behind this veth pair, if the packet's source addresses are its own.
#[inline(always)]
fn sender(ctx: &TcContext, packet: &Packet) -> Result<&'static Endpoint, DropReason> {
    let endpoint = tables::endpoint(&packet.source).ok_or(DropReason::InvalidSource)?;
    // SAFETY: `skb` is the program's context; the verifier allows this load.
    let ifindex = unsafe { (*ctx.skb.skb).ifindex };
    if endpoint.ifindex != ifindex {
        return Err(DropReason::InvalidSource);
    }
    if endpoint.pod_mac != packet.source_mac {
        return Err(DropReason::InvalidSourceMac);
    }
    Ok(endpoint)
}
