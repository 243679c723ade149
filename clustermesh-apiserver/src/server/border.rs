//! Who gets in, and how much each may have: the decisions of the border, for each client by the common name of its certificate.
//! Pure: the time, since any fixed moment, is an argument.
//!
//! In: addresses that knock, names that handshakes have verified, what was answered. Out: let in, wait, or refuse with a
//! [`Reason`]. Invariants: what is held of a client goes when it has left and owes nothing, and of addresses no more than
//! [`ADDRESSES_MAX`] are held; who was refused is charged nothing.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use super::{bucket::Bucket, limits::ServerLimits};

/// Addresses whose rates are held. When there are more, those at rest go; if none is, an unknown address has no rate of its own.
const ADDRESSES_MAX: usize = 8192;
/// Clients at which those that left and owe nothing go.
const CLIENTS_KEPT: usize = 1024;

/// Why somebody is refused something, beside what is wrong with a certificate.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum Reason {
    /// All connections are taken.
    Connections,
    /// The client's are.
    ClientConnections,
    /// The address connects too often.
    ConnectionRate,
    /// The handshake stood in the way of others.
    Evicted,
    /// The handshake, or the client's first words, took too long.
    Timeout,
    /// The network failed in the handshake.
    Network,
    /// The certificate has no usable name.
    NoName,
    /// The client lists too much.
    ListRate,
    /// Too much is on its way to all clients.
    AnswersInFlight,
    /// The connection stands still.
    Stalled,
}

impl Reason {
    /// A word for metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::ClientConnections => "connections_per_client",
            Self::ConnectionRate => "connection_rate",
            Self::Evicted => "handshake_evicted",
            Self::Timeout => "timeout",
            Self::Network => "network",
            Self::NoName => "no_name",
            Self::ListRate => "list_rate",
            Self::AnswersInFlight => "answers_in_flight",
            Self::Stalled => "stalled",
        }
    }
}

/// What to do with a connection that was accepted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Knock {
    Proceed,
    /// So long; then it may proceed.
    Wait(Duration),
    Refuse(Reason),
}

/// What all connections of a client share.
#[derive(Debug, Default)]
pub(crate) struct Shares {
    /// Open watches.
    pub(crate) watches: AtomicUsize,
}

#[derive(Debug, Default)]
struct Client {
    connections: usize,
    lists: Bucket,
    shares: Arc<Shares>,
}

impl Client {
    fn is_forgettable(&self, now: Duration) -> bool {
        self.connections == 0 && self.lists.is_full(now)
    }
}

/// The books.
#[derive(Debug, Default)]
pub(crate) struct Border {
    connections: usize,
    rate: Bucket,
    addresses: HashMap<IpAddr, Bucket>,
    clients: BTreeMap<String, Client>,
}

impl Border {
    /// Somebody has connected from `address`.
    pub(crate) fn knock(&mut self, address: IpAddr, limits: &ServerLimits, now: Duration) -> Knock {
        if self.connections >= limits.connections {
            return Knock::Refuse(Reason::Connections);
        }
        if self.addresses.len() >= ADDRESSES_MAX && !self.addresses.contains_key(&address) {
            self.addresses.retain(|_, bucket| !bucket.is_full(now));
        }
        let rate = &limits.connection_rate_per_address;
        let known = self.addresses.len() < ADDRESSES_MAX || self.addresses.contains_key(&address);
        if known
            && self
                .addresses
                .entry(address)
                .or_default()
                .take(rate, 1, now)
                .is_err()
        {
            return Knock::Refuse(Reason::ConnectionRate);
        }
        self.rate.charge(&limits.connection_rate, 1, now);
        match self.rate.wait(&limits.connection_rate, now) {
            Duration::ZERO => Knock::Proceed,
            wait => Knock::Wait(wait),
        }
    }

    /// A handshake has verified that a connection is the client's called `name`. Who is let in must [`leave`](Self::leave).
    pub(crate) fn enter(
        &mut self,
        name: &str,
        limits: &ServerLimits,
        now: Duration,
    ) -> Result<Arc<Shares>, Reason> {
        if self.connections >= limits.connections {
            return Err(Reason::Connections);
        }
        if self.clients.len() >= CLIENTS_KEPT && !self.clients.contains_key(name) {
            self.clients.retain(|_, client| !client.is_forgettable(now));
        }
        let client = self.clients.entry(name.to_owned()).or_default();
        if client.connections >= limits.connections_per_client {
            return Err(Reason::ClientConnections);
        }
        client.connections += 1;
        self.connections += 1;
        Ok(client.shares.clone())
    }

    /// A connection of `name` has ended.
    pub(crate) fn leave(&mut self, name: &str, now: Duration) {
        let Some(client) = self.clients.get_mut(name) else {
            return;
        };
        client.connections = client.connections.saturating_sub(1);
        self.connections = self.connections.saturating_sub(1);
        if client.is_forgettable(now) {
            self.clients.remove(name);
        }
    }

    /// How long a Range of `name` has to wait for its turn, by what was answered to all connections of the client.
    pub(crate) fn list_wait(&self, name: &str, limits: &ServerLimits, now: Duration) -> Duration {
        let client = self.clients.get(name);
        client.map_or(Duration::ZERO, |client| {
            client.lists.wait(&limits.client_list_keys, now)
        })
    }

    /// A Range of `name` was answered with so many keys.
    pub(crate) fn listed(&mut self, name: &str, keys: u64, limits: &ServerLimits, now: Duration) {
        if let Some(client) = self.clients.get_mut(name) {
            client.lists.charge(&limits.client_list_keys, keys, now);
        }
    }

    /// Open connections.
    pub(crate) fn connections(&self) -> usize {
        self.connections
    }
}

/// Rates of one connection's lists.
#[derive(Debug, Default)]
pub(crate) struct Lists {
    keys: Bucket,
    bytes: Bucket,
}

impl Lists {
    /// How long the next Range has to wait for its turn.
    pub(crate) fn wait(&self, limits: &ServerLimits, now: Duration) -> Duration {
        let keys = self.keys.wait(&limits.list_keys, now);
        keys.max(self.bytes.wait(&limits.list_bytes, now))
    }

    /// A Range was answered.
    pub(crate) fn listed(&mut self, keys: u64, bytes: u64, limits: &ServerLimits, now: Duration) {
        self.keys.charge(&limits.list_keys, keys, now);
        self.bytes.charge(&limits.list_bytes, bytes, now);
    }
}

/// Adds one to `count` unless it is `limit` already.
pub(crate) fn take_place(count: &AtomicUsize, limit: usize) -> bool {
    count
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| {
            (taken < limit).then_some(taken + 1)
        })
        .is_ok()
}

/// At most one log line about each kind of thing within an interval, with the number of those that were left out.
#[derive(Debug)]
pub(crate) struct LogGate<K> {
    interval: Duration,
    last: BTreeMap<K, (Duration, u64)>,
}

impl<K: Ord> LogGate<K> {
    /// `interval` between lines about the same.
    pub(crate) fn new(interval: Duration) -> Self {
        Self {
            interval,
            last: BTreeMap::new(),
        }
    }

    /// `Some` if a line is due: how many like it were not logged since the last one.
    pub(crate) fn ask(&mut self, kind: K, now: Duration) -> Option<u64> {
        match self.last.get_mut(&kind) {
            Some((last, left_out)) if now.saturating_sub(*last) < self.interval => {
                *left_out += 1;
                None
            }
            Some((last, left_out)) => {
                *last = now;
                Some(std::mem::take(left_out))
            }
            None => {
                self.last.insert(kind, (now, 0));
                Some(0)
            }
        }
    }
}

/// Which of the connections to close: those that are full and have stood still too long, and, while more waits in all of them
/// than may, those that stand still longest. Each is an identity, the bytes that wait in it, and how long it stands still.
pub(crate) fn to_close<I: Copy>(
    mut connections: Vec<(I, usize, Duration)>,
    limits: &ServerLimits,
    settled: Duration,
) -> Vec<I> {
    let mut in_all: usize = connections.iter().map(|(_, pending, _)| pending).sum();
    connections.sort_by_key(|(_, pending, still)| std::cmp::Reverse((*still, *pending)));
    let mut closed = Vec::new();
    for (id, pending, still) in connections {
        let stalled = pending >= limits.pending_bytes && still >= limits.stall_timeout;
        let presses = in_all > limits.pending_bytes_in_all && pending > 0 && still >= settled;
        if stalled || presses {
            in_all -= pending;
            closed.push(id);
        }
    }
    closed
}

#[cfg(test)]
mod tests;
