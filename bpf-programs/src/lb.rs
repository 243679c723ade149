//! Load balancing of socket calls: from a frontend to a backend, and back.

use aya_ebpf::{
    helpers::{bpf_get_prandom_u32, bpf_set_retval},
    programs::SockAddrContext,
};
use isthmus_bpf_abi::{
    Address, Backend, Direction, DropReason, PROTO_UDP, ReverseSkKey, ReverseSkValue, ServiceKey, flow_hash,
};

use crate::{
    metrics::count,
    select::{Request, Selection, select},
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

/// Sends a call that names a frontend to one of its backends; leaves others alone. Returns the hook's verdict.
#[inline(always)]
pub fn translate(ctx: &SockAddrContext, family: Family, choice: Choice) -> i32 {
    let (address, port) = sock::address(ctx, family);
    let proto = sock::proto(ctx);
    let mut frontend = ServiceKey {
        address,
        port,
        slot: 0,
        proto,
        scope: 0,
        pad: [0; 2],
    };
    let cookie = sock::cookie(ctx);
    let number = || match choice {
        // SAFETY: no arguments, no memory.
        Choice::Random => unsafe { bpf_get_prandom_u32() },
        Choice::Sticky => flow_hash(cookie, &address, port),
    };
    let mut backend = None;
    let fits = |_, candidate: &Backend| {
        if !sock::fits(&candidate.address, family) {
            return Err(DropReason::FamilyMismatch);
        }
        backend = Some(*candidate);
        Ok(())
    };
    let mut client = sock::client(ctx);
    let mut request = Request {
        frontend: &mut frontend,
        client: &mut client,
        // A socket's port is not known yet, and no other node will ask for it.
        flow: None,
        outside: false,
    };
    let service_id = match select(&mut request, number, fits) {
        Selection::NotAService => return ALLOW,
        Selection::Nowhere(reason) => return refuse(reason, EHOSTUNREACH),
        Selection::Backend { service_id } => service_id,
    };
    let Some(backend) = backend else {
        return refuse(DropReason::BackendGone, EHOSTUNREACH);
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
