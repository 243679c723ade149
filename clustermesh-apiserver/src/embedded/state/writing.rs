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
    mvccpb::{Event, KeyValue, event::EventType},
};

use super::{DiskWrite, Effects, Place, Record, Refusal, State, header, select, size};
use crate::store::SourceChange;

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
    /// A range at the revision before the transaction.
    Read(RangeResponse),
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
        let before = self.state.content.remove(&request.key);
        let old = before.as_ref().map(|record| &record.kv);
        let lease = match old {
            Some(old) if request.ignore_lease => old.lease,
            _ => request.lease,
        };
        let kv = KeyValue {
            // Copied: what was decoded is a part of the request, and would keep all of it.
            key: Bytes::copy_from_slice(&request.key),
            value: match old {
                Some(old) if request.ignore_value => old.value.clone(),
                _ => Bytes::copy_from_slice(&request.value),
            },
            create_revision: old.map_or(self.next, |old| old.create_revision),
            mod_revision: self.next,
            version: old.map_or(1, |old| old.version + 1),
            lease,
        };
        if let Some(old) = &before {
            self.detach(&old.kv);
            self.state.discard(self.next, old.place, size(&old.kv));
        }
        if let Some(lease) = self.state.leases.get_mut(&lease) {
            lease.keys.insert(kv.key.clone());
        }
        self.effects.changes.push(SourceChange::Put {
            key: kv.key.clone(),
            value: kv.value.clone(),
            create_revision: kv.create_revision,
            mod_revision: kv.mod_revision,
            version: kv.version,
        });
        self.effects
            .writes
            .push(DiskWrite::Append(place, event(EventType::Put, kv.clone())));
        self.state.content.insert(kv.key.clone(), Record { kv, place });
        PutResponse {
            header: header(self.next),
            prev_kv: before.filter(|_| request.prev_kv).map(|record| record.kv),
        }
    }

    pub(super) fn delete(&mut self, request: &DeleteRangeRequest) -> DeleteRangeResponse {
        let keys: Vec<Bytes> = select::between(&self.state.content, &request.key, &request.range_end)
            .map(|kv| kv.key.clone())
            .collect();
        let deleted: Vec<KeyValue> = keys.iter().filter_map(|key| self.delete_key(key)).collect();
        DeleteRangeResponse {
            header: header(self.revision()),
            deleted: deleted.len() as i64,
            prev_kvs: if request.prev_kv { deleted } else { Vec::new() },
        }
    }

    pub(super) fn delete_key(&mut self, key: &Bytes) -> Option<KeyValue> {
        let old = self.state.content.remove(key)?;
        let place = self.place();
        self.detach(&old.kv);
        self.state.discard(self.next, old.place, size(&old.kv));
        self.state.discard(self.next, place, key.len());
        let kv = KeyValue {
            key: old.kv.key.clone(),
            mod_revision: self.next,
            ..Default::default()
        };
        self.effects.changes.push(SourceChange::Delete {
            key: kv.key.clone(),
            mod_revision: self.next,
        });
        self.effects
            .writes
            .push(DiskWrite::Append(place, event(EventType::Delete, kv)));
        Some(old.kv)
    }

    fn detach(&mut self, kv: &KeyValue) {
        if let Some(lease) = self.state.leases.get_mut(&kv.lease) {
            lease.keys.remove(&kv.key);
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

fn event(kind: EventType, kv: KeyValue) -> Event {
    Event {
        r#type: kind as i32,
        kv: Some(kv),
        prev_kv: None,
    }
}
