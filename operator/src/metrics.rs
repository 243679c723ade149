//! Metrics of the operator: `isthmus_operator_*`.

use std::sync::atomic::{AtomicI64, AtomicU64};

use isthmus_runtime::{
    Metrics,
    metrics::prometheus_client::{
        encoding::EncodeLabelSet,
        metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    },
};

use crate::state::Kind;

/// Label of a watched kind.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
pub struct KindLabel {
    kind: &'static str,
}

impl From<Kind> for KindLabel {
    fn from(kind: Kind) -> Self {
        Self { kind: kind.as_str() }
    }
}

/// Labels of a problem with an object.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
pub struct ProblemLabels {
    /// Kind.
    pub kind: &'static str,
    /// What is wrong.
    pub reason: &'static str,
}

type Number = Gauge<i64, AtomicI64>;
type Total = Counter<u64, AtomicU64>;

/// All metrics. Cheap to clone.
#[derive(Clone, Debug)]
pub struct OperatorMetrics {
    /// Usable objects.
    pub objects: Family<KindLabel, Number>,
    /// Events taken in.
    pub events: Family<KindLabel, Total>,
    /// Problems found.
    pub problems: Family<ProblemLabels, Total>,
    /// Failed lists and watches.
    pub watch_errors: Family<KindLabel, Total>,
    /// Events that wait.
    pub queue: Number,
    /// Identities.
    pub identities: Number,
    /// Pods without an identity because no number is free.
    pub starved: Number,
    /// 1 if this process publishes.
    pub leader: Number,
    /// Changed keys.
    pub changes: Total,
    /// Seconds to work out what changed.
    pub round: Histogram,
    /// Operations written.
    pub etcd_writes: Total,
    /// Failed transactions and lost connections.
    pub etcd_failures: Total,
    /// Keys that differ from what they shall be.
    pub etcd_pending: Number,
    /// Values too large for etcd.
    pub etcd_refused: Number,
    /// 1 if the connection stands.
    pub etcd_connected: Number,
}

impl OperatorMetrics {
    /// Registers all of them.
    pub fn register(metrics: &Metrics) -> Self {
        let buckets = [0.000_01, 0.000_1, 0.001, 0.01, 0.1, 1.0, 10.0];
        Self {
            objects: metrics.register("objects", "Usable Kubernetes objects, by kind", Family::default()),
            events: metrics.register("kube_events", "Watch events taken in, by kind", Family::default()),
            problems: metrics.register(
                "object_problems",
                "Objects, or parts of them, that could not be used, by kind and reason",
                Family::default(),
            ),
            watch_errors: metrics.register(
                "kube_watch_errors",
                "Failed lists and watches, by kind",
                Family::default(),
            ),
            queue: metrics.register(
                "queue_len",
                "Watch events that wait to be taken in",
                Number::default(),
            ),
            identities: metrics.register("identities", "Security identities that exist", Number::default()),
            starved: metrics.register(
                "identities_exhausted_pods",
                "Pods without an identity because no number is free",
                Number::default(),
            ),
            leader: metrics.register(
                "leader",
                "Whether this process publishes (1) or not (0)",
                Number::default(),
            ),
            changes: metrics.register(
                "key_changes",
                "Keys whose desired value changed",
                Total::default(),
            ),
            round: metrics.register(
                "round_seconds",
                "Time to work out which keys changed after a batch of events",
                Histogram::new(buckets),
            ),
            etcd_writes: metrics.register("etcd_writes", "Operations written to etcd", Total::default()),
            etcd_failures: metrics.register(
                "etcd_failures",
                "Failed transactions and lost connections to etcd",
                Total::default(),
            ),
            etcd_pending: metrics.register(
                "etcd_pending_keys",
                "Keys that are known to differ from what they shall be",
                Number::default(),
            ),
            etcd_refused: metrics.register(
                "etcd_refused_keys",
                "Keys not written because their value is too large for etcd",
                Number::default(),
            ),
            etcd_connected: metrics.register(
                "etcd_connected",
                "Whether etcd is connected (1) or not (0)",
                Number::default(),
            ),
        }
    }
}
