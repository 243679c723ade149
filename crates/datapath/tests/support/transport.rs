//! TCP, UDP, SCTP and ICMP frames with true checksums, and a reader that compares every checksum it meets.
#![allow(dead_code, reason = "each test target uses some of it")]

use isthmus_bpf_abi::{
    Address, CtKey, PROTO_ICMP, PROTO_ICMPV6, PROTO_SCTP, PROTO_TCP, PROTO_UDP, ipv4_mapped, ipv4_of,
    is_ipv4_mapped, snat_port, tuple_hash,
};

use crate::{frames::ethernet, lab::address};

/// Who sends to whom.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Ends {
    /// Source.
    pub source: (Address, u16),
    /// Destination.
    pub destination: (Address, u16),
}

/// From `source` to `destination`, both `address:port` or `[address]:port`.
pub fn ends(source: &str, destination: &str) -> Ends {
    Ends {
        source: end(source),
        destination: end(destination),
    }
}

/// One end.
pub fn end(text: &str) -> (Address, u16) {
    let (ip, port) = text.rsplit_once(':').expect("address:port");
    (address(ip.trim_matches(['[', ']'])), port.parse().expect("port"))
}

impl Ends {
    /// The other direction.
    pub fn back(self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
        }
    }
}

/// The port of the node that a flow tries first.
pub fn first_port(ends: Ends, proto: u8, ports: &std::ops::RangeInclusive<u16>) -> u16 {
    let key = CtKey {
        source: ends.source.0,
        destination: ends.destination.0,
        source_port: ends.source.1.to_be_bytes(),
        destination_port: ends.destination.1.to_be_bytes(),
        proto,
        pad: [0; 3],
    };
    let hash = tuple_hash(&key);
    u16::from_be_bytes(snat_port(hash, 0, *ports.start(), *ports.end()))
}

/// What a frame says. All checksums in it were compared.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Seen {
    /// Destination and source MAC addresses.
    pub macs: [[u8; 6]; 2],
    /// Addresses and ports; ports are 0 for ICMP.
    pub ends: Ends,
    /// IANA protocol number.
    pub proto: u8,
    /// The transport's header and payload.
    pub transport: Vec<u8>,
}

/// A TCP frame with a payload of `payload`.
pub fn tcp(mac: [u8; 6], ends: Ends, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut header = ports(ends);
    header.extend(1_000_u32.to_be_bytes());
    header.extend(if flags & 0x10 != 0 { 5_000_u32 } else { 0 }.to_be_bytes());
    header.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    header.extend(payload);
    set_checksum(&mut header, 16, pseudo(ends, PROTO_TCP));
    frame(mac, ends, PROTO_TCP, &header)
}

/// A UDP frame.
pub fn udp(mac: [u8; 6], ends: Ends, payload: &[u8]) -> Vec<u8> {
    frame(mac, ends, PROTO_UDP, &udp_datagram(ends, payload))
}

/// A UDP frame without a checksum.
pub fn udp_unchecked(mac: [u8; 6], ends: Ends) -> Vec<u8> {
    let mut datagram = udp_datagram(ends, b"data");
    datagram[6..8].fill(0);
    frame(mac, ends, PROTO_UDP, &datagram)
}

/// A UDP datagram: header and payload.
pub fn udp_datagram(ends: Ends, payload: &[u8]) -> Vec<u8> {
    let mut header = ports(ends);
    header.extend((8 + payload.len() as u16).to_be_bytes());
    header.extend([0, 0]);
    header.extend(payload);
    set_checksum(&mut header, 6, pseudo(ends, PROTO_UDP));
    header
}

/// An SCTP frame whose checksum is a mark: programs must leave it.
pub fn sctp(mac: [u8; 6], ends: Ends) -> Vec<u8> {
    let mut header = ports(ends);
    header.extend([0, 0, 0, 1, 0xde, 0xad, 0xbe, 0xef, 1, 0, 0, 4]);
    frame(mac, ends, PROTO_SCTP, &header)
}

/// "Port unreachable" from `from` to `to` about `quoted`, a whole frame that `to` sent.
pub fn unreachable(mac: [u8; 6], from: &str, to: &str, quoted: &[u8]) -> Vec<u8> {
    let ends = Ends {
        source: (address(from), 0),
        destination: (address(to), 0),
    };
    let ipv4 = is_ipv4_mapped(&ends.source.0);
    let quoted_len = if ipv4 { 28 } else { 48 };
    let mut message = if ipv4 {
        vec![3, 3, 0, 0, 0, 0, 0, 0]
    } else {
        vec![1, 4, 0, 0, 0, 0, 0, 0]
    };
    message.extend(&quoted[14..14 + quoted_len]);
    let (proto, sum) = if ipv4 {
        (PROTO_ICMP, 0)
    } else {
        (PROTO_ICMPV6, pseudo(ends, PROTO_ICMPV6))
    };
    set_checksum(&mut message, 2, sum);
    frame(mac, ends, proto, &message)
}

/// An echo with `number`, asked or answered.
pub fn echo(mac: [u8; 6], from: &str, to: &str, asks: bool, number: u16) -> Vec<u8> {
    let ends = Ends {
        source: (address(from), 0),
        destination: (address(to), 0),
    };
    let ipv4 = is_ipv4_mapped(&ends.source.0);
    let (proto, kind, sum) = match (ipv4, asks) {
        (true, true) => (PROTO_ICMP, 8, 0),
        (true, false) => (PROTO_ICMP, 0, 0),
        (false, true) => (PROTO_ICMPV6, 128, pseudo(ends, PROTO_ICMPV6)),
        (false, false) => (PROTO_ICMPV6, 129, pseudo(ends, PROTO_ICMPV6)),
    };
    let mut message = vec![kind, 0, 0, 0];
    message.extend(number.to_be_bytes());
    message.extend([0, 1, 0xaa, 0xbb, 0xcc]);
    set_checksum(&mut message, 2, sum);
    frame(mac, ends, proto, &message)
}

/// The fragments of a datagram with `id`, cut after `at` bytes (a multiple of 8).
pub fn fragments(mac: [u8; 6], ends: Ends, id: u16, datagram: &[u8], at: usize) -> [Vec<u8>; 2] {
    let (first, later) = datagram.split_at(at);
    if is_ipv4_mapped(&ends.source.0) {
        return [(first, 0x2000), (later, (at / 8) as u16)].map(|(part, offset)| {
            let mut frame = frame(mac, ends, PROTO_UDP, part);
            frame[18..20].copy_from_slice(&id.to_be_bytes());
            frame[20..22].copy_from_slice(&offset.to_be_bytes());
            set_ipv4_checksum(&mut frame);
            frame
        });
    }
    [(first, 1), (later, at as u16)].map(|(part, offset)| {
        let offset = offset.to_be_bytes();
        let id = id.to_be_bytes();
        let mut packet = vec![PROTO_UDP, 0, offset[0], offset[1], 0, 0, id[0], id[1]];
        packet.extend(part);
        frame(mac, ends, 44, &packet)
    })
}

/// The same frame with `options` (a multiple of 4 bytes) in its IPv4 header.
pub fn with_ipv4_options(frame: &[u8], options: &[u8]) -> Vec<u8> {
    let mut out = frame[..34].to_vec();
    out.extend(options);
    out.extend(&frame[34..]);
    out[14] += (options.len() / 4) as u8;
    let length = (out.len() as u16 - 14).to_be_bytes();
    out[16..18].copy_from_slice(&length);
    set_ipv4_checksum(&mut out);
    out
}

/// The same frame with another TTL (hop limit).
pub fn with_ttl(frame: &[u8], ttl: u8) -> Vec<u8> {
    let mut out = frame.to_vec();
    if out[12] == 0x08 {
        out[22] = ttl;
        set_ipv4_checksum(&mut out);
    } else {
        out[21] = ttl;
    }
    out
}

/// A frame's TTL (hop limit).
pub fn ttl(frame: &[u8]) -> u8 {
    frame[if frame[12] == 0x08 { 22 } else { 21 }]
}

/// Reads a frame; panics where a length or checksum is wrong. Later fragments have no transport to compare.
pub fn read(frame: &[u8]) -> Seen {
    let macs = [
        frame[..6].try_into().expect("MAC"),
        frame[6..12].try_into().expect("MAC"),
    ];
    let (source, destination, mut proto, mut transport, mut fragmented) = if frame[12] == 0x08 {
        let header = &frame[14..14 + usize::from(frame[14] & 0xf) * 4];
        assert_eq!(fold(sum(header)), 0xffff, "IPv4 header's checksum: {header:02x?}");
        let length = usize::from(u16::from_be_bytes([header[2], header[3]]));
        assert_eq!(14 + length, frame.len(), "IPv4 length");
        let ip = |at: usize| ipv4_mapped(header[at..at + 4].try_into().expect("address"));
        let offset = u16::from_be_bytes([header[6], header[7]]) & 0x3fff;
        (
            ip(12),
            ip(16),
            header[9],
            frame[14 + header.len()..].to_vec(),
            offset != 0,
        )
    } else {
        let length = usize::from(u16::from_be_bytes([frame[18], frame[19]]));
        assert_eq!(54 + length, frame.len(), "IPv6 length");
        let ip = |at: usize| frame[at..at + 16].try_into().expect("address");
        (ip(22), ip(38), frame[20], frame[54..].to_vec(), false)
    };
    if proto == 44 {
        proto = transport[0];
        transport.drain(..8);
        fragmented = true;
    }
    let mut ends = Ends {
        source: (source, 0),
        destination: (destination, 0),
    };
    if matches!(proto, PROTO_TCP | PROTO_UDP | PROTO_SCTP) {
        ends.source.1 = u16::from_be_bytes([transport[0], transport[1]]);
        ends.destination.1 = u16::from_be_bytes([transport[2], transport[3]]);
    }
    let unchecked = proto == PROTO_SCTP || proto == PROTO_UDP && transport[6..8] == [0, 0];
    if !unchecked && !fragmented {
        let seed = if proto == PROTO_ICMP {
            0
        } else {
            pseudo_of(ends, proto, transport.len())
        };
        assert_eq!(
            fold(seed + sum(&transport)),
            0xffff,
            "checksum of protocol {proto}"
        );
    }
    Seen {
        macs,
        ends,
        proto,
        transport,
    }
}

/// The frame that an ICMP error quotes, as far as it does: addresses, ports. Its IPv4 header's checksum was compared.
pub fn read_quote(error: &Seen) -> Ends {
    let quote = &error.transport[8..];
    let (source, destination, ports) = if quote[0] >> 4 == 4 {
        assert_eq!(fold(sum(&quote[..20])), 0xffff, "quoted header's checksum");
        let ip = |at: usize| ipv4_mapped(quote[at..at + 4].try_into().expect("address"));
        (ip(12), ip(16), &quote[20..24])
    } else {
        let ip = |at: usize| quote[at..at + 16].try_into().expect("address");
        (ip(8), ip(24), &quote[40..44])
    };
    Ends {
        source: (source, u16::from_be_bytes([ports[0], ports[1]])),
        destination: (destination, u16::from_be_bytes([ports[2], ports[3]])),
    }
}

/// The sum over a datagram whose parts are these transports, in order: 0xffff if its checksum is true.
pub fn sum_of_parts(ends: Ends, parts: &[&[u8]]) -> u16 {
    let whole: Vec<u8> = parts.concat();
    fold(pseudo_of(ends, PROTO_UDP, whole.len()) + sum(&whole))
}

fn frame(mac: [u8; 6], ends: Ends, proto: u8, transport: &[u8]) -> Vec<u8> {
    if is_ipv4_mapped(&ends.source.0) {
        let length = (20 + transport.len() as u16).to_be_bytes();
        let mut packet = vec![0x45, 0, length[0], length[1], 0, 7, 0, 0, 64, proto, 0, 0];
        packet.extend(ipv4_of(&ends.source.0));
        packet.extend(ipv4_of(&ends.destination.0));
        packet.extend(transport);
        let mut frame = ethernet(mac, [0x08, 0x00], &packet);
        set_ipv4_checksum(&mut frame);
        return frame;
    }
    let length = (transport.len() as u16).to_be_bytes();
    let mut packet = vec![0x60, 0, 0, 0, length[0], length[1], proto, 64];
    packet.extend(ends.source.0);
    packet.extend(ends.destination.0);
    packet.extend(transport);
    ethernet(mac, [0x86, 0xdd], &packet)
}

fn set_ipv4_checksum(frame: &mut [u8]) {
    let header_len = usize::from(frame[14] & 0xf) * 4;
    set_checksum(&mut frame[14..14 + header_len], 10, 0);
}

fn ports(ends: Ends) -> Vec<u8> {
    [ends.source.1.to_be_bytes(), ends.destination.1.to_be_bytes()].concat()
}

/// What the pseudo-header adds, without the length, which [`set_checksum`] knows.
fn pseudo(ends: Ends, proto: u8) -> u32 {
    pseudo_of(ends, proto, 0)
}

fn pseudo_of(ends: Ends, proto: u8, length: usize) -> u32 {
    sum(&ends.source.0) + sum(&ends.destination.0) + u32::from(proto) + length as u32
}

fn set_checksum(bytes: &mut [u8], at: usize, seed: u32) {
    bytes[at..at + 2].fill(0);
    let length = if seed == 0 { 0 } else { bytes.len() as u32 };
    let checksum = !fold(seed + length + sum(bytes));
    bytes[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
}

fn sum(bytes: &[u8]) -> u32 {
    bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])))
        .sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
