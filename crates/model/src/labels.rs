//! Security labels and their one canonical text, the label string that identities are allocated for.
//!
//! Source: Cilium's `pkg/labels` and `pkg/identity/key`: `source:key=value;` for each label, ascending by key,
//! each ending in a semicolon, `=` written even for an empty value.

use std::{collections::BTreeMap, fmt};

/// Source of every label that comes from Kubernetes.
pub const SOURCE_K8S: &str = "k8s";
/// Label that names the cluster; remote readers refuse an identity without it.
pub const POLICY_CLUSTER: &str = "io.cilium.k8s.policy.cluster";
/// Label that names the namespace.
pub const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
/// Label that names the service account.
pub const POLICY_SERVICE_ACCOUNT: &str = "io.cilium.k8s.policy.serviceaccount";
/// Prefix of the labels copied from the namespace.
pub const NAMESPACE_LABELS_PREFIX: &str = "io.cilium.k8s.namespace.labels.";

/// One label without its key.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Label {
    /// Where it comes from: `k8s`, `reserved`, `cidr`, ...
    pub source: String,
    /// May be empty.
    pub value: String,
}

/// A set of labels with unique keys.
#[derive(Clone, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Labels(BTreeMap<String, Label>);

/// A label string that does not parse.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum LabelParseError {
    /// Longer than [`Labels::MAX_TEXT_LEN`].
    #[error("label string of {0} bytes is longer than the limit of {limit}", limit = Labels::MAX_TEXT_LEN)]
    TooLong(usize),
    /// The last label lacks its semicolon, or the text is empty.
    #[error("label string does not end in a semicolon")]
    Unterminated,
    /// A part is not `source:key=value`.
    #[error("label {0:?} is not of the form source:key=value")]
    Malformed(String),
    /// Two labels share a key.
    #[error("label key {0:?} occurs twice")]
    Duplicate(String),
}

impl Labels {
    /// Longest label string that is read, in bytes.
    pub const MAX_TEXT_LEN: usize = 64 * 1024;

    /// Adds or replaces a label.
    pub fn insert(&mut self, source: &str, key: &str, value: &str) {
        self.0.insert(
            key.to_owned(),
            Label {
                source: source.to_owned(),
                value: value.to_owned(),
            },
        );
    }

    /// The label with this key.
    pub fn find(&self, key: &str) -> Option<&Label> {
        self.0.get(key)
    }

    /// All labels, ascending by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Label)> {
        self.0.iter().map(|(key, label)| (key.as_str(), label))
    }

    /// How many labels there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Parses a label string.
    pub fn parse(text: &str) -> Result<Self, LabelParseError> {
        if text.len() > Self::MAX_TEXT_LEN {
            return Err(LabelParseError::TooLong(text.len()));
        }
        let body = text.strip_suffix(';').ok_or(LabelParseError::Unterminated)?;
        let mut labels = Self::default();
        for part in body.split(';') {
            let malformed = || LabelParseError::Malformed(part.chars().take(128).collect());
            let (source, rest) = part.split_once(':').ok_or_else(malformed)?;
            let (key, value) = rest.split_once('=').ok_or_else(malformed)?;
            if source.is_empty() || key.is_empty() {
                return Err(malformed());
            }
            if labels.0.contains_key(key) {
                return Err(LabelParseError::Duplicate(key.to_owned()));
            }
            labels.insert(source, key, value);
        }
        Ok(labels)
    }
}

impl fmt::Display for Labels {
    /// The canonical label string.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .iter()
            .try_for_each(|(key, label)| write!(f, "{}:{key}={};", label.source, label.value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn label_strings_agree_with_the_vectors() {
        let mut labels = Labels::default();
        labels.insert("k8s", "app", "a");
        assert_eq!(labels.to_string(), "k8s:app=a;");
        let mut init = Labels::default();
        init.insert("reserved", "init", "");
        assert_eq!(init.to_string(), "reserved:init=;");
    }

    #[test]
    fn malformed_label_strings_are_refused() {
        for text in [
            "",
            "k8s:app=a",
            "k8s:app;",
            "app=a;",
            ":a=b;",
            "k8s:=b;",
            "k8s:a=b;k8s:a=c;",
            ";",
        ] {
            assert!(Labels::parse(text).is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn parse_reverses_display(pairs in proptest::collection::btree_map("[a-z./-]{1,12}", "[a-z0-9.=:-]{0,8}", 1..8)) {
            let mut labels = Labels::default();
            for (key, value) in &pairs {
                labels.insert("k8s", key, value);
            }
            prop_assert_eq!(Labels::parse(&labels.to_string()), Ok(labels));
        }

        #[test]
        fn hostile_text_never_panics(text in ".{0,200}") {
            let _ = Labels::parse(&text);
        }
    }
}
