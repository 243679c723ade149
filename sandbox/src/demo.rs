//! The guided tour: `isthmus sandbox demo`.
//!
//! In: a client of a running sandbox and where to write. The tour uses the sandbox as anyone can: through
//! [`SandboxClient`] and the Kubernetes APIs of its clusters.

use std::io::Write;

use anyhow::Context;

use crate::SandboxClient;

/// Tells what a sandbox is and how to look around in it.
pub async fn run(sandbox: &SandboxClient, out: &mut impl Write) -> anyhow::Result<()> {
    let status = sandbox.status().await?;
    for cluster in &status.clusters {
        let nodes: Vec<&str> = cluster.nodes.iter().map(|node| node.name.as_str()).collect();
        writeln!(
            out,
            "cluster {} (ID {}): nodes {}",
            cluster.name,
            cluster.id,
            nodes.join(", ")
        )
        .context("cannot write")?;
    }
    writeln!(out, "export KUBECONFIG={}", status.kubeconfig.display()).context("cannot write")?;
    let context = status
        .clusters
        .first()
        .map_or("east", |cluster| cluster.name.as_str());
    writeln!(out, "kubectl --context {context} get nodes").context("cannot write")
}
