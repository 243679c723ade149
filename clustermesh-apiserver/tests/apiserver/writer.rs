//! The writer against a real etcd: what etcd does not take holds up nothing else.

use isthmus_kvstore::{Writer, WriterOptions};
use isthmus_runtime::CancellationToken;

use crate::lab::{Etcd, dump, eventually, quick};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_value_that_etcd_refuses_holds_up_no_other_key() {
    let etcd = Etcd::start().await;
    let mut options = WriterOptions::new(["cilium/"]);
    options.connection = quick();
    // More than this etcd takes, as where somebody has set its limit lower than we think.
    options.limits.value = 64 * 1024 * 1024;
    options.limits.bytes = 64 * 1024 * 1024;
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    let (writer, _task) = Writer::start(etcd.config(), options, stop);
    let key = |index: usize| format!("cilium/state/{index:02}");
    for index in 0..20 {
        let len = if index == 7 { 20 * 1024 * 1024 } else { 10 };
        writer.put(key(index), vec![b'x'; len]);
    }
    writer.put("cilium/synced/c1/all", "now");
    writer.flush().await;
    let mut client = etcd.client().await.unwrap();
    eventually("the heart beats at once, beside what is flushed", || async {
        let beats = dump(&mut client.clone(), "cilium/.heartbeat").await.len() == 1;
        beats.then_some(())
    })
    .await;
    let stored = dump(&mut client, "cilium/").await;
    assert!(stored.contains_key(&b"cilium/synced/c1/all"[..]));
    assert_eq!(stored.len(), 19 + 2);
    let status = writer.status();
    assert_eq!((status.refused, status.pending), (1, 0), "{status:?}");
    writer.put(key(7), "small enough");
    writer.flush().await;
    assert_eq!(dump(&mut client, "cilium/state/").await.len(), 20);
    eventually("nothing is refused any more", || async {
        (writer.status().refused == 0).then_some(())
    })
    .await;
}
