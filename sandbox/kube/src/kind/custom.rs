//! Custom kinds, from CustomResourceDefinition objects.
//!
//! In: a definition. Out: a [`Kind`] per served version, and the definition's own status. Objects of custom kinds are
//! checked against the part of the structural schema that matters for a small cluster: types, required fields, enums
//! and bounds; unknown fields are pruned unless the schema keeps them, and defaults are filled in.

use std::sync::Arc;

use k8s_openapi::jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::{Kind, Subresources};
use crate::error::Cause;
use crate::meta;
use crate::store::ResourceId;

/// What is particular to one version of a custom kind.
#[derive(Clone, Debug)]
pub struct Custom {
    /// The version in which objects are stored.
    pub storage_version: String,
    /// The structural schema (`openAPIV3Schema`).
    pub schema: Value,
    /// `additionalPrinterColumns`.
    pub columns: Vec<Value>,
    /// The `scale` subresource's paths.
    pub scale: Option<Value>,
}

/// The resource that a definition defines.
pub fn storage_of(definition: &Value) -> ResourceId {
    ResourceId::new(
        meta::str_at(definition, &["spec", "group"]),
        meta::str_at(definition, &["spec", "names", "plural"]),
    )
}

/// The kinds that a definition serves.
pub fn kinds(definition: &Value) -> Vec<Kind> {
    let group = meta::str_at(definition, &["spec", "group"]);
    let names = |field: &str| meta::str_at(definition, &["spec", "names", field]).to_owned();
    let words = |field: &str| -> Vec<String> {
        let list = meta::list_at(definition, &["spec", "names", field]);
        list.iter()
            .filter_map(|w| w.as_str().map(str::to_owned))
            .collect()
    };
    let versions = meta::list_at(definition, &["spec", "versions"]);
    let stored = versions.iter().find(|v| meta::bool_at(v, &["storage"]));
    let storage_version = stored.map_or("", |v| meta::str_at(v, &["name"]));
    versions
        .iter()
        .filter(|version| meta::bool_at(version, &["served"]))
        .map(|version| Kind {
            group: group.to_owned(),
            version: meta::str_at(version, &["name"]).to_owned(),
            kind: names("kind"),
            list_kind: names("listKind"),
            plural: names("plural"),
            singular: names("singular"),
            short_names: words("shortNames"),
            categories: words("categories"),
            namespaced: meta::str_at(definition, &["spec", "scope"]) == "Namespaced",
            subresources: Subresources {
                status: meta::at(version, &["subresources", "status"]).is_some(),
                scale: meta::at(version, &["subresources", "scale"]).is_some(),
            },
            storage: storage_of(definition),
            check: None,
            custom: Some(Arc::new(Custom {
                storage_version: storage_version.to_owned(),
                schema: meta::at(version, &["schema", "openAPIV3Schema"])
                    .cloned()
                    .unwrap_or(Value::Null),
                columns: meta::list_at(version, &["additionalPrinterColumns"]).to_vec(),
                scale: meta::at(version, &["subresources", "scale"]).cloned(),
            })),
            virtual_only: false,
        })
        .collect()
}

/// Fills in a definition's defaults and says what is wrong with it.
pub fn default_and_check(definition: &mut Value) -> Vec<Cause> {
    let names = meta::map_mut(meta::map_mut_value(definition, "spec"), "names");
    let kind = names.get("kind").and_then(Value::as_str).unwrap_or("").to_owned();
    names
        .entry("listKind")
        .or_insert_with(|| json!(format!("{kind}List")));
    names
        .entry("singular")
        .or_insert_with(|| json!(kind.to_ascii_lowercase()));
    let mut causes = Vec::new();
    let want = storage_of(definition).to_string();
    if meta::name(definition) != want {
        causes.push(Cause::new(
            "metadata.name",
            format!("must be spec.names.plural+\".\"+spec.group ({want:?})"),
        ));
    }
    let scope = meta::str_at(definition, &["spec", "scope"]);
    if !matches!(scope, "Namespaced" | "Cluster") {
        causes.push(Cause::new(
            "spec.scope",
            format!("Unsupported value: {scope:?}: takes Cluster, Namespaced"),
        ));
    }
    let versions = meta::list_at(definition, &["spec", "versions"]);
    if versions.iter().filter(|v| meta::bool_at(v, &["storage"])).count() != 1 {
        causes.push(Cause::new(
            "spec.versions",
            "must have exactly one version marked as storage version",
        ));
    }
    for (at, version) in versions.iter().enumerate() {
        if meta::at(version, &["schema", "openAPIV3Schema"]).is_none() {
            let field = format!("spec.versions[{at}].schema.openAPIV3Schema");
            causes.push(Cause::new(field, "Required value: schemas are required"));
        }
    }
    causes
}

/// The status of an accepted definition.
pub fn establish(definition: &mut Value, now: Timestamp) {
    let accepted = definition["spec"]["names"].clone();
    let stored: Vec<Value> = meta::list_at(definition, &["spec", "versions"])
        .iter()
        .filter(|v| meta::bool_at(v, &["storage"]))
        .map(|v| v["name"].clone())
        .collect();
    meta::set_condition(
        definition,
        "NamesAccepted",
        "True",
        "NoConflicts",
        "no conflicts found",
        now,
    );
    let message = "the initial names have been accepted";
    meta::set_condition(
        definition,
        "Established",
        "True",
        "InitialNamesAccepted",
        message,
        now,
    );
    let status = meta::map_mut(definition, "status");
    status.insert("acceptedNames".into(), accepted);
    status.insert("storedVersions".into(), json!(stored));
}

/// Prunes, defaults and checks an object by its schema.
pub fn apply_schema(schema: &Value, object: &mut Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    if schema.is_object() {
        walk(schema, object, "", true, &mut causes);
    }
    causes
}

fn walk(schema: &Value, value: &mut Value, path: &str, root: bool, causes: &mut Vec<Cause>) {
    if value.is_null() {
        return;
    }
    let any_type = meta::bool_at(schema, &["x-kubernetes-int-or-string"]);
    let want = meta::str_at(schema, &["type"]);
    let fits = match want {
        _ if any_type => value.is_string() || value.is_i64(),
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|f| f.fract() == 0.0),
        "number" => value.is_number(),
        _ => true,
    };
    if !fits {
        let got = type_name(value);
        causes.push(Cause::new(
            path,
            format!("Invalid value: {got:?}: must be of type {want}: {got:?}"),
        ));
        return;
    }
    check_bounds(schema, value, path, causes);
    match value {
        Value::Object(map) => walk_object(schema, map, path, root, causes),
        Value::Array(list) => {
            if let Some(items) = schema.get("items") {
                for (at, item) in list.iter_mut().enumerate() {
                    walk(items, item, &format!("{path}[{at}]"), false, causes);
                }
            }
        }
        _ => {}
    }
}

fn walk_object(
    schema: &Value,
    map: &mut Map<String, Value>,
    path: &str,
    root: bool,
    causes: &mut Vec<Cause>,
) {
    let join = |key: &str| {
        if path.is_empty() {
            key.to_owned()
        } else {
            format!("{path}.{key}")
        }
    };
    let properties = schema.get("properties").and_then(Value::as_object);
    let additional = schema.get("additionalProperties").filter(|a| a.is_object());
    let keeps = meta::bool_at(schema, &["x-kubernetes-preserve-unknown-fields"])
        || schema.get("additionalProperties").and_then(Value::as_bool) == Some(true);
    let fixed = |key: &str| {
        let embedded = root || meta::bool_at(schema, &["x-kubernetes-embedded-resource"]);
        embedded && matches!(key, "apiVersion" | "kind" | "metadata")
    };
    map.retain(|key, value| {
        let declared = properties.and_then(|p| p.get(key.as_str()));
        // A null for a field that may not be null counts as absent.
        if value.is_null() && declared.is_some_and(|d| !meta::bool_at(d, &["nullable"])) {
            return false;
        }
        keeps || fixed(key) || declared.is_some() || additional.is_some()
    });
    for (key, property) in properties.into_iter().flatten() {
        if let Some(default) = property.get("default")
            && !map.contains_key(key)
        {
            map.insert(key.clone(), default.clone());
        }
    }
    for required in meta::list_at(schema, &["required"])
        .iter()
        .filter_map(Value::as_str)
    {
        if !map.contains_key(required) {
            causes.push(Cause::new(join(required), "Required value"));
        }
    }
    for (key, value) in map.iter_mut().filter(|(key, _)| !fixed(key)) {
        if let Some(schema) = properties.and_then(|p| p.get(key)).or(additional) {
            walk(schema, value, &join(key), false, causes);
        }
    }
}

fn check_bounds(schema: &Value, value: &Value, path: &str, causes: &mut Vec<Cause>) {
    let mut refuse = |why: String| causes.push(Cause::new(path, format!("Invalid value: {value}: {why}")));
    if let Some(allowed) = schema.get("enum").and_then(Value::as_array)
        && !allowed.contains(value)
    {
        let allowed: Vec<String> = allowed.iter().map(Value::to_string).collect();
        refuse(format!("supported values: {}", allowed.join(", ")));
    }
    let bound = |name: &str| schema.get(name).and_then(Value::as_f64);
    let size = match value {
        Value::Number(number) => {
            let number = number.as_f64().unwrap_or(0.0);
            if bound("minimum").is_some_and(|min| number < min) {
                refuse(format!(
                    "should be greater than or equal to {}",
                    schema["minimum"]
                ));
            }
            if bound("maximum").is_some_and(|max| number > max) {
                refuse(format!("should be less than or equal to {}", schema["maximum"]));
            }
            return;
        }
        Value::String(text) => (text.chars().count(), "minLength", "maxLength"),
        Value::Array(list) => (list.len(), "minItems", "maxItems"),
        Value::Object(map) => (map.len(), "minProperties", "maxProperties"),
        _ => return,
    };
    let (len, min, max) = size;
    if bound(min).is_some_and(|b| (len as f64) < b) {
        refuse(format!("{min} is {}", schema[min]));
    }
    if bound(max).is_some_and(|b| len as f64 > b) {
        refuse(format!("{max} is {}", schema[max]));
    }
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(n) if n.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schema_prunes_defaults_and_refuses() {
        let schema = json!({
            "type": "object",
            "properties": {"spec": {
                "type": "object",
                "required": ["size"],
                "properties": {
                    "size": {"type": "integer", "minimum": 1},
                    "mode": {"type": "string", "enum": ["a", "b"], "default": "a"},
                    "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
                },
            }},
        });
        let mut good = json!({"kind": "X", "metadata": {"name": "x"}, "junk": 1, "spec": {"size": 2, "y": 1, "free": {"z": 1}}});
        assert_eq!(apply_schema(&schema, &mut good), []);
        let want = json!({"kind": "X", "metadata": {"name": "x"}, "spec": {"size": 2, "mode": "a", "free": {"z": 1}}});
        assert_eq!(good, want);
        for bad in [
            json!({}),
            json!({"size": 0}),
            json!({"size": "1"}),
            json!({"size": 1, "mode": "c"}),
        ] {
            assert_eq!(apply_schema(&schema, &mut json!({"spec": bad})).len(), 1, "{bad}");
        }
    }
}
