//! `isthmus db show`: any of the agent's tables, whose rows are JSON objects.

use serde_json::Value;

use crate::output::{Columns, Format, json};

/// The agent's text is no table.
#[derive(Debug, thiserror::Error)]
#[error("the agent's table is not a JSON array; it may be of another version: isthmus version")]
pub struct TableError(#[source] serde_json::Error);

/// The text. Columns are the fields of all rows, in the order in which they first come.
pub fn render(text: &str, format: Format) -> Result<String, TableError> {
    let rows: Vec<Value> = serde_json::from_str(text).map_err(TableError)?;
    if format == Format::Json {
        return Ok(json(&rows));
    }
    let mut fields: Vec<&str> = Vec::new();
    for field in rows
        .iter()
        .filter_map(Value::as_object)
        .flat_map(|row| row.keys())
    {
        if !fields.contains(&field.as_str()) {
            fields.push(field);
        }
    }
    if fields.is_empty() {
        let mut columns = Columns::new(&["VALUE"], &[]);
        rows.iter().for_each(|row| columns.row([cell(row)]));
        return Ok(columns.finish("The table is empty."));
    }
    let headings: Vec<_> = fields.iter().map(|field| heading(field)).collect();
    let mut columns = Columns::new(&headings.iter().map(String::as_str).collect::<Vec<_>>(), &[]);
    for row in &rows {
        columns.row(
            fields
                .iter()
                .map(|field| row.get(field).map(cell).unwrap_or_default()),
        );
    }
    Ok(columns.finish("The table is empty."))
}

/// `podName` and `pod_name` become `POD-NAME`.
fn heading(field: &str) -> String {
    let mut heading = String::new();
    for c in field.chars() {
        match c {
            '_' | ' ' => heading.push('-'),
            c if c.is_uppercase() && !heading.is_empty() => {
                heading.push('-');
                heading.push(c);
            }
            c => heading.extend(c.to_uppercase()),
        }
    }
    heading
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(values) if values.iter().all(|value| !value.is_array() && !value.is_object()) => {
            values.iter().map(cell).collect::<Vec<_>>().join(",")
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn columns_come_from_all_rows() {
        let text = r#"[{"name":"a","podCIDRs":["10.1.0.0/24","fd00::/64"]},{"name":"b","labels":{"x":"y"},"gone":null}]"#;
        let got = render(text, Format::Table).unwrap();
        assert!(got.starts_with("NAME   "), "{got}");
        assert!(got.contains("10.1.0.0/24,fd00::/64"), "{got}");
        assert!(got.contains(r#"{"x":"y"}"#), "{got}");
        assert_eq!(render("[]", Format::Table).unwrap(), "The table is empty.\n");
        assert_eq!(render("[1,2]", Format::Table).unwrap(), "VALUE\n1\n2\n");
        assert_eq!(render("[]", Format::Json).unwrap(), "[]\n");
        assert!(render("{}", Format::Table).is_err());
    }

    #[test]
    fn headings_are_words() {
        assert_eq!(heading("podName"), "POD-NAME");
        assert_eq!(heading("pod_name"), "POD-NAME");
        assert_eq!(heading("pod-name"), "POD-NAME");
    }

    proptest! {
        #[test]
        fn nothing_panics(text in ".{0,80}", format in prop_oneof![Just(Format::Table), Just(Format::Json)]) {
            let _ = render(&text, format);
            let _ = render(&format!("[{{\"{}\":1}}]", text.escape_default()), format);
        }
    }
}
