//! Locks of readers: leases, and keys under `cilium/.initlock/`, as Cilium's old agents and `etcdctl lock` take them. They are
//! this process' own, in memory, and no part of any cluster's state: a mutex holds among the clients of one server.
//!
//! Invariants: the decisions are [`LockSpace`]'s, and what it changed is shown before it is answered; revisions are the space's
//! own and begin at the microsecond in which the process began, so that those of an earlier process are in the past.

mod space;

use std::{
    cell::RefCell,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use isthmus_model::ClusterName;
use isthmus_proto::etcdserverpb::{RangeRequest, RangeResponse, ResponseHeader, TxnRequest};
use isthmus_runtime::CancellationToken;
use isthmus_tls::rights::KeyRange;
use prost::Message;
use tokio::sync::Notify;
use tonic::Status;

pub use space::{Changes, LockLimits, LockRefusal, LockSpace, concerns};

use super::{Context, Peer, errors};
use crate::{
    embedded::{Answer, Command, LeaseInfo, Refusal, state::Past},
    shared::Shared,
    store::{Budget, HistoryLimits, Relist, Route, Store, SubId, View},
};

/// Under this, keys are locks.
const PREFIX: &str = "cilium/.initlock/";
/// History that the watchers' view keeps.
const HISTORY: HistoryLimits = HistoryLimits {
    len: 4096,
    bytes: 1024 * 1024,
    age: Duration::MAX,
};

/// The lock space as calls share it.
#[derive(Debug)]
pub(crate) struct Locks {
    range: KeyRange,
    space: Mutex<LockSpace>,
    /// What Range and Watch see of it.
    pub(super) shared: Shared,
    /// Another lease may end first now.
    granted: Notify,
}

impl From<LockRefusal> for Status {
    fn from(refusal: LockRefusal) -> Self {
        match refusal {
            LockRefusal::Refused(refusal) => refusal.into(),
            LockRefusal::Denied => errors::permission_denied(),
            LockRefusal::TooMany => errors::too_many_requests(),
        }
    }
}

/// What watchers can still see, for a transaction that reads it.
struct Seen<'s, 'b>(RefCell<(View<'s>, &'b mut Budget)>);

impl Past for Seen<'_, '_> {
    fn range(&self, request: &RangeRequest) -> Result<RangeResponse, Refusal> {
        let mut seen = self.0.borrow_mut();
        let (view, budget) = &mut *seen;
        let answer = view.range(request, budget)?;
        budget.answer(answer.encoded_len())?;
        Ok(answer)
    }
}

impl Locks {
    /// An empty space whose headers carry `server_id`, and revisions from `revision` on.
    pub(super) fn new(own: &ClusterName, server_id: u64, revision: i64, limits: LockLimits) -> Self {
        let range = KeyRange::prefix(PREFIX);
        let mut store = Store::new(own.clone(), server_id, HISTORY, HISTORY);
        let empty = Relist {
            cluster_id: server_id,
            revision,
            new_history: false,
            changes: Vec::new(),
            present: None,
        };
        store.relist(&SubId::Own, empty);
        Self {
            space: Mutex::new(LockSpace::new(range.clone(), revision, limits)),
            range,
            shared: Shared::new(store),
            granted: Notify::new(),
        }
    }

    fn space(&self) -> MutexGuard<'_, LockSpace> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// While the space is locked, so that changes are shown in their order.
    fn show(&self, changes: Changes) {
        if !changes.changes.is_empty() || changes.compacted.is_some() {
            self.shared.update(|store| {
                store.apply(&SubId::Own, changes.revision, changes.changes);
                if let Some(at) = changes.compacted {
                    store.compact(&SubId::Own, at);
                }
            });
        }
    }

    /// The header of an answer about locks. Only its revision and member are of use to clients that are shown one cluster ID.
    pub(super) fn header(&self) -> ResponseHeader {
        self.shared.read(|store| store.header(&Route::Sub(SubId::Own)))
    }

    /// Whether a transaction is about locks.
    pub(super) fn concerns(&self, txn: &TxnRequest) -> bool {
        concerns(&self.range, txn)
    }

    /// Does a put, a deletion or a transaction, if `budget` reaches; only the revision of the answer's header is set.
    pub(super) fn write(
        &self,
        client: &str,
        command: &Command,
        budget: &mut Budget,
    ) -> Result<Answer, LockRefusal> {
        let mut space = self.space();
        space.look(command, budget).map_err(Refusal::from)?;
        let (answer, changes) = self.shared.read(|store| {
            let view = store.view(&Route::Sub(SubId::Own));
            space.write(client, command, &Seen(RefCell::new((view, budget))))
        })?;
        self.show(changes);
        Ok(answer)
    }

    /// Makes a lease and returns its TTL in seconds.
    pub(super) fn grant(&self, client: &str, id: i64, ttl: i64, now: Duration) -> Result<i64, LockRefusal> {
        let granted = self.space().grant(client, id, ttl, now)?;
        self.granted.notify_one();
        Ok(granted)
    }

    /// Ends a lease and its keys.
    pub(super) fn revoke(&self, client: &str, id: i64) -> Result<(), LockRefusal> {
        let mut space = self.space();
        let changes = space.revoke(client, id)?;
        self.show(changes);
        Ok(())
    }

    /// Seconds that the lease lasts from now on; `None` = there is none.
    pub(super) fn keep_alive(&self, client: &str, id: i64, now: Duration) -> Option<i64> {
        self.space().keep_alive(client, id, now)
    }

    pub(super) fn lease(&self, client: &str, id: i64, now: Duration) -> Option<LeaseInfo> {
        self.space().lease(client, id, now)
    }

    pub(super) fn leases(&self, client: &str) -> Vec<i64> {
        self.space().leases(client)
    }
}

impl Context {
    /// The locks, if `peer`'s are kept here: the embedded store's writer has its own there, and who has no rights has none.
    pub(super) fn locks_of(&self, peer: &Peer) -> Option<&Locks> {
        (peer.rights.is_some() && !self.is_writer(peer)).then_some(&self.locks)
    }

    /// The locks, if `peer` means them by `range`.
    pub(super) fn locks_in(&self, peer: &Peer, range: &KeyRange) -> Option<&Locks> {
        let locks = self.locks_of(peer)?;
        (!range.is_empty() && range.lies_in(&locks.range)).then_some(locks)
    }
}

/// Ends leases when their time has come, until `stop`.
pub(super) async fn expire(context: Arc<Context>, stop: CancellationToken) {
    let locks = &context.locks;
    loop {
        let next = locks.space().next_end();
        let due = async {
            match next {
                Some(at) => tokio::time::sleep(at.saturating_sub(context.now())).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = locks.granted.notified() => {}
            () = due => {}
        }
        let mut space = locks.space();
        while let Some(changes) = space.expire(context.now()) {
            locks.show(changes);
        }
    }
}
