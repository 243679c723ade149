//! The one form of an address in map keys and values: 16 bytes in network order, IPv4 as `::ffff:a.b.c.d`.

/// An IPv6 address, or an IPv4-mapped one, in network order. All zero means "none".
pub type Address = [u8; 16];

/// The IPv4-mapped form of `octets`.
#[inline(always)]
pub const fn ipv4_mapped(octets: [u8; 4]) -> Address {
    [
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, octets[0], octets[1], octets[2], octets[3],
    ]
}

/// Whether `address` lies in `::ffff:0:0/96`.
#[inline(always)]
pub const fn is_ipv4_mapped(address: &Address) -> bool {
    // Two comparisons and not twelve: the verifier walks each branch.
    let high = u64::from_be_bytes([
        address[0], address[1], address[2], address[3], address[4], address[5], address[6], address[7],
    ]);
    let middle = u32::from_be_bytes([address[8], address[9], address[10], address[11]]);
    high == 0 && middle == 0xffff
}

/// The last four bytes: the IPv4 address, if [`is_ipv4_mapped`].
#[inline(always)]
pub const fn ipv4_of(address: &Address) -> [u8; 4] {
    [address[12], address[13], address[14], address[15]]
}
