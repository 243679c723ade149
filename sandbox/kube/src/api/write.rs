//! Create, update, patch, delete.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{KubeApi, State, new_suffix, new_uid, now};
use crate::error::ApiError;
use crate::kind::Kind;
use crate::meta;
use crate::patch::{self, Patch, apply, lists::Cursor, strategic};
use crate::rules::{self, Birth, DeleteOptions, Deletion, Part};
use crate::store::{Key, Object};

/// Options of a write.
#[derive(Clone, Debug, Default)]
pub struct WriteOptions {
    /// Answer without storing anything.
    pub dry_run: bool,
    /// Who writes, for the ownership of fields; none leaves that untracked.
    pub manager: Option<String>,
    /// Server-side apply only: take fields that others own.
    pub force: bool,
    /// Refuse fields that the kind does not have.
    pub strict: bool,
    /// Which part of the object is written.
    pub part: Part,
    /// The subresource as managers see it, "" for the object.
    pub subresource: &'static str,
}

/// What a write made.
#[derive(Clone, Debug)]
pub struct Written {
    /// The object as stored.
    pub object: Arc<Object>,
    /// Whether it is new.
    pub created: bool,
}

/// What a delete did.
#[derive(Clone, Debug)]
pub enum Deleted {
    /// The object is gone; this is its last state.
    Removed(Arc<Object>),
    /// The object is on its way out and looks like this.
    Marked(Arc<Object>),
}

impl Deleted {
    /// The object.
    pub fn object(&self) -> &Arc<Object> {
        match self {
            Deleted::Removed(object) | Deleted::Marked(object) => object,
        }
    }
}

/// A new name is tried this often before the create is refused.
const NAME_TRIES: u32 = 8;

impl KubeApi {
    /// Stores a new object, which is in the wire form of `kind`.
    pub fn create(
        &self,
        kind: &Kind,
        namespace: &str,
        object: Value,
        options: &WriteOptions,
    ) -> Result<Arc<Object>, ApiError> {
        let mut object = object;
        rules::settle_type(kind, &mut object)?;
        rules::settle_namespace(kind, &mut object, namespace)?;
        let object = rules::check_shape(kind, kind.to_stored(object), options.strict)?;
        self.state().create(kind, namespace, object, options)
    }

    /// Replaces an object.
    pub fn update(
        &self,
        kind: &Kind,
        namespace: &str,
        name: &str,
        object: Value,
        options: &WriteOptions,
    ) -> Result<Arc<Object>, ApiError> {
        let mut object = object;
        rules::settle_type(kind, &mut object)?;
        rules::settle_namespace(kind, &mut object, namespace)?;
        if meta::name(&object).is_empty() {
            meta::metadata_mut(&mut object).insert("name".into(), json!(name));
        }
        if meta::name(&object) != name {
            return Err(ApiError::bad_request(format!(
                "the name of the object ({}) does not match the name on the URL ({name})",
                meta::name(&object)
            )));
        }
        let custom_main = kind.custom.is_some() && options.part == Part::Main;
        if custom_main && meta::field(&object, "resourceVersion").is_empty() {
            let cause = crate::error::Cause::new(
                "metadata.resourceVersion",
                "Invalid value: 0x0: must be specified for an update",
            );
            return Err(ApiError::invalid(&kind.group, &kind.kind, name, vec![cause]));
        }
        let object = kind.to_stored(object);
        self.modify(kind, namespace, name, options, |_| Ok(object))
    }

    /// Replaces an object by what `change` makes of the stored one, in one step.
    pub fn modify(
        &self,
        kind: &Kind,
        namespace: &str,
        name: &str,
        options: &WriteOptions,
        change: impl FnOnce(&Value) -> Result<Value, ApiError>,
    ) -> Result<Arc<Object>, ApiError> {
        let mut state = self.state();
        let key = Key::new(&kind.storage, namespace, name);
        let Some(old) = state.store.get(&key).cloned() else {
            return Err(ApiError::not_found(&kind.group, &kind.plural, name));
        };
        let new = rules::check_shape(kind, change(old.value())?, options.strict)?;
        state.replace(kind, key, &old, new, options, true)
    }

    /// Patches an object; server-side apply also creates it.
    pub fn patch(
        &self,
        kind: &Kind,
        namespace: &str,
        name: &str,
        patch: &Patch,
        options: &WriteOptions,
    ) -> Result<Written, ApiError> {
        let updated = |object| Written {
            object,
            created: false,
        };
        // The patch is in the wire form, so the object is turned into it and back.
        let through = |old: &Value, change: &dyn Fn(&Value) -> Result<Value, ApiError>| {
            if kind.is_storage_version() {
                change(old)
            } else {
                Ok(kind.to_stored(change(&kind.to_wire(old))?))
            }
        };
        match patch {
            Patch::Json(patch) => self
                .modify(kind, namespace, name, options, |old| {
                    through(old, &|o| patch::json_patch(o, patch))
                })
                .map(updated),
            Patch::Merge(patch) => self
                .modify(kind, namespace, name, options, |old| {
                    through(old, &|o| patch::merge_patch(o, patch))
                })
                .map(updated),
            Patch::Strategic(_) if kind.custom.is_some() => {
                let takes =
                    "application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml";
                Err(ApiError::unsupported_media(
                    "application/strategic-merge-patch+json",
                    takes,
                ))
            }
            Patch::Strategic(patch) => {
                let cursor = Cursor::root(kind);
                self.modify(kind, namespace, name, options, |old| {
                    through(old, &|o| strategic::merge(o, patch, cursor))
                })
                .map(updated)
            }
            Patch::Apply(config) => self.apply(kind, namespace, name, config.clone(), options),
        }
    }

    fn apply(
        &self,
        kind: &Kind,
        namespace: &str,
        name: &str,
        mut config: Value,
        options: &WriteOptions,
    ) -> Result<Written, ApiError> {
        rules::settle_type(kind, &mut config)?;
        rules::settle_namespace(kind, &mut config, namespace)?;
        if meta::name(&config).is_empty() {
            meta::metadata_mut(&mut config).insert("name".into(), json!(name));
        }
        if meta::name(&config) != name {
            return Err(ApiError::bad_request(format!(
                "the name of the object ({}) does not match the name on the URL ({name})",
                meta::name(&config)
            )));
        }
        let Some(manager) = options.manager.clone().filter(|m| !m.is_empty()) else {
            return Err(ApiError::bad_request(
                "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required for apply patch",
            ));
        };
        let mut config = kind.to_stored(config);
        if kind.custom.is_none() {
            // As the stored object has them, so that 1 and "1" are the same cpu.
            rules::defaults::numbers_to_quantities(&mut config);
        }
        // Types and unknown fields are checked on what the client sent; defaults of required lists must not count.
        rules::check_shape(kind, config.clone(), options.strict)?;
        let cursor = Cursor::root(kind);
        let api_version = meta::str_at(&config, &["apiVersion"]).to_owned();
        let writer = apply::Writer {
            manager: &manager,
            api_version: &api_version,
            subresource: options.subresource,
            now: now(),
        };
        let mut state = self.state();
        let key = Key::new(&kind.storage, namespace, name);
        let Some(old) = state.store.get(&key).cloned() else {
            if !options.subresource.is_empty() || !meta::field(&config, "resourceVersion").is_empty() {
                return Err(ApiError::not_found(&kind.group, &kind.plural, name));
            }
            let merged = apply::apply(&json!({}), &config, cursor, &writer, options.force)?;
            let mut object = config;
            object["metadata"]["managedFields"] = merged["metadata"]["managedFields"].clone();
            let object = rules::check_shape(kind, object, false)?;
            let untracked = WriteOptions {
                manager: None,
                ..options.clone()
            };
            let object = state.create(kind, namespace, object, &untracked)?;
            return Ok(Written {
                object,
                created: true,
            });
        };
        let mut merged = apply::apply(old.value(), &config, cursor, &writer, options.force)?;
        for field in ["uid", "resourceVersion"] {
            let value = meta::field(&config, field);
            if !value.is_empty() {
                meta::metadata_mut(&mut merged).insert(field.into(), json!(value));
            }
        }
        let merged = rules::check_shape(kind, merged, false)?;
        let object = state.replace(kind, key, &old, merged, options, false)?;
        Ok(Written {
            object,
            created: false,
        })
    }

    /// Deletes an object, or begins to.
    pub fn delete(
        &self,
        kind: &Kind,
        namespace: &str,
        name: &str,
        options: &DeleteOptions,
    ) -> Result<Deleted, ApiError> {
        let mut state = self.state();
        let key = Key::new(&kind.storage, namespace, name);
        let Some(old) = state.store.get(&key).cloned() else {
            return Err(ApiError::not_found(&kind.group, &kind.plural, name));
        };
        if kind.storage.as_str() == "namespaces" && matches!(name, "default" | "kube-system" | "kube-public")
        {
            return Err(ApiError::forbidden(format!(
                "namespaces {name:?} is forbidden: this namespace may not be deleted"
            )));
        }
        let deletion = rules::plan_delete(kind, old.value(), options, now())?;
        if options.dry_run {
            return Ok(match deletion {
                Deletion::Remove => Deleted::Removed(old),
                Deletion::Nothing => Deleted::Marked(old),
                Deletion::Mark(marked) => Deleted::Marked(Arc::new(Object::detached(marked))),
            });
        }
        Ok(match deletion {
            Deletion::Remove => {
                let removed = state.remove(key, old.value().clone());
                Deleted::Removed(removed.unwrap_or(old))
            }
            Deletion::Nothing => Deleted::Marked(old),
            Deletion::Mark(marked) => Deleted::Marked(state.put(key, marked)),
        })
    }
}

impl State {
    fn create(
        &mut self,
        kind: &Kind,
        namespace: &str,
        mut object: Value,
        options: &WriteOptions,
    ) -> Result<Arc<Object>, ApiError> {
        if kind.namespaced {
            self.check_namespace(kind, namespace, &object)?;
        }
        let generated = meta::name(&object).is_empty();
        let mut birth = Birth {
            uid: new_uid(),
            suffix: new_suffix(),
            now: now(),
        };
        let unnamed = object.clone();
        let mut tries = 0;
        let key = loop {
            rules::generate_name(&mut object, &birth.suffix);
            let key = Key::new(&kind.storage, namespace, meta::name(&object));
            if self.store.get(&key).is_none() {
                break key;
            }
            tries += 1;
            if !generated || tries == NAME_TRIES {
                return Err(ApiError::already_exists(&kind.group, &kind.plural, &key.name));
            }
            object = unnamed.clone();
            birth.suffix = new_suffix();
        };
        if !meta::field(&object, "resourceVersion").is_empty() {
            return Err(ApiError::bad_request(
                "resourceVersion should not be set on objects to be created",
            ));
        }
        rules::prepare_create(kind, &mut object, &birth, options.part == Part::Whole)?;
        self.track(kind, &json!({}), &mut object, options);
        self.assign_numbers(kind, &mut object, None, options.dry_run)?;
        if options.dry_run {
            return Ok(Arc::new(Object::detached(object)));
        }
        Ok(self.put(key, object))
    }

    fn replace(
        &mut self,
        kind: &Kind,
        key: Key,
        old: &Arc<Object>,
        mut new: Value,
        options: &WriteOptions,
        track: bool,
    ) -> Result<Arc<Object>, ApiError> {
        rules::prepare_update(kind, old.value(), &mut new, options.part, now())?;
        if track {
            self.track(kind, old.value(), &mut new, options);
        }
        self.assign_numbers(kind, &mut new, Some(old.value()), options.dry_run)?;
        if rules::is_same(old.value(), &new) {
            return Ok(old.clone());
        }
        if options.dry_run {
            return Ok(Arc::new(Object::detached(new)));
        }
        if rules::is_released(kind, &new) {
            return Ok(self.remove(key, new).unwrap_or_else(|| old.clone()));
        }
        Ok(self.put(key, new))
    }

    fn check_namespace(&self, kind: &Kind, namespace: &str, object: &Value) -> Result<(), ApiError> {
        let Some(found) = self.store.get(&Key::new("namespaces", "", namespace)) else {
            return Err(ApiError::not_found("", "namespaces", namespace));
        };
        if meta::is_terminating(found.value()) {
            let name = meta::name(object);
            return Err(ApiError::forbidden(format!(
                "{} {name:?} is forbidden: unable to create new content in namespace {namespace} because it is being terminated",
                kind.plural
            )));
        }
        Ok(())
    }

    fn track(&self, kind: &Kind, old: &Value, new: &mut Value, options: &WriteOptions) {
        let Some(manager) = options.manager.as_deref().filter(|m| !m.is_empty()) else {
            return;
        };
        let api_version = kind.api_version();
        let writer = apply::Writer {
            manager,
            api_version: &api_version,
            subresource: options.subresource,
            now: now(),
        };
        apply::track(old, new, Cursor::root(kind), &writer);
    }

    fn assign_numbers(
        &mut self,
        kind: &Kind,
        object: &mut Value,
        old: Option<&Value>,
        dry_run: bool,
    ) -> Result<(), ApiError> {
        if kind.storage.as_str() != "services" {
            return Ok(());
        }
        let result = if dry_run {
            self.numbers.clone().assign(object, old)
        } else {
            self.numbers.assign(object, old)
        };
        result.map_err(|causes| ApiError::invalid("", "Service", meta::name(object), causes))
    }
}
