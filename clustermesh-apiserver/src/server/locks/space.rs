//! Leases and lock keys of readers. Pure: no I/O, time is an argument.
//!
//! In: calls, each with its client's name. Out: answers, and the changes that watchers of lock keys are to see.
//!
//! Invariants: a client sees and changes its own leases only, and changes its own keys only; each key belongs to a lease and ends
//! with it; what a client has, what all have, and how much of the past is kept is bounded. What a call does is what etcd does:
//! it is done by the same code as the embedded store's.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use isthmus_proto::etcdserverpb::{
    DeleteRangeRequest, PutRequest, RangeRequest, RangeResponse, TxnRequest, request_op::Request,
};
use isthmus_tls::rights::KeyRange;

use crate::{
    embedded::{
        Answer, Command, LeaseInfo, Refusal, granted_ttl,
        state::{Past, Retention, State},
    },
    store::{Budget, RangeError, SourceChange},
};

/// What a key takes in an answer beside itself and its value, at most.
const KEY_VALUE_LEN: usize = 64;
/// How much of the past watchers of lock keys can ask for.
const RETENTION: Retention = Retention {
    revisions: 4096,
    bytes: 1024 * 1024,
};

/// Bounds of what readers can have.
#[derive(Clone, Debug)]
pub struct LockLimits {
    /// Leases of a client: of everything with the same common name.
    pub leases_per_client: usize,
    /// Leases in all.
    pub leases: usize,
    /// Lock keys of a client.
    pub keys_per_client: usize,
    /// Lock keys in all.
    pub keys: usize,
    /// Bytes of a lock key and its value together.
    pub key_bytes: usize,
}

impl Default for LockLimits {
    fn default() -> Self {
        // Agents of Cilium 1.4 take a lease of 15 minutes each time they connect; 5,000 may have one name.
        Self {
            leases_per_client: 50_000,
            leases: 100_000,
            keys_per_client: 10_000,
            keys: 20_000,
            key_bytes: 512,
        }
    }
}

/// Why a call is refused.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum LockRefusal {
    /// As etcd would.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The key is another client's, or would outlive its writer.
    #[error("etcdserver: permission denied")]
    Denied,
    /// A bound is reached.
    #[error("etcdserver: too many requests")]
    TooMany,
}

/// What changed for watchers: the revision that is reached now, and what happened.
#[derive(Debug, Default)]
pub struct Changes {
    /// Of the space.
    pub revision: i64,
    /// In order.
    pub changes: Vec<SourceChange>,
    /// Nothing before this revision is known any more.
    pub compacted: Option<i64>,
}

/// For commands that read nothing.
struct NoPast;

impl Past for NoPast {
    fn range(&self, _: &RangeRequest) -> Result<RangeResponse, Refusal> {
        Err(Refusal::Compacted)
    }
}

#[derive(Debug)]
struct Lease {
    client: Arc<str>,
    ends: Duration,
}

#[derive(Debug, Default, Eq, PartialEq)]
struct Has {
    leases: BTreeSet<i64>,
    keys: usize,
}

/// Whether a transaction compares, reads and writes keys in `range` only.
pub fn concerns(range: &KeyRange, txn: &TxnRequest) -> bool {
    // A range that ends before it begins lies anywhere.
    let inside =
        |key: &Bytes, end: &Bytes| range.contains(key) && KeyRange::from_etcd(key, end).lies_in(range);
    let mut compares = txn.compare.iter();
    let mut ops = txn.success.iter().chain(&txn.failure);
    compares.all(|compare| inside(&compare.key, &compare.range_end))
        && ops.all(|op| match &op.request {
            Some(Request::RequestRange(range)) => inside(&range.key, &range.range_end),
            Some(Request::RequestPut(put)) => inside(&put.key, &Bytes::new()),
            Some(Request::RequestDeleteRange(delete)) => inside(&delete.key, &delete.range_end),
            Some(Request::RequestTxn(txn)) => concerns(range, txn),
            None => true,
        })
}

/// All leases and lock keys.
#[derive(Debug)]
pub struct LockSpace {
    range: KeyRange,
    state: State,
    leases: BTreeMap<i64, Lease>,
    /// By end.
    ends: BTreeSet<(Duration, i64)>,
    /// Whose key each is.
    keys: BTreeMap<Bytes, Arc<str>>,
    clients: BTreeMap<Arc<str>, Has>,
    limits: LockLimits,
}

impl LockSpace {
    /// Empty. Keys lie in `range`; the first revision is `revision`.
    pub fn new(range: KeyRange, revision: i64, limits: LockLimits) -> Self {
        Self {
            range,
            state: State::beginning_at(revision),
            leases: BTreeMap::new(),
            ends: BTreeSet::new(),
            keys: BTreeMap::new(),
            clients: BTreeMap::new(),
            limits,
        }
    }

    fn has(&self, client: &str) -> (usize, usize) {
        let has = self.clients.get(client);
        has.map_or((0, 0), |has| (has.leases.len(), has.keys))
    }

    fn change(&mut self, client: &Arc<str>, change: impl FnOnce(&mut Has)) {
        let has = self.clients.entry(client.clone()).or_default();
        change(has);
        if *has == Has::default() {
            self.clients.remove(client);
        }
    }

    /// The lock keys that etcd means by these two fields, and whose they are.
    fn between(&self, key: &[u8], range_end: &[u8]) -> impl Iterator<Item = (&Bytes, &Arc<str>)> {
        let range = KeyRange::from_etcd(key, range_end);
        let from = (Bound::Included(key), Bound::Unbounded);
        let keys = self.keys.range::<[u8], _>(from);
        keys.take_while(move |(key, _)| range.contains(key))
    }

    /// Charges what `command` looks at and answers, at most and in whichever branch it takes: once it writes it cannot be
    /// stopped. What it writes itself is not counted; its operations are few.
    pub fn look(&self, command: &Command, budget: &mut Budget) -> Result<(), RangeError> {
        match command {
            Command::Put(request) => self.look_at_put(request, budget),
            Command::Delete(request) => self.look_at_deletion(request, budget),
            Command::Txn(request) => self.look_at_txn(request, budget),
            Command::Grant { .. } | Command::Revoke(_) | Command::Compact(_) => Ok(()),
        }
    }

    fn look_at_txn(&self, txn: &TxnRequest, budget: &mut Budget) -> Result<(), RangeError> {
        for compare in &txn.compare {
            self.count(&compare.key, &compare.range_end, budget)?;
        }
        for op in txn.success.iter().chain(&txn.failure) {
            match &op.request {
                Some(Request::RequestRange(request)) => self.look_at_range(request, budget)?,
                Some(Request::RequestPut(request)) => self.look_at_put(request, budget)?,
                Some(Request::RequestDeleteRange(request)) => self.look_at_deletion(request, budget)?,
                Some(Request::RequestTxn(request)) => self.look_at_txn(request, budget)?,
                None => {}
            }
        }
        Ok(())
    }

    /// Keys in a range, as far as `budget` reaches. To look for them is not for nothing.
    fn count(&self, key: &[u8], range_end: &[u8], budget: &mut Budget) -> Result<usize, RangeError> {
        budget.look(1)?;
        let mut count = 0;
        for _ in self.between(key, range_end) {
            budget.look(1)?;
            count += 1;
        }
        Ok(count)
    }

    fn answer(&self, keys: usize, budget: &mut Budget) -> Result<(), RangeError> {
        budget.answer(keys.saturating_mul(self.limits.key_bytes + KEY_VALUE_LEN))
    }

    fn look_at_range(&self, range: &RangeRequest, budget: &mut Budget) -> Result<(), RangeError> {
        if (1..self.state.revision()).contains(&range.revision) {
            // What it finds, in the past, is counted there.
            return budget.look(1);
        }
        let found = self.count(&range.key, &range.range_end, budget)?;
        match usize::try_from(range.limit) {
            _ if range.count_only => Ok(()),
            Ok(limit) if limit > 0 => self.answer(found.min(limit), budget),
            _ => self.answer(found, budget),
        }
    }

    fn look_at_put(&self, put: &PutRequest, budget: &mut Budget) -> Result<(), RangeError> {
        budget.look(1)?;
        self.answer(usize::from(put.prev_kv), budget)
    }

    fn look_at_deletion(&self, delete: &DeleteRangeRequest, budget: &mut Budget) -> Result<(), RangeError> {
        let found = self.count(&delete.key, &delete.range_end, budget)?;
        self.answer(if delete.prev_kv { found } else { 0 }, budget)
    }

    /// Does a put, a deletion or a transaction of `client`. Ranges in it at older revisions are answered by `past`.
    pub fn write(
        &mut self,
        client: &str,
        command: &Command,
        past: &dyn Past,
    ) -> Result<(Answer, Changes), LockRefusal> {
        let puts = match command {
            Command::Put(request) => self.may_put(client, request).map(|()| 1)?,
            Command::Delete(request) => self.may_delete(client, request).map(|()| 0)?,
            Command::Txn(request) => self.may_txn(client, request)?,
            // Leases have calls of their own, and the past ends by itself.
            Command::Grant { .. } | Command::Revoke(_) | Command::Compact(_) => {
                return Err(LockRefusal::Denied);
            }
        };
        let (_, keys) = self.has(client);
        let full = keys + puts > self.limits.keys_per_client || self.keys.len() + puts > self.limits.keys;
        if puts > 0 && full {
            return Err(LockRefusal::TooMany);
        }
        Ok(self.apply(&Arc::from(client), command, past)?)
    }

    fn may_put(&self, client: &str, put: &PutRequest) -> Result<(), LockRefusal> {
        let inside = KeyRange::from_etcd(&put.key, &[]).lies_in(&self.range);
        let foreign = self.keys.get(&put.key).is_some_and(|owner| **owner != *client);
        if !inside || foreign || (put.lease == 0 && !put.ignore_lease) {
            return Err(LockRefusal::Denied);
        }
        if put.key.len() + put.value.len() > self.limits.key_bytes {
            return Err(Refusal::TooLarge.into());
        }
        let lease = self.leases.get(&put.lease);
        if put.lease != 0 && lease.is_none_or(|lease| *lease.client != *client) {
            return Err(Refusal::LeaseNotFound.into());
        }
        Ok(())
    }

    fn may_delete(&self, client: &str, delete: &DeleteRangeRequest) -> Result<(), LockRefusal> {
        let range = KeyRange::from_etcd(&delete.key, &delete.range_end);
        if range.is_empty() {
            return Ok(());
        }
        let mut owners = self.between(&delete.key, &delete.range_end);
        if !range.lies_in(&self.range) || owners.any(|(_, owner)| **owner != *client) {
            return Err(LockRefusal::Denied);
        }
        Ok(())
    }

    /// Both branches are judged, whichever is taken. Returns how many puts there are.
    fn may_txn(&self, client: &str, txn: &TxnRequest) -> Result<usize, LockRefusal> {
        let mut puts = 0;
        for op in txn.success.iter().chain(&txn.failure) {
            match &op.request {
                Some(Request::RequestPut(put)) => {
                    self.may_put(client, put)?;
                    puts += 1;
                }
                Some(Request::RequestDeleteRange(delete)) => self.may_delete(client, delete)?,
                Some(Request::RequestTxn(txn)) => puts += self.may_txn(client, txn)?,
                Some(Request::RequestRange(_)) | None => {}
            }
        }
        Ok(puts)
    }

    /// Takes the state's word for what happened. New keys are `client`'s.
    fn apply(
        &mut self,
        client: &Arc<str>,
        command: &Command,
        past: &dyn Past,
    ) -> Result<(Answer, Changes), Refusal> {
        let (answer, effects) = self.state.apply(command, past)?;
        for change in &effects.changes {
            let key = change.key();
            if matches!(change, SourceChange::Delete { .. }) {
                if let Some(owner) = self.keys.remove(key) {
                    self.change(&owner, |has| has.keys -= 1);
                }
            } else if !self.keys.contains_key(key) {
                self.keys.insert(Bytes::copy_from_slice(key), client.clone());
                self.change(client, |has| has.keys += 1);
            }
        }
        let mut compacted = None;
        if let Some(at) = self.state.compaction_due(RETENTION, 0) {
            compacted = self.state.apply(&Command::Compact(at), &NoPast)?.1.compacted;
        }
        let changes = Changes {
            revision: self.state.revision(),
            changes: effects.changes,
            compacted,
        };
        Ok((answer, changes))
    }

    /// Makes a lease and returns its TTL in seconds. `id` is not 0.
    pub fn grant(&mut self, client: &str, id: i64, ttl: i64, now: Duration) -> Result<i64, LockRefusal> {
        let (leases, _) = self.has(client);
        if leases >= self.limits.leases_per_client || self.leases.len() >= self.limits.leases {
            return Err(LockRefusal::TooMany);
        }
        let ttl = granted_ttl(ttl);
        let client: Arc<str> = self
            .clients
            .get_key_value(client)
            .map_or_else(|| client.into(), |(name, _)| name.clone());
        self.apply(&client, &Command::Grant { id, ttl }, &NoPast)?;
        self.change(&client, |has| {
            has.leases.insert(id);
        });
        let ends = end(now, ttl);
        self.ends.insert((ends, id));
        self.leases.insert(id, Lease { client, ends });
        Ok(ttl)
    }

    fn own(&self, client: &str, id: i64) -> Result<&Lease, LockRefusal> {
        let lease = self.leases.get(&id);
        let own = lease.filter(|lease| *lease.client == *client);
        own.ok_or(LockRefusal::Refused(Refusal::LeaseNotFound))
    }

    /// Ends a lease and deletes its keys.
    pub fn revoke(&mut self, client: &str, id: i64) -> Result<Changes, LockRefusal> {
        self.own(client, id)?;
        Ok(self.end(id)?)
    }

    fn end(&mut self, id: i64) -> Result<Changes, Refusal> {
        let lease = self.leases.remove(&id).ok_or(Refusal::LeaseNotFound)?;
        self.ends.remove(&(lease.ends, id));
        self.change(&lease.client, |has| {
            has.leases.remove(&id);
        });
        Ok(self.apply(&lease.client, &Command::Revoke(id), &NoPast)?.1)
    }

    /// Gives a lease its whole TTL again and returns that in seconds; `None` = the client has no such lease.
    pub fn keep_alive(&mut self, client: &str, id: i64, now: Duration) -> Option<i64> {
        self.own(client, id).ok()?;
        let (ttl, _) = self.state.lease(id)?;
        let lease = self.leases.get_mut(&id)?;
        self.ends.remove(&(lease.ends, id));
        lease.ends = end(now, ttl);
        self.ends.insert((lease.ends, id));
        Some(ttl)
    }

    /// What is known about a lease of `client`.
    pub fn lease(&self, client: &str, id: i64, now: Duration) -> Option<LeaseInfo> {
        let lease = self.own(client, id).ok()?;
        let (ttl, keys) = self.state.lease(id)?;
        let left = lease.ends.saturating_sub(now).as_secs_f64().ceil() as i64;
        Some(LeaseInfo { left, ttl, keys })
    }

    /// Leases of `client`.
    pub fn leases(&self, client: &str) -> Vec<i64> {
        let has = self.clients.get(client);
        has.map_or_else(Vec::new, |has| has.leases.iter().copied().collect())
    }

    /// When the next lease ends.
    pub fn next_end(&self) -> Option<Duration> {
        self.ends.first().map(|(ends, _)| *ends)
    }

    /// Ends a lease whose time has come, if there is one.
    pub fn expire(&mut self, now: Duration) -> Option<Changes> {
        let (ends, id) = *self.ends.first()?;
        if ends > now {
            return None;
        }
        // It is there, and so it can be ended.
        Some(self.end(id).unwrap_or_else(|_| {
            self.ends.remove(&(ends, id));
            Changes::default()
        }))
    }
}

/// When a lease with this TTL ends. Longer ones than a century do not matter.
fn end(now: Duration, ttl: i64) -> Duration {
    const CENTURY: u64 = 3_155_760_000;
    now + Duration::from_secs(u64::try_from(ttl).unwrap_or_default().min(CENTURY))
}

#[cfg(test)]
mod tests;
