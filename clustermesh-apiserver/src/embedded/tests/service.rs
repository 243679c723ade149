//! The task with its readers' store: disks that fail and come back, files that grow, history that gets old, a quota.

use std::{io, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use isthmus_proto::etcdserverpb::{DeleteRangeRequest, PutRequest, RangeRequest};
use isthmus_runtime::{CancellationToken, Health, Metrics, State as HealthState};
use tokio::task::JoinHandle;

use super::{faults::Platters, name, put};
use crate::{
    embedded::{
        self, CallError, Command, Embedded, Limits, Refusal, StoreError,
        file::{Directory, File, Opened},
        state::Retention,
    },
    metrics::EmbeddedMetrics,
    shared::Shared,
    store::{HistoryLimits, Route, Store, SubId},
};

/// No condition takes longer, on a loaded machine.
const DEADLINE: Duration = Duration::from_secs(60);

struct Service {
    embedded: Embedded,
    shared: Shared,
    health: Health,
    metrics: EmbeddedMetrics,
    stop: CancellationToken,
    task: JoinHandle<Result<(), StoreError>>,
}

impl Service {
    fn start(opened: Opened, limits: Limits) -> Self {
        let history = HistoryLimits::default();
        let shared = Shared::new(Store::new(name("c1"), 3, history, history));
        let (health, metrics) = (Health::default(), EmbeddedMetrics::new(&Metrics::new("test")));
        let (embedded, task) = embedded::start(opened, shared.clone(), &health, metrics.clone(), limits);
        let stop = CancellationToken::new();
        Self {
            embedded,
            shared,
            health,
            metrics,
            task: tokio::spawn(task.run(stop.clone())),
            stop,
        }
    }

    async fn put(&self, key: &str, value: impl Into<Bytes>) -> Result<embedded::Answer, CallError> {
        let put = PutRequest {
            key: key.to_owned().into(),
            value: value.into(),
            ..Default::default()
        };
        self.embedded.call(Command::Put(put)).await
    }

    /// What readers see.
    fn value(&self, key: &str) -> Option<Bytes> {
        let request = RangeRequest {
            key: key.to_owned().into(),
            ..Default::default()
        };
        let own = Route::Sub(SubId::Own);
        let mut answer = self.shared.read(|store| store.range(&own, &request)).unwrap();
        answer.kvs.pop().map(|kv| kv.value)
    }

    fn health(&self) -> HealthState {
        self.health.snapshot()["store"].clone()
    }

    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
    }
}

async fn eventually<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let wait = async {
        loop {
            if let Some(value) = condition().await {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(DEADLINE, wait).await.expect(what)
}

fn bad_disk(directory: &Path) -> (Platters, Opened) {
    let platters = Platters::default();
    let taken = Directory::take(directory, &name("c1"), platters.open()).unwrap();
    (platters, Arc::new(taken).open(7).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_fails_stops_writes_and_not_reads_and_is_used_again_when_it_recovers() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let (platters, opened) = bad_disk(directory.path());
    let service = Service::start(opened, Limits::default());
    for (round, error) in [
        io::ErrorKind::StorageFull,
        io::ErrorKind::ReadOnlyFilesystem,
        io::ErrorKind::Other,
    ]
    .into_iter()
    .enumerate()
    {
        let kept = format!("before/{round}");
        service.put(&kept, "kept").await.unwrap();
        platters.fail(&path, Some(round as u32), error);
        let failed = service.put("during", format!("{round}")).await.unwrap_err();
        assert!(matches!(failed, CallError::Disk(_)), "{failed}");
        assert!(failed.to_string().contains("does not take writes"), "{failed}");
        assert_eq!(service.value(&kept), Some("kept".into()), "reads go on");
        let HealthState::Degraded(why) = service.health() else {
            panic!("all is well");
        };
        assert!(why.contains(&io::Error::from(error).to_string()), "{why}");
        // It goes on failing for a while; calls are refused at once.
        service.put("during", "x").await.unwrap_err();
        platters.fail(&path, None, error);
        eventually("it takes writes again", async || {
            service.put("after", "x").await.ok()
        })
        .await;
        assert_eq!(service.health(), HealthState::Ok("serving".to_owned()));
        assert_eq!(service.value(&kept), Some("kept".into()));
        assert_eq!(service.metrics.disk_failures.get(), round as u64 + 1);
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_outlives_a_disk_that_fails() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let (platters, opened) = bad_disk(directory.path());
    let service = Service::start(opened, Limits::default());
    let grant = Command::Grant { id: 5, ttl: 600 };
    service.embedded.call(grant).await.unwrap();
    service
        .embedded
        .call(Command::Put(put("a", "1", 5)))
        .await
        .unwrap();
    platters.fail(&path, Some(0), io::ErrorKind::Other);
    let failed = service.embedded.call(Command::Grant { id: 6, ttl: 600 }).await;
    assert!(matches!(failed, Err(CallError::Disk(_))));
    assert_eq!(service.embedded.keep_alive(5).await, Ok(Some(600)));
    platters.fail(&path, None, io::ErrorKind::Other);
    eventually("it takes writes again", async || service.put("b", "x").await.ok()).await;
    assert_eq!(service.embedded.leases().await.unwrap(), [5]);
    let lease = service.embedded.lease(5).await.unwrap().unwrap();
    assert_eq!(lease.keys, [Bytes::from_static(b"a")]);
    service.embedded.call(Command::Revoke(5)).await.unwrap();
    assert_eq!(service.value("a"), None);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_lost_for_good_ends_the_task() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let (platters, opened) = bad_disk(directory.path());
    let service = Service::start(opened, Limits::default());
    service.put("a", "1").await.unwrap();
    platters.fail(&path, Some(0), io::ErrorKind::Other);
    service.put("a", "2").await.unwrap_err();
    std::fs::remove_file(&path).unwrap();
    let ended = tokio::time::timeout(DEADLINE, service.task).await.unwrap();
    assert!(matches!(ended.unwrap(), Err(StoreError::Unusable(_))));
    assert!(matches!(
        service.health.snapshot()["store"],
        HealthState::Failed(_)
    ));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_file_stays_small_under_a_long_run_of_overwrites() {
    let directory = tempfile::tempdir().unwrap();
    let opened = File::open(directory.path(), &name("c1"), 7).unwrap();
    let limits = Limits {
        retention: Retention {
            revisions: 50,
            bytes: 1024 * 1024,
        },
        // So that it looks often.
        age: Duration::from_millis(20),
        slack_bytes: 512 * 1024,
        ..Limits::default()
    };
    let service = Service::start(opened, limits);
    // It grows first, and is then mostly empty.
    let large = |number: usize| vec![number as u8; 64 * 1024];
    for number in 0..100 {
        service
            .put(&format!("many/{number}"), large(number))
            .await
            .unwrap();
    }
    let grown = service.metrics.file_bytes.get();
    let all = DeleteRangeRequest {
        key: "many/".into(),
        range_end: "many0".into(),
        ..Default::default()
    };
    service.embedded.call(Command::Delete(all)).await.unwrap();
    let mut number = 0;
    eventually("it has shrunk", async || {
        number += 1;
        service
            .put(&format!("few/{}", number % 5), large(number))
            .await
            .unwrap();
        let used = service.metrics.used_bytes.get();
        let bound = 4 * used + 512 * 1024;
        let small = service.metrics.file_bytes.get() <= bound && used < 2 * 1024 * 1024;
        (service.metrics.rewrites.get() > 0 && small && number > 300).then_some(())
    })
    .await;
    assert!(service.metrics.file_bytes.get() < grown, "{grown} bytes before");
    let want: Vec<_> = (0..5).map(|key| service.value(&format!("few/{key}"))).collect();
    assert!(want.iter().all(Option::is_some));
    service.stop().await;
    let opened = File::open(directory.path(), &name("c1"), 8).unwrap();
    assert_eq!(opened.history, 7);
    let service = Service::start(opened, limits);
    let found: Vec<_> = (0..5).map(|key| service.value(&format!("few/{key}"))).collect();
    assert_eq!(found, want);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_store_gives_up_its_history_and_then_refuses_writes_until_keys_are_deleted() {
    let directory = tempfile::tempdir().unwrap();
    let opened = File::open(directory.path(), &name("c1"), 7).unwrap();
    let limits = Limits {
        quota_bytes: 100_000,
        ..Limits::default()
    };
    let service = Service::start(opened, limits);
    // Replaced values are history: they make way.
    for number in 0..50 {
        service.put("one", vec![number; 10_000]).await.unwrap();
    }
    assert!(service.metrics.compacted.get() > 0);
    let refused = loop {
        let key = format!("more/{}", service.metrics.revision.get());
        match service.put(&key, vec![1; 10_000]).await {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(refused, CallError::Refused(Refusal::NoSpace));
    assert!(service.embedded.is_full() && matches!(service.health(), HealthState::Degraded(_)));
    assert!(service.value("one").is_some());
    let delete = DeleteRangeRequest {
        key: "more/".into(),
        range_end: "more0".into(),
        ..Default::default()
    };
    service.embedded.call(Command::Delete(delete)).await.unwrap();
    service.put("one", "small").await.unwrap();
    assert!(!service.embedded.is_full());
    assert_eq!(service.health(), HealthState::Ok("serving".to_owned()));
    service.stop().await;
}
