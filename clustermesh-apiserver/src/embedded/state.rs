//! The embedded store's state and what commands do to it. Pure: no I/O, no clock.
//!
//! In: [`Command`]s, one after the other. Out of each: the answer, the changes that readers are to see, and what has to be on
//! disk before either is told. From what is on disk the same state comes back ([`State::load`]).
//!
//! Invariants: a refused command changes nothing; a command that changes keys takes exactly one revision, also a transaction
//! of many; on disk are, for each key, the newest change at or before the compacted revision if it was no deletion, and every
//! change after it.

mod load;
mod writing;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use isthmus_proto::{
    etcdserverpb::{
        DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse, RequestOp, ResponseHeader,
        TxnRequest, TxnResponse, request_op::Request,
    },
    mvccpb::{Event, KeyValue},
};

use super::{
    Refusal,
    check::check,
    select::{self, Content},
};
use crate::store::SourceChange;
pub use load::{InvalidLog, Loaded, Stored};
use writing::{Resolved, Step, Writing};

/// What a writer asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Sets a key.
    Put(PutRequest),
    /// Deletes keys.
    Delete(DeleteRangeRequest),
    /// Compares, then reads and writes.
    Txn(TxnRequest),
    /// Makes a lease.
    Grant {
        /// Not 0.
        id: i64,
        /// Seconds.
        ttl: i64,
    },
    /// Ends a lease and deletes its keys.
    Revoke(i64),
    /// Forgets what happened before this revision.
    Compact(i64),
}

/// The answer to a [`Command`].
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// To a put. Headers carry nothing but the revision.
    Put(PutResponse),
    /// To a deletion.
    Delete(DeleteRangeResponse),
    /// To a transaction.
    Txn(TxnResponse),
    /// To everything else.
    Done {
        /// Of the store afterwards.
        revision: i64,
    },
}

/// Where a change lies in the log: its revision, and its place among the changes of that revision.
pub type Place = (i64, u32);

/// What has to be on disk.
#[derive(Clone, Debug, PartialEq)]
pub enum DiskWrite {
    /// A change. A deletion's `kv` has a key and a revision only.
    Append(Place, Event),
    /// The change is not needed any more.
    Remove(Place),
    /// A lease and its TTL in seconds.
    Lease(i64, i64),
    /// The lease is gone.
    NoLease(i64),
    /// Nothing before this revision is known.
    Compacted(i64),
}

/// What a command did.
#[derive(Debug, Default)]
pub struct Effects {
    /// For readers, all at one revision.
    pub changes: Vec<SourceChange>,
    /// For the disk.
    pub writes: Vec<DiskWrite>,
    /// Readers cannot go back before this revision any more.
    pub compacted: Option<i64>,
}

/// A key's value and where its change lies.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Record {
    pub(super) kv: KeyValue,
    place: Place,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Lease {
    /// Seconds.
    ttl: i64,
    keys: BTreeSet<Bytes>,
}

/// A logged change that a later one has replaced, or a deletion.
#[derive(Clone, Debug, PartialEq)]
struct Garbage {
    /// From this revision on it is not needed.
    since: i64,
    place: Place,
    bytes: usize,
}

/// How much of the past is kept.
#[derive(Clone, Copy, Debug)]
pub struct Retention {
    /// Most revisions.
    pub revisions: i64,
    /// Most bytes of replaced keys and values.
    pub bytes: usize,
}

/// Everything that is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    content: Content,
    leases: BTreeMap<i64, Lease>,
    revision: i64,
    compacted: i64,
    /// In the order of `since`.
    garbage: VecDeque<Garbage>,
    garbage_bytes: usize,
}

impl Default for State {
    /// An empty store begins at revision 1, as etcd's does.
    fn default() -> Self {
        Self {
            content: Content::new(),
            leases: BTreeMap::new(),
            revision: 1,
            compacted: 0,
            garbage: VecDeque::new(),
            garbage_bytes: 0,
        }
    }
}

impl State {
    /// Of the last change.
    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// Before this revision nothing is known; 0 = everything is.
    pub fn compacted(&self) -> i64 {
        self.compacted
    }

    /// Leases and their TTLs in seconds.
    pub fn leases(&self) -> impl Iterator<Item = (i64, i64)> {
        self.leases.iter().map(|(id, lease)| (*id, lease.ttl))
    }

    /// A lease's TTL in seconds and its keys.
    pub fn lease(&self, id: i64) -> Option<(i64, Vec<Bytes>)> {
        let lease = self.leases.get(&id)?;
        Some((lease.ttl, lease.keys.iter().cloned().collect()))
    }

    /// Where to compact so that no more than `retention` is kept and nothing before `aged`; `None` = nothing to do.
    pub fn compaction_due(&self, retention: Retention, aged: i64) -> Option<i64> {
        let mut due = aged.max(self.revision - retention.revisions);
        let mut bytes = self.garbage_bytes;
        for garbage in &self.garbage {
            if bytes <= retention.bytes {
                break;
            }
            bytes -= garbage.bytes;
            due = due.max(garbage.since);
        }
        (due > self.compacted && due <= self.revision).then_some(due)
    }

    /// Does what `command` says, or nothing.
    pub fn apply(&mut self, command: &Command) -> Result<(Answer, Effects), Refusal> {
        check(command)?;
        let mut effects = Effects::default();
        let answer = match command {
            Command::Put(request) => {
                self.check_put(request)?;
                let mut writing = Writing::begin(self, &mut effects);
                let mut response = writing.put(request);
                response.header = header(writing.end());
                Answer::Put(response)
            }
            Command::Delete(request) => {
                let mut writing = Writing::begin(self, &mut effects);
                let mut response = writing.delete(request);
                response.header = header(writing.end());
                Answer::Delete(response)
            }
            Command::Txn(request) => {
                let resolved = self.resolve(request);
                // All puts before all ranges, as etcd does.
                resolved.check(&|step| match step {
                    Step::Put(request) => self.check_put(request),
                    _ => Ok(()),
                })?;
                resolved.check(&|step| match step {
                    Step::Range(request) if request.revision > self.revision => Err(Refusal::Future),
                    // Older content is with the readers' store, not here.
                    Step::Range(request) if request.revision > 0 => Err(Refusal::Compacted),
                    _ => Ok(()),
                })?;
                let mut writing = Writing::begin(self, &mut effects);
                let mut response = writing.txn(resolved);
                response.header = header(writing.end());
                Answer::Txn(response)
            }
            Command::Grant { id, ttl } => {
                if self.leases.contains_key(id) {
                    return Err(Refusal::LeaseExists);
                }
                let lease = Lease {
                    ttl: *ttl,
                    ..Lease::default()
                };
                self.leases.insert(*id, lease);
                effects.writes.push(DiskWrite::Lease(*id, *ttl));
                self.done()
            }
            Command::Revoke(id) => {
                let lease = self.leases.get(id).ok_or(Refusal::LeaseNotFound)?;
                let keys: Vec<Bytes> = lease.keys.iter().cloned().collect();
                let mut writing = Writing::begin(self, &mut effects);
                for key in &keys {
                    writing.delete_key(key);
                }
                writing.end();
                self.leases.remove(id);
                effects.writes.push(DiskWrite::NoLease(*id));
                self.done()
            }
            Command::Compact(at) => {
                if *at <= self.compacted {
                    return Err(Refusal::Compacted);
                }
                if *at > self.revision {
                    return Err(Refusal::Future);
                }
                self.compact(*at, &mut effects);
                self.done()
            }
        };
        Ok((answer, effects))
    }

    fn done(&self) -> Answer {
        Answer::Done {
            revision: self.revision,
        }
    }

    fn compact(&mut self, at: i64, effects: &mut Effects) {
        self.compacted = at;
        while let Some(garbage) = self.garbage.pop_front_if(|garbage| garbage.since <= at) {
            self.garbage_bytes -= garbage.bytes;
            effects.writes.push(DiskWrite::Remove(garbage.place));
        }
        effects.writes.push(DiskWrite::Compacted(at));
        effects.compacted = Some(at);
    }

    fn discard(&mut self, since: i64, place: Place, bytes: usize) {
        self.garbage_bytes += bytes;
        self.garbage.push_back(Garbage { since, place, bytes });
    }

    fn check_put(&self, request: &PutRequest) -> Result<(), Refusal> {
        let keeps = request.ignore_value || request.ignore_lease;
        if keeps && !self.content.contains_key(&request.key) {
            Err(Refusal::KeyNotFound)
        } else if request.lease != 0 && !self.leases.contains_key(&request.lease) {
            Err(Refusal::LeaseNotFound)
        } else {
            Ok(())
        }
    }

    /// Decides which branches are taken: as etcd does, before anything is written.
    fn resolve<'r>(&self, request: &'r TxnRequest) -> Resolved<'r> {
        let succeeded = request
            .compare
            .iter()
            .all(|compare| select::holds(&self.content, compare));
        let ops = if succeeded {
            &request.success
        } else {
            &request.failure
        };
        let ops = ops.iter().filter_map(|op: &'r RequestOp| op.request.as_ref());
        let steps = ops.map(|op| match op {
            Request::RequestRange(request) if request.revision == self.revision => {
                Step::Read(select::range(&self.content, self.revision, request))
            }
            Request::RequestRange(request) => Step::Range(request),
            Request::RequestPut(request) => Step::Put(request),
            Request::RequestDeleteRange(request) => Step::Delete(request),
            Request::RequestTxn(request) => Step::Txn(self.resolve(request)),
        });
        Resolved {
            succeeded,
            steps: steps.collect(),
        }
    }
}

fn header(revision: i64) -> Option<ResponseHeader> {
    Some(ResponseHeader {
        revision,
        ..Default::default()
    })
}

fn size(kv: &KeyValue) -> usize {
    kv.key.len() + kv.value.len()
}
