//! Transactions that only read: comparisons and ranges over one moment of the store, answered as etcd does. Pure.
//!
//! Parts that lie in one sub-store are compared and answered in its revisions; if they lie in several, all are in those of the
//! merged view. What is looked at is bounded, for the store cannot change meanwhile.

use isthmus_proto::{
    etcdserverpb::{
        Compare, RangeRequest, RangeResponse, ResponseHeader, ResponseOp, TxnRequest, TxnResponse,
        compare::CompareTarget,
        range_request::{SortOrder, SortTarget},
        request_op::Request,
        response_op::Response,
    },
    mvccpb::KeyValue,
};
use isthmus_tls::rights::KeyRange;
use prost::Message;

use crate::{
    embedded::holds_for,
    store::{RangeError, Route, Store},
};

/// What a transaction may look at and answer.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Keys that are looked at.
    pub keys: usize,
    /// Bytes of the answer.
    pub bytes: usize,
}

/// Why a transaction is not answered.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum TxnError {
    /// A revision in it cannot be read.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// It is more than may be looked at.
    #[error("etcdserver: request is too large")]
    TooLarge,
}

/// Calls `each` for every range of keys that the transaction compares or reads, also in branches that are not taken, until it
/// says no. A write is a no.
pub fn reads_only(txn: &TxnRequest, each: &mut impl FnMut(&KeyRange) -> bool) -> bool {
    let mut compares = txn.compare.iter();
    let mut ops = txn.success.iter().chain(&txn.failure);
    compares.all(|compare| each(&KeyRange::from_etcd(&compare.key, &compare.range_end)))
        && ops.all(|op| match &op.request {
            Some(Request::RequestRange(range)) => each(&KeyRange::from_etcd(&range.key, &range.range_end)),
            Some(Request::RequestTxn(txn)) => reads_only(txn, each),
            Some(Request::RequestPut(_) | Request::RequestDeleteRange(_)) => false,
            None => true,
        })
}

/// The view that all of the transaction is answered from; that of `otherwise` if it reads nothing.
pub fn route(store: &Store, txn: &TxnRequest, otherwise: Route) -> Route {
    let mut found: Option<Route> = None;
    let one = reads_only(txn, &mut |range| {
        let route = store.route(range);
        *found.get_or_insert_with(|| route.clone()) == route
    });
    if one {
        found.unwrap_or(otherwise)
    } else {
        Route::Merged
    }
}

/// Answers from the view `route`.
pub fn answer(
    store: &Store,
    route: &Route,
    txn: &TxnRequest,
    budget: Budget,
) -> Result<TxnResponse, TxnError> {
    let header = store.header(route);
    let mut reading = Reading {
        store,
        route,
        revision: header.revision,
        budget,
    };
    let mut response = reading.txn(txn)?;
    response.header = Some(header);
    Ok(response)
}

struct Reading<'s> {
    store: &'s Store,
    route: &'s Route,
    revision: i64,
    budget: Budget,
}

impl Reading<'_> {
    fn txn(&mut self, txn: &TxnRequest) -> Result<TxnResponse, TxnError> {
        let mut succeeded = true;
        for compare in &txn.compare {
            succeeded = succeeded && self.holds(compare)?;
        }
        let ops = if succeeded { &txn.success } else { &txn.failure };
        let mut responses = Vec::with_capacity(ops.len());
        for op in ops {
            let response = match &op.request {
                Some(Request::RequestRange(request)) => {
                    let mut response = self.range(request)?;
                    // Of a part, etcd says no more than where the store is.
                    response.header = Some(ResponseHeader {
                        revision: self.revision,
                        ..Default::default()
                    });
                    Response::ResponseRange(response)
                }
                Some(Request::RequestTxn(txn)) => Response::ResponseTxn(self.txn(txn)?),
                // Neither is let through to here.
                Some(Request::RequestPut(_) | Request::RequestDeleteRange(_)) | None => continue,
            };
            responses.push(ResponseOp {
                response: Some(response),
            });
        }
        Ok(TxnResponse {
            header: Some(ResponseHeader::default()),
            succeeded,
            responses,
        })
    }

    /// Looks at so many keys.
    fn look(&mut self, keys: usize) -> Result<(), TxnError> {
        self.budget.keys = self.budget.keys.checked_sub(keys).ok_or(TxnError::TooLarge)?;
        Ok(())
    }

    fn count(&self, request: &RangeRequest) -> Result<usize, TxnError> {
        let count = RangeRequest {
            key: request.key.clone(),
            range_end: request.range_end.clone(),
            revision: request.revision,
            count_only: true,
            ..Default::default()
        };
        let count = self.store.range(self.route, &count)?.count;
        Ok(usize::try_from(count).unwrap_or_default())
    }

    fn range(&mut self, request: &RangeRequest) -> Result<RangeResponse, TxnError> {
        let count = self.count(request)?;
        let filtered = [
            request.min_mod_revision,
            request.max_mod_revision,
            request.min_create_revision,
            request.max_create_revision,
        ];
        let all = request.sort_order != SortOrder::None as i32
            || request.sort_target != SortTarget::Key as i32
            || filtered.iter().any(|revision| *revision != 0)
            || *self.route == Route::Merged;
        let limit = usize::try_from(request.limit)
            .ok()
            .filter(|limit| *limit > 0 && !all);
        self.look(1 + limit.map_or(count, |limit| limit.min(count)))?;
        let response = self.store.range(self.route, request)?;
        let bytes = self.budget.bytes.checked_sub(response.encoded_len());
        self.budget.bytes = bytes.ok_or(TxnError::TooLarge)?;
        Ok(response)
    }

    /// Whether every key of the comparison's range holds to it. Without any key, an absent one is compared.
    fn holds(&mut self, compare: &Compare) -> Result<bool, TxnError> {
        let request = RangeRequest {
            key: compare.key.clone(),
            range_end: compare.range_end.clone(),
            ..Default::default()
        };
        let count = self.count(&request)?;
        self.look(1 + count)?;
        if count == 0 {
            // An absent key has no value, not even an empty one.
            let is_value = compare.target == CompareTarget::Value as i32;
            return Ok(!is_value && holds_for(compare, &KeyValue::default()));
        }
        let found = self.store.range(self.route, &request)?;
        Ok(found.kvs.iter().all(|kv| holds_for(compare, kv)))
    }
}
