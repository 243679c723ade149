//! One netlink socket: asks, and takes the answers.
//!
//! In: requests. Out: sockets, results. A connection belongs to the network namespace that its thread was in when it was
//! opened. Nothing waits for ever: a kernel that does not answer is an error.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
            sockopt,
        },
        time::{TimeVal, TimeValLike},
    },
};

use super::{
    Protocol, SockDiagError,
    message::{Answer, Family, Messages, Socket, SocketId, destroy_request, dump_request},
};

/// The most that the kernel puts into one datagram of a dump.
const BUFFER_LEN: usize = 32_768;
/// Most time for an answer: a dump answers a datagram at a time.
const ANSWER_SECONDS_MAX: i64 = 10;

/// See the module.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    sequence: u32,
    buffer: Box<[u8]>,
}

impl Connection {
    /// Opens one, for the namespace of the calling thread.
    pub fn open() -> Result<Self, SockDiagError> {
        let failed = |call| {
            move |errno: Errno| SockDiagError::Call {
                call,
                source: errno.into(),
            }
        };
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkSockDiag,
        )
        .map_err(failed("opening a socket"))?;
        setsockopt(
            &socket,
            sockopt::ReceiveTimeout,
            &TimeVal::seconds(ANSWER_SECONDS_MAX),
        )
        .map_err(failed("setting a timeout"))?;
        Ok(Self {
            socket,
            sequence: 0,
            buffer: vec![0; BUFFER_LEN].into_boxed_slice(),
        })
    }

    /// Hands on every socket of a family and protocol in one of `states`.
    pub fn dump(
        &mut self,
        family: Family,
        protocol: Protocol,
        states: u32,
        mut each: impl FnMut(Socket),
    ) -> Result<(), SockDiagError> {
        self.sequence = self.sequence.wrapping_add(1);
        let request = dump_request(self.sequence, family, protocol, states);
        match self.ask(&request, &mut each)? {
            0 => Ok(()),
            errno => Err(refused("to list sockets", errno)),
        }
    }

    /// Ends a socket: its owner gets ECONNABORTED. False if it is not there any more.
    pub fn destroy(
        &mut self,
        family: Family,
        protocol: Protocol,
        id: SocketId,
    ) -> Result<bool, SockDiagError> {
        self.sequence = self.sequence.wrapping_add(1);
        let request = destroy_request(self.sequence, family, protocol, id);
        match self.ask(&request, &mut |_| {})? {
            0 => Ok(true),
            // Closed, or its ports are another's by now.
            libc::ENOENT | libc::ESTALE => Ok(false),
            libc::EOPNOTSUPP => Err(SockDiagError::Unsupported),
            errno => Err(refused("to end a socket", errno)),
        }
    }

    /// Sends a request and takes what comes until it is through. Returns its errno.
    fn ask(&mut self, request: &[u8], each: &mut dyn FnMut(Socket)) -> Result<i32, SockDiagError> {
        let call = |call| {
            move |errno: Errno| SockDiagError::Call {
                call,
                source: errno.into(),
            }
        };
        let fd = self.socket.as_raw_fd();
        retried(|| send(fd, request, MsgFlags::empty())).map_err(call("sending"))?;
        loop {
            // With the flag the length is the datagram's, also where the buffer is too short for it.
            let len =
                retried(|| recv(fd, &mut self.buffer, MsgFlags::MSG_TRUNC)).map_err(call("receiving"))?;
            let bytes = self.buffer.get(..len).ok_or(SockDiagError::Call {
                call: "receiving",
                source: Errno::EMSGSIZE.into(),
            })?;
            for message in Messages::new(bytes) {
                match message? {
                    // What is left of a request that failed.
                    (sequence, _) if sequence != self.sequence => {}
                    (_, Answer::Socket(socket)) => each(socket),
                    (_, Answer::End(errno)) => return Ok(errno),
                    (_, Answer::Other) => {}
                }
            }
        }
    }
}

fn refused(what: &'static str, errno: i32) -> SockDiagError {
    SockDiagError::Refused {
        what,
        source: io::Error::from_raw_os_error(errno),
    }
}

fn retried<T>(mut call: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}
