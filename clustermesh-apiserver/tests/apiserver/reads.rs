//! The same client script against etcd and against the server: the answers agree.

use etcd_client::{
    Client, Event, EventType, GetOptions, SortOrder, SortTarget, Txn, TxnOp, WatchFilterType, WatchOptions,
    WatchStream,
};
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::lab::{Apiserver, Etcd, Pki, config, dump, eventually};

const PREFIX: &str = "cilium/state/x/";

/// Some transactions of puts and deletes over a few keys. Returns the last revision.
async fn churn(client: &mut Client, random: &mut StdRng, txns: usize) -> i64 {
    let mut revision = 0;
    for _ in 0..txns {
        let mut keys: Vec<u8> = (0..6).collect();
        let mut ops = vec![];
        for _ in 0..random.random_range(1..4) {
            let key = format!("{PREFIX}{}", keys.swap_remove(random.random_range(0..keys.len())));
            ops.push(if random.random_bool(0.7) {
                TxnOp::put(key, random.random_range(0..4u8).to_string(), None)
            } else {
                TxnOp::delete(key, None)
            });
        }
        let answer = client.txn(Txn::new().and_then(ops)).await.unwrap();
        revision = answer.header().unwrap().revision();
    }
    revision
}

/// The server has seen everything up to `revision` (a marker is written, so that there is something to see).
async fn caught_up(etcd: &mut Client, ours: &mut Client) -> i64 {
    let put = etcd.put("cilium/state/marker", "", None).await.unwrap();
    let revision = put.header().unwrap().revision();
    eventually("the server has caught up", || {
        let mut ours = ours.clone();
        async move {
            let answer = ours.get("cilium/state/marker", None).await.ok()?;
            (answer.header()?.revision() >= revision).then_some(())
        }
    })
    .await;
    revision
}

fn ranges(revision: i64) -> Vec<GetOptions> {
    let base = || GetOptions::new().with_prefix();
    let mut all = vec![
        base(),
        base().with_limit(2),
        base().with_limit(100),
        base().with_count_only(),
        base().with_keys_only(),
        base().with_serializable(),
        base()
            .with_sort(SortTarget::Mod, SortOrder::Descend)
            .with_limit(1),
        base().with_sort(SortTarget::Key, SortOrder::Descend),
        base()
            .with_sort(SortTarget::Key, SortOrder::Descend)
            .with_limit(3),
        base().with_min_mod_revision(revision - 3),
        base().with_max_mod_revision(revision - 3).with_limit(2),
        base().with_min_create_revision(revision - 5),
        base().with_max_create_revision(revision - 5),
        GetOptions::new(),
        GetOptions::new().with_range(format!("{PREFIX}3")),
        GetOptions::new().with_range("a"),
    ];
    all.extend((0..8).map(|back| base().with_revision(revision - back).with_limit(3)));
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranges_agree_with_etcd() {
    let (etcd, pki) = (Etcd::start().await, Pki::new());
    let server = Apiserver::start(config("c1", 1, etcd.config(), &pki)).await;
    server.ready().await;
    let mut theirs = etcd.client().await.unwrap();
    let mut ours = pki.client(server.address, "admin-c1").await;
    let mut random = StdRng::seed_from_u64(7);
    for round in 0..12 {
        churn(&mut theirs, &mut random, 10).await;
        let revision = caught_up(&mut theirs, &mut ours).await;
        for (index, options) in ranges(revision).into_iter().enumerate() {
            for key in [PREFIX, "cilium/state/x/2", "cilium/state/marker"] {
                let want = theirs.get(key, Some(options.clone())).await.unwrap();
                let got = ours.get(key, Some(options.clone())).await.unwrap();
                let what = format!("round {round}, request {index}, key {key}");
                assert_eq!(format!("{:?}", got.kvs()), format!("{:?}", want.kvs()), "{what}");
                assert_eq!((got.more(), got.count()), (want.more(), want.count()), "{what}");
                let (got, want) = (got.header().unwrap(), want.header().unwrap());
                assert_eq!(got.cluster_id(), want.cluster_id(), "{what}");
            }
        }
    }
    // Errors are the same, word for word.
    let revision = caught_up(&mut theirs, &mut ours).await;
    for options in [GetOptions::new().with_revision(revision + 100)] {
        let [want, got] = [
            theirs.get(PREFIX, Some(options.clone())).await.unwrap_err(),
            ours.get(PREFIX, Some(options)).await.unwrap_err(),
        ]
        .map(|error| match error {
            etcd_client::Error::GRpcStatus(status) => (status.code(), status.message().to_owned()),
            other => panic!("{other}"),
        });
        assert_eq!(got, want);
    }
}

/// The events of a watch up to revision `end`; there is one at or after it. How they are spread over responses is left out.
async fn events(stream: &mut WatchStream, end: i64) -> Vec<Event> {
    let mut events: Vec<Event> = vec![];
    let revision = |event: &Event| event.kv().unwrap().mod_revision();
    let collect = async {
        while events.last().is_none_or(|event| revision(event) < end) {
            let response = stream.message().await.unwrap().expect("the stream goes on");
            assert!(!response.canceled(), "{}", response.cancel_reason());
            if let Some(last) = response.events().last() {
                assert!(response.header().unwrap().revision() >= revision(last));
            }
            events.extend(response.events().iter().cloned());
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), collect)
        .await
        .expect("the events come");
    events.retain(|event| revision(event) <= end);
    events
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watches_agree_with_etcd() {
    let (etcd, pki) = (Etcd::start().await, Pki::new());
    let server = Apiserver::start(config("c1", 1, etcd.config(), &pki)).await;
    server.ready().await;
    let mut theirs = etcd.client().await.unwrap();
    let mut ours = pki.client(server.address, "admin-c1").await;
    let mut random = StdRng::seed_from_u64(11);
    let begin = caught_up(&mut theirs, &mut ours).await;
    churn(&mut theirs, &mut random, 40).await;
    let middle = caught_up(&mut theirs, &mut ours).await;
    let options = |start: i64| {
        vec![
            WatchOptions::new().with_prefix().with_start_revision(start),
            WatchOptions::new()
                .with_prefix()
                .with_start_revision(start)
                .with_prev_key(),
            WatchOptions::new()
                .with_prefix()
                .with_start_revision(start)
                .with_filters([WatchFilterType::NoPut]),
            WatchOptions::new()
                .with_prefix()
                .with_start_revision(start)
                .with_filters([WatchFilterType::NoDelete]),
            WatchOptions::new()
                .with_range(format!("{PREFIX}3"))
                .with_start_revision(start),
        ]
    };
    let mut watches = vec![];
    for start in [begin + 1, begin + 7, middle, middle + 20] {
        for options in options(start) {
            let mut pair = vec![];
            for client in [&mut theirs, &mut ours] {
                let mut stream = client.watch(PREFIX, Some(options.clone())).await.unwrap();
                let created = stream.message().await.unwrap().unwrap();
                assert!(created.created() && created.events().is_empty());
                pair.push((stream, created.watch_id()));
            }
            assert_eq!(pair[0].1, pair[1].1);
            watches.push(pair);
        }
    }
    churn(&mut theirs, &mut random, 40).await;
    // A last PUT and DELETE for everybody, so that everybody's end is known.
    for key in [format!("{PREFIX}0"), format!("{PREFIX}0")] {
        theirs.put(key, "end", None).await.unwrap();
    }
    theirs.delete(format!("{PREFIX}0"), None).await.unwrap();
    let end = caught_up(&mut theirs, &mut ours).await;
    for (index, mut pair) in watches.into_iter().enumerate() {
        let want = events(&mut pair[0].0, end - 2).await;
        let got = events(&mut pair[1].0, end - 2).await;
        assert_eq!(got.len(), want.len(), "watch {index}");
        for (got, want) in got.iter().zip(&want) {
            assert_eq!(format!("{got:?}"), format!("{want:?}"), "watch {index}");
        }
        assert!(want.iter().any(|event| event.event_type() == EventType::Put) || index % 5 == 2);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_stream_carries_watches_and_answers_cancels_and_progress() {
    let (etcd, pki) = (Etcd::start().await, Pki::new());
    let server = Apiserver::start(config("c1", 1, etcd.config(), &pki)).await;
    server.ready().await;
    let mut theirs = etcd.client().await.unwrap();
    let mut ours = pki.client(server.address, "remote-c2").await;
    let mut stream = ours
        .watch("cilium/state/a/", Some(WatchOptions::new().with_prefix()))
        .await
        .unwrap();
    let first = stream.message().await.unwrap().unwrap();
    stream
        .watch("cilium/state/b/", Some(WatchOptions::new().with_prefix()))
        .await
        .unwrap();
    let second = stream.message().await.unwrap().unwrap();
    assert!(first.created() && second.created());
    assert_ne!(first.watch_id(), second.watch_id());
    theirs.put("cilium/state/b/1", "x", None).await.unwrap();
    let event = stream.message().await.unwrap().unwrap();
    assert_eq!((event.watch_id(), event.events().len()), (second.watch_id(), 1));
    // One transaction, one response for each watch that it concerns.
    let ops: Vec<TxnOp> = (0..200)
        .map(|index| TxnOp::put(format!("cilium/state/a/{index}"), "x", None))
        .take(128)
        .collect();
    theirs.txn(Txn::new().and_then(ops)).await.unwrap();
    let event = stream.message().await.unwrap().unwrap();
    assert_eq!((event.watch_id(), event.events().len()), (first.watch_id(), 128));
    stream.cancel(second.watch_id()).await.unwrap();
    let cancelled = stream.message().await.unwrap().unwrap();
    assert!(
        cancelled.canceled()
            && cancelled.watch_id() == second.watch_id()
            && cancelled.cancel_reason().is_empty()
    );
    stream.request_progress().await.unwrap();
    let progress = stream.message().await.unwrap().unwrap();
    assert!(!progress.created() && !progress.canceled() && progress.events().is_empty());
    let revision = theirs.get("x", None).await.unwrap().header().unwrap().revision();
    assert_eq!(progress.header().unwrap().revision(), revision);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_compacted_start_is_answered_as_etcd_does() {
    let (etcd, pki) = (Etcd::start().await, Pki::new());
    let mut theirs = etcd.client().await.unwrap();
    for index in 0..20 {
        theirs.put(format!("{PREFIX}{index}"), "x", None).await.unwrap();
    }
    let mut limited = config("c1", 1, etcd.config(), &pki);
    limited.history.len = 5;
    let server = Apiserver::start(limited).await;
    server.ready().await;
    let mut ours = pki.client(server.address, "admin-c1").await;
    for index in 0..20 {
        theirs.put(format!("{PREFIX}{index}"), "y", None).await.unwrap();
    }
    let revision = caught_up(&mut theirs, &mut ours).await;
    theirs.compact(revision - 4, None).await.unwrap();
    for start in [1, revision - 6] {
        let mut answers = vec![];
        for client in [&mut theirs, &mut ours] {
            let options = WatchOptions::new().with_prefix().with_start_revision(start);
            let mut stream = client.watch(PREFIX, Some(options)).await.unwrap();
            let created = stream.message().await.unwrap().unwrap();
            let end = stream.message().await.unwrap().unwrap();
            assert!(end.canceled());
            answers.push((
                created.created(),
                created.canceled(),
                created.watch_id(),
                end.watch_id(),
                end.compact_revision(),
            ));
            // The compaction point itself is a start that works.
            let options = WatchOptions::new()
                .with_prefix()
                .with_start_revision(end.compact_revision());
            let mut stream = client.watch(PREFIX, Some(options)).await.unwrap();
            assert!(stream.message().await.unwrap().unwrap().created());
            assert!(!stream.message().await.unwrap().unwrap().events().is_empty());
        }
        assert_eq!(answers[0], answers[1]);
        let [want, got] = [&mut theirs, &mut ours].map(|client| {
            let mut client = client.clone();
            async move {
                let options = GetOptions::new().with_revision(start);
                client.get(PREFIX, Some(options)).await.unwrap_err().to_string()
            }
        });
        assert_eq!(got.await, want.await);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_at_a_pinned_revision_are_one_snapshot() {
    let (etcd, pki) = (Etcd::start().await, Pki::new());
    let server = Apiserver::start(config("c1", 1, etcd.config(), &pki)).await;
    server.ready().await;
    let mut theirs = etcd.client().await.unwrap();
    let mut ours = pki.client(server.address, "admin-c1").await;
    for index in 0..100 {
        theirs
            .put(format!("{PREFIX}{index:03}"), "before", None)
            .await
            .unwrap();
    }
    caught_up(&mut theirs, &mut ours).await;
    let want = dump(&mut theirs, PREFIX).await;
    let (mut key, mut revision, mut got) = (PREFIX.as_bytes().to_vec(), 0, vec![]);
    loop {
        let options = GetOptions::new()
            .with_range("cilium/state/x0")
            .with_limit(7)
            .with_revision(revision);
        let page = ours.get(key, Some(options)).await.unwrap();
        revision = page.header().unwrap().revision();
        got.extend(page.kvs().iter().map(|kv| kv.mod_revision()));
        // Things change between pages.
        theirs
            .put(format!("{PREFIX}{:03}", got.len() % 100), "after", None)
            .await
            .unwrap();
        theirs.delete(format!("{PREFIX}099"), None).await.unwrap();
        caught_up(&mut theirs, &mut ours).await;
        if !page.more() {
            break;
        }
        key = page.kvs().last().unwrap().key().to_vec();
        key.push(0);
    }
    assert_eq!(
        got,
        want.values()
            .map(|(_, _, modified)| *modified)
            .collect::<Vec<_>>()
    );
}
