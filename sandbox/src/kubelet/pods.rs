//! The pods of a sandbox that have been attached: where they run, for commands, and their logs, for the API.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream;
use isthmus_sandbox_kube::{LogRequest, LogStream, PodRuntime, RuntimeRefusal};
use k8s_openapi::api::core::v1::Pod;

use super::logs;
use crate::control::PodHandle;
use crate::plan::Plan;

/// How often a followed log is looked at.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(100);

/// All pods of all clusters, by name.
#[derive(Clone, Debug, Default)]
pub struct Pods(Arc<Mutex<BTreeMap<Key, Entry>>>);

/// Cluster, namespace, name.
type Key = (String, String, String);

#[derive(Clone, Debug, Default)]
struct Entry {
    uid: String,
    handle: PodHandle,
    running: BTreeSet<String>,
}

/// A pod's UID.
pub fn uid(pod: &Pod) -> String {
    pod.metadata.uid.clone().unwrap_or_default()
}

fn key(cluster: &str, pod: &Pod) -> Key {
    let namespace = pod.metadata.namespace.clone().unwrap_or_else(|| "default".into());
    (
        cluster.to_owned(),
        namespace,
        pod.metadata.name.clone().unwrap_or_default(),
    )
}

impl Pods {
    /// Where a pod runs.
    pub fn find(&self, cluster: &str, namespace: &str, name: &str) -> Option<PodHandle> {
        self.entry(cluster, namespace, name).map(|entry| entry.handle)
    }

    /// Notes where a pod runs. A pod of the same name that was there before is forgotten.
    pub fn publish(&self, cluster: &str, pod: &Pod, handle: PodHandle) {
        let mut pods = self.lock();
        let entry = pods.entry(key(cluster, pod)).or_default();
        if entry.uid != uid(pod) {
            *entry = Entry {
                uid: uid(pod),
                ..Entry::default()
            };
        }
        entry.handle = handle;
    }

    /// Notes whether a container's process runs.
    pub fn set_running(&self, cluster: &str, pod: &Pod, container: &str, running: bool) {
        let mut pods = self.lock();
        let Some(entry) = pods
            .get_mut(&key(cluster, pod))
            .filter(|entry| entry.uid == uid(pod))
        else {
            return;
        };
        if running {
            entry.running.insert(container.to_owned());
        } else {
            entry.running.remove(container);
        }
    }

    /// Drops what is known of a pod, unless another one has its name now.
    pub fn forget(&self, cluster: &str, pod: &Pod) {
        let (mut pods, key) = (self.lock(), key(cluster, pod));
        if pods.get(&key).is_some_and(|entry| entry.uid == uid(pod)) {
            pods.remove(&key);
        }
    }

    fn entry(&self, cluster: &str, namespace: &str, name: &str) -> Option<Entry> {
        self.lock()
            .get(&(cluster.to_owned(), namespace.to_owned(), name.to_owned()))
            .cloned()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Entry>> {
        // Each change is one call on the map: it is whole even after a panic elsewhere.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Answers one cluster's API for the logs of its pods.
#[derive(Clone, Debug)]
pub struct PodLogs {
    /// The sandbox.
    pub sandbox: Arc<Plan>,
    /// The cluster's name.
    pub cluster: String,
    /// All pods.
    pub pods: Pods,
}

impl PodRuntime for PodLogs {
    fn logs(&self, request: LogRequest) -> BoxFuture<'static, Result<LogStream, RuntimeRefusal>> {
        let this = self.clone();
        Box::pin(async move { this.open(request) })
    }
}

impl PodLogs {
    fn open(self, request: LogRequest) -> Result<LogStream, RuntimeRefusal> {
        if request.previous || request.timestamps {
            let message = "the sandbox keeps one log per container, across its restarts and without times";
            return Err(RuntimeRefusal(message.into()));
        }
        let entry = self.pods.entry(&self.cluster, &request.namespace, &request.pod);
        let Some(entry) = entry else {
            let message = format!(
                "the pod `{}/{}` has not been started yet",
                request.namespace, request.pod
            );
            return Err(RuntimeRefusal(message));
        };
        let path = logs::file(&self.sandbox.pod_dir(&entry.uid), &request.container);
        let offset = std::fs::metadata(&path).map_or(0, |metadata| metadata.len());
        let mut past = logs::read(&path);
        if let Some(lines) = request.tail_lines {
            past = tail(&past, lines).to_vec();
        }
        let first = stream::iter([Ok(Bytes::from(past))]);
        if !request.follow {
            return Ok(Box::pin(first));
        }
        let follower = Follower {
            logs: self,
            request,
            uid: entry.uid,
            path,
            offset,
        };
        Ok(Box::pin(futures::StreamExt::chain(
            first,
            stream::unfold(follower, Follower::next),
        )))
    }
}

/// The last lines of a log.
fn tail(log: &[u8], lines: u64) -> &[u8] {
    let lines = usize::try_from(lines).unwrap_or(usize::MAX);
    if lines == 0 {
        return &[];
    }
    let body = log.strip_suffix(b"\n").unwrap_or(log);
    let mut ends = body
        .iter()
        .enumerate()
        .rev()
        .filter(|(_, byte)| **byte == b'\n')
        .map(|(at, _)| at + 1);
    ends.nth(lines - 1).map_or(log, |start| &log[start..])
}

struct Follower {
    logs: PodLogs,
    request: LogRequest,
    uid: String,
    path: PathBuf,
    offset: u64,
}

impl Follower {
    /// The next piece; ends when the container does not run any more and all was read.
    async fn next(mut self) -> Option<(std::io::Result<Bytes>, Self)> {
        loop {
            let running = self.is_running();
            match self.read_new() {
                Ok(piece) if piece.is_empty() && !running => return None,
                Ok(piece) if piece.is_empty() => tokio::time::sleep(FOLLOW_INTERVAL).await,
                Ok(piece) => return Some((Ok(piece), self)),
                // The pod's directory is gone, and the pod with it.
                Err(_) => return None,
            }
        }
    }

    fn is_running(&self) -> bool {
        let entry = self
            .logs
            .pods
            .entry(&self.logs.cluster, &self.request.namespace, &self.request.pod);
        entry.is_some_and(|entry| entry.uid == self.uid && entry.running.contains(&self.request.container))
    }

    fn read_new(&mut self) -> std::io::Result<Bytes> {
        let mut file = std::fs::File::open(&self.path)?;
        if file.metadata()?.len() < self.offset {
            // The log was moved aside; go on with the new file.
            self.offset = 0;
        }
        file.seek(SeekFrom::Start(self.offset))?;
        let mut piece = Vec::new();
        file.take(64 * 1024).read_to_end(&mut piece)?;
        self.offset += piece.len() as u64;
        Ok(piece.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_whole_lines() {
        for (log, lines, want) in [
            ("a\nb\nc\n", 2, "b\nc\n"),
            ("a\nb\nc", 2, "b\nc"),
            ("a\nb\n", 5, "a\nb\n"),
            ("a\n", 0, ""),
            ("", 3, ""),
        ] {
            assert_eq!(tail(log.as_bytes(), lines), want.as_bytes(), "{log:?} {lines}");
        }
    }

    #[test]
    fn a_new_pod_of_the_same_name_is_not_forgotten_with_the_old_one() {
        let pod = |uid: &str| -> Pod {
            serde_json::from_value(
                serde_json::json!({"metadata": {"name": "p", "namespace": "d", "uid": uid}}),
            )
            .unwrap()
        };
        let pods = Pods::default();
        pods.publish("east", &pod("1"), PodHandle::default());
        pods.publish("east", &pod("2"), PodHandle::default());
        pods.forget("east", &pod("1"));
        assert!(pods.find("east", "d", "p").is_some());
        pods.forget("east", &pod("2"));
        assert!(pods.find("east", "d", "p").is_none());
    }
}
