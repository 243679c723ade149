//! The life of pods in a real sandbox: namespaces, cgroups, processes, probes, hooks, logs, removal.
//!
//! Needs root and etcd. The CNI plugin is a stand-in (a shell script), Isthmus' own components do not run. This
//! program is also the sandbox's supervisor (`sandbox supervise`) and the server that runs in the pods (`serve`).

#![expect(
    clippy::unwrap_used,
    reason = "a test without the harness: a panic is its failure"
)]

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use futures::StreamExt;
use isthmus_sandbox::cli::{SandboxArgs, run};
use isthmus_sandbox::{SandboxClient, cgroup, netns, teardown};
use k8s_openapi::api::core::v1::{Node, Pod, PodCondition};
use kube::Client;
use kube::api::{Api, DeleteParams, LogParams, PostParams, WatchEvent, WatchParams};
use serde_json::{Value, json};

#[derive(Parser)]
enum Program {
    Sandbox(SandboxArgs),
    /// Answers GET with 200, or with 503 while the file FLAG exists.
    Serve {
        port: u16,
        flag: PathBuf,
    },
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("sandbox" | "serve") => {}
        // What `cargo test` passes (filters, --nocapture) does not matter: there is one test.
        _ => return runtime().block_on(test()),
    }
    match Program::parse() {
        Program::Sandbox(args) => runtime().block_on(run(args)).unwrap_or_else(|error| {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }),
        Program::Serve { port, flag } => serve(port, &flag),
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("a runtime can be made")
}

fn serve(port: u16, flag: &Path) -> ExitCode {
    println!(
        "serving {} with {:?}",
        std::process::id(),
        std::env::var("POD_IP")
    );
    let listener = TcpListener::bind(("0.0.0.0", port)).expect("the port of a new namespace is free");
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        let _ = stream.read(&mut [0; 1024]);
        let status = if flag.exists() {
            "503 Service Unavailable"
        } else {
            "200 OK"
        };
        let _ = write!(
            stream,
            "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
    }
    ExitCode::SUCCESS
}

struct Lab {
    root: PathBuf,
    name: String,
    sandbox: SandboxClient,
    client: Client,
}

async fn test() -> ExitCode {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test makes network namespaces: run it as root"
    );
    let directory = tempfile::tempdir().expect("a temporary directory");
    let root = directory.path().join("state");
    let name = format!("pods-{}", std::process::id());
    let outcome = tokio::spawn(story(directory.path().to_owned(), root.clone(), name.clone())).await;
    if outcome.is_err() {
        eprintln!(
            "{}",
            std::fs::read_to_string(root.join(&name).join("logs/supervisor.log")).unwrap_or_default()
        );
    }
    let removed = teardown::down(&root, &name).await;
    match (outcome, removed) {
        (Ok(()), Ok(_)) => ExitCode::SUCCESS,
        (outcome, removed) => {
            eprintln!("story: {outcome:?}; removal: {removed:?}");
            ExitCode::FAILURE
        }
    }
}

async fn story(directory: PathBuf, root: PathBuf, name: String) {
    let plugin = directory.join("isthmus-cni");
    std::fs::write(&plugin, include_str!("cni_stand_in.sh")).unwrap();
    std::fs::set_permissions(&plugin, std::fs::Permissions::from_mode(0o755)).unwrap();
    let lab = up(&directory, root, name).await;
    nodes_become_ready(&lab).await;
    a_server_becomes_ready_and_is_reached(&lab, &directory).await;
    readiness_follows_the_probe(&lab, &directory).await;
    a_crash_is_seen_at_once_and_the_container_runs_again(&lab).await;
    logs_environment_and_exec(&lab).await;
    a_deleted_pod_ends_within_its_grace_period(&lab, &directory).await;
    a_pod_that_ends_gives_back_its_network(&lab).await;
    refusals_are_shown(&lab).await;
    components_are_moved_by_hand(&lab).await;
    nothing_is_left(lab).await;
}

async fn up(directory: &Path, root: PathBuf, name: String) -> Lab {
    let flags = ["--clusters=1", "--nodes=2", "--no-components", "--name", &name];
    let paths = [
        "--bin-dir",
        directory.to_str().unwrap(),
        "--state-root",
        root.to_str().unwrap(),
    ];
    let status = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args(["sandbox", "up"])
        .args(flags)
        .args(paths)
        .status()
        .await
        .unwrap();
    assert!(status.success());
    let sandbox = SandboxClient::open_in(&root, &name).unwrap();
    Lab {
        root,
        name,
        client: sandbox.kube("east").unwrap(),
        sandbox,
    }
}

impl Lab {
    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), "default")
    }

    async fn create(&self, name: &str, spec: Value) -> Pod {
        let annotations = json!({"sandbox.isthmus.io/probe-period-ms": "50"});
        let pod = json!({"metadata": {"name": name, "annotations": annotations}, "spec": spec});
        self.pods()
            .create(&PostParams::default(), &serde_json::from_value(pod).unwrap())
            .await
            .unwrap()
    }

    /// Waits until `holds` is true of the pod.
    async fn wait(&self, name: &str, what: &str, holds: impl Fn(&Pod) -> bool) -> Pod {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let pod = self.pods().get_opt(name).await.unwrap();
            match pod {
                Some(pod) if holds(&pod) => return pod,
                pod => {
                    let status = serde_json::to_string_pretty(&pod.and_then(|pod| pod.status)).unwrap();
                    assert!(Instant::now() < deadline, "{name} is not {what}: {status}");
                }
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn wait_gone(&self, name: &str, patience: Duration) {
        let deadline = Instant::now() + patience;
        while self.pods().get_opt(name).await.unwrap().is_some() {
            assert!(Instant::now() < deadline, "{name} is still there");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn condition<'a>(pod: &'a Pod, kind: &str) -> Option<&'a PodCondition> {
    pod.status
        .as_ref()?
        .conditions
        .as_ref()?
        .iter()
        .find(|condition| condition.type_ == kind)
}

fn is_ready(pod: &Pod) -> bool {
    condition(pod, "Ready").is_some_and(|condition| condition.status == "True")
}

fn restarts(pod: &Pod) -> i32 {
    let statuses = pod
        .status
        .as_ref()
        .and_then(|status| status.container_statuses.as_ref());
    statuses
        .and_then(|statuses| statuses.first())
        .map_or(0, |status| status.restart_count)
}

fn phase(pod: &Pod) -> &str {
    pod.status
        .as_ref()
        .and_then(|status| status.phase.as_deref())
        .unwrap_or_default()
}

fn uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap()
}

async fn nodes_become_ready(lab: &Lab) {
    let api: Api<Node> = Api::all(lab.client.clone());
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let nodes = api.list(&Default::default()).await.unwrap().items;
        let ready = |node: &Node| {
            let conditions = node
                .status
                .as_ref()
                .and_then(|status| status.conditions.clone())
                .unwrap_or_default();
            conditions
                .iter()
                .any(|condition| condition.type_ == "Ready" && condition.status == "True")
        };
        if nodes.len() == 2 && nodes.iter().all(ready) {
            return;
        }
        assert!(Instant::now() < deadline, "{nodes:#?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn a_server_becomes_ready_and_is_reached(lab: &Lab, directory: &Path) {
    let program = std::env::current_exe().unwrap();
    let flag = directory.join("unready");
    let spec = json!({
        "nodeName": "east-1",
        "initContainers": [{"name": "first", "image": "none", "command": ["sh", "-c", "echo first"]}],
        "containers": [{
            "name": "web", "image": "none",
            "command": [program], "args": ["serve", "8080", flag],
            "env": [{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
            "ports": [{"name": "http", "containerPort": 8080}],
            "readinessProbe": {"httpGet": {"port": "http"}, "failureThreshold": 1},
            "livenessProbe": {"tcpSocket": {"port": 8080}},
        }],
    });
    lab.create("web", spec).await;
    let pod = lab.wait("web", "ready", is_ready).await;
    assert_eq!(phase(&pod), "Running");
    let ip = pod.status.as_ref().unwrap().pod_ip.clone().unwrap();
    assert!(ip.starts_with("10.99.11."), "{ip}");
    let node = Some(netns::path(&lab.sandbox.plan().nodes().next().unwrap().netns));
    let address = format!("{ip}:8080").parse().unwrap();
    netns::connect(node, address, Duration::from_secs(1))
        .await
        .unwrap();
    let other = Some(netns::path(&lab.sandbox.plan().clusters[0].netns));
    assert!(
        netns::connect(other, address, Duration::from_millis(100))
            .await
            .is_err(),
        "pods are in namespaces"
    );
}

async fn readiness_follows_the_probe(lab: &Lab, directory: &Path) {
    std::fs::write(directory.join("unready"), "").unwrap();
    lab.wait("web", "unready", |pod| !is_ready(pod)).await;
    std::fs::remove_file(directory.join("unready")).unwrap();
    let pod = lab.wait("web", "ready", is_ready).await;
    assert_eq!(restarts(&pod), 0);
}

async fn a_crash_is_seen_at_once_and_the_container_runs_again(lab: &Lab) {
    let pod = lab.wait("web", "ready", is_ready).await;
    let version = pod.metadata.resource_version.clone().unwrap();
    let only = WatchParams::default().fields("metadata.name=web");
    let mut events = std::pin::pin!(lab.pods().watch(&only, &version).await.unwrap());
    let group = lab.sandbox.plan().pod_cgroup("east-1", uid(&pod)).join("web");
    cgroup::kill(&group).unwrap();
    let first = tokio::time::timeout(Duration::from_secs(5), events.next())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    let WatchEvent::Modified(seen) = first else {
        panic!("{first:?}")
    };
    assert!(!is_ready(&seen), "it is unready before anything else happens");
    let pod = lab
        .wait("web", "ready again", |pod| restarts(pod) == 1 && is_ready(pod))
        .await;
    let last = pod
        .status
        .unwrap()
        .container_statuses
        .unwrap()
        .remove(0)
        .last_state
        .unwrap()
        .terminated
        .unwrap();
    assert_eq!((last.exit_code, last.signal), (137, Some(9)));
}

async fn logs_environment_and_exec(lab: &Lab) {
    let pod = lab.wait("web", "ready", is_ready).await;
    let ip = pod.status.as_ref().unwrap().pod_ip.clone().unwrap();
    let log = lab.pods().logs("web", &LogParams::default()).await.unwrap();
    assert_eq!(log.lines().count(), 2, "one line for each run: {log}");
    assert!(log.contains(&format!("Ok(\"{ip}\")")), "{log}");
    let mut command = lab.sandbox.exec("east", "default", "web").await.unwrap();
    let output = command
        .args(["sh", "-c", "echo $POD_IP; ip -4 -o address show eth0"])
        .output()
        .await
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(
        said.starts_with(&format!("{ip}\n")) && said.contains(&format!("{ip}/32")),
        "{said}"
    );
}

async fn a_deleted_pod_ends_within_its_grace_period(lab: &Lab, directory: &Path) {
    let hook = directory.join("hook");
    let spec = json!({
        "nodeName": "east-2", "terminationGracePeriodSeconds": 1,
        "containers": [{
            "name": "stubborn", "image": "none", "command": ["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"],
            "lifecycle": {"preStop": {"exec": {"command": ["touch", hook]}}},
        }],
    });
    lab.create("stubborn", spec).await;
    let pod = lab.wait("stubborn", "ready", is_ready).await;
    let start = Instant::now();
    lab.pods()
        .delete("stubborn", &DeleteParams::default())
        .await
        .unwrap();
    lab.wait_gone("stubborn", Duration::from_secs(10)).await;
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(950), "it had a second: {took:?}");
    assert!(hook.exists(), "the hook ran");
    assert!(!lab.sandbox.plan().pod_cgroup("east-2", uid(&pod)).exists());
    assert!(!netns::path(&lab.sandbox.plan().pod_netns(uid(&pod))).exists());
}

async fn a_pod_that_ends_gives_back_its_network(lab: &Lab) {
    let spec = json!({
        "nodeName": "east-2", "restartPolicy": "Never",
        "containers": [{"name": "job", "image": "none", "command": ["sh", "-c", "echo done"]}],
    });
    let pod = lab.create("job", spec).await;
    lab.wait("job", "done", |pod| phase(pod) == "Succeeded").await;
    let netns = netns::path(&lab.sandbox.plan().pod_netns(uid(&pod)));
    let deadline = Instant::now() + Duration::from_secs(5);
    while netns.exists() {
        assert!(Instant::now() < deadline, "{} is still there", netns.display());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(
        lab.pods().logs("job", &LogParams::default()).await.unwrap(),
        "done\n"
    );
}

async fn refusals_are_shown(lab: &Lab) {
    let container = json!({"name": "c", "image": "none", "command": ["sleep", "60"]});
    lab.create(
        "refused",
        json!({"nodeName": "east-1", "containers": [container]}),
    )
    .await;
    let shown = |pod: &Pod| {
        condition(pod, "PodReadyToStartContainers")
            .and_then(|condition| condition.message.as_deref())
            .is_some_and(|message| message.contains("the stand-in refuses: by name"))
    };
    lab.wait("refused", "refused", shown).await;
    lab.create(
        "imageonly",
        json!({"nodeName": "east-1", "containers": [{"name": "c", "image": "nginx"}]}),
    )
    .await;
    let explained = |pod: &Pod| {
        serde_json::to_string(pod)
            .unwrap()
            .contains("give the container a `command`")
    };
    lab.wait("imageonly", "refused", explained).await;
    for name in ["refused", "imageonly"] {
        lab.pods().delete(name, &DeleteParams::default()).await.unwrap();
        lab.wait_gone(name, Duration::from_secs(10)).await;
    }
}

async fn components_are_moved_by_hand(lab: &Lab) {
    let etcd = async || lab.sandbox.status().await.unwrap().components.remove(0);
    let first = etcd().await;
    lab.sandbox.kill9("east/etcd").await.unwrap();
    lab.sandbox.wait_ready(Duration::from_secs(20)).await.unwrap();
    let second = etcd().await;
    assert!(
        second.pid != first.pid && second.restarts == 1 && second.ready,
        "{second:?}"
    );
    lab.sandbox.pause("east/etcd").await.unwrap();
    assert!(!etcd().await.ready);
    lab.sandbox.resume("east/etcd").await.unwrap();
    lab.sandbox.wait_ready(Duration::from_secs(20)).await.unwrap();
    lab.sandbox.stop("east/etcd").await.unwrap();
    assert_eq!(etcd().await.pid, None);
    lab.sandbox.start("east/etcd").await.unwrap();
    lab.sandbox.wait_ready(Duration::from_secs(20)).await.unwrap();
    let error = lab.sandbox.stop("east/other").await.unwrap_err().to_string();
    assert!(error.contains("east/etcd"), "{error}");
}

async fn nothing_is_left(lab: Lab) {
    let plan = lab.sandbox.plan().clone();
    assert!(plan.cgroup().exists());
    assert!(teardown::down(&lab.root, &lab.name).await.unwrap());
    assert!(!plan.cgroup().exists());
    let prefix = isthmus_sandbox::plan::Plan::netns_prefix(plan.index);
    assert_eq!(netns::names_with_prefix(&prefix), Vec::<String>::new());
    assert!(!lab.root.exists());
    assert!(
        !teardown::down(&lab.root, &lab.name).await.unwrap(),
        "removal can be repeated"
    );
}
