//! The embedded store's state and what commands do to it. Pure: no I/O, no clock.
//!
//! In: [`Command`]s, one after the other. Out of each: the answer, the changes that readers are to see, and what has to be on
//! disk before either is told. From what is on disk the same state comes back ([`Loading`]).
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
        DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse, RangeRequest, RangeResponse,
        RequestOp, ResponseHeader, TxnRequest, TxnResponse, request_op::Request,
    },
    mvccpb::{Event, KeyValue, event::EventType},
};
use prost::Message;

use super::{
    Refusal,
    check::check,
    content::{Content, Record},
    select,
};
use crate::store::{Encoded, SourceChange};
pub use load::{InvalidLog, Loaded, Loading};
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

/// A change as it is logged.
#[derive(Clone, Debug, PartialEq)]
pub enum Logged {
    /// The key has this value.
    Put(Encoded),
    /// The key is gone.
    Delete(Bytes),
}

impl Logged {
    /// The bytes of its `mvccpb.Event`. A deletion's `kv` has a key and a revision only.
    pub fn message(&self, place: Place) -> std::borrow::Cow<'_, [u8]> {
        match self {
            Self::Put(encoded) => encoded.message().into(),
            Self::Delete(key) => {
                let kv = KeyValue {
                    key: key.clone(),
                    mod_revision: place.0,
                    ..Default::default()
                };
                let event = Event {
                    r#type: EventType::Delete as i32,
                    kv: Some(kv),
                    prev_kv: None,
                };
                event.encode_to_vec().into()
            }
        }
    }

    /// About how many bytes that is.
    pub fn len(&self) -> usize {
        match self {
            Self::Put(encoded) => encoded.bytes().len(),
            Self::Delete(key) => deletion_len(key),
        }
    }

    /// Never: a key has a byte at least.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Where older revisions can be read.
pub trait Past {
    /// Answers `request`, whose revision is before the present one.
    fn range(&self, request: &RangeRequest) -> Result<RangeResponse, Refusal>;
}

/// What has to be on disk.
#[derive(Clone, Debug, PartialEq)]
pub enum DiskWrite {
    /// A change.
    Append(Place, Logged),
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

/// The compacted revision of a store that never was: etcd takes a compaction at 0, once.
pub const NEVER_COMPACTED: i64 = -1;

/// What an entry of the log takes beside its key and value.
const ENTRY_BYTES: usize = 32;

/// How much of the past is kept.
#[derive(Clone, Copy, Debug)]
pub struct Retention {
    /// Most revisions.
    pub revisions: i64,
    /// Most bytes of replaced values and deletions.
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
            content: Content::default(),
            leases: BTreeMap::new(),
            revision: 1,
            compacted: NEVER_COMPACTED,
            garbage: VecDeque::new(),
            garbage_bytes: 0,
        }
    }
}

impl State {
    /// An empty store whose revision is `revision`, which is positive.
    pub fn beginning_at(revision: i64) -> Self {
        Self {
            revision,
            compacted: revision - 1,
            ..Self::default()
        }
    }

    /// Of the last change.
    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// Before this revision nothing is known.
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

    /// About how many bytes a file with nothing but the state and its history has.
    pub fn bytes(&self) -> usize {
        let entries = self.content.len() + self.garbage.len() + self.leases.len();
        self.content.bytes() + self.garbage_bytes + entries * ENTRY_BYTES
    }

    /// Whether a compaction would give bytes back.
    pub fn has_history(&self) -> bool {
        !self.garbage.is_empty()
    }

    /// Whether `command` has to read the past, which knows nothing yet of what is not on disk.
    pub fn reads_past(&self, command: &Command) -> bool {
        fn any(request: &TxnRequest, now: i64) -> bool {
            let mut ops = request.success.iter().chain(&request.failure);
            ops.any(|op| match &op.request {
                Some(Request::RequestRange(range)) => range.revision > 0 && range.revision < now,
                Some(Request::RequestTxn(txn)) => any(txn, now),
                _ => false,
            })
        }
        matches!(command, Command::Txn(request) if any(request, self.revision))
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
        (due > self.compacted.max(0) && due <= self.revision).then_some(due)
    }

    /// Does what `command` says, or nothing.
    pub fn apply(&mut self, command: &Command, past: &dyn Past) -> Result<(Answer, Effects), Refusal> {
        check(command)?;
        let mut effects = Effects::default();
        let answer = match command {
            Command::Put(request) => {
                // In the other order than in a transaction, as etcd does.
                self.check_lease(request)?;
                self.check_kept(request)?;
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
                let resolved = self.resolve(request, past);
                // All puts before all ranges, as etcd does.
                resolved.check(&|step| match step {
                    Step::Put(request) => self.check_kept(request).and_then(|()| self.check_lease(request)),
                    _ => Ok(()),
                })?;
                resolved.check(&|step| match step {
                    Step::Refused(refusal) => Err(*refusal),
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

    fn check_lease(&self, request: &PutRequest) -> Result<(), Refusal> {
        if request.lease != 0 && !self.leases.contains_key(&request.lease) {
            return Err(Refusal::LeaseNotFound);
        }
        Ok(())
    }

    fn check_kept(&self, request: &PutRequest) -> Result<(), Refusal> {
        let keeps = request.ignore_value || request.ignore_lease;
        if keeps && !self.content.contains(&request.key) {
            return Err(Refusal::KeyNotFound);
        }
        Ok(())
    }

    /// Decides which branches are taken: as etcd does, before anything is written.
    fn resolve<'r>(&self, request: &'r TxnRequest, past: &dyn Past) -> Resolved<'r> {
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
            Request::RequestRange(request) => self.resolve_range(request, past),
            Request::RequestPut(request) => Step::Put(request),
            Request::RequestDeleteRange(request) => Step::Delete(request),
            Request::RequestTxn(request) => Step::Txn(self.resolve(request, past)),
        });
        Resolved {
            succeeded,
            steps: steps.collect(),
        }
    }

    fn resolve_range<'r>(&self, request: &'r RangeRequest, past: &dyn Past) -> Step<'r> {
        if request.revision == 0 {
            Step::Range(request)
        } else if request.revision > self.revision {
            Step::Refused(Refusal::Future)
        } else if request.revision < self.compacted {
            Step::Refused(Refusal::Compacted)
        } else if request.revision < 0 {
            // The present one, as etcd sees it.
            Step::Range(request)
        } else if request.revision == self.revision {
            Step::Read(select::range(&self.content, self.revision, request))
        } else {
            past.range(request).map_or_else(Step::Refused, Step::Read)
        }
    }
}

/// Bytes that a deletion takes in a log.
fn deletion_len(key: &[u8]) -> usize {
    key.len() + 16
}

fn header(revision: i64) -> Option<ResponseHeader> {
    Some(ResponseHeader {
        revision,
        ..Default::default()
    })
}
