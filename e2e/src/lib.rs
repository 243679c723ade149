//! A sandbox for a test: made from the same build, waited for, and removed again whatever happens.
//!
//! The tests need root, etcd and kubectl, and the programs of `cargo build --workspace --bins`; where one is missing
//! they fail and say so. Nothing here sleeps to wait: [`eventually`] asks until an answer holds or a deadline passes.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use isthmus_sandbox::{SandboxClient, kubectl::Kubectl, load::Asker};

/// Far above what anything takes, so that only failures reach it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A running sandbox; dropped, it is gone.
pub struct Sandbox {
    name: String,
    client: SandboxClient,
    kubeconfig: PathBuf,
}

impl Sandbox {
    /// Builds `clusters` clusters of `nodes` nodes and waits until they are ready. Removes an earlier one of that name first.
    pub async fn up(name: &str, clusters: u8, nodes: u8) -> anyhow::Result<Self> {
        Self::up_with(name, clusters, nodes, &[]).await
    }

    /// The same with more flags for `isthmus sandbox up`.
    pub async fn up_with(name: &str, clusters: u8, nodes: u8, flags: &[&str]) -> anyhow::Result<Self> {
        run("isthmus", &["sandbox", "down", "--name", name])?;
        let (clusters, nodes) = (clusters.to_string(), nodes.to_string());
        run(
            "isthmus",
            &[
                &[
                    "sandbox",
                    "up",
                    "--name",
                    name,
                    "--clusters",
                    &clusters,
                    "--nodes",
                    &nodes,
                ],
                flags,
            ]
            .concat(),
        )?;
        let client = SandboxClient::open(name)?;
        let kubeconfig = client.status().await?.kubeconfig;
        Ok(Self {
            name: name.to_owned(),
            client,
            kubeconfig,
        })
    }

    /// The control socket's client.
    pub fn client(&self) -> &SandboxClient {
        &self.client
    }

    /// The sandbox's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// kubectl for a cluster.
    pub fn kubectl(&self, cluster: &str) -> Kubectl {
        Kubectl::new(&self.kubeconfig, cluster)
    }

    /// Runs an `isthmus` command against the agent of `node` and returns what it printed.
    pub async fn isthmus(&self, node: &str, args: &[&str]) -> anyhow::Result<String> {
        let output = self.isthmus_output(node, args).await?;
        ensure!(
            output.status.success(),
            "isthmus {args:?} on {node}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The same, also when it fails.
    pub async fn isthmus_output(&self, node: &str, args: &[&str]) -> anyhow::Result<Output> {
        let plan = self.client.plan();
        ensure!(
            plan.nodes().any(|candidate| candidate.name == node),
            "no node {node}"
        );
        Command::new(program("isthmus")?)
            .args(args)
            .env("ISTHMUS_SOCKET_PATH", plan.agent_socket(node))
            .env("ISTHMUS_BPF_ROOT", plan.bpf_root(node))
            .output()
            .context("cannot run isthmus")
    }

    /// The output of an `isthmus … -o json` command, parsed.
    pub async fn isthmus_json(&self, node: &str, args: &[&str]) -> anyhow::Result<serde_json::Value> {
        let text = self.isthmus(node, &[args, &["-o", "json"]].concat()).await?;
        serde_json::from_str(&text)
            .with_context(|| format!("isthmus {args:?} -o json printed no JSON: {text}"))
    }

    /// A client of a cluster's own etcd, as its administrator has it.
    pub async fn etcd(&self, cluster: &str) -> anyhow::Result<etcd_client::Client> {
        let status = self.client.status().await?;
        let url = &status
            .clusters
            .iter()
            .find(|candidate| candidate.name == cluster)
            .context("no such cluster")?
            .etcd;
        etcd_client::Client::connect([url], None)
            .await
            .with_context(|| format!("cannot connect to {url}"))
    }

    /// A pod that asks.
    pub fn asker(&self, cluster: &str, pod: &str) -> Asker {
        Asker {
            cluster: cluster.to_owned(),
            namespace: NAMESPACE.to_owned(),
            pod: pod.to_owned(),
        }
    }

    /// Makes a pod that only waits to be used, on `node` if one is named. Returns when it is ready.
    pub async fn make_client(&self, cluster: &str, pod: &str, node: Option<&str>) -> anyhow::Result<()> {
        let kubectl = self.kubectl(cluster);
        kubectl.apply(&client_manifest(pod, node)).await?;
        let ready = "--for=condition=Ready";
        let wait = ["-n", NAMESPACE, "wait", "pod", pod, ready, "--timeout=60s"];
        kubectl.run(&wait).await?;
        Ok(())
    }

    /// Makes a service with `replicas` servers behind it, or changes it. Waits for nothing.
    pub async fn make_service(
        &self,
        cluster: &str,
        name: &str,
        replicas: u32,
        annotations: &[(&str, &str)],
    ) -> anyhow::Result<()> {
        let manifest = service_manifest(cluster, name, replicas, annotations)?;
        self.kubectl(cluster).apply(&manifest).await?;
        Ok(())
    }

    /// The node that a pod runs on.
    pub async fn node_of(&self, cluster: &str, pod: &str) -> anyhow::Result<String> {
        self.kubectl(cluster)
            .value(NAMESPACE, &format!("pod/{pod}"), "{.spec.nodeName}")
            .await
    }

    /// The cluster IP of a service; `index` 0 is its first family.
    pub async fn cluster_ip(
        &self,
        cluster: &str,
        service: &str,
        index: usize,
    ) -> anyhow::Result<std::net::IpAddr> {
        let path = format!("{{.spec.clusterIPs[{index}]}}");
        let ip = self
            .kubectl(cluster)
            .value(NAMESPACE, &format!("service/{service}"), &path)
            .await?;
        ip.parse()
            .with_context(|| format!("cluster IP {index} of {service} in {cluster} is {ip:?}"))
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Ok(status) = program("isthmus").and_then(|isthmus| {
                Ok(Command::new(isthmus)
                    .args(["sandbox", "status", "--name", &self.name])
                    .output()?)
            })
        {
            eprintln!(
                "the sandbox when the test failed:\n{}",
                String::from_utf8_lossy(&status.stdout)
            );
            self.print_log_tails();
        }
        if let Err(error) = run("isthmus", &["sandbox", "down", "--name", &self.name]) {
            eprintln!("the sandbox {} is not removed: {error:#}", self.name);
        }
    }
}

impl Sandbox {
    fn print_log_tails(&self) {
        for component in self.client.plan().components() {
            let text = std::fs::read_to_string(&component.log).unwrap_or_default();
            let lines: Vec<_> = text.lines().collect();
            eprintln!("-- {} (last lines)", component.name);
            for line in &lines[lines.len().saturating_sub(15)..] {
                eprintln!("{line}");
            }
        }
    }
}

/// Annotations of a service that spans the clusters.
pub const GLOBAL: &[(&str, &str)] = &[("service.cilium.io/global", "true")];

/// Namespace of the tests' objects.
pub const NAMESPACE: &str = "test";

/// A service with `annotations`, `replicas` servers behind it, in the tests' namespace. Dual-stack, TCP and UDP port 80.
fn service_manifest(
    cluster: &str,
    name: &str,
    replicas: u32,
    annotations: &[(&str, &str)],
) -> anyhow::Result<String> {
    let annotations: String = annotations
        .iter()
        .map(|(key, value)| format!("\n    {key}: \"{value}\""))
        .collect();
    let program = program("isthmus")?;
    let program = program.display();
    Ok(format!(
        r#"apiVersion: v1
kind: Namespace
metadata:
  name: {NAMESPACE}
---
apiVersion: v1
kind: Service
metadata:
  name: {name}
  namespace: {NAMESPACE}
  annotations:
    test: "true"{annotations}
spec:
  ipFamilyPolicy: PreferDualStack
  selector:
    app: {name}
  ports:
  - {{name: http, port: 80, targetPort: 8080}}
  - {{name: ask, port: 80, targetPort: 8080, protocol: UDP}}
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {name}
  namespace: {NAMESPACE}
spec:
  replicas: {replicas}
  selector:
    matchLabels: {{app: {name}}}
  template:
    metadata:
      labels: {{app: {name}}}
    spec:
      terminationGracePeriodSeconds: 10
      containers:
      - name: server
        image: unused
        command: ["{program}", "sandbox", "workload", "serve", "--port", "8080"]
        env:
        - {{name: CLUSTER, value: {cluster}}}
        - name: POD_NAME
          valueFrom: {{fieldRef: {{fieldPath: metadata.name}}}}
        readinessProbe:
          tcpSocket: {{port: 8080}}
          periodSeconds: 1
"#
    ))
}

/// A pod that only waits to be used; `node` binds it.
fn client_manifest(name: &str, node: Option<&str>) -> String {
    let node = node
        .map(|node| format!("\n  nodeName: {node}"))
        .unwrap_or_default();
    format!(
        r#"apiVersion: v1
kind: Namespace
metadata:
  name: {NAMESPACE}
---
apiVersion: v1
kind: Pod
metadata:
  name: {name}
  namespace: {NAMESPACE}
spec:{node}
  terminationGracePeriodSeconds: 1
  containers:
  - name: client
    image: unused
    command: ["sleep", "86400"]
"#
    )
}

/// A program of the same build as this test, or of `ISTHMUS_BIN_DIR`.
pub fn program(name: &str) -> anyhow::Result<PathBuf> {
    let folder = match std::env::var_os("ISTHMUS_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => {
            let test = std::env::current_exe().context("where am I")?;
            // target/<profile>/deps/<test>
            test.parent()
                .and_then(Path::parent)
                .context("the test has no build folder")?
                .to_owned()
        }
    };
    let path = folder.join(name);
    ensure!(
        path.exists(),
        "{} is missing: run `cargo build --workspace --bins` first",
        path.display()
    );
    path.canonicalize()
        .with_context(|| format!("cannot resolve {}", path.display()))
}

/// Runs a program of the build; the error carries what it printed.
pub fn run(name: &str, args: &[&str]) -> anyhow::Result<String> {
    let output = Command::new(program(name)?)
        .args(args)
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    let (stdout, stderr) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    if !output.status.success() {
        bail!("{name} {args:?} ended with {}: {stdout}{stderr}", output.status);
    }
    Ok(stdout.into_owned())
}

/// Asks until the answer is `Ok`; after [`PATIENCE`] returns the last error.
pub async fn eventually<T, F: AsyncFnMut() -> anyhow::Result<T>>(
    what: &str,
    mut ask: F,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask().await {
            Ok(answer) => return Ok(answer),
            Err(error) if Instant::now() >= deadline => {
                return Err(error.context(format!("{what} did not come true within {PATIENCE:?}")));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}
