//! Bounds of what peers can make the API server do. The defaults let 5,000 agents with one certificate connect at once and list
//! everything, and are flags where an operator may want others.

use std::time::Duration;

pub use super::locks::LockLimits;

use super::bucket::Rate;

const MIB: u64 = 1024 * 1024;

/// Bounds of what peers can make this server do. A client is everything with the same common name in its certificate.
#[derive(Clone, Debug)]
pub struct ServerLimits {
    /// Connections at once. One more is closed at once, so that its client tries another replica.
    pub connections: usize,
    /// Those of a client.
    pub connections_per_client: usize,
    /// Handshakes at once. While there are so many, the one that takes longest makes room, if it is older than a second.
    pub handshakes: usize,
    /// New connections, from anywhere. More of them wait to be accepted.
    pub connection_rate: Rate,
    /// New connections from an address. More of them are closed.
    pub connection_rate_per_address: Rate,
    /// HTTP/2 streams of one connection.
    pub streams: u32,
    /// Watches of one connection, over all its streams.
    pub watches: usize,
    /// Watches of a client.
    pub watches_per_client: usize,
    /// Bytes of a request.
    pub request_bytes: usize,
    /// Bytes of a request's headers.
    pub header_bytes: u32,
    /// Streams of a connection that were reset before they were looked at; one more ends the connection.
    pub resets: usize,
    /// Bytes of the answer to a Range of more keys than a page of 256. Readers page; who does not is told to.
    pub answer_bytes: usize,
    /// Bytes of answers of a mebibyte or more that are on their way, over all clients.
    pub answer_bytes_in_flight: usize,
    /// Keys that are looked at for answers, over a connection: also those that are not in the answer, for sorting, for limits on
    /// revisions, and on the way back to an older revision (four changes there count as one key).
    pub list_keys: Rate,
    /// Their bytes. The burst is all that a large cluster has; nobody needs that again and again.
    pub list_bytes: Rate,
    /// Keys that are looked at for answers, over all connections of a client.
    pub client_list_keys: Rate,
    /// How long a call waits for its turn before it is refused.
    pub patience: Duration,
    /// Bytes that wait in a connection for its client to read them, over all streams. While there are so many nothing is added;
    /// what is added at once is up to a mebibyte of events, or an answer.
    pub pending_bytes: usize,
    /// Bytes that wait in all connections. Above it the connections that stand still longest are closed.
    pub pending_bytes_in_all: usize,
    /// A connection that is full and has not read a byte for so long is closed.
    pub stall_timeout: Duration,
    /// A handshake takes no longer, and from its end until the client speaks HTTP/2 it takes no longer.
    pub handshake_timeout: Duration,
    /// How often a quiet watch that asked for it is told how far it has seen.
    pub progress_interval: Duration,
    /// How long a read of a revision that another replica has seen already waits for it.
    pub future_revision_wait: Duration,
    /// How long a watch waits for a start in the future, where that may be one of another history, before its client is told to
    /// list.
    pub future_watch_wait: Duration,
    /// Leases and locks of readers.
    pub locks: LockLimits,
    /// From the first sign of shutdown until no connection is accepted any longer: a load balancer notices meanwhile.
    pub shutdown_grace: Duration,
    /// After that, clients are sent away over so long a time, not all at once.
    pub shutdown_spread: Duration,
    /// Who is not gone after so much longer is cut off.
    pub shutdown_timeout: Duration,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            connections: 10_000,
            connections_per_client: 8_000,
            handshakes: 512,
            connection_rate: Rate::over(2_000, 2),
            connection_rate_per_address: Rate {
                per_second: 500,
                burst: 5_000,
            },
            streams: 128,
            watches: 8192,
            watches_per_client: 200_000,
            request_bytes: 2 * MIB as usize,
            header_bytes: 16 * 1024,
            resets: 20,
            answer_bytes: 64 * MIB as usize,
            answer_bytes_in_flight: 512 * MIB as usize,
            list_keys: Rate::over(500_000, 4),
            list_bytes: Rate {
                per_second: 32 * MIB,
                burst: 256 * MIB,
            },
            client_list_keys: Rate::over(10_000_000, 4),
            patience: Duration::from_secs(5),
            pending_bytes: 4 * MIB as usize,
            pending_bytes_in_all: 1024 * MIB as usize,
            stall_timeout: Duration::from_secs(60),
            handshake_timeout: Duration::from_secs(10),
            progress_interval: Duration::from_secs(5),
            future_revision_wait: Duration::from_millis(250),
            future_watch_wait: Duration::from_secs(5),
            locks: LockLimits::default(),
            shutdown_grace: Duration::from_secs(3),
            shutdown_spread: Duration::from_secs(1),
            shutdown_timeout: Duration::from_secs(10),
        }
    }
}
