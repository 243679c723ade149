//! ReplicaSets: as many pods as wanted, and a status that counts them.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{Controller, Name, ignore_gone, pods};
use crate::api::Client;
use crate::error::ApiError;
use crate::meta;
use crate::rules::{DeleteOptions, Part};
use crate::store::Event;

const RESOURCE: &str = "replicasets.apps";

/// See the module's header.
pub struct ReplicaSets;

/// What a round does.
#[derive(Debug, PartialEq)]
pub struct Plan {
    /// How many pods are created.
    pub create: usize,
    /// Which pods are deleted.
    pub delete: Vec<String>,
    /// The status.
    pub status: Value,
}

/// Pods that one round creates at most.
const CREATE_MAX: usize = 500;

/// Decides a round for a ReplicaSet and the pods that it controls.
pub fn plan(set: &Value, controlled: &[&Value]) -> Plan {
    let mut active: Vec<&Value> = controlled
        .iter()
        .copied()
        .filter(|pod| pods::is_active(pod))
        .collect();
    let wanted = if meta::is_terminating(set) {
        active.len()
    } else {
        usize::try_from(meta::int_at(set, &["spec", "replicas"]).unwrap_or(1)).unwrap_or(0)
    };
    let ready = active.iter().filter(|pod| pods::is_ready(pod)).count();
    let mut status = json!({
        "observedGeneration": meta::generation(set),
        "replicas": active.len(),
        "fullyLabeledReplicas": active.len(),
    });
    if ready > 0 {
        status["readyReplicas"] = json!(ready);
        status["availableReplicas"] = json!(ready);
    }
    pods::sort_for_removal(&mut active);
    let surplus = active.len().saturating_sub(wanted);
    Plan {
        create: wanted.saturating_sub(active.len()).min(CREATE_MAX),
        delete: active[..surplus]
            .iter()
            .map(|pod| meta::name(pod).to_owned())
            .collect(),
        status,
    }
}

impl Controller for ReplicaSets {
    type Key = Name;
    const NAME: &'static str = "replica sets";
    const RESOURCES: &'static [&'static str] = &[RESOURCE, "pods"];

    fn all(&mut self, client: &Client) -> BTreeSet<Name> {
        let key = |o: &Value| (meta::namespace(o).to_owned(), meta::name(o).to_owned());
        client
            .all(RESOURCE, None)
            .iter()
            .map(|set| key(set.value()))
            .collect()
    }

    fn affected(&mut self, _client: &Client, event: &Event, keys: &mut BTreeSet<Name>) {
        if event.key.resource.as_str() == RESOURCE {
            keys.insert((event.key.namespace.clone(), event.key.name.clone()));
            return;
        }
        if let Some(owner) = meta::controller_of(event.object.value())
            && meta::str_at(owner, &["kind"]) == "ReplicaSet"
        {
            keys.insert((
                event.key.namespace.clone(),
                meta::str_at(owner, &["name"]).to_owned(),
            ));
        }
    }

    fn reconcile(&mut self, client: &Client, (namespace, name): &Name) -> Result<(), ApiError> {
        let Some(set) = client.find(RESOURCE, namespace, name) else {
            return Ok(());
        };
        let set = set.value();
        let all = client.all("pods", Some(namespace));
        let uid = meta::uid(set);
        let controlled: Vec<&Value> = all
            .iter()
            .map(|pod| pod.value())
            .filter(|pod| meta::is_controlled_by(pod, uid))
            .collect();
        let plan = plan(set, &controlled);
        for _ in 0..plan.create {
            let pod = pods::from_template(&set["spec"]["template"], set, "ReplicaSet");
            client.create("pods", namespace, pod)?;
        }
        for pod in &plan.delete {
            ignore_gone(client.delete("pods", namespace, pod, &DeleteOptions::default()))?;
        }
        let write = client.modify(RESOURCE, namespace, name, Part::Status, |set| {
            set["status"] = plan.status
        });
        ignore_gone(write)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, ready: bool, phase: &str) -> Value {
        let status = if ready { "True" } else { "False" };
        json!({
            "metadata": {"name": name},
            "spec": {"nodeName": "n"},
            "status": {"phase": phase, "conditions": [{"type": "Ready", "status": status}]},
        })
    }

    #[test]
    fn surplus_pods_that_are_not_ready_go_first() {
        let set = json!({"spec": {"replicas": 1}});
        let pods = [
            pod("a", true, "Running"),
            pod("b", false, "Running"),
            pod("c", true, "Failed"),
        ];
        let plan = plan(&set, &pods.iter().collect::<Vec<_>>());
        assert_eq!((plan.create, plan.delete), (0, vec!["b".to_owned()]));
        assert_eq!(plan.status["readyReplicas"], 1);
    }

    #[test]
    fn ended_pods_are_replaced() {
        let set = json!({"spec": {"replicas": 2}});
        assert_eq!(plan(&set, &[&pod("a", false, "Failed")]).create, 2);
    }
}
