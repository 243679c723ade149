//! The table of built-in kinds.
//!
//! Each row names a kind and its Rust type, which checks objects: a field of a wrong type is refused as the real
//! server does, an unknown one falls away.

use k8s_openapi::api::{
    admissionregistration::v1 as admission, apps::v1 as apps, authentication::v1 as authn,
    authorization::v1 as authz, autoscaling::v2 as autoscaling, batch::v1 as batch,
    coordination::v1 as coordination, core::v1 as core, discovery::v1 as discovery,
    networking::v1 as networking, node::v1 as node, policy::v1 as policy, rbac::v1 as rbac,
    scheduling::v1 as scheduling, storage::v1 as storage,
};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1 as apiextensions;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Kind, Subresources, TypeCheck};
use crate::store::ResourceId;

fn round_trip<T: DeserializeOwned + Serialize>(object: &Value) -> Result<Value, String> {
    let typed = T::deserialize(object).map_err(|e| e.to_string())?;
    serde_json::to_value(&typed).map_err(|e| e.to_string())
}

const NAMESPACED: bool = true;
const CLUSTER: bool = false;

struct Row {
    group: &'static str,
    version: &'static str,
    kind: &'static str,
    plural: &'static str,
    /// Short names, then a `|`, then categories.
    words: &'static str,
    namespaced: bool,
    /// `status`, `scale`, both or none.
    subresources: &'static str,
    check: TypeCheck,
}

macro_rules! rows {
    ($($group:literal $version:literal $kind:literal $plural:literal $words:literal $scope:ident $sub:literal $type:ty;)*) => {
        &[$(Row {
            group: $group,
            version: $version,
            kind: $kind,
            plural: $plural,
            words: $words,
            namespaced: $scope,
            subresources: $sub,
            check: round_trip::<$type>,
        }),*]
    };
}

#[rustfmt::skip]
const ROWS: &[Row] = rows! {
    "" "v1" "Namespace" "namespaces" "ns" CLUSTER "status" core::Namespace;
    "" "v1" "Node" "nodes" "no" CLUSTER "status" core::Node;
    "" "v1" "PersistentVolume" "persistentvolumes" "pv" CLUSTER "status" core::PersistentVolume;
    "" "v1" "PersistentVolumeClaim" "persistentvolumeclaims" "pvc" NAMESPACED "status" core::PersistentVolumeClaim;
    "" "v1" "Pod" "pods" "po|all" NAMESPACED "status" core::Pod;
    "" "v1" "PodTemplate" "podtemplates" "" NAMESPACED "" core::PodTemplate;
    "" "v1" "Service" "services" "svc|all" NAMESPACED "status" core::Service;
    "" "v1" "Endpoints" "endpoints" "ep" NAMESPACED "" core::Endpoints;
    "" "v1" "ConfigMap" "configmaps" "cm" NAMESPACED "" core::ConfigMap;
    "" "v1" "Secret" "secrets" "" NAMESPACED "" core::Secret;
    "" "v1" "ServiceAccount" "serviceaccounts" "sa" NAMESPACED "" core::ServiceAccount;
    "" "v1" "Event" "events" "ev" NAMESPACED "" core::Event;
    "" "v1" "LimitRange" "limitranges" "limits" NAMESPACED "" core::LimitRange;
    "" "v1" "ResourceQuota" "resourcequotas" "quota" NAMESPACED "status" core::ResourceQuota;
    "" "v1" "ReplicationController" "replicationcontrollers" "rc|all" NAMESPACED "status scale" core::ReplicationController;
    "admissionregistration.k8s.io" "v1" "ValidatingWebhookConfiguration" "validatingwebhookconfigurations" "" CLUSTER "" admission::ValidatingWebhookConfiguration;
    "admissionregistration.k8s.io" "v1" "MutatingWebhookConfiguration" "mutatingwebhookconfigurations" "" CLUSTER "" admission::MutatingWebhookConfiguration;
    "apiextensions.k8s.io" "v1" "CustomResourceDefinition" "customresourcedefinitions" "crd,crds" CLUSTER "status" apiextensions::CustomResourceDefinition;
    "apps" "v1" "Deployment" "deployments" "deploy|all" NAMESPACED "status scale" apps::Deployment;
    "apps" "v1" "ReplicaSet" "replicasets" "rs|all" NAMESPACED "status scale" apps::ReplicaSet;
    "apps" "v1" "DaemonSet" "daemonsets" "ds|all" NAMESPACED "status" apps::DaemonSet;
    "apps" "v1" "StatefulSet" "statefulsets" "sts|all" NAMESPACED "status scale" apps::StatefulSet;
    "apps" "v1" "ControllerRevision" "controllerrevisions" "" NAMESPACED "" apps::ControllerRevision;
    "authentication.k8s.io" "v1" "TokenReview" "tokenreviews" "" CLUSTER "virtual" authn::TokenReview;
    "authentication.k8s.io" "v1" "SelfSubjectReview" "selfsubjectreviews" "" CLUSTER "virtual" authn::SelfSubjectReview;
    "authorization.k8s.io" "v1" "SelfSubjectAccessReview" "selfsubjectaccessreviews" "" CLUSTER "virtual" authz::SelfSubjectAccessReview;
    "authorization.k8s.io" "v1" "SubjectAccessReview" "subjectaccessreviews" "" CLUSTER "virtual" authz::SubjectAccessReview;
    "autoscaling" "v2" "HorizontalPodAutoscaler" "horizontalpodautoscalers" "hpa|all" NAMESPACED "status" autoscaling::HorizontalPodAutoscaler;
    "batch" "v1" "Job" "jobs" "|all" NAMESPACED "status" batch::Job;
    "batch" "v1" "CronJob" "cronjobs" "cj|all" NAMESPACED "status" batch::CronJob;
    "coordination.k8s.io" "v1" "Lease" "leases" "" NAMESPACED "" coordination::Lease;
    "discovery.k8s.io" "v1" "EndpointSlice" "endpointslices" "" NAMESPACED "" discovery::EndpointSlice;
    "events.k8s.io" "v1" "Event" "events" "ev" NAMESPACED "" core::Event;
    "networking.k8s.io" "v1" "NetworkPolicy" "networkpolicies" "netpol" NAMESPACED "" networking::NetworkPolicy;
    "networking.k8s.io" "v1" "Ingress" "ingresses" "ing" NAMESPACED "status" networking::Ingress;
    "networking.k8s.io" "v1" "IngressClass" "ingressclasses" "" CLUSTER "" networking::IngressClass;
    "node.k8s.io" "v1" "RuntimeClass" "runtimeclasses" "" CLUSTER "" node::RuntimeClass;
    "policy" "v1" "PodDisruptionBudget" "poddisruptionbudgets" "pdb" NAMESPACED "status" policy::PodDisruptionBudget;
    "rbac.authorization.k8s.io" "v1" "Role" "roles" "" NAMESPACED "" rbac::Role;
    "rbac.authorization.k8s.io" "v1" "RoleBinding" "rolebindings" "" NAMESPACED "" rbac::RoleBinding;
    "rbac.authorization.k8s.io" "v1" "ClusterRole" "clusterroles" "" CLUSTER "" rbac::ClusterRole;
    "rbac.authorization.k8s.io" "v1" "ClusterRoleBinding" "clusterrolebindings" "" CLUSTER "" rbac::ClusterRoleBinding;
    "scheduling.k8s.io" "v1" "PriorityClass" "priorityclasses" "pc" CLUSTER "" scheduling::PriorityClass;
    "storage.k8s.io" "v1" "StorageClass" "storageclasses" "sc" CLUSTER "" storage::StorageClass;
    "storage.k8s.io" "v1" "CSINode" "csinodes" "" CLUSTER "" storage::CSINode;
};

/// All built-in kinds.
pub fn kinds() -> Vec<Kind> {
    ROWS.iter().map(kind).collect()
}

fn kind(row: &Row) -> Kind {
    let (short, categories) = row.words.split_once('|').unwrap_or((row.words, ""));
    let words = |text: &str| {
        text.split(',')
            .filter(|w| !w.is_empty())
            .map(str::to_owned)
            .collect()
    };
    let storage = match row.plural {
        "events" => ResourceId::from("events"),
        plural => ResourceId::new(row.group, plural),
    };
    Kind {
        group: row.group.into(),
        version: row.version.into(),
        kind: row.kind.into(),
        list_kind: format!("{}List", row.kind),
        plural: row.plural.into(),
        singular: row.kind.to_ascii_lowercase(),
        short_names: words(short),
        categories: words(categories),
        namespaced: row.namespaced,
        subresources: Subresources {
            status: row.subresources.contains("status"),
            scale: row.subresources.contains("scale"),
        },
        storage,
        check: Some(row.check),
        custom: None,
        virtual_only: row.subresources == "virtual",
    }
}

/// Field names of events in the core group and in `events.k8s.io`.
const EVENT_FIELDS: &[(&str, &str)] = &[
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
    ("reportingComponent", "reportingController"),
];

/// Renames an event's fields to those of the core group, or from them.
pub fn rename_event_fields(event: &mut Value, to_core: bool) {
    let Some(map) = event.as_object_mut() else { return };
    for (core, new) in EVENT_FIELDS {
        let (from, to) = if to_core { (new, core) } else { (core, new) };
        if let Some(value) = map.remove(*from) {
            map.insert((*to).to_owned(), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn wrong_types_are_refused_and_unknown_fields_fall_away() {
        let service = |port: Value| json!({"apiVersion": "v1", "kind": "Service", "spec": {"ports": [{"port": port}], "x": 1}});
        assert!(round_trip::<core::Service>(&service(json!("80"))).is_err());
        let checked = round_trip::<core::Service>(&service(json!(80))).unwrap();
        assert_eq!(checked["spec"], json!({"ports": [{"port": 80}]}));
    }

    #[test]
    fn event_versions_convert_both_ways() {
        let new = json!({"regarding": {"name": "p"}, "note": "n", "reason": "r"});
        let mut event = new.clone();
        rename_event_fields(&mut event, true);
        assert_eq!(
            event,
            json!({"involvedObject": {"name": "p"}, "message": "n", "reason": "r"})
        );
        rename_event_fields(&mut event, false);
        assert_eq!(event, new);
    }
}
