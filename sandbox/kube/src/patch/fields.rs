//! Field sets: which leaves of an object someone owns, and their text form (`fieldsV1`).
//!
//! In: an object with its merge rules. Out: paths, as sets. A path leads through fields, through list items by their
//! keys, or through items of a set of scalars; it ends at a scalar, at a list or map that is replaced as a whole, or at
//! a list item itself.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::lists::{Cursor, ListType};

/// A step of a path.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Step {
    /// A field of a map.
    Field(String),
    /// The list item with these keys (JSON text).
    Key(String),
    /// The scalar in a set (JSON text).
    Scalar(String),
}

/// Where a leaf is.
pub type Path = Vec<Step>;

/// Leaves.
pub type FieldSet = BTreeSet<Path>;

/// The leaves of an object with their values; an item of a list is itself a leaf with the value null.
pub fn leaves<'a>(object: &'a Value, cursor: Cursor<'a>) -> BTreeMap<Path, &'a Value> {
    let mut found = BTreeMap::new();
    if let Value::Object(map) = object {
        for (key, value) in map {
            match key.as_str() {
                "apiVersion" | "kind" => {}
                "metadata" => {
                    for (field, value) in value
                        .as_object()
                        .into_iter()
                        .flatten()
                        .filter(|(f, _)| is_owned_metadata(f))
                    {
                        let mut path = vec![Step::Field("metadata".into()), Step::Field(field.clone())];
                        collect(
                            value,
                            cursor.child("metadata").child(field),
                            &mut path,
                            &mut found,
                        );
                    }
                }
                _ => collect(
                    value,
                    cursor.child(key),
                    &mut vec![Step::Field(key.clone())],
                    &mut found,
                ),
            }
        }
    }
    found
}

fn is_owned_metadata(field: &str) -> bool {
    matches!(field, "labels" | "annotations" | "finalizers" | "ownerReferences")
}

fn collect<'a>(value: &'a Value, cursor: Cursor<'a>, path: &mut Path, found: &mut BTreeMap<Path, &'a Value>) {
    match value {
        Value::Object(map) if !map.is_empty() && !cursor.map_is_atomic() => {
            for (key, value) in map {
                path.push(Step::Field(key.clone()));
                collect(value, cursor.child(key), path, found);
                path.pop();
            }
        }
        Value::Array(list) if !list.is_empty() => match cursor.list_type() {
            ListType::Atomic => {
                found.insert(path.clone(), value);
            }
            ListType::Set => {
                for item in list {
                    path.push(Step::Scalar(item.to_string()));
                    found.insert(path.clone(), item);
                    path.pop();
                }
            }
            ListType::Map(keys) => {
                for item in list {
                    path.push(Step::Key(item_key(item, &keys)));
                    found.insert(path.clone(), &Value::Null);
                    for (key, value) in item.as_object().into_iter().flatten() {
                        path.push(Step::Field(key.clone()));
                        collect(value, cursor.item().child(key), path, found);
                        path.pop();
                    }
                    path.pop();
                }
            }
        },
        _ => {
            found.insert(path.clone(), value);
        }
    }
}

/// The keys of a list item as JSON text; an absent protocol is TCP.
pub fn item_key(item: &Value, keys: &[String]) -> String {
    let key: Map<String, Value> = keys
        .iter()
        .map(|key| {
            let default = if key == "protocol" {
                json!("TCP")
            } else {
                Value::Null
            };
            (key.clone(), item.get(key).cloned().unwrap_or(default))
        })
        .collect();
    Value::Object(key).to_string()
}

/// The item of a list with these keys (JSON text).
pub fn find_item(list: &[Value], key: &str) -> Option<usize> {
    let keys: Map<String, Value> = serde_json::from_str(key).ok()?;
    let names: Vec<String> = keys.keys().cloned().collect();
    list.iter().position(|item| item_key(item, &names) == key)
}

/// Removes the leaf at `path`, and maps and lists that it leaves empty.
pub fn remove(value: &mut Value, path: &[Step]) {
    let [step, rest @ ..] = path else { return };
    match (step, value) {
        (Step::Field(field), Value::Object(map)) => {
            let Some(child) = map.get_mut(field) else { return };
            if !rest.is_empty() {
                remove(child, rest);
            }
            if rest.is_empty() || is_empty(child) {
                map.remove(field);
            }
        }
        (Step::Key(key), Value::Array(list)) => {
            let Some(at) = find_item(list, key) else { return };
            if rest.is_empty() {
                list.remove(at);
            } else {
                remove(&mut list[at], rest);
            }
        }
        (Step::Scalar(text), Value::Array(list)) => {
            let gone: Option<Value> = serde_json::from_str(text).ok();
            list.retain(|item| Some(item) != gone.as_ref());
        }
        _ => {}
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}

/// A path as people read it: `.spec.ports[{"port":80}].name`.
pub fn display(path: &[Step]) -> String {
    path.iter()
        .map(|step| match step {
            Step::Field(field) => format!(".{field}"),
            Step::Key(key) => format!("[{key}]"),
            Step::Scalar(value) => format!("[={value}]"),
        })
        .collect()
}

/// The `fieldsV1` form of a set.
pub fn encode(set: &FieldSet) -> Value {
    let mut root = Map::new();
    for path in set {
        let mut here = &mut root;
        for step in path {
            let name = match step {
                Step::Field(field) => format!("f:{field}"),
                Step::Key(key) => format!("k:{key}"),
                Step::Scalar(value) => format!("v:{value}"),
            };
            let slot = here.entry(name).or_insert_with(|| json!({}));
            let Value::Object(map) = slot else {
                return Value::Null;
            };
            here = map;
        }
        // Paths come in order, so an item comes before its fields; "." marks it as owned itself.
        if matches!(path.last(), Some(Step::Key(_))) {
            here.insert(".".into(), json!({}));
        }
    }
    Value::Object(root)
}

/// The set of a `fieldsV1` form; what is malformed in it is left out.
pub fn decode(fields: &Value) -> FieldSet {
    let mut set = FieldSet::new();
    decode_into(fields, &mut Vec::new(), &mut set);
    set
}

fn decode_into(fields: &Value, path: &mut Path, set: &mut FieldSet) {
    let Some(map) = fields.as_object() else { return };
    if !path.is_empty()
        && (map.is_empty() || (map.contains_key(".") && matches!(path.last(), Some(Step::Key(_)))))
    {
        set.insert(path.clone());
    }
    for (name, inner) in map {
        let step = match name.split_once(':') {
            Some(("f", field)) => Step::Field(field.to_owned()),
            Some(("k", key)) => match serde_json::from_str::<Value>(key) {
                Ok(key) => Step::Key(key.to_string()),
                Err(_) => continue,
            },
            Some(("v", value)) => Step::Scalar(value.to_owned()),
            _ => continue,
        };
        path.push(step);
        decode_into(inner, path, set);
        path.pop();
    }
}
