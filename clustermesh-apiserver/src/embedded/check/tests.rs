//! Rules about whole transactions, against the slow and simple way to say them.

use isthmus_proto::etcdserverpb::Compare;
use isthmus_tls::rights::KeyRange;
use proptest::prelude::*;

use super::*;

fn op(request: Request) -> RequestOp {
    RequestOp {
        request: Some(request),
    }
}

fn put_op(key: impl Into<Bytes>) -> RequestOp {
    op(Request::RequestPut(PutRequest {
        key: key.into(),
        ..Default::default()
    }))
}

fn delete_op(key: impl Into<Bytes>, range_end: impl Into<Bytes>) -> RequestOp {
    op(Request::RequestDeleteRange(DeleteRangeRequest {
        key: key.into(),
        range_end: range_end.into(),
        prev_kv: false,
    }))
}

fn nested(success: Vec<RequestOp>, failure: Vec<RequestOp>) -> RequestOp {
    op(Request::RequestTxn(TxnRequest {
        success,
        failure,
        ..Default::default()
    }))
}

fn key() -> impl Strategy<Value = Bytes> {
    proptest::collection::vec(0u8..4, 1..4).prop_map(Bytes::from)
}

fn end() -> impl Strategy<Value = Bytes> {
    prop_oneof![
        3 => Just(Bytes::new()),
        1 => Just(Bytes::from_static(&[0])),
        4 => key(),
    ]
}

fn ops() -> impl Strategy<Value = Vec<RequestOp>> {
    let leaf = prop_oneof![
        3 => key().prop_map(put_op),
        1 => (key(), end()).prop_map(|(key, end)| delete_op(key, end)),
    ];
    let op = leaf.prop_recursive(3, 24, 4, |inner| {
        let ops = || proptest::collection::vec(inner.clone(), 0..4);
        (ops(), ops()).prop_map(|(success, failure)| nested(success, failure))
    });
    proptest::collection::vec(op, 0..5)
}

/// etcd's `checkIntervals`, word for word: every put against every range.
fn slowly(ops: &[RequestOp]) -> Option<(BTreeSet<Bytes>, Vec<KeyRange>)> {
    let (mut puts, mut deletes) = (BTreeSet::new(), vec![]);
    for op in ops {
        if let Some(Request::RequestDeleteRange(delete)) = &op.request {
            deletes.push(KeyRange::from_etcd(&delete.key, &delete.range_end));
        }
    }
    let deleted = |deletes: &[KeyRange], key: &Bytes| deletes.iter().any(|range| range.contains(key));
    for op in ops {
        if let Some(Request::RequestTxn(txn)) = &op.request {
            let (then, then_deletes) = slowly(&txn.success)?;
            let (otherwise, otherwise_deletes) = slowly(&txn.failure)?;
            for key in &then {
                if deleted(&deletes, key) || !puts.insert(key.clone()) {
                    return None;
                }
            }
            for key in otherwise {
                if deleted(&deletes, &key) || (!puts.insert(key.clone()) && !then.contains(&key)) {
                    return None;
                }
            }
            deletes.extend(then_deletes);
            deletes.extend(otherwise_deletes);
        }
    }
    for op in ops {
        if let Some(Request::RequestPut(put)) = &op.request
            && (deleted(&deletes, &put.key) || !puts.insert(put.key.clone()))
        {
            return None;
        }
    }
    Some((puts, deletes))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn a_key_is_written_twice_if_etcd_says_so(ops in ops(), probes in proptest::collection::vec(key(), 20)) {
        match (written(&ops), slowly(&ops)) {
            (Ok(got), Some((puts, deletes))) => {
                prop_assert_eq!(got.puts, puts);
                for probe in probes {
                    let want = deletes.iter().any(|range| range.contains(&probe));
                    prop_assert_eq!(got.deletes.contains(&probe), want, "{:?}", probe);
                }
                // There are gaps between ranges.
                let ranges: Vec<_> = got.deletes.0.iter().collect();
                prop_assert!(ranges.windows(2).all(|pair| pair[0].1.as_ref().is_some_and(|end| end < pair[1].0)));
            }
            (got, want) => prop_assert_eq!(got.is_ok(), want.is_some(), "{:?}", ops),
        }
    }

    #[test]
    fn what_is_not_nested_is_as_large_as_etcd_takes(compare in 0usize..140, success in 0usize..140, failure in 0usize..140) {
        let request = TxnRequest {
            compare: vec![Compare::default(); compare],
            success: vec![put_op("a"); success],
            failure: vec![put_op("a"); failure],
        };
        let fits = compare.max(success).max(failure) <= OPS_MAX;
        prop_assert_eq!(check_size(&request).is_ok(), fits);
    }
}

#[test]
fn many_puts_beside_many_deletions_are_sorted_not_compared() {
    // A writer's: a tree of operations, each path of which is short. Each put against each range would be
    // billions of comparisons.
    let (mut puts, mut deletes) = (vec![], vec![]);
    for at in 0..40_000u32 {
        puts.push(put_op(format!("a{at}")));
        deletes.push(delete_op(format!("b{at}"), ""));
        deletes.push(delete_op(format!("c{at:08}"), format!("c{:08}", at + 1)));
    }
    let puts = puts.chunks(30).map(|ops| nested(ops.to_vec(), vec![]));
    let deletes = deletes.chunks(30).map(|ops| nested(ops.to_vec(), vec![]));
    let ops: Vec<_> = deletes.chain(puts).collect();
    let Ok(all) = written(&ops) else {
        panic!("no key is there twice");
    };
    // Those that touch are one.
    assert_eq!((all.puts.len(), all.deletes.0.len()), (40_000, 40_001));
    let twice: Vec<_> = ops.into_iter().chain([put_op("c00012345")]).collect();
    assert!(matches!(written(&twice), Err(Refusal::DuplicateKey)));
}

#[test]
fn readers_have_so_many_operations_in_all_and_writers_on_each_path() {
    let range = || {
        op(Request::RequestRange(RangeRequest {
            key: "a".into(),
            ..Default::default()
        }))
    };
    // 3 * (1 + 41) + 2 = 128.
    let inner = || nested(vec![range(); 41], vec![range(); 41]);
    let mut success: Vec<_> = (0..3).map(|_| inner()).collect();
    success.extend([range(), range()]);
    let mut request = TxnRequest {
        success,
        ..Default::default()
    };
    assert_eq!(check_size(&request), Ok(()));
    request.failure = vec![nested(vec![range()], vec![])];
    assert_eq!(check_size(&request), Err(Refusal::TooManyOps));
    assert_eq!(
        check(&Command::Txn(request)),
        Ok(()),
        "of no path are there so many"
    );
}

#[test]
fn what_is_too_large_is_not_looked_into() {
    let large = |key: &'static str| {
        op(Request::RequestPut(PutRequest {
            key: Bytes::from_static(key.as_bytes()),
            value: vec![0; REQUEST_BYTES_MAX / 2].into(),
            ..Default::default()
        }))
    };
    let txn = |success| {
        Command::Txn(TxnRequest {
            success,
            ..Default::default()
        })
    };
    assert_eq!(check(&txn(vec![large("a"), large("a")])), Err(Refusal::TooLarge));
    assert_eq!(
        check(&txn(vec![put_op("a"), put_op("a")])),
        Err(Refusal::DuplicateKey)
    );
}
