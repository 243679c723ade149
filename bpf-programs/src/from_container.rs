//! Packets that a pod sends: ingress of the host's side of its veth pair.
//!
//! A packet with a source that is not the pod's is dropped; one for a frontend gets a backend, or is answered at once if
//! there is none. Then one for a pod of this node goes there directly; one for an address behind another node goes into
//! the overlay with the pod's identity; the rest is the stack's.

use aya_ebpf::{
    bindings::{TC_ACT_OK, TC_ACT_REDIRECT, TC_ACT_SHOT},
    helpers::bpf_redirect,
    macros::classifier,
    programs::TcContext,
};
use isthmus_bpf_abi::{Direction, DropReason, Endpoint, endpoint_flag, feature};

use crate::{
    answer, deliver, flow,
    metrics::count,
    overlay::{self, Route},
    parse::{Frame, Packet, parse},
    tables,
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
    if parse(ctx, &mut work.packet)? == Frame::Arp {
        return Ok((DropReason::Forwarded, TC_ACT_OK));
    }
    if work.packet.is_link_control() {
        return Ok((DropReason::Forwarded, TC_ACT_OK));
    }
    let source = sender(ctx, &work.packet)?;
    if flow::enabled() {
        flow::forward(ctx, work)?;
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
    match overlay::route(tables::ipcache(&work.packet.destination))? {
        Route::Stack => Ok((work.packet.outcome, TC_ACT_OK)),
        Route::Tunnel(entry) => {
            let vxlan_ifindex = tables::config().map_or(0, |config| config.vxlan_ifindex);
            if vxlan_ifindex == 0 {
                return Err(DropReason::NotConfigured);
            }
            overlay::encapsulate(ctx, source.identity, &entry)?;
            // SAFETY: takes numbers.
            match unsafe { bpf_redirect(vxlan_ifindex, 0) } {
                verdict if verdict == i64::from(TC_ACT_REDIRECT) => {
                    Ok((work.packet.outcome, TC_ACT_REDIRECT))
                }
                _ => Err(DropReason::RedirectFailed),
            }
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
