//! The transport's header: which flow a packet belongs to. Fragments after the first carry no ports; those of a
//! translated datagram are remembered by its number.

use aya_ebpf::programs::TcContext;
use isthmus_bpf_abi::{
    CtKey, DropReason, FragmentKey, FragmentValue, PROTO_ICMP, PROTO_ICMPV6, PROTO_SCTP, PROTO_TCP, PROTO_UDP,
};

use crate::{
    parse::{Fragment, Packet, load},
    tables,
};

/// Offset of the flags in a TCP header.
const TCP_FLAGS: usize = 13;
/// Offset of the number in an ICMP echo.
pub const ECHO_NUMBER: usize = 4;
const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;

/// Writes the addresses and ports of the packet. Returns whether it has them: not if its protocol has no ports, or it is a
/// fragment of an unknown datagram.
#[inline(always)]
pub fn tuple(ctx: &TcContext, packet: &Packet, tuple: &mut CtKey) -> Result<bool, DropReason> {
    if !has_ports(packet.proto) {
        return Ok(false);
    }
    read(ctx, packet, tuple)
}

/// The same, and for an echo: its number stands for the port of who asks, and 0 for the other's.
#[inline(always)]
pub fn tuple_or_echo(ctx: &TcContext, packet: &Packet, tuple: &mut CtKey) -> Result<bool, DropReason> {
    if !has_ports(packet.proto) && !may_echo(packet.proto, packet.ipv4) {
        return Ok(false);
    }
    read(ctx, packet, tuple)
}

#[inline(always)]
fn read(ctx: &TcContext, packet: &Packet, tuple: &mut CtKey) -> Result<bool, DropReason> {
    let p: [u8; 4] = if packet.fragment == Fragment::Later {
        match tables::fragment(&fragment_key(packet)) {
            Some(ports) => [
                ports.source_port[0],
                ports.source_port[1],
                ports.destination_port[0],
                ports.destination_port[1],
            ],
            None => return Ok(false),
        }
    } else if has_ports(packet.proto) {
        load(ctx, packet.l4)?
    } else {
        match echo(ctx, packet.l4)? {
            Some(ports) => ports,
            None => return Ok(false),
        }
    };
    tuple.source = packet.source;
    tuple.destination = packet.destination;
    tuple.source_port = [p[0], p[1]];
    tuple.destination_port = [p[2], p[3]];
    tuple.proto = packet.proto;
    tuple.pad = [0; 3];
    Ok(true)
}

/// Whether the protocol's header begins with two ports.
#[inline(always)]
pub fn has_ports(proto: u8) -> bool {
    matches!(proto, PROTO_TCP | PROTO_UDP | PROTO_SCTP)
}

/// The destination port of a packet with ports, network order.
#[inline(always)]
pub fn destination_port(ctx: &TcContext, packet: &Packet) -> Result<[u8; 2], DropReason> {
    load(ctx, packet.l4 + 2)
}

/// Whether the protocol is the family's ICMP.
#[inline(always)]
pub fn may_echo(proto: u8, ipv4: bool) -> bool {
    proto == if ipv4 { PROTO_ICMP } else { PROTO_ICMPV6 }
}

/// The ports of an echo whose header is at `offset`, source first; nothing if it is another message.
#[inline(always)]
pub fn echo(ctx: &TcContext, offset: usize) -> Result<Option<[u8; 4]>, DropReason> {
    let h: [u8; ECHO_NUMBER + 2] = load(ctx, offset)?;
    let number = [h[ECHO_NUMBER], h[ECHO_NUMBER + 1]];
    Ok(match h[0] {
        ECHO_REQUEST | ECHO_REQUEST_V6 => Some([number[0], number[1], 0, 0]),
        ECHO_REPLY | ECHO_REPLY_V6 => Some([0, 0, number[0], number[1]]),
        _ => None,
    })
}

/// The TCP header's flags; 0 where there is none.
#[inline(always)]
pub fn tcp_flags(ctx: &TcContext, packet: &Packet) -> Result<u8, DropReason> {
    if packet.proto == PROTO_TCP && packet.fragment != Fragment::Later {
        load(ctx, packet.l4 + TCP_FLAGS)
    } else {
        Ok(0)
    }
}

/// Remembers the ports of a datagram whose later fragments must be translated like this one. `packet` and `tuple` are as they
/// came. Without memory for it the later fragments go untranslated and the datagram is lost, as any may be.
#[inline(always)]
pub fn remember_fragment(packet: &Packet, tuple: &CtKey) {
    if packet.fragment == Fragment::First {
        let ports = FragmentValue {
            source_port: tuple.source_port,
            destination_port: tuple.destination_port,
        };
        tables::remember_fragment(&fragment_key(packet), &ports);
    }
}

#[inline(always)]
fn fragment_key(packet: &Packet) -> FragmentKey {
    FragmentKey {
        source: packet.source,
        destination: packet.destination,
        id: packet.fragment_id,
        proto: packet.proto,
        pad: [0; 3],
    }
}
