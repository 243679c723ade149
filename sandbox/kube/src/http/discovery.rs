//! Discovery documents: which groups, versions, kinds and verbs there are.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde_json::{Value, json};

use crate::kind::Kind;

/// `/version`.
pub fn version(git_version: &str) -> Value {
    let mut numbers = git_version.trim_start_matches('v').split('.');
    json!({
        "major": numbers.next(),
        "minor": numbers.next(),
        "gitVersion": git_version,
        "gitCommit": "",
        "gitTreeState": "clean",
        "buildDate": "2025-01-01T00:00:00Z",
        "goVersion": "",
        "compiler": "rustc",
        "platform": "linux/amd64",
    })
}

/// `/`.
pub fn paths(kinds: &[Arc<Kind>]) -> Vec<String> {
    let mut paths: BTreeSet<String> = kinds.iter().map(|kind| root_of(kind)).collect();
    paths.extend(
        [
            "/api",
            "/apis",
            "/healthz",
            "/livez",
            "/openapi/v2",
            "/openapi/v3",
            "/readyz",
            "/version",
        ]
        .map(String::from),
    );
    paths.into_iter().collect()
}

/// The path under which a kind's version is served.
pub fn root_of(kind: &Kind) -> String {
    if kind.group.is_empty() {
        format!("/api/{}", kind.version)
    } else {
        format!("/apis/{}/{}", kind.group, kind.version)
    }
}

/// `/api`.
pub fn core_versions() -> Value {
    json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []})
}

/// `/apis`.
pub fn groups(kinds: &[Arc<Kind>]) -> Value {
    let groups: Vec<Value> = versions(kinds)
        .iter()
        .map(|(group, versions)| group_value(group, versions))
        .collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

/// `/apis/<group>`.
pub fn group(kinds: &[Arc<Kind>], group: &str) -> Option<Value> {
    let versions = versions(kinds);
    let mut value = group_value(group, versions.get(group)?);
    value["kind"] = json!("APIGroup");
    value["apiVersion"] = json!("v1");
    Some(value)
}

fn versions(kinds: &[Arc<Kind>]) -> BTreeMap<&str, BTreeSet<&str>> {
    let mut groups: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for kind in kinds.iter().filter(|kind| !kind.group.is_empty()) {
        groups.entry(&kind.group).or_default().insert(&kind.version);
    }
    groups
}

fn group_value(group: &str, versions: &BTreeSet<&str>) -> Value {
    let mut versions: Vec<&str> = versions.iter().copied().collect();
    versions.sort_by_key(|version| priority(version));
    let entry = |version: &&str| json!({"groupVersion": format!("{group}/{version}"), "version": version});
    let list: Vec<Value> = versions.iter().map(entry).collect();
    json!({"name": group, "preferredVersion": list.first(), "versions": list})
}

/// Stable before beta before alpha, newer before older.
fn priority(version: &str) -> (u8, std::cmp::Reverse<u32>, String) {
    let stage = if version.contains("alpha") {
        2
    } else {
        u8::from(version.contains("beta"))
    };
    let digits: String = version.chars().skip(1).take_while(char::is_ascii_digit).collect();
    (
        stage,
        std::cmp::Reverse(digits.parse().unwrap_or(0)),
        version.to_owned(),
    )
}

/// `/api/v1` and `/apis/<group>/<version>`.
pub fn resources(kinds: &[Arc<Kind>], group: &str, version: &str) -> Option<Value> {
    let found: Vec<&Arc<Kind>> = kinds
        .iter()
        .filter(|k| k.group == group && k.version == version)
        .collect();
    let first = found.first()?;
    let list: Vec<Value> = found.iter().flat_map(|kind| entries(kind)).collect();
    Some(json!({
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": first.api_version(),
        "resources": list,
    }))
}

const VERBS: &[&str] = &[
    "create",
    "delete",
    "deletecollection",
    "get",
    "list",
    "patch",
    "update",
    "watch",
];

fn entries(kind: &Kind) -> Vec<Value> {
    let mut main = json!({
        "name": kind.plural,
        "singularName": kind.singular,
        "namespaced": kind.namespaced,
        "kind": kind.kind,
        "verbs": if kind.virtual_only { &["create"][..] } else { VERBS },
    });
    if !kind.short_names.is_empty() {
        main["shortNames"] = json!(kind.short_names);
    }
    if !kind.categories.is_empty() {
        main["categories"] = json!(kind.categories);
    }
    let sub = |name: &str, kind_name: &str, verbs: &[&str]| {
        json!({
            "name": format!("{}/{name}", kind.plural),
            "singularName": "",
            "namespaced": kind.namespaced,
            "kind": kind_name,
            "verbs": verbs,
        })
    };
    let mut list = vec![main];
    if kind.subresources.status {
        list.push(sub("status", &kind.kind, &["get", "patch", "update"]));
    }
    if kind.subresources.scale {
        let mut scale = sub("scale", "Scale", &["get", "patch", "update"]);
        scale["group"] = json!("autoscaling");
        scale["version"] = json!("v1");
        list.push(scale);
    }
    match kind.storage.as_str() {
        "pods" => {
            list.push(sub("log", "Pod", &["get"]));
            list.push(sub("binding", "Binding", &["create"]));
            let mut eviction = sub("eviction", "Eviction", &["create"]);
            eviction["group"] = json!("policy");
            eviction["version"] = json!("v1");
            list.push(eviction);
        }
        "namespaces" => list.push(sub("finalize", "Namespace", &["update"])),
        _ => {}
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_by_stability() {
        let versions = BTreeSet::from(["v1", "v1beta1", "v2", "v2alpha1"]);
        let value = group_value("g", &versions);
        let order: Vec<&str> = value["versions"]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v["version"].as_str().unwrap())
            .collect();
        assert_eq!(order, ["v2", "v1", "v1beta1", "v2alpha1"]);
    }
}
