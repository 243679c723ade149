//! What controllers ask about pods.

use serde_json::{Value, json};

use crate::meta;

/// Whether the pod has ended.
pub fn is_over(pod: &Value) -> bool {
    matches!(meta::str_at(pod, &["status", "phase"]), "Succeeded" | "Failed")
}

/// Whether the pod counts for its controller: it has not ended and is not being deleted.
pub fn is_active(pod: &Value) -> bool {
    !is_over(pod) && !meta::is_terminating(pod)
}

/// Whether the pod's Ready condition is true.
pub fn is_ready(pod: &Value) -> bool {
    meta::condition_is_true(pod, "Ready")
}

/// The node that the pod is on, or "".
pub fn node_of(pod: &Value) -> &str {
    meta::str_at(pod, &["spec", "nodeName"])
}

/// A pod of a template, controlled by `owner`. The server names it.
pub fn from_template(template: &Value, owner: &Value, kind: &str) -> Value {
    let metadata = template.get("metadata").cloned().unwrap_or_else(|| json!({}));
    let mut pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]});
    let map = meta::metadata_mut(&mut pod);
    map.remove("name");
    map.remove("creationTimestamp");
    map.insert("generateName".into(), json!(format!("{}-", meta::name(owner))));
    map.insert(
        "ownerReferences".into(),
        json!([meta::controller_reference(owner, "apps/v1", kind)]),
    );
    pod
}

/// A short hash of a template, in letters that names may have.
pub fn template_hash(template: &Value) -> String {
    // FNV-1a, so that the same template has the same hash in every run.
    let text = template.to_string();
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    });
    const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut rest = hash;
    (0..10)
        .map(|_| {
            let letter = LETTERS[(rest % LETTERS.len() as u64) as usize];
            rest /= LETTERS.len() as u64;
            char::from(letter)
        })
        .collect()
}

/// Pods in the order in which they are best given up: unscheduled, not ready, then the youngest.
pub fn sort_for_removal(pods: &mut [&Value]) {
    pods.sort_by_key(|pod| {
        let created = meta::field(pod, "creationTimestamp").to_owned();
        (
            !node_of(pod).is_empty(),
            is_ready(pod),
            std::cmp::Reverse(created),
            meta::name(pod).to_owned(),
        )
    });
}
