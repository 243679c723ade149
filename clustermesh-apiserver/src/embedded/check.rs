//! What is wrong with a request by itself, whatever the store holds: etcd's rules and limits, in etcd's order. Pure.

use std::collections::BTreeSet;

use bytes::Bytes;
use isthmus_proto::etcdserverpb::{
    DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest,
    range_request::{SortOrder, SortTarget},
    request_op::Request,
};
use isthmus_tls::rights::KeyRange;
use prost::Message;

use super::{Command, Refusal};

/// Most comparisons, and most operations of a branch, nested ones included: etcd's `--max-txn-ops`.
pub const OPS_MAX: usize = 128;
/// Largest request in bytes: etcd's `--max-request-bytes`.
pub const REQUEST_BYTES_MAX: usize = 1536 * 1024;
/// Longest TTL of a lease, in seconds.
const TTL_MAX: i64 = 9_000_000_000;

/// Refuses what no state of the store would accept.
pub fn check(command: &Command) -> Result<(), Refusal> {
    let len = match command {
        Command::Put(request) => {
            put(request)?;
            request.encoded_len()
        }
        Command::Delete(request) => {
            delete(request)?;
            request.encoded_len()
        }
        Command::Txn(request) => {
            txn(request, OPS_MAX)?;
            // Of the whole, nested ones included, once all else about it is right.
            written(&request.success)?;
            written(&request.failure)?;
            request.encoded_len()
        }
        Command::Grant { ttl, .. } if *ttl > TTL_MAX => return Err(Refusal::LeaseTtl),
        Command::Grant { .. } | Command::Revoke(_) | Command::Compact(_) => 0,
    };
    if len > REQUEST_BYTES_MAX {
        return Err(Refusal::TooLarge);
    }
    Ok(())
}

fn put(request: &PutRequest) -> Result<(), Refusal> {
    if request.key.is_empty() {
        Err(Refusal::EmptyKey)
    } else if request.ignore_value && !request.value.is_empty() {
        Err(Refusal::ValueProvided)
    } else if request.ignore_lease && request.lease != 0 {
        Err(Refusal::LeaseProvided)
    } else {
        Ok(())
    }
}

fn delete(request: &DeleteRangeRequest) -> Result<(), Refusal> {
    if request.key.is_empty() {
        return Err(Refusal::EmptyKey);
    }
    Ok(())
}

fn range(request: &RangeRequest) -> Result<(), Refusal> {
    if request.key.is_empty() {
        return Err(Refusal::EmptyKey);
    }
    if SortOrder::try_from(request.sort_order).is_err() || SortTarget::try_from(request.sort_target).is_err()
    {
        return Err(Refusal::InvalidSort);
    }
    Ok(())
}

/// Nested transactions share the limit of operations, which bounds their depth too.
fn txn(request: &TxnRequest, ops_max: usize) -> Result<(), Refusal> {
    let TxnRequest {
        compare,
        success,
        failure,
    } = request;
    let ops = compare.len().max(success.len()).max(failure.len());
    let ops_left = ops_max.checked_sub(ops).ok_or(Refusal::TooManyOps)?;
    if compare.iter().any(|compare| compare.key.is_empty()) {
        return Err(Refusal::EmptyKey);
    }
    for branch in [success, failure] {
        for op in branch {
            match &op.request {
                Some(Request::RequestRange(request)) => range(request)?,
                Some(Request::RequestPut(request)) => put(request)?,
                Some(Request::RequestDeleteRange(request)) => delete(request)?,
                Some(Request::RequestTxn(request)) => txn(request, ops_left)?,
                None => return Err(Refusal::KeyNotFound),
            }
        }
    }
    Ok(())
}

/// Keys that operations put and ranges that they delete.
#[derive(Default)]
struct Written {
    puts: BTreeSet<Bytes>,
    deletes: Vec<KeyRange>,
}

impl Written {
    fn put(&mut self, key: Bytes) -> Result<(), Refusal> {
        let deleted = self.deletes.iter().any(|range| range.contains(&key));
        if deleted || !self.puts.insert(key) {
            return Err(Refusal::DuplicateKey);
        }
        Ok(())
    }
}

/// No key may be written twice; of a nested transaction's branches only one is taken.
fn written(ops: &[RequestOp]) -> Result<Written, Refusal> {
    let mut all = Written::default();
    for op in ops {
        if let Some(Request::RequestDeleteRange(request)) = &op.request {
            all.deletes
                .push(KeyRange::from_etcd(&request.key, &request.range_end));
        }
    }
    for op in ops {
        if let Some(Request::RequestTxn(request)) = &op.request {
            let (then, otherwise) = (written(&request.success)?, written(&request.failure)?);
            let others = otherwise.puts.difference(&then.puts).cloned().collect::<Vec<_>>();
            for key in then.puts.into_iter().chain(others) {
                all.put(key)?;
            }
            all.deletes.extend(then.deletes);
            all.deletes.extend(otherwise.deletes);
        }
    }
    for op in ops {
        if let Some(Request::RequestPut(request)) = &op.request {
            all.put(request.key.clone())?;
        }
    }
    Ok(all)
}
