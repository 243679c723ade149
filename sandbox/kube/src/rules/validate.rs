//! Checks of objects that types alone cannot express. Each returns what is wrong, by field.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::error::Cause;
use crate::kind::Kind;
use crate::meta;
use crate::selector::LabelSelector;

/// Annotations of an object may have this many bytes in total.
const ANNOTATIONS_LEN_MAX: usize = 256 * 1024;

/// Checks names, labels, annotations, owners and finalizers.
pub fn metadata(kind: &Kind, object: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let name = meta::name(object);
    if name.is_empty() {
        causes.push(Cause::new(
            "metadata.name",
            "Required value: name or generateName is required",
        ));
    } else if let Err(why) = check_name(kind, name) {
        causes.push(Cause::new(
            "metadata.name",
            format!("Invalid value: {name:?}: {why}"),
        ));
    }
    for (key, value) in meta::labels(object).into_iter().flatten() {
        if let Err(why) = meta::check_qualified_name(key) {
            causes.push(Cause::new(
                "metadata.labels",
                format!("Invalid value: {key:?}: {why}"),
            ));
        }
        let value = value.as_str().unwrap_or_default();
        if let Err(why) = meta::check_label_value(value) {
            causes.push(Cause::new(
                "metadata.labels",
                format!("Invalid value: {value:?}: {why}"),
            ));
        }
    }
    let annotations = meta::at(object, &["metadata", "annotations"]).and_then(Value::as_object);
    let mut len = 0;
    for (key, value) in annotations.into_iter().flatten() {
        len += key.len() + value.as_str().map_or(0, str::len);
        if let Err(why) = meta::check_qualified_name(key) {
            causes.push(Cause::new(
                "metadata.annotations",
                format!("Invalid value: {key:?}: {why}"),
            ));
        }
    }
    if len > ANNOTATIONS_LEN_MAX {
        causes.push(Cause::new(
            "metadata.annotations",
            format!("Too long: may not be more than {ANNOTATIONS_LEN_MAX} bytes"),
        ));
    }
    for (at, owner) in meta::owner_references(object).iter().enumerate() {
        for field in ["apiVersion", "kind", "name", "uid"] {
            if meta::str_at(owner, &[field]).is_empty() {
                let field = format!("metadata.ownerReferences[{at}].{field}");
                causes.push(Cause::new(field, "Invalid value: \"\": must not be empty"));
            }
        }
    }
    causes
}

fn check_name(kind: &Kind, name: &str) -> Result<(), &'static str> {
    match kind.storage.as_str() {
        "namespaces" => meta::check_label(name),
        "services" => meta::check_label_1035(name),
        storage if storage.ends_with("rbac.authorization.k8s.io") => meta::check_path_segment(name),
        _ => meta::check_subdomain(name),
    }
}

/// Checks of a new object.
pub fn create(kind: &Kind, object: &Value) -> Vec<Cause> {
    match kind.storage.as_str() {
        "pods" => pod_spec(&object["spec"], "spec"),
        "deployments.apps" | "replicasets.apps" | "daemonsets.apps" | "statefulsets.apps" => workload(object),
        "endpointslices.discovery.k8s.io" => endpoint_slice(object),
        "configmaps" | "secrets" => config_data(object),
        _ => Vec::new(),
    }
}

/// Checks of a changed object.
pub fn update(kind: &Kind, old: &Value, new: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    match kind.storage.as_str() {
        "pods" if without_images(&old["spec"]) != without_images(&new["spec"]) => {
            let message = "Forbidden: pod updates may not change fields other than `spec.containers[*].image`, \
                           `spec.initContainers[*].image`, `spec.activeDeadlineSeconds`, `spec.tolerations` or \
                           `spec.terminationGracePeriodSeconds`";
            causes.push(Cause::new("spec", message));
        }
        "deployments.apps" | "replicasets.apps" | "daemonsets.apps" | "statefulsets.apps" => {
            causes.extend(workload(new));
            if old["spec"]["selector"] != new["spec"]["selector"] {
                causes.push(Cause::new("spec.selector", "Invalid value: field is immutable"));
            }
        }
        "endpointslices.discovery.k8s.io" => {
            causes.extend(endpoint_slice(new));
            if old["addressType"] != new["addressType"] {
                causes.push(Cause::new("addressType", "Invalid value: field is immutable"));
            }
        }
        "configmaps" | "secrets" => {
            if meta::bool_at(old, &["immutable"])
                && (old["data"] != new["data"] || old["binaryData"] != new["binaryData"])
            {
                causes.push(Cause::new(
                    "data",
                    "Forbidden: field is immutable when `immutable` is set",
                ));
            }
            causes.extend(config_data(new));
        }
        _ => {}
    }
    if meta::is_terminating(old) {
        let before: BTreeSet<&str> = meta::finalizers(old).collect();
        if meta::finalizers(new).any(|f| !before.contains(f)) {
            let message = "Forbidden: no new finalizers can be added if the object is being deleted";
            causes.push(Cause::new("metadata.finalizers", message));
        }
    }
    causes
}

fn without_images(spec: &Value) -> Value {
    let mut spec = spec.clone();
    for list in ["containers", "initContainers"] {
        for container in spec
            .get_mut(list)
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            if let Some(container) = container.as_object_mut() {
                container.remove("image");
            }
        }
    }
    if let Some(map) = spec.as_object_mut() {
        for field in [
            "activeDeadlineSeconds",
            "tolerations",
            "terminationGracePeriodSeconds",
            "schedulingGates",
        ] {
            map.remove(field);
        }
    }
    spec
}

fn pod_spec(spec: &Value, path: &str) -> Vec<Cause> {
    let mut causes = Vec::new();
    let containers = meta::list_at(spec, &["containers"]);
    if containers.is_empty() {
        causes.push(Cause::new(format!("{path}.containers"), "Required value"));
    }
    let mut names = BTreeSet::new();
    for (list, containers) in [
        ("containers", containers),
        ("initContainers", meta::list_at(spec, &["initContainers"])),
    ] {
        for (at, container) in containers.iter().enumerate() {
            let here = format!("{path}.{list}[{at}]");
            let name = meta::str_at(container, &["name"]);
            if let Err(why) = meta::check_label(name) {
                causes.push(Cause::new(
                    format!("{here}.name"),
                    format!("Invalid value: {name:?}: {why}"),
                ));
            }
            if !names.insert(name) {
                causes.push(Cause::new(
                    format!("{here}.name"),
                    format!("Duplicate value: {name:?}"),
                ));
            }
            for (at, port) in meta::list_at(container, &["ports"]).iter().enumerate() {
                let number = meta::int_at(port, &["containerPort"]).unwrap_or(0);
                if !(1..=65535).contains(&number) {
                    let field = format!("{here}.ports[{at}].containerPort");
                    causes.push(Cause::new(
                        field,
                        format!("Invalid value: {number}: must be between 1 and 65535, inclusive"),
                    ));
                }
            }
        }
    }
    causes
}

fn workload(object: &Value) -> Vec<Cause> {
    let mut causes = pod_spec(&object["spec"]["template"]["spec"], "spec.template.spec");
    if meta::int_at(object, &["spec", "replicas"]).is_some_and(|n| n < 0) {
        causes.push(Cause::new(
            "spec.replicas",
            "Invalid value: must be greater than or equal to 0",
        ));
    }
    let Some(selector) = meta::at(object, &["spec", "selector"]) else {
        causes.push(Cause::new("spec.selector", "Required value"));
        return causes;
    };
    match LabelSelector::from_object(selector) {
        Err(error) => causes.push(Cause::new("spec.selector", format!("Invalid value: {error}"))),
        Ok(parsed) if parsed.is_empty() => {
            causes.push(Cause::new(
                "spec.selector",
                "Invalid value: empty selector is invalid for this kind",
            ));
        }
        Ok(parsed) if !parsed.matches(&object["spec"]["template"]) => causes.push(Cause::new(
            "spec.template.metadata.labels",
            "Invalid value: `selector` does not match template `labels`",
        )),
        Ok(_) => {}
    }
    causes
}

/// Endpoints of one slice at most.
const SLICE_ENDPOINTS_MAX: usize = 1000;

fn endpoint_slice(slice: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let family = meta::str_at(slice, &["addressType"]);
    if !matches!(family, "IPv4" | "IPv6" | "FQDN") {
        causes.push(Cause::new(
            "addressType",
            format!("Unsupported value: {family:?}: takes FQDN, IPv4, IPv6"),
        ));
    }
    let endpoints = meta::list_at(slice, &["endpoints"]);
    if endpoints.len() > SLICE_ENDPOINTS_MAX {
        causes.push(Cause::new(
            "endpoints",
            format!("Too many: must have at most {SLICE_ENDPOINTS_MAX} items"),
        ));
    }
    for (at, endpoint) in endpoints.iter().enumerate() {
        let addresses = meta::list_at(endpoint, &["addresses"]);
        if addresses.is_empty() {
            causes.push(Cause::new(
                format!("endpoints[{at}].addresses"),
                "Required value: must contain at least 1 address",
            ));
        }
        for address in addresses.iter().filter_map(Value::as_str) {
            let fits = match family {
                "IPv4" => address.parse::<std::net::Ipv4Addr>().is_ok(),
                "IPv6" => address.parse::<std::net::Ipv6Addr>().is_ok(),
                _ => true,
            };
            if !fits {
                let field = format!("endpoints[{at}].addresses");
                causes.push(Cause::new(
                    field,
                    format!("Invalid value: {address:?}: must be a valid {family} address"),
                ));
            }
        }
    }
    causes
}

fn config_data(object: &Value) -> Vec<Cause> {
    let keys = ["data", "binaryData"]
        .iter()
        .filter_map(|field| object[*field].as_object().map(|map| (field, map)));
    let mut causes = Vec::new();
    for (field, key) in keys.flat_map(|(field, map)| map.keys().map(move |key| (field, key))) {
        let fits = !key.is_empty()
            && key.len() <= 253
            && key
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
        if !fits {
            causes.push(Cause::new(
                format!("{field}[{key}]"),
                "Invalid value: a valid config key must consist of alphanumeric characters, '-', '_' or '.'",
            ));
        }
    }
    causes
}
