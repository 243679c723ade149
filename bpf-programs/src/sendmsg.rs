//! sendmsg(2) and sendto(2) on UDP sockets with an address: each datagram of a socket to a frontend goes to the same backend.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{
    lb::{Choice, translate},
    sock::Family,
};

#[cgroup_sock_addr(sendmsg4)]
fn isthmus_sendmsg4(ctx: SockAddrContext) -> i32 {
    translate(&ctx, Family::Ipv4, Choice::Sticky)
}

#[cgroup_sock_addr(sendmsg6)]
fn isthmus_sendmsg6(ctx: SockAddrContext) -> i32 {
    translate(&ctx, Family::Ipv6, Choice::Sticky)
}
