//! Metrics of the API server: `isthmus_clustermesh_*`.

use isthmus_runtime::Metrics;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
};

/// Label: how something ended.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
pub struct Outcome {
    /// `accepted`, `refused`, `timeout`; `no_rights` beside `accepted`.
    pub outcome: &'static str,
}

/// Label: why.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
pub struct Reason {
    /// One of a few words.
    pub reason: &'static str,
}

/// Labels of a refused request.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
pub struct Throttled {
    /// Which limit.
    pub reason: &'static str,
    /// Whose: `admin`, `local`, `remote`, `none`.
    pub kind: &'static str,
}

/// Label: one of the server's certificates.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
pub struct Certificate {
    /// `server`, `client_ca`.
    pub certificate: &'static str,
}

/// Label: a remote cluster.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
pub struct Target {
    /// Its name.
    pub target_cluster: String,
}

/// Labels of a refused object.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
pub struct Refused {
    /// Remote cluster's name.
    pub target_cluster: String,
    /// `wire::Refusal::reason`.
    pub reason: &'static str,
}

/// Label: a sub-store.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Sub {
    /// Cluster whose state it is.
    pub source_cluster: String,
    /// Kind of objects, or `all` for the own cluster.
    pub kind: &'static str,
}

/// What the server counts.
#[derive(Clone, Debug)]
pub struct ServerMetrics {
    /// Connections by how their handshake ended.
    pub connections: Family<Outcome, Counter>,
    /// Connections that were not let in.
    pub rejected_connections: Family<Reason, Counter>,
    /// Connections that were let in and cut off.
    pub closed_connections: Family<Reason, Counter>,
    /// Open connections; set now and then.
    pub open_connections: Gauge,
    /// Requests refused because of a limit.
    pub throttled: Family<Throttled, Counter>,
    /// Bytes that clients have not read yet; set now and then.
    pub pending_bytes: Gauge,
    /// Seconds until a certificate ends, below 0 after that; set now and then.
    pub certificate_expiry: Family<Certificate, Gauge>,
    /// 0 if the TLS files changed and are not usable.
    pub certificates_usable: Gauge,
    /// Open watch streams.
    pub streams: Gauge,
    /// Open watches.
    pub watches: Gauge,
    /// Events delivered.
    pub events: Counter,
    /// Watches that ended because what they missed is gone.
    pub compacted: Counter,
    /// Range calls.
    pub ranges: Counter,
    /// Watches that the peer's certificate does not allow.
    pub denied: Counter,
    /// Other requests that it does not allow.
    pub denied_requests: Counter,
    /// Bytes written to clients, before TLS.
    pub sent_bytes: Counter,
}

/// What the mirror counts.
#[derive(Clone, Debug)]
pub struct MirrorMetrics {
    /// Configured remote clusters.
    pub remote_clusters: Gauge,
    /// 1 if the remote cluster is connected and fully mirrored.
    pub readiness: Family<Target, Gauge>,
    /// Failed or lost connections.
    pub failures: Family<Target, Counter>,
    /// When the last one was, Unix seconds.
    pub last_failure: Family<Target, Gauge>,
    /// 1 if a connection stands.
    pub connected: Family<Target, Gauge>,
    /// Connections made after one was lost.
    pub reconnects: Family<Target, Counter>,
    /// Seconds since when what is known may be old, 0 if it is not.
    pub staleness: Family<Target, Gauge>,
    /// Seconds since the heartbeat was last seen to change: the lag behind the source.
    pub heartbeat_age: Family<Target, Gauge>,
    /// Entries received of the lists.
    pub list_received: Family<Target, Gauge>,
    /// Entries that the lists have.
    pub list_expected: Family<Target, Gauge>,
    /// Seconds until all is received; -1 if that is not known.
    pub list_left: Family<Target, Gauge>,
    /// Entries that are mirrored.
    pub remote_keys: Family<Target, Gauge>,
    /// Their bytes.
    pub remote_bytes: Family<Target, Gauge>,
    /// Objects refused.
    pub refused: Family<Refused, Counter>,
}

/// What the store holds; set now and then.
#[derive(Clone, Debug)]
pub struct StoreMetrics {
    /// Source's revision.
    pub revision: Family<Sub, Gauge>,
    /// Keys.
    pub keys: Family<Sub, Gauge>,
    /// Bytes of keys and values.
    pub bytes: Family<Sub, Gauge>,
    /// Batches in the history.
    pub history_len: Family<Sub, Gauge>,
    /// Bytes in the history.
    pub history_bytes: Family<Sub, Gauge>,
}

impl ServerMetrics {
    /// Registers them.
    pub fn new(metrics: &Metrics) -> Self {
        Self {
            connections: metrics.register(
                "server_connections",
                "Connections, by how their handshake ended",
                Family::default(),
            ),
            rejected_connections: metrics.register(
                "apiserver_rejected_connections",
                "Connections that were not let in, by reason",
                Family::default(),
            ),
            closed_connections: metrics.register(
                "apiserver_closed_connections",
                "Connections that were let in and cut off, by reason",
                Family::default(),
            ),
            open_connections: metrics.register(
                "apiserver_open_connections",
                "Open connections",
                Gauge::default(),
            ),
            throttled: metrics.register(
                "apiserver_throttled_requests",
                "Requests refused because of a limit, by limit and kind of client",
                Family::default(),
            ),
            pending_bytes: metrics.register(
                "apiserver_pending_bytes",
                "Bytes that clients have not read yet",
                Gauge::default(),
            ),
            certificate_expiry: metrics.register(
                "apiserver_certificate_expiry_seconds",
                "Seconds until a certificate of the server's files ends",
                Family::default(),
            ),
            certificates_usable: metrics.register(
                "apiserver_certificates_usable",
                "0 if the TLS files changed and are not usable, so that the last good ones are in use",
                Gauge::default(),
            ),
            streams: metrics.register("server_watch_streams", "Open watch streams", Gauge::default()),
            watches: metrics.register("server_watches", "Open watches", Gauge::default()),
            events: metrics.register("server_events", "Events delivered to watches", Counter::default()),
            compacted: metrics.register(
                "server_watches_compacted",
                "Watches that ended because what they missed is gone",
                Counter::default(),
            ),
            ranges: metrics.register("server_ranges", "Range calls", Counter::default()),
            denied: metrics.register(
                "server_watches_denied",
                "Watches outside the peer's key ranges",
                Counter::default(),
            ),
            denied_requests: metrics.register(
                "server_requests_denied",
                "Requests other than watches outside the peer's rights",
                Counter::default(),
            ),
            sent_bytes: metrics.register(
                "server_sent_bytes",
                "Bytes written to clients, before TLS",
                Counter::default(),
            ),
        }
    }
}

impl MirrorMetrics {
    /// Registers them.
    pub fn new(metrics: &Metrics) -> Self {
        Self {
            remote_clusters: metrics.register(
                "remote_clusters",
                "Configured remote clusters",
                Gauge::default(),
            ),
            readiness: metrics.register(
                "remote_cluster_readiness",
                "1 if the remote cluster is connected and fully mirrored",
                Family::default(),
            ),
            failures: metrics.register(
                "remote_cluster_failures",
                "Failed or lost connections to the remote cluster",
                Family::default(),
            ),
            last_failure: metrics.register(
                "remote_cluster_last_failure_timestamp_seconds",
                "When the connection to the remote cluster last failed",
                Family::default(),
            ),
            connected: metrics.register(
                "remote_cluster_connected",
                "1 if a connection to the remote cluster stands",
                Family::default(),
            ),
            reconnects: metrics.register(
                "remote_cluster_reconnects",
                "Connections to the remote cluster made after one was lost",
                Family::default(),
            ),
            staleness: metrics.register(
                "remote_cluster_staleness_seconds",
                "How long what is known of the remote cluster may have been old, 0 if it is not",
                Family::default(),
            ),
            heartbeat_age: metrics.register(
                "remote_cluster_heartbeat_age_seconds",
                "Age of the remote cluster's last heartbeat, -1 if none was seen",
                Family::default(),
            ),
            list_received: metrics.register(
                "remote_cluster_list_received_entries",
                "Entries received of the remote cluster's lists",
                Family::default(),
            ),
            list_expected: metrics.register(
                "remote_cluster_list_expected_entries",
                "Entries that the remote cluster's lists have",
                Family::default(),
            ),
            list_left: metrics.register(
                "remote_cluster_list_left_seconds",
                "Time until the remote cluster is read in full, -1 if it is not known",
                Family::default(),
            ),
            remote_keys: metrics.register(
                "remote_cluster_keys",
                "Keys that are mirrored of the remote cluster",
                Family::default(),
            ),
            remote_bytes: metrics.register(
                "remote_cluster_bytes",
                "Bytes that are mirrored of the remote cluster",
                Family::default(),
            ),
            refused: metrics.register(
                "refused_objects",
                "Objects of the remote cluster that were refused, by reason",
                Family::default(),
            ),
        }
    }

    /// Drops what is known about a removed remote cluster, except counters of refusals.
    pub fn forget(&self, cluster: &str) {
        let target = Target {
            target_cluster: cluster.to_owned(),
        };
        for gauges in [
            &self.readiness,
            &self.last_failure,
            &self.connected,
            &self.staleness,
            &self.heartbeat_age,
            &self.list_received,
            &self.list_expected,
            &self.list_left,
            &self.remote_keys,
            &self.remote_bytes,
        ] {
            gauges.remove(&target);
        }
        self.failures.remove(&target);
        self.reconnects.remove(&target);
    }
}

impl StoreMetrics {
    /// Registers them.
    pub fn new(metrics: &Metrics) -> Self {
        Self {
            revision: metrics.register("store_revision", "Revision of a source", Family::default()),
            keys: metrics.register("store_keys", "Keys of a source", Family::default()),
            bytes: metrics.register(
                "store_bytes",
                "Bytes of a source's keys and values, as they are kept",
                Family::default(),
            ),
            history_len: metrics.register(
                "store_history_batches",
                "Batches of changes kept of a source",
                Family::default(),
            ),
            history_bytes: metrics.register(
                "store_history_bytes",
                "Bytes of changes kept of a source",
                Family::default(),
            ),
        }
    }
}

/// What the embedded store counts.
#[derive(Clone, Debug)]
pub struct EmbeddedMetrics {
    /// Changes written.
    pub writes: Counter,
    /// Times that the disk was waited for; below the calls when these come in bursts.
    pub flushes: Counter,
    /// Keys' newest revision.
    pub revision: Gauge,
    /// Revision before which the past is forgotten.
    pub compacted: Gauge,
    /// Bytes of the file,
    pub file_bytes: Gauge,
    /// and of what is in it.
    pub used_bytes: Gauge,
    /// 1 if writes are refused for lack of room.
    pub space_exceeded: Gauge,
    /// Times that the file was written anew.
    pub rewrites: Counter,
    /// Times that the disk did not take a write.
    pub disk_failures: Counter,
}

impl EmbeddedMetrics {
    /// Registers them.
    pub fn new(metrics: &Metrics) -> Self {
        Self {
            writes: metrics.register(
                "embedded_writes",
                "Changes written to the embedded store",
                Counter::default(),
            ),
            flushes: metrics.register(
                "embedded_flushes",
                "Times that the embedded store waited for the disk",
                Counter::default(),
            ),
            revision: metrics.register(
                "embedded_revision",
                "Revision of the embedded store",
                Gauge::default(),
            ),
            compacted: metrics.register(
                "embedded_compacted_revision",
                "Revision before which the embedded store knows nothing",
                Gauge::default(),
            ),
            file_bytes: metrics.register(
                "embedded_file_bytes",
                "Bytes of the embedded store's file",
                Gauge::default(),
            ),
            used_bytes: metrics.register(
                "embedded_used_bytes",
                "Bytes that the embedded store holds, which its quota bounds",
                Gauge::default(),
            ),
            space_exceeded: metrics.register(
                "embedded_space_exceeded",
                "1 if the embedded store refuses writes for lack of room",
                Gauge::default(),
            ),
            rewrites: metrics.register(
                "embedded_file_rewrites",
                "Times that the embedded store's file was written anew to make it smaller",
                Counter::default(),
            ),
            disk_failures: metrics.register(
                "embedded_disk_failures",
                "Times that the disk did not take a write of the embedded store",
                Counter::default(),
            ),
        }
    }
}
