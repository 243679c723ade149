//! The garbage collector: objects whose owners are all gone go too; foreground and orphan deletion.
//!
//! It keeps an index of who depends on whom, rebuilt when it falls behind. Invariants: an object with a living owner is
//! never deleted here; an object that waits for its dependents goes when the last one has.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::{Controller, ignore_gone};
use crate::api::Client;
use crate::error::ApiError;
use crate::meta;
use crate::rules::{self, DeleteOptions, Part, Propagation};
use crate::store::{Event, EventKind, Key};

/// See the module's header.
#[derive(Default)]
pub struct Garbage {
    /// By the owner's UID.
    dependents: BTreeMap<String, BTreeSet<Key>>,
    /// Owners that wait for their dependents, by UID.
    waiting: BTreeMap<String, Key>,
}

fn owner_uids(object: &Value) -> impl Iterator<Item = &str> {
    meta::owner_references(object)
        .iter()
        .map(|owner| meta::str_at(owner, &["uid"]))
}

fn waits(object: &Value) -> bool {
    meta::is_terminating(object)
        && meta::finalizers(object).any(|f| f == rules::FOREGROUND || f == rules::ORPHAN)
}

impl Garbage {
    fn add(&mut self, key: &Key, object: &Value) {
        for uid in owner_uids(object) {
            self.dependents
                .entry(uid.to_owned())
                .or_default()
                .insert(key.clone());
        }
        if waits(object) {
            self.waiting.insert(meta::uid(object).to_owned(), key.clone());
        }
    }

    fn remove(&mut self, key: &Key, object: &Value) {
        for uid in owner_uids(object) {
            if let Some(keys) = self.dependents.get_mut(uid) {
                keys.remove(key);
                if keys.is_empty() {
                    self.dependents.remove(uid);
                }
            }
        }
        self.waiting.remove(meta::uid(object));
    }

    fn dependents_of(&self, uid: &str) -> Vec<Key> {
        self.dependents.get(uid).into_iter().flatten().cloned().collect()
    }

    /// Foreground and orphan deletion of an object that has these finalizers.
    fn finish(&mut self, client: &Client, key: &Key, object: &Value) -> Result<(), ApiError> {
        let uid = meta::uid(object).to_owned();
        let orphan = meta::finalizers(object).any(|f| f == rules::ORPHAN);
        for dependent in self.dependents_of(&uid) {
            let resource = dependent.resource.as_str();
            if orphan {
                let write = client.modify(
                    resource,
                    &dependent.namespace,
                    &dependent.name,
                    Part::Whole,
                    |object| {
                        drop_owners(object, |owner| meta::str_at(owner, &["uid"]) == uid);
                    },
                );
                ignore_gone(write)?;
            } else if client
                .find(resource, &dependent.namespace, &dependent.name)
                .is_some_and(|d| !waits(d.value()))
            {
                let options = DeleteOptions {
                    propagation: Propagation::Foreground,
                    ..DeleteOptions::default()
                };
                ignore_gone(client.delete(resource, &dependent.namespace, &dependent.name, &options))?;
            }
        }
        let left = self
            .dependents_of(&uid)
            .iter()
            .filter_map(|d| client.find(d.resource.as_str(), &d.namespace, &d.name))
            .any(|d| owner_uids(d.value()).any(|u| u == uid));
        if left {
            return Ok(());
        }
        let finalizer = if orphan { rules::ORPHAN } else { rules::FOREGROUND };
        ignore_gone(client.modify(
            key.resource.as_str(),
            &key.namespace,
            &key.name,
            Part::Whole,
            |object| {
                meta::remove_finalizer(object, finalizer);
            },
        ))
    }
}

fn drop_owners(object: &mut Value, gone: impl Fn(&Value) -> bool) {
    let metadata = meta::metadata_mut(object);
    if let Some(owners) = metadata.get_mut("ownerReferences").and_then(Value::as_array_mut) {
        owners.retain(|owner| !gone(owner));
        if owners.is_empty() {
            metadata.remove("ownerReferences");
        }
    }
}

/// Whether the owner that a reference names exists, with that UID.
fn is_alive(client: &Client, namespace: &str, owner: &Value) -> bool {
    let text = |field: &str| meta::str_at(owner, &[field]);
    let kind = client
        .api()
        .state()
        .kinds
        .by_type(text("apiVersion"), text("kind"))
        .cloned();
    // Nothing is known about a kind that is not served, so its dependents stay.
    let Some(kind) = kind else { return true };
    let namespace = if kind.namespaced { namespace } else { "" };
    let found = client.find(kind.storage.as_str(), namespace, text("name"));
    found.is_some_and(|found| meta::uid(found.value()) == text("uid"))
}

impl Controller for Garbage {
    type Key = Key;
    const NAME: &'static str = "garbage collector";
    const RESOURCES: &'static [&'static str] = &[];

    fn all(&mut self, client: &Client) -> BTreeSet<Key> {
        *self = Garbage::default();
        let mut keys = BTreeSet::new();
        let resources: BTreeSet<_> = client
            .api()
            .kinds()
            .iter()
            .map(|kind| kind.storage.clone())
            .collect();
        for resource in resources {
            for object in client.all(resource.as_str(), None) {
                let object = object.value();
                let key = Key::new(&resource, meta::namespace(object), meta::name(object));
                self.add(&key, object);
                if waits(object) || owner_uids(object).next().is_some() {
                    keys.insert(key);
                }
            }
        }
        keys
    }

    fn affected(&mut self, _client: &Client, event: &Event, keys: &mut BTreeSet<Key>) {
        let object = event.object.value();
        if let Some(previous) = &event.previous {
            self.remove(&event.key, previous.value());
        }
        if event.kind == EventKind::Deleted {
            keys.extend(self.dependents_of(meta::uid(object)));
        } else {
            self.add(&event.key, object);
            let owners_changed = event
                .previous
                .as_ref()
                .is_none_or(|old| meta::owner_references(old.value()) != meta::owner_references(object));
            if waits(object) || (owners_changed && owner_uids(object).next().is_some()) {
                keys.insert(event.key.clone());
            }
        }
        let owners: BTreeSet<&str> = event
            .previous
            .iter()
            .flat_map(|old| owner_uids(old.value()))
            .chain(owner_uids(object))
            .collect();
        keys.extend(owners.iter().filter_map(|uid| self.waiting.get(*uid)).cloned());
    }

    fn reconcile(&mut self, client: &Client, key: &Key) -> Result<(), ApiError> {
        let Some(object) = client.find(key.resource.as_str(), &key.namespace, &key.name) else {
            return Ok(());
        };
        let object = object.value();
        if waits(object) {
            return self.finish(client, key, object);
        }
        let owners = meta::owner_references(object);
        let (alive, dead): (Vec<&Value>, Vec<&Value>) = owners
            .iter()
            .partition(|owner| is_alive(client, &key.namespace, owner));
        if dead.is_empty() {
            return Ok(());
        }
        if alive.is_empty() {
            let options = DeleteOptions {
                uid: Some(meta::uid(object).to_owned()),
                ..DeleteOptions::default()
            };
            return match client.delete(key.resource.as_str(), &key.namespace, &key.name, &options) {
                // A new object took the name: not our business.
                Err(error) if error.is_conflict() => Ok(()),
                other => ignore_gone(other),
            };
        }
        let dead: BTreeSet<String> = dead
            .iter()
            .map(|owner| meta::str_at(owner, &["uid"]).to_owned())
            .collect();
        ignore_gone(client.modify(
            key.resource.as_str(),
            &key.namespace,
            &key.name,
            Part::Whole,
            |object| {
                drop_owners(object, |owner| dead.contains(meta::str_at(owner, &["uid"])));
            },
        ))
    }
}
