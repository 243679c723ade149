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
    overlay::{self, Route},
    parse::{Frame, Packet, parse},
    send, tables,
};

#[classifier]
fn isthmus_from_container(ctx: TcContext) -> i32 {
    let bytes = ctx.len();
    let (reason, verdict) = match decide(&ctx) {
        Ok(done) => done,
        Err(reason) => (reason, TC_ACT_SHOT),
    };
    count(reason, Direction::FromContainer, bytes);
    verdict
}

/// What the packet came to, and the verdict.
#[inline(always)]
fn decide(ctx: &TcContext) -> Result<(DropReason, i32), DropReason> {
    let work = tables::work()?;
    work.outside = 0;
    if parse(ctx, &mut work.packet)? == Frame::Arp {
        return Ok((DropReason::Forwarded, TC_ACT_OK));
    }
    if work.packet.is_link_control() {
        return Ok((DropReason::Forwarded, TC_ACT_OK));
    }
    let source = sender(ctx, &work.packet)?;
    if flow::enabled() {
        if flow::is_for_frontend(ctx, work)? {
            flow::to_backend(ctx, work)?;
        }
        if work.packet.outcome.is_drop() {
            return refuse(ctx, &work.packet, source);
        }
    }
    if let Some(endpoint) = tables::endpoint(&work.packet.destination) {
        if endpoint.flags & endpoint_flag::HOST != 0 {
            return Ok((work.packet.outcome, TC_ACT_OK));
        }
        if work.packet.outcome == DropReason::Forwarded && flow::enabled() {
            flow::backward(ctx, work)?;
        }
        return Ok((work.packet.outcome, deliver::to_pod(ctx, endpoint)?));
    }
    if work.packet.outcome == DropReason::Forwarded && outside::enabled() {
        flow::backward(ctx, work)?;
        if work.packet.outcome != DropReason::Forwarded {
            // An answer to a client outside: it has the frontend's address, and no way through the stack.
            send::onward(ctx, work)?;
            return Ok((work.packet.outcome, work.verdict));
        }
    }
    match overlay::route(tables::ipcache(&work.packet.destination))? {
        Route::Stack => Ok((work.packet.outcome, TC_ACT_OK)),
        Route::Tunnel(entry) => {
            let verdict = overlay::send(ctx, source.identity, &entry)?;
            Ok((work.packet.outcome, verdict))
        }
    }
}

/// The answer to a packet whose frontend leads nowhere, back to the pod that sent it.
#[inline(always)]
fn refuse(ctx: &TcContext, packet: &Packet, source: &Endpoint) -> Result<(DropReason, i32), DropReason> {
    if tables::has_feature(feature::NO_BACKEND_DROP) {
        return Err(packet.outcome);
    }
    answer::refuse(ctx, packet)?;
    Ok((packet.outcome, deliver::to_pod(ctx, source)?))
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
