//! An open connection to a cluster that is cut off: nobody closes it, and its client would wait for many minutes. It gets an
//! error as soon as the cluster is judged unreachable, and connects anew to the other one.

use std::{net::SocketAddr, process::Stdio, time::Duration};

use anyhow::{Context, bail, ensure};
use isthmus_e2e::{GLOBAL, NAMESPACE, PATIENCE, Sandbox, eventually, program};
use isthmus_sandbox::workload::Answer;
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout},
    time::timeout,
};

/// A client in a pod, with one connection that it keeps. It would wait for two minutes for each answer.
struct Client {
    _child: Child,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Client {
    async fn open(sandbox: &Sandbox, target: SocketAddr) -> anyhow::Result<Self> {
        let client = sandbox.client();
        let mut command = client.exec("east", NAMESPACE, "client").await?;
        command.arg(program("isthmus")?);
        command.args(["sandbox", "workload", "load", "--keep", "--rate", "20"]);
        command.args(["--timeout-ms", "120000", "--target", &target.to_string()]);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("cannot start the client")?;
        let stdout = child.stdout.take().context("the client has no output")?;
        Ok(Self {
            _child: child,
            answers: BufReader::new(stdout).lines(),
        })
    }

    /// The next answer, or failure.
    async fn next(&mut self) -> anyhow::Result<Answer> {
        let line = timeout(PATIENCE, self.answers.next_line())
            .await
            .with_context(|| format!("the client heard nothing for {PATIENCE:?}"))??;
        let line = line.context("the client ended")?;
        serde_json::from_str(&line).with_context(|| format!("the client said {line:?}"))
    }

    /// One whose connection leads to the other cluster.
    async fn of_west(sandbox: &Sandbox, target: SocketAddr) -> anyhow::Result<Self> {
        for _ in 0..100 {
            let mut client = Self::open(sandbox, target).await?;
            let answer = client.next().await?;
            if answer.from.starts_with("west/") {
                return Ok(client);
            }
            ensure!(answer.error.is_empty(), "{answer:?}");
        }
        bail!("of a hundred connections none led to west")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn open_connections_leave_a_cluster_that_is_cut_off() -> anyhow::Result<()> {
    let sandbox = Sandbox::up("e2e-flows", 2, 1).await?;
    for cluster in ["east", "west"] {
        sandbox.make_client(cluster, "client", None).await?;
        sandbox.make_service(cluster, "hello", 1, GLOBAL).await?;
    }
    let target = SocketAddr::new(sandbox.cluster_ip("east", "hello", 0).await?, 80);
    let mut client = eventually("an open connection to west", async || {
        Client::of_west(&sandbox, target).await
    })
    .await?;

    sandbox.client().set_link("west", false).await?;
    let failed = loop {
        let answer = client.next().await?;
        if !answer.error.is_empty() {
            break answer;
        }
        ensure!(answer.from.starts_with("west/"), "{answer:?}");
    };
    // It waited for an answer when the connection was ended under it.
    ensure!(failed.error.contains("abort"), "{failed:?}");
    println!(
        "the open connection ended {:?} after the request that got no answer",
        Duration::from_micros(failed.took_us)
    );
    let next = client.next().await?;
    ensure!(next.from.starts_with("east/"), "{next:?}");
    let status = sandbox.isthmus("east-1", &["status"]).await?;
    ensure!(status.contains("unreachable"), "{status}");
    sandbox.client().set_link("west", true).await?;
    Ok(())
}
