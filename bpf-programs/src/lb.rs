//! Load balancing of socket calls: from a frontend to a backend, and back.

use aya_ebpf::{
    helpers::{bpf_get_prandom_u32, bpf_set_retval},
    programs::SockAddrContext,
};
use isthmus_bpf_abi::{
    Address, Backend, Direction, DropReason, PROTO_UDP, ReverseSkKey, ReverseSkValue, SELECT_TRIES_MAX,
    ServiceKey, flow_hash, next_slot, pick_slot,
};

use crate::{
    metrics::count,
    sock::{self, ALLOW, Family, REFUSE},
    tables,
};

/// errno of a frontend that has nothing behind it: what an address nobody answers for gives.
const EHOSTUNREACH: i32 = 113;
/// errno when the way back cannot be remembered.
const ENOMEM: i32 = 12;

/// How the slot is chosen.
#[derive(Clone, Copy)]
pub enum Choice {
    /// Anew for each call: a connection is one call.
    Random,
    /// By socket and frontend: datagrams of one conversation are many calls.
    Sticky,
}

/// What the tables say about a frontend.
enum Selection {
    /// No frontend has this address, port and protocol.
    NotAService,
    /// Go there.
    Backend { backend: Backend, service_id: u32 },
    /// A frontend, but nowhere to go.
    Nowhere(DropReason),
}

/// Sends a call that names a frontend to one of its backends; leaves others alone. Returns the hook's verdict.
#[inline(always)]
pub fn translate(ctx: &SockAddrContext, family: Family, choice: Choice) -> i32 {
    let (address, port) = sock::address(ctx, family);
    let proto = sock::proto(ctx);
    let frontend = ServiceKey {
        address,
        port,
        slot: 0,
        proto,
        scope: 0,
        pad: [0; 2],
    };
    let cookie = sock::cookie(ctx);
    let (backend, service_id) = match select(&frontend, family, choice, cookie) {
        Selection::NotAService => return ALLOW,
        Selection::Nowhere(reason) => return refuse(reason, EHOSTUNREACH),
        Selection::Backend { backend, service_id } => (backend, service_id),
    };
    let key = reverse_key(cookie, &backend.address, backend.port, proto);
    let value = ReverseSkValue {
        address,
        service_id,
        port,
        pad: [0; 2],
    };
    // Many datagrams, one way back: a lookup also marks the entry as used, an insert would take a lock each time.
    if tables::reverse(&key) != Some(value)
        && tables::remember_reverse(&key, &value).is_err()
        && proto == PROTO_UDP
    {
        // Answers would seem to come from a stranger. TCP needs the way back for getpeername alone and goes on.
        return refuse(DropReason::ReverseFailed, ENOMEM);
    }
    sock::set_address(ctx, family, &backend.address, backend.port);
    count(DropReason::Translated, Direction::Socket, 0);
    ALLOW
}

/// Shows the frontend instead of the backend, if this socket reached that backend through one.
#[inline(always)]
pub fn restore(ctx: &SockAddrContext, family: Family) {
    let (address, port) = sock::address(ctx, family);
    let key = reverse_key(sock::cookie(ctx), &address, port, sock::proto(ctx));
    if let Some(frontend) = tables::reverse(&key)
        && sock::fits(&frontend.address, family)
    {
        sock::set_address(ctx, family, &frontend.address, frontend.port);
    }
}

/// Follows frontend, slot, backend. A miss on the way means that the agent is just changing the service: start again
/// at the frontend, which may have another count by then, and take the next slot; a bounded number of times.
#[inline(always)]
fn select(frontend: &ServiceKey, family: Family, choice: Choice, cookie: u64) -> Selection {
    let mut reason = DropReason::BackendGone;
    let mut number = 0;
    for attempt in 0..SELECT_TRIES_MAX {
        let Some(service) = tables::service(frontend) else {
            // Gone between two tries: it was one when the call began, and its address still leads nowhere.
            return if attempt == 0 {
                Selection::NotAService
            } else {
                Selection::Nowhere(DropReason::BackendGone)
            };
        };
        if service.count == 0 {
            return Selection::Nowhere(DropReason::NoBackend);
        }
        number = match choice {
            _ if attempt > 0 => next_slot(number, service.count),
            // SAFETY: no arguments, no memory.
            Choice::Random => pick_slot(unsafe { bpf_get_prandom_u32() }, service.count),
            Choice::Sticky => pick_slot(flow_hash(cookie, &frontend.address, frontend.port), service.count),
        };
        let Some(slot) = tables::service(&frontend.at_slot(number)) else {
            continue;
        };
        if slot.service_id != service.service_id {
            continue;
        }
        let Some(backend) = tables::backend(slot.backend_id) else {
            continue;
        };
        if !sock::fits(&backend.address, family) {
            reason = DropReason::FamilyMismatch;
            continue;
        }
        return Selection::Backend {
            backend,
            service_id: service.service_id,
        };
    }
    Selection::Nowhere(reason)
}

#[inline(always)]
fn reverse_key(cookie: u64, address: &Address, port: [u8; 2], proto: u8) -> ReverseSkKey {
    ReverseSkKey {
        cookie,
        address: *address,
        port,
        proto,
        pad: [0; 5],
    }
}

#[inline(always)]
fn refuse(reason: DropReason, errno: i32) -> i32 {
    count(reason, Direction::Socket, 0);
    // SAFETY: takes a number; allowed in connect and sendmsg hooks since Linux 5.18.
    unsafe { bpf_set_retval(-errno) };
    REFUSE
}
