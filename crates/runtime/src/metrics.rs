//! The registry of metrics, passed down from `main`; names are `isthmus_<subsystem>_<what>_<unit>`.

use std::sync::{Arc, PoisonError, RwLock};

use prometheus_client::registry::{Metric, Registry};

pub use prometheus_client;

/// Shared registry. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<RwLock<Registry>>);

impl Metrics {
    /// A registry whose metrics all begin with `isthmus_<subsystem>_`.
    pub fn new(subsystem: &str) -> Self {
        Self(Arc::new(RwLock::new(Registry::with_prefix(format!(
            "isthmus_{subsystem}"
        )))))
    }

    /// Registers `metric` and hands it back. A counter's name gets `_total` when it is written.
    pub fn register<M: Metric + Clone>(&self, name: &str, help: &str, metric: M) -> M {
        let mut registry = self.0.write().unwrap_or_else(PoisonError::into_inner);
        registry.register(name, help, metric.clone());
        metric
    }

    /// All metrics in the OpenMetrics text format.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        let registry = self.0.read().unwrap_or_else(PoisonError::into_inner);
        // Writing to a String fails only if a metric's own encoder does; what was written so far is still valid lines.
        let _ = prometheus_client::encoding::text::encode(&mut text, &registry);
        text
    }
}
