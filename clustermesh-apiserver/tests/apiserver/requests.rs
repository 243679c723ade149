//! The fuzz target for requests, with requests that are nearly right.

use isthmus_proto::etcdserverpb::{
    Compare, DeleteRangeRequest, LeaseGrantRequest, PutRequest, RangeRequest, RequestOp, TxnRequest,
    WatchCancelRequest, WatchCreateRequest, WatchProgressRequest, WatchRequest, compare::TargetUnion,
    request_op::Request, watch_request::RequestUnion,
};
use proptest::{collection::vec, prelude::*};
use prost::Message;

#[path = "../../../fuzz/bodies/etcd_requests.rs"]
mod body;

fn key() -> impl Strategy<Value = bytes::Bytes> {
    let known = prop_oneof![
        Just("cilium/state/nodes/v1/c1/n1"),
        Just("cilium/state/"),
        Just("cilium/state0"),
        Just("cilium/cache/nodes/v1/c2/"),
        Just("cilium/cache/nodes/v1/c20"),
        Just("cilium/cache/nodes/v1/c2/n3"),
        Just("cilium/synced/c2/1"),
        Just("cilium/.initlock/"),
        Just("cilium/.initlock/1"),
        Just("cilium/.initlock0"),
        Just("\0"),
        Just(""),
        Just("z"),
    ];
    prop_oneof![
        9 => known.prop_map(|key| key.as_bytes().into()),
        1 => vec(any::<u8>(), 0..6).prop_map(Into::into),
    ]
}

fn number() -> impl Strategy<Value = i64> {
    prop_oneof![4 => Just(0i64), 4 => -2i64..50, 1 => 999_998i64..1_000_050, 1 => any::<i64>()]
}

fn range() -> impl Strategy<Value = RangeRequest> {
    let sort = (0i32..4, 0i32..6);
    let revisions = (number(), number(), number(), number(), number());
    (key(), key(), number(), revisions, sort, any::<(bool, bool)>()).prop_map(
        |(key, range_end, limit, revisions, sort, only)| RangeRequest {
            key,
            range_end,
            limit,
            revision: revisions.0,
            sort_order: sort.0,
            sort_target: sort.1,
            serializable: false,
            keys_only: only.0,
            count_only: only.1,
            min_mod_revision: revisions.1,
            max_mod_revision: revisions.2,
            min_create_revision: revisions.3,
            max_create_revision: revisions.4,
        },
    )
}

fn put() -> impl Strategy<Value = PutRequest> {
    (
        key(),
        vec(any::<u8>(), 0..200),
        0i64..3,
        any::<(bool, bool, bool)>(),
    )
        .prop_map(
            |(key, value, lease, (prev_kv, ignore_value, ignore_lease))| PutRequest {
                key,
                value: value.into(),
                lease,
                prev_kv,
                ignore_value,
                ignore_lease,
            },
        )
}

fn delete() -> impl Strategy<Value = DeleteRangeRequest> {
    (key(), key(), any::<bool>()).prop_map(|(key, range_end, prev_kv)| DeleteRangeRequest {
        key,
        range_end,
        prev_kv,
    })
}

fn compare() -> impl Strategy<Value = Compare> {
    let union = prop_oneof![
        number().prop_map(TargetUnion::Version),
        number().prop_map(TargetUnion::ModRevision),
        number().prop_map(TargetUnion::Lease),
        key().prop_map(TargetUnion::Value),
    ];
    (0i32..5, 0i32..6, key(), proptest::option::of(union), key()).prop_map(
        |(result, target, key, target_union, range_end)| Compare {
            result,
            target,
            key,
            target_union,
            range_end,
        },
    )
}

fn txn() -> impl Strategy<Value = TxnRequest> {
    let leaf = prop_oneof![
        6 => range().prop_map(|request| Some(Request::RequestRange(request))),
        1 => put().prop_map(|request| Some(Request::RequestPut(request))),
        1 => delete().prop_map(|request| Some(Request::RequestDeleteRange(request))),
    ];
    let op = leaf.prop_recursive(4, 24, 4, |op| {
        let ops = || vec(op.clone().prop_map(|request| RequestOp { request }), 0..4);
        (vec(compare(), 0..3), ops(), ops()).prop_map(|(compare, success, failure)| {
            Some(Request::RequestTxn(TxnRequest {
                compare,
                success,
                failure,
            }))
        })
    });
    let op = op.prop_map(|request| RequestOp { request });
    (vec(compare(), 0..3), vec(op.clone(), 0..4), vec(op, 0..4)).prop_map(|(compare, success, failure)| {
        TxnRequest {
            compare,
            success,
            failure,
        }
    })
}

fn watch() -> impl Strategy<Value = WatchRequest> {
    let create = (key(), key(), number(), vec(0i32..3, 0..3), any::<(bool, bool)>());
    let create = create.prop_map(|(key, range_end, start_revision, filters, (prev_kv, fragment))| {
        RequestUnion::CreateRequest(WatchCreateRequest {
            key,
            range_end,
            start_revision,
            filters,
            prev_kv,
            fragment,
            ..Default::default()
        })
    });
    let union = prop_oneof![
        4 => create.prop_map(Some),
        1 => number().prop_map(|watch_id| Some(RequestUnion::CancelRequest(WatchCancelRequest { watch_id }))),
        1 => Just(Some(RequestUnion::ProgressRequest(WatchProgressRequest {}))),
        2 => Just(None),
    ];
    union.prop_map(|request_union| WatchRequest { request_union })
}

fn framed<M: Message>(kind: u8, message: &M) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend(message.encode_to_vec());
    bytes
}

/// Messages of 24 bytes, as the body cuts them: a field that nobody knows fills them up.
fn leases(steps: Vec<(u8, i64, i64)>) -> Vec<u8> {
    let mut bytes = vec![5];
    for (kind, id, ttl) in steps {
        // An ID is field 1 of all but the grant's, whose first is the TTL.
        let request = match kind % 5 {
            0 => LeaseGrantRequest { id, ttl },
            _ => LeaseGrantRequest { id: 0, ttl: id },
        };
        let mut message = request.encode_to_vec();
        let room = 24 - message.len() - 2;
        message.extend([15 << 3 | 2, room as u8]);
        message.resize(24, 0);
        bytes.push(kind);
        bytes.extend(message);
    }
    bytes
}

fn message() -> impl Strategy<Value = Vec<u8>> {
    let watches = vec(watch(), 0..12).prop_map(|requests| {
        let mut bytes = vec![4];
        for request in requests {
            let message = request.encode_to_vec();
            if let Ok(len) = u8::try_from(message.len()) {
                bytes.push(len);
                bytes.extend(message);
            }
        }
        bytes
    });
    prop_oneof![
        3 => range().prop_map(|request| framed(0, &request)),
        4 => txn().prop_map(|request| framed(1, &request)),
        1 => put().prop_map(|request| framed(2, &request)),
        1 => delete().prop_map(|request| framed(3, &request)),
        3 => watches,
        1 => vec((any::<u8>(), 0i64..5, -1i64..100), 0..20).prop_map(leases),
        1 => vec(any::<u8>(), 0..200),
    ]
}

proptest! {
    #[test]
    fn no_request_breaks_the_store_or_asks_for_work_without_end(mut bytes in message(), broken in proptest::option::weighted(0.2, (any::<prop::sample::Index>(), any::<u8>()))) {
        if let (Some((at, byte)), false) = (broken, bytes.is_empty()) {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        body::run(&bytes);
    }
}
