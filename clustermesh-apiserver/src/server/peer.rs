//! Who is on the other end of a connection, and whether it may stay.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU8, AtomicU32, AtomicUsize, Ordering},
    },
};

use isthmus_tls::{Rights, rights::KeyRange};
use rustls::pki_types::CertificateDer;
use tokio::sync::Notify;
use tonic::{Request, Status};

use crate::store::Route;

use super::{
    Context,
    account::Account,
    border::{Lists, Shares, take_place},
    errors,
};

/// Bytes with which a client begins to speak HTTP/2.
const PREFACE_LEN: u32 = 24;

const STAYS: u8 = 0;
const LEAVES: u8 = 1;
const CLOSED: u8 = 2;

/// What kind of client it is, for metrics.
pub(super) fn kind(name: &str, rights: Option<&Rights>) -> &'static str {
    match name.split('-').next() {
        _ if rights.is_none() => "none",
        Some("admin") => "admin",
        Some("local") => "local",
        _ => "remote",
    }
}

/// Who is on the other end of a connection.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) name: String,
    pub(crate) kind: &'static str,
    pub(crate) rights: Option<Rights>,
    /// Open watches of all streams of the connection.
    watches: AtomicUsize,
    /// What it shares with the client's other connections.
    shares: Arc<Shares>,
    pub(super) lists: Mutex<Lists>,
    /// Histories that it has listed, where it may mistake them for earlier ones: their epochs.
    listed: Mutex<BTreeMap<Route, i64>>,
    pub(super) account: Arc<Account>,
    /// As it was shown, leaf first.
    pub(super) chain: Vec<CertificateDer<'static>>,
    /// Bytes that it has sent, as far as its first words go.
    heard: AtomicU32,
    state: AtomicU8,
    changed: Notify,
}

impl Peer {
    pub(super) fn new(
        name: String,
        rights: Option<Rights>,
        chain: Vec<CertificateDer<'static>>,
        shares: Arc<Shares>,
        account: Account,
    ) -> Self {
        Self {
            kind: kind(&name, rights.as_ref()),
            name,
            rights,
            watches: AtomicUsize::new(0),
            shares,
            lists: Mutex::default(),
            listed: Mutex::default(),
            account: Arc::new(account),
            chain,
            heard: AtomicU32::new(0),
            state: AtomicU8::new(STAYS),
            changed: Notify::new(),
        }
    }

    /// The peer that sent `request`.
    pub(crate) fn of<T>(request: &Request<T>) -> Result<Arc<Self>, Status> {
        // Each accepted connection has one.
        let peer = request.extensions().get::<Arc<Self>>();
        peer.cloned().ok_or_else(errors::permission_denied)
    }

    pub(crate) fn may_read(&self, range: &KeyRange) -> bool {
        self.rights.as_ref().is_some_and(|rights| rights.covers(range))
    }

    /// It has listed the history of this epoch.
    pub(super) fn has_listed(&self, route: &Route, epoch: i64) {
        let mut listed = self.listed.lock().unwrap_or_else(PoisonError::into_inner);
        listed.insert(route.clone(), epoch);
    }

    /// Whether it knows the history of this epoch.
    pub(super) fn knows(&self, route: &Route, epoch: i64) -> bool {
        let listed = self.listed.lock().unwrap_or_else(PoisonError::into_inner);
        listed.get(route) == Some(&epoch)
    }

    /// A watch of it has ended, or several.
    pub(crate) fn watches_ended(&self, count: usize) {
        self.watches.fetch_sub(count, Ordering::Relaxed);
        self.shares.watches.fetch_sub(count, Ordering::Relaxed);
    }

    /// It is to go: its streams end when they have said everything.
    pub(super) fn leave(&self) {
        self.set(LEAVES);
    }

    /// It is cut off.
    pub(super) fn close(&self) {
        self.set(CLOSED);
    }

    fn set(&self, state: u8) {
        self.state.fetch_max(state, Ordering::SeqCst);
        self.changed.notify_waiters();
    }

    /// Whether it is to go.
    pub(crate) fn leaves(&self) -> bool {
        self.state.load(Ordering::SeqCst) >= LEAVES
    }

    /// Waits until it is to go.
    pub(crate) async fn left(self: Arc<Self>) {
        self.reaches(LEAVES).await;
    }

    /// Waits until it is cut off.
    pub(super) async fn closed(&self) {
        self.reaches(CLOSED).await;
    }

    async fn reaches(&self, state: u8) {
        loop {
            // First, so that no change between the look and the wait is missed.
            let changed = self.changed.notified();
            if self.state.load(Ordering::SeqCst) >= state {
                return;
            }
            changed.await;
        }
    }

    /// It has sent so many bytes.
    pub(super) fn hears(&self, bytes: usize) {
        if self.heard.load(Ordering::Relaxed) < PREFACE_LEN {
            let bytes = u32::try_from(bytes).unwrap_or(PREFACE_LEN).min(PREFACE_LEN);
            self.heard.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// Whether it has spoken.
    pub(super) fn has_spoken(&self) -> bool {
        self.heard.load(Ordering::Relaxed) >= PREFACE_LEN
    }
}

impl Context {
    /// A place for one more watch of `peer`, which is to be given back with [`Peer::watches_ended`].
    pub(crate) fn take_watch(&self, peer: &Peer) -> bool {
        if take_place(&peer.watches, self.limits.watches) {
            if take_place(&peer.shares.watches, self.limits.watches_per_client) {
                return true;
            }
            peer.watches.fetch_sub(1, Ordering::Relaxed);
        }
        self.throttled(peer, "watches", "one more watch");
        false
    }
}
