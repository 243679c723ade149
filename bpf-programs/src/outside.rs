//! Flows of clients outside: through a device of the node to a frontend, and back.
//!
//! A backend on this node sees the client's own address; its answer gets the frontend's at the pod's hook (or at the device, if
//! the node itself is the backend). A backend elsewhere sees an address of this node, so that its answer comes here.

use aya_ebpf::programs::TcContext;
use isthmus_bpf_abi::{
    CtValue, DropReason, PROTO_UDP, SCOPE_INTERNAL, ServiceKey, ct_flag, ct_state, feature, service_flag,
};

use crate::{ct, flow, icmp, l4, masquerade, parse::Fragment, tables, words, work::Work};

/// Whether the agent wants anything of packets from and to the outside.
#[inline(always)]
pub fn enabled() -> bool {
    let any = feature::NODE_PORT | feature::MASQUERADE_IPV4 | feature::MASQUERADE_IPV6;
    tables::config().is_some_and(|config| config.features & any != 0)
}

/// A packet from outside: returns whether it is for a frontend, whose flags are in `work` then, and so for [`flow::to_backend`]. An
/// answer to what left with an address of the node goes to who sent that; `work.packet.outcome` says so.
#[inline(never)]
pub fn frontend(ctx: &TcContext, work: &mut Work) -> Result<bool, DropReason> {
    if icmp::is_error(ctx, &work.packet) {
        icmp::outside(ctx, work)?;
        return Ok(false);
    }
    if !l4::tuple_or_echo(ctx, &work.packet, &mut work.tuple)? {
        return Ok(false);
    }
    let entry = tables::flow(&work.tuple);
    if let Some(entry) = entry {
        entry.copy_to(&mut work.flow);
        if work.flow.flags & ct_flag::REVERSE != 0 {
            // Without an address of the node it is on its way to a pod that asked a service: its own hook's business.
            if work.flow.flags & ct_flag::SNAT != 0 {
                flow::come_back(ctx, work, entry)?;
            }
            return Ok(false);
        }
        if work.flow.service_id == 0 {
            let tcp_flags = l4::tcp_flags(ctx, &work.packet)?;
            ct::touch(work, entry, tcp_flags);
            return Ok(false);
        }
    }
    let Some(service) = tables::service(&flow::frontend(&work.tuple)) else {
        direct(ctx, work)?;
        return Ok(false);
    };
    if !tables::has_feature(feature::NODE_PORT) {
        return Ok(false);
    }
    if service.flags & service_flag::EXTERNAL == 0 {
        if service.flags & service_flag::CLUSTER_IP != 0 {
            return Err(DropReason::ClusterIpOutside);
        }
        return Ok(false);
    }
    if tables::endpoint(&work.tuple.source).is_some() {
        // Who is on this node asks by another way: the source is forged.
        return Err(DropReason::InvalidSource);
    }
    if service.flags & service_flag::SOURCE_RANGES != 0
        && !tables::may_ask(service.service_id, &work.tuple.source)
    {
        return Err(DropReason::SourceRange);
    }
    work.service_flags = service.flags;
    Ok(true)
}

/// Whether a packet whose frontend leads nowhere must vanish rather than be answered: nobody is here, but
/// somebody elsewhere. Whoever spreads the clients over nodes will notice, and a reset would end what a retry saves.
#[inline(always)]
pub fn vanishes(work: &Work) -> bool {
    tables::has_feature(feature::NO_BACKEND_DROP)
        || work.packet.outcome == DropReason::NoBackend
            && work.service_flags & service_flag::EXTERNAL_LOCAL != 0
            && has_backends_elsewhere(work)
}

#[inline(always)]
fn has_backends_elsewhere(work: &Work) -> bool {
    let inside = ServiceKey {
        scope: SCOPE_INTERNAL,
        ..flow::frontend(&work.tuple)
    };
    tables::service(&inside).is_some_and(|service| service.count != 0)
}

/// A packet that came to an address of the node through the overlay: if it answers a client outside, it goes there.
#[inline(never)]
pub fn returning(ctx: &TcContext, work: &mut Work) -> Result<(), DropReason> {
    if icmp::is_error(ctx, &work.packet) {
        return icmp::outside(ctx, work);
    }
    if !l4::tuple(ctx, &work.packet, &mut work.tuple)? {
        return Ok(());
    }
    let Some(entry) = tables::flow(&work.tuple) else {
        return Ok(());
    };
    entry.copy_to(&mut work.flow);
    let answers = ct_flag::REVERSE | ct_flag::SNAT;
    if work.flow.flags & answers != answers {
        return Ok(());
    }
    flow::come_back(ctx, work, entry)
}

/// A packet to a pod that another node itself sent through the overlay: the pod's answer may go another way, and must not be
/// masqueraded there.
#[inline(never)]
pub fn from_other_node(ctx: &TcContext, work: &mut Work) -> Result<(), DropReason> {
    if !l4::tuple(ctx, &work.packet, &mut work.tuple)? {
        return Ok(());
    }
    let Some(entry) = tables::flow(&work.tuple) else {
        return direct(ctx, work);
    };
    entry.copy_to(&mut work.flow);
    if work.flow.flags & ct_flag::REVERSE == 0 && work.flow.service_id == 0 {
        let tcp_flags = l4::tcp_flags(ctx, &work.packet)?;
        ct::touch(work, entry, tcp_flags);
    }
    Ok(())
}

/// A packet that a process of the node sends outside: if it answers a client that asked a frontend, it seems to come from there.
#[inline(never)]
pub fn from_node(ctx: &TcContext, work: &mut Work) -> Result<(), DropReason> {
    // Most of what a node sends.
    if work.packet.proto == PROTO_UDP && is_tunnel(ctx, work)? {
        return Ok(());
    }
    flow::backward(ctx, work)
}

#[inline(always)]
fn is_tunnel(ctx: &TcContext, work: &Work) -> Result<bool, DropReason> {
    let port = tables::config().map_or(0, |config| config.tunnel_port);
    if port == 0 || work.packet.fragment != Fragment::Whole {
        return Ok(false);
    }
    Ok(l4::destination_port(ctx, &work.packet)? == port.to_be_bytes())
}

/// A packet to a pod, routed here from outside or sent by another node. Its flow is noted if the pod's answers would be masqueraded:
/// these must not be.
#[inline(always)]
fn direct(ctx: &TcContext, work: &mut Work) -> Result<(), DropReason> {
    if !l4::has_ports(work.tuple.proto)
        || tables::endpoint(&work.tuple.destination).is_none_or(|endpoint| endpoint.ifindex == 0)
        || !masquerade::hides_from(&work.tuple.source, work.packet.ipv4)
    {
        return Ok(());
    }
    work.flow.nat_address = work.tuple.destination;
    work.flow.nat_port = work.tuple.destination_port;
    begin(&mut work.flow, work.outside);
    if ct::is_pods_own(work) {
        return Ok(());
    }
    let tcp_flags = l4::tcp_flags(ctx, &work.packet)?;
    ct::create::<false>(work, tcp_flags)
}

/// Fills in a flow of who reaches a pod directly, but for where it goes.
#[inline(always)]
pub fn begin(flow: &mut CtValue, device: u32) {
    words::clear_peer(flow);
    flow.peer_port = [0; 2];
    flow.pad = [0; 2];
    flow.state = ct_state::OPENING;
    flow.flags = 0;
    flow.last_seen = ct::now();
    flow.backend_id = 0;
    flow.service_id = 0;
    flow.ifindex = device;
}
