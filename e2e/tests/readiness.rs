//! A node that joins: it says ready only when the view of the other clusters is in its maps, so that the first pod on it
//! reaches services that live elsewhere only.

use std::{net::SocketAddr, process::Command};

use anyhow::{Context, ensure};
use isthmus_e2e::{GLOBAL, NAMESPACE, PATIENCE, Sandbox, eventually, program};
use isthmus_sandbox::load::{Load, Style, Tally};

#[tokio::test(flavor = "multi_thread")]
async fn the_first_pod_of_a_new_node_reaches_remote_only_services() -> anyhow::Result<()> {
    let sandbox = Sandbox::up("e2e-join", 2, 2).await?;
    sandbox.make_service("east", "far", 2, GLOBAL).await?;
    // The same service here, without a single server.
    sandbox.make_service("west", "far", 0, GLOBAL).await?;
    let target = SocketAddr::new(sandbox.cluster_ip("west", "far", 0).await?, 80);
    let rollout = [
        "-n",
        NAMESPACE,
        "rollout",
        "status",
        "deployment",
        "far",
        "--timeout",
        "60s",
    ];
    sandbox.kubectl("east").run(&rollout).await?;
    eventually("a node that was there before knows them", async || {
        let list = sandbox.isthmus("west-1", &["service", "list"]).await?;
        ensure!(
            list.lines().filter(|line| line.contains("east")).count() >= 4,
            "{list}"
        );
        Ok(())
    })
    .await?;
    for round in 0..3 {
        forget_node(&sandbox, "west-2").await?;
        sandbox.client().start("west-2/agent").await?;
        // The kubelet starts the pod as soon as the CNI plugin says that the node is ready, and not before.
        let pod = format!("first-{round}");
        sandbox.make_client("west", &pod, Some("west-2")).await?;
        let asker = sandbox.asker("west", &pod);
        let load = Load::start(
            sandbox.client(),
            &program("isthmus")?,
            &asker,
            target,
            Style::Connections,
            200,
        )
        .await?;
        let tally = Tally::of(&load.next(200, PATIENCE).await?);
        load.stop().await?;
        ensure!(
            tally.failed == 0 && tally.clusters() == ["east"],
            "round {round}: {tally:?}"
        );
        sandbox
            .kubectl("west")
            .run(&["-n", NAMESPACE, "delete", "pod", &pod])
            .await?;
    }
    Ok(())
}

/// Stops the node's agent and removes everything that it left in the kernel: the next one starts on a new node.
async fn forget_node(sandbox: &Sandbox, node: &str) -> anyhow::Result<()> {
    let agent = format!("{node}/agent");
    sandbox.client().stop(&agent).await?;
    let plan = sandbox.client().plan();
    let cleanup = plan
        .components()
        .into_iter()
        .find(|component| component.name == agent)
        .context("no agent")?;
    let netns = &plan
        .nodes()
        .find(|candidate| candidate.name == node)
        .context("no node")?
        .netns;
    let output = Command::new("nsenter")
        .arg(format!("--net=/run/netns/{netns}"))
        .arg(program("isthmus-agent")?)
        .args(cleanup.args.iter())
        .arg("cleanup")
        .output()
        .context("cannot run nsenter")?;
    ensure!(
        output.status.success(),
        "cleanup: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let maps = plan.bpf_root(node).join("isthmus/maps");
    ensure!(!maps.exists(), "{} is still there", maps.display());
    eventually("the agent is down", async || {
        let status = sandbox.client().status().await?;
        let component = status
            .components
            .iter()
            .find(|component| component.name == agent)
            .context("no agent")?;
        ensure!(component.pid.is_none(), "{component:?}");
        Ok(())
    })
    .await
}
