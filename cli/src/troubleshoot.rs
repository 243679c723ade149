//! Finds the remote clusters' files and tries each.
//!
//! In: the directory that the API server reads. Out: findings for each cluster, in the order of their names.

use anyhow::{Context, bail};
use isthmus_kvstore::{Finding, troubleshoot};
use isthmus_model::ClusterName;

use crate::args::TroubleshootArgs;

/// What was found about one remote cluster.
#[derive(Debug)]
pub struct Report {
    /// Its name, which is its file's.
    pub cluster: ClusterName,
    /// In the order of the steps.
    pub findings: Vec<Finding>,
}

/// Tries all clusters that `args` names, at once.
pub async fn run(args: &TroubleshootArgs) -> anyhow::Result<Vec<Report>> {
    let directory = &args.clustermesh_config;
    let named = args
        .clusters
        .iter()
        .map(|name| ClusterName::new(name).with_context(|| format!("{name:?} is no name of a cluster")));
    let mut clusters = named.collect::<anyhow::Result<Vec<_>>>()?;
    if clusters.is_empty() {
        let entries = std::fs::read_dir(directory).with_context(|| {
            format!(
                "cannot read {}; name the directory of the API server with --clustermesh-config",
                directory.display()
            )
        })?;
        for entry in entries {
            let entry = entry?;
            // As the API server tells them from keys and certificates.
            let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
            let name = ClusterName::new(&entry.file_name().to_string_lossy()).ok();
            clusters.extend(name.filter(|_| text.contains("endpoints:")));
        }
        if clusters.is_empty() {
            bail!(
                "{} has no file of a remote cluster: one that is named like a cluster and has `endpoints:`",
                directory.display()
            );
        }
    }
    clusters.sort();
    clusters.dedup();
    let patience = args.step_duration;
    let reports = clusters.into_iter().map(|cluster| {
        let path = directory.join(cluster.as_str());
        tokio::spawn(async move {
            let findings = troubleshoot(&cluster, &path, patience).await;
            Report { cluster, findings }
        })
    });
    let mut done = Vec::new();
    for report in reports.collect::<Vec<_>>() {
        done.push(report.await?);
    }
    Ok(done)
}
