//! Clients that ask for much and read little: what waits for them is bounded, they are refused or closed with a reason, and
//! others get what they are due.

use std::time::Duration;

use isthmus_clustermesh_apiserver::server::{bucket::Rate, errors::TOO_MANY_REQUESTS};
use isthmus_proto::etcdserverpb::{
    DeleteRangeRequest, LeaseGrantRequest, LeaseLeasesRequest, LeaseTimeToLiveRequest, PutRequest,
    RangeRequest, RequestOp, TxnRequest,
    kv_client::KvClient,
    lease_client::LeaseClient,
    range_request::{SortOrder, SortTarget},
    request_op::Request,
};
use tonic::Status;

use crate::{
    both::channel,
    lab::{Apiserver, Etcd, Pki, config, eventually},
    raw::{Dial, watch_request},
};

const PREFIX: &str = "cilium/state/x/";
const MIB: i64 = 1024 * 1024;

/// Puts `count` keys of 10 kB and gives the first and last revision.
async fn fill(etcd: &Etcd, count: usize) -> (i64, i64) {
    let mut client = etcd.client().await.unwrap();
    let (mut first, mut last) = (0, 0);
    for number in 0..count {
        let put = client
            .put(format!("{PREFIX}{number:04}"), vec![b'x'; 10_000], None)
            .await;
        last = put.unwrap().header().unwrap().revision();
        first = if first == 0 { last } else { first };
    }
    (first, last)
}

async fn pending(server: &Apiserver, at_least: i64) {
    eventually("bytes wait", || async {
        (server.metric("apiserver_pending_bytes") >= at_least).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_streams_of_a_slow_reader_hold_no_more_than_a_connection_may() {
    let (etcd, pki) = (Etcd::start().await, Pki::new());
    let mut config = config("c1", 1, etcd.config(), &pki);
    config.limits.streams = 1024;
    let server = Apiserver::start(config).await;
    server.ready().await;
    // A watch from the first revision says a mebibyte at once: 1024 streams would hold a gibibyte.
    let (first, last) = fill(&etcd, 150).await;
    let mut good = Dial::new(&pki, "remote-c3").open(server.address).await.unwrap();
    let mut good = good.watch(PREFIX, first).await.unwrap();
    assert_eq!(good.revisions(last).await.unwrap(), Vec::from_iter(first..=last));

    // It grants a stream next to nothing, and reads nothing of it.
    let dial = Dial::new(&pki, "remote-c2").windows(1000, 65_535);
    let mut slow = dial.open(server.address).await.unwrap();
    let mut streams = Vec::new();
    for _ in 0..1024 {
        let request = watch_request(PREFIX, first);
        streams.push(
            slow.begin("/etcdserverpb.Watch/Watch", &request, false)
                .await
                .unwrap(),
        );
    }
    pending(&server, 4 * MIB).await;
    let mut seen = Vec::new();
    for number in 0..200 {
        let mut client = etcd.client().await.unwrap();
        let put = client.put(format!("{PREFIX}{number}"), "x", None).await.unwrap();
        let revision = put.header().unwrap().revision();
        // Others are told in time all the while.
        assert_eq!(good.revisions(revision).await.unwrap(), [revision]);
        seen.push(server.metric("apiserver_pending_bytes"));
    }
    let most = seen.iter().max().unwrap();
    // The limit, and the message that went beyond it.
    assert!((4 * MIB..=5 * MIB + 64 * 1024).contains(most), "{most} bytes");

    // When it goes on with one of them, that one has lost nothing.
    let (response, requests) = streams.swap_remove(900);
    for (_, mut requests) in streams.drain(..) {
        requests.send_reset(h2::Reason::CANCEL);
    }
    let mut body = response.await.unwrap().into_body();
    let mut read = 0;
    let all = async {
        while read < 150 * 10_000 {
            let data = body.data().await.unwrap().unwrap();
            body.flow_control().release_capacity(data.len()).unwrap();
            read += data.len();
        }
    };
    tokio::time::timeout(Duration::from_secs(60), all)
        .await
        .expect("it goes on");
    drop((requests, slow));
    eventually("nothing waits", || async {
        (server.metric("apiserver_pending_bytes") == 0).then_some(())
    })
    .await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_connection_that_stands_still_is_closed_and_a_slow_one_is_not() {
    let (etcd, pki) = (Etcd::start().await, Pki::new());
    let mut config = config("c1", 1, etcd.config(), &pki);
    config.limits.pending_bytes = MIB as usize;
    config.limits.stall_timeout = Duration::from_secs(2);
    let server = Apiserver::start(config).await;
    server.ready().await;
    let (first, last) = fill(&etcd, 300).await;
    let mut still = Dial::new(&pki, "remote-c2")
        .windows(0, 65_535)
        .open(server.address)
        .await
        .unwrap();
    let request = watch_request(PREFIX, first);
    let _streams = [
        still
            .begin("/etcdserverpb.Watch/Watch", &request, false)
            .await
            .unwrap(),
        still
            .begin("/etcdserverpb.Watch/Watch", &request, false)
            .await
            .unwrap(),
    ];
    // This one has as much waiting for it, and reads a little now and then.
    let mut slow = Dial::new(&pki, "remote-c3")
        .windows(60_000, 65_535)
        .open(server.address)
        .await
        .unwrap();
    let mut watch = slow.watch(PREFIX, first).await.unwrap();
    let mut seen = vec![];
    let closed = "apiserver_closed_connections_total{reason=\"stalled\"}";
    let end = tokio::time::timeout(Duration::from_secs(60), &mut still.connection);
    tokio::pin!(end);
    loop {
        tokio::select! {
            ended = &mut end => break assert!(ended.is_ok(), "it is closed"),
            () = tokio::time::sleep(Duration::from_millis(100)), if *seen.last().unwrap_or(&0) < last => {
                let next = seen.last().map_or(first, |last| last + 1);
                seen.extend(watch.revisions(next).await.unwrap());
            }
        }
    }
    assert_eq!(server.metric(closed), 1);
    if *seen.last().unwrap_or(&0) < last {
        seen.extend(watch.revisions(last).await.unwrap());
    }
    assert_eq!(seen, Vec::from_iter(first..=last));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_answers_on_their_way_are_bounded_over_all_clients() {
    let (etcd, pki) = (Etcd::start().await, Pki::new());
    let mut config = config("c1", 1, etcd.config(), &pki);
    config.limits.answer_bytes_in_flight = 2 * MIB as usize;
    config.limits.patience = Duration::from_secs(1);
    let server = Apiserver::start(config).await;
    server.ready().await;
    let (_, last) = fill(&etcd, 150).await;
    let mut good = Dial::new(&pki, "remote-c3").open(server.address).await.unwrap();
    good.watch(PREFIX, last)
        .await
        .unwrap()
        .revisions(last)
        .await
        .unwrap();
    let mut greedy = Dial::new(&pki, "remote-c2")
        .windows(0, 65_535)
        .open(server.address)
        .await
        .unwrap();
    let range = crate::raw::range_request(PREFIX);
    let held = greedy
        .begin("/etcdserverpb.KV/Range", &range, true)
        .await
        .unwrap();
    pending(&server, MIB).await;
    // The place is taken by an answer that is not read. Small answers need none.
    let refusal = good.list(PREFIX).await.unwrap_err();
    assert_eq!(refusal.to_string(), TOO_MANY_REQUESTS);
    let name = "apiserver_throttled_requests_total{reason=\"answers_in_flight\",kind=\"remote\"}";
    assert_eq!(server.metric(name), 1);
    assert_eq!(good.list(&format!("{PREFIX}000")).await.unwrap().kvs.len(), 10);
    drop((held, greedy));
    eventually("there is a place again", || {
        let mut again = good.share();
        async move { again.list(PREFIX).await.ok() }
    })
    .await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_lists_too_much_waits_and_then_is_refused_and_others_are_not() {
    let (etcd, pki) = (Etcd::start().await, Pki::new());
    let mut config = config("c1", 1, etcd.config(), &pki);
    // A list of these keys is 101 tokens: two at once, then one each four seconds.
    config.limits.list_keys = Rate {
        per_second: 25,
        burst: 200,
    };
    config.limits.patience = Duration::from_millis(500);
    let server = Apiserver::start(config).await;
    server.ready().await;
    let (_, last) = fill(&etcd, 100).await;
    let dial = Dial::new(&pki, "remote-c2");
    let mut greedy = dial.open(server.address).await.unwrap();
    greedy
        .watch(PREFIX, last)
        .await
        .unwrap()
        .revisions(last)
        .await
        .unwrap();
    let mut answers = 0;
    let refusal = loop {
        match greedy.list(PREFIX).await {
            Ok(answer) => assert_eq!(answer.kvs.len(), 100),
            Err(refusal) => break refusal,
        }
        answers += 1;
    };
    assert_eq!(refusal.to_string(), TOO_MANY_REQUESTS);
    assert!(answers >= 2, "{answers} answers");
    let name = "apiserver_throttled_requests_total{reason=\"list_rate\",kind=\"remote\"}";
    assert_eq!(server.metric(name), 1);
    // Watches are no lists, and another connection has its own turn.
    greedy
        .watch(PREFIX, last)
        .await
        .unwrap()
        .revisions(last)
        .await
        .unwrap();
    let mut other = dial.open(server.address).await.unwrap();
    assert_eq!(other.list(PREFIX).await.unwrap().kvs.len(), 100);
    // Its turn comes again.
    eventually("it may list again", || {
        let mut again = greedy.share();
        async move { again.list(PREFIX).await.ok() }
    })
    .await;
    server.stop().await;
}

/// Asks `ask` until it is refused for what was looked at; returns how often it was answered, also with another refusal.
async fn answered(mut ask: impl AsyncFnMut() -> Result<(), Status>) -> usize {
    let mut answered = 0;
    loop {
        match ask().await {
            Err(status) if status.message() == TOO_MANY_REQUESTS => return answered,
            _ => answered += 1,
        }
        assert!(answered < 100, "nothing is charged");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_looked_at_is_paid_for_however_little_is_answered() {
    let (etcd, pki) = (Etcd::start().await, Pki::new());
    let mut config = config("c1", 1, etcd.config(), &pki);
    // Three looks at some 301 keys; the next would have to wait for minutes.
    config.limits.list_keys = Rate {
        per_second: 1,
        burst: 700,
    };
    config.limits.list_bytes = Rate::UNLIMITED;
    config.limits.patience = Duration::from_millis(500);
    config.limits.answer_bytes = 1_000_000;
    let server = Apiserver::start(config).await;
    server.ready().await;
    let (_, last) = fill(&etcd, 300).await;
    let mut good = Dial::new(&pki, "remote-c3").open(server.address).await.unwrap();
    let mut seen = good.watch(PREFIX, last).await.unwrap();
    seen.revisions(last).await.unwrap();
    // 1,204 changes on the way back to before them: as much as 301 keys.
    let mut client = etcd.client().await.unwrap();
    let mut end = last;
    for _ in 0..301 {
        let puts: Vec<_> = (0..4)
            .map(|at| etcd_client::TxnOp::put(format!("cilium/state/y/{at}"), "x", None))
            .collect();
        let answer = client.txn(etcd_client::Txn::new().and_then(puts)).await.unwrap();
        end = answer.header().unwrap().revision();
    }
    good.watch("cilium/state/y/", end)
        .await
        .unwrap()
        .revisions(end)
        .await
        .unwrap();
    let all = || RangeRequest {
        key: PREFIX.into(),
        range_end: "cilium/state/x0".into(),
        ..Default::default()
    };
    let filtered = RangeRequest {
        min_mod_revision: last,
        ..all()
    };
    let sorted = RangeRequest {
        limit: 1,
        sort_order: SortOrder::Descend as i32,
        sort_target: SortTarget::Mod as i32,
        ..all()
    };
    let old = RangeRequest {
        limit: 1,
        revision: last,
        ..all()
    };
    for (request, keys) in [(&filtered, 1), (&sorted, 1), (&old, 1), (&all(), 0)] {
        // Each on a connection of its own. The last one is refused as too large each time.
        let mut kv = KvClient::new(channel(&pki, server.address, "remote-c2").await);
        let count = answered(async || {
            let answer = kv.range(request.clone()).await?.into_inner();
            assert_eq!(answer.kvs.len(), keys);
            Ok(())
        });
        assert_eq!(count.await, 3, "{request:?}");
        // The same in a transaction, which may not even ask for a page.
        let txn = TxnRequest {
            success: vec![RequestOp {
                request: Some(Request::RequestRange(request.clone())),
            }],
            ..Default::default()
        };
        let mut kv = KvClient::new(channel(&pki, server.address, "remote-c2").await);
        let count = answered(async || kv.txn(txn.clone()).await.map(drop));
        assert_eq!(count.await, 3, "a transaction of {request:?}");
    }
    // Pages are what they were: with a look whether there are more.
    let mut kv = KvClient::new(channel(&pki, server.address, "remote-c2").await);
    let page = RangeRequest { limit: 98, ..all() };
    let count = answered(async || {
        let answer = kv.range(page.clone()).await?.into_inner();
        assert_eq!((answer.kvs.len(), answer.more), (98, true));
        Ok(())
    });
    assert_eq!(count.await, 8, "700 are 7 times 100, and once on credit");

    // Locks and leases are no different.
    let holder = channel(&pki, server.address, "remote-c2").await;
    let mut leases = LeaseClient::new(holder.clone());
    for id in 1..=300 {
        leases
            .lease_grant(LeaseGrantRequest { id, ttl: 600 })
            .await
            .unwrap();
    }
    let mut kv = KvClient::new(holder);
    for at in 0..300 {
        let put = PutRequest {
            key: format!("cilium/.initlock/{at}").into(),
            lease: 1,
            ..Default::default()
        };
        kv.put(put).await.unwrap();
    }
    let locks = RangeRequest {
        key: "cilium/.initlock/".into(),
        range_end: "cilium/.initlock0".into(),
        limit: 1,
        max_create_revision: i64::MAX,
        ..Default::default()
    };
    let mut kv = KvClient::new(channel(&pki, server.address, "remote-c2").await);
    let count = answered(async || kv.range(locks.clone()).await.map(drop));
    assert_eq!(count.await, 3, "locks");
    let txn = TxnRequest {
        success: vec![RequestOp {
            request: Some(Request::RequestRange(locks)),
        }],
        ..Default::default()
    };
    let mut kv = KvClient::new(channel(&pki, server.address, "remote-c2").await);
    let count = answered(async || kv.txn(txn.clone()).await.map(drop));
    assert_eq!(count.await, 3, "locks in a transaction");
    let mut leases = LeaseClient::new(channel(&pki, server.address, "remote-c2").await);
    let count = answered(async || leases.lease_leases(LeaseLeasesRequest {}).await.map(drop));
    assert_eq!(count.await, 3, "leases");
    let mut leases = LeaseClient::new(channel(&pki, server.address, "remote-c2").await);
    let count = answered(async || {
        let request = LeaseTimeToLiveRequest { id: 1, keys: true };
        let answer = leases.lease_time_to_live(request).await?.into_inner();
        assert_eq!(answer.keys.len(), 300);
        Ok(())
    });
    assert_eq!(count.await, 3, "a lease's keys");
    // Also for a deletion that is denied.
    let mut kv = KvClient::new(channel(&pki, server.address, "remote-c3").await);
    let delete = DeleteRangeRequest {
        key: "cilium/.initlock/".into(),
        range_end: "cilium/.initlock0".into(),
        prev_kv: true,
    };
    let count = answered(async || kv.delete_range(delete.clone()).await.map(drop));
    assert_eq!(count.await, 3, "deletions that are denied");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_watches_are_answered_and_most_of_them_refused() {
    use isthmus_proto::etcdserverpb::WatchResponse;
    let (etcd, pki) = (Etcd::start().await, Pki::new());
    let mut config = config("c1", 1, etcd.config(), &pki);
    config.limits.watches = 8192;
    config.limits.watches_per_client = 10_000;
    let server = Apiserver::start(config).await;
    server.ready().await;
    let mut good = Dial::new(&pki, "remote-c3").open(server.address).await.unwrap();
    let mut good = good.watch(PREFIX, 0).await.unwrap();
    let dial = Dial::new(&pki, "remote-c2");
    let mut made = 0;
    // Two connections: the one is bounded by itself, both together by what is the client's.
    let mut open = Vec::new();
    for asked in [50_000, 50_000] {
        let mut greedy = dial.open(server.address).await.unwrap();
        let answers = greedy.watch(PREFIX, 0).await.unwrap();
        made += 1;
        let ask = async |requests: &mut h2::SendStream<bytes::Bytes>| {
            let request = crate::raw::framed(&watch_request(PREFIX, 0));
            for _ in 1..asked {
                requests.reserve_capacity(request.len());
                while requests.capacity() < request.len() {
                    std::future::poll_fn(|cx| requests.poll_capacity(cx))
                        .await
                        .unwrap()
                        .unwrap();
                }
                requests.send_data(request.clone(), false).unwrap();
            }
        };
        // Answers are read while more is asked.
        let (mut requests, mut answers) = answers.split();
        let mut counts = (0, 0);
        let read = async {
            while counts.0 + counts.1 < asked - 1 {
                let answer: WatchResponse = answers.next().await.unwrap();
                if answer.canceled {
                    assert_eq!(
                        (answer.watch_id, answer.cancel_reason.as_str()),
                        (-1, TOO_MANY_REQUESTS)
                    );
                    counts.1 += 1;
                } else if answer.created {
                    counts.0 += 1;
                }
            }
        };
        let both = async { tokio::join!(ask(&mut requests), read) };
        tokio::time::timeout(Duration::from_secs(120), both)
            .await
            .expect("all are answered");
        made += counts.0;
        assert_eq!(made, if open.is_empty() { 8192 } else { 10_000 });
        open.push((greedy, requests, answers));
    }
    // Everybody hears of a change.
    let (first, last) = fill(&etcd, 1).await;
    assert_eq!(good.revisions(last).await.unwrap(), [first]);
    drop(open);
    eventually("their watches are gone", || async {
        (server.metric("server_watches") == 1).then_some(())
    })
    .await;
    server.stop().await;
}
