//! Clients that misbehave: what they ask for is bounded and refused in words, and others get what they are due, complete and
//! in order.

use std::{io::Write, net::TcpStream, time::Duration};

use etcd_client::{Error, GetOptions, WatchOptions, WatchStream};
use isthmus_clustermesh_apiserver::server::errors::TOO_MANY_REQUESTS;

use crate::lab::{Apiserver, Etcd, Pki, config, eventually};

const PREFIX: &str = "cilium/state/x/";

fn prefix() -> Option<WatchOptions> {
    Some(WatchOptions::new().with_prefix())
}

/// Revisions of a watch's events, up to `end` or until the watch is cancelled; with the compact revision, if it was.
async fn revisions(stream: &mut WatchStream, end: i64) -> (Vec<i64>, Option<i64>) {
    let mut seen = vec![];
    let read = async {
        while seen.last().is_none_or(|last| *last < end) {
            let response = stream.message().await.unwrap().expect("the stream goes on");
            if response.canceled() {
                return Some(response.compact_revision());
            }
            let events = response.events().iter();
            seen.extend(events.map(|event| event.kv().unwrap().mod_revision()));
        }
        None
    };
    let compacted = tokio::time::timeout(Duration::from_secs(60), read)
        .await
        .expect("the events come");
    (seen, compacted)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watches_of_a_connection_are_limited_over_its_streams() {
    let (etcd, pki) = (Etcd::start().await, Pki::new());
    let mut config = config("c1", 1, etcd.config(), &pki);
    config.limits.watches = 50;
    let server = Apiserver::start(config).await;
    server.ready().await;
    let mut greedy = pki.client(server.address, "remote-c2").await;
    let mut first = greedy.watch(PREFIX, prefix()).await.unwrap();
    let mut ids = vec![first.message().await.unwrap().unwrap().watch_id()];
    for _ in 1..50 {
        first.watch(PREFIX, prefix()).await.unwrap();
        let answer = first.message().await.unwrap().unwrap();
        assert!(answer.created() && !answer.canceled());
        ids.push(answer.watch_id());
    }
    // One more is refused, on this stream and on another of the same connection.
    first.watch(PREFIX, prefix()).await.unwrap();
    let mut second = greedy.watch(PREFIX, prefix()).await.unwrap();
    for stream in [&mut first, &mut second] {
        let answer = stream.message().await.unwrap().unwrap();
        assert!(answer.created() && answer.canceled());
        assert_eq!(
            (answer.watch_id(), answer.cancel_reason()),
            (-1, TOO_MANY_REQUESTS)
        );
    }
    // Another connection has its own, and a place that becomes free can be taken.
    let mut other = pki.client(server.address, "remote-c2").await;
    let mut stream = other.watch(PREFIX, prefix()).await.unwrap();
    assert!(!stream.message().await.unwrap().unwrap().canceled());
    first.cancel(ids[0]).await.unwrap();
    assert!(first.message().await.unwrap().unwrap().canceled());
    second.watch(PREFIX, prefix()).await.unwrap();
    assert!(!second.message().await.unwrap().unwrap().canceled());
    // Those of a stream that ends are free as well.
    drop(first);
    eventually("a place is free", || {
        let mut greedy = greedy.clone();
        async move {
            let mut stream = greedy.watch(PREFIX, prefix()).await.ok()?;
            let mut made = 0;
            for _ in 0..40 {
                made += usize::from(!stream.message().await.ok()??.canceled());
                stream.watch(PREFIX, prefix()).await.ok()?;
            }
            (made == 40).then_some(())
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_does_not_read_costs_others_nothing_and_is_told_what_it_missed() {
    let (etcd, pki) = (Etcd::start().await, Pki::new());
    let mut config = config("c1", 1, etcd.config(), &pki);
    config.history.len = 300;
    let server = Apiserver::start(config).await;
    server.ready().await;
    let mut slow = pki.client(server.address, "remote-c2").await;
    let mut good = pki.client(server.address, "remote-c3").await;
    let mut slow = slow.watch(PREFIX, prefix()).await.unwrap();
    let mut good = good.watch(PREFIX, prefix()).await.unwrap();
    for stream in [&mut slow, &mut good] {
        assert!(stream.message().await.unwrap().unwrap().created());
    }
    // More than fits into the windows, the sockets and the history together.
    let mut client = etcd.client().await.unwrap();
    let (mut begin, mut end) = (0, 0);
    for number in 0..1_500 {
        let put = client
            .put(format!("{PREFIX}{}", number % 7), vec![b'x'; 10_000], None)
            .await
            .unwrap();
        end = put.header().unwrap().revision();
        begin = if number == 0 { end } else { begin };
        if number % 100 == 99 {
            let (seen, compacted) = revisions(&mut good, end).await;
            assert_eq!((seen, compacted), ((end - 99..=end).collect(), None));
        }
    }
    let (seen, compacted) = revisions(&mut slow, end).await;
    // What it got is whole and in order. What is gone it is told to list again: no event is missing in between.
    assert!(seen.iter().copied().eq(begin..begin + seen.len() as i64));
    let compacted = compacted.expect("it was left behind");
    assert!(begin + (seen.len() as i64) < compacted && compacted <= end);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_is_too_large_is_refused_and_its_pages_are_not() {
    let (etcd, pki) = (Etcd::start().await, Pki::new());
    let mut config = config("c1", 1, etcd.config(), &pki);
    config.limits.answer_bytes = 500_000;
    let mut client = etcd.client().await.unwrap();
    for number in 0..300 {
        let key = format!("{PREFIX}{number:03}");
        client.put(key, vec![b'x'; 2_000], None).await.unwrap();
    }
    let server = Apiserver::start(config).await;
    server.ready().await;
    let mut ours = pki.client(server.address, "remote-c2").await;
    let all = || GetOptions::new().with_prefix();
    match ours.get(PREFIX, Some(all())).await.unwrap_err() {
        Error::GRpcStatus(status) => {
            assert_eq!(status.code(), tonic::Code::ResourceExhausted);
            assert!(status.message().contains("limit"), "{}", status.message());
        }
        other => panic!("{other}"),
    }
    let page = ours.get(PREFIX, Some(all().with_limit(256))).await.unwrap();
    assert!(page.more() && page.count() == 300 && page.kvs().len() == 256);
    let keys = ours.get(PREFIX, Some(all().with_keys_only())).await.unwrap();
    assert_eq!(keys.kvs().len(), 300);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_never_shake_hands_go_and_others_are_served() {
    let (etcd, pki) = (Etcd::start().await, Pki::new());
    let mut config = config("c1", 1, etcd.config(), &pki);
    config.limits.handshakes = 20;
    config.limits.handshake_timeout = Duration::from_millis(500);
    let server = Apiserver::start(config).await;
    server.ready().await;
    // As many as there are places; half of them begin a handshake that they never go on with.
    let silent: Vec<TcpStream> = (0..20)
        .map(|number| {
            let mut tcp = TcpStream::connect(server.address).unwrap();
            if number % 2 == 0 {
                tcp.write_all(&[22, 3, 1, 2, 0, 1]).unwrap();
            }
            tcp
        })
        .collect();
    let mut ours = pki.client(server.address, "remote-c2").await;
    let answer = ours.get(format!("{PREFIX}1"), None).await.unwrap();
    assert_eq!(answer.count(), 0);
    drop(silent);
}
