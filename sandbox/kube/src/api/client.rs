//! The in-process client: the verbs by resource name, with the semantics of the HTTP API.

use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Deleted, Feed, KubeApi, ListOptions, Page, WatchOptions, Watcher, WriteOptions, Written};
use crate::error::ApiError;
use crate::patch::Patch;
use crate::rules::{DeleteOptions, Part};
use crate::store::{Object, ResourceId};

/// A handle for use in the same process. Resources are named `<plural>` or `<plural>.<group>`, for example `pods` and
/// `endpointslices.discovery.k8s.io`; the namespace of cluster-scoped objects is "".
#[derive(Clone)]
pub struct Client {
    api: KubeApi,
}

impl Client {
    pub(crate) fn new(api: KubeApi) -> Client {
        Client { api }
    }

    /// The API behind it.
    pub fn api(&self) -> &KubeApi {
        &self.api
    }

    /// One object.
    pub fn get(&self, resource: &str, namespace: &str, name: &str) -> Result<Arc<Object>, ApiError> {
        self.api.get(&*self.kind(resource)?, namespace, name)
    }

    /// One object, if it is there.
    pub fn find(&self, resource: &str, namespace: &str, name: &str) -> Option<Arc<Object>> {
        self.get(resource, namespace, name).ok()
    }

    /// One object as its type.
    pub fn get_as<T: DeserializeOwned>(
        &self,
        resource: &str,
        namespace: &str,
        name: &str,
    ) -> Result<T, ApiError> {
        let object = self.get(resource, namespace, name)?;
        T::deserialize(object.value()).map_err(|e| ApiError::internal(format!("{resource} {name:?}: {e}")))
    }

    /// Objects, all or of one namespace.
    pub fn list(
        &self,
        resource: &str,
        namespace: Option<&str>,
        options: &ListOptions,
    ) -> Result<Page, ApiError> {
        self.api.list(&*self.kind(resource)?, namespace, options)
    }

    /// All objects, or all of one namespace; none for a resource that is not served.
    pub fn all(&self, resource: &str, namespace: Option<&str>) -> Vec<Arc<Object>> {
        self.list(resource, namespace, &ListOptions::default())
            .map(|page| page.items)
            .unwrap_or_default()
    }

    /// Stores a new object.
    pub fn create(&self, resource: &str, namespace: &str, object: Value) -> Result<Arc<Object>, ApiError> {
        self.api.create(
            &*self.kind(resource)?,
            namespace,
            object,
            &WriteOptions::default(),
        )
    }

    /// Stores a new object with the status that it carries.
    pub fn create_whole(
        &self,
        resource: &str,
        namespace: &str,
        object: Value,
    ) -> Result<Arc<Object>, ApiError> {
        let options = WriteOptions {
            part: Part::Whole,
            ..WriteOptions::default()
        };
        self.api
            .create(&*self.kind(resource)?, namespace, object, &options)
    }

    /// Stores a new typed object.
    pub fn create_as<T: Serialize>(
        &self,
        resource: &str,
        namespace: &str,
        object: &T,
    ) -> Result<Arc<Object>, ApiError> {
        let object = serde_json::to_value(object).map_err(|e| ApiError::bad_request(e.to_string()))?;
        self.create(resource, namespace, object)
    }

    /// Replaces an object.
    pub fn update(
        &self,
        resource: &str,
        namespace: &str,
        name: &str,
        object: Value,
        options: &WriteOptions,
    ) -> Result<Arc<Object>, ApiError> {
        self.api
            .update(&*self.kind(resource)?, namespace, name, object, options)
    }

    /// Changes an object in one step: `change` gets the stored one. An equal result writes nothing.
    pub fn modify(
        &self,
        resource: &str,
        namespace: &str,
        name: &str,
        part: Part,
        change: impl FnOnce(&mut Value),
    ) -> Result<Arc<Object>, ApiError> {
        let options = WriteOptions {
            part,
            ..WriteOptions::default()
        };
        self.api
            .modify(&*self.kind(resource)?, namespace, name, &options, |old| {
                let mut new = old.clone();
                change(&mut new);
                Ok(new)
            })
    }

    /// Patches an object.
    pub fn patch(
        &self,
        resource: &str,
        namespace: &str,
        name: &str,
        patch: &Patch,
        options: &WriteOptions,
    ) -> Result<Written, ApiError> {
        self.api
            .patch(&*self.kind(resource)?, namespace, name, patch, options)
    }

    /// Merges `patch`, for example `{"status": {...}}`, into an object's status.
    pub fn patch_status(
        &self,
        resource: &str,
        namespace: &str,
        name: &str,
        patch: Value,
    ) -> Result<Arc<Object>, ApiError> {
        let options = WriteOptions {
            part: Part::Status,
            subresource: "status",
            ..WriteOptions::default()
        };
        let kind = self.kind(resource)?;
        let patch = if kind.custom.is_some() {
            Patch::Merge(patch)
        } else {
            Patch::Strategic(patch)
        };
        self.api
            .patch(&kind, namespace, name, &patch, &options)
            .map(|written| written.object)
    }

    /// Deletes an object, or begins to.
    pub fn delete(
        &self,
        resource: &str,
        namespace: &str,
        name: &str,
        options: &DeleteOptions,
    ) -> Result<Deleted, ApiError> {
        self.api.delete(&*self.kind(resource)?, namespace, name, options)
    }

    /// Watches a resource.
    pub fn watch(
        &self,
        resource: &str,
        namespace: Option<&str>,
        options: WatchOptions,
    ) -> Result<Watcher, ApiError> {
        Watcher::start(&self.api, self.kind(resource)?, namespace, options)
    }

    /// Events of several resources together, or of all when none are named; starts with a resync.
    pub fn feed(&self, resources: &[&str]) -> Feed {
        let resources: Vec<ResourceId> = resources.iter().map(|&r| ResourceId::from(r)).collect();
        Feed::new(self.api.clone(), &resources)
    }

    fn kind(&self, resource: &str) -> Result<Arc<crate::kind::Kind>, ApiError> {
        self.api.storage_kind(&ResourceId::from(resource))
    }
}
