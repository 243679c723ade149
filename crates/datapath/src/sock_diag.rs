//! Ends sockets whose peer is gone (`NETLINK_SOCK_DIAG`, `SOCK_DESTROY`): their owners get ECONNABORTED at once, where they would
//! wait for a time-out.
//!
//! In: entries of the map that says which socket reached which backend through a frontend, and where pods are. Out: how many
//! sockets were ended. What should end is decided elsewhere.
//!
//! Invariants:
//! - A socket is ended only if that map's entry names it: by its number, its present peer and its protocol. One that reaches
//!   the same address without a frontend has no entry.
//! - The kernel compares the number once more when it ends a socket: ports that were taken anew meanwhile are not hit.
//! - A walk goes once over each namespace, for all of its targets, on a thread of its own, and ends with it.

mod connection;
pub mod message;
mod namespaces;

use std::{
    collections::HashSet,
    fs::File,
    io,
    path::{Path, PathBuf},
    thread,
};

use isthmus_bpf_abi::{PROTO_TCP, PROTO_UDP, ReverseSkKey, is_ipv4_mapped};
use nix::sched::{CloneFlags, setns};
use tokio::sync::oneshot;

use self::{
    connection::Connection,
    message::{DecodeError, Family, Socket, SocketId},
};

/// Errors that a report keeps; others are only counted.
const FAILURES_MAX: usize = 4;

/// States in which somebody waits for a peer: established, SYN sent, one side closed.
const STATES: u32 = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8;

/// Protocols whose sockets can be ended.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP, connected sockets.
    Udp,
}

impl Protocol {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Tcp, Self::Udp];

    /// IANA number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => PROTO_TCP,
            Self::Udp => PROTO_UDP,
        }
    }

    /// For labels and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// Sockets could not be looked for or ended.
#[derive(Debug, thiserror::Error)]
pub enum SockDiagError {
    /// A system call.
    #[error("{call} (NETLINK_SOCK_DIAG)")]
    Call {
        /// What was tried.
        call: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// An answer that is none.
    #[error("the kernel's answer does not read (NETLINK_SOCK_DIAG)")]
    Malformed(#[from] DecodeError),
    /// The kernel says no.
    #[error("the kernel refuses {what}")]
    Refused {
        /// What it was asked.
        what: &'static str,
        /// Its answer.
        #[source]
        source: io::Error,
    },
    /// The kernel was built without it.
    #[error("the kernel cannot end sockets: it was built without CONFIG_INET_DIAG_DESTROY")]
    Unsupported,
}

/// Whether the kernel can end sockets of a protocol, asked in the calling thread's namespace.
pub fn probe(protocol: Protocol) -> Result<(), SockDiagError> {
    let mut connection = Connection::open()?;
    // No socket has any of no states.
    connection.dump(Family::Ipv4, protocol, 0, |_| {})?;
    // Nor has one the port 0 and this number.
    let nobody = SocketId {
        cookie: [0, u32::MAX],
        ..SocketId::default()
    };
    connection.destroy(Family::Ipv4, protocol, nobody).map(drop)
}

/// What to end, and where to look for it.
#[derive(Clone, Debug, Default)]
pub struct Walk {
    /// Paths of the pods' namespaces. If one does not lead to a namespace, every one that is found by name or process is
    /// searched too.
    pub pods: Vec<PathBuf>,
    /// Entries of `isthmus_reverse_sk`.
    pub targets: HashSet<ReverseSkKey>,
    /// Sockets to end at most.
    pub sockets_max: usize,
}

/// What became of a walk.
#[derive(Debug, Default)]
pub struct Ended {
    /// TCP connections that were ended.
    pub tcp: usize,
    /// Connected UDP sockets that were.
    pub udp: usize,
    /// Namespaces that were looked at.
    pub namespaces: usize,
    /// There were more than could be ended in one walk.
    pub unfinished: bool,
    /// Things that failed; the walk went on after each.
    pub failures: usize,
    /// The first of them, each with the namespace.
    pub errors: Vec<(PathBuf, SockDiagError)>,
}

impl Ended {
    /// Sockets that were ended.
    pub const fn sockets(&self) -> usize {
        self.tcp + self.udp
    }

    fn failed(&mut self, namespace: &Path, error: SockDiagError) {
        self.failures += 1;
        if self.errors.len() < FAILURES_MAX {
            self.errors.push((namespace.to_owned(), error));
        }
    }
}

/// Starts a walk. It begins in the calling thread's namespace; that thread stays where it is.
pub fn start(walk: Walk) -> io::Result<oneshot::Receiver<Ended>> {
    let (done, ended) = oneshot::channel();
    thread::Builder::new()
        .name("sock-diag".to_owned())
        .spawn(move || {
            // Who asked may have gone.
            let _ = done.send(run(&walk));
        })?;
    Ok(ended)
}

/// The calling thread is in some namespace then.
fn run(walk: &Walk) -> Ended {
    let mut ended = Ended::default();
    let kinds = kinds(&walk.targets);
    if kinds.is_empty() {
        return ended;
    }
    let visited = namespaces::walk(&walk.pods, |path, namespace| {
        visit(walk, &kinds, path, namespace, &mut ended);
        !ended.unfinished
    });
    match visited {
        Ok(visited) => ended.namespaces = visited,
        Err(source) => {
            let call = "opening the own network namespace";
            ended.failed(Path::new(""), SockDiagError::Call { call, source });
        }
    }
    ended
}

/// Which dumps can show targets. An IPv6 socket may talk IPv4.
fn kinds(targets: &HashSet<ReverseSkKey>) -> Vec<(Protocol, Family)> {
    let some = |protocol: Protocol, v4: bool| {
        targets
            .iter()
            .any(|target| target.proto == protocol.number() && is_ipv4_mapped(&target.address) == v4)
    };
    let mut kinds = vec![];
    for protocol in Protocol::ALL {
        let (v4, v6) = (some(protocol, true), some(protocol, false));
        if v4 {
            kinds.push((protocol, Family::Ipv4));
        }
        if v4 || v6 {
            kinds.push((protocol, Family::Ipv6));
        }
    }
    kinds
}

fn visit(walk: &Walk, kinds: &[(Protocol, Family)], path: &Path, namespace: &File, ended: &mut Ended) {
    let entered = setns(namespace, CloneFlags::CLONE_NEWNET).map_err(|errno| SockDiagError::Call {
        call: "entering a network namespace",
        source: errno.into(),
    });
    let mut connection = match entered.and_then(|()| Connection::open()) {
        Ok(connection) => connection,
        Err(error) => return ended.failed(path, error),
    };
    for &(protocol, family) in kinds {
        if let Err(error) = end(walk, protocol, family, &mut connection, path, ended) {
            ended.failed(path, error);
        }
    }
}

/// Ends the targets of one protocol and family in the connection's namespace.
fn end(
    walk: &Walk,
    protocol: Protocol,
    family: Family,
    connection: &mut Connection,
    path: &Path,
    ended: &mut Ended,
) -> Result<(), SockDiagError> {
    let room = walk.sockets_max.saturating_sub(ended.sockets());
    let mut found: Vec<Socket> = vec![];
    connection.dump(family, protocol, STATES, |socket| {
        if !walk.targets.contains(&target(&socket, protocol)) {
            return;
        }
        if found.len() < room {
            found.push(socket);
        } else {
            ended.unfinished = true;
        }
    })?;
    for socket in found {
        match connection.destroy(socket.family, protocol, socket.id) {
            Ok(false) => {}
            Ok(true) if protocol == Protocol::Tcp => ended.tcp += 1,
            Ok(true) => ended.udp += 1,
            // Nor would the next one end.
            Err(SockDiagError::Unsupported) => return Err(SockDiagError::Unsupported),
            Err(error) => ended.failed(path, error),
        }
    }
    Ok(())
}

/// The entry that a socket has if it reached its present peer through a frontend.
fn target(socket: &Socket, protocol: Protocol) -> ReverseSkKey {
    let (address, port) = socket.destination();
    ReverseSkKey {
        cookie: socket.cookie(),
        address,
        port,
        proto: protocol.number(),
        pad: [0; 5],
    }
}
