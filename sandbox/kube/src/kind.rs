//! What kinds the server knows: names, scope, subresources, and how objects of a kind are checked.
//!
//! Built-in kinds are a table in [`builtin`]; custom ones come from CustomResourceDefinitions ([`custom`]). In: a
//! path's group, version and plural. Out: the [`Kind`] that answers there. Invariant: one storage per group and
//! plural, whatever the number of served versions.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use crate::store::ResourceId;

pub mod builtin;
pub mod custom;

/// Reads an object as its Rust type and writes it back: wrong types are refused, unknown fields fall away.
pub type TypeCheck = fn(&Value) -> Result<Value, String>;

/// Subresources that a kind serves beside itself.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Subresources {
    /// `/status`; then the main resource ignores changes to status and the other way round.
    pub status: bool,
    /// `/scale`.
    pub scale: bool,
}

/// A kind at one version.
#[derive(Clone, Debug)]
pub struct Kind {
    /// API group, "" for core.
    pub group: String,
    /// Version.
    pub version: String,
    /// `Deployment`.
    pub kind: String,
    /// `DeploymentList`.
    pub list_kind: String,
    /// `deployments`.
    pub plural: String,
    /// `deployment`.
    pub singular: String,
    /// `deploy`.
    pub short_names: Vec<String>,
    /// `all`.
    pub categories: Vec<String>,
    /// Whether objects live in namespaces.
    pub namespaced: bool,
    /// What is served beside it.
    pub subresources: Subresources,
    /// Where objects are stored; kinds of several versions share it.
    pub storage: ResourceId,
    /// How objects are checked; none for custom kinds.
    pub check: Option<TypeCheck>,
    /// Schema and columns of a custom kind.
    pub custom: Option<Arc<custom::Custom>>,
    /// Whether the objects are only answered, never stored (access reviews).
    pub virtual_only: bool,
}

impl Kind {
    /// `v1` or `apps/v1`.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.clone()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    /// Whether a label or field selector may use this field.
    pub fn selects_by(&self, field: &str) -> bool {
        let by_kind: &[&str] = match self.storage.as_str() {
            "pods" => &[
                "spec.nodeName",
                "spec.restartPolicy",
                "spec.schedulerName",
                "spec.serviceAccountName",
                "spec.hostNetwork",
                "status.phase",
                "status.podIP",
                "status.nominatedNodeName",
            ],
            "nodes" => &["spec.unschedulable"],
            "namespaces" => &["status.phase"],
            "secrets" => &["type"],
            "services" => &["spec.clusterIP", "spec.type"],
            "replicasets.apps" | "replicationcontrollers" => &["status.replicas"],
            "events" => &[
                "involvedObject.kind",
                "involvedObject.namespace",
                "involvedObject.name",
                "involvedObject.uid",
                "involvedObject.apiVersion",
                "involvedObject.resourceVersion",
                "involvedObject.fieldPath",
                "reason",
                "reportingComponent",
                "source",
                "type",
            ],
            _ => &[],
        };
        matches!(field, "metadata.name" | "metadata.namespace") || by_kind.contains(&field)
    }

    /// Whether `metadata.generation` counts changes of the spec.
    pub fn has_generation(&self) -> bool {
        self.custom.is_some()
            || matches!(
                self.storage.as_str(),
                "deployments.apps"
                    | "replicasets.apps"
                    | "daemonsets.apps"
                    | "statefulsets.apps"
                    | "jobs.batch"
                    | "cronjobs.batch"
                    | "networkpolicies.networking.k8s.io"
                    | "ingresses.networking.k8s.io"
                    | "endpointslices.discovery.k8s.io"
                    | "poddisruptionbudgets.policy"
                    | "customresourcedefinitions.apiextensions.k8s.io"
                    | "pods"
            )
    }

    /// Whether this version's objects are stored as they are, so that stored JSON can be sent unchanged.
    pub fn is_storage_version(&self) -> bool {
        match &self.custom {
            Some(custom) => custom.storage_version == self.version,
            None => self.storage.as_str() != "events" || self.group.is_empty(),
        }
    }

    /// A stored object as this version shows it.
    pub fn to_wire(&self, stored: &Value) -> Value {
        let mut object = stored.clone();
        if !self.is_storage_version() {
            object["apiVersion"] = self.api_version().into();
            if self.custom.is_none() {
                builtin::rename_event_fields(&mut object, false);
            }
        }
        object
    }

    /// An object of this version as it is stored.
    pub fn to_stored(&self, mut object: Value) -> Value {
        if !self.is_storage_version() {
            match &self.custom {
                Some(custom) => {
                    object["apiVersion"] = format!("{}/{}", self.group, custom.storage_version).into()
                }
                None => {
                    object["apiVersion"] = "v1".into();
                    builtin::rename_event_fields(&mut object, true);
                }
            }
        }
        object
    }
}

/// All kinds that are served now.
#[derive(Clone, Default)]
pub struct KindTable {
    /// By group, version and plural.
    kinds: BTreeMap<(String, String, String), Arc<Kind>>,
}

impl KindTable {
    /// The built-in kinds.
    pub fn builtin() -> KindTable {
        let mut table = KindTable::default();
        builtin::kinds().into_iter().for_each(|kind| table.insert(kind));
        table
    }

    /// Serves a kind.
    pub fn insert(&mut self, kind: Kind) {
        let key = (kind.group.clone(), kind.version.clone(), kind.plural.clone());
        self.kinds.insert(key, Arc::new(kind));
    }

    /// Stops serving all versions of a custom resource.
    pub fn remove_custom(&mut self, storage: &ResourceId) {
        self.kinds
            .retain(|_, kind| kind.custom.is_none() || kind.storage != *storage);
    }

    /// The kind at a path.
    pub fn find(&self, group: &str, version: &str, plural: &str) -> Option<&Arc<Kind>> {
        self.kinds
            .get(&(group.to_owned(), version.to_owned(), plural.to_owned()))
    }

    /// The kind in whose version a resource is stored.
    pub fn of_storage(&self, storage: &ResourceId) -> Option<&Arc<Kind>> {
        let (plural, group) = storage.as_str().split_once('.').unwrap_or((storage.as_str(), ""));
        let from = (group.to_owned(), String::new(), String::new());
        self.kinds
            .range(from..)
            .take_while(|((g, _, _), _)| g == group)
            .map(|(_, kind)| kind)
            .find(|kind| kind.plural == plural && kind.is_storage_version())
    }

    /// The resource that stores objects of this `apiVersion` and `kind`.
    pub fn by_type(&self, api_version: &str, kind: &str) -> Option<&Arc<Kind>> {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        self.kinds
            .values()
            .find(|k| k.kind == kind && k.group == group && k.version == version)
    }

    /// All kinds, by group, version and plural.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Kind>> {
        self.kinds.values()
    }
}
