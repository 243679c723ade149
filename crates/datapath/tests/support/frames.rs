//! Ethernet frames for the packet programs.
#![allow(dead_code, reason = "each test target uses some of it")]

use isthmus_bpf_abi::{Address, ipv4_of, is_ipv4_mapped};

use crate::lab::address;

const UDP: u8 = 17;
const ICMPV6: u8 = 58;

/// A UDP frame; the family follows the addresses.
pub fn udp(source_mac: [u8; 6], source: &str, destination: &str) -> Vec<u8> {
    ip(source_mac, &address(source), &address(destination), UDP)
}

/// An ICMPv6 frame.
pub fn icmpv6(source_mac: [u8; 6], source: &str, destination: &str) -> Vec<u8> {
    ip(source_mac, &address(source), &address(destination), ICMPV6)
}

/// An ICMPv6 frame with hop-by-hop options before, like a multicast listener report.
pub fn icmpv6_with_options(source_mac: [u8; 6], source: &str, destination: &str) -> Vec<u8> {
    let mut frame = ip(source_mac, &address(source), &address(destination), 0);
    frame[54] = ICMPV6;
    frame
}

/// A frame of another protocol.
pub fn ethernet(source_mac: [u8; 6], ethertype: [u8; 2], payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x02, 0, 0, 0, 0, 0xff];
    frame.extend(source_mac);
    frame.extend(ethertype);
    frame.extend(payload);
    frame
}

fn ip(source_mac: [u8; 6], source: &Address, destination: &Address, proto: u8) -> Vec<u8> {
    let payload = [0_u8; 32];
    if is_ipv4_mapped(source) {
        let length = (20 + payload.len() as u16).to_be_bytes();
        let mut header = vec![0x45, 0, length[0], length[1], 0, 0, 0, 0, 64, proto, 0, 0];
        header.extend(ipv4_of(source));
        header.extend(ipv4_of(destination));
        header.extend(payload);
        return ethernet(source_mac, [0x08, 0x00], &header);
    }
    let length = (payload.len() as u16).to_be_bytes();
    let mut header = vec![0x60, 0, 0, 0, length[0], length[1], proto, 64];
    header.extend(source);
    header.extend(destination);
    header.extend(payload);
    ethernet(source_mac, [0x86, 0xdd], &header)
}
