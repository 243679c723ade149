//! The scheduler: binds pods to nodes.
//!
//! A node takes pods when it is ready, not cordoned, and has the labels of the pod's node selector. Among those the one
//! with the fewest pods of the same controller wins, then the one with the fewest pods, then the first by name: equal
//! pods spread in turn. Resources, taints and affinity play no part.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::{Controller, ignore_gone, pods};
use crate::api::Client;
use crate::error::ApiError;
use crate::meta;
use crate::rules::Part;
use crate::store::{Event, EventKind};

/// See the module's header.
pub struct Scheduler;

/// A pod's place.
#[derive(Debug, PartialEq)]
pub struct Binding {
    /// Namespace of the pod.
    pub namespace: String,
    /// The pod.
    pub pod: String,
    /// Where it goes; none when no node takes it.
    pub node: Option<String>,
}

/// Whether a node has the labels of a node selector.
pub fn selector_fits(selector: &Value, node: &Value) -> bool {
    let wanted = selector.as_object().into_iter().flatten();
    wanted
        .into_iter()
        .all(|(key, value)| meta::label(node, key) == value.as_str())
}

fn takes_pods(node: &Value) -> bool {
    meta::condition_is_true(node, "Ready")
        && !meta::bool_at(node, &["spec", "unschedulable"])
        && !meta::is_terminating(node)
}

fn is_pending(pod: &Value) -> bool {
    pods::node_of(pod).is_empty()
        && pods::is_active(pod)
        && meta::str_at(pod, &["spec", "schedulerName"]) == "default-scheduler"
        && meta::list_at(pod, &["spec", "schedulingGates"]).is_empty()
}

/// Decides where the pending ones of `all` pods go.
pub fn plan(all: &[&Value], nodes: &[&Value]) -> Vec<Binding> {
    let owner = |pod: &Value| {
        meta::controller_of(pod)
            .map_or("", |o| meta::str_at(o, &["uid"]))
            .to_owned()
    };
    let mut pods_on: BTreeMap<String, usize> = BTreeMap::new();
    let mut of_owner: BTreeMap<(String, String), usize> = BTreeMap::new();
    for pod in all
        .iter()
        .filter(|pod| !pods::node_of(pod).is_empty() && pods::is_active(pod))
    {
        let node = pods::node_of(pod).to_owned();
        *of_owner.entry((owner(pod), node.clone())).or_default() += 1;
        *pods_on.entry(node).or_default() += 1;
    }
    let open: Vec<&Value> = nodes.iter().copied().filter(|node| takes_pods(node)).collect();
    let mut bindings = Vec::new();
    for pod in all.iter().filter(|pod| is_pending(pod)) {
        let selector = &pod["spec"]["nodeSelector"];
        let owner = owner(pod);
        let best = open
            .iter()
            .filter(|node| selector_fits(selector, node))
            .map(|node| meta::name(node).to_owned())
            .min_by_key(|node| {
                let same = of_owner.get(&(owner.clone(), node.clone())).copied().unwrap_or(0);
                (same, pods_on.get(node).copied().unwrap_or(0), node.clone())
            });
        if let Some(node) = &best {
            *of_owner.entry((owner, node.clone())).or_default() += 1;
            *pods_on.entry(node.clone()).or_default() += 1;
        }
        bindings.push(Binding {
            namespace: meta::namespace(pod).to_owned(),
            pod: meta::name(pod).to_owned(),
            node: best,
        });
    }
    bindings
}

impl Controller for Scheduler {
    /// One round looks at all pending pods.
    type Key = ();
    const NAME: &'static str = "scheduler";
    const RESOURCES: &'static [&'static str] = &["nodes", "pods"];

    fn all(&mut self, _client: &Client) -> BTreeSet<()> {
        BTreeSet::from([()])
    }

    fn affected(&mut self, _client: &Client, event: &Event, keys: &mut BTreeSet<()>) {
        let object = event.object.value();
        let concerns = match event.key.resource.as_str() {
            "pods" => event.kind == EventKind::Added && is_pending(object),
            // Heartbeats change nothing here.
            _ => {
                let before = event.previous.as_ref().map(|o| o.value());
                let same_labels =
                    before.is_some_and(|b| b["metadata"]["labels"] == object["metadata"]["labels"]);
                event.kind != EventKind::Deleted
                    && takes_pods(object)
                    && !(same_labels && before.is_some_and(takes_pods))
            }
        };
        if concerns {
            keys.insert(());
        }
    }

    fn reconcile(&mut self, client: &Client, (): &()) -> Result<(), ApiError> {
        let (all, nodes) = (client.all("pods", None), client.all("nodes", None));
        let all: Vec<&Value> = all.iter().map(|pod| pod.value()).collect();
        let nodes: Vec<&Value> = nodes.iter().map(|node| node.value()).collect();
        let now = crate::api::now();
        for binding in plan(&all, &nodes) {
            let bind = client.modify("pods", &binding.namespace, &binding.pod, Part::Whole, |pod| {
                if !is_pending(pod) {
                    return;
                }
                match &binding.node {
                    Some(node) => {
                        pod["spec"]["nodeName"] = json!(node);
                        meta::set_condition(pod, "PodScheduled", "True", "", "", now);
                    }
                    None => {
                        let message = format!("0/{} nodes are available.", nodes.len());
                        meta::set_condition(pod, "PodScheduled", "False", "Unschedulable", &message, now);
                    }
                }
            });
            ignore_gone(bind)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, ready: &str, extra: Value) -> Value {
        let mut node = json!({
            "metadata": {"name": name, "labels": {"zone": name}},
            "spec": {},
            "status": {"conditions": [{"type": "Ready", "status": ready}]},
        });
        json_patch::merge(&mut node, &extra);
        node
    }

    fn pod(name: &str, spec: Value) -> Value {
        let mut pod = json!({"metadata": {"name": name, "namespace": "ns"}, "spec": {"schedulerName": "default-scheduler"}});
        json_patch::merge(&mut pod["spec"], &spec);
        pod
    }

    fn nodes_of(pods: &[Value], nodes: &[Value]) -> Vec<Option<String>> {
        let (pods, nodes): (Vec<&Value>, Vec<&Value>) = (pods.iter().collect(), nodes.iter().collect());
        plan(&pods, &nodes).into_iter().map(|b| b.node).collect()
    }

    #[test]
    fn pods_spread_over_nodes_that_take_them() {
        let nodes = [
            node("a", "True", json!({})),
            node("b", "True", json!({})),
            node("c", "False", json!({})),
            node("d", "True", json!({"spec": {"unschedulable": true}})),
        ];
        let some = |text: &str| Some(text.to_owned());
        let pods: Vec<Value> = (0..4).map(|i| pod(&i.to_string(), json!({}))).collect();
        assert_eq!(
            nodes_of(&pods, &nodes),
            [some("a"), some("b"), some("a"), some("b")]
        );
        assert_eq!(
            nodes_of(&[pod("x", json!({"nodeSelector": {"zone": "b"}}))], &nodes),
            [some("b")]
        );
        assert_eq!(
            nodes_of(&[pod("x", json!({"nodeSelector": {"zone": "z"}}))], &nodes),
            [None]
        );
        assert_eq!(nodes_of(&[pod("x", json!({"nodeName": "c"}))], &nodes), []);
    }
}
