//! Conntrack of translated flows: finding, making and keeping alive the two entries of a flow.

use aya_ebpf::helpers::bpf_ktime_get_coarse_ns;
use isthmus_bpf_abi::{CtKey, CtValue, DropReason, ct_flag, ct_is_expired, ct_pair, ct_state, ct_step};

use crate::{entry::Entry, snat, tables, work::Work};

const NANOSECONDS: u64 = 1_000_000_000;

/// Seconds of the monotonic clock.
#[inline(always)]
pub fn now() -> u32 {
    // SAFETY: no arguments, no memory.
    (unsafe { bpf_ktime_get_coarse_ns() } / NANOSECONDS) as u32
}

/// Writes both entries of the new flow in `work`, which its first packet has begun: first the way back, so that no answer finds
/// it missing. `SNAT` says whether the flow may need a port of the node.
#[inline(always)]
pub fn create<const SNAT: bool>(work: &mut Work, tcp_flags: u8) -> Result<(), DropReason> {
    (work.flow.state, work.flow.flags) =
        ct_step(work.tuple.proto, work.flow.state, work.flow.flags, tcp_flags);
    if SNAT && work.flow.flags & ct_flag::SNAT != 0 {
        snat::claim(work)?;
    } else {
        ct_pair(&work.tuple, &work.flow, &mut work.pair_key, &mut work.pair);
        tables::put_flow(&work.pair_key, &work.pair).map_err(|_| DropReason::CtFull)?;
    }
    tables::put_flow(&work.tuple, &work.flow).map_err(|_| DropReason::CtFull)
}

/// Writes the first entry of the flow in `work` again, whose other entry is there and hears of the flow at its next news.
#[inline(always)]
pub fn resume(work: &mut Work, tcp_flags: u8) -> Result<(), DropReason> {
    (work.flow.state, work.flow.flags) =
        ct_step(work.tuple.proto, work.flow.state, work.flow.flags, tcp_flags);
    tables::put_flow(&work.tuple, &work.flow).map_err(|_| DropReason::CtFull)
}

/// Removes both entries of the flow in `work`, as they are for packets to the frontend.
#[inline(never)]
pub fn remove(work: &mut Work) -> u32 {
    ct_pair(&work.tuple, &work.flow, &mut work.pair_key, &mut work.pair);
    tables::remove_flow(&work.tuple);
    if let Some(other) = tables::flow(&work.pair_key) {
        if is_same(other.get(), &work.pair) {
            tables::remove_flow(&work.pair_key);
        }
    }
    0
}

/// Notes a packet of the flow in `work`, whose entry this is. The other entry hears of it when there is news, and once a
/// second: that keeps both alive, or brings back one that was evicted.
#[inline(always)]
pub fn touch(work: &mut Work, entry: Entry, tcp_flags: u8) {
    let now = now();
    let flow = &mut work.flow;
    let (state, flags) = ct_step(work.tuple.proto, flow.state, flow.flags, tcp_flags);
    // The client comes another way than before.
    let moved = work.outside != 0 && flags & ct_flag::REVERSE == 0 && flow.ifindex != work.outside;
    if state == flow.state && flags == flow.flags && now == flow.last_seen && !moved {
        return;
    }
    if moved {
        flow.ifindex = work.outside;
    }
    flow.state = state;
    flow.flags = flags;
    flow.last_seen = now;
    entry.update(flow);
    refresh_pair(work);
}

#[inline(never)]
fn refresh_pair(work: &mut Work) -> u32 {
    ct_pair(&work.tuple, &work.flow, &mut work.pair_key, &mut work.pair);
    match tables::flow(&work.pair_key) {
        Some(other) => {
            if is_same(other.get(), &work.pair) {
                other.update(&work.pair);
            } else if work.flow.flags & ct_flag::SNAT != 0 {
                // The port is another flow's since this one's entry for it was evicted: no answer would come back.
                tables::remove_flow(&work.tuple);
            }
            // Else the client has begun another flow with these ports, which owns the entry now.
        }
        // A port of the node belongs to who adds its entry first: if that is another flow meanwhile, the next touch finds it.
        None if work.flow.flags & ct_flag::SNAT != 0 => drop(tables::add_flow(&work.pair_key, &work.pair)),
        // Without memory for it the next second tries again.
        None => drop(tables::put_flow(&work.pair_key, &work.pair)),
    }
    0
}

/// Whether the way back of the new flow in `work`, which somebody outside has begun, is the first entry of a flow that a pod has begun
/// and that goes on: nobody outside may take that.
#[inline(always)]
pub fn is_pods_own(work: &mut Work) -> bool {
    ct_pair(&work.tuple, &work.flow, &mut work.pair_key, &mut work.pair);
    let Some(entry) = tables::flow(&work.pair_key) else {
        return false;
    };
    let other = entry.get();
    other.flags & ct_flag::REVERSE == 0
        && other.state != ct_state::CLOSING
        && !ct_is_expired(&work.pair_key, other, work.flow.last_seen)
}

/// Whether the new flow from `tuple` to where `flow` says would take the way back from another flow, which goes through another
/// frontend. A pod's flow to itself has the loopback address there and meets none but its like. `pair_key` is room to work in.
#[inline(always)]
pub fn collides(tuple: &CtKey, flow: &CtValue, pair_key: &mut CtKey) -> bool {
    pair_key.source = flow.nat_address;
    pair_key.source_port = flow.nat_port;
    pair_key.destination = tuple.source;
    pair_key.destination_port = tuple.source_port;
    pair_key.proto = tuple.proto;
    pair_key.pad = tuple.pad;
    let Some(other) = tables::flow(pair_key) else {
        return false;
    };
    let other = other.get();
    let same = other.nat_address == tuple.destination && other.nat_port == tuple.destination_port;
    !same && other.state != ct_state::CLOSING && !ct_is_expired(pair_key, other, flow.last_seen)
}

/// Whether two entries translate alike.
#[inline(always)]
pub fn is_same(a: &CtValue, b: &CtValue) -> bool {
    a.nat_address == b.nat_address
        && a.nat_port == b.nat_port
        && a.peer_address == b.peer_address
        && a.peer_port == b.peer_port
}
