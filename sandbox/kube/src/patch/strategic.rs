//! Strategic merge patch: maps merge, lists of the API types merge by key, and directives say the rest.
//!
//! Directives: `$patch: replace|delete|merge` in a map or list item, `$retainKeys`,
//! `$deleteFromPrimitiveList/<field>`, `$setElementOrder/<field>`.

use serde_json::{Map, Value};

use super::lists::{Cursor, Strategic};
use crate::error::ApiError;

const ORDER: &str = "$setElementOrder/";
const DELETE: &str = "$deleteFromPrimitiveList/";

/// Applies a strategic merge patch.
pub fn merge(object: &Value, patch: &Value, cursor: Cursor<'_>) -> Result<Value, ApiError> {
    let Value::Object(patch) = patch else {
        return Err(ApiError::bad_request(
            "error decoding strategic merge patch: must be a JSON object",
        ));
    };
    let mut merged = object.clone();
    merge_map(&mut merged, patch, cursor)?;
    Ok(merged)
}

fn merge_map(target: &mut Value, patch: &Map<String, Value>, cursor: Cursor<'_>) -> Result<(), ApiError> {
    match patch.get("$patch").and_then(Value::as_str) {
        Some("replace") => {
            *target = Value::Object(
                patch
                    .iter()
                    .filter(|(key, _)| !key.starts_with('$'))
                    .map(own)
                    .collect(),
            );
            return Ok(());
        }
        Some("delete") => {
            *target = Value::Object(Map::new());
            return Ok(());
        }
        Some("merge") | None => {}
        Some(other) => {
            return Err(ApiError::bad_request(format!(
                "unknown $patch directive {other:?}"
            )));
        }
    }
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(map) = target else { return Ok(()) };
    if let Some(keep) = patch.get("$retainKeys").and_then(Value::as_array) {
        map.retain(|key, _| keep.iter().any(|k| k.as_str() == Some(key)));
    }
    for (key, gone) in patch
        .iter()
        .filter_map(|(key, value)| Some((key.strip_prefix(DELETE)?, value)))
    {
        if let (Some(list), Some(gone)) = (map.get_mut(key).and_then(Value::as_array_mut), gone.as_array()) {
            list.retain(|item| !gone.contains(item));
        }
    }
    for (key, value) in patch.iter().filter(|(key, _)| !key.starts_with('$')) {
        let here = cursor.child(key);
        match value {
            Value::Null => {
                map.remove(key);
            }
            Value::Object(patch) => {
                let slot = map.entry(key.clone()).or_insert(Value::Null);
                let deleted = patch.get("$patch").and_then(Value::as_str) == Some("delete");
                merge_map(slot, patch, here)?;
                if deleted {
                    map.remove(key);
                }
            }
            Value::Array(items) => {
                let slot = map.entry(key.clone()).or_insert_with(|| Value::Array(Vec::new()));
                merge_list(slot, items, here)?;
            }
            scalar => {
                map.insert(key.clone(), scalar.clone());
            }
        }
    }
    for (key, order) in patch
        .iter()
        .filter_map(|(key, value)| Some((key.strip_prefix(ORDER)?, value)))
    {
        if let (Some(list), Some(order)) = (map.get_mut(key).and_then(Value::as_array_mut), order.as_array())
        {
            sort_by_order(list, order, cursor.child(key).strategic());
        }
    }
    Ok(())
}

fn own((key, value): (&String, &Value)) -> (String, Value) {
    (key.clone(), value.clone())
}

fn merge_list(target: &mut Value, patch: &[Value], cursor: Cursor<'_>) -> Result<(), ApiError> {
    let directive = |item: &Value| item.get("$patch").and_then(Value::as_str).map(str::to_owned);
    if patch
        .iter()
        .any(|item| directive(item).as_deref() == Some("replace"))
    {
        *target = Value::Array(
            patch
                .iter()
                .filter(|item| directive(item).is_none())
                .cloned()
                .collect(),
        );
        return Ok(());
    }
    if !target.is_array() {
        *target = Value::Array(Vec::new());
    }
    let Value::Array(list) = target else { return Ok(()) };
    match cursor.strategic() {
        Strategic::Replace => *list = patch.to_vec(),
        Strategic::Scalars => {
            for item in patch {
                if !list.contains(item) {
                    list.push(item.clone());
                }
            }
        }
        Strategic::Key(key) => {
            for item in patch {
                let Value::Object(fields) = item else {
                    return Err(ApiError::bad_request(format!(
                        "map: {item} of a list that merges by {key:?}"
                    )));
                };
                let Some(id) = fields.get(key) else {
                    return Err(ApiError::bad_request(format!(
                        "map: {item} does not contain declared merge key: {key}"
                    )));
                };
                let at = list.iter().position(|old| old.get(key) == Some(id));
                match (directive(item).as_deref(), at) {
                    (Some("delete"), _) => list.retain(|old| old.get(key) != Some(id)),
                    (_, Some(at)) => merge_map(&mut list[at], fields, cursor.item())?,
                    (_, None) => {
                        let mut new = Value::Null;
                        merge_map(&mut new, fields, cursor.item())?;
                        list.push(new);
                    }
                }
            }
        }
    }
    Ok(())
}

/// Items that `order` names come in its order; the others keep their places after them.
fn sort_by_order(list: &mut [Value], order: &[Value], how: Strategic) {
    let rank = |item: &Value| {
        let found = match how {
            Strategic::Key(key) => order.iter().position(|o| o.get(key) == item.get(key)),
            Strategic::Scalars | Strategic::Replace => order.iter().position(|o| o == item),
        };
        found.unwrap_or(usize::MAX)
    };
    list.sort_by_key(rank);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(object: Value, patch: Value, want: Value) {
        let cursor = Cursor::Builtin {
            storage: "pods",
            parent: "",
            field: "",
        };
        assert_eq!(merge(&object, &patch, cursor).unwrap(), want);
    }

    #[test]
    fn lists_merge_by_key() {
        let object = json!({"spec": {"containers": [{"name": "a", "image": "1"}, {"name": "b"}]}});
        check(
            object.clone(),
            json!({"spec": {"containers": [{"name": "a", "image": "2"}, {"name": "c"}]}}),
            json!({"spec": {"containers": [{"name": "a", "image": "2"}, {"name": "b"}, {"name": "c"}]}}),
        );
        check(
            object.clone(),
            json!({"spec": {"containers": [{"name": "a", "$patch": "delete"}]}}),
            json!({"spec": {"containers": [{"name": "b"}]}}),
        );
        check(
            object.clone(),
            json!({"spec": {"containers": [{"$patch": "replace"}, {"name": "z"}]}}),
            json!({"spec": {"containers": [{"name": "z"}]}}),
        );
        check(
            object,
            json!({"spec": {"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}], "containers": [{"name": "b", "image": "3"}]}}),
            json!({"spec": {"containers": [{"name": "b", "image": "3"}, {"name": "a", "image": "1"}]}}),
        );
    }

    #[test]
    fn scalars_atomic_lists_and_nulls() {
        check(
            json!({"metadata": {"finalizers": ["a", "b"], "labels": {"x": "1", "y": "2"}}}),
            json!({"metadata": {"finalizers": ["c"], "$deleteFromPrimitiveList/finalizers": ["a"], "labels": {"x": null}}}),
            json!({"metadata": {"finalizers": ["b", "c"], "labels": {"y": "2"}}}),
        );
        check(
            json!({"spec": {"containers": [{"name": "a", "args": ["1", "2"]}]}}),
            json!({"spec": {"containers": [{"name": "a", "args": ["3"]}]}}),
            json!({"spec": {"containers": [{"name": "a", "args": ["3"]}]}}),
        );
        check(
            json!({"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {}}}}),
            json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}}),
            json!({"spec": {"strategy": {"type": "Recreate"}}}),
        );
    }

    #[test]
    fn a_list_item_without_its_key_is_refused() {
        let cursor = Cursor::Builtin {
            storage: "pods",
            parent: "",
            field: "",
        };
        let patch = json!({"spec": {"containers": [{"image": "x"}]}});
        assert!(merge(&json!({}), &patch, cursor).is_err());
    }
}
