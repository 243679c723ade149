//! Changes of one command, all at one revision. Pure.
//!
//! Invariants: what is decided before writing begins cannot fail any more; each change goes to the content, to the readers and
//! to the disk.

use bytes::Bytes;
use isthmus_proto::{
    etcdserverpb::{
        DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse, RangeRequest, RangeResponse,
        ResponseHeader, ResponseOp, TxnResponse, response_op::Response,
    },
    mvccpb::KeyValue,
};

use super::{DiskWrite, Effects, Logged, Place, Record, Refusal, State, deletion_len, header, select};
use crate::store::{Encoded, Revisions, SourceChange};

/// A transaction whose branches are decided.
pub(super) struct Resolved<'r> {
    pub(super) succeeded: bool,
    pub(super) steps: Vec<Step<'r>>,
}

impl Resolved<'_> {
    /// Checks every step, those of nested transactions in their place.
    pub(super) fn check(&self, check: &impl Fn(&Step<'_>) -> Result<(), Refusal>) -> Result<(), Refusal> {
        self.steps.iter().try_for_each(|step| match step {
            Step::Txn(resolved) => resolved.check(check),
            step => check(step),
        })
    }
}

pub(super) enum Step<'r> {
    Range(&'r RangeRequest),
    /// A range at the revision before the transaction, or an older one.
    Read(RangeResponse),
    Refused(Refusal),
    Put(&'r PutRequest),
    Delete(&'r DeleteRangeRequest),
    Txn(Resolved<'r>),
}

/// Changes at one revision.
pub(super) struct Writing<'s> {
    state: &'s mut State,
    effects: &'s mut Effects,
    /// The revision that the changes get.
    next: i64,
    /// How many there are.
    count: u32,
}

impl<'s> Writing<'s> {
    pub(super) fn begin(state: &'s mut State, effects: &'s mut Effects) -> Self {
        Self {
            next: state.revision + 1,
            state,
            effects,
            count: 0,
        }
    }

    /// The store's revision as it is seen from inside.
    fn revision(&self) -> i64 {
        if self.count == 0 {
            self.state.revision
        } else {
            self.next
        }
    }

    /// Returns the store's revision.
    pub(super) fn end(self) -> i64 {
        let revision = self.revision();
        self.state.revision = revision;
        revision
    }

    fn place(&mut self) -> Place {
        self.count += 1;
        (self.next, self.count - 1)
    }

    pub(super) fn put(&mut self, request: &PutRequest) -> PutResponse {
        let place = self.place();
        let before = self.state.content.take(&request.key);
        let old = before.as_ref().map(|record| &record.encoded);
        let lease = match old {
            Some(old) if request.ignore_lease => old.lease(),
            _ => request.lease,
        };
        let value = match old {
            Some(old) if request.ignore_value => old.value(),
            _ => &request.value,
        };
        let revisions = Revisions {
            create: old.map_or(self.next, |old| old.revisions().create),
            modified: self.next,
            version: old.map_or(1, |old| old.revisions().version + 1),
        };
        // Copied: what was decoded is a part of the request, and would keep all of it.
        let encoded = Encoded::new(&request.key, value, revisions, lease);
        if let Some(old) = &before {
            self.detach(&old.encoded);
            self.state.discard(self.next, old.place(), old.len());
        }
        if let Some(lease) = self.state.leases.get_mut(&lease) {
            lease.keys.insert(encoded.shared_key());
        }
        self.effects.changes.push(SourceChange::Shared(encoded.clone()));
        self.effects
            .writes
            .push(DiskWrite::Append(place, Logged::Put(encoded.clone())));
        self.state.content.insert(Record {
            encoded,
            index: place.1,
        });
        PutResponse {
            header: header(self.next),
            prev_kv: before
                .filter(|_| request.prev_kv)
                .map(|record| record.encoded.key_value()),
        }
    }

    pub(super) fn delete(&mut self, request: &DeleteRangeRequest) -> DeleteRangeResponse {
        let between = self.state.content.between(&request.key, &request.range_end);
        let keys: Vec<Bytes> = between.map(|record| record.encoded.shared_key()).collect();
        let deleted: Vec<KeyValue> = keys.iter().filter_map(|key| self.delete_key(key)).collect();
        DeleteRangeResponse {
            header: header(self.revision()),
            deleted: deleted.len() as i64,
            prev_kvs: if request.prev_kv { deleted } else { Vec::new() },
        }
    }

    pub(super) fn delete_key(&mut self, key: &Bytes) -> Option<KeyValue> {
        let old = self.state.content.take(key)?;
        let place = self.place();
        self.detach(&old.encoded);
        self.state.discard(self.next, old.place(), old.len());
        self.state.discard(self.next, place, deletion_len(key));
        self.effects.changes.push(SourceChange::Delete {
            key: key.clone(),
            mod_revision: self.next,
        });
        self.effects
            .writes
            .push(DiskWrite::Append(place, Logged::Delete(key.clone())));
        Some(old.encoded.key_value())
    }

    fn detach(&mut self, encoded: &Encoded) {
        if let Some(lease) = self.state.leases.get_mut(&encoded.lease()) {
            lease.keys.remove(encoded.key());
        }
    }

    pub(super) fn txn(&mut self, resolved: Resolved<'_>) -> TxnResponse {
        let responses = resolved.steps.into_iter().map(|step| {
            let response = match step {
                Step::Range(request) => {
                    Response::ResponseRange(select::range(&self.state.content, self.revision(), request))
                }
                Step::Read(response) => Response::ResponseRange(RangeResponse {
                    header: header(self.revision()),
                    ..response
                }),
                // A transaction with one of these is refused before it writes.
                Step::Refused(_) => Response::ResponseRange(RangeResponse::default()),
                Step::Put(request) => Response::ResponsePut(self.put(request)),
                Step::Delete(request) => Response::ResponseDeleteRange(self.delete(request)),
                Step::Txn(resolved) => Response::ResponseTxn(self.txn(resolved)),
            };
            ResponseOp {
                response: Some(response),
            }
        });
        TxnResponse {
            // A nested one's stays empty, as etcd's does.
            header: Some(ResponseHeader::default()),
            succeeded: resolved.succeeded,
            responses: responses.collect(),
        }
    }
}
