//! Clusters without an etcd: their API servers keep the state. A global service answers from both, and an API server that is
//! killed under load costs no request and no written change.

use std::net::SocketAddr;

use anyhow::{Context, ensure};
use etcd_client::{Certificate, Client, ConnectOptions, GetOptions, Identity, TlsOptions};
use isthmus_e2e::{GLOBAL, NAMESPACE, PATIENCE, Sandbox, eventually, program};
use isthmus_sandbox::load::{Load, Style, Tally};

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_api_server_with_an_embedded_store_loses_nothing() -> anyhow::Result<()> {
    let sandbox = Sandbox::up_with("e2e-embedded", 2, 1, &["--store", "embedded"]).await?;
    let components = sandbox.client().plan().components();
    let etcds = components.iter().filter(|part| part.name.ends_with("/etcd"));
    ensure!(etcds.count() == 0, "an etcd runs");
    for cluster in ["east", "west"] {
        sandbox.make_client(cluster, "client", None).await?;
        sandbox.make_service(cluster, "hello", 2, GLOBAL).await?;
    }
    let target = SocketAddr::new(sandbox.cluster_ip("west", "hello", 0).await?, 80);
    let asker = sandbox.asker("west", "client");
    let program = program("isthmus")?;
    let load = Load::start(
        sandbox.client(),
        &program,
        &asker,
        target,
        Style::Connections,
        100,
    )
    .await?;
    load.until(100, PATIENCE, "answers from both", |t| {
        t.failed == 0 && t.by_cluster.len() == 2
    })
    .await?;
    let mark = load.mark();

    for (component, cluster) in [
        ("east/apiserver", "east"),
        ("west/apiserver", "west"),
        ("east/operator", "east"),
        ("east/apiserver", "east"),
    ] {
        let before = stored(&sandbox, cluster).await?;
        sandbox.client().kill9(component).await?;
        // A change that happens meanwhile: it is published when both are there again.
        scale(&sandbox, 3).await?;
        load.next(50, PATIENCE).await?;
        exact(&sandbox, 3, component).await?;
        let after = stored(&sandbox, cluster).await?;
        ensure!(
            after.history == before.history,
            "after kill -9 of {component} the store has another history"
        );
        ensure!(
            after.revision >= before.revision,
            "after kill -9 of {component} the store went back from revision {} to {}",
            before.revision,
            after.revision
        );
        scale(&sandbox, 2).await?;
        exact(&sandbox, 2, component).await?;
    }

    let tally = Tally::of(&load.since(mark));
    ensure!(
        tally.failed == 0,
        "{} of {} requests failed: {:?}",
        tally.failed,
        tally.requests,
        tally.errors
    );
    load.stop().await?;
    Ok(())
}

/// Where a cluster's store stands.
struct Standing {
    history: u64,
    revision: i64,
}

/// Asks the API server as the cluster's administrator.
async fn stored(sandbox: &Sandbox, cluster: &str) -> anyhow::Result<Standing> {
    let plan = sandbox.client().plan();
    let pki = |file: String| {
        let path = plan.pki_dir().join(file);
        std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let tls = TlsOptions::new()
        .ca_certificate(Certificate::from_pem(pki("ca.crt".to_owned())?))
        .identity(Identity::from_pem(
            pki(format!("admin-{cluster}.crt"))?,
            pki(format!("admin-{cluster}.key"))?,
        ));
    let address = plan.cluster(cluster).context("no such cluster")?.apiserver();
    eventually(&format!("the API server of {cluster} answers"), async || {
        let options = ConnectOptions::new().with_tls(tls.clone());
        let mut client = Client::connect([format!("https://{address}")], Some(options)).await?;
        let options = GetOptions::new().with_prefix().with_count_only();
        let answer = client.get("isthmus/state/", Some(options)).await?;
        ensure!(answer.count() > 0, "its store is empty");
        let header = answer.header().context("no header")?;
        Ok(Standing {
            history: header.cluster_id(),
            revision: header.revision(),
        })
    })
    .await
}

async fn scale(sandbox: &Sandbox, replicas: usize) -> anyhow::Result<()> {
    let replicas = format!("--replicas={replicas}");
    let scale = ["-n", NAMESPACE, "scale", "deployment", "hello", &replicas];
    sandbox.kubectl("east").run(&scale).await?;
    Ok(())
}

/// West's BPF maps hold its own two backends and all of east's.
async fn exact(sandbox: &Sandbox, east: usize, killed: &str) -> anyhow::Result<()> {
    let frontend = format!("{}:80", sandbox.cluster_ip("west", "hello", 0).await?);
    eventually(
        &format!("{} backends after kill -9 of {killed}", east + 2),
        async || {
            let shown = sandbox.isthmus_json("west-1", &["bpf", "lb", "list"]).await?;
            let list = shown.as_array().context("bpf lb list is no array")?;
            let ours = list
                .iter()
                .find(|entry| entry["address"] == frontend.as_str() && entry["protocol"] == "TCP");
            let slots = ours.with_context(|| format!("no frontend {frontend} in {shown}"))?["slots"]
                .as_array()
                .context("no list of slots")?
                .len();
            ensure!(slots == east + 2, "the map has {slots} backends of test/hello");
            Ok(())
        },
    )
    .await
}
