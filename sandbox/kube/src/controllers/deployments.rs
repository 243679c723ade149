//! Deployments: a ReplicaSet per template, and the move from the old ones to the new one.
//!
//! [`plan`] is pure. Invariants of a rolling update: never more pods than wanted plus `maxSurge`, never fewer available
//! ones than wanted minus `maxUnavailable`, as far as that lies with the deployment.

use std::collections::BTreeSet;

use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::{Controller, Name, ignore_gone, pods};
use crate::api::Client;
use crate::error::ApiError;
use crate::meta;
use crate::rules::{DeleteOptions, Part};
use crate::store::Event;

const RESOURCE: &str = "deployments.apps";
const SETS: &str = "replicasets.apps";
const HASH: &str = "pod-template-hash";
const REVISION: &str = "deployment.kubernetes.io/revision";

/// See the module's header.
pub struct Deployments;

/// What a round does.
#[derive(Debug, Default, PartialEq)]
pub struct Plan {
    /// A ReplicaSet to create.
    pub create: Option<Value>,
    /// ReplicaSets to scale.
    pub scale: Vec<(String, i64)>,
    /// Old ReplicaSets to delete.
    pub delete: Vec<String>,
    /// The revision of the current template, and its ReplicaSet if that has another one.
    pub revision: i64,
    /// The ReplicaSet whose revision has to be set.
    pub revise: Option<String>,
    /// The numbers of the status.
    pub status: Value,
}

fn replicas(set: &Value) -> i64 {
    meta::int_at(set, &["spec", "replicas"]).unwrap_or(0)
}

fn available(set: &Value) -> i64 {
    meta::int_at(set, &["status", "availableReplicas"])
        .unwrap_or(0)
        .min(replicas(set))
}

fn revision(set: &Value) -> i64 {
    meta::annotation(set, REVISION)
        .and_then(|text| text.parse().ok())
        .unwrap_or(0)
}

fn template_without_hash(object: &Value) -> Value {
    let mut template = object["spec"]["template"].clone();
    let metadata = meta::metadata_mut(&mut template);
    metadata.remove("creationTimestamp");
    if let Some(labels) = metadata.get_mut("labels").and_then(Value::as_object_mut) {
        labels.remove(HASH);
    }
    template
}

/// A number, or a percentage of `of`; rounded up or down.
fn resolve(value: Option<&Value>, of: i64, up: bool) -> i64 {
    match value {
        Some(Value::String(text)) => {
            let percent: i64 = text.trim_end_matches('%').parse().unwrap_or(0);
            if up {
                (percent * of + 99) / 100
            } else {
                percent * of / 100
            }
        }
        Some(value) => value.as_i64().unwrap_or(0),
        None => 0,
    }
}

/// Decides a round for a deployment and the ReplicaSets that it controls.
pub fn plan(deployment: &Value, sets: &[&Value]) -> Plan {
    let wanted = meta::int_at(deployment, &["spec", "replicas"])
        .unwrap_or(1)
        .max(0);
    let template = template_without_hash(deployment);
    let new = sets
        .iter()
        .copied()
        .find(|set| template_without_hash(set) == template);
    let old: Vec<&Value> = sets
        .iter()
        .copied()
        .filter(|set| new.is_none_or(|n| meta::uid(n) != meta::uid(set)))
        .collect();
    let newest_old = old.iter().map(|set| revision(set)).max().unwrap_or(0);
    let mut plan = Plan {
        status: counts(deployment, sets, new),
        ..Plan::default()
    };
    plan.revision = match new {
        Some(new) if revision(new) > newest_old => revision(new),
        _ => newest_old + 1,
    };
    if meta::is_terminating(deployment) {
        return plan;
    }
    if let Some(new) = new.filter(|new| revision(new) != plan.revision) {
        plan.revise = Some(meta::name(new).to_owned());
    }
    let paused = meta::bool_at(deployment, &["spec", "paused"]);
    let (new_count, old_counts) = if meta::str_at(deployment, &["spec", "strategy", "type"]) == "Recreate" {
        recreate(wanted, &old)
    } else {
        roll(deployment, wanted, new, &old)
    };
    match new {
        None if paused => {}
        None => plan.create = Some(new_set(deployment, &template, new_count, plan.revision)),
        Some(new) if replicas(new) != new_count => plan.scale.push((meta::name(new).to_owned(), new_count)),
        Some(_) => {}
    }
    if !paused {
        let changed = old
            .iter()
            .zip(&old_counts)
            .filter(|(set, count)| replicas(set) != **count);
        plan.scale
            .extend(changed.map(|(set, count)| (meta::name(set).to_owned(), *count)));
        plan.delete = surplus_history(deployment, &old);
    }
    plan
}

/// All old pods first, then the new ones.
fn recreate(wanted: i64, old: &[&Value]) -> (i64, Vec<i64>) {
    let left = old
        .iter()
        .any(|set| replicas(set) > 0 || meta::int_at(set, &["status", "replicas"]).unwrap_or(0) > 0);
    (if left { 0 } else { wanted }, vec![0; old.len()])
}

/// How many replicas the new set and each old one shall have.
fn roll(deployment: &Value, wanted: i64, new: Option<&Value>, old: &[&Value]) -> (i64, Vec<i64>) {
    let rolling = &deployment["spec"]["strategy"]["rollingUpdate"];
    let surge = resolve(rolling.get("maxSurge"), wanted, true);
    let mut unavailable = resolve(rolling.get("maxUnavailable"), wanted, false).min(wanted);
    if surge == 0 && unavailable == 0 {
        unavailable = 1;
    }
    let old_total: i64 = old.iter().map(|set| replicas(set)).sum();
    let current = new.map_or(0, replicas);
    let room = (wanted + surge - current - old_total).max(0);
    let new_count = if current > wanted {
        wanted
    } else {
        current + room.min(wanted - current)
    };

    let min_available = wanted - unavailable;
    let new_available = new.map_or(0, available).min(new_count);
    let mut can_go = (new_count + old_total) - min_available - (new_count - new_available);
    let mut counts: Vec<i64> = old.iter().map(|set| replicas(set)).collect();
    // Those that are not available go first: nobody misses them.
    for (count, set) in counts.iter_mut().zip(old) {
        let gone = (*count - available(set)).clamp(0, can_go.max(0));
        *count -= gone;
        can_go -= gone;
    }
    let total_available = new_available + old.iter().map(|set| available(set)).sum::<i64>();
    let mut spare = (total_available - min_available).max(0);
    for count in &mut counts {
        let gone = (*count).clamp(0, spare.min(can_go.max(0)));
        *count -= gone;
        spare -= gone;
        can_go -= gone;
    }
    (new_count, counts)
}

fn new_set(deployment: &Value, template: &Value, count: i64, revision: i64) -> Value {
    let hash = pods::template_hash(template);
    let mut template = template.clone();
    meta::map_mut(meta::map_mut_value(&mut template, "metadata"), "labels").insert(HASH.into(), json!(hash));
    let mut selector = deployment["spec"]["selector"].clone();
    meta::map_mut(&mut selector, "matchLabels").insert(HASH.into(), json!(hash));
    json!({
        "apiVersion": "apps/v1",
        "kind": "ReplicaSet",
        "metadata": {
            "name": format!("{}-{hash}", meta::name(deployment)),
            "labels": template["metadata"]["labels"],
            "annotations": {REVISION: revision.to_string()},
            "ownerReferences": [meta::controller_reference(deployment, "apps/v1", "Deployment")],
        },
        "spec": {"replicas": count, "selector": selector, "template": template},
    })
}

/// Empty old sets beyond the history limit, the oldest first.
fn surplus_history(deployment: &Value, old: &[&Value]) -> Vec<String> {
    let limit = meta::int_at(deployment, &["spec", "revisionHistoryLimit"]).unwrap_or(10);
    let mut empty: Vec<&Value> = old
        .iter()
        .copied()
        .filter(|set| replicas(set) == 0 && meta::int_at(set, &["status", "replicas"]).unwrap_or(0) == 0)
        .collect();
    empty.sort_by_key(|set| revision(set));
    let surplus = empty.len().saturating_sub(usize::try_from(limit).unwrap_or(0));
    empty[..surplus]
        .iter()
        .map(|set| meta::name(set).to_owned())
        .collect()
}

fn counts(deployment: &Value, sets: &[&Value], new: Option<&Value>) -> Value {
    let sum = |field: &str| -> i64 {
        sets.iter()
            .filter_map(|set| meta::int_at(set, &["status", field]))
            .sum()
    };
    let wanted = meta::int_at(deployment, &["spec", "replicas"]).unwrap_or(1);
    let updated = new
        .and_then(|set| meta::int_at(set, &["status", "replicas"]))
        .unwrap_or(0);
    let numbers = [
        ("replicas", sum("replicas")),
        ("updatedReplicas", updated),
        ("readyReplicas", sum("readyReplicas")),
        ("availableReplicas", sum("availableReplicas")),
        (
            "unavailableReplicas",
            (wanted.max(sum("replicas")) - sum("availableReplicas")).max(0),
        ),
    ];
    let mut status = json!({"observedGeneration": meta::generation(deployment)});
    for (field, number) in numbers.into_iter().filter(|(_, number)| *number > 0) {
        status[field] = json!(number);
    }
    status
}

/// The status with its conditions.
fn write_status(deployment: &mut Value, numbers: &Value, new_set: &str, now: Timestamp) {
    let conditions = deployment["status"].get("conditions").cloned();
    deployment["status"] = numbers.clone();
    if let Some(conditions) = conditions {
        deployment["status"]["conditions"] = conditions;
    }
    let number = |field: &str| meta::int_at(numbers, &[field]).unwrap_or(0);
    let wanted = meta::int_at(deployment, &["spec", "replicas"]).unwrap_or(1);
    let unavailable = resolve(
        deployment["spec"]["strategy"]["rollingUpdate"].get("maxUnavailable"),
        wanted,
        false,
    )
    .min(wanted);
    let available = number("availableReplicas");
    if available >= wanted - unavailable {
        let message = "Deployment has minimum availability.";
        meta::set_condition(
            deployment,
            "Available",
            "True",
            "MinimumReplicasAvailable",
            message,
            now,
        );
    } else {
        let message = "Deployment does not have minimum availability.";
        meta::set_condition(
            deployment,
            "Available",
            "False",
            "MinimumReplicasUnavailable",
            message,
            now,
        );
    }
    let done = number("updatedReplicas") == wanted && number("replicas") == wanted && available >= wanted;
    let (reason, what) = if done {
        ("NewReplicaSetAvailable", "has successfully progressed.")
    } else {
        ("ReplicaSetUpdated", "is progressing.")
    };
    let message = format!("ReplicaSet {new_set:?} {what}");
    meta::set_condition(deployment, "Progressing", "True", reason, &message, now);
}

impl Controller for Deployments {
    type Key = Name;
    const NAME: &'static str = "deployments";
    const RESOURCES: &'static [&'static str] = &[RESOURCE, SETS];

    fn all(&mut self, client: &Client) -> BTreeSet<Name> {
        let key = |o: &Value| (meta::namespace(o).to_owned(), meta::name(o).to_owned());
        client
            .all(RESOURCE, None)
            .iter()
            .map(|d| key(d.value()))
            .collect()
    }

    fn affected(&mut self, _client: &Client, event: &Event, keys: &mut BTreeSet<Name>) {
        if event.key.resource.as_str() == RESOURCE {
            keys.insert((event.key.namespace.clone(), event.key.name.clone()));
        } else if let Some(owner) = meta::controller_of(event.object.value()) {
            keys.insert((
                event.key.namespace.clone(),
                meta::str_at(owner, &["name"]).to_owned(),
            ));
        }
    }

    fn reconcile(&mut self, client: &Client, (namespace, name): &Name) -> Result<(), ApiError> {
        let Some(deployment) = client.find(RESOURCE, namespace, name) else {
            return Ok(());
        };
        let deployment = deployment.value();
        let all = client.all(SETS, Some(namespace));
        let uid = meta::uid(deployment);
        let sets: Vec<&Value> = all
            .iter()
            .map(|set| set.value())
            .filter(|set| meta::is_controlled_by(set, uid))
            .collect();
        let plan = plan(deployment, &sets);
        let revision = plan.revision.to_string();
        if let Some(set) = plan.create {
            client.create(SETS, namespace, set)?;
        }
        if let Some(set) = &plan.revise {
            ignore_gone(client.modify(SETS, namespace, set, Part::Main, |set| {
                meta::map_mut(meta::map_mut_value(set, "metadata"), "annotations")
                    .insert(REVISION.into(), json!(revision));
            }))?;
        }
        for (set, count) in &plan.scale {
            ignore_gone(client.modify(SETS, namespace, set, Part::Main, |set| {
                set["spec"]["replicas"] = json!(count)
            }))?;
        }
        for set in &plan.delete {
            ignore_gone(client.delete(SETS, namespace, set, &DeleteOptions::default()))?;
        }
        if meta::annotation(deployment, REVISION) != Some(&revision) && !meta::is_terminating(deployment) {
            ignore_gone(client.modify(RESOURCE, namespace, name, Part::Main, |d| {
                meta::map_mut(meta::map_mut_value(d, "metadata"), "annotations")
                    .insert(REVISION.into(), json!(revision));
            }))?;
        }
        let new_set = format!(
            "{name}-{}",
            pods::template_hash(&template_without_hash(deployment))
        );
        let write = client.modify(RESOURCE, namespace, name, Part::Status, |d| {
            write_status(d, &plan.status, &new_set, crate::api::now());
        });
        ignore_gone(write)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn deployment(wanted: i64, surge: i64, unavailable: i64) -> Value {
        json!({
            "metadata": {"name": "d", "uid": "u"},
            "spec": {
                "replicas": wanted,
                "selector": {"matchLabels": {"a": "b"}},
                "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}},
                "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"v": 2}},
            },
        })
    }

    fn set(name: &str, version: i64, replicas: i64, available: i64) -> Value {
        json!({
            "metadata": {"name": name, "uid": name},
            "spec": {"replicas": replicas, "template": {"metadata": {"labels": {"a": "b", HASH: name}}, "spec": {"v": version}}},
            "status": {"replicas": replicas, "availableReplicas": available},
        })
    }

    #[test]
    fn the_first_round_creates_all_replicas() {
        let plan = plan(&deployment(3, 1, 1), &[]);
        let created = plan.create.unwrap();
        assert_eq!(created["spec"]["replicas"], 3);
        assert_eq!(
            created["spec"]["selector"]["matchLabels"][HASH],
            created["metadata"]["labels"][HASH]
        );
    }

    #[test]
    fn percentages_round_up_for_surge_and_down_for_unavailable() {
        assert_eq!(resolve(Some(&json!("25%")), 3, true), 1);
        assert_eq!(resolve(Some(&json!("25%")), 3, false), 0);
    }

    proptest! {
        #[test]
        fn a_rollout_keeps_its_bounds_and_ends(
            wanted in 0i64..12, surge in 0i64..4, unavailable in 0i64..4, start in 0i64..12, broken in 0i64..3,
        ) {
            let d = deployment(wanted, surge, unavailable);
            let unavailable = if surge == 0 && unavailable == 0 { 1 } else { unavailable.min(wanted) };
            let (mut old, mut new) = (set("old", 1, start, (start - broken).max(0)), set("new", 2, 0, 0));
            for _ in 0..100 {
                let before = available(&old) + available(&new);
                let plan = plan(&d, &[&old, &new]);
                if plan.scale.is_empty() && replicas(&old) == 0 && replicas(&new) == wanted {
                    return Ok(());
                }
                for (name, count) in plan.scale {
                    let target = if name == "old" { &mut old } else { &mut new };
                    target["spec"]["replicas"] = json!(count);
                }
                prop_assert!(replicas(&old) + replicas(&new) <= (wanted + surge).max(start));
                // Ready pods are given up last, so as many stay available as there are replicas for.
                let after = available(&old) + available(&new);
                prop_assert!(after >= before.min(wanted - unavailable));
                let old_available = available(&old);
                old["status"] = json!({"replicas": replicas(&old), "availableReplicas": old_available});
                new["status"] = json!({"replicas": replicas(&new), "availableReplicas": replicas(&new)});
            }
            prop_assert!(false, "did not end: {} old, {} new", replicas(&old), replicas(&new));
        }
    }
}
