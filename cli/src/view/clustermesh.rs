//! `isthmus clustermesh status`: every remote cluster, how far it is read, and what of it was refused; every replica of the
//! own cluster's API server.

use std::{collections::BTreeMap, fmt::Write};

use isthmus_proto::agent::{ClusterMeshStatusResponse, RemoteCluster, Replica};
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
    replicas: Vec<ReplicaView<'a>>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ReplicaView<'a> {
    endpoint: &'a str,
    address: &'a str,
    /// Empty if it answers.
    error: &'a str,
    round_trip_ms: u64,
    version: &'a str,
    /// Unix milliseconds; 0 if unknown.
    started_ms: u64,
    revision: i64,
    remotes: u64,
    remotes_connected: u64,
    remotes_ready: u64,
    watches: u64,
    streams: u64,
    keys: u64,
    bytes: u64,
}

impl<'a> From<&'a Replica> for ReplicaView<'a> {
    fn from(replica: &'a Replica) -> Self {
        Self {
            endpoint: &replica.endpoint,
            address: &replica.address,
            error: &replica.error,
            round_trip_ms: replica.round_trip_ms,
            version: &replica.version,
            started_ms: replica.started_ms,
            revision: replica.revision,
            remotes: replica.remotes,
            remotes_connected: replica.remotes_connected,
            remotes_ready: replica.remotes_ready,
            watches: replica.watches,
            streams: replica.streams,
            keys: replica.keys,
            bytes: replica.bytes,
        }
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ProgressView {
    received: u64,
    expected: u64,
    keys_per_second: u64,
    bytes_per_second: u64,
    /// Null if it is not known.
    left_ms: Option<u64>,
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
    phase: &'a str,
    progress: ProgressView,
    /// Unix milliseconds; 0 unless the phase is stale.
    stale_since_ms: u64,
    last_error: &'a str,
    /// Failures in a row.
    retries: u64,
    /// Unix milliseconds; 0 while a connection stands.
    next_retry_ms: u64,
    bytes: u64,
    restricted: bool,
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
            phase: &cluster.phase,
            progress: ProgressView {
                received: cluster.received,
                expected: cluster.expected,
                keys_per_second: cluster.keys_per_second,
                bytes_per_second: cluster.bytes_per_second,
                left_ms: cluster.left_ms,
            },
            stale_since_ms: cluster.stale_since_ms,
            last_error: &cluster.last_error,
            retries: cluster.retries,
            next_retry_ms: cluster.next_retry_ms,
            bytes: cluster.bytes,
            restricted: cluster.restricted,
        }
    }
}

/// How much is read, and the time left.
fn progress(cluster: &RemoteCluster) -> String {
    if cluster.expected == 0 {
        return String::new();
    }
    // Rounded down: all is read when it is, not a little before.
    let percent = u128::from(cluster.received) * 100 / u128::from(cluster.expected);
    match cluster.left_ms {
        Some(left) if left > 0 => format!("{percent}%, {} left", age(left.div_ceil(1_000) * 1_000)),
        _ => format!("{percent}%"),
    }
}

/// Lines for who waits: one in all, and one for each remote cluster that is not ready.
pub fn waiting(response: &ClusterMeshStatusResponse) -> Vec<String> {
    let late: Vec<_> = response
        .clusters
        .iter()
        .filter(|cluster| !cluster.ready)
        .collect();
    let total = response.clusters.len();
    let mut lines = vec![match total {
        0 => "waiting for a remote cluster".to_owned(),
        _ => format!("{}/{total} remote clusters ready", total - late.len()),
    }];
    lines.extend(late.into_iter().map(|cluster| {
        let counts = match cluster.expected {
            0 => String::new(),
            expected => format!(
                ", {} of {expected} entries, {}",
                cluster.received,
                progress(cluster)
            ),
        };
        let status = match cluster.status.as_str() {
            "" => String::new(),
            status => format!(": {status}"),
        };
        one_line(&format!("  {}: {}{counts}{status}", cluster.name, cluster.phase))
    }));
    lines
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
            replicas: response.replicas.iter().map(ReplicaView::from).collect(),
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
        "PHASE",
        "PROGRESS",
        "NODES",
        "ENDPOINTS",
        "IDENTITIES",
        "SERVICES",
        "HEARTBEAT",
        "REFUSED",
    ];
    let wide = format == Format::Wide;
    if wide {
        headings.extend([
            "SLICES",
            "RESTRICTED",
            "BYTES",
            "FAILURES",
            "LAST-FAILURE",
            "NEXT-TRY",
        ]);
    }
    let numbers = [
        "ID",
        "NODES",
        "ENDPOINTS",
        "IDENTITIES",
        "SERVICES",
        "REFUSED",
        "BYTES",
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
            cluster.phase.clone(),
            progress(cluster),
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
                yes_no(cluster.restricted).into(),
                cluster.bytes.to_string(),
                cluster.num_failures.to_string(),
                last,
                match cluster.next_retry_ms {
                    0 => String::new(),
                    at if at <= now_ms => "now".into(),
                    at => format!("in {}", age(at - now_ms)),
                },
            ]);
        }
        columns.row(row);
    }
    text += &columns.finish(
        "No remote cluster is known. They come from the files in the API server's --clustermesh-config.",
    );
    for cluster in &response.clusters {
        describe(&mut text, cluster, now_ms);
    }
    replicas(&mut text, &response.replicas, now_ms);
    text
}

/// The replicas of the own cluster's API server.
fn replicas(text: &mut String, replicas: &[Replica], now_ms: u64) {
    if replicas.is_empty() {
        return;
    }
    let answering = replicas.iter().filter(|replica| replica.error.is_empty()).count();
    let _ = writeln!(
        text,
        "\nAPI server of this cluster: {answering}/{} replicas answer\n",
        replicas.len()
    );
    let headings = [
        "ADDRESS",
        "VERSION",
        "UP",
        "REVISION",
        "REMOTES-READY",
        "CONNECTED",
        "WATCHES",
        "STREAMS",
        "KEYS",
        "ANSWERED-IN",
        "STATUS",
    ];
    let mut columns = Columns::new(&headings, &["REVISION", "WATCHES", "STREAMS", "KEYS"]);
    for replica in replicas {
        let address = match replica.address.as_str() {
            "" => replica.endpoint.clone(),
            address => address.to_owned(),
        };
        if !replica.error.is_empty() {
            let mut row = vec![String::new(); headings.len()];
            row[0] = address;
            row[headings.len() - 1].clone_from(&replica.error);
            columns.row(row);
            continue;
        }
        // Another server than Isthmus' says nothing of these.
        let ours = replica.started_ms != 0;
        let known = |cell: String| if ours { cell } else { String::new() };
        columns.row([
            address,
            replica.version.clone(),
            known(age(now_ms.saturating_sub(replica.started_ms).max(1))),
            replica.revision.to_string(),
            known(format!("{}/{}", replica.remotes_ready, replica.remotes)),
            known(format!("{}/{}", replica.remotes_connected, replica.remotes)),
            known(replica.watches.to_string()),
            known(replica.streams.to_string()),
            known(replica.keys.to_string()),
            age(replica.round_trip_ms.max(1)),
            "ok".to_owned(),
        ]);
    }
    text.push_str(&columns.finish(""));
}

/// What needs more words than a cell has.
fn describe(text: &mut String, cluster: &RemoteCluster, now_ms: u64) {
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
    if cluster.stale_since_ms != 0 {
        let since = age(now_ms.saturating_sub(cluster.stale_since_ms).max(1));
        let _ = writeln!(text, "  stale for {since}; what is known of it stays in use");
    }
    if cluster.retries > 0 && !cluster.last_error.is_empty() {
        let next = match cluster.next_retry_ms.checked_sub(now_ms) {
            None | Some(0) => "now".to_owned(),
            Some(left) => format!("in {}", age(left)),
        };
        let ago = age(now_ms.saturating_sub(cluster.last_failure_ms).max(1));
        let _ = writeln!(
            text,
            "  tried {} times in vain, last {ago} ago, next {next}: {}",
            cluster.retries,
            one_line(&cluster.last_error)
        );
    }
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
            replicas: vec![
                Replica {
                    endpoint: "https://mesh:2379".into(),
                    address: "10.0.0.1:2379".into(),
                    version: "0.1.0".into(),
                    started_ms: 1_000_000,
                    revision: 77,
                    remotes: 2,
                    remotes_connected: 2,
                    remotes_ready: 1,
                    watches: 12,
                    streams: 3,
                    keys: 400,
                    round_trip_ms: 4,
                    ..Replica::default()
                },
                Replica {
                    endpoint: "https://mesh:2379".into(),
                    address: "10.0.0.2:2379".into(),
                    error: "connection refused".into(),
                    ..Replica::default()
                },
            ],
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
                    phase: "synced".into(),
                    received: 51,
                    expected: 51,
                    left_ms: Some(0),
                    ..RemoteCluster::default()
                },
                RemoteCluster {
                    name: "north".into(),
                    status: "certificate has expired".into(),
                    num_failures: 7,
                    last_failure_ms: 1_000_000,
                    phase: "stale".into(),
                    received: 399,
                    expected: 1_000,
                    left_ms: Some(12_300),
                    stale_since_ms: 990_000,
                    last_error: "certificate has expired".into(),
                    retries: 3,
                    next_retry_ms: 1_091_500,
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

CLUSTER   ID   READY   CONNECTED   PHASE    PROGRESS        NODES   ENDPOINTS   IDENTITIES   SERVICES   HEARTBEAT   REFUSED
west       2   yes     yes         synced   100%                2          40            9          5   12s               0
north      -   no      no          stale    39%, 13s left       0           0            0          0   -                 3

north: certificate has expired
  stale for 1m40s; what is known of it stays in use
  tried 3 times in vain, last 1m30s ago, next in 1.5s: certificate has expired
  refused: 1 too-long, 2 wrong-cluster
    cilium/state/nodes/v1/north/n1: wrong cluster [2J

API server of this cluster: 1/2 replicas answer

ADDRESS         VERSION   UP      REVISION   REMOTES-READY   CONNECTED   WATCHES   STREAMS   KEYS   ANSWERED-IN   STATUS
10.0.0.1:2379   0.1.0     1m30s         77   1/2             2/2              12         3    400   4ms           ok
10.0.0.2:2379   -         -              -   -               -                 -         -      -   -             connection refused
";
        assert_eq!(render(&response(), Format::Table, 1_090_000), want);
        assert!(!all_ready(&response()));
    }

    #[test]
    fn wide_tells_of_failures() {
        let text = render(&response(), Format::Wide, 1_090_000);
        let line = text.lines().find(|line| line.starts_with("north")).unwrap();
        assert!(line.ends_with("7   1m30s ago      in 1.5s"), "{line}");
    }

    #[test]
    fn who_waits_sees_how_far_it_is() {
        assert_eq!(
            waiting(&response()),
            [
                "1/2 remote clusters ready",
                "  north: stale, 399 of 1000 entries, 39%, 13s left: certificate has expired"
            ]
        );
        assert_eq!(
            waiting(&ClusterMeshStatusResponse::default()),
            ["waiting for a remote cluster"]
        );
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
        assert_eq!(value["clusters"][1]["progress"]["leftMs"], 12_300);
        assert_eq!(value["clusters"][1]["phase"], "stale");
        assert_eq!(value["replicas"][1]["error"], "connection refused");
    }
}
