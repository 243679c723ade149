//! Reading and writing the address of a socket call, in the maps' common form.
//!
//! The kernel gives IPv4 and IPv6 hooks different fields of one structure; [`Family`] hides which. An IPv6 socket
//! that talks IPv4 shows IPv4-mapped addresses to the IPv6 hooks, and those are the maps' own form already.

use aya_ebpf::{
    helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie},
    programs::SockAddrContext,
};
use isthmus_bpf_abi::{Address, AffinityKey, affinity_kind, ipv4_mapped, ipv4_of, is_ipv4_mapped};

/// Which of the two hooks of a call this is.
#[derive(Clone, Copy, PartialEq)]
pub enum Family {
    /// `...4`: `user_ip4`.
    Ipv4,
    /// `...6`: `user_ip6`.
    Ipv6,
}

/// Verdict: the call goes on, with the address as it now stands.
pub const ALLOW: i32 = 1;
/// Verdict: the call fails.
pub const REFUSE: i32 = 0;

/// The socket's number.
#[inline(always)]
pub fn cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: takes the program's context, which `sock_addr` is.
    unsafe { bpf_get_socket_cookie(ctx.sock_addr.cast()) }
}

/// Who asks: a socket's source address is not known yet, so the pod is known by its network namespace.
#[inline(always)]
pub fn client(ctx: &SockAddrContext) -> AffinityKey {
    // SAFETY: takes the program's context, which `sock_addr` is.
    let c = unsafe { bpf_get_netns_cookie(ctx.sock_addr.cast()) }.to_ne_bytes();
    AffinityKey {
        client: [
            c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], 0, 0, 0, 0, 0, 0, 0, 0,
        ],
        service_id: 0,
        kind: affinity_kind::NETNS,
        pad: [0; 3],
    }
}

/// IANA protocol number of the socket.
#[inline(always)]
pub fn proto(ctx: &SockAddrContext) -> u8 {
    // SAFETY: `sock_addr` is the program's context; the verifier allows this load.
    unsafe { (&raw const (*ctx.sock_addr).protocol).read_volatile() as u8 }
}

/// Address and port (network order) that the call names.
#[inline(always)]
pub fn address(ctx: &SockAddrContext, family: Family) -> (Address, [u8; 2]) {
    let sock = ctx.sock_addr;
    // SAFETY: `sock` is the program's context; volatile keeps the compiler from merging loads into sizes that the
    // verifier refuses. Fields are in network order, so their bytes in memory are the address.
    unsafe {
        let port = ((&raw const (*sock).user_port).read_volatile() as u16).to_ne_bytes();
        let address = match family {
            Family::Ipv4 => ipv4_mapped((&raw const (*sock).user_ip4).read_volatile().to_ne_bytes()),
            Family::Ipv6 => {
                let a = (&raw const (*sock).user_ip6[0]).read_volatile().to_ne_bytes();
                let b = (&raw const (*sock).user_ip6[1]).read_volatile().to_ne_bytes();
                let c = (&raw const (*sock).user_ip6[2]).read_volatile().to_ne_bytes();
                let d = (&raw const (*sock).user_ip6[3]).read_volatile().to_ne_bytes();
                [
                    a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2],
                    d[3],
                ]
            }
        };
        (address, port)
    }
}

/// Whether a socket of this family can talk to `address`. An IPv6 socket that is IPv6-only still refuses
/// IPv4-mapped addresses, in the kernel.
#[inline(always)]
pub fn fits(address: &Address, family: Family) -> bool {
    family == Family::Ipv6 || is_ipv4_mapped(address)
}

/// Replaces address and port (network order). The address must fit the family, see [`fits`].
#[inline(always)]
pub fn set_address(ctx: &SockAddrContext, family: Family, address: &Address, port: [u8; 2]) {
    let sock = ctx.sock_addr;
    let word =
        |at: usize| u32::from_ne_bytes([address[at], address[at + 1], address[at + 2], address[at + 3]]);
    // SAFETY: `sock` is the program's context; the verifier allows 4-byte stores to these fields.
    unsafe {
        match family {
            Family::Ipv4 => (&raw mut (*sock).user_ip4).write_volatile(u32::from_ne_bytes(ipv4_of(address))),
            Family::Ipv6 => {
                (&raw mut (*sock).user_ip6[0]).write_volatile(word(0));
                (&raw mut (*sock).user_ip6[1]).write_volatile(word(4));
                (&raw mut (*sock).user_ip6[2]).write_volatile(word(8));
                (&raw mut (*sock).user_ip6[3]).write_volatile(word(12));
            }
        }
        (&raw mut (*sock).user_port).write_volatile(u32::from(u16::from_ne_bytes(port)));
    }
}
