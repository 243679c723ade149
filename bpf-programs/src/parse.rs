//! Headers of a packet, copied out: what the hooks decide by. Nothing beyond the IP header is read.

use aya_ebpf::programs::TcContext;
use isthmus_bpf_abi::{Address, DropReason, ipv4_mapped};

const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];

/// Offset of the destination MAC address in a frame.
pub const ETH_DESTINATION: usize = 0;
const ETH_LEN: usize = 14;
/// Offset of the source address in an IPv4 header; the destination follows it.
const IPV4_ADDRESSES: usize = 12;
/// The same in an IPv6 header.
const IPV6_ADDRESSES: usize = 8;
/// Offset of the next header's number in an IPv6 header.
const IPV6_NEXT_HEADER: usize = 6;

const NEXT_HEADER_HOP_BY_HOP: u8 = 0;
const NEXT_HEADER_ICMPV6: u8 = 58;
/// Offset of the next header's number in the extension header after an IPv6 header.
const IPV6_EXTENSION: usize = 40;

/// A frame that the hooks know.
pub enum Frame {
    /// IPv4 or IPv6.
    Ip(Packet),
    /// Address resolution on the veth pair: the stack's business.
    Arp,
}

/// An IP packet's addresses.
pub struct Packet {
    /// Source MAC address.
    pub source_mac: [u8; 6],
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Whether it is ICMPv6, at once or after hop-by-hop options (as multicast listener reports are).
    pub icmpv6: bool,
}

/// Reads the frame's headers.
#[inline(always)]
pub fn parse(ctx: &TcContext) -> Result<Frame, DropReason> {
    let ethernet: [u8; ETH_LEN] = load(ctx, 0)?;
    let source_mac = [
        ethernet[6],
        ethernet[7],
        ethernet[8],
        ethernet[9],
        ethernet[10],
        ethernet[11],
    ];
    match [ethernet[12], ethernet[13]] {
        ETHERTYPE_IPV4 => {
            let a: [u8; 8] = load(ctx, ETH_LEN + IPV4_ADDRESSES)?;
            Ok(Frame::Ip(Packet {
                source_mac,
                source: ipv4_mapped([a[0], a[1], a[2], a[3]]),
                destination: ipv4_mapped([a[4], a[5], a[6], a[7]]),
                icmpv6: false,
            }))
        }
        ETHERTYPE_IPV6 => {
            let mut next_header: u8 = load(ctx, ETH_LEN + IPV6_NEXT_HEADER)?;
            if next_header == NEXT_HEADER_HOP_BY_HOP {
                next_header = load(ctx, ETH_LEN + IPV6_EXTENSION)?;
            }
            Ok(Frame::Ip(Packet {
                source_mac,
                source: load(ctx, ETH_LEN + IPV6_ADDRESSES)?,
                destination: load(ctx, ETH_LEN + IPV6_ADDRESSES + 16)?,
                icmpv6: next_header == NEXT_HEADER_ICMPV6,
            }))
        }
        ETHERTYPE_ARP => Ok(Frame::Arp),
        _ => Err(DropReason::UnsupportedProtocol),
    }
}

impl Packet {
    /// Whether this is the link's own business (neighbour and router discovery, multicast listener reports): ICMPv6
    /// from no address or a link-local one, to a link-local or multicast one. It never leaves the link.
    #[inline(always)]
    pub fn is_link_control(&self) -> bool {
        self.icmpv6
            && (self.source == [0; 16] || is_link_local(&self.source))
            && (self.destination[0] == 0xff || is_link_local(&self.destination))
    }
}

#[inline(always)]
fn is_link_local(address: &Address) -> bool {
    address[0] == 0xfe && address[1] & 0xc0 == 0x80
}

#[inline(always)]
fn load<T>(ctx: &TcContext, offset: usize) -> Result<T, DropReason> {
    ctx.load(offset).map_err(|_| DropReason::Truncated)
}
