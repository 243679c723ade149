//! Label and field selectors: parsing of the query parameters and of `LabelSelector` objects, and matching.
//!
//! In: text as kubectl sends it, for example `app in (a,b),!canary`. Out: a list of requirements that all must hold.
//! Malformed text is refused with the part that is wrong; it never matches by accident.

use serde_json::Value;

use crate::meta;

/// Requirements on labels; all must hold. The empty selector matches everything.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LabelSelector(Vec<Requirement>);

#[derive(Clone, Debug, PartialEq)]
struct Requirement {
    key: String,
    test: Test,
}

#[derive(Clone, Debug, PartialEq)]
enum Test {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    Absent,
    Greater(i64),
    Less(i64),
}

/// A selector that cannot be parsed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("unable to parse selector {text:?}: {why}")]
pub struct SelectorError {
    text: String,
    why: String,
}

impl LabelSelector {
    /// Parses a `labelSelector` query parameter.
    pub fn parse(text: &str) -> Result<LabelSelector, SelectorError> {
        let refuse = |why: &str| SelectorError {
            text: text.to_owned(),
            why: why.to_owned(),
        };
        let mut requirements = Vec::new();
        for part in split_outside_parentheses(text) {
            let part = part.trim();
            if part.is_empty() {
                if text.trim().is_empty() {
                    break;
                }
                return Err(refuse("empty requirement"));
            }
            let requirement = parse_requirement(part).map_err(|why| refuse(&why))?;
            requirements.push(requirement);
        }
        Ok(LabelSelector(requirements))
    }

    /// The selector of a `LabelSelector` object (`matchLabels`, `matchExpressions`).
    pub fn from_object(object: &Value) -> Result<LabelSelector, SelectorError> {
        let mut requirements = LabelSelector::from_map(object.get("matchLabels")).0;
        for expression in meta::list_at(object, &["matchExpressions"]) {
            let key = meta::str_at(expression, &["key"]).to_owned();
            let values: Vec<String> = meta::list_at(expression, &["values"])
                .iter()
                .filter_map(|v| v.as_str().map(str::to_owned))
                .collect();
            let test = match meta::str_at(expression, &["operator"]) {
                "In" => Test::In(values),
                "NotIn" => Test::NotIn(values),
                "Exists" => Test::Exists,
                "DoesNotExist" => Test::Absent,
                other => {
                    return Err(SelectorError {
                        text: object.to_string(),
                        why: format!("{other:?} is not a valid label selector operator"),
                    });
                }
            };
            requirements.push(Requirement { key, test });
        }
        Ok(LabelSelector(requirements))
    }

    /// The selector of a plain map of labels, as in a Service.
    pub fn from_map(map: Option<&Value>) -> LabelSelector {
        let entries = map.and_then(Value::as_object).into_iter().flatten();
        LabelSelector(
            entries
                .map(|(key, value)| Requirement {
                    key: key.clone(),
                    test: Test::In(vec![value.as_str().unwrap_or_default().to_owned()]),
                })
                .collect(),
        )
    }

    /// Whether it has no requirement.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the object's labels fit.
    pub fn matches(&self, object: &Value) -> bool {
        self.0.iter().all(|r| {
            let value = meta::label(object, &r.key);
            match &r.test {
                Test::In(values) => value.is_some_and(|v| values.iter().any(|w| w == v)),
                Test::NotIn(values) => value.is_none_or(|v| values.iter().all(|w| w != v)),
                Test::Exists => value.is_some(),
                Test::Absent => value.is_none(),
                Test::Greater(bound) => value
                    .and_then(|v| v.parse::<i64>().ok())
                    .is_some_and(|v| v > *bound),
                Test::Less(bound) => value
                    .and_then(|v| v.parse::<i64>().ok())
                    .is_some_and(|v| v < *bound),
            }
        })
    }
}

fn split_outside_parentheses(text: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0usize, 0);
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

fn parse_requirement(part: &str) -> Result<Requirement, String> {
    let make = |key: &str, test| {
        let key = key.trim();
        meta::check_qualified_name(key).map_err(|why| format!("key {key:?}: {why}"))?;
        Ok(Requirement {
            key: key.to_owned(),
            test,
        })
    };
    let value = |text: &str| {
        let text = text.trim();
        meta::check_label_value(text).map_err(|why| format!("value {text:?}: {why}"))?;
        Ok::<_, String>(text.to_owned())
    };
    if let Some(list) = part.strip_suffix(')') {
        let (head, list) = list.split_once('(').ok_or("')' without '('")?;
        let values = list.split(',').map(value).collect::<Result<Vec<_>, _>>()?;
        let mut words = head.split_whitespace();
        return match (words.next(), words.next(), words.next()) {
            (Some(key), Some("in"), None) => make(key, Test::In(values)),
            (Some(key), Some("notin"), None) => make(key, Test::NotIn(values)),
            _ => Err(format!(
                "expected 'KEY in (...)' or 'KEY notin (...)' in {part:?}"
            )),
        };
    }
    if let Some(key) = part.strip_prefix('!').filter(|k| !k.starts_with('=')) {
        return make(key, Test::Absent);
    }
    if let Some((key, text)) = part.split_once("!=") {
        return make(key, Test::NotIn(vec![value(text)?]));
    }
    if let Some((key, text)) = part.split_once("==").or_else(|| part.split_once('=')) {
        return make(key, Test::In(vec![value(text)?]));
    }
    for (sign, greater) in [('>', true), ('<', false)] {
        if let Some((key, text)) = part.split_once(sign) {
            let bound = text
                .trim()
                .parse()
                .map_err(|_| format!("{text:?} is not an integer"))?;
            return make(
                key,
                if greater {
                    Test::Greater(bound)
                } else {
                    Test::Less(bound)
                },
            );
        }
    }
    make(part, Test::Exists)
}

/// Requirements on fields; all must hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FieldSelector(Vec<(String, bool, String)>);

impl FieldSelector {
    /// Parses a `fieldSelector` query parameter; `supported` says which fields the kind can select by.
    pub fn parse(text: &str, supported: impl Fn(&str) -> bool) -> Result<FieldSelector, SelectorError> {
        let refuse = |why: String| SelectorError {
            text: text.to_owned(),
            why,
        };
        let mut requirements = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (field, equal, value) = if let Some((field, value)) = part.split_once("!=") {
                (field, false, value)
            } else if let Some((field, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
                (field, true, value)
            } else {
                return Err(refuse(format!("expected FIELD=VALUE in {part:?}")));
            };
            if !supported(field) {
                return Err(refuse(format!("field label not supported: {field}")));
            }
            requirements.push((field.to_owned(), equal, value.to_owned()));
        }
        Ok(FieldSelector(requirements))
    }

    /// Whether it has no requirement.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The one name that can match, if the selector says so: then no scan is needed.
    pub fn exact_name(&self) -> Option<&str> {
        let exact = self
            .0
            .iter()
            .find(|(field, equal, _)| *equal && field == "metadata.name");
        exact.map(|(_, _, name)| name.as_str())
    }

    /// Whether the object's fields fit. An absent field reads as "" (booleans as "false").
    pub fn matches(&self, object: &Value) -> bool {
        self.0.iter().all(|(field, equal, want)| {
            let found = field.split('.').try_fold(object, |value, key| value.get(key));
            let fits = match found {
                Some(Value::String(text)) => text == want,
                Some(Value::Null) | None => want.is_empty() || (want == "false" && is_boolean_field(field)),
                Some(other) => serde_json::from_str::<Value>(want).is_ok_and(|want| want == *other),
            };
            fits == *equal
        })
    }
}

fn is_boolean_field(field: &str) -> bool {
    matches!(field, "spec.unschedulable" | "spec.hostNetwork")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(selector: &str, labels: Value, want: bool) {
        let object = json!({"metadata": {"labels": labels}});
        assert_eq!(
            LabelSelector::parse(selector).unwrap().matches(&object),
            want,
            "{selector}"
        );
    }

    #[test]
    fn label_selectors() {
        check("", json!({}), true);
        check("a=b", json!({"a": "b"}), true);
        check("a==b,c!=d", json!({"a": "b"}), true);
        check("a=b,c!=d", json!({"a": "b", "c": "d"}), false);
        check("a in (x, y),b", json!({"a": "y", "b": ""}), true);
        check("a notin (x,y)", json!({"a": "x"}), false);
        check("a notin (x,y)", json!({}), true);
        check("!a", json!({"a": ""}), false);
        check("n>3,n<5", json!({"n": "4"}), true);
        check("kubernetes.io/x=", json!({"kubernetes.io/x": ""}), true);
    }

    #[test]
    fn malformed_selectors_are_refused() {
        for bad in [
            "a=b,,c", "a in b", "a on (b)", "a=b c", "=x", "a>b", "a in (b", "!",
        ] {
            assert!(LabelSelector::parse(bad).is_err(), "{bad}");
        }
        assert!(FieldSelector::parse("spec.x=1", |_| false).is_err());
        assert!(FieldSelector::parse("spec.x", |_| true).is_err());
    }

    #[test]
    fn field_selectors() {
        let object = json!({"metadata": {"name": "n"}, "spec": {"nodeName": "a"}});
        let matches = |text| FieldSelector::parse(text, |_| true).unwrap().matches(&object);
        assert!(matches("metadata.name=n,spec.nodeName!=b"));
        assert!(matches("spec.unschedulable=false,status.phase="));
        assert!(!matches("spec.nodeName="));
    }
}
