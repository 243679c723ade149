//! Which labels make a pod's identity.
//!
//! In: a pod's labels, its namespace's labels, its service account, the cluster. Out: the label set that a number is allocated for.
//!
//! The filter and its syntax are Cilium's (`pkg/labelsfilter`, option `labels`): a rule is `[source:][!]regex`, matched at the start
//! of the key. The longest including match must beat the shortest excluding one. Without an including rule from the user, labels
//! that no rule excludes pass too.
//!
//! Invariants: labels under the names that the platform sets are never taken from the pod itself; the label that names the cluster is
//! always there, since readers in other clusters refuse an identity without it.

use std::collections::BTreeMap;

use isthmus_model::{
    ClusterName, Labels,
    labels::{NAMESPACE_LABELS_PREFIX, POD_NAMESPACE, POLICY_CLUSTER, POLICY_SERVICE_ACCOUNT, SOURCE_K8S},
};
use regex::Regex;

/// Names under which only the platform sets labels.
const PLATFORM_PREFIX: &str = "io.cilium.k8s.";
/// Label that Kubernetes sets on each namespace; set here also where it does not.
const METADATA_NAME: &str = "kubernetes.io/metadata.name";

/// Cilium's rules when the user has none.
const DEFAULT_RULES: [&str; 17] = [
    "reserved:.*",
    r"io\.kubernetes\.pod\.namespace",
    r"io\.cilium\.k8s\.namespace\.labels",
    r"app\.kubernetes\.io",
    r"io\.cilium\.k8s\.policy\.cluster",
    r"!io\.kubernetes",
    r"!kubernetes\.io",
    r"!statefulset\.kubernetes\.io/pod-name",
    r"!apps\.kubernetes\.io/pod-index",
    r"!batch\.kubernetes\.io/job-completion-index",
    r"!.*beta\.kubernetes\.io",
    r"!k8s\.io",
    "!pod-template-generation",
    "!pod-template-hash",
    "!controller-revision-hash",
    "!annotation.*",
    "!etcd_node",
];

/// Decides which labels count for identities.
#[derive(Clone, Debug)]
pub struct LabelFilter {
    rules: Vec<Rule>,
    only_included: bool,
}

#[derive(Clone, Debug)]
struct Rule {
    source: Option<String>,
    exclude: bool,
    pattern: Regex,
}

/// A rule that does not parse.
#[derive(Debug, thiserror::Error)]
pub enum LabelFilterError {
    /// Nothing after the source or the exclamation mark.
    #[error("label rule {0:?} is empty; it takes [source:][!]regex")]
    Empty(String),
    /// Not a regular expression.
    #[error("label rule {rule:?} is not a regular expression")]
    Pattern {
        /// The rule.
        rule: String,
        /// What is wrong with it.
        #[source]
        source: Box<regex::Error>,
    },
}

impl LabelFilter {
    /// Longest text of rules, in bytes.
    pub const TEXT_LEN_MAX: usize = 16 * 1024;

    /// Cilium's default rules and the user's, which are separated by spaces (as in the option `labels`).
    pub fn new(rules: &str) -> Result<Self, LabelFilterError> {
        if rules.len() > Self::TEXT_LEN_MAX {
            return Err(LabelFilterError::Empty(format!(
                "({} bytes, more than {})",
                rules.len(),
                Self::TEXT_LEN_MAX
            )));
        }
        let user: Vec<Rule> = rules
            .split_whitespace()
            .map(Rule::new)
            .collect::<Result<_, _>>()?;
        let defaults: Vec<Rule> = DEFAULT_RULES
            .into_iter()
            .map(Rule::new)
            .collect::<Result<_, _>>()?;
        let only_included = user.iter().any(|rule| !rule.exclude);
        Ok(Self {
            rules: defaults.into_iter().chain(user).collect(),
            only_included,
        })
    }

    /// Whether a label with this source and key counts.
    pub fn accepts(&self, source: &str, key: &str) -> bool {
        let (mut included, mut excluded) = (0, 0);
        for rule in &self.rules {
            match rule.matched_len(source, key) {
                Some(len) if rule.exclude && (excluded == 0 || len < excluded) => excluded = len,
                Some(len) if !rule.exclude => included = included.max(len),
                _ => {}
            }
        }
        (!self.only_included && excluded == 0) || included > excluded
    }

    /// The label set of a pod's identity.
    pub fn identity(
        &self,
        cluster: &ClusterName,
        pod: &PodLabels<'_>,
        namespace_labels: &BTreeMap<String, String>,
    ) -> Labels {
        let mut labels = Labels::default();
        let mut add = |key: &str, value: &str| {
            if self.accepts(SOURCE_K8S, key) {
                labels.insert(SOURCE_K8S, key, value);
            }
        };
        for (key, value) in pod.own {
            if !key.starts_with(PLATFORM_PREFIX) && key != POD_NAMESPACE {
                add(key, value);
            }
        }
        for (key, value) in namespace_labels {
            add(&format!("{NAMESPACE_LABELS_PREFIX}{key}"), value);
        }
        add(
            &format!("{NAMESPACE_LABELS_PREFIX}{METADATA_NAME}"),
            pod.namespace,
        );
        add(POD_NAMESPACE, pod.namespace);
        if !pod.service_account.is_empty() {
            add(POLICY_SERVICE_ACCOUNT, pod.service_account);
        }
        labels.insert(SOURCE_K8S, POLICY_CLUSTER, cluster.as_str());
        labels
    }
}

/// What of a pod counts for its identity.
#[derive(Clone, Copy, Debug)]
pub struct PodLabels<'a> {
    /// Namespace.
    pub namespace: &'a str,
    /// Service account, empty if none.
    pub service_account: &'a str,
    /// The pod's own labels.
    pub own: &'a BTreeMap<String, String>,
}

impl Rule {
    fn new(text: &str) -> Result<Self, LabelFilterError> {
        let (source, rest) = match text.split_once(':') {
            Some((source, rest)) => (Some(source).filter(|source| !source.is_empty()), rest),
            None => (None, text),
        };
        let (exclude, pattern) = match rest.strip_prefix('!') {
            Some(pattern) => (true, pattern),
            None => (false, rest),
        };
        if pattern.is_empty() {
            return Err(LabelFilterError::Empty(crate::shorten(text)));
        }
        Ok(Self {
            source: source.map(str::to_owned),
            exclude,
            pattern: Regex::new(pattern).map_err(|source| LabelFilterError::Pattern {
                rule: crate::shorten(text),
                source: Box::new(source),
            })?,
        })
    }

    /// How much of the key's start matches.
    fn matched_len(&self, source: &str, key: &str) -> Option<usize> {
        if self.source.as_deref().is_some_and(|want| want != source) {
            return None;
        }
        // Only the leftmost match counts, as in Cilium: a rule that first matches further right does not match.
        let found = self.pattern.find(key)?;
        (found.start() == 0).then_some(found.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(rules: &str, own: &[(&str, &str)], namespace: &[(&str, &str)]) -> String {
        let map = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        let own: BTreeMap<String, String> = map(own);
        let pod = PodLabels {
            namespace: "shop",
            service_account: "default",
            own: &own,
        };
        let cluster = ClusterName::new("c1").unwrap();
        LabelFilter::new(rules)
            .unwrap()
            .identity(&cluster, &pod, &map(namespace))
            .to_string()
    }

    #[test]
    fn label_sets_agree_with_ciliums_example() {
        assert_eq!(
            identity("", &[("app", "cart")], &[("kubernetes.io/metadata.name", "shop")]),
            "k8s:app=cart;k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=shop;\
             k8s:io.cilium.k8s.policy.cluster=c1;k8s:io.cilium.k8s.policy.serviceaccount=default;\
             k8s:io.kubernetes.pod.namespace=shop;"
        );
        assert_eq!(
            identity("", &[("app", "cart")], &[]),
            identity("", &[("app", "cart")], &[(METADATA_NAME, "shop")])
        );
    }

    #[test]
    fn labels_that_change_with_each_rollout_do_not_count() {
        let plain = identity("", &[("app", "cart")], &[]);
        for key in [
            "pod-template-hash",
            "pod-template-generation",
            "controller-revision-hash",
            "statefulset.kubernetes.io/pod-name",
            "apps.kubernetes.io/pod-index",
            "batch.kubernetes.io/job-completion-index",
            "kubernetes.io/hostname",
            "beta.kubernetes.io/os",
            "failure-domain.beta.kubernetes.io/zone",
            "k8s.io/x",
        ] {
            assert_eq!(identity("", &[("app", "cart"), (key, "x")], &[]), plain, "{key}");
        }
        for key in ["app.kubernetes.io/name", "team", "example.com/kubernetes.io"] {
            assert_ne!(identity("", &[("app", "cart"), (key, "x")], &[]), plain, "{key}");
        }
    }

    #[test]
    fn a_pod_cannot_claim_what_the_platform_sets() {
        let plain = identity("", &[], &[]);
        for key in [
            POLICY_CLUSTER,
            POLICY_SERVICE_ACCOUNT,
            POD_NAMESPACE,
            "io.cilium.k8s.namespace.labels.team",
            "io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name",
        ] {
            assert_eq!(identity("", &[(key, "forged")], &[]), plain, "{key}");
        }
        assert_eq!(identity("", &[], &[(METADATA_NAME, "forged")]), plain);
    }

    #[test]
    fn rules_follow_ciliums_syntax() {
        let has =
            |rules: &str, key: &str| identity(rules, &[(key, "x")], &[]).contains(&format!("k8s:{key}=x;"));
        assert!(has("", "team") && !has("k8s:!team", "team") && !has("!te", "team"));
        assert!(has("!am", "team"), "matches at the start of the key only");
        assert!(
            !has("k8s:app", "team") && has("k8s:app", "app"),
            "an including rule excludes the rest"
        );
        assert!(has("k8s:app", "app.kubernetes.io/name"));
        assert!(has("container:!team", "team"), "another source");
        assert!(has("!foo foo-bar", "foo-bar"), "the longer match wins");
        assert!(
            identity("k8s:app", &[], &[]).contains("policy.cluster=c1;"),
            "the cluster's label stays"
        );
        for bad in ["k8s:", "!", "k8s:!", "(", "k8s:["] {
            assert!(LabelFilter::new(bad).is_err(), "{bad:?}");
        }
    }
}
