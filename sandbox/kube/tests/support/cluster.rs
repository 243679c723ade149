//! A served API with a small stand-in for the kubelets: pods on a node run at once, and end when they are deleted.
#![allow(dead_code, reason = "each test target uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use futures::FutureExt;
use isthmus_sandbox_kube::{
    Client, DeleteOptions, KubeApi, ListOptions, LogRequest, LogStream, Options, PodRuntime, RuntimeRefusal,
    WatchEvent, WatchOptions, kubeconfig_yaml,
};
use serde_json::{Value, json};
use tokio_util::sync::{CancellationToken, DropGuard};

/// How long a condition may take.
pub const DEADLINE: Duration = Duration::from_secs(20);

pub struct Cluster {
    pub api: KubeApi,
    pub url: String,
    pub directory: tempfile::TempDir,
    _stop: DropGuard,
}

struct Logs;

impl PodRuntime for Logs {
    fn logs(
        &self,
        request: LogRequest,
    ) -> futures::future::BoxFuture<'static, Result<LogStream, RuntimeRefusal>> {
        async move {
            let text = format!("{}/{} says hello\n", request.pod, request.container);
            let stream: LogStream = Box::pin(futures::stream::iter([Ok(text.into())]));
            Ok(stream)
        }
        .boxed()
    }
}

/// Starts an API with two nodes in zones `z1` and `z2`.
pub async fn start() -> Cluster {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let api = KubeApi::new(Options::default());
    api.set_runtime(std::sync::Arc::new(Logs));
    let stop = CancellationToken::new();
    let (serving, token) = (api.clone(), stop.clone());
    tokio::spawn(async move { serving.serve(listener, token).await.unwrap() });
    for (node, zone) in [("n1", "z1"), ("n2", "z2")] {
        let node = json!({
            "metadata": {"name": node, "labels": {"topology.kubernetes.io/zone": zone}},
            "status": {
                "conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": null, "lastTransitionTime": null}],
                "nodeInfo": {
                    "kubeletVersion": "v1.32.4", "osImage": "", "kernelVersion": "", "containerRuntimeVersion": "",
                    "architecture": "", "bootID": "", "kubeProxyVersion": "", "machineID": "", "operatingSystem": "",
                    "systemUUID": "",
                },
            },
        });
        api.client().create_whole("nodes", "", node).unwrap();
    }
    tokio::spawn(run_pods(api.client(), stop.clone()));
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("kubeconfig"), kubeconfig_yaml("test", &url)).unwrap();
    Cluster {
        api,
        url,
        directory,
        _stop: stop.drop_guard(),
    }
}

async fn run_pods(client: Client, stop: CancellationToken) {
    let mut watcher = client.watch("pods", None, WatchOptions::default()).unwrap();
    let mut next_address = 1;
    loop {
        let event = tokio::select! {
            () = stop.cancelled() => return,
            event = watcher.next() => event,
        };
        let (Some(WatchEvent::Added(pod)) | Some(WatchEvent::Modified(pod))) = event else {
            continue;
        };
        let pod = pod.value();
        let text = |path: &[&str]| {
            path.iter()
                .fold(pod, |v, key| &v[*key])
                .as_str()
                .unwrap_or("")
                .to_owned()
        };
        let (namespace, name) = (text(&["metadata", "namespace"]), text(&["metadata", "name"]));
        if !text(&["metadata", "deletionTimestamp"]).is_empty() {
            let options = DeleteOptions {
                grace_period_seconds: Some(0),
                ..DeleteOptions::default()
            };
            let _ = client.delete("pods", &namespace, &name, &options);
        } else if !text(&["spec", "nodeName"]).is_empty() && text(&["status", "phase"]) == "Pending" {
            let address = format!("10.244.0.{next_address}");
            next_address += 1;
            let containers = pod["spec"]["containers"].as_array().unwrap();
            let statuses: Vec<Value> = containers
                .iter()
                .map(|c| json!({"name": c["name"], "ready": true, "restartCount": 0, "image": c["image"], "imageID": ""}))
                .collect();
            let status = json!({
                "phase": "Running",
                "podIP": address,
                "podIPs": [{"ip": address}],
                "conditions": [{"type": "Ready", "status": "True"}],
                "containerStatuses": statuses,
            });
            let _ = client.patch_status("pods", &namespace, &name, json!({"status": status}));
        }
    }
}

impl Cluster {
    /// Waits until `check` holds.
    pub async fn until(&self, what: &str, check: impl Fn(&Client) -> bool) {
        let client = self.api.client();
        let mut feed = client.feed(&[]);
        let end = tokio::time::Instant::now() + DEADLINE;
        while !check(&client) {
            tokio::time::timeout_at(end, feed.next())
                .await
                .unwrap_or_else(|_| panic!("no {what} in time"));
        }
    }

    /// The endpoints of a service, over all slices.
    pub fn endpoints(&self, service: &str) -> Vec<Value> {
        let slices = self
            .api
            .client()
            .list("endpointslices.discovery.k8s.io", None, &ListOptions::default())
            .unwrap();
        slices
            .items
            .iter()
            .filter(|s| s.value()["metadata"]["labels"]["kubernetes.io/service-name"] == service)
            .flat_map(|s| s.value()["endpoints"].as_array().cloned().unwrap_or_default())
            .collect()
    }

    /// A kubectl command against this API.
    pub async fn try_kubectl(&self, arguments: &[&str], input: &str) -> Output {
        let mut command = Command::new(kubectl());
        command
            .args(arguments)
            .env("KUBECONFIG", self.directory.path().join("kubeconfig"))
            .env("HOME", self.directory.path())
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped());
        let input = input.to_owned();
        let run = move || {
            let mut child = command.spawn().expect("kubectl starts");
            std::io::Write::write_all(&mut child.stdin.take().unwrap(), input.as_bytes()).unwrap();
            child.wait_with_output().unwrap()
        };
        tokio::task::spawn_blocking(run).await.unwrap()
    }

    /// A kubectl command that must succeed; its output.
    #[track_caller]
    pub fn kubectl<'a>(&'a self, arguments: &'a str) -> impl Future<Output = String> + 'a {
        self.kubectl_with(arguments, "")
    }

    /// The same with a standard input. Arguments are split at spaces.
    pub async fn kubectl_with(&self, arguments: &str, input: &str) -> String {
        let started = Instant::now();
        let split: Vec<&str> = arguments.split(' ').collect();
        let output = self.try_kubectl(&split, input).await;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(
            output.status.success(),
            "kubectl {arguments} failed after {:?}:\n{}{}",
            started.elapsed(),
            text(&output.stdout),
            text(&output.stderr)
        );
        text(&output.stdout)
    }
}

/// The kubectl to use: `ISTHMUS_TEST_KUBECTL`, or the one in the path.
fn kubectl() -> PathBuf {
    if let Some(path) = std::env::var_os("ISTHMUS_TEST_KUBECTL") {
        return path.into();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|directory| directory.join("kubectl"))
        .find(|candidate| candidate.is_file())
        .expect("kubectl is not in PATH: install it (Debian: kubernetes-client) or set ISTHMUS_TEST_KUBECTL to its path")
}
