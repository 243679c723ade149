//! The scale subresource: how many replicas an object has, in one form for all kinds.

use serde_json::{Value, json};

use crate::error::ApiError;
use crate::kind::Kind;
use crate::meta;

fn path<'a>(kind: &'a Kind, field: &str, default: &'a str) -> Vec<&'a str> {
    let custom = kind.custom.as_ref().and_then(|c| c.scale.as_ref());
    let path = match custom {
        Some(scale) => meta::str_at(scale, &[field]),
        None => default,
    };
    path.split('.').filter(|part| !part.is_empty()).collect()
}

/// The `Scale` of an object.
pub fn of(kind: &Kind, object: &Value) -> Value {
    let selector = match &kind.custom {
        Some(_) => meta::str_at(object, &path(kind, "labelSelectorPath", "")).to_owned(),
        None => selector_text(&object["spec"]["selector"]),
    };
    let metadata = |field: &str| object["metadata"][field].clone();
    json!({
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {
            "name": metadata("name"),
            "namespace": metadata("namespace"),
            "uid": metadata("uid"),
            "resourceVersion": metadata("resourceVersion"),
            "creationTimestamp": metadata("creationTimestamp"),
        },
        "spec": {"replicas": meta::int_at(object, &path(kind, "specReplicasPath", ".spec.replicas")).unwrap_or(0)},
        "status": {
            "replicas": meta::int_at(object, &path(kind, "statusReplicasPath", ".status.replicas")).unwrap_or(0),
            "selector": selector,
        },
    })
}

/// The object with the replicas of `scale`.
pub fn onto(kind: &Kind, object: &Value, scale: &Value) -> Result<Value, ApiError> {
    let replicas = meta::int_at(scale, &["spec", "replicas"]).unwrap_or(0);
    if !(0..=i64::from(i32::MAX)).contains(&replicas) {
        return Err(ApiError::bad_request(format!(
            "spec.replicas: {replicas} is out of range"
        )));
    }
    let mut object = object.clone();
    let path = path(kind, "specReplicasPath", ".spec.replicas");
    let Some((last, parents)) = path.split_last() else {
        return Err(ApiError::unknown_path());
    };
    let mut here = &mut object;
    for parent in parents {
        here = meta::map_mut_value(here, parent);
    }
    here[*last] = json!(replicas);
    for field in ["resourceVersion", "uid"] {
        let value = meta::field(scale, field);
        if !value.is_empty() {
            object["metadata"][field] = json!(value);
        }
    }
    Ok(object)
}

fn selector_text(selector: &Value) -> String {
    let labels = selector
        .get("matchLabels")
        .unwrap_or(selector)
        .as_object()
        .into_iter()
        .flatten();
    let parts: Vec<String> = labels
        .filter_map(|(key, value)| Some(format!("{key}={}", value.as_str()?)))
        .collect();
    parts.join(",")
}
