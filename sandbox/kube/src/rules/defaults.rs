//! Values that the server fills in where a client left them out, per kind.

use serde_json::{Map, Value, json};

use crate::kind::Kind;
use crate::meta;

/// Fills in the defaults of a kind. `old` is the stored object, if there is one.
pub fn fill(kind: &Kind, object: &mut Value, old: Option<&Value>) {
    match kind.storage.as_str() {
        "pods" => pod(object),
        "deployments.apps" => deployment(object),
        "replicasets.apps" => {
            let spec = meta::map_mut(object, "spec");
            set(spec, "replicas", json!(1));
            template(spec);
        }
        "daemonsets.apps" => {
            let spec = meta::map_mut(object, "spec");
            set(spec, "revisionHistoryLimit", json!(10));
            set(
                spec,
                "updateStrategy",
                json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0}}),
            );
            template(spec);
        }
        "statefulsets.apps" => {
            let spec = meta::map_mut(object, "spec");
            set(spec, "replicas", json!(1));
            set(spec, "podManagementPolicy", json!("OrderedReady"));
            set(spec, "revisionHistoryLimit", json!(10));
            set(
                spec,
                "updateStrategy",
                json!({"type": "RollingUpdate", "rollingUpdate": {"partition": 0}}),
            );
            template(spec);
        }
        "namespaces" if old.is_none() => {
            set(meta::map_mut(object, "spec"), "finalizers", json!(["kubernetes"]));
            meta::map_mut(object, "status").insert("phase".into(), json!("Active"));
            let name = meta::name(object).to_owned();
            let labels = meta::map_mut(meta::map_mut_value(object, "metadata"), "labels");
            labels.insert("kubernetes.io/metadata.name".into(), json!(name));
        }
        "secrets" => secret(object),
        "services" if old.is_none() => {
            set(meta::map_mut(object, "status"), "loadBalancer", json!({}));
        }
        "nodes" if old.is_none() => {
            meta::map_mut(object, "spec");
            let name = meta::name(object).to_owned();
            let labels = meta::map_mut(meta::map_mut_value(object, "metadata"), "labels");
            set(labels, "kubernetes.io/hostname", json!(name));
        }
        _ => {}
    }
}

fn set(map: &mut Map<String, Value>, key: &str, value: Value) {
    if map.get(key).is_none_or(Value::is_null) {
        map.insert(key.to_owned(), value);
    }
}

fn secret(object: &mut Value) {
    let Some(map) = object.as_object_mut() else { return };
    set(map, "type", json!("Opaque"));
    // `stringData` is write-only: its values go to `data`, encoded.
    if let Some(Value::Object(strings)) = map.remove("stringData") {
        let data = meta::map_mut(object, "data");
        for (key, value) in strings {
            let text = value.as_str().unwrap_or_default().as_bytes();
            data.insert(
                key,
                serde_json::to_value(k8s_openapi::ByteString(text.to_vec())).unwrap_or_default(),
            );
        }
    }
}

fn pod(object: &mut Value) {
    let spec = meta::map_mut_value(object, "spec");
    pod_spec(spec);
    set(meta::map_mut(object, "spec"), "enableServiceLinks", json!(true));
    let service_account = {
        let spec = meta::map_mut(object, "spec");
        set(spec, "serviceAccountName", json!("default"));
        spec["serviceAccountName"].clone()
    };
    set(meta::map_mut(object, "spec"), "serviceAccount", service_account);
    let qos = qos_class(&object["spec"]);
    let status = meta::map_mut(object, "status");
    set(status, "phase", json!("Pending"));
    set(status, "qosClass", json!(qos));
}

fn qos_class(spec: &Value) -> &'static str {
    let containers = meta::list_at(spec, &["containers"]);
    let has = |c: &Value, which: &str, what: &str| meta::at(c, &["resources", which, what]).is_some();
    let any = |c: &Value| {
        ["limits", "requests"]
            .iter()
            .any(|w| ["cpu", "memory"].iter().any(|r| has(c, w, r)))
    };
    let full = |c: &Value| {
        ["cpu", "memory"].iter().all(|r| {
            has(c, "limits", r)
                && (!has(c, "requests", r) || c["resources"]["requests"][*r] == c["resources"]["limits"][*r])
        })
    };
    match () {
        () if !containers.iter().any(any) => "BestEffort",
        () if containers.iter().all(full) => "Guaranteed",
        () => "Burstable",
    }
}

fn deployment(object: &mut Value) {
    let spec = meta::map_mut(object, "spec");
    set(spec, "replicas", json!(1));
    set(spec, "progressDeadlineSeconds", json!(600));
    set(spec, "revisionHistoryLimit", json!(10));
    set(spec, "strategy", json!({}));
    let strategy = meta::map_mut(meta::map_mut_value(object, "spec"), "strategy");
    set(strategy, "type", json!("RollingUpdate"));
    if strategy["type"] == "RollingUpdate" {
        set(strategy, "rollingUpdate", json!({}));
        if let Some(rolling) = strategy["rollingUpdate"].as_object_mut() {
            set(rolling, "maxSurge", json!("25%"));
            set(rolling, "maxUnavailable", json!("25%"));
        }
    }
    template(meta::map_mut(object, "spec"));
}

fn template(spec: &mut Map<String, Value>) {
    if let Some(template) = spec.get_mut("template") {
        pod_spec(meta::map_mut_value(template, "spec"));
    }
}

fn pod_spec(spec: &mut Value) {
    let Some(map) = spec.as_object_mut() else { return };
    set(map, "restartPolicy", json!("Always"));
    set(map, "dnsPolicy", json!("ClusterFirst"));
    set(map, "terminationGracePeriodSeconds", json!(30));
    set(map, "schedulerName", json!("default-scheduler"));
    set(map, "securityContext", json!({}));
    for list in ["initContainers", "containers"] {
        for container in map
            .get_mut(list)
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            if let Some(container) = container.as_object_mut() {
                fill_container(container);
            }
        }
    }
}

fn fill_container(container: &mut Map<String, Value>) {
    let image = container.get("image").and_then(Value::as_str).unwrap_or("");
    let tag = image
        .rsplit('/')
        .next()
        .unwrap_or("")
        .split_once(':')
        .map_or("latest", |(_, tag)| tag);
    let policy = if tag == "latest" && !image.contains('@') {
        "Always"
    } else {
        "IfNotPresent"
    };
    set(container, "imagePullPolicy", json!(policy));
    set(container, "resources", json!({}));
    set(container, "terminationMessagePath", json!("/dev/termination-log"));
    set(container, "terminationMessagePolicy", json!("File"));
    for port in container
        .get_mut("ports")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        if let Some(port) = port.as_object_mut() {
            set(port, "protocol", json!("TCP"));
        }
    }
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let Some(probe) = container.get_mut(probe).and_then(Value::as_object_mut) else {
            continue;
        };
        set(probe, "timeoutSeconds", json!(1));
        set(probe, "periodSeconds", json!(10));
        set(probe, "successThreshold", json!(1));
        set(probe, "failureThreshold", json!(3));
        if let Some(get) = probe.get_mut("httpGet").and_then(Value::as_object_mut) {
            set(get, "path", json!("/"));
            set(get, "scheme", json!("HTTP"));
        }
    }
}

/// Quantities may be written as numbers; they are stored as text.
pub fn numbers_to_quantities(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for (key, inner) in map.iter_mut() {
                let holds = matches!(
                    key.as_str(),
                    "limits" | "requests" | "capacity" | "allocatable" | "hard" | "used"
                );
                if let (true, Value::Object(quantities)) = (holds, &mut *inner) {
                    for quantity in quantities.values_mut().filter(|q| q.is_number()) {
                        *quantity = json!(quantity.to_string());
                    }
                }
                numbers_to_quantities(inner);
            }
        }
        Value::Array(list) => list.iter_mut().for_each(numbers_to_quantities),
        _ => {}
    }
}
