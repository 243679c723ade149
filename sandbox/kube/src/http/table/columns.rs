//! The columns that `kubectl get` shows for built-in kinds.

use serde_json::{Value, json};

use super::{age, since};
use crate::kind::Kind;
use crate::meta;

/// A column of a built-in kind.
pub struct Column {
    pub name: &'static str,
    /// `string` or `integer`.
    pub kind: &'static str,
    /// Shown with `-o wide` only.
    pub wide: bool,
    pub cell: fn(&Value) -> Value,
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

/// The columns of a kind after its name; none for kinds that have only their age.
pub fn columns(kind: &Kind) -> &'static [Column] {
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
