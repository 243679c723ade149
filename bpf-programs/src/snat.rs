//! Ports of the node that stand for others' addresses and ports: of clients outside, and of pods that leave the mesh.
//!
//! A flow has its port when it has made the entry of its way back, which holds that port and the far end: two flows may have one
//! port if they talk to different ends. The ports that a flow tries depend on nothing but the flow, so one whose entry was
//! evicted finds its port again. An entry that is over is taken over, by who has the claim on its key: an entry of its own.

use isthmus_bpf_abi::{
    Address, DropReason, PROTO_SCTP, SNAT_TRIES_MAX, ct_flag, ct_is_expired, ct_pair, ct_state,
    is_ipv4_mapped, snat_port, tuple_hash,
};

use crate::{
    ct,
    overlay::{self, Route},
    tables,
    work::Work,
};

/// The node's address that stands for clients towards a backend elsewhere: behind the overlay the router's, whose answers come
/// back through the overlay.
#[inline(always)]
pub fn source_towards(backend: &Address) -> Result<Address, DropReason> {
    match overlay::route(tables::ipcache(backend))? {
        Route::Tunnel(_) => router(backend),
        Route::Stack => {
            let config = tables::config().ok_or(DropReason::NotConfigured)?;
            known(if is_ipv4_mapped(backend) {
                config.node_ipv4
            } else {
                config.node_ipv6
            })
        }
    }
}

/// The router's address of a backend's family.
#[inline(always)]
pub fn router(backend: &Address) -> Result<Address, DropReason> {
    let config = tables::config().ok_or(DropReason::NotConfigured)?;
    known(if is_ipv4_mapped(backend) {
        config.router_ipv4
    } else {
        config.router_ipv6
    })
}

#[inline(always)]
fn known(address: Address) -> Result<Address, DropReason> {
    if address == [0; 16] {
        Err(DropReason::NotConfigured)
    } else {
        Ok(address)
    }
}

/// Finds the port that the flow in `work`, whose first entry stands there but for the port, has by its other entry, and fills it in
/// with what that one says: the first entry was evicted, and claiming anew might give another port.
#[inline(never)]
pub fn find(work: &mut Work) -> bool {
    let (min, max) = match tables::config() {
        Some(config) => (config.snat_port_min, config.snat_port_max),
        None => return false,
    };
    if min > max {
        return false;
    }
    ct_pair(&work.tuple, &work.flow, &mut work.pair_key, &mut work.pair);
    let hash = tuple_hash(&work.tuple);
    for attempt in 0..SNAT_TRIES_MAX {
        let port = snat_port(hash, attempt, min, max);
        work.pair_key.destination_port = port;
        if let Some(entry) = tables::flow(&work.pair_key) {
            entry.copy_to(&mut work.other);
            if ct::is_same(&work.other, &work.pair) {
                work.flow.peer_port = port;
                work.flow.state = work.other.state;
                work.flow.flags = work.other.flags ^ ct_flag::REVERSE;
                return true;
            }
        }
    }
    false
}

/// Finds a port for the new flow in `work`, whose first entry stands there but for the port, and writes the other entry.
#[inline(never)]
pub fn claim(work: &mut Work) -> Result<(), DropReason> {
    let (min, max) = match tables::config() {
        Some(config) => (config.snat_port_min, config.snat_port_max),
        None => (0, 0),
    };
    if min == 0 || min > max {
        return Err(DropReason::NotConfigured);
    }
    ct_pair(&work.tuple, &work.flow, &mut work.pair_key, &mut work.pair);
    let hash = tuple_hash(&work.tuple);
    for attempt in 0..SNAT_TRIES_MAX {
        // Another port would need another checksum there.
        let port = if work.tuple.proto == PROTO_SCTP {
            work.tuple.source_port
        } else {
            snat_port(hash, attempt, min, max)
        };
        work.flow.peer_port = port;
        work.pair_key.destination_port = port;
        if tables::add_flow(&work.pair_key, &work.pair).is_ok() {
            return Ok(());
        }
        // The first half of the tries spares flows that are just closing: their last packets may still come.
        let closing_too = attempt >= SNAT_TRIES_MAX / 2;
        let taken = match standing(work, closing_too) {
            Standing::Lives => Taken::No,
            Standing::Own => put(work),
            Standing::Over => take_over(work, closing_too),
        };
        if let Taken::Yes = taken {
            return Ok(());
        }
    }
    Err(DropReason::NoSnatPort)
}

/// [`isthmus_bpf_abi::CtKey::pad`] of the claim on a key.
const CLAIM: [u8; 3] = [1, 0, 0];

#[repr(u8)]
enum Taken {
    Yes,
    No,
}

/// Takes the entry of a flow that is over. Of several that found it so the first has it, and the others go on to their next
/// port.
#[inline(never)]
fn take_over(work: &mut Work, closing_too: bool) -> Taken {
    work.pair_key.pad = CLAIM;
    let claimed = tables::add_flow(&work.pair_key, &work.pair).is_ok();
    work.pair_key.pad = [0; 3];
    if !claimed {
        return Taken::No;
    }
    let taken = match standing(work, closing_too) {
        Standing::Over => {
            forget_other(work);
            put(work)
        }
        _ => Taken::No,
    };
    work.pair_key.pad = CLAIM;
    tables::remove_flow(&work.pair_key);
    work.pair_key.pad = [0; 3];
    taken
}

#[repr(u8)]
enum Standing {
    /// The entry that is there is this flow's.
    Own,
    /// Another flow's that may go on.
    Lives,
    /// Another flow's that will not.
    Over,
}

/// Looks at the entry that has the flow's key.
#[inline(always)]
fn standing(work: &mut Work, closing_too: bool) -> Standing {
    let Some(entry) = tables::flow(&work.pair_key) else {
        // No memory for it, or gone this moment.
        return Standing::Lives;
    };
    entry.copy_to(&mut work.other);
    if ct::is_same(&work.other, &work.pair) {
        Standing::Own
    } else if ct_is_expired(&work.pair_key, &work.other, work.pair.last_seen)
        || closing_too && work.other.state == ct_state::CLOSING
    {
        Standing::Over
    } else {
        Standing::Lives
    }
}

#[inline(always)]
fn put(work: &mut Work) -> Taken {
    match tables::put_flow(&work.pair_key, &work.pair) {
        Ok(()) => Taken::Yes,
        Err(_) => Taken::No,
    }
}

/// Removes the first entry of the flow whose way back is in `work.other`: it leads to a port that is another's now.
#[inline(always)]
fn forget_other(work: &mut Work) {
    ct_pair(
        &work.pair_key,
        &work.other,
        &mut work.other_key,
        &mut work.other_pair,
    );
    if let Some(entry) = tables::flow(&work.other_key) {
        if ct::is_same(entry.get(), &work.other_pair) {
            tables::remove_flow(&work.other_key);
        }
    }
}
