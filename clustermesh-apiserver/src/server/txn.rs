//! Transactions that only read: comparisons and ranges over one moment of the store, answered as etcd does. Pure.
//!
//! Parts that lie in one sub-store are compared and answered in its revisions; if they lie in several, all are in those of the
//! merged view. What is looked at is bounded, for the store cannot change meanwhile.

use isthmus_proto::{
    etcdserverpb::{
        Compare, RangeRequest, RangeResponse, ResponseHeader, ResponseOp, TxnRequest, TxnResponse,
        compare::CompareTarget, request_op::Request, response_op::Response,
    },
    mvccpb::KeyValue,
};
use isthmus_tls::rights::KeyRange;
use prost::Message;

use crate::{
    embedded::holds_for,
    store::{Budget, RangeError, Route, Store, View},
};

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

/// Answers from the view `route`, as far as `budget` reaches.
pub fn answer(
    store: &Store,
    route: &Route,
    txn: &TxnRequest,
    budget: &mut Budget,
) -> Result<TxnResponse, RangeError> {
    let view = store.view(route);
    let header = *view.header();
    let mut response = Reading { view, budget }.txn(txn)?;
    response.header = Some(header);
    Ok(response)
}

struct Reading<'s, 'b> {
    view: View<'s>,
    budget: &'b mut Budget,
}

impl Reading<'_, '_> {
    fn txn(&mut self, txn: &TxnRequest) -> Result<TxnResponse, RangeError> {
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
                        revision: self.view.header().revision,
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

    /// No range is for nothing, also if it finds nothing.
    fn range(&mut self, request: &RangeRequest) -> Result<RangeResponse, RangeError> {
        self.budget.look(1)?;
        let response = self.view.range(request, self.budget)?;
        self.budget.answer(response.encoded_len())?;
        Ok(response)
    }

    /// Whether every key of the comparison's range holds to it. Without any key, an absent one is compared.
    fn holds(&mut self, compare: &Compare) -> Result<bool, RangeError> {
        self.budget.look(1)?;
        let request = RangeRequest {
            key: compare.key.clone(),
            range_end: compare.range_end.clone(),
            ..Default::default()
        };
        let found = self.view.range(&request, self.budget)?;
        if found.kvs.is_empty() {
            // An absent key has no value, not even an empty one.
            let is_value = compare.target == CompareTarget::Value as i32;
            return Ok(!is_value && holds_for(compare, &KeyValue::default()));
        }
        Ok(found.kvs.iter().all(|kv| holds_for(compare, kv)))
    }
}

#[cfg(test)]
mod tests {
    use isthmus_model::ClusterName;
    use isthmus_proto::etcdserverpb::RequestOp;

    use super::*;
    use crate::store::{HistoryLimits, Relist, SourceChange, SubId};

    const KEYS: i64 = 50;
    const CHANGES: i64 = 2000;

    fn put(at: i64) -> SourceChange {
        SourceChange::Put {
            key: format!("cilium/state/x/{:02}", at % KEYS).into(),
            value: "x".into(),
            create_revision: at,
            mod_revision: at,
            version: 1,
        }
    }

    #[test]
    fn many_ranges_at_old_revisions_look_at_no_more_than_a_transaction_may() {
        let (own, limits) = (ClusterName::new("c1").unwrap(), HistoryLimits::default());
        let mut store = Store::new(own, 5, limits, limits);
        let list = Relist {
            cluster_id: 9,
            revision: KEYS,
            new_history: false,
            changes: (1..=KEYS).map(put).collect(),
            present: None,
        };
        store.relist(&SubId::Own, list);
        store.apply(
            &SubId::Own,
            KEYS + CHANGES,
            (KEYS + 1..=KEYS + CHANGES).map(put).collect(),
        );
        let route = Route::Sub(SubId::Own);
        // The oldest, or one after the other from there on.
        for (apart, answered) in [(0, true), (1, false)] {
            let ops = (0..128).map(|at| RequestOp {
                request: Some(Request::RequestRange(RangeRequest {
                    key: "cilium/state/x/".into(),
                    range_end: "cilium/state/x0".into(),
                    limit: 1,
                    revision: KEYS + at * apart,
                    ..Default::default()
                })),
            });
            let request = TxnRequest {
                success: ops.collect(),
                ..Default::default()
            };
            let mut budget = Budget::new(3000, 1_000_000);
            let answer = answer(&store, &route, &request, &mut budget);
            if answered {
                // Each key is another one than then.
                let all = (CHANGES + 128 * (KEYS + 4 * 3)) as usize;
                assert_eq!((answer.unwrap().responses.len(), budget.looked()), (128, all / 4));
            } else {
                assert_eq!((answer, budget.looked()), (Err(RangeError::TooLarge), 3000));
            }
        }
    }
}
