//! Headers of a packet up to the transport's, copied out: what the hooks decide by.

use aya_ebpf::programs::TcContext;
use isthmus_bpf_abi::{Address, DropReason, PROTO_ICMPV6, ipv4_mapped};

const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];

/// Offset of the destination MAC address in a frame.
pub const ETH_DESTINATION: usize = 0;
/// Bytes of an Ethernet header: offset of the IP header.
pub const ETH_LEN: usize = 14;
/// Bytes of an IPv4 header without options.
pub const IPV4_LEN: usize = 20;
/// Bytes of an IPv6 header without extensions.
pub const IPV6_LEN: usize = 40;

const IPV4_MORE_FRAGMENTS: u8 = 0x20;
/// Bits of the two bytes that hold an IPv4 fragment's offset.
pub const IPV4_FRAGMENT_OFFSET: u16 = 0x1fff;

const IPV6_HOP_BY_HOP: u8 = 0;
const IPV6_ROUTING: u8 = 43;
const IPV6_FRAGMENT: u8 = 44;
const IPV6_DESTINATION_OPTIONS: u8 = 60;
/// How many extension headers are followed; a packet with more has no transport that we know.
const IPV6_EXTENSIONS_MAX: usize = 4;

/// A frame that the hooks know.
#[derive(PartialEq)]
pub enum Frame {
    /// IPv4 or IPv6: its [`Packet`] is filled in.
    Ip,
    /// Address resolution on the veth pair: the stack's business.
    Arp,
}

/// Which part of a datagram a packet is.
#[derive(Clone, Copy, PartialEq)]
pub enum Fragment {
    /// All of it.
    Whole,
    /// Its beginning, with the transport's header.
    First,
    /// A later part, without.
    Later,
}

/// What an IP packet's headers say. Aligned as map keys are.
#[repr(C, align(8))]
pub struct Packet {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Offset of the transport's header in the frame.
    pub l4: usize,
    /// Number that a datagram's fragments share: IPv4's in the last two bytes, or IPv6's.
    pub fragment_id: [u8; 4],
    /// Source MAC address.
    pub source_mac: [u8; 6],
    /// IANA number of the transport's protocol.
    pub proto: u8,
    /// IPv4, not IPv6.
    pub ipv4: bool,
    /// Whole, or part of a datagram.
    pub fragment: Fragment,
    /// What it came to so far: forwarded, translated, or why its frontend refuses it.
    pub outcome: DropReason,
}

/// Reads the frame's headers into `packet`, if it is an IP packet.
#[inline(always)]
pub fn parse(ctx: &TcContext, packet: &mut Packet) -> Result<Frame, DropReason> {
    packet.fragment = Fragment::Whole;
    packet.outcome = DropReason::Forwarded;
    packet.ipv4 = false;
    let ethernet: [u8; ETH_LEN] = load(ctx, 0)?;
    packet.source_mac = [
        ethernet[6],
        ethernet[7],
        ethernet[8],
        ethernet[9],
        ethernet[10],
        ethernet[11],
    ];
    match [ethernet[12], ethernet[13]] {
        ETHERTYPE_IPV4 => ipv4(ctx, packet),
        ETHERTYPE_IPV6 => ipv6(ctx, packet),
        ETHERTYPE_ARP => Ok(Frame::Arp),
        _ => Err(DropReason::UnsupportedProtocol),
    }
}

#[inline(always)]
fn ipv4(ctx: &TcContext, packet: &mut Packet) -> Result<Frame, DropReason> {
    let h: [u8; IPV4_LEN] = load(ctx, ETH_LEN)?;
    let header_len = usize::from(h[0] & 0xf) * 4;
    if header_len < IPV4_LEN {
        return Err(DropReason::Truncated);
    }
    packet.source = ipv4_mapped([h[12], h[13], h[14], h[15]]);
    packet.destination = ipv4_mapped([h[16], h[17], h[18], h[19]]);
    packet.l4 = ETH_LEN + header_len;
    packet.fragment_id = [0, 0, h[4], h[5]];
    packet.proto = h[9];
    packet.ipv4 = true;
    if u16::from_be_bytes([h[6], h[7]]) & IPV4_FRAGMENT_OFFSET != 0 {
        packet.fragment = Fragment::Later;
    } else if h[6] & IPV4_MORE_FRAGMENTS != 0 {
        packet.fragment = Fragment::First;
    }
    Ok(Frame::Ip)
}

#[inline(always)]
fn ipv6(ctx: &TcContext, packet: &mut Packet) -> Result<Frame, DropReason> {
    packet.proto = load(ctx, ETH_LEN + 6)?;
    packet.source = load(ctx, ETH_LEN + 8)?;
    packet.destination = load(ctx, ETH_LEN + 24)?;
    packet.l4 = ETH_LEN + IPV6_LEN;
    for _ in 0..IPV6_EXTENSIONS_MAX {
        match packet.proto {
            IPV6_HOP_BY_HOP | IPV6_ROUTING | IPV6_DESTINATION_OPTIONS => {
                let [next, eights]: [u8; 2] = load(ctx, packet.l4)?;
                packet.proto = next;
                packet.l4 += (usize::from(eights) + 1) * 8;
            }
            IPV6_FRAGMENT => {
                let h: [u8; 8] = load(ctx, packet.l4)?;
                packet.proto = h[0];
                packet.l4 += 8;
                packet.fragment_id = [h[4], h[5], h[6], h[7]];
                // 13 bits of offset, 2 that are reserved, "more fragments".
                let offset_and_more = u16::from_be_bytes([h[2], h[3]]);
                if offset_and_more & 0xfff8 != 0 {
                    packet.fragment = Fragment::Later;
                    break;
                }
                if offset_and_more & 1 != 0 {
                    packet.fragment = Fragment::First;
                }
            }
            _ => break,
        }
    }
    Ok(Frame::Ip)
}

impl Packet {
    /// Whether this is the link's own business (neighbour and router discovery, multicast listener reports): ICMPv6
    /// from no address or a link-local one, to a link-local or multicast one. It never leaves the link.
    #[inline(always)]
    pub fn is_link_control(&self) -> bool {
        !self.ipv4
            && self.proto == PROTO_ICMPV6
            && (self.source == [0; 16] || is_link_local(&self.source))
            && (self.destination[0] == 0xff || is_link_local(&self.destination))
    }
}

#[inline(always)]
fn is_link_local(address: &Address) -> bool {
    address[0] == 0xfe && address[1] & 0xc0 == 0x80
}

/// Copies bytes out of the packet.
#[inline(always)]
pub fn load<T>(ctx: &TcContext, offset: usize) -> Result<T, DropReason> {
    ctx.load(offset).map_err(|_| DropReason::Truncated)
}
