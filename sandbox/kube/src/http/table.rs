//! Tables: what `kubectl get` prints.
//!
//! In: objects in wire form. Out: a `Table` with the columns that a real server has for the common kinds; custom kinds
//! have those of their definition; all others NAME and AGE. Ages are computed here, from the clock of the server.

use serde_json::{Value, json};

use crate::kind::Kind;
use crate::meta;

struct Column {
    name: &'static str,
    /// `string` or `integer`.
    kind: &'static str,
    /// Shown with `-o wide` only.
    wide: bool,
    cell: fn(&Value) -> Value,
}

const fn column(name: &'static str, cell: fn(&Value) -> Value) -> Column {
    Column {
        name,
        kind: "string",
        wide: false,
        cell,
    }
}

const fn wide(name: &'static str, cell: fn(&Value) -> Value) -> Column {
    Column {
        name,
        kind: "string",
        wide: true,
        cell,
    }
}

const fn number(name: &'static str, cell: fn(&Value) -> Value) -> Column {
    Column {
        name,
        kind: "integer",
        wide: false,
        cell,
    }
}

const AGE: Column = column("Age", |o| json!(age(o)));

/// The table of some objects.
pub fn render(kind: &Kind, objects: &[Value], version: &str, include_metadata: bool) -> Value {
    let mut definitions =
        vec![json!({"name": "Name", "type": "string", "format": "name", "description": "", "priority": 0})];
    let builtin = columns(kind);
    let custom = kind.custom.as_ref().map_or(&[][..], |c| c.columns.as_slice());
    for column in builtin {
        let priority = i32::from(column.wide);
        definitions.push(json!({
            "name": column.name, "type": column.kind, "format": "", "description": "", "priority": priority,
        }));
    }
    for column in custom {
        definitions.push(json!({
            "name": column["name"],
            "type": column["type"],
            "format": meta::str_at(column, &["format"]),
            "description": meta::str_at(column, &["description"]),
            "priority": meta::int_at(column, &["priority"]).unwrap_or(0),
        }));
    }
    if builtin.is_empty() && custom.is_empty() {
        definitions
            .push(json!({"name": "Age", "type": "string", "format": "", "description": "", "priority": 0}));
    }
    let rows: Vec<Value> = objects
        .iter()
        .map(|object| {
            let mut cells = vec![json!(meta::name(object))];
            cells.extend(builtin.iter().map(|column| (column.cell)(object)));
            cells.extend(custom.iter().map(|column| custom_cell(column, object)));
            if builtin.is_empty() && custom.is_empty() {
                cells.push(json!(age(object)));
            }
            let shown = if include_metadata {
                only_metadata(object)
            } else {
                Value::Null
            };
            json!({"cells": cells, "object": shown})
        })
        .collect();
    let revision = match objects {
        [only] => meta::field(only, "resourceVersion"),
        _ => "",
    };
    json!({
        "kind": "Table",
        "apiVersion": format!("meta.k8s.io/{version}"),
        "metadata": {"resourceVersion": revision},
        "columnDefinitions": definitions,
        "rows": rows,
    })
}

/// The metadata of an object, as an object of its own.
pub fn only_metadata(object: &Value) -> Value {
    json!({
        "kind": "PartialObjectMetadata",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": object["metadata"],
    })
}

fn custom_cell(column: &Value, object: &Value) -> Value {
    // Only plain paths and the condition filter, which is what definitions use.
    let path = meta::str_at(column, &["jsonPath"]).trim_start_matches('.');
    let value = match path.split_once("[?(@.type==") {
        Some((list, rest)) => {
            let quoted = rest
                .split(')')
                .next()
                .unwrap_or("")
                .trim_matches(|c| c == '"' || c == '\'' || c == '\\');
            let field = rest.rsplit('.').next().unwrap_or("");
            let list: Vec<&str> = list.split('.').collect();
            let found = meta::list_at(object, &list)
                .iter()
                .find(|c| meta::str_at(c, &["type"]) == quoted);
            found.and_then(|c| c.get(field)).cloned()
        }
        None => meta::at(object, &path.split('.').collect::<Vec<_>>()).cloned(),
    };
    match (meta::str_at(column, &["type"]), value) {
        ("date", Some(Value::String(time))) => json!(since(&time)),
        (_, Some(value @ (Value::Array(_) | Value::Object(_)))) => json!(value.to_string()),
        (_, Some(value)) => value,
        (_, None) => Value::Null,
    }
}

fn columns(kind: &Kind) -> &'static [Column] {
    match kind.storage.as_str() {
        "pods" => PODS,
        "services" => SERVICES,
        "namespaces" => NAMESPACES,
        "nodes" => NODES,
        "deployments.apps" => DEPLOYMENTS,
        "replicasets.apps" => REPLICA_SETS,
        "daemonsets.apps" => DAEMON_SETS,
        "statefulsets.apps" => STATEFUL_SETS,
        "endpointslices.discovery.k8s.io" => ENDPOINT_SLICES,
        "endpoints" => ENDPOINTS,
        "configmaps" => CONFIG_MAPS,
        "secrets" => SECRETS,
        "leases.coordination.k8s.io" => LEASES,
        "customresourcedefinitions.apiextensions.k8s.io" => DEFINITIONS,
        "events" => EVENTS,
        _ => &[],
    }
}

const PODS: &[Column] = &[
    column("Ready", |o| {
        let statuses = meta::list_at(o, &["status", "containerStatuses"]);
        let ready = statuses.iter().filter(|s| meta::bool_at(s, &["ready"])).count();
        json!(format!(
            "{ready}/{}",
            meta::list_at(o, &["spec", "containers"]).len()
        ))
    }),
    column("Status", |o| json!(pod_status(o))),
    column("Restarts", |o| {
        let statuses = meta::list_at(o, &["status", "containerStatuses"]);
        let restarts: i64 = statuses
            .iter()
            .filter_map(|s| meta::int_at(s, &["restartCount"]))
            .sum();
        json!(restarts.to_string())
    }),
    AGE,
    wide("IP", |o| or_none(meta::str_at(o, &["status", "podIP"]))),
    wide("Node", |o| or_none(meta::str_at(o, &["spec", "nodeName"]))),
    wide("Nominated Node", |o| {
        or_none(meta::str_at(o, &["status", "nominatedNodeName"]))
    }),
    wide("Readiness Gates", |_| json!("<none>")),
];

const SERVICES: &[Column] = &[
    column("Type", |o| json!(meta::str_at(o, &["spec", "type"]))),
    column("Cluster-IP", |o| or_none(meta::str_at(o, &["spec", "clusterIP"]))),
    column("External-IP", |o| json!(external_ip(o))),
    column("Port(s)", |o| json!(service_ports(o))),
    AGE,
    wide("Selector", |o| json!(labels_text(&o["spec"]["selector"]))),
];

const NAMESPACES: &[Column] = &[
    column("Status", |o| json!(meta::str_at(o, &["status", "phase"]))),
    AGE,
];

const NODES: &[Column] = &[
    column("Status", |o| {
        let mut text = String::from(
            match meta::condition(o, "Ready").map(|c| meta::str_at(c, &["status"])) {
                Some("True") => "Ready",
                Some(_) => "NotReady",
                None => "Unknown",
            },
        );
        if meta::bool_at(o, &["spec", "unschedulable"]) {
            text.push_str(",SchedulingDisabled");
        }
        json!(text)
    }),
    column("Roles", |o| {
        let labels = meta::labels(o).into_iter().flatten();
        let roles: Vec<&str> = labels
            .filter_map(|(key, _)| key.strip_prefix("node-role.kubernetes.io/"))
            .filter(|r| !r.is_empty())
            .collect();
        or_none(&roles.join(","))
    }),
    AGE,
    column("Version", |o| {
        json!(meta::str_at(o, &["status", "nodeInfo", "kubeletVersion"]))
    }),
    wide("Internal-IP", |o| or_none(node_address(o, "InternalIP"))),
    wide("External-IP", |o| or_none(node_address(o, "ExternalIP"))),
    wide("OS-Image", |o| json!(node_info(o, "osImage"))),
    wide("Kernel-Version", |o| json!(node_info(o, "kernelVersion"))),
    wide("Container-Runtime", |o| {
        json!(node_info(o, "containerRuntimeVersion"))
    }),
];

const DEPLOYMENTS: &[Column] = &[
    column("Ready", |o| {
        json!(format!(
            "{}/{}",
            count(o, "status", "readyReplicas"),
            count(o, "spec", "replicas")
        ))
    }),
    number("Up-to-date", |o| json!(count(o, "status", "updatedReplicas"))),
    number("Available", |o| json!(count(o, "status", "availableReplicas"))),
    AGE,
    wide("Containers", |o| json!(template_text(o, "name"))),
    wide("Images", |o| json!(template_text(o, "image"))),
    wide("Selector", |o| {
        json!(labels_text(&o["spec"]["selector"]["matchLabels"]))
    }),
];

const REPLICA_SETS: &[Column] = &[
    number("Desired", |o| json!(count(o, "spec", "replicas"))),
    number("Current", |o| json!(count(o, "status", "replicas"))),
    number("Ready", |o| json!(count(o, "status", "readyReplicas"))),
    AGE,
    wide("Containers", |o| json!(template_text(o, "name"))),
    wide("Images", |o| json!(template_text(o, "image"))),
    wide("Selector", |o| {
        json!(labels_text(&o["spec"]["selector"]["matchLabels"]))
    }),
];

const DAEMON_SETS: &[Column] = &[
    number("Desired", |o| json!(count(o, "status", "desiredNumberScheduled"))),
    number("Current", |o| json!(count(o, "status", "currentNumberScheduled"))),
    number("Ready", |o| json!(count(o, "status", "numberReady"))),
    number("Up-to-date", |o| {
        json!(count(o, "status", "updatedNumberScheduled"))
    }),
    number("Available", |o| json!(count(o, "status", "numberAvailable"))),
    column("Node Selector", |o| {
        json!(labels_text(&o["spec"]["template"]["spec"]["nodeSelector"]))
    }),
    AGE,
];

const STATEFUL_SETS: &[Column] = &[
    column("Ready", |o| {
        json!(format!(
            "{}/{}",
            count(o, "status", "readyReplicas"),
            count(o, "spec", "replicas")
        ))
    }),
    AGE,
];

const ENDPOINT_SLICES: &[Column] = &[
    column("AddressType", |o| json!(meta::str_at(o, &["addressType"]))),
    column("Ports", |o| {
        let ports = meta::list_at(o, &["ports"])
            .iter()
            .filter_map(|p| meta::int_at(p, &["port"]));
        json!(first_few(ports.map(|p| p.to_string()).collect(), "<unset>"))
    }),
    column("Endpoints", |o| {
        let endpoints = meta::list_at(o, &["endpoints"]).iter();
        let addresses = endpoints
            .flat_map(|e| meta::list_at(e, &["addresses"]))
            .filter_map(Value::as_str);
        json!(first_few(addresses.map(str::to_owned).collect(), "<unset>"))
    }),
    AGE,
];

const ENDPOINTS: &[Column] = &[
    column("Endpoints", |o| {
        let subsets = meta::list_at(o, &["subsets"]).iter();
        let all = subsets.flat_map(|s| {
            meta::list_at(s, &["addresses"]).iter().flat_map(move |a| {
                let ip = meta::str_at(a, &["ip"]);
                meta::list_at(s, &["ports"])
                    .iter()
                    .map(move |p| format!("{ip}:{}", p["port"]))
            })
        });
        json!(first_few(all.collect(), "<none>"))
    }),
    AGE,
];

const CONFIG_MAPS: &[Column] = &[number("Data", |o| json!(data_len(o))), AGE];

const SECRETS: &[Column] = &[
    column("Type", |o| json!(meta::str_at(o, &["type"]))),
    number("Data", |o| json!(data_len(o))),
    AGE,
];

const LEASES: &[Column] = &[
    column("Holder", |o| json!(meta::str_at(o, &["spec", "holderIdentity"]))),
    AGE,
];

const DEFINITIONS: &[Column] = &[column("Created At", |o| {
    json!(meta::field(o, "creationTimestamp"))
})];

const EVENTS: &[Column] = &[
    column("Last Seen", |o| {
        let times = ["lastTimestamp", "deprecatedLastTimestamp", "eventTime"].map(|f| meta::str_at(o, &[f]));
        let time = times
            .into_iter()
            .find(|t| !t.is_empty())
            .unwrap_or(meta::field(o, "creationTimestamp"));
        json!(since(time))
    }),
    column("Type", |o| json!(meta::str_at(o, &["type"]))),
    column("Reason", |o| json!(meta::str_at(o, &["reason"]))),
    column("Object", |o| {
        let object = meta::at(o, &["involvedObject"])
            .or(meta::at(o, &["regarding"]))
            .unwrap_or(&Value::Null);
        json!(format!(
            "{}/{}",
            meta::str_at(object, &["kind"]).to_lowercase(),
            meta::str_at(object, &["name"])
        ))
    }),
    column("Message", |o| {
        json!(
            meta::at(o, &["message"])
                .or(meta::at(o, &["note"]))
                .and_then(Value::as_str)
                .unwrap_or("")
        )
    }),
];

fn pod_status(pod: &Value) -> String {
    if meta::is_terminating(pod) {
        return "Terminating".into();
    }
    for status in meta::list_at(pod, &["status", "containerStatuses"]) {
        for state in ["waiting", "terminated"] {
            let reason = meta::str_at(status, &["state", state, "reason"]);
            if !reason.is_empty() {
                return reason.to_owned();
            }
        }
    }
    let reason = meta::str_at(pod, &["status", "reason"]);
    let phase = meta::str_at(pod, &["status", "phase"]);
    if reason.is_empty() {
        phase.to_owned()
    } else {
        reason.to_owned()
    }
}

fn external_ip(service: &Value) -> String {
    let ingress = meta::list_at(service, &["status", "loadBalancer", "ingress"]).iter();
    let balancers = ingress.map(|i| {
        let ip = meta::str_at(i, &["ip"]);
        if ip.is_empty() {
            meta::str_at(i, &["hostname"])
        } else {
            ip
        }
    });
    let own = meta::list_at(service, &["spec", "externalIPs"])
        .iter()
        .filter_map(Value::as_str);
    let all: Vec<&str> = balancers.chain(own).collect();
    match meta::str_at(service, &["spec", "type"]) {
        "ExternalName" => meta::str_at(service, &["spec", "externalName"]).to_owned(),
        "LoadBalancer" if all.is_empty() => "<pending>".into(),
        _ if all.is_empty() => "<none>".into(),
        _ => all.join(","),
    }
}

fn service_ports(service: &Value) -> String {
    let ports = meta::list_at(service, &["spec", "ports"]).iter().map(|port| {
        let protocol = meta::str_at(port, &["protocol"]);
        match meta::int_at(port, &["nodePort"]) {
            Some(node_port) => format!("{}:{node_port}/{protocol}", port["port"]),
            None => format!("{}/{protocol}", port["port"]),
        }
    });
    let text = ports.collect::<Vec<_>>().join(",");
    if text.is_empty() { "<none>".into() } else { text }
}

fn labels_text(labels: &Value) -> String {
    let parts: Vec<String> = labels
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    if parts.is_empty() {
        "<none>".into()
    } else {
        parts.join(",")
    }
}

fn template_text(object: &Value, field: &str) -> String {
    let containers = meta::list_at(object, &["spec", "template", "spec", "containers"]).iter();
    containers
        .map(|c| meta::str_at(c, &[field]))
        .collect::<Vec<_>>()
        .join(",")
}

fn node_address<'a>(node: &'a Value, kind: &str) -> &'a str {
    let addresses = meta::list_at(node, &["status", "addresses"]);
    addresses
        .iter()
        .find(|a| meta::str_at(a, &["type"]) == kind)
        .map_or("", |a| meta::str_at(a, &["address"]))
}

fn node_info<'a>(node: &'a Value, field: &str) -> &'a str {
    let text = meta::str_at(node, &["status", "nodeInfo", field]);
    if text.is_empty() { "<unknown>" } else { text }
}

fn count(object: &Value, part: &str, field: &str) -> i64 {
    meta::int_at(object, &[part, field]).unwrap_or(0)
}

fn data_len(object: &Value) -> usize {
    ["data", "binaryData"]
        .iter()
        .filter_map(|f| object[*f].as_object())
        .map(serde_json::Map::len)
        .sum()
}

fn or_none(text: &str) -> Value {
    json!(if text.is_empty() { "<none>" } else { text })
}

fn first_few(all: Vec<String>, none: &str) -> String {
    match all.len() {
        0 => none.to_owned(),
        1..=3 => all.join(","),
        n => format!("{} + {} more...", all[..3].join(","), n - 3),
    }
}

fn age(object: &Value) -> String {
    since(meta::field(object, "creationTimestamp"))
}

fn since(time: &str) -> String {
    match meta::parse_time(time) {
        Some(then) => duration_text(crate::api::now().as_second() - then),
        None => "<unknown>".into(),
    }
}

/// A duration as kubectl writes it: two units at most, and only while the second one says something.
fn duration_text(seconds: i64) -> String {
    let (minute, hour, day) = (60, 3600, 86_400);
    let two = |big: i64, big_name: &str, small: i64, small_name: &str| {
        let rest = (seconds % big) / small;
        if rest == 0 {
            format!("{}{big_name}", seconds / big)
        } else {
            format!("{}{big_name}{rest}{small_name}", seconds / big)
        }
    };
    match seconds {
        s if s < 0 => "0s".into(),
        s if s < 2 * minute => format!("{s}s"),
        s if s < 10 * minute => two(minute, "m", 1, "s"),
        s if s < 3 * hour => format!("{}m", s / minute),
        s if s < 8 * hour => two(hour, "h", minute, "m"),
        s if s < 2 * day => format!("{}h", s / hour),
        s if s < 8 * day => two(day, "d", hour, "h"),
        s if s < 2 * 365 * day => format!("{}d", s / day),
        s => format!("{}y", s / (365 * day)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_like_kubectl() {
        for (seconds, want) in [
            (5, "5s"),
            (119, "119s"),
            (120, "2m"),
            (125, "2m5s"),
            (3600, "60m"),
            (11_100, "3h5m"),
            (90_000, "25h"),
            (200_000, "2d7h"),
            (864_000, "10d"),
        ] {
            assert_eq!(duration_text(seconds), want);
        }
    }
}
