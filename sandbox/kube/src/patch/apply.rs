//! Server-side apply, and who owns which field (`metadata.managedFields`).
//!
//! [`apply`] merges a configuration into an object as one manager; [`track`] records what any other write changed.
//! Pure; the time comes in. Invariants: a field that another manager owns with another value is a conflict unless
//! forced; a field that the manager applied before and leaves out now goes, unless someone else owns it too.

use std::collections::BTreeSet;

use k8s_openapi::jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::fields::{self, FieldSet, Step};
use super::lists::{Cursor, ListType};
use crate::error::ApiError;
use crate::meta;

/// Who writes.
#[derive(Clone, Copy, Debug)]
pub struct Writer<'a> {
    /// The field manager's name.
    pub manager: &'a str,
    /// The `apiVersion` that it writes in.
    pub api_version: &'a str,
    /// `status` or `scale`, or "".
    pub subresource: &'a str,
    /// When.
    pub now: Timestamp,
}

#[derive(Clone, Debug, PartialEq)]
struct Entry {
    manager: String,
    operation: String,
    api_version: String,
    subresource: String,
    time: String,
    fields: FieldSet,
}

const APPLY: &str = "Apply";
const UPDATE: &str = "Update";

impl Entry {
    fn is(&self, writer: &Writer<'_>, operation: &str) -> bool {
        self.manager == writer.manager
            && self.operation == operation
            && self.subresource == writer.subresource
    }

    fn new(writer: &Writer<'_>, operation: &str) -> Entry {
        Entry {
            manager: writer.manager.to_owned(),
            operation: operation.to_owned(),
            api_version: writer.api_version.to_owned(),
            subresource: writer.subresource.to_owned(),
            time: meta::rfc3339(writer.now),
            fields: FieldSet::new(),
        }
    }
}

fn decode(object: &Value) -> Vec<Entry> {
    let entry = |entry: &Value| {
        let text = |field: &str| meta::str_at(entry, &[field]).to_owned();
        Entry {
            manager: text("manager"),
            operation: text("operation"),
            api_version: text("apiVersion"),
            subresource: text("subresource"),
            time: text("time"),
            fields: entry.get("fieldsV1").map(fields::decode).unwrap_or_default(),
        }
    };
    meta::list_at(object, &["metadata", "managedFields"])
        .iter()
        .map(entry)
        .collect()
}

fn encode(object: &mut Value, entries: &[Entry]) {
    let list: Vec<Value> = entries
        .iter()
        .filter(|entry| !entry.fields.is_empty())
        .map(|entry| {
            let mut value = json!({
                "manager": entry.manager,
                "operation": entry.operation,
                "apiVersion": entry.api_version,
                "time": entry.time,
                "fieldsType": "FieldsV1",
                "fieldsV1": fields::encode(&entry.fields),
            });
            if !entry.subresource.is_empty() {
                value["subresource"] = json!(entry.subresource);
            }
            value
        })
        .collect();
    let metadata = meta::metadata_mut(object);
    if list.is_empty() {
        metadata.remove("managedFields");
    } else {
        metadata.insert("managedFields".into(), Value::Array(list));
    }
}

/// Records in `new` who owns what after a write that made `new` of `old`.
pub fn track(old: &Value, new: &mut Value, cursor: Cursor<'_>, writer: &Writer<'_>) {
    let before = fields::leaves(old, cursor);
    let after = fields::leaves(new, cursor);
    let gone: FieldSet = before
        .keys()
        .filter(|path| !after.contains_key(*path))
        .cloned()
        .collect();
    let set: FieldSet = after
        .iter()
        .filter(|(path, value)| before.get(*path) != Some(*value))
        .map(|(path, _)| path.clone())
        .collect();
    if gone.is_empty() && set.is_empty() {
        return;
    }
    let mut entries = decode(new);
    for entry in &mut entries {
        let mine = entry.is(writer, UPDATE);
        entry
            .fields
            .retain(|path| !gone.contains(path) && (mine || !set.contains(path)));
    }
    if !set.is_empty() {
        let mine = match entries.iter_mut().find(|e| e.is(writer, UPDATE)) {
            Some(mine) => mine,
            None => {
                entries.push(Entry::new(writer, UPDATE));
                // Pushed just above.
                let last = entries.len() - 1;
                &mut entries[last]
            }
        };
        mine.time = meta::rfc3339(writer.now);
        mine.api_version = writer.api_version.to_owned();
        mine.fields.extend(set);
    }
    encode(new, &entries);
}

/// Merges `config` into `live` as `writer`. With `force`, conflicting fields change hands.
pub fn apply(
    live: &Value,
    config: &Value,
    cursor: Cursor<'_>,
    writer: &Writer<'_>,
    force: bool,
) -> Result<Value, ApiError> {
    if meta::at(config, &["metadata", "managedFields"]).is_some() {
        return Err(ApiError::bad_request("metadata.managedFields must be nil"));
    }
    let mut entries = decode(live);
    let wanted = fields::leaves(config, cursor);
    let current = fields::leaves(live, cursor);
    let mut conflicts = BTreeSet::new();
    for entry in entries.iter_mut().filter(|e| !e.is(writer, APPLY)) {
        let lost: FieldSet = entry
            .fields
            .iter()
            .filter(|path| {
                wanted
                    .get(*path)
                    .is_some_and(|value| current.get(*path) != Some(value))
            })
            .cloned()
            .collect();
        if force {
            entry.fields.retain(|path| !lost.contains(path));
        } else {
            let label = if entry.subresource.is_empty() {
                format!("{} using {}", entry.manager, entry.api_version)
            } else {
                format!(
                    "{} with subresource {:?} using {}",
                    entry.manager, entry.subresource, entry.api_version
                )
            };
            conflicts.extend(lost.iter().map(|path| (label.clone(), fields::display(path))));
        }
    }
    if !conflicts.is_empty() {
        return Err(ApiError::apply_conflict(
            &conflicts.into_iter().collect::<Vec<_>>(),
        ));
    }
    let wanted: FieldSet = wanted.into_keys().collect();
    let mut merged = live.clone();
    merge(&mut merged, config, cursor);

    let others: FieldSet = entries
        .iter()
        .filter(|e| !e.is(writer, APPLY))
        .flat_map(|e| e.fields.iter().cloned())
        .collect();
    let at = entries.iter().position(|e| e.is(writer, APPLY));
    let mut mine = match at {
        Some(at) => entries.remove(at),
        None => Entry::new(writer, APPLY),
    };
    for path in mine.fields.difference(&wanted) {
        if !is_owned(path, &others) && !is_owned(path, &wanted) {
            fields::remove(&mut merged, path);
        }
    }
    if mine.fields != wanted {
        mine.time = meta::rfc3339(writer.now);
        mine.api_version = writer.api_version.to_owned();
        mine.fields = wanted;
    }
    entries.push(mine);
    encode(&mut merged, &entries);
    Ok(merged)
}

/// Whether the set has the path itself or, for a list item or a map, something in it.
fn is_owned(path: &[Step], set: &FieldSet) -> bool {
    set.range(path.to_vec()..)
        .next()
        .is_some_and(|found| found.starts_with(path))
}

fn merge(live: &mut Value, config: &Value, cursor: Cursor<'_>) {
    match (&mut *live, config) {
        (Value::Object(map), Value::Object(config)) if !cursor.map_is_atomic() => {
            for (key, value) in config {
                match map.get_mut(key) {
                    Some(slot) => merge(slot, value, cursor.child(key)),
                    None => {
                        map.insert(key.clone(), value.clone());
                    }
                }
            }
        }
        (Value::Array(list), Value::Array(config)) => match cursor.list_type() {
            ListType::Atomic => *list = config.clone(),
            ListType::Set => {
                for item in config {
                    if !list.contains(item) {
                        list.push(item.clone());
                    }
                }
            }
            ListType::Map(keys) => {
                for item in config {
                    match fields::find_item(list, &fields::item_key(item, &keys)) {
                        Some(at) => merge_item(&mut list[at], item, cursor.item()),
                        None => list.push(item.clone()),
                    }
                }
            }
        },
        _ => *live = config.clone(),
    }
}

fn merge_item(live: &mut Value, config: &Value, cursor: Cursor<'_>) {
    let empty = Map::new();
    let config = config.as_object().unwrap_or(&empty);
    for (key, value) in config {
        match live.get_mut(key) {
            Some(slot) => merge(slot, value, cursor.child(key)),
            None => live[key] = value.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CURSOR: Cursor<'static> = Cursor::Builtin {
        storage: "services",
        parent: "",
        field: "",
    };

    fn writer(manager: &str) -> Writer<'_> {
        Writer {
            manager,
            api_version: "v1",
            subresource: "",
            now: Timestamp::UNIX_EPOCH,
        }
    }

    fn service(ports: Value, labels: Value) -> Value {
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s", "labels": labels}, "spec": {"ports": ports}})
    }

    #[test]
    fn a_field_left_out_goes_unless_someone_else_owns_it() {
        let first = service(json!([{"port": 80}, {"port": 443}]), json!({"a": "1", "b": "2"}));
        let live = apply(&json!({}), &first, CURSOR, &writer("one"), false).unwrap();
        let live = apply(
            &live,
            &service(json!([{"port": 443}]), json!({"b": "2"})),
            CURSOR,
            &writer("two"),
            false,
        )
        .unwrap();
        let live = apply(
            &live,
            &service(json!([{"port": 80}]), json!({"a": "1"})),
            CURSOR,
            &writer("one"),
            false,
        )
        .unwrap();
        assert_eq!(live["metadata"]["labels"], json!({"a": "1", "b": "2"}));
        assert_eq!(live["spec"]["ports"], json!([{"port": 80}, {"port": 443}]));
        let live = apply(
            &live,
            &service(json!([]), json!({})),
            CURSOR,
            &writer("two"),
            false,
        )
        .unwrap();
        assert_eq!(live["metadata"]["labels"], json!({"a": "1"}));
    }

    #[test]
    fn another_value_is_a_conflict_unless_forced() {
        let live = apply(
            &json!({}),
            &service(json!([]), json!({"a": "1"})),
            CURSOR,
            &writer("one"),
            false,
        )
        .unwrap();
        let other = service(json!([]), json!({"a": "2"}));
        let refused = apply(&live, &other, CURSOR, &writer("two"), false).unwrap_err();
        assert_eq!((refused.code, refused.is_conflict()), (409, true));
        assert_eq!(refused.details["causes"][0]["field"], ".metadata.labels.a");
        let live = apply(&live, &other, CURSOR, &writer("two"), true).unwrap();
        assert_eq!(live["metadata"]["labels"]["a"], "2");
        // The first manager lost it: its next apply without the label does not remove it.
        let live = apply(
            &live,
            &service(json!([]), json!({})),
            CURSOR,
            &writer("one"),
            false,
        )
        .unwrap();
        assert_eq!(live["metadata"]["labels"]["a"], "2");
    }

    #[test]
    fn updates_take_ownership_of_what_they_change() {
        let live = apply(
            &json!({}),
            &service(json!([{"port": 80}]), json!({"a": "1"})),
            CURSOR,
            &writer("one"),
            false,
        )
        .unwrap();
        let mut new = live.clone();
        new["metadata"]["labels"]["a"] = json!("9");
        track(&live, &mut new, CURSOR, &writer("edit"));
        let refused = apply(
            &new,
            &service(json!([{"port": 80}]), json!({"a": "1"})),
            CURSOR,
            &writer("one"),
            false,
        );
        assert!(
            refused
                .unwrap_err()
                .message
                .contains("\"edit using v1\": .metadata.labels.a")
        );
    }

    #[test]
    fn applying_the_same_twice_changes_nothing() {
        let config = service(json!([{"port": 80, "name": "x"}]), json!({"a": "1"}));
        let once = apply(&json!({}), &config, CURSOR, &writer("one"), false).unwrap();
        assert_eq!(
            apply(&once, &config, CURSOR, &writer("one"), false).unwrap(),
            once
        );
    }

    #[test]
    fn field_sets_survive_their_text_form() {
        let config = service(
            json!([{"port": 80, "name": "x"}, {"port": 80, "protocol": "UDP"}]),
            json!({"a/b.c": "1"}),
        );
        let set: FieldSet = fields::leaves(&config, CURSOR).into_keys().collect();
        assert_eq!(fields::decode(&fields::encode(&set)), set);
    }
}
