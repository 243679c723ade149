//! Packets that a pod sends: ingress of the host's side of its veth pair.
//!
//! A packet with a source that is not the pod's is dropped; one for a pod of this node goes there directly; one for
//! an address behind another node goes into the overlay with the pod's identity; the rest is the stack's.

use aya_ebpf::{
    bindings::{TC_ACT_OK, TC_ACT_REDIRECT, TC_ACT_SHOT},
    helpers::bpf_redirect,
    macros::classifier,
    programs::TcContext,
};
use isthmus_bpf_abi::{Direction, DropReason, Endpoint, endpoint_flag};

use crate::{
    deliver,
    metrics::count,
    overlay::{self, Route},
    parse::{Frame, Packet, parse},
    tables,
};

#[classifier]
fn isthmus_from_container(ctx: TcContext) -> i32 {
    let bytes = ctx.len();
    let (reason, verdict) = match decide(&ctx) {
        Ok(verdict) => (DropReason::Forwarded, verdict),
        Err(reason) => (reason, TC_ACT_SHOT),
    };
    count(reason, Direction::FromContainer, bytes);
    verdict
}

#[inline(always)]
fn decide(ctx: &TcContext) -> Result<i32, DropReason> {
    let packet = match parse(ctx)? {
        Frame::Ip(packet) => packet,
        Frame::Arp => return Ok(TC_ACT_OK),
    };
    if packet.is_link_control() {
        return Ok(TC_ACT_OK);
    }
    let source = sender(ctx, &packet)?;
    if let Some(endpoint) = tables::endpoint(&packet.destination) {
        if endpoint.flags & endpoint_flag::HOST != 0 {
            return Ok(TC_ACT_OK);
        }
        return deliver::to_pod(ctx, endpoint);
    }
    match overlay::route(tables::ipcache(&packet.destination))? {
        Route::Stack => Ok(TC_ACT_OK),
        Route::Tunnel(entry) => {
            let vxlan_ifindex = tables::config().map_or(0, |config| config.vxlan_ifindex);
            if vxlan_ifindex == 0 {
                return Err(DropReason::NotConfigured);
            }
            overlay::encapsulate(ctx, source.identity, &entry)?;
            // SAFETY: takes numbers.
            match unsafe { bpf_redirect(vxlan_ifindex, 0) } {
                verdict if verdict == i64::from(TC_ACT_REDIRECT) => Ok(TC_ACT_REDIRECT),
                _ => Err(DropReason::RedirectFailed),
            }
        }
    }
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
