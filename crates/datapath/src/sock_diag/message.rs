//! Messages of `NETLINK_SOCK_DIAG` for internet sockets: requests as bytes, answers from bytes. No I/O.
//!
//! Invariants: whatever bytes come, decoding ends, reads nothing outside of them and never panics; a message that says that it
//! is longer than what came is an error and not a shorter message.

use isthmus_bpf_abi::{Address, ipv4_mapped};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::Protocol;

/// Message types and flags of `linux/netlink.h` and `linux/sock_diag.h`.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;

/// An answer is not what the kernel's headers say.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum DecodeError {
    /// Not even a header.
    #[error("{0} bytes are left where a message of at least {HEADER_LEN} should begin")]
    NoHeader(usize),
    /// A length that cannot be.
    #[error("a message says that it is {said} bytes long, of {left} that are left")]
    Length {
        /// In its header.
        said: usize,
        /// There.
        left: usize,
    },
    /// A body that is too short for its type.
    #[error("a message of type {kind} has {len} bytes after its header, fewer than it needs")]
    Body {
        /// Its type.
        kind: u16,
        /// Bytes after the header.
        len: usize,
    },
    /// Neither IPv4 nor IPv6.
    #[error("a socket of address family {0}")]
    Family(u8),
}

/// `struct nlmsghdr`.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes)]
struct Header {
    len: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
}

/// Bytes of a header. Messages begin at multiples of 4.
pub const HEADER_LEN: usize = size_of::<Header>();
const _: () = assert!(HEADER_LEN == 16);

/// `struct inet_diag_sockid`: who a socket is, as the kernel wants it back.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, FromBytes, Immutable, IntoBytes, PartialEq)]
pub struct SocketId {
    /// Own port, network order.
    pub source_port: [u8; 2],
    /// Peer's port, network order.
    pub destination_port: [u8; 2],
    /// Own address; IPv4 in the first four bytes.
    pub source: [u8; 16],
    /// Peer's address.
    pub destination: [u8; 16],
    /// Device that it is bound to.
    pub interface: u32,
    /// The socket's number, its lower half first.
    pub cookie: [u32; 2],
}
const _: () = assert!(size_of::<SocketId>() == 48);

/// A `struct nlmsghdr` with a `struct inet_diag_req_v2`.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes)]
struct Request {
    header: Header,
    family: u8,
    protocol: u8,
    extensions: u8,
    pad: u8,
    states: u32,
    id: SocketId,
}
const _: () = assert!(size_of::<Request>() == HEADER_LEN + 56);

/// Bytes of every request.
pub const REQUEST_LEN: usize = size_of::<Request>();

/// `struct inet_diag_msg`.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes)]
struct Entry {
    family: u8,
    state: u8,
    timer: u8,
    retransmits: u8,
    id: SocketId,
    expires: u32,
    receive_queue: u32,
    write_queue: u32,
    user: u32,
    inode: u32,
}
const _: () = assert!(size_of::<Entry>() == 72);

/// Address family of a socket. One of IPv6 may talk to IPv4-mapped addresses.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Family {
    /// AF_INET.
    Ipv4,
    /// AF_INET6.
    Ipv6,
}

impl Family {
    const fn number(self) -> u8 {
        match self {
            Self::Ipv4 => libc::AF_INET as u8,
            Self::Ipv6 => libc::AF_INET6 as u8,
        }
    }

    fn of(number: u8) -> Result<Self, DecodeError> {
        [Self::Ipv4, Self::Ipv6]
            .into_iter()
            .find(|family| family.number() == number)
            .ok_or(DecodeError::Family(number))
    }
}

/// A socket, as a dump shows it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Socket {
    /// Address family.
    pub family: Family,
    /// `TCP_ESTABLISHED` and so on; of other protocols too.
    pub state: u8,
    /// Who it is.
    pub id: SocketId,
}

impl Socket {
    /// The number that BPF programs know it by.
    pub fn cookie(&self) -> u64 {
        u64::from(self.id.cookie[1]) << 32 | u64::from(self.id.cookie[0])
    }

    /// Its peer, as maps have it.
    pub fn destination(&self) -> (Address, [u8; 2]) {
        let d = self.id.destination;
        let address = match self.family {
            Family::Ipv4 => ipv4_mapped([d[0], d[1], d[2], d[3]]),
            Family::Ipv6 => d,
        };
        (address, self.id.destination_port)
    }
}

/// Asks for the sockets of a family and protocol whose state is one of `states` (a bit each).
pub fn dump_request(sequence: u32, family: Family, protocol: Protocol, states: u32) -> [u8; REQUEST_LEN] {
    let flags = NLM_F_REQUEST | NLM_F_DUMP;
    request(
        (SOCK_DIAG_BY_FAMILY, flags, sequence),
        (family, protocol),
        states,
        SocketId::default(),
    )
}

/// Asks to end one socket.
pub fn destroy_request(sequence: u32, family: Family, protocol: Protocol, id: SocketId) -> [u8; REQUEST_LEN] {
    let flags = NLM_F_REQUEST | NLM_F_ACK;
    request((SOCK_DESTROY, flags, sequence), (family, protocol), 0, id)
}

fn request(
    (kind, flags, sequence): (u16, u16, u32),
    (family, protocol): (Family, Protocol),
    states: u32,
    id: SocketId,
) -> [u8; REQUEST_LEN] {
    let request = Request {
        header: Header {
            len: REQUEST_LEN as u32,
            kind,
            flags,
            sequence,
            port: 0,
        },
        family: family.number(),
        protocol: protocol.number(),
        extensions: 0,
        pad: 0,
        states,
        id,
    };
    zerocopy::transmute!(request)
}

/// What a message says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Answer {
    /// A socket.
    Socket(Socket),
    /// The request is through: 0, or why it failed (an errno).
    End(i32),
    /// Something that nobody asked for.
    Other,
}

/// The messages of one datagram, with the sequence number of the request each answers.
#[derive(Clone, Debug)]
pub struct Messages<'a> {
    bytes: &'a [u8],
}

impl<'a> Messages<'a> {
    /// Messages in `bytes`.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }
}

impl Iterator for Messages<'_> {
    type Item = Result<(u32, Answer), DecodeError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.bytes.is_empty() {
            return None;
        }
        let message = split(self.bytes);
        // After an error nothing else can be told apart.
        self.bytes = message.as_ref().map_or(&[], |(_, _, rest)| rest);
        Some(message.and_then(|(header, body, _)| Ok((header.sequence, answer(header.kind, body)?))))
    }
}

fn split(bytes: &[u8]) -> Result<(Header, &[u8], &[u8]), DecodeError> {
    let left = bytes.len();
    let (header, _) = Header::read_from_prefix(bytes).map_err(|_| DecodeError::NoHeader(left))?;
    let said = header.len as usize;
    let body = bytes.get(HEADER_LEN..said);
    let body = body.ok_or(DecodeError::Length { said, left })?;
    // The last message need not be padded.
    let next = said.checked_next_multiple_of(4).unwrap_or(left).min(left);
    Ok((header, body, &bytes[next..]))
}

fn answer(kind: u16, body: &[u8]) -> Result<Answer, DecodeError> {
    let short = || DecodeError::Body {
        kind,
        len: body.len(),
    };
    match kind {
        NLMSG_ERROR | NLMSG_DONE => {
            let (code, _) = i32::read_from_prefix(body).map_err(|_| short())?;
            Ok(Answer::End(code.checked_neg().unwrap_or(libc::EIO)))
        }
        SOCK_DIAG_BY_FAMILY => {
            let (entry, _) = Entry::read_from_prefix(body).map_err(|_| short())?;
            Ok(Answer::Socket(Socket {
                family: Family::of(entry.family)?,
                state: entry.state,
                id: entry.id,
            }))
        }
        _ => Ok(Answer::Other),
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    prop_compose! {
        fn socket_id()(
            source_port: [u8; 2], destination_port: [u8; 2], source: [u8; 16], destination: [u8; 16],
            interface: u32, cookie: [u32; 2],
        ) -> SocketId {
            SocketId { source_port, destination_port, source, destination, interface, cookie }
        }
    }

    fn family() -> impl Strategy<Value = Family> {
        prop_oneof![Just(Family::Ipv4), Just(Family::Ipv6)]
    }

    fn protocol() -> impl Strategy<Value = Protocol> {
        prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp)]
    }

    fn message(kind: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
        let header = Header {
            len: (HEADER_LEN + body.len()) as u32,
            kind,
            flags: 2,
            sequence,
            port: 7,
        };
        let mut bytes = [header.as_bytes(), body].concat();
        bytes.resize(bytes.len().next_multiple_of(4), 0xaa);
        bytes
    }

    #[derive(Clone, Debug)]
    enum Sent {
        Socket(Family, u8, SocketId),
        End(bool, i32),
        Other(u16, Vec<u8>),
    }

    fn sent() -> impl Strategy<Value = Sent> {
        prop_oneof![
            (family(), any::<u8>(), socket_id())
                .prop_map(|(family, state, id)| Sent::Socket(family, state, id)),
            (any::<bool>(), 0..4096_i32).prop_map(|(done, errno)| Sent::End(done, errno)),
            (22..u16::MAX, vec(any::<u8>(), 0..40)).prop_map(|(kind, body)| Sent::Other(kind, body)),
        ]
    }

    fn bytes_of(sequence: u32, sent: &Sent) -> Vec<u8> {
        match sent {
            Sent::Socket(family, state, id) => {
                let entry = Entry {
                    family: family.number(),
                    state: *state,
                    timer: 0,
                    retransmits: 0,
                    id: *id,
                    expires: 0,
                    receive_queue: 0,
                    write_queue: 0,
                    user: 0,
                    inode: 0,
                };
                // Attributes follow.
                message(
                    SOCK_DIAG_BY_FAMILY,
                    sequence,
                    &[entry.as_bytes(), &[5, 0, 8, 0, 0]].concat(),
                )
            }
            Sent::End(done, errno) => {
                let kind = if *done { NLMSG_DONE } else { NLMSG_ERROR };
                message(kind, sequence, &(-errno).to_ne_bytes())
            }
            Sent::Other(kind, body) => message(*kind, sequence, body),
        }
    }

    proptest! {
        #[test]
        fn what_was_sent_is_read(list in vec(sent(), 0..12), sequence: u32) {
            let bytes: Vec<u8> = list.iter().flat_map(|sent| bytes_of(sequence, sent)).collect();
            let read: Vec<_> = Messages::new(&bytes).map(Result::unwrap).collect();
            let want: Vec<_> = list.iter().map(|sent| {
                let answer = match sent {
                    Sent::Socket(family, state, id) => Answer::Socket(Socket { family: *family, state: *state, id: *id }),
                    Sent::End(_, errno) => Answer::End(*errno),
                    Sent::Other(..) => Answer::Other,
                };
                (sequence, answer)
            }).collect();
            prop_assert_eq!(read, want);
        }

        #[test]
        fn hostile_bytes_are_survived(bytes in vec(any::<u8>(), 0..600)) {
            let count = Messages::new(&bytes).count();
            prop_assert!(count <= bytes.len().div_ceil(HEADER_LEN));
        }

        /// Of true messages with a few bytes changed, and cut somewhere.
        #[test]
        fn damaged_messages_are_survived(
            list in vec(sent(), 1..6), damage in vec((any::<prop::sample::Index>(), any::<u8>()), 0..6), cut: prop::sample::Index,
        ) {
            let mut bytes: Vec<u8> = list.iter().flat_map(|sent| bytes_of(1, sent)).collect();
            for (at, byte) in damage {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            bytes.truncate(cut.index(bytes.len() + 1));
            let results: Vec<_> = Messages::new(&bytes).collect();
            prop_assert!(results.len() <= bytes.len().div_ceil(HEADER_LEN));
        }

        #[test]
        fn a_cut_message_is_an_error(sent in sent(), cut: prop::sample::Index) {
            let whole = bytes_of(1, &sent);
            let len = Header::read_from_prefix(&whole).unwrap().0.len as usize;
            let cut = cut.index(len - 1) + 1;
            let read: Vec<_> = Messages::new(&whole[..cut]).collect();
            prop_assert!(matches!(read.as_slice(), [Err(_)]), "{:?}", read);
        }

        #[test]
        fn a_request_is_laid_out_as_the_kernel_reads_it(
            sequence: u32, family in family(), protocol in protocol(), states: u32, id in socket_id(),
        ) {
            let dump = dump_request(sequence, family, protocol, states);
            let destroy = destroy_request(sequence, family, protocol, id);
            let number = |bytes: &[u8], at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
            let half = |bytes: &[u8], at: usize| u16::from_ne_bytes(bytes[at..at + 2].try_into().unwrap());
            for (bytes, kind, flags) in [(&dump, 20, 0x301), (&destroy, 21, 5)] {
                prop_assert_eq!(number(bytes, 0), 72);
                prop_assert_eq!((half(bytes, 4), half(bytes, 6), number(bytes, 8)), (kind, flags, sequence));
                prop_assert_eq!(bytes[16], if family == Family::Ipv4 { 2 } else { 10 });
                prop_assert_eq!(bytes[17], if protocol == Protocol::Tcp { 6 } else { 17 });
            }
            prop_assert_eq!(number(&dump, 20), states);
            prop_assert_eq!(&destroy[24..26], &id.source_port);
            prop_assert_eq!(&destroy[26..28], &id.destination_port);
            prop_assert_eq!(&destroy[28..44], &id.source);
            prop_assert_eq!(&destroy[44..60], &id.destination);
            prop_assert_eq!(number(&destroy, 60), id.interface);
            prop_assert_eq!([number(&destroy, 64), number(&destroy, 68)], id.cookie);
        }
    }

    #[test]
    fn a_peer_is_shown_as_maps_have_it() {
        let mut id = SocketId {
            destination_port: [0x1f, 0x90],
            cookie: [0xdead_beef, 1],
            ..SocketId::default()
        };
        id.destination[..4].copy_from_slice(&[10, 1, 0, 7]);
        let four = Socket {
            family: Family::Ipv4,
            state: 1,
            id,
        };
        assert_eq!(four.cookie(), 0x1_dead_beef);
        assert_eq!(four.destination(), (ipv4_mapped([10, 1, 0, 7]), [0x1f, 0x90]));
        id.destination = ipv4_mapped([10, 1, 0, 7]);
        let mapped = Socket {
            family: Family::Ipv6,
            id,
            ..four
        };
        assert_eq!(mapped.destination(), four.destination());
    }
}
