//! Load balancing of packets: to a backend of the frontend they name, and back.
//!
//! For packets that no socket hook has translated: of pods without the hooks, raw and forwarded ones. A packet to a
//! frontend goes to the backend that its flow has; a new flow, or one whose backend is gone, gets one. A backend in the
//! tables keeps its flows, whatever its state: only new ones avoid it.

use aya_ebpf::programs::TcContext;
use isthmus_bpf_abi::{
    Address, Backend, CtKey, CtValue, DropReason, LOOPBACK_IPV4, LOOPBACK_IPV6, PROTO_TCP, PROTO_UDP,
    SCOPE_EXTERNAL, ServiceKey, TCP_ACK, TCP_SYN, affinity_kind, backend_state, ct_flag, ct_state,
    endpoint_flag, feature, is_ipv4_mapped, loopback_of, service_flag, tuple_hash,
};

use crate::{
    ct,
    entry::Entry,
    icmp, l4,
    nat::{Side, rewrite},
    select::{Request, Selection, select},
    snat, tables, words,
    work::Work,
};

/// Whether the agent wants packets translated.
#[inline(always)]
pub fn enabled() -> bool {
    tables::has_feature(feature::PACKET_LB)
}

/// A packet of a pod: returns whether it is for a frontend, and so for [`to_backend`]. An error about a service's packet is
/// translated here, as is a pod's answer to itself; `work.packet.outcome` says so.
///
/// A function of its own in the object, like all that are not inlined here: the stack of one holds no more. And it returns before
/// the next is called, since the stacks of a chain of calls add up.
#[inline(never)]
pub fn is_for_frontend(ctx: &TcContext, work: &mut Work) -> Result<bool, DropReason> {
    if icmp::is_error(ctx, &work.packet) {
        icmp::forward(ctx, work)?;
        return Ok(false);
    }
    if !l4::tuple(ctx, &work.packet, &mut work.tuple)? {
        return Ok(false);
    }
    if work.packet.destination == LOOPBACK_IPV4 || work.packet.destination == LOOPBACK_IPV6 {
        answer_to_itself(ctx, work)?;
        return Ok(false);
    }
    Ok(tables::service(&frontend(&work.tuple)).is_some())
}

/// Sends the packet of the flow in `work.tuple`, which is to a frontend, to the flow's backend. `work.packet.outcome` says what
/// became of it; if that is a drop, its frontend leads nowhere and the sender should hear of it.
///
/// `OUTSIDE` says whether the packet comes from outside: what only those need is not in the programs of pods, so that the
/// verifier does not walk it there.
#[inline(never)]
pub fn to_backend<const OUTSIDE: bool>(ctx: &TcContext, work: &mut Work) -> Result<(), DropReason> {
    let tcp_flags = l4::tcp_flags(ctx, &work.packet)?;
    if let Err(reason) = find_backend::<OUTSIDE>(work, tcp_flags) {
        work.packet.outcome = reason;
        return Ok(());
    }
    l4::remember_fragment(&work.packet, &work.tuple);
    replace(ctx, work, Side::Destination, Part::Nat)?;
    if work.flow.flags & ct_flag::HAIRPIN != 0 {
        let loopback = loopback_of(&work.packet.source);
        replace_address(ctx, work, Side::Source, &loopback)?;
    } else if OUTSIDE && work.flow.flags & ct_flag::SNAT != 0 {
        hide_client(ctx, work)?;
    }
    work.packet.outcome = DropReason::Translated;
    Ok(())
}

/// A packet on its way to a pod: if a backend sent it, the frontend that the pod asked seems to have;
/// `work.packet.outcome` says so.
#[inline(never)]
pub fn backward(ctx: &TcContext, work: &mut Work) -> Result<(), DropReason> {
    if icmp::is_error(ctx, &work.packet) {
        return icmp::backward(ctx, work);
    }
    if !l4::tuple(ctx, &work.packet, &mut work.tuple)? {
        return Ok(());
    }
    let Some(entry) = tables::flow(&work.tuple) else {
        return Ok(());
    };
    entry.copy_to(&mut work.flow);
    // A packet with the loopback address never comes from another device than the pod's own. A flow through no service is
    // masquerading's.
    if work.flow.flags & (ct_flag::REVERSE | ct_flag::HAIRPIN) != ct_flag::REVERSE
        || work.flow.service_id == 0
    {
        return Ok(());
    }
    come_back(ctx, work, entry)
}

/// A pod that is its own backend answers: from the frontend, to itself.
#[inline(always)]
fn answer_to_itself(ctx: &TcContext, work: &mut Work) -> Result<(), DropReason> {
    let entry = tables::flow(&work.tuple).ok_or(DropReason::LoopbackUnknown)?;
    entry.copy_to(&mut work.flow);
    if work.flow.flags & ct_flag::REVERSE == 0 {
        return Err(DropReason::LoopbackUnknown);
    }
    let itself = work.packet.source;
    come_back(ctx, work, entry)?;
    replace_address(ctx, work, Side::Destination, &itself)
}

/// Lets a backend's packet seem to come from the frontend, and go to the client if the backend knows it by another address.
/// Every entry of the way back that a pod's hooks meet, [`ct_flag::HAIRPIN`] or not, is one of these.
#[inline(never)]
pub fn come_back(ctx: &TcContext, work: &mut Work, entry: Entry) -> Result<(), DropReason> {
    let tcp_flags = l4::tcp_flags(ctx, &work.packet)?;
    ct::touch(work, entry, tcp_flags);
    l4::remember_fragment(&work.packet, &work.tuple);
    work.packet.outcome = DropReason::Translated;
    replace(ctx, work, Side::Source, Part::Nat)?;
    if work.flow.flags & ct_flag::SNAT == 0 {
        return Ok(());
    }
    replace(ctx, work, Side::Destination, Part::Peer)
}

/// Gives the packet of the flow in `work` the node's address and the flow's port as its source.
#[inline(always)]
pub fn hide_client(ctx: &TcContext, work: &mut Work) -> Result<(), DropReason> {
    replace(ctx, work, Side::Source, Part::Peer)
}

/// Which of a flow's addresses, with its port.
enum Part {
    /// [`CtValue::nat_address`].
    Nat,
    /// [`CtValue::peer_address`].
    Peer,
}

/// Replaces one side of the packet of the flow in `work` by what the flow says: by name, so that no address is copied to the stack.
#[inline(always)]
fn replace(ctx: &TcContext, work: &mut Work, side: Side, part: Part) -> Result<(), DropReason> {
    let old = match side {
        Side::Source => (&work.tuple.source, work.tuple.source_port),
        Side::Destination => (&work.tuple.destination, work.tuple.destination_port),
    };
    let new = match part {
        Part::Nat => (&work.flow.nat_address, work.flow.nat_port),
        Part::Peer => (&work.flow.peer_address, work.flow.peer_port),
    };
    work.change.set(side, old, new);
    rewrite(ctx, &work.packet, &work.change)?;
    set_address(work, side);
    Ok(())
}

/// Notes what was just replaced.
#[inline(always)]
fn set_address(work: &mut Work, side: Side) {
    match side {
        Side::Source => work.packet.source = work.change.new,
        Side::Destination => work.packet.destination = work.change.new,
    }
}

#[inline(always)]
fn replace_address(ctx: &TcContext, work: &mut Work, side: Side, new: &Address) -> Result<(), DropReason> {
    let old = match side {
        Side::Source => &work.packet.source,
        Side::Destination => &work.packet.destination,
    };
    work.change.set_address(side, old, new);
    rewrite(ctx, &work.packet, &work.change)?;
    set_address(work, side);
    Ok(())
}

/// Fills in where the flow goes. The error says why nowhere.
#[inline(always)]
fn find_backend<const OUTSIDE: bool>(work: &mut Work, tcp_flags: u8) -> Result<(), DropReason> {
    match known(work, tcp_flags) {
        Standing::Stays => Ok(()),
        Standing::Over => Err(DropReason::BackendGone),
        Standing::MovesOn => {
            choose::<OUTSIDE>(work)?;
            ct::create::<OUTSIDE>(work, tcp_flags)
        }
    }
}

#[derive(Clone, Copy)]
#[repr(u8)]
enum Standing {
    /// The flow goes on as it was.
    Stays,
    /// It gets another backend, or its first.
    MovesOn,
    /// It cannot go on.
    Over,
}

/// Looks for the flow. One that does not stay as it was is forgotten.
#[inline(never)]
fn known(work: &mut Work, tcp_flags: u8) -> Standing {
    let Some(entry) = tables::flow(&work.tuple) else {
        return Standing::MovesOn;
    };
    entry.copy_to(&mut work.flow);
    let standing = standing(&work.flow, work.tuple.proto, tcp_flags);
    if matches!(standing, Standing::Stays) {
        ct::touch(work, entry, tcp_flags);
    } else {
        ct::remove(work);
    }
    standing
}

/// What a known flow comes to when its next packet to the frontend arrives.
#[inline(always)]
fn standing(known: &CtValue, proto: u8, tcp_flags: u8) -> Standing {
    let is_new = proto == PROTO_TCP && tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN;
    match tables::backend(known.backend_id) {
        Some(backend) if backend.address == known.nat_address && backend.port == known.nat_port => {
            if is_new && backend.state != backend_state::ACTIVE {
                Standing::MovesOn
            } else {
                Standing::Stays
            }
        }
        // Another backend knows nothing of this connection.
        _ if proto == PROTO_TCP && !is_new => Standing::Over,
        _ => Standing::MovesOn,
    }
}

/// Chooses a backend for a new flow. Not by chance but by the flow's own number: should its entry be evicted, it finds the
/// same backend again for as long as the service does not change (with a Maglev table, mostly even then).
#[inline(always)]
fn choose<const OUTSIDE: bool>(work: &mut Work) -> Result<(), DropReason> {
    match choose_among::<OUTSIDE>(work, false) {
        // Of two conversations between the same sockets the newer one has the answers; a client outside gets another port.
        Err(DropReason::TupleInUse) if work.tuple.proto == PROTO_UDP || OUTSIDE && may_hide(work) => {
            choose_among::<OUTSIDE>(work, true)
        }
        result => result,
    }
}

/// Whether the backends of the frontend may see the node instead of the client outside.
#[inline(always)]
fn may_hide(work: &Work) -> bool {
    work.service_flags & service_flag::EXTERNAL_LOCAL == 0
}

/// Whether `address` is the node's own.
#[inline(always)]
fn is_node(address: &Address) -> bool {
    tables::endpoint(address).is_some_and(|endpoint| endpoint.flags & endpoint_flag::HOST != 0)
}

/// Chooses among the backends to which the client's ports are free, or among all.
#[inline(never)]
fn choose_among<const OUTSIDE: bool>(work: &mut Work, all: bool) -> Result<(), DropReason> {
    let tuple = &work.tuple;
    let flow = &mut work.flow;
    let pair_key = &mut work.pair_key;
    let number = tuple_hash(tuple);
    let proto = tuple.proto;
    flow.state = ct_state::OPENING;
    flow.last_seen = ct::now();
    flow.ifindex = if OUTSIDE { work.outside } else { 0 };
    words::clear_peer(flow);
    flow.peer_port = [0; 2];
    flow.pad = [0; 2];
    work.frontend = frontend(tuple);
    work.client.client = tuple.source;
    work.client.kind = affinity_kind::ADDRESS;
    work.client.pad = [0; 3];
    let mut request = Request {
        frontend: &mut work.frontend,
        client: &mut work.client,
        flow: Some(number),
        outside: OUTSIDE,
    };
    let usable =
        |backend_id, backend: &Backend| match take::<OUTSIDE>(tuple, flow, pair_key, backend, backend_id) {
            // A connection to a process of the node can neither meet another nor be hidden.
            Err(DropReason::TupleInUse) if all && (proto == PROTO_UDP || !is_node(&backend.address)) => {
                Ok(())
            }
            result => result,
        };
    let found = select(&mut request, || number, usable);
    match found {
        Selection::Backend { service_id } => {
            work.flow.service_id = service_id;
            if !OUTSIDE && work.flow.nat_address == work.tuple.source {
                work.flow.flags = ct_flag::HAIRPIN;
            }
            // The node's stack would take its own router address for forged.
            if OUTSIDE && all && may_hide(work) && work.flow.flags == 0 && !is_node(&work.flow.nat_address) {
                work.flow.peer_address = snat::router(&work.flow.nat_address)?;
                work.flow.flags = ct_flag::SNAT;
            }
            Ok(())
        }
        Selection::Nowhere(reason) => Err(reason),
        // It was one a moment ago.
        Selection::NotAService => Err(DropReason::BackendGone),
    }
}

/// Lets the flow go to a backend, or says why it cannot.
#[inline(never)]
fn take<const OUTSIDE: bool>(
    tuple: &CtKey,
    flow: &mut CtValue,
    pair_key: &mut CtKey,
    backend: &Backend,
    backend_id: u32,
) -> Result<(), DropReason> {
    if is_ipv4_mapped(&backend.address) != is_ipv4_mapped(&tuple.destination) {
        return Err(DropReason::FamilyMismatch);
    }
    flow.nat_address = backend.address;
    flow.nat_port = backend.port;
    flow.backend_id = backend_id;
    flow.flags = 0;
    if OUTSIDE && tables::endpoint(&backend.address).is_none() {
        // Answers of a backend elsewhere must come back through this node.
        flow.peer_address = snat::source_towards(&backend.address)?;
        flow.flags = ct_flag::SNAT;
        return Ok(());
    }
    if ct::collides(tuple, flow, pair_key) {
        return Err(DropReason::TupleInUse);
    }
    Ok(())
}

/// The frontend that packets of a flow would be for.
#[inline(always)]
pub fn frontend(tuple: &CtKey) -> ServiceKey {
    ServiceKey {
        address: tuple.destination,
        port: tuple.destination_port,
        slot: 0,
        proto: tuple.proto,
        scope: SCOPE_EXTERNAL,
        pad: [0; 2],
    }
}
