//! Pods that nobody will ever end: those on nodes that are gone.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{Controller, ignore_gone, pods};
use crate::api::Client;
use crate::error::ApiError;
use crate::meta;
use crate::rules::DeleteOptions;
use crate::store::{Event, EventKind};

/// See the module's header.
pub struct PodGc;

/// The pods whose node does not exist, of those that were on `node`.
fn orphans<'a>(all: &[&'a Value], node: &str, exists: bool) -> Vec<&'a Value> {
    all.iter()
        .copied()
        .filter(|pod| !exists && pods::node_of(pod) == node)
        .collect()
}

impl Controller for PodGc {
    /// A node.
    type Key = String;
    const NAME: &'static str = "pod garbage collection";
    const RESOURCES: &'static [&'static str] = &["nodes"];

    fn all(&mut self, client: &Client) -> BTreeSet<String> {
        let all = client.all("pods", None);
        all.iter()
            .map(|pod| pods::node_of(pod.value()).to_owned())
            .filter(|node| !node.is_empty())
            .collect()
    }

    fn affected(&mut self, _client: &Client, event: &Event, keys: &mut BTreeSet<String>) {
        if event.kind == EventKind::Deleted {
            keys.insert(event.key.name.clone());
        }
    }

    fn reconcile(&mut self, client: &Client, node: &String) -> Result<(), ApiError> {
        let exists = client.find("nodes", "", node).is_some();
        let all = client.all("pods", None);
        let all: Vec<&Value> = all.iter().map(|pod| pod.value()).collect();
        for pod in orphans(&all, node, exists) {
            let options = DeleteOptions {
                grace_period_seconds: Some(0),
                ..DeleteOptions::default()
            };
            ignore_gone(client.delete("pods", meta::namespace(pod), meta::name(pod), &options))?;
        }
        Ok(())
    }
}
