//! Reading and writing object metadata in JSON objects, names and times.
//!
//! In and out: `serde_json::Value`s that are Kubernetes objects. No I/O, no clock. Times are `Timestamp`s; the text
//! form is RFC 3339 in whole seconds, as the API server writes them.

use k8s_openapi::jiff::Timestamp;
use serde_json::{Map, Value, json};

/// The string at `metadata.<field>`, or "".
pub fn field<'a>(object: &'a Value, field: &str) -> &'a str {
    object
        .get("metadata")
        .and_then(|m| m.get(field))
        .and_then(Value::as_str)
        .unwrap_or("")
}

/// `metadata.name`, or "".
pub fn name(object: &Value) -> &str {
    field(object, "name")
}

/// `metadata.namespace`, or "".
pub fn namespace(object: &Value) -> &str {
    field(object, "namespace")
}

/// `metadata.uid`, or "".
pub fn uid(object: &Value) -> &str {
    field(object, "uid")
}

/// `metadata.generation`, or 0.
pub fn generation(object: &Value) -> i64 {
    object
        .get("metadata")
        .and_then(|m| m.get("generation"))
        .and_then(Value::as_i64)
        .unwrap_or(0)
}

/// Whether `metadata.deletionTimestamp` is set.
pub fn is_terminating(object: &Value) -> bool {
    !field(object, "deletionTimestamp").is_empty()
}

/// The label `key`.
pub fn label<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    object.get("metadata")?.get("labels")?.get(key)?.as_str()
}

/// `metadata.labels`, if there are any.
pub fn labels(object: &Value) -> Option<&Map<String, Value>> {
    object.get("metadata")?.get("labels")?.as_object()
}

/// The annotation `key`.
pub fn annotation<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    object.get("metadata")?.get("annotations")?.get(key)?.as_str()
}

/// The value at a path of object keys.
pub fn at<'a>(object: &'a Value, path: &[&str]) -> Option<&'a Value> {
    path.iter()
        .try_fold(object, |value, key| value.get(key))
        .filter(|value| !value.is_null())
}

/// The string at a path, or "".
pub fn str_at<'a>(object: &'a Value, path: &[&str]) -> &'a str {
    at(object, path).and_then(Value::as_str).unwrap_or("")
}

/// The integer at a path.
pub fn int_at(object: &Value, path: &[&str]) -> Option<i64> {
    at(object, path).and_then(Value::as_i64)
}

/// The boolean at a path, or false.
pub fn bool_at(object: &Value, path: &[&str]) -> bool {
    at(object, path).and_then(Value::as_bool).unwrap_or(false)
}

/// The list at a path, or an empty one.
pub fn list_at<'a>(object: &'a Value, path: &[&str]) -> &'a [Value] {
    at(object, path)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

/// The map at `key` of `parent`, made when it is absent or of another type.
pub fn map_mut<'a>(parent: &'a mut Value, key: &str) -> &'a mut Map<String, Value> {
    if !parent.is_object() {
        *parent = json!({});
    }
    let slot = &mut parent[key];
    if !slot.is_object() {
        *slot = json!({});
    }
    match slot {
        Value::Object(map) => map,
        // Made an object just above.
        _ => unreachable!("slot is an object"),
    }
}

/// The value at `key` of `parent`, made a map when it is not one.
pub fn map_mut_value<'a>(parent: &'a mut Value, key: &str) -> &'a mut Value {
    map_mut(parent, key);
    &mut parent[key]
}

/// `metadata` as a map.
pub fn metadata_mut(object: &mut Value) -> &mut Map<String, Value> {
    map_mut(object, "metadata")
}

/// `metadata.finalizers`.
pub fn finalizers(object: &Value) -> impl Iterator<Item = &str> {
    list_at(object, &["metadata", "finalizers"])
        .iter()
        .filter_map(Value::as_str)
}

/// Adds a finalizer once.
pub fn add_finalizer(object: &mut Value, finalizer: &str) {
    if finalizers(object).any(|f| f == finalizer) {
        return;
    }
    let list = metadata_mut(object)
        .entry("finalizers")
        .or_insert_with(|| json!([]));
    if let Some(list) = list.as_array_mut() {
        list.push(json!(finalizer));
    }
}

/// Removes a finalizer; says whether it was there.
pub fn remove_finalizer(object: &mut Value, finalizer: &str) -> bool {
    let metadata = metadata_mut(object);
    let Some(list) = metadata.get_mut("finalizers").and_then(Value::as_array_mut) else {
        return false;
    };
    let before = list.len();
    list.retain(|f| f.as_str() != Some(finalizer));
    let removed = list.len() != before;
    if list.is_empty() {
        metadata.remove("finalizers");
    }
    removed
}

/// `metadata.ownerReferences`.
pub fn owner_references(object: &Value) -> &[Value] {
    list_at(object, &["metadata", "ownerReferences"])
}

/// The owner reference with `controller: true`.
pub fn controller_of(object: &Value) -> Option<&Value> {
    owner_references(object)
        .iter()
        .find(|owner| bool_at(owner, &["controller"]))
}

/// Whether the object's controller has this UID.
pub fn is_controlled_by(object: &Value, uid: &str) -> bool {
    controller_of(object).is_some_and(|owner| str_at(owner, &["uid"]) == uid)
}

/// An owner reference that says "`owner` controls this".
pub fn controller_reference(owner: &Value, api_version: &str, kind: &str) -> Value {
    json!({
        "apiVersion": api_version,
        "kind": kind,
        "name": name(owner),
        "uid": uid(owner),
        "controller": true,
        "blockOwnerDeletion": true,
    })
}

/// The condition of type `kind` in `status.conditions`.
pub fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a Value> {
    list_at(object, &["status", "conditions"])
        .iter()
        .find(|c| str_at(c, &["type"]) == kind)
}

/// Whether that condition's status is `True`.
pub fn condition_is_true(object: &Value, kind: &str) -> bool {
    condition(object, kind).is_some_and(|c| str_at(c, &["status"]) == "True")
}

/// Sets a condition; `lastTransitionTime` moves only when its status does. Says whether anything changed.
pub fn set_condition(
    object: &mut Value,
    kind: &str,
    status: &str,
    reason: &str,
    message: &str,
    now: Timestamp,
) -> bool {
    let new = |since: &str| {
        let mut condition = json!({"type": kind, "status": status, "lastTransitionTime": since});
        if !reason.is_empty() {
            condition["reason"] = json!(reason);
        }
        if !message.is_empty() {
            condition["message"] = json!(message);
        }
        condition
    };
    let status_map = map_mut(object, "status");
    let list = status_map.entry("conditions").or_insert_with(|| json!([]));
    let Some(list) = list.as_array_mut() else {
        return false;
    };
    let Some(old) = list.iter_mut().find(|c| str_at(c, &["type"]) == kind) else {
        list.push(new(&rfc3339(now)));
        return true;
    };
    let same = str_at(old, &["status"]) == status;
    if same && str_at(old, &["reason"]) == reason && str_at(old, &["message"]) == message {
        return false;
    }
    let since = if same {
        str_at(old, &["lastTransitionTime"]).to_owned()
    } else {
        rfc3339(now)
    };
    for (key, value) in new(&since).as_object().into_iter().flatten() {
        old[key] = value.clone();
    }
    true
}

/// `now` as the API writes it.
pub fn rfc3339(now: Timestamp) -> String {
    // Out of range only past the year 9999; jiff's own bounds are the same.
    let whole = Timestamp::from_second(now.as_second()).unwrap_or(now);
    whole.to_string()
}

/// Seconds since the epoch of a time in an object.
pub fn parse_time(text: &str) -> Option<i64> {
    text.parse::<Timestamp>().ok().map(|t| t.as_second())
}

/// Why a name is not a DNS subdomain (RFC 1123), which most kinds require.
pub fn check_subdomain(name: &str) -> Result<(), &'static str> {
    if name.len() > 253 {
        return Err("must be no more than 253 characters");
    }
    if name
        .split('.')
        .all(|label| !label.is_empty() && is_dns_label_text(label))
    {
        return Ok(());
    }
    Err(
        "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start \
         and end with an alphanumeric character (e.g. 'example.com')",
    )
}

/// Why a name is not a DNS label (RFC 1123), which namespaces require.
pub fn check_label(name: &str) -> Result<(), &'static str> {
    if name.len() > 63 {
        return Err("must be no more than 63 characters");
    }
    if !name.is_empty() && is_dns_label_text(name) {
        return Ok(());
    }
    Err(
        "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end \
         with an alphanumeric character (e.g. 'my-name' or '123-abc')",
    )
}

/// Why a name is not a DNS label (RFC 1035), which services require.
pub fn check_label_1035(name: &str) -> Result<(), &'static str> {
    if check_label(name).is_ok() && name.starts_with(|c: char| c.is_ascii_lowercase()) {
        return Ok(());
    }
    Err(
        "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic \
         character, and end with an alphanumeric character (e.g. 'my-name' or 'abc-123')",
    )
}

/// Why a name cannot be a path segment, which RBAC kinds require.
pub fn check_path_segment(name: &str) -> Result<(), &'static str> {
    if name == "." || name == ".." || name.contains(['/', '%']) {
        return Err("may not be '.' or '..' and may not contain '/' or '%'");
    }
    Ok(())
}

fn is_dns_label_text(label: &str) -> bool {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    label.chars().all(|c| inner(c) || c == '-') && label.starts_with(inner) && label.ends_with(inner)
}

/// Why a label or annotation key is malformed.
pub fn check_qualified_name(key: &str) -> Result<(), &'static str> {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    if prefix.is_some_and(|p| check_subdomain(&p.to_ascii_lowercase()).is_err()) {
        return Err("prefix part must be a lowercase RFC 1123 subdomain");
    }
    if name.is_empty() || name.len() > 63 || !is_label_text(name) {
        return Err(
            "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an \
                    alphanumeric character, and be no more than 63 characters",
        );
    }
    Ok(())
}

/// Why a label's value is malformed.
pub fn check_label_value(value: &str) -> Result<(), &'static str> {
    if value.is_empty() || (value.len() <= 63 && is_label_text(value)) {
        return Ok(());
    }
    Err(
        "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start \
         and end with an alphanumeric character, and be no more than 63 characters",
    )
}

fn is_label_text(text: &str) -> bool {
    let ends = |c: char| c.is_ascii_alphanumeric();
    text.chars().all(|c| ends(c) || matches!(c, '-' | '_' | '.'))
        && text.starts_with(ends)
        && text.ends_with(ends)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_at_both_sides_of_the_limits() {
        assert!(check_label(&"a".repeat(63)).is_ok());
        assert!(check_label(&"a".repeat(64)).is_err());
        assert!(check_subdomain("a.b-c.d").is_ok());
        for bad in ["", "-a", "a-", "A", "a..b", "a_b"] {
            assert!(check_subdomain(bad).is_err(), "{bad:?}");
        }
        assert!(check_label_1035("1a").is_err());
        assert!(check_qualified_name("kubernetes.io/a_b").is_ok());
        assert!(check_qualified_name("/x").is_err());
        assert!(check_label_value("").is_ok());
        assert!(check_label_value("-x").is_err());
    }

    #[test]
    fn transition_time_moves_with_the_status_only() {
        let t = |s| Timestamp::from_second(s).unwrap();
        let mut object = json!({});
        assert!(set_condition(&mut object, "Ready", "True", "A", "", t(10)));
        assert!(!set_condition(&mut object, "Ready", "True", "A", "", t(20)));
        assert!(set_condition(&mut object, "Ready", "True", "B", "", t(20)));
        assert_eq!(
            object["status"]["conditions"][0]["lastTransitionTime"],
            "1970-01-01T00:00:10Z"
        );
        assert!(set_condition(&mut object, "Ready", "False", "B", "", t(30)));
        assert_eq!(
            object["status"]["conditions"][0]["lastTransitionTime"],
            "1970-01-01T00:00:30Z"
        );
    }
}
