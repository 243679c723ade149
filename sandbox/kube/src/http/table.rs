//! Tables: what `kubectl get` prints.
//!
//! In: objects in wire form. Out: a `Table` with the columns that a real server has for the common kinds; custom kinds
//! have those of their definition; all others NAME and AGE. Ages are computed here, from the clock of the server.

use serde_json::{Value, json};

use crate::kind::Kind;
use crate::meta;

mod columns;

use columns::columns;

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
