//! What a call adds to the store, as etcd counts it for its quota. Pure.

use isthmus_proto::etcdserverpb::{PutRequest, RequestOp, TxnRequest, request_op::Request};

use super::Command;

/// etcd's `--quota-backend-bytes` unless it is told otherwise.
pub const DEFAULT: u64 = 2 * 1024 * 1024 * 1024;
/// What a key takes beside its name and value, and what a lease takes.
const KEY_OVERHEAD: u64 = 256;
const LEASE_OVERHEAD: u64 = 64;

/// The quota that is meant by etcd's flag: 0 = the default, below 0 = none.
pub fn of_flag(bytes: i64) -> u64 {
    match bytes {
        0 => DEFAULT,
        bytes => u64::try_from(bytes).unwrap_or(u64::MAX),
    }
}

/// Bytes that `command` may add; 0 = it may be done in a full store.
pub(super) fn cost(command: &Command) -> u64 {
    match command {
        Command::Put(request) => of_put(request),
        Command::Txn(request) => of_txn(request),
        Command::Grant { .. } => LEASE_OVERHEAD,
        Command::Delete(_) | Command::Revoke(_) | Command::Compact(_) => 0,
    }
}

fn of_put(request: &PutRequest) -> u64 {
    (request.key.len() + request.value.len()) as u64 + KEY_OVERHEAD
}

/// The dearer branch: which one is taken is not decided yet.
fn of_txn(request: &TxnRequest) -> u64 {
    let of_ops = |ops: &[RequestOp]| -> u64 {
        let cost = |op: &RequestOp| match &op.request {
            Some(Request::RequestPut(put)) => of_put(put),
            Some(Request::RequestTxn(txn)) => of_txn(txn),
            _ => 0,
        };
        ops.iter().map(cost).sum()
    };
    of_ops(&request.success).max(of_ops(&request.failure))
}

#[cfg(test)]
mod tests {
    use isthmus_proto::etcdserverpb::DeleteRangeRequest;

    use super::*;

    #[test]
    fn what_only_deletes_or_reads_costs_nothing() {
        let op = |request| RequestOp {
            request: Some(request),
        };
        let put = || {
            op(Request::RequestPut(PutRequest {
                key: "k".into(),
                value: "value".into(),
                ..Default::default()
            }))
        };
        let delete = || op(Request::RequestDeleteRange(DeleteRangeRequest::default()));
        let txn = |success, failure| TxnRequest {
            compare: vec![],
            success,
            failure,
        };
        assert_eq!(cost(&Command::Txn(txn(vec![delete()], vec![delete()]))), 0);
        assert_eq!(
            cost(&Command::Txn(txn(vec![put()], vec![put(), delete(), put()]))),
            2 * 262
        );
        let nested = op(Request::RequestTxn(txn(vec![], vec![put()])));
        assert_eq!(cost(&Command::Txn(txn(vec![nested], vec![]))), 262);
        assert_eq!(cost(&Command::Delete(DeleteRangeRequest::default())), 0);
    }

    #[test]
    fn the_flag_means_what_it_means_to_etcd() {
        assert_eq!((of_flag(0), of_flag(-1), of_flag(5)), (DEFAULT, u64::MAX, 5));
    }
}
