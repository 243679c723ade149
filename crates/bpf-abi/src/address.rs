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
    let mut index = 0;
    while index < 10 {
        if address[index] != 0 {
            return false;
        }
        index += 1;
    }
    address[10] == 0xff && address[11] == 0xff
}

/// The last four bytes: the IPv4 address, if [`is_ipv4_mapped`].
#[inline(always)]
pub const fn ipv4_of(address: &Address) -> [u8; 4] {
    [address[12], address[13], address[14], address[15]]
}
