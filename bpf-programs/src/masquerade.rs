//! Masquerading: what a pod sends out of the mesh leaves with an address of the node, for nobody outside knows the way to pods.
//!
//! Not masqueraded are packets to who knows the way to pods (not other nodes: they know it through the overlay alone), to prefixes
//! that the agent has excluded, and answers of pods to who reached them directly: such flows are noted at their first packet.
//! A TCP flow whose entries are gone goes on, with its own port as far as that can be found.

use aya_ebpf::programs::TcContext;
use isthmus_bpf_abi::{Address, DropReason, PROTO_TCP, TCP_ACK, TCP_SYN, ct_flag, ct_state, feature};

use crate::{ct, flow, icmp, l4, outside, parse::Fragment, snat, tables, work::Work};

/// Whether pods' own addresses are hidden from `address`.
#[inline(always)]
pub fn hides_from(address: &Address, ipv4: bool) -> bool {
    let wanted = if ipv4 {
        feature::MASQUERADE_IPV4
    } else {
        feature::MASQUERADE_IPV6
    };
    if !tables::has_feature(wanted) {
        return false;
    }
    let knows_pods = tables::ipcache(address).is_some_and(|entry| entry.knows_pods());
    !knows_pods && !tables::keeps_source(address)
}

/// A packet of a pod that leaves through a device to the outside. `work.packet.outcome` says whether it was translated.
#[inline(never)]
pub fn outbound(ctx: &TcContext, work: &mut Work) -> Result<(), DropReason> {
    if !hides_from(&work.packet.destination, work.packet.ipv4) {
        return Ok(());
    }
    if icmp::is_error(ctx, &work.packet) {
        return icmp::masqueraded(ctx, work);
    }
    if !l4::tuple_or_echo(ctx, &work.packet, &mut work.tuple)? {
        // The pod's address must not get out, and there is nothing by which an answer could be told.
        return Err(if work.packet.fragment == Fragment::Later {
            DropReason::FragmentUnknown
        } else {
            DropReason::UnsupportedTransport
        });
    }
    let tcp_flags = l4::tcp_flags(ctx, &work.packet)?;
    if let Some(entry) = tables::flow(&work.tuple) {
        entry.copy_to(&mut work.flow);
        // A pod that begins a connection answers nobody, whoever has tried to reach it with these ports.
        let begins = tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN && work.flow.service_id == 0;
        if work.flow.flags & ct_flag::REVERSE != 0 && !begins {
            // An answer to who reached the pod directly.
            if work.flow.service_id == 0 {
                ct::touch(work, entry, tcp_flags);
            }
            return Ok(());
        }
        if work.flow.flags & ct_flag::SNAT != 0 {
            ct::touch(work, entry, tcp_flags);
            return hide(ctx, work);
        }
    }
    if work.tuple.proto == PROTO_TCP {
        if tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN | TCP_ACK {
            // The answer to who reached the pod another way than through our devices.
            return note_answer(work);
        }
        begin(work)?;
        if tcp_flags & TCP_SYN == 0 && snat::find(work) {
            ct::resume(work, tcp_flags)?;
            return hide(ctx, work);
        }
    } else if work.tuple.source_port == [0; 2] {
        // An echo's answer.
        return Ok(());
    } else {
        begin(work)?;
    }
    ct::create::<true>(work, tcp_flags)?;
    hide(ctx, work)
}

/// Notes the flow of which the pod's packet is an answer: it goes on with the pod's address.
#[inline(always)]
fn note_answer(work: &mut Work) -> Result<(), DropReason> {
    let tuple = &work.tuple;
    work.flow.nat_address = tuple.source;
    work.flow.nat_port = tuple.source_port;
    outside::begin(&mut work.flow, work.outside);
    work.flow.flags = ct_flag::REVERSE;
    tables::put_flow(&work.tuple, &work.flow).map_err(|_| DropReason::CtFull)
}

/// Fills in a new flow but for its port.
#[inline(always)]
fn begin(work: &mut Work) -> Result<(), DropReason> {
    let config = tables::config().ok_or(DropReason::NotConfigured)?;
    let device = tables::device(work.outside);
    if work.packet.ipv4 {
        work.flow.peer_address = device.map_or(config.node_ipv4, |device| device.ipv4);
    } else {
        work.flow.peer_address = device.map_or(config.node_ipv6, |device| device.ipv6);
    }
    if work.flow.peer_address == [0; 16] {
        // A device without an address of this family.
        return Err(DropReason::NotConfigured);
    }
    work.flow.nat_address = work.tuple.destination;
    work.flow.nat_port = work.tuple.destination_port;
    work.flow.peer_port = [0; 2];
    work.flow.pad = [0; 2];
    work.flow.state = ct_state::OPENING;
    work.flow.flags = ct_flag::SNAT;
    work.flow.last_seen = ct::now();
    work.flow.backend_id = 0;
    work.flow.service_id = 0;
    work.flow.ifindex = work.outside;
    Ok(())
}

#[inline(always)]
fn hide(ctx: &TcContext, work: &mut Work) -> Result<(), DropReason> {
    l4::remember_fragment(&work.packet, &work.tuple);
    work.packet.outcome = DropReason::Translated;
    flow::hide_client(ctx, work)
}
