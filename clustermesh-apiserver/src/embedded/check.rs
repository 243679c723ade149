//! What is wrong with a request by itself, whatever the store holds: etcd's rules and limits, in etcd's order. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
};

use bytes::Bytes;
use isthmus_proto::etcdserverpb::{
    DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest,
    range_request::{SortOrder, SortTarget},
    request_op::Request,
};
use prost::Message;

use super::{Command, Refusal};

/// Most comparisons, and most operations of a branch: etcd's `--max-txn-ops`. A nested transaction may have as many as those
/// around it have left.
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
            let len = request.encoded_len();
            if len > REQUEST_BYTES_MAX {
                return Err(Refusal::TooLarge);
            }
            // Of the whole, nested ones included, once all else about it is right.
            written(&request.success)?;
            written(&request.failure)?;
            len
        }
        Command::Grant { ttl, .. } if *ttl > TTL_MAX => return Err(Refusal::LeaseTtl),
        Command::Grant { .. } | Command::Revoke(_) | Command::Compact(_) => 0,
    };
    if len > REQUEST_BYTES_MAX {
        return Err(Refusal::TooLarge);
    }
    Ok(())
}

/// Refuses a transaction that is more work than a reader may ask for: in all of it, nested ones in both branches included, as
/// much as etcd takes in one that is not nested.
pub fn check_size(request: &TxnRequest) -> Result<(), Refusal> {
    fn take(request: &TxnRequest, left: &mut usize) -> Option<()> {
        let TxnRequest {
            compare,
            success,
            failure,
        } = request;
        let ops = compare.len().max(success.len()).max(failure.len());
        *left = left.checked_sub(ops)?;
        success
            .iter()
            .chain(failure)
            .try_for_each(|op| match &op.request {
                Some(Request::RequestTxn(request)) => take(request, left),
                _ => Some(()),
            })
    }
    take(request, &mut OPS_MAX.clone()).ok_or(Refusal::TooManyOps)
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

/// The limit of operations is that of a path into nested transactions, as etcd counts, and bounds their depth too.
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
    deletes: Deleted,
}

impl Written {
    fn put(&mut self, key: Bytes) -> Result<(), Refusal> {
        if self.deletes.contains(&key) || !self.puts.insert(key) {
            return Err(Refusal::DuplicateKey);
        }
        Ok(())
    }
}

/// A union of ranges, as ranges with gaps between them: each begins with its key and ends before its value, or never.
#[derive(Default)]
struct Deleted(BTreeMap<Bytes, Option<Bytes>>);

impl Deleted {
    fn contains(&self, key: &[u8]) -> bool {
        let to_key = (Bound::Unbounded, Bound::Included(key));
        let before = self.0.range::<[u8], _>(to_key).next_back();
        before.is_some_and(|(_, end)| end.as_ref().is_none_or(|end| key < end))
    }

    /// Adds the range that etcd means by these two fields.
    fn add(&mut self, key: &Bytes, range_end: &Bytes) {
        let end = match &range_end[..] {
            [] => Some([key, &[0][..]].concat().into()),
            [0] => None,
            end if end > key => Some(range_end.clone()),
            _ => return,
        };
        self.add_range(key.clone(), end);
    }

    /// Each range that it takes in is there no more, so that all additions together look at each range once.
    fn add_range(&mut self, mut start: Bytes, mut end: Option<Bytes>) {
        let touches = |end: &Option<Bytes>, start: &Bytes| end.as_ref().is_none_or(|end| start <= end);
        while let Some((other, other_end)) = match &end {
            Some(end) => self.0.range::<Bytes, _>(..=end).next_back(),
            None => self.0.last_key_value(),
        } {
            if !touches(other_end, &start) {
                break;
            }
            if other_end.is_none() || end.as_ref().is_some_and(|end| other_end.as_ref() > Some(end)) {
                end = other_end.clone();
            }
            let other = other.clone();
            self.0.remove(&other);
            start = start.min(other);
        }
        self.0.insert(start, end);
    }

    fn extend(&mut self, mut other: Self) {
        if other.0.len() > self.0.len() {
            std::mem::swap(self, &mut other);
        }
        for (start, end) in other.0 {
            self.add_range(start, end);
        }
    }
}

/// No key may be written twice; of a nested transaction's branches only one is taken.
fn written(ops: &[RequestOp]) -> Result<Written, Refusal> {
    let mut all = Written::default();
    for op in ops {
        if let Some(Request::RequestDeleteRange(request)) = &op.request {
            all.deletes.add(&request.key, &request.range_end);
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

#[cfg(test)]
mod tests;
