//! recvmsg(2) and recvfrom(2) on UDP sockets: an answer from a backend seems to come from the frontend.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{
    lb::restore,
    sock::{ALLOW, Family},
};

#[cgroup_sock_addr(recvmsg4)]
fn isthmus_recvmsg4(ctx: SockAddrContext) -> i32 {
    restore(&ctx, Family::Ipv4);
    ALLOW
}

#[cgroup_sock_addr(recvmsg6)]
fn isthmus_recvmsg6(ctx: SockAddrContext) -> i32 {
    restore(&ctx, Family::Ipv6);
    ALLOW
}
