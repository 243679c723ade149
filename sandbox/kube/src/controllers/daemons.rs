//! DaemonSets: a pod on each node that the template's node selector fits.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{Controller, Name, ignore_gone, pods, scheduler};
use crate::api::Client;
use crate::error::ApiError;
use crate::meta;
use crate::rules::{DeleteOptions, Part};
use crate::store::{Event, EventKind};

const RESOURCE: &str = "daemonsets.apps";
const HASH: &str = "controller-revision-hash";

/// See the module's header.
pub struct DaemonSets;

/// What a round does.
#[derive(Debug, PartialEq)]
pub struct Plan {
    /// Nodes that get a pod.
    pub create: Vec<String>,
    /// Pods that go.
    pub delete: Vec<String>,
    /// The status.
    pub status: Value,
}

/// Decides a round for a DaemonSet, all nodes, and the pods that it controls.
pub fn plan(set: &Value, nodes: &[&Value], controlled: &[&Value]) -> Plan {
    let hash = pods::template_hash(&set["spec"]["template"]);
    let selector = &set["spec"]["template"]["spec"]["nodeSelector"];
    let eligible: BTreeSet<&str> = nodes
        .iter()
        .filter(|node| scheduler::selector_fits(selector, node))
        .map(|node| meta::name(node))
        .collect();
    let is_current = |pod: &Value| meta::label(pod, HASH) == Some(&hash);
    let (mut covered, mut delete, mut outdated) = (BTreeSet::new(), Vec::new(), Vec::new());
    let (mut ready, mut updated) = (0, 0);
    for pod in controlled
        .iter()
        .copied()
        .filter(|pod| !meta::is_terminating(pod))
    {
        let node = pods::node_of(pod);
        if pods::is_over(pod) || !eligible.contains(node) || !covered.insert(node) {
            delete.push(meta::name(pod).to_owned());
            continue;
        }
        ready += usize::from(pods::is_ready(pod));
        if is_current(pod) {
            updated += 1;
        } else {
            outdated.push((pods::is_ready(pod), meta::name(pod)));
        }
    }
    // One pod at a time moves to a new template; those that are not ready move at once.
    let all_ready = ready == eligible.len();
    outdated.sort();
    let moved = outdated.iter().filter(|(is_ready, _)| !is_ready || all_ready);
    let limit = if all_ready { 1 } else { outdated.len() };
    delete.extend(moved.take(limit).map(|(_, name)| (*name).to_owned()));
    let terminating: BTreeSet<&str> = controlled
        .iter()
        .filter(|pod| meta::is_terminating(pod))
        .map(|pod| pods::node_of(pod))
        .collect();
    let missing = eligible
        .iter()
        .filter(|node| !covered.contains(*node) && !terminating.contains(*node));
    Plan {
        create: missing.map(|node| (*node).to_owned()).collect(),
        delete,
        status: json!({
            "observedGeneration": meta::generation(set),
            "currentNumberScheduled": covered.len(),
            "desiredNumberScheduled": eligible.len(),
            "numberMisscheduled": 0,
            "numberReady": ready,
            "numberAvailable": ready,
            "numberUnavailable": eligible.len() - ready.min(eligible.len()),
            "updatedNumberScheduled": updated,
        }),
    }
}

impl Controller for DaemonSets {
    type Key = Name;
    const NAME: &'static str = "daemon sets";
    const RESOURCES: &'static [&'static str] = &[RESOURCE, "nodes", "pods"];

    fn all(&mut self, client: &Client) -> BTreeSet<Name> {
        let key = |o: &Value| (meta::namespace(o).to_owned(), meta::name(o).to_owned());
        client
            .all(RESOURCE, None)
            .iter()
            .map(|set| key(set.value()))
            .collect()
    }

    fn affected(&mut self, client: &Client, event: &Event, keys: &mut BTreeSet<Name>) {
        match event.key.resource.as_str() {
            RESOURCE => {
                keys.insert((event.key.namespace.clone(), event.key.name.clone()));
            }
            "nodes" => {
                let labels = |o: &Value| o["metadata"]["labels"].clone();
                let before = event.previous.as_ref().map(|o| labels(o.value()));
                if event.kind != EventKind::Modified || before != Some(labels(event.object.value())) {
                    keys.extend(self.all(client));
                }
            }
            _ => {
                if let Some(owner) = meta::controller_of(event.object.value())
                    && meta::str_at(owner, &["kind"]) == "DaemonSet"
                {
                    keys.insert((
                        event.key.namespace.clone(),
                        meta::str_at(owner, &["name"]).to_owned(),
                    ));
                }
            }
        }
    }

    fn reconcile(&mut self, client: &Client, (namespace, name): &Name) -> Result<(), ApiError> {
        let Some(set) = client.find(RESOURCE, namespace, name) else {
            return Ok(());
        };
        let set = set.value();
        if meta::is_terminating(set) {
            return Ok(());
        }
        let (all, nodes) = (client.all("pods", Some(namespace)), client.all("nodes", None));
        let uid = meta::uid(set);
        let controlled: Vec<&Value> = all
            .iter()
            .map(|pod| pod.value())
            .filter(|pod| meta::is_controlled_by(pod, uid))
            .collect();
        let nodes: Vec<&Value> = nodes.iter().map(|node| node.value()).collect();
        let plan = plan(set, &nodes, &controlled);
        let hash = pods::template_hash(&set["spec"]["template"]);
        for node in &plan.create {
            let mut pod = pods::from_template(&set["spec"]["template"], set, "DaemonSet");
            pod["spec"]["nodeName"] = json!(node);
            meta::map_mut(meta::map_mut_value(&mut pod, "metadata"), "labels")
                .insert(HASH.into(), json!(hash));
            client.create("pods", namespace, pod)?;
        }
        for pod in &plan.delete {
            ignore_gone(client.delete("pods", namespace, pod, &DeleteOptions::default()))?;
        }
        ignore_gone(client.modify(RESOURCE, namespace, name, Part::Status, |set| {
            set["status"] = plan.status
        }))
    }
}
