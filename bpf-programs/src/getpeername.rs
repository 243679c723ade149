//! getpeername(2): the peer is the frontend that the socket asked for.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{
    lb::restore,
    sock::{ALLOW, Family},
};

#[cgroup_sock_addr(getpeername4)]
fn isthmus_getpeername4(ctx: SockAddrContext) -> i32 {
    restore(&ctx, Family::Ipv4);
    ALLOW
}

#[cgroup_sock_addr(getpeername6)]
fn isthmus_getpeername6(ctx: SockAddrContext) -> i32 {
    restore(&ctx, Family::Ipv6);
    ALLOW
}
