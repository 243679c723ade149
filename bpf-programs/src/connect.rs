//! connect(2): a TCP connection, or a UDP socket's peer, gets a backend of the frontend it names.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{
    lb::{Choice, translate},
    sock::Family,
};

#[cgroup_sock_addr(connect4)]
fn isthmus_connect4(ctx: SockAddrContext) -> i32 {
    translate(&ctx, Family::Ipv4, Choice::Random)
}

#[cgroup_sock_addr(connect6)]
fn isthmus_connect6(ctx: SockAddrContext) -> i32 {
    translate(&ctx, Family::Ipv6, Choice::Random)
}
