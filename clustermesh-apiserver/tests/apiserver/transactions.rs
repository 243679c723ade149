//! Ranges in every form, and transactions that read, answered the same as by etcd; and what is refused.

use isthmus_proto::etcdserverpb::{
    Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest,
    compare::{CompareResult, CompareTarget, TargetUnion},
    kv_client::KvClient,
    request_op::Request,
};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};

use crate::both::{Both, channel, told};

const PREFIX: &str = "cilium/state/x/";
const PREFIX_END: &str = "cilium/state/x0";
const INVALID_SORT: &str = "InvalidArgument: etcdserver: invalid sort option";

/// Some keys with different ages, versions and values: by none of them two are alike.
async fn fill(both: &Both) -> i64 {
    let key = |name: &str| format!("{PREFIX}{name}");
    let mut revision = 0;
    for (name, value, writes) in [
        ("c", "3", 2),
        ("a", "9", 4),
        ("d", "1", 1),
        ("b", "5", 3),
        ("e", "7", 5),
    ] {
        for _ in 0..writes {
            revision = both.write(&[(&key(name), Some(value))]).await;
        }
    }
    both.write(&[(&key("gone"), Some("x"))]).await;
    both.write(&[(&key("gone"), None)]).await;
    let touched = both.write(&[(&key("a"), Some("8"))]).await;
    assert!(touched > revision);
    touched
}

fn range(key: &str, range_end: &str) -> RangeRequest {
    RangeRequest {
        key: key.to_owned().into(),
        range_end: range_end.to_owned().into(),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_form_of_range_is_answered_as_etcd_does() {
    let both = Both::start("admin-c1").await;
    let now = fill(&both).await;
    let mut requests = vec![];
    for (key, end) in [
        (PREFIX, PREFIX_END),
        ("cilium/state/x/a", ""),
        ("cilium/state/x/none", ""),
        ("cilium/state/x/b", "cilium/state/x/d"),
        // Ends before it begins.
        ("cilium/state/x/b", "cilium/state/a"),
        // To the end.
        ("cilium/state/x/b", "\0"),
        ("\0", "\0"),
    ] {
        let base = range(key, end);
        let with = |change: &dyn Fn(&mut RangeRequest)| {
            let mut request = base.clone();
            change(&mut request);
            request
        };
        requests.push(base.clone());
        for limit in [-1, 1, 3, 5, 100] {
            requests.push(with(&|r| r.limit = limit));
        }
        for order in 0..3 {
            for target in 0..5 {
                for limit in [0, 2] {
                    requests.push(with(&|r| {
                        (r.sort_order, r.sort_target, r.limit) = (order, target, limit);
                    }));
                }
            }
        }
        for back in [0, 3, 6, 9] {
            for limit in [0, 2] {
                requests.push(with(&|r| (r.min_mod_revision, r.limit) = (now - back, limit)));
                requests.push(with(&|r| (r.max_mod_revision, r.limit) = (now - back, limit)));
                requests.push(with(&|r| (r.min_create_revision, r.limit) = (now - back, limit)));
                requests.push(with(&|r| (r.max_create_revision, r.limit) = (now - back, limit)));
            }
            requests.push(with(&|r| {
                (r.min_mod_revision, r.max_mod_revision) = (now - back, now - 1);
                (r.sort_order, r.sort_target) = (2, 3);
            }));
            requests.push(with(&|r| (r.revision, r.limit) = (now - back, 2)));
            requests.push(with(&|r| {
                (r.revision, r.sort_order, r.sort_target) = (now - back, 1, 4)
            }));
        }
        requests.push(with(&|r| (r.min_mod_revision, r.max_create_revision) = (-1, -1)));
        requests.push(with(&|r| r.revision = -1));
        requests.push(with(&|r| r.keys_only = true));
        requests.push(with(&|r| r.count_only = true));
        requests.push(with(&|r| {
            (r.count_only, r.limit, r.min_mod_revision) = (true, 1, now)
        }));
        requests.push(with(&|r| r.serializable = true));
        requests.push(with(&|r| {
            (r.serializable, r.keys_only, r.revision) = (true, true, now - 2)
        }));
        // An error.
        requests.push(with(&|r| r.revision = now + 1000));
    }
    requests.push(RangeRequest::default());
    // A sort that is none is refused in the words of etcd 3.5. (3.4 ends when it is asked for a target that is none.)
    for (sort_order, sort_target) in [(9, 0), (0, 9), (1, 9), (9, 9)] {
        let request = RangeRequest {
            sort_order,
            sort_target,
            ..range(PREFIX, PREFIX_END)
        };
        let status = KvClient::new(both.ours.clone()).range(request).await.unwrap_err();
        assert_eq!(told(status), INVALID_SORT);
    }
    let merged = |request: &RangeRequest| &request.range_end[..] == b"\0";
    for request in requests {
        // What lies in several sources is the merged view, in its own revisions: there, only forms without them compare.
        let of_revisions = request.revision != 0
            || [2, 3].contains(&request.sort_target)
            || request.min_mod_revision != 0
            || request.max_mod_revision != 0
            || request.min_create_revision != 0
            || request.max_create_revision != 0;
        if merged(&request) && of_revisions {
            continue;
        }
        let [mut want, mut got] = both.ranges(&request).await;
        for answer in [&mut want, &mut got].into_iter().flatten() {
            // On purpose: an answer for a named revision carries that one, which etcd's does not.
            let at = answer.header.as_mut().unwrap();
            if request.revision > 0 || merged(&request) {
                at.revision = 0;
            }
            if merged(&request) {
                answer
                    .kvs
                    .iter_mut()
                    .for_each(|kv| (kv.create_revision, kv.mod_revision) = (0, 0));
            }
        }
        assert_eq!(got, want, "{request:?}");
    }
}

fn op(request: Request) -> RequestOp {
    RequestOp {
        request: Some(request),
    }
}

struct Random(StdRng, i64);

impl Random {
    fn key(&mut self) -> String {
        let name = ["a", "b", "c", "d", "e", "none", ""].choose(&mut self.0).unwrap();
        format!("{PREFIX}{name}")
    }

    fn end(&mut self) -> &'static str {
        ["", "", "cilium/state/x/c", PREFIX_END, "a"]
            .choose(&mut self.0)
            .unwrap()
    }

    fn range(&mut self) -> RangeRequest {
        let (key, end) = (self.key(), self.end());
        let mut request = range(&key, end);
        if self.0.random_bool(0.3) {
            request.limit = self.0.random_range(1..4);
        }
        if self.0.random_bool(0.3) {
            (request.sort_order, request.sort_target) =
                (self.0.random_range(1..3), self.0.random_range(0..5));
        }
        match self.0.random_range(0..9) {
            0 => request.keys_only = true,
            1 => request.count_only = true,
            2 => request.revision = self.1 - self.0.random_range(0..6),
            3 => request.min_mod_revision = self.1 - 4,
            4 if self.0.random_bool(0.2) => request.revision = self.1 + 50,
            _ => {}
        }
        request
    }

    fn compare(&mut self) -> Compare {
        let target = self.0.random_range(0..5);
        let number = self.0.random_range(-2..6);
        let target_union = match target {
            0 => TargetUnion::Version(number),
            1 => TargetUnion::CreateRevision(self.1 - 3 * number),
            2 => TargetUnion::ModRevision(self.1 - 3 * number),
            3 => TargetUnion::Value(number.max(0).to_string().into()),
            _ => TargetUnion::Lease(number.max(0)),
        };
        Compare {
            result: self.0.random_range(0..4),
            target,
            key: self.key().into(),
            target_union: self.0.random_bool(0.95).then_some(target_union),
            range_end: self.end().into(),
        }
    }

    fn txn(&mut self, depth: u32) -> TxnRequest {
        let mut ops = || {
            let count = self.0.random_range(0..4);
            let one = |random: &mut Self| match random.0.random_range(0..4) {
                0 if depth > 0 => op(Request::RequestTxn(random.txn(depth - 1))),
                _ => op(Request::RequestRange(random.range())),
            };
            (0..count).map(|_| one(self)).collect()
        };
        let (success, failure) = (ops(), ops());
        let compares = self.0.random_range(0..3);
        TxnRequest {
            compare: (0..compares).map(|_| self.compare()).collect(),
            success,
            failure,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transactions_that_read_are_answered_as_etcd_does() {
    // A reader may do what it may read, whatever the form.
    let both = Both::start("remote-c2").await;
    let now = fill(&both).await;
    let mut random = Random(StdRng::seed_from_u64(23), now);
    let (mut succeeded, mut errors) = (0, 0);
    for round in 0..400 {
        let request = random.txn(2);
        let [want, got] = both.txns(&request).await;
        assert_eq!(got, want, "round {round}: {request:?}");
        succeeded += usize::from(want.as_ref().is_ok_and(|answer| answer.succeeded));
        errors += usize::from(want.is_err());
    }
    assert!(succeeded > 50 && errors > 0, "{succeeded} {errors}");
    // What is wrong by itself.
    let many = |count| TxnRequest {
        success: vec![op(Request::RequestRange(range("cilium/state/x/a", ""))); count],
        ..Default::default()
    };
    let bad_sort = RangeRequest {
        sort_order: 7,
        ..range("cilium/state/x/a", "")
    };
    let of = |request: RangeRequest| TxnRequest {
        success: vec![op(Request::RequestRange(request))],
        ..Default::default()
    };
    let status = KvClient::new(both.ours.clone())
        .txn(of(bad_sort))
        .await
        .unwrap_err();
    assert_eq!(told(status), INVALID_SORT);
    for request in [
        TxnRequest::default(),
        many(128),
        many(129),
        of(RangeRequest::default()),
        TxnRequest {
            compare: vec![Compare::default()],
            ..Default::default()
        },
        TxnRequest {
            success: vec![RequestOp::default()],
            ..Default::default()
        },
        TxnRequest {
            failure: vec![op(Request::RequestTxn(of(RangeRequest::default())))],
            ..Default::default()
        },
    ] {
        let [want, got] = both.txns(&request).await;
        assert_eq!(got, want, "{request:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nested_transactions_of_readers_are_no_larger_than_one_that_is_not_nested() {
    let both = Both::start("remote-c2").await;
    let now = fill(&both).await;
    let nested = |success: Vec<RequestOp>, failure: Vec<RequestOp>| {
        op(Request::RequestTxn(TxnRequest {
            success,
            failure,
            ..Default::default()
        }))
    };
    let read = |revision| {
        op(Request::RequestRange(RangeRequest {
            limit: 1,
            revision,
            ..range(PREFIX, PREFIX_END)
        }))
    };
    // 2 + 2 * 63 = 128; at revisions that were.
    let inner = |now: i64| (0..63).map(|at| read(now - at % 7)).collect::<Vec<_>>();
    let mut request = TxnRequest {
        success: vec![nested(inner(now), inner(now)), nested(inner(now), vec![])],
        ..Default::default()
    };
    let [want, got] = both.txns(&request).await;
    assert!(want.is_ok(), "{want:?}");
    assert_eq!(got, want);
    // etcd counts along each path, and would do as many as fit into a request.
    request.failure = vec![nested(vec![read(now)], vec![])];
    let [want, got] = both.txns(&request).await;
    assert!(want.is_ok(), "{want:?}");
    let too_many = "InvalidArgument: etcdserver: too many operations in txn request";
    assert_eq!(got.unwrap_err(), too_many);
    let tree = (0..2).fold(vec![read(now); 44], |ops, _| vec![nested(ops, vec![]); 28]);
    let request = TxnRequest {
        success: tree,
        ..Default::default()
    };
    // Before anything else is said about it: this one is written where no reader writes, and more than once.
    let put = op(Request::RequestPut(PutRequest {
        key: "cilium/state/x/a".into(),
        ..Default::default()
    }));
    let writes = TxnRequest {
        success: vec![
            nested(vec![put.clone(); 100], vec![]),
            nested(vec![put; 100], vec![]),
        ],
        ..Default::default()
    };
    for request in [request, writes] {
        let status = KvClient::new(both.ours.clone()).txn(request).await.unwrap_err();
        assert_eq!(told(status), too_many);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_not_read_or_write_is_told_so_in_etcds_words() {
    let both = Both::start("remote-c2").await;
    fill(&both).await;
    let put = || {
        op(Request::RequestPut(PutRequest {
            key: "cilium/state/x/a".into(),
            ..Default::default()
        }))
    };
    let delete = || {
        op(Request::RequestDeleteRange(DeleteRangeRequest {
            key: "cilium/state/x/a".into(),
            ..Default::default()
        }))
    };
    let local = || op(Request::RequestRange(range("isthmus/local/", "isthmus/local0")));
    let nested = |op| RequestOp {
        request: Some(Request::RequestTxn(TxnRequest {
            failure: vec![op],
            ..Default::default()
        })),
    };
    let mut requests: Vec<TxnRequest> = vec![];
    for op in [put(), delete(), local(), nested(put()), nested(local())] {
        // Also in the branch that is not taken.
        requests.push(TxnRequest {
            success: vec![op.clone()],
            ..Default::default()
        });
        requests.push(TxnRequest {
            failure: vec![op],
            ..Default::default()
        });
    }
    requests.push(TxnRequest {
        compare: vec![Compare {
            result: CompareResult::Equal as i32,
            target: CompareTarget::Version as i32,
            key: "isthmus/local/x".into(),
            ..Default::default()
        }],
        ..Default::default()
    });
    // Locks and what is mirrored do not mix.
    requests.push(TxnRequest {
        success: vec![
            op(Request::RequestPut(PutRequest {
                key: "cilium/.initlock/x".into(),
                ..Default::default()
            })),
            op(Request::RequestRange(range("cilium/state/x/a", ""))),
        ],
        ..Default::default()
    });
    let denied = "PermissionDenied: etcdserver: permission denied";
    let mut kv = KvClient::new(both.ours.clone());
    for request in requests {
        let status = kv.txn(request.clone()).await.unwrap_err();
        assert_eq!(told(status), denied, "{request:?}");
    }
    let mut nobody = KvClient::new(channel(&both.pki, both.server.address, "nobody").await);
    assert_eq!(told(nobody.txn(TxnRequest::default()).await.unwrap_err()), denied);
}
