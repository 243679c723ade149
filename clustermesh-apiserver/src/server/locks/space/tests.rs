//! The lock space: mutexes, ends of leases, who owns what, and bounds.

use isthmus_proto::etcdserverpb::{
    Compare, RangeRequest, RequestOp, TxnResponse,
    compare::{CompareResult, CompareTarget, TargetUnion},
    range_request::{SortOrder, SortTarget},
    response_op::Response,
};
use proptest::prelude::*;

use super::*;

const PREFIX: &str = "cilium/.initlock/";
const MINUTE: Duration = Duration::from_secs(60);

fn space(limits: LockLimits) -> LockSpace {
    LockSpace::new(KeyRange::prefix(PREFIX), 1000, limits)
}

fn op(request: Request) -> RequestOp {
    RequestOp {
        request: Some(request),
    }
}

/// What `concurrency.Mutex` of etcd's client sends.
fn acquire(lease: i64) -> Command {
    let key = Bytes::from(format!("{PREFIX}{lease:x}"));
    let first = op(Request::RequestRange(RangeRequest {
        key: PREFIX.into(),
        range_end: "cilium/.initlock0".into(),
        sort_order: SortOrder::Ascend as i32,
        sort_target: SortTarget::Create as i32,
        limit: 1,
        ..Default::default()
    }));
    Command::Txn(TxnRequest {
        compare: vec![Compare {
            result: CompareResult::Equal as i32,
            target: CompareTarget::Create as i32,
            key: key.clone(),
            target_union: Some(TargetUnion::CreateRevision(0)),
            range_end: Bytes::new(),
        }],
        success: vec![
            op(Request::RequestPut(PutRequest {
                key: key.clone(),
                lease,
                ..Default::default()
            })),
            first.clone(),
        ],
        failure: vec![
            op(Request::RequestRange(RangeRequest {
                key,
                ..Default::default()
            })),
            first,
        ],
    })
}

/// Whether the lock is had after this answer to [`acquire`].
fn is_held(answer: &Answer) -> bool {
    let Answer::Txn(TxnResponse {
        header: Some(header),
        responses,
        succeeded: true,
    }) = answer
    else {
        return false;
    };
    match &responses[1].response {
        Some(Response::ResponseRange(owner)) => owner.kvs[0].create_revision == header.revision,
        other => panic!("{other:?}"),
    }
}

fn delete(key: impl Into<Bytes>, range_end: impl Into<Bytes>) -> Command {
    Command::Delete(DeleteRangeRequest {
        key: key.into(),
        range_end: range_end.into(),
        prev_kv: false,
    })
}

#[test]
fn the_first_who_asks_has_the_lock_and_then_the_next() {
    let mut space = space(LockLimits::default());
    for lease in [1, 2] {
        assert_eq!(space.grant("remote", lease, 25, Duration::ZERO), Ok(25));
    }
    let (first, changes) = space.write("remote", &acquire(1), &NoPast).unwrap();
    assert!(is_held(&first));
    assert_eq!((changes.revision, changes.changes.len()), (1001, 1));
    let (second, _) = space.write("remote", &acquire(2), &NoPast).unwrap();
    assert!(!is_held(&second));
    let (_, changes) = space
        .write("remote", &delete(format!("{PREFIX}1"), ""), &NoPast)
        .unwrap();
    assert_eq!(changes.revision, 1003);
    assert!(matches!(
        &changes.changes[..],
        [SourceChange::Delete {
            mod_revision: 1003,
            ..
        }]
    ));
}

#[test]
fn a_lease_ends_with_its_keys_when_its_time_has_come_or_it_is_revoked() {
    let mut space = space(LockLimits::default());
    // As short as etcd lets it be.
    assert_eq!(space.grant("remote", 1, 0, Duration::ZERO), Ok(2));
    space.grant("remote", 2, 60, Duration::ZERO).unwrap();
    space.write("remote", &acquire(1), &NoPast).unwrap();
    space.write("remote", &acquire(2), &NoPast).unwrap();
    let at = |seconds| Duration::from_secs(seconds);
    assert_eq!(space.lease("remote", 1, at(1)).unwrap().left, 1);
    assert_eq!(space.keep_alive("remote", 1, at(1)), Some(2));
    assert_eq!(space.next_end(), Some(at(3)));
    assert!(space.expire(at(2)).is_none());
    assert_eq!(space.expire(at(3)).unwrap().changes.len(), 1);
    assert!(space.expire(at(3)).is_none());
    assert_eq!(space.keep_alive("remote", 1, at(3)), None);
    assert_eq!(
        space.revoke("remote", 1).unwrap_err(),
        Refusal::LeaseNotFound.into()
    );
    assert_eq!(space.revoke("remote", 2).unwrap().changes.len(), 1);
    assert!(space.leases("remote").is_empty() && space.clients.is_empty() && space.keys.is_empty());
}

#[test]
fn what_is_anothers_is_not_seen_and_not_changed() {
    let mut space = space(LockLimits::default());
    space.grant("remote-c2", 1, 60, Duration::ZERO).unwrap();
    space.write("remote-c2", &acquire(1), &NoPast).unwrap();
    assert_eq!(space.keep_alive("remote-c3", 1, MINUTE / 2), None);
    assert_eq!(space.lease("remote-c3", 1, MINUTE / 2), None);
    let not_found = LockRefusal::from(Refusal::LeaseNotFound);
    assert_eq!(space.revoke("remote-c3", 1).unwrap_err(), not_found);
    let put = |lease| {
        Command::Put(PutRequest {
            key: format!("{PREFIX}1").into(),
            lease,
            ..Default::default()
        })
    };
    assert_eq!(
        space.write("remote-c3", &put(1), &NoPast).unwrap_err(),
        LockRefusal::Denied
    );
    for (key, end) in [
        (format!("{PREFIX}1"), ""),
        (PREFIX.to_owned(), "cilium/.initlock0"),
    ] {
        let denied = space.write("remote-c3", &delete(key, end), &NoPast).unwrap_err();
        assert_eq!(denied, LockRefusal::Denied);
    }
    // Nor does a key outlive its writer, or lie elsewhere.
    assert_eq!(
        space.write("remote-c2", &put(0), &NoPast).unwrap_err(),
        LockRefusal::Denied
    );
    assert_eq!(
        space
            .write("remote-c2", &delete("cilium/state/x", ""), &NoPast)
            .unwrap_err(),
        LockRefusal::Denied
    );
    assert_eq!(
        space
            .write("remote-c2", &delete("cilium/.initlock/", "\0"), &NoPast)
            .unwrap_err(),
        LockRefusal::Denied
    );
}

#[test]
fn a_client_can_have_so_much() {
    let limits = LockLimits {
        leases_per_client: 2,
        leases: 3,
        keys_per_client: 1,
        keys: 2,
        key_bytes: 40,
    };
    let mut space = space(limits);
    space.grant("a", 1, 60, Duration::ZERO).unwrap();
    space.grant("a", 2, 60, Duration::ZERO).unwrap();
    assert_eq!(space.grant("a", 3, 60, Duration::ZERO), Err(LockRefusal::TooMany));
    space.grant("b", 3, 60, Duration::ZERO).unwrap();
    assert_eq!(space.grant("c", 4, 60, Duration::ZERO), Err(LockRefusal::TooMany));
    space.write("a", &acquire(1), &NoPast).unwrap();
    assert_eq!(
        space.write("a", &acquire(2), &NoPast).unwrap_err(),
        LockRefusal::TooMany
    );
    let long = Command::Put(PutRequest {
        key: format!("{PREFIX}{}", "x".repeat(40)).into(),
        lease: 3,
        ..Default::default()
    });
    assert_eq!(
        space.write("b", &long, &NoPast).unwrap_err(),
        Refusal::TooLarge.into()
    );
    space.revoke("a", 1).unwrap();
    space.write("a", &acquire(2), &NoPast).unwrap();
}

#[derive(Clone, Debug)]
enum Step {
    Grant(i64, i64),
    Revoke(i64),
    KeepAlive(i64),
    Acquire(i64),
    Delete(i64),
    DeleteAll,
    Pass(u64),
}

fn step() -> impl Strategy<Value = (u8, Step)> {
    let lease = || 1i64..5;
    let step = prop_oneof![
        (lease(), 1i64..9).prop_map(|(id, ttl)| Step::Grant(id, ttl)),
        lease().prop_map(Step::Revoke),
        lease().prop_map(Step::KeepAlive),
        lease().prop_map(Step::Acquire),
        lease().prop_map(Step::Delete),
        Just(Step::DeleteAll),
        (0u64..4).prop_map(Step::Pass),
    ];
    (0u8..2, step)
}

proptest! {
    #[test]
    fn keys_live_as_long_as_their_leases_and_counts_are_right(steps in proptest::collection::vec(step(), 0..60)) {
        let limits = LockLimits { leases_per_client: 3, leases: 4, keys_per_client: 2, keys: 3, key_bytes: 512 };
        let mut space = space(limits.clone());
        let (mut now, mut revision, mut seen) = (Duration::ZERO, 1000, BTreeSet::new());
        for (client, step) in steps {
            let client = ["a", "b"][client as usize];
            let mut all = vec![];
            match step {
                Step::Grant(id, ttl) => drop(space.grant(client, id, ttl, now)),
                Step::Revoke(id) => all.extend(space.revoke(client, id)),
                Step::KeepAlive(id) => drop(space.keep_alive(client, id, now)),
                Step::Acquire(id) => all.extend(space.write(client, &acquire(id), &NoPast).map(|(_, changes)| changes)),
                Step::Delete(id) => all.extend(space.write(client, &delete(format!("{PREFIX}{id:x}"), ""), &NoPast).map(|(_, changes)| changes)),
                Step::DeleteAll => all.extend(space.write(client, &delete(PREFIX, "cilium/.initlock0"), &NoPast).map(|(_, changes)| changes)),
                Step::Pass(seconds) => now += Duration::from_secs(seconds),
            }
            while let Some(changes) = space.expire(now) {
                all.push(changes);
            }
            // Watchers see each revision once, and in order.
            for changes in all {
                for change in &changes.changes {
                    prop_assert_eq!(change.mod_revision(), revision + 1);
                    match change {
                        SourceChange::Delete { key, .. } => prop_assert!(seen.remove(&key[..])),
                        put => { seen.insert(put.key().to_vec()); }
                    }
                }
                prop_assert!(changes.revision >= revision);
                revision = changes.revision;
            }
            prop_assert!(space.next_end().is_none_or(|end| end > now));
            let held: BTreeSet<Vec<u8>> = space.leases.keys().filter_map(|id| space.state.lease(*id)).flat_map(|(_, keys)| keys).map(|key| key.to_vec()).collect();
            prop_assert_eq!(&held, &seen);
            prop_assert_eq!(space.keys.keys().map(|key| key.to_vec()).collect::<BTreeSet<_>>(), held);
            for client in ["a", "b"] {
                let (leases, keys) = space.has(client);
                let own: Vec<i64> = space.leases.iter().filter(|(_, lease)| *lease.client == *client).map(|(id, _)| *id).collect();
                prop_assert_eq!((leases, space.leases(client)), (own.len(), own));
                prop_assert_eq!(keys, space.keys.values().filter(|owner| &***owner == client).count());
                prop_assert!(leases <= limits.leases_per_client && keys <= limits.keys_per_client);
            }
            prop_assert!(space.leases.len() <= limits.leases && space.keys.len() <= limits.keys);
            prop_assert_eq!(space.ends.len(), space.leases.len());
        }
    }
}

/// A space with `count` locks of a client.
fn locked(count: i64) -> LockSpace {
    let mut space = space(LockLimits::default());
    for lease in 1..=count {
        space.grant("remote", lease, 60, Duration::ZERO).unwrap();
        space.write("remote", &acquire(lease), &NoPast).unwrap();
    }
    space
}

fn reads(count: usize, request: &RangeRequest) -> Command {
    Command::Txn(TxnRequest {
        success: vec![op(Request::RequestRange(request.clone())); count],
        ..Default::default()
    })
}

#[test]
fn what_a_transaction_reads_is_counted_before_it_reads() {
    let space = locked(200);
    let all = RangeRequest {
        key: PREFIX.into(),
        range_end: "cilium/.initlock0".into(),
        ..Default::default()
    };
    let look = |command: &Command, keys, bytes| {
        let mut budget = Budget::new(keys, bytes);
        (space.look(command, &mut budget), budget.looked())
    };
    let too_large = Err(RangeError::TooLarge);
    assert_eq!(look(&reads(128, &all), 1000, usize::MAX), (too_large, 1000));
    assert_eq!(look(&reads(4, &all), 1000, usize::MAX), (Ok(()), 4 * 201));
    assert_eq!(look(&reads(4, &all), 1000, 100_000), (too_large, 201));
    let one = RangeRequest {
        limit: 1,
        ..all.clone()
    };
    assert_eq!(look(&reads(4, &one), 1000, 100_000), (Ok(()), 4 * 201));
    let count = RangeRequest {
        count_only: true,
        ..all.clone()
    };
    assert_eq!(look(&reads(4, &count), 1000, 0), (Ok(()), 4 * 201));
    // Nested, and in a branch that is not taken; comparisons and deletions as well.
    let Command::Txn(inner) = reads(100, &all) else {
        panic!()
    };
    let nested = TxnRequest {
        failure: vec![op(Request::RequestTxn(inner))],
        ..Default::default()
    };
    assert_eq!(look(&Command::Txn(nested), 1000, usize::MAX), (too_large, 1000));
    let compares = TxnRequest {
        compare: vec![
            Compare {
                key: PREFIX.into(),
                range_end: "cilium/.initlock0".into(),
                ..Default::default()
            };
            100
        ],
        ..Default::default()
    };
    assert_eq!(look(&Command::Txn(compares), 1000, usize::MAX), (too_large, 1000));
    let deletes = TxnRequest {
        success: vec![
            op(Request::RequestDeleteRange(DeleteRangeRequest {
                key: PREFIX.into(),
                range_end: "cilium/.initlock0".into(),
                prev_kv: false,
            }));
            100
        ],
        ..Default::default()
    };
    assert_eq!(look(&Command::Txn(deletes), 1000, usize::MAX), (too_large, 1000));
    // A mutex among as many waiting ones: it looks at its own key, and at all keys in each branch.
    let (mine, found) = (2 + 2 + 1, 2 * 201);
    assert_eq!(look(&acquire(7), 1000, 10_000), (Ok(()), mine + found));
}

#[test]
fn no_more_is_answered_than_was_counted() {
    let mut space = locked(30);
    let all = RangeRequest {
        key: PREFIX.into(),
        range_end: "cilium/.initlock0".into(),
        ..Default::default()
    };
    for request in [
        reads(3, &all),
        reads(
            5,
            &RangeRequest {
                limit: 7,
                ..all.clone()
            },
        ),
        reads(
            9,
            &RangeRequest {
                keys_only: true,
                ..all.clone()
            },
        ),
        acquire(8),
    ] {
        let mut budget = Budget::new(10_000, 1_000_000);
        space.look(&request, &mut budget).unwrap();
        let (answer, _) = space.write("remote", &request, &NoPast).unwrap();
        let Answer::Txn(answer) = answer else { panic!() };
        let kvs = answer.responses.iter().map(|response| match &response.response {
            Some(Response::ResponseRange(range)) => range.kvs.iter().map(prost::Message::encoded_len).sum(),
            _ => 0,
        });
        let bytes: usize = kvs.sum();
        // More than these are charged already.
        assert!(budget.answer(1_000_000 - bytes).is_err(), "{request:?}");
    }
}
