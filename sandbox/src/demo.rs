//! The demo: a global service in two clusters, and everything that is supposed to happen to it.
//!
//! In: a running sandbox with at least two clusters. Out: narration on standard output, a table, and one JSON line. Every
//! sentence of the narration rests on requests that a client pod made; an expectation that fails ends the demo with an error.
//! It uses kubectl for what a user does with kubectl, and the sandbox's control socket for accidents.

mod manifests;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, ensure};
use comfy_table::{Table, presets};
use serde::Serialize;
use tokio::time::Instant;

use crate::{
    SandboxClient,
    kubectl::Kubectl,
    load::{Asker, Load, Style, Tally},
    workload::Answer,
};
use manifests::{CLIENT, NAMESPACE, REPLICAS, SERVICE};

/// How long anything may take to become true. Far above what it takes, so that only failures reach it.
const PATIENCE: Duration = Duration::from_secs(60);
/// Requests a second of each client.
const RATE: u32 = 200;
/// Requests a second while servers crash: how finely the failover is seen.
const CRASH_RATE: u32 = 1000;
/// A failover that takes longer has failed, in milliseconds.
const FAILOVER_MAX_MS: f64 = 1000.0;

/// The demo's last line.
#[derive(Clone, Debug, Default, Serialize)]
struct Report {
    demo: &'static str,
    requests: u64,
    failed_drain: u64,
    failed_kill: u64,
    failover_ms: f64,
    failed_agent_restart: u64,
    ok: bool,
}

/// One line of the table.
struct Step {
    what: &'static str,
    tally: Tally,
    verdict: String,
}

/// Everything the steps need.
struct Stage<'s> {
    sandbox: &'s SandboxClient,
    program: PathBuf,
    near: Side,
    far: Side,
    begun: Instant,
    steps: Vec<Step>,
    report: Report,
}

/// One cluster of the demo. The client that is watched runs in the *near* one.
struct Side {
    cluster: String,
    client_agent: String,
    kubectl: Kubectl,
    frontend: SocketAddr,
}

/// Runs the demo on `sandbox`. `program` is the `isthmus` binary, which carries the demo's server and client.
pub async fn run(sandbox: &SandboxClient, program: &Path) -> anyhow::Result<()> {
    let begun = Instant::now();
    let (near, far) = set_up(sandbox, program, begun).await?;
    let report = Report {
        demo: "global-service-failover",
        ..Report::default()
    };
    let program = program.to_owned();
    let mut stage = Stage {
        sandbox,
        program,
        near,
        far,
        begun,
        steps: vec![],
        report,
    };
    let outcome = stage.play().await;
    stage.report.ok = outcome.is_ok();
    stage.print_table();
    println!("{}", serde_json::to_string(&stage.report)?);
    outcome
}

/// Applies the manifests to the first two clusters and waits for them. The near side is the second cluster.
async fn set_up(sandbox: &SandboxClient, program: &Path, begun: Instant) -> anyhow::Result<(Side, Side)> {
    let status = sandbox.status().await?;
    let [first, second, ..] = &status.clusters[..] else {
        anyhow::bail!(
            "the demo needs two clusters; this sandbox has {}",
            status.clusters.len()
        );
    };
    let side = async |cluster: &str| {
        let kubectl = Kubectl::new(&status.kubeconfig, cluster);
        say(
            begun,
            &format!("{cluster}: kubectl apply: service {SERVICE} (global), {REPLICAS} servers, a client"),
        );
        kubectl.apply(&manifests::manifests(cluster, program)).await?;
        kubectl
            .run(&[
                "-n",
                NAMESPACE,
                "rollout",
                "status",
                "deployment",
                SERVICE,
                "--timeout",
                "60s",
            ])
            .await?;
        kubectl
            .run(&[
                "-n",
                NAMESPACE,
                "wait",
                "pod",
                CLIENT,
                "--for=condition=Ready",
                "--timeout=60s",
            ])
            .await?;
        let ip = kubectl
            .value(NAMESPACE, &format!("service/{SERVICE}"), "{.spec.clusterIP}")
            .await?;
        let node = kubectl
            .value(NAMESPACE, &format!("pod/{CLIENT}"), "{.spec.nodeName}")
            .await?;
        say(
            begun,
            &format!("{cluster}: {SERVICE} has the cluster IP {ip}; the client runs on node {node}"),
        );
        anyhow::Ok(Side {
            frontend: SocketAddr::new(ip.parse().with_context(|| format!("cluster IP {ip:?}"))?, 80),
            client_agent: format!("{node}/agent"),
            cluster: cluster.to_owned(),
            kubectl,
        })
    };
    let far = side(&first.name).await?;
    Ok((side(&second.name).await?, far))
}

fn both(tally: &Tally) -> bool {
    tally.failed == 0 && tally.by_cluster.len() == 2
}

impl Stage<'_> {
    async fn play(&mut self) -> anyhow::Result<()> {
        self.both_answer().await?;
        self.shared_false().await?;
        self.affinity_local().await?;
        self.drain().await?;
        self.kill().await?;
        self.lose_api_server().await?;
        self.restart_agent().await
    }

    async fn both_answer(&mut self) -> anyhow::Result<()> {
        self.say("1. One name, two clusters: who answers a client of each?");
        let targets = [&self.near, &self.far].map(|side| (side.cluster.clone(), side.frontend));
        for (cluster, target) in targets {
            let load = self.load(&cluster, target, Style::Connections, RATE).await?;
            let tally = load
                .until(200, PATIENCE, "answers from both clusters", both)
                .await?;
            self.say(&format!("   a client in {cluster}: {}", shares(&tally)));
            self.count(&load.stop().await?);
            self.step("both clusters answer", tally, "both");
        }
        let load = self.near_load(Style::Datagrams).await?;
        let tally = load
            .until(200, PATIENCE, "datagrams answered by both clusters", both)
            .await?;
        self.count(&load.stop().await?);
        self.say(&format!("   the same over UDP: {}", shares(&tally)));
        self.step("both answer on UDP", tally, "both");
        Ok(())
    }

    async fn shared_false(&mut self) -> anyhow::Result<()> {
        self.say(&format!(
            "2. {} keeps its servers to itself: service.cilium.io/shared: \"false\"",
            self.far.cluster
        ));
        self.annotated(&self.far, "service.cilium.io/shared", "false")
            .await
            .map(|(all, tally)| {
                self.count(&all);
                self.step("shared: false", tally, "own only");
            })
    }

    async fn affinity_local(&mut self) -> anyhow::Result<()> {
        self.say(&format!(
            "3. {} prefers its own: service.cilium.io/affinity: local",
            self.near.cluster
        ));
        self.annotated(&self.near, "service.cilium.io/affinity", "local")
            .await
            .map(|(all, tally)| {
                self.count(&all);
                self.step("affinity: local", tally, "own only");
            })
    }

    /// Sets an annotation, waits until only the near cluster answers, removes it, waits until both do; nothing may fail.
    async fn annotated(&self, side: &Side, key: &str, value: &str) -> anyhow::Result<(Vec<Answer>, Tally)> {
        let annotate = async |change: String| {
            let args = [
                "-n",
                NAMESPACE,
                "annotate",
                "--overwrite",
                "service",
                SERVICE,
                &change,
            ];
            side.kubectl.run(&args).await
        };
        let load = self.near_load(Style::Connections).await?;
        load.next(50, PATIENCE).await?;
        annotate(format!("{key}={value}")).await?;
        let near = self.near.cluster.as_str();
        let only_near = |tally: &Tally| tally.failed == 0 && tally.clusters() == [near];
        let tally = load
            .until(200, PATIENCE, "answers from the own cluster only", only_near)
            .await?;
        self.say(&format!("   a client in {near}: {}", shares(&tally)));
        annotate(format!("{key}-")).await?;
        load.until(200, PATIENCE, "answers from both clusters again", both)
            .await?;
        let all = load.stop().await?;
        let errors = Tally::of(&all).errors;
        ensure!(
            errors.is_empty(),
            "requests failed while {key} changed: {errors:?}"
        );
        Ok((all, tally))
    }

    async fn drain(&mut self) -> anyhow::Result<()> {
        let near = &self.near.cluster;
        self.say(&format!(
            "4. Drain: {near} scales its servers to 0 while its client goes on"
        ));
        let load = self.near_load(Style::Connections).await?;
        load.next(100, PATIENCE).await?;
        let mark = load.mark();
        self.scale(&self.near, 0).await?;
        let far = self.far.cluster.as_str();
        load.until(200, PATIENCE, "answers from the other cluster only", |t| {
            t.clusters() == [far]
        })
        .await?;
        let gone = [
            "-n",
            NAMESPACE,
            "wait",
            "pod",
            "-l",
            "app=hello",
            "--for=delete",
            "--timeout=60s",
        ];
        self.near.kubectl.run(&gone).await?;
        let after = Tally::of(&load.next(200, PATIENCE).await?);
        let tally = Tally::of(&load.since(mark));
        self.say(&format!(
            "   {} requests, {} failed; now {}",
            tally.requests,
            tally.failed,
            shares(&after)
        ));
        self.scale(&self.near, REPLICAS).await?;
        load.until(200, PATIENCE, "answers from both clusters again", both)
            .await?;
        let all = load.stop().await?;
        self.count(&all);
        self.report.failed_drain = tally.failed;
        ensure!(
            tally.failed == 0,
            "requests failed during the drain: {:?}",
            tally.errors
        );
        self.step("drain", tally, "0 failed");
        Ok(())
    }

    async fn kill(&mut self) -> anyhow::Result<()> {
        let near = self.near.cluster.clone();
        self.say(&format!("5. Crash: kill -9 of every server in {near} at once"));
        let load = self
            .load(&near, self.near.frontend, Style::Connections, CRASH_RATE)
            .await?;
        load.next(500, PATIENCE).await?;
        let names = "jsonpath={.items[*].metadata.name}";
        let pods = ["-n", NAMESPACE, "get", "pods", "-l", "app=hello", "-o", names];
        let mut cgroups = vec![];
        for pod in self.near.kubectl.run(&pods).await?.split_whitespace() {
            cgroups.push(self.sandbox.pod(&near, NAMESPACE, pod).await?.pod_cgroup());
        }
        ensure!(!cgroups.is_empty(), "no servers to kill in {near}");
        let before = self.restarts().await?;
        let mark = load.mark();
        let killed_us = now_us();
        for cgroup in &cgroups {
            crate::cgroup::kill(cgroup).with_context(|| format!("cannot kill {}", cgroup.display()))?;
        }
        load.until(100, PATIENCE, "answers without failures after the crash", |t| {
            t.failed == 0
        })
        .await?;
        let tally = Tally::of(&load.since(mark));
        let last = tally
            .last_failure_us
            .map_or(0, |last| last.saturating_sub(killed_us));
        self.report.failed_kill = tally.failed;
        self.report.failover_ms = (last as f64 / 100.0).round() / 10.0;
        let (failover_ms, far) = (self.report.failover_ms, &self.far.cluster);
        self.say(&format!(
            "   {} requests, {} failed, the last of them {failover_ms:.1} ms after the kill; {far} carries on",
            tally.requests, tally.failed
        ));
        let back = "answers from both clusters again (the kubelet restarts the servers)";
        load.until(200, PATIENCE, back, both).await?;
        let restarted = self.restarts().await? - before;
        ensure!(
            restarted == cgroups.len() as u64,
            "{} servers were killed, {restarted} restarted",
            cgroups.len()
        );
        self.count(&load.stop().await?);
        ensure!(
            failover_ms <= FAILOVER_MAX_MS,
            "failover took {failover_ms} ms, more than {FAILOVER_MAX_MS}: {:?}",
            tally.errors
        );
        self.step(
            "kill -9 of all servers",
            tally,
            &format!("failover {failover_ms:.1} ms"),
        );
        Ok(())
    }

    async fn lose_api_server(&mut self) -> anyhow::Result<()> {
        let far = self.far.cluster.clone();
        self.say(&format!(
            "6. {far} loses its clustermesh API server: known backends stay in use"
        ));
        let load = self.near_load(Style::Connections).await?;
        let server = format!("{far}/apiserver");
        self.sandbox.stop(&server).await?;
        let tally = Tally::of(&load.next(600, PATIENCE).await?);
        self.sandbox.start(&server).await?;
        self.say(&format!("   {}, {} failed", shares(&tally), tally.failed));
        self.sandbox.wait_ready(PATIENCE).await?;
        self.count(&load.stop().await?);
        ensure!(
            tally.failed == 0,
            "requests failed without the remote API server: {:?}",
            tally.errors
        );
        ensure!(
            tally.by_cluster.len() == 2,
            "backends went with the API server: {:?}",
            tally.by_cluster
        );
        self.step("remote API server lost", tally, "both");
        Ok(())
    }

    async fn restart_agent(&mut self) -> anyhow::Result<()> {
        let agent = self.near.client_agent.clone();
        self.say(&format!(
            "7. The client's own {agent} is killed and starts again, under load"
        ));
        let fresh = self.near_load(Style::Connections).await?;
        let kept = self.near_load(Style::Kept).await?;
        fresh.next(100, PATIENCE).await?;
        kept.next(100, PATIENCE).await?;
        self.sandbox.kill9(&agent).await?;
        fresh.next(400, PATIENCE).await?;
        self.sandbox.wait_ready(PATIENCE).await?;
        fresh.next(200, PATIENCE).await?;
        let mut all = fresh.stop().await?;
        let open = kept.stop().await?;
        let (new, established) = (Tally::of(&all), Tally::of(&open));
        all.extend(open);
        self.count(&all);
        let tally = Tally::of(&all);
        self.report.failed_agent_restart = tally.failed;
        self.say(&format!(
            "   {} new connections, {} failed; {} requests on an open one, {} failed",
            new.requests, new.failed, established.requests, established.failed
        ));
        ensure!(
            tally.failed == 0,
            "requests failed during the restart: {:?}",
            tally.errors
        );
        self.step("agent restart", tally, "0 failed");
        Ok(())
    }

    /// How often the near cluster's servers were restarted.
    async fn restarts(&self) -> anyhow::Result<u64> {
        let counts = "jsonpath={.items[*].status.containerStatuses[*].restartCount}";
        let args = ["-n", NAMESPACE, "get", "pods", "-l", "app=hello", "-o", counts];
        let text = self.near.kubectl.run(&args).await?;
        text.split_whitespace()
            .map(|count| count.parse::<u64>().context("restart count"))
            .sum()
    }

    async fn near_load(&self, style: Style) -> anyhow::Result<Load> {
        self.load(&self.near.cluster, self.near.frontend, style, RATE)
            .await
    }

    async fn load(&self, cluster: &str, target: SocketAddr, style: Style, rate: u32) -> anyhow::Result<Load> {
        let (namespace, pod) = (NAMESPACE.to_owned(), CLIENT.to_owned());
        let asker = Asker {
            cluster: cluster.to_owned(),
            namespace,
            pod,
        };
        Load::start(self.sandbox, &self.program, &asker, target, style, rate).await
    }

    async fn scale(&self, side: &Side, replicas: u32) -> anyhow::Result<()> {
        let replicas = format!("--replicas={replicas}");
        side.kubectl
            .run(&["-n", NAMESPACE, "scale", "deployment", SERVICE, &replicas])
            .await
            .map(drop)
    }

    fn count(&mut self, answers: &[Answer]) {
        self.report.requests += answers.len() as u64;
    }

    fn step(&mut self, what: &'static str, tally: Tally, verdict: &str) {
        self.steps.push(Step {
            what,
            tally,
            verdict: verdict.to_owned(),
        });
    }

    fn say(&self, text: &str) {
        say(self.begun, text);
    }

    fn print_table(&self) {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING);
        table.set_header(["STEP", "REQUESTS", "FAILED", "ANSWERED BY", "RESULT"]);
        for step in &self.steps {
            let tally = &step.tally;
            let numbers = [tally.requests.to_string(), tally.failed.to_string()];
            let [requests, failed] = numbers;
            table.add_row([
                step.what.to_owned(),
                requests,
                failed,
                shares(tally),
                step.verdict.clone(),
            ]);
        }
        println!("\n{table}\n");
    }
}

fn say(begun: Instant, text: &str) {
    println!("[{:6.1} s] {text}", begun.elapsed().as_secs_f64());
}

fn shares(tally: &Tally) -> String {
    let answered: u64 = tally.by_cluster.values().sum();
    let share = |(cluster, count): (&String, &u64)| {
        format!(
            "{cluster} {:.1} %",
            *count as f64 * 100.0 / answered.max(1) as f64
        )
    };
    tally.by_cluster.iter().map(share).collect::<Vec<_>>().join(", ")
}

fn now_us() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_micros() as u64)
}
