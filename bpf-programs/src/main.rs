//! Isthmus' BPF programs, one object.
//!
//! In: socket calls of processes below the agent's cgroup, packets on the host's side of pods' veth pairs, on the VXLAN
//! device and on the node's devices to the outside, and the maps that the agent fills. Out: rewritten socket addresses and packets, verdicts, redirected
//! packets, counters.
//!
//! A file per hook reads as a list of steps; what hooks share is by concern. Sockets: `sock` (addresses), `lb` (translation).
//! Packets: `parse` and `l4` (headers), `flow` (translation), `ct` and `entry` (conntrack), `nat` (rewriting), `icmp` (errors), `answer`
//! (refusals), `overlay` (tunnel data), `deliver` (to a local pod); with the outside: `outside` (flows of its clients),
//! `masquerade` (pods' flows to it), `snat` (ports of the node), `send` (ways). Both: `select` (backend choice), `tables` (maps),
//! `metrics`. `work` is where packet programs keep what the stack has no room for, `words` zeroes it.
//!
//! Invariants: every exit that drops or refuses counts a named reason; a socket call or packet for a frontend goes to a
//! backend or fails, never to the frontend's own address; the programs only read what the agent wrote, beside counters,
//! conntrack and a socket's way back from backend to frontend, so they go on alone when the agent is away.
#![no_std]
#![no_main]

mod answer;
mod connect;
mod ct;
mod deliver;
mod entry;
mod flow;
mod from_container;
mod from_host_device;
mod from_overlay;
mod getpeername;
mod icmp;
mod l4;
mod lb;
mod masquerade;
mod metrics;
mod nat;
mod outside;
mod overlay;
mod parse;
mod recvmsg;
mod select;
mod send;
mod sendmsg;
mod snat;
mod sock;
mod tables;
mod to_container;
mod to_host_device;
mod to_overlay;
mod words;
mod work;

/// The source is Apache-2.0 or GPL-2.0; the kernel takes it under the latter, for the helpers it lends only so.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 7] = *b"GPL v2\0";

/// Required by the language; no program here can reach it, and the verifier would refuse one that could.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
