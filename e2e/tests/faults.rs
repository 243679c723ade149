//! What may go away goes away, under load: no request fails because of it, and the state is exact afterwards.

use std::net::SocketAddr;

use anyhow::{Context, ensure};
use isthmus_e2e::{GLOBAL, NAMESPACE, PATIENCE, Sandbox, eventually, program};
use isthmus_sandbox::load::{Load, Style, Tally};

#[tokio::test(flavor = "multi_thread")]
async fn nothing_fails_when_a_part_goes_away() -> anyhow::Result<()> {
    let sandbox = Sandbox::up("e2e-faults", 2, 1).await?;
    for cluster in ["east", "west"] {
        sandbox.make_client(cluster, "client", None).await?;
        sandbox.make_service(cluster, "hello", 2, GLOBAL).await?;
    }
    let target = SocketAddr::new(sandbox.cluster_ip("west", "hello", 0).await?, 80);
    let asker = sandbox.asker("west", "client");
    let program = program("isthmus")?;
    let start = |style| Load::start(sandbox.client(), &program, &asker, target, style, 100);
    let load = start(Style::Connections).await?;
    let kept = start(Style::Kept).await?;
    load.until(100, PATIENCE, "answers from both", |t| {
        t.failed == 0 && t.by_cluster.len() == 2
    })
    .await?;
    kept.until(20, PATIENCE, "an open connection", |t| t.failed == 0)
        .await?;
    let (mark, kept_mark) = (load.mark(), kept.mark());

    component_faults(&sandbox, &load).await?;
    etcd_emptied(&sandbox, &load).await?;
    etcd_compacted(&sandbox, &load).await?;
    // The open connection may be to a pod that the next step deletes: then its end is no fault.
    let open = Tally::of(&kept.since(kept_mark));
    stale_backends_go_after_the_agent_was_away(&sandbox, &load).await?;

    let new = Tally::of(&load.since(mark));
    ensure!(
        new.failed == 0,
        "{} of {} new connections failed: {:?}",
        new.failed,
        new.requests,
        new.errors
    );
    ensure!(
        open.failed == 0,
        "{} of {} requests on an open connection failed: {:?}",
        open.failed,
        open.requests,
        open.errors
    );
    load.stop().await?;
    kept.stop().await?;
    Ok(())
}

/// After each fault: both clusters answer, and a change made in the other cluster arrives.
async fn exact(sandbox: &Sandbox, load: &Load, what: &str) -> anyhow::Result<()> {
    sandbox
        .client()
        .wait_ready(PATIENCE)
        .await
        .with_context(|| format!("after {what}"))?;
    for replicas in ["3", "2"] {
        let scale = [
            "-n",
            NAMESPACE,
            "scale",
            "deployment",
            "hello",
            &format!("--replicas={replicas}"),
        ];
        sandbox.kubectl("east").run(&scale).await?;
        let wanted: usize = replicas.parse::<usize>()? + 2;
        eventually(&format!("{wanted} backends after {what}"), async || {
            let shown = backends(sandbox).await?;
            ensure!(
                shown == wanted,
                "the map has {shown} backends of test/hello, {wanted} expected"
            );
            Ok(())
        })
        .await?;
    }
    load.until(100, PATIENCE, &format!("answers from both after {what}"), |t| {
        t.failed == 0 && t.by_cluster.len() == 2
    })
    .await?;
    Ok(())
}

/// Backends of the service in west's BPF maps, IPv4 TCP.
async fn backends(sandbox: &Sandbox) -> anyhow::Result<usize> {
    let frontend = format!("{}:80", sandbox.cluster_ip("west", "hello", 0).await?);
    let shown = sandbox.isthmus_json("west-1", &["bpf", "lb", "list"]).await?;
    let list = shown.as_array().context("bpf lb list is no array")?;
    let ours = list
        .iter()
        .find(|entry| entry["address"] == frontend.as_str() && entry["protocol"] == "TCP");
    let backends = ours.with_context(|| format!("no frontend {frontend} in {shown}"))?["slots"].as_array();
    Ok(backends.context("no list of slots")?.len())
}

async fn component_faults(sandbox: &Sandbox, load: &Load) -> anyhow::Result<()> {
    let client = sandbox.client();
    for component in [
        "east/etcd",
        "west/etcd",
        "east/apiserver",
        "west/apiserver",
        "east/operator",
        "west/operator",
        "west-1/agent",
        "east-1/agent",
    ] {
        client.kill9(component).await?;
        load.next(50, PATIENCE).await?;
        exact(sandbox, load, &format!("kill -9 of {component}")).await?;
    }
    for component in ["east/apiserver", "west/apiserver", "east/etcd"] {
        client.pause(component).await?;
        // Longer than any keep-alive would take to give up is not needed: the point is that nothing is dropped meanwhile.
        load.next(300, PATIENCE).await?;
        client.resume(component).await?;
        exact(sandbox, load, &format!("SIGSTOP of {component}")).await?;
    }
    client.restart("west/operator").await?;
    exact(sandbox, load, "a restart of west/operator").await
}

async fn etcd_emptied(sandbox: &Sandbox, load: &Load) -> anyhow::Result<()> {
    let mut etcd = sandbox.etcd("east").await?;
    let everything = etcd_client::DeleteOptions::new().with_all_keys();
    etcd.delete("", Some(everything))
        .await
        .context("cannot empty east's etcd")?;
    exact(sandbox, load, "east's etcd was emptied").await
}

async fn etcd_compacted(sandbox: &Sandbox, load: &Load) -> anyhow::Result<()> {
    let client = sandbox.client();
    client.pause("east/apiserver").await?;
    let mut etcd = sandbox.etcd("east").await?;
    let put = etcd.put("isthmus-test/compaction", "1", None).await?;
    let revision = put.header().context("no header")?.revision();
    etcd.compact(revision, None).await.context("cannot compact")?;
    client.resume("east/apiserver").await?;
    client.kill9("east/apiserver").await?;
    exact(sandbox, load, "east's etcd was compacted under its watcher").await
}

/// Anchors G, rows 5 and 19: kill the agent, delete backends in the peer meanwhile, start it: nothing stale is left.
async fn stale_backends_go_after_the_agent_was_away(sandbox: &Sandbox, load: &Load) -> anyhow::Result<()> {
    let client = sandbox.client();
    client.stop("west-1/agent").await?;
    sandbox
        .kubectl("east")
        .run(&["-n", NAMESPACE, "scale", "deployment", "hello", "--replicas=1"])
        .await?;
    // The deleted one goes on answering for its grace period, so the frozen maps still work; start within it.
    client.start("west-1/agent").await?;
    client.wait_ready(PATIENCE).await?;
    eventually("exactly the living backends", async || {
        let shown = backends(sandbox).await?;
        ensure!(shown == 3, "{shown} backends, 3 expected");
        Ok(())
    })
    .await?;
    sandbox
        .kubectl("east")
        .run(&["-n", NAMESPACE, "scale", "deployment", "hello", "--replicas=2"])
        .await?;
    exact(sandbox, load, "the agent was away").await
}
