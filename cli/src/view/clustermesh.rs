//! `isthmus clustermesh status`: every remote cluster, and what of it was refused.

use std::{collections::BTreeMap, fmt::Write};

use isthmus_proto::agent::{ClusterMeshStatusResponse, RemoteCluster};
use serde::Serialize;

use crate::output::{Columns, Format, age, json, one_line, yes_no};

/// JSON form.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct View<'a> {
    ready: usize,
    total: usize,
    global_services: u32,
    clusters: Vec<ClusterView<'a>>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ClusterView<'a> {
    name: &'a str,
    cluster_id: u32,
    ready: bool,
    connected: bool,
    status: &'a str,
    num_nodes: u64,
    num_endpoints: u64,
    num_identities: u64,
    num_services: u64,
    num_failures: u64,
    /// Unix milliseconds; 0 if there was none.
    last_failure_ms: u64,
    heartbeat_age_ms: u64,
    slices: bool,
    refused: BTreeMap<&'a str, u64>,
    last_refusals: &'a [String],
}

impl<'a> From<&'a RemoteCluster> for ClusterView<'a> {
    fn from(cluster: &'a RemoteCluster) -> Self {
        Self {
            name: &cluster.name,
            cluster_id: cluster.cluster_id,
            ready: cluster.ready,
            connected: cluster.connected,
            status: &cluster.status,
            num_nodes: cluster.num_nodes,
            num_endpoints: cluster.num_endpoints,
            num_identities: cluster.num_identities,
            num_services: cluster.num_services,
            num_failures: cluster.num_failures,
            last_failure_ms: cluster.last_failure_ms,
            heartbeat_age_ms: cluster.heartbeat_age_ms,
            slices: cluster.slices,
            refused: refused(cluster),
            last_refusals: &cluster.last_refusals,
        }
    }
}

fn refused(cluster: &RemoteCluster) -> BTreeMap<&str, u64> {
    cluster
        .refused
        .iter()
        .map(|(reason, count)| (reason.as_str(), *count))
        .collect()
}

/// Whether every remote cluster is ready.
pub fn all_ready(response: &ClusterMeshStatusResponse) -> bool {
    response.clusters.iter().all(|cluster| cluster.ready)
}

/// The text. `now_ms` is Unix milliseconds, for the age of failures.
pub fn render(response: &ClusterMeshStatusResponse, format: Format, now_ms: u64) -> String {
    let total = response.clusters.len();
    let ready = response.clusters.iter().filter(|cluster| cluster.ready).count();
    if format == Format::Json {
        return json(&View {
            ready,
            total,
            global_services: response.global_services,
            clusters: response.clusters.iter().map(ClusterView::from).collect(),
        });
    }
    let services = response.global_services;
    let mut text =
        format!("ClusterMesh: {ready}/{total} remote clusters ready, {services} global services\n\n");
    let mut headings = vec![
        "CLUSTER",
        "ID",
        "READY",
        "CONNECTED",
        "NODES",
        "ENDPOINTS",
        "IDENTITIES",
        "SERVICES",
        "HEARTBEAT",
        "REFUSED",
    ];
    let wide = format == Format::Wide;
    if wide {
        headings.extend(["SLICES", "FAILURES", "LAST-FAILURE"]);
    }
    let numbers = [
        "ID",
        "NODES",
        "ENDPOINTS",
        "IDENTITIES",
        "SERVICES",
        "REFUSED",
        "FAILURES",
    ];
    let mut columns = Columns::new(&headings, &numbers);
    for cluster in &response.clusters {
        let mut row = vec![
            cluster.name.clone(),
            if cluster.cluster_id == 0 {
                String::new()
            } else {
                cluster.cluster_id.to_string()
            },
            yes_no(cluster.ready).into(),
            yes_no(cluster.connected).into(),
            cluster.num_nodes.to_string(),
            cluster.num_endpoints.to_string(),
            cluster.num_identities.to_string(),
            cluster.num_services.to_string(),
            age(cluster.heartbeat_age_ms),
            cluster.refused.values().sum::<u64>().to_string(),
        ];
        if wide {
            let last = match cluster.last_failure_ms {
                0 => String::new(),
                // Clocks may differ a little; a failure is never in the future.
                at => format!("{} ago", age(now_ms.saturating_sub(at).max(1))),
            };
            row.extend([
                yes_no(cluster.slices).into(),
                cluster.num_failures.to_string(),
                last,
            ]);
        }
        columns.row(row);
    }
    text += &columns.finish(
        "No remote cluster is known. They come from the files in the API server's --clustermesh-config.",
    );
    for cluster in &response.clusters {
        describe(&mut text, cluster);
    }
    text
}

/// What needs more words than a cell has.
fn describe(text: &mut String, cluster: &RemoteCluster) {
    if cluster.status.is_empty() && cluster.refused.is_empty() && cluster.last_refusals.is_empty() {
        return;
    }
    // Writing to a String does not fail.
    let status = if cluster.status.is_empty() {
        "well"
    } else {
        &cluster.status
    };
    let _ = writeln!(text, "\n{}: {}", one_line(&cluster.name), one_line(status));
    let reasons: Vec<_> = refused(cluster)
        .into_iter()
        .map(|(reason, count)| format!("{count} {}", one_line(reason)))
        .collect();
    if !reasons.is_empty() {
        let _ = writeln!(text, "  refused: {}", reasons.join(", "));
    }
    for refusal in &cluster.last_refusals {
        let _ = writeln!(text, "    {}", one_line(refusal));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response() -> ClusterMeshStatusResponse {
        ClusterMeshStatusResponse {
            global_services: 5,
            clusters: vec![
                RemoteCluster {
                    name: "west".into(),
                    cluster_id: 2,
                    connected: true,
                    ready: true,
                    num_nodes: 2,
                    num_endpoints: 40,
                    num_identities: 9,
                    num_services: 5,
                    heartbeat_age_ms: 12_000,
                    slices: true,
                    ..RemoteCluster::default()
                },
                RemoteCluster {
                    name: "north".into(),
                    status: "certificate has expired".into(),
                    num_failures: 7,
                    last_failure_ms: 1_000_000,
                    refused: [("wrong-cluster".into(), 2), ("too-long".into(), 1)].into(),
                    last_refusals: vec!["cilium/state/nodes/v1/north/n1: wrong cluster\u{1b}[2J".into()],
                    ..RemoteCluster::default()
                },
            ],
        }
    }

    #[test]
    fn people_see_clusters_and_refusals() {
        let want = "\
ClusterMesh: 1/2 remote clusters ready, 5 global services

CLUSTER   ID   READY   CONNECTED   NODES   ENDPOINTS   IDENTITIES   SERVICES   HEARTBEAT   REFUSED
west       2   yes     yes             2          40            9          5   12s               0
north      -   no      no              0           0            0          0   -                 3

north: certificate has expired
  refused: 1 too-long, 2 wrong-cluster
    cilium/state/nodes/v1/north/n1: wrong cluster [2J
";
        assert_eq!(render(&response(), Format::Table, 0), want);
        assert!(!all_ready(&response()));
    }

    #[test]
    fn wide_tells_of_failures() {
        let text = render(&response(), Format::Wide, 1_090_000);
        let line = text.lines().find(|line| line.starts_with("north")).unwrap();
        assert!(line.ends_with("no              7   1m30s ago"), "{line}");
    }

    #[test]
    fn no_cluster_is_said() {
        let response = ClusterMeshStatusResponse::default();
        assert!(render(&response, Format::Table, 0).contains("--clustermesh-config"));
        assert!(all_ready(&response));
    }

    #[test]
    fn json_has_everything() {
        let value: serde_json::Value = serde_json::from_str(&render(&response(), Format::Json, 0)).unwrap();
        assert_eq!((&value["ready"], &value["total"]), (&1.into(), &2.into()));
        assert_eq!(value["clusters"][1]["refused"]["wrong-cluster"], 2);
        assert_eq!(value["clusters"][0]["heartbeatAgeMs"], 12_000);
    }
}
