//! The open connections, and looking after them: certificates that end or lose their CA, clients that never speak, connections
//! that stand still, and sending everybody away at the end.
//!
//! In: the time, the TLS files. Out: peers that are told to leave or are cut off, counted by reason.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use isthmus_runtime::{CancellationToken, Health, State};
use isthmus_tls::{ServerState, ServerTls, judge::next_expiry};
use rustls::pki_types::UnixTime;
use tokio::time::{MissedTickBehavior, interval};

use super::{
    Context, Peer,
    border::{Reason, to_close},
};

/// Time between two looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// Peers that are judged before others get their turn.
const JUDGED_AT_ONCE: usize = 32;
/// When too much waits in all connections, one is closed only if it has stood still so long.
const SETTLED: Duration = Duration::from_secs(5);
/// Name of the certificates in the health register.
const CERTIFICATES: &str = "certificates";

#[derive(Debug)]
struct Open {
    peer: Arc<Peer>,
    /// When a certificate of its chain ends, Unix seconds.
    end: Option<u64>,
}

/// The open connections.
#[derive(Debug, Default)]
pub(crate) struct Registry(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    open: BTreeMap<u64, Open>,
    /// When a certificate of whose chain ends, Unix seconds.
    expiring: BTreeSet<(u64, u64)>,
    /// Until when who must have spoken, soonest first.
    silent: VecDeque<(Duration, u64)>,
    /// Everybody who comes now is told to leave.
    leaving: bool,
}

impl Inner {
    /// Waits for the next end of a connection's certificates. Nothing for one that is gone.
    fn expect_expiry(&mut self, id: u64, now: UnixTime) {
        let Some(open) = self.open.get_mut(&id) else {
            return;
        };
        let end = next_expiry(&open.peer.chain, now).map(|end| end.as_secs());
        let before = std::mem::replace(&mut open.end, end);
        before.map(|before| self.expiring.remove(&(before, id)));
        end.map(|end| self.expiring.insert((end, id)));
    }

    fn insert(&mut self, id: u64, peer: Arc<Peer>, now: UnixTime) {
        self.open.insert(id, Open { peer, end: None });
        self.expect_expiry(id, now);
    }

    fn remove(&mut self, id: u64) {
        let end = self.open.remove(&id).and_then(|open| open.end);
        end.map(|end| self.expiring.remove(&(end, id)));
    }

    /// Those of whose chains a certificate has ended.
    fn expired(&mut self, now: UnixTime) -> Vec<(u64, Arc<Peer>)> {
        let later = self.expiring.split_off(&(now.as_secs() + 1, 0));
        let due = std::mem::replace(&mut self.expiring, later);
        due.into_iter()
            .filter_map(|(_, id)| Some((id, self.open.get(&id)?.peer.clone())))
            .collect()
    }

    /// Those that ought to have spoken and have not.
    fn never_spoke(&mut self, now: Duration) -> Vec<Arc<Peer>> {
        let mut found = Vec::new();
        while let Some((_, id)) = self.silent.pop_front_if(|(until, _)| *until <= now) {
            let peer = self.open.get(&id).map(|open| &open.peer);
            found.extend(peer.filter(|peer| !peer.has_spoken()).cloned());
        }
        found
    }
}

/// A connection's entry; it goes with the value.
#[derive(Debug)]
pub(super) struct Entry {
    id: u64,
    context: Arc<Context>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.context.registry.inner().remove(self.id);
    }
}

impl Registry {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters `peer`.
    pub(super) fn enter(context: &Arc<Context>, peer: &Arc<Peer>) -> Entry {
        let until = context.now() + context.limits.handshake_timeout;
        let mut inner = context.registry.inner();
        let id = inner.next;
        inner.next += 1;
        inner.insert(id, peer.clone(), UnixTime::now());
        inner.silent.push_back((until, id));
        if inner.leaving {
            peer.leave();
        }
        Entry {
            id,
            context: context.clone(),
        }
    }

    fn all(&self) -> Vec<(u64, Arc<Peer>)> {
        let inner = self.inner();
        let peers = inner.open.iter().map(|(id, open)| (*id, open.peer.clone()));
        peers.collect()
    }

    /// Everybody who is there, and from now on everybody who comes is told to leave at once.
    pub(super) fn begin_to_leave(&self) -> Vec<Arc<Peer>> {
        let mut inner = self.inner();
        inner.leaving = true;
        inner.open.values().map(|open| open.peer.clone()).collect()
    }
}

/// Looks after the connections until `stop`.
pub(super) async fn look_after(
    context: Arc<Context>,
    tls: Arc<ServerTls>,
    health: Health,
    stop: CancellationToken,
) {
    let mut ticks = interval(LOOK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut seen = tls.current();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        // Who enters after this is judged by the same or newer files.
        let current = tls.current();
        let now = UnixTime::now();
        if !Arc::ptr_eq(&current, &seen) {
            seen = current;
            for peers in context.registry.all().chunks(JUDGED_AT_ONCE) {
                peers.iter().for_each(|(_, peer)| {
                    judge(&context, &seen, peer, now);
                });
                tokio::task::yield_now().await;
            }
        }
        let expired = context.registry.inner().expired(now);
        for (id, peer) in expired {
            // The chain may hold another way to a CA.
            if judge(&context, &seen, &peer, now) {
                context.registry.inner().expect_expiry(id, now);
            }
        }
        let silent = context.registry.inner().never_spoke(context.now());
        for peer in silent {
            context.cut_off(&peer, Reason::Timeout.as_str());
        }
        close_stalled(&context);
        report(&context, &seen, &tls, &health, now);
    }
}

/// Whether `peer` may stay; else it is cut off.
fn judge(context: &Context, state: &ServerState, peer: &Peer, now: UnixTime) -> bool {
    match state.judge(&peer.chain, now) {
        Ok(()) => true,
        Err(refusal) => {
            context.cut_off(peer, refusal.reason());
            false
        }
    }
}

fn close_stalled(context: &Context) {
    let all = context.registry.all();
    let connections = all.iter().map(|(_, peer)| {
        let account = &peer.account;
        (peer, account.pending(), account.stands_still())
    });
    let connections: Vec<(&Arc<Peer>, usize, Duration)> =
        connections.filter(|(_, pending, _)| *pending > 0).collect();
    for peer in to_close(connections, &context.limits, SETTLED) {
        context.cut_off(peer, Reason::Stalled.as_str());
    }
}

fn report(context: &Context, state: &ServerState, tls: &ServerTls, health: &Health, now: UnixTime) {
    let metrics = &context.metrics;
    metrics.pending_bytes.set(context.totals.pending() as i64);
    metrics
        .open_connections
        .set(context.border().connections() as i64);
    for (certificate, last) in [
        ("server", state.certificate_last_second()),
        ("client_ca", state.client_ca_last_second()),
    ] {
        let left = last.map(|last| last as i64 - now.as_secs() as i64);
        let label = crate::metrics::Certificate { certificate };
        metrics
            .certificate_expiry
            .get_or_create(&label)
            .set(left.unwrap_or_default());
    }
    let complaint = tls.complaint();
    metrics.certificates_usable.set(i64::from(complaint.is_none()));
    let state = match complaint {
        None => State::Ok("as in the files".to_owned()),
        Some(why) => State::Degraded(format!(
            "the files changed and are not usable, the last good ones are used: {why}"
        )),
    };
    health.set(CERTIFICATES, state);
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    use super::*;
    use crate::server::{
        account::{Account, Totals},
        border::Shares,
    };

    /// 2031-01-01.
    const END: u64 = 1_924_992_000;

    fn peer(ends: i32) -> Arc<Peer> {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.not_after = date_time_ymd(ends, 1, 1);
        let chain = vec![params.self_signed(&key).unwrap().der().clone()];
        let account = Account::new(Arc::new(Totals::new(Instant::now())), 1);
        Arc::new(Peer::new(
            "remote".into(),
            None,
            chain,
            Arc::new(Shares::default()),
            account,
        ))
    }

    fn at(seconds: u64) -> UnixTime {
        UnixTime::since_unix_epoch(Duration::from_secs(seconds))
    }

    #[test]
    fn a_chain_is_due_in_the_second_after_its_last_one() {
        let mut inner = Inner::default();
        for (id, year) in [(0, 2031), (1, 2032), (2, 2031)] {
            inner.insert(id, peer(year), at(END - 10));
        }
        inner.remove(2);
        assert_eq!(inner.expiring.len(), 2, "who is gone is not waited for");
        assert!(inner.expired(at(END)).is_empty());
        let due: Vec<u64> = inner.expired(at(END + 1)).into_iter().map(|(id, _)| id).collect();
        assert_eq!(due, [0], "1 ends later, 2 has gone");
        assert!(inner.expired(at(END + 1)).is_empty(), "once");
        // Judged again, by another certificate of its chain: it waits once.
        inner.expect_expiry(1, at(END + 1));
        inner.expect_expiry(1, at(END + 1));
        assert_eq!(inner.expiring.len(), 1);
        assert_eq!(inner.expired(at(2 * END)).len(), 1);
        inner.remove(1);
        assert!(inner.expiring.is_empty());
    }

    #[test]
    fn who_says_less_than_hello_is_found_when_it_is_time() {
        let (mut inner, second) = (Inner::default(), Duration::from_secs(1));
        for (id, heard) in [(0, 0), (1, 23), (2, 24), (3, 0)] {
            let peer = peer(2031);
            peer.hears(heard);
            inner.insert(id, peer, at(END - 10));
            inner.silent.push_back((second * (id as u32 + 1), id));
        }
        assert_eq!(inner.never_spoke(second * 3).len(), 2);
        assert_eq!(inner.silent.len(), 1);
        inner.open.clear();
        assert!(inner.never_spoke(second * 9).is_empty());
    }
}
