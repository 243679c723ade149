//! The object store: current objects, one revision counter, and a bounded history of events per resource.
//!
//! In: puts and removals of whole objects, in order. Out: snapshots, also of the recent past, and the events since a
//! revision. Pure: no clock, no I/O, no locks; the caller serialises access.
//!
//! Invariants: each write gets the next revision and appears once in the history of its resource; a snapshot at
//! revision `r` plus the events after `r` equals any later snapshot; a revision older than the history of its
//! resource is refused, never answered wrongly. Memory: at most `history_len` events a resource.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::ops::Bound;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use serde_json::{Value, json};

use crate::meta;

/// Name of a resource across versions, `<plural>.<group>`, or `<plural>` in the core group.
#[derive(Clone, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ResourceId(Arc<str>);

impl ResourceId {
    /// The resource `plural` of `group`.
    pub fn new(group: &str, plural: &str) -> ResourceId {
        ResourceId(if group.is_empty() {
            plural.into()
        } else {
            format!("{plural}.{group}").into()
        })
    }

    /// The text form.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&str> for ResourceId {
    fn from(text: &str) -> ResourceId {
        ResourceId(text.into())
    }
}

impl fmt::Debug for ResourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for ResourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where an object lives. `namespace` is empty for cluster-scoped kinds.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Key {
    /// Its resource.
    pub resource: ResourceId,
    /// Its namespace, or "".
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl Key {
    /// The key of `name` in `namespace`.
    pub fn new(resource: impl Into<ResourceId>, namespace: &str, name: &str) -> Key {
        Key {
            resource: resource.into(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }
    }
}

impl From<&ResourceId> for ResourceId {
    fn from(id: &ResourceId) -> ResourceId {
        id.clone()
    }
}

/// One version of an object. Immutable; shared by readers and watchers.
pub struct Object {
    value: Value,
    revision: u64,
    json: OnceLock<Bytes>,
}

impl Object {
    /// An object outside of any store, for example the answer to a dry run.
    pub fn detached(value: Value) -> Object {
        let revision = meta::field(&value, "resourceVersion").parse().unwrap_or(0);
        Object {
            value,
            revision,
            json: OnceLock::new(),
        }
    }

    /// The object.
    pub fn value(&self) -> &Value {
        &self.value
    }

    /// The revision that wrote it.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Its JSON text, made once however many watchers there are.
    pub fn json(&self) -> Bytes {
        // Serialising a `Value` cannot fail: its keys are strings.
        self.json
            .get_or_init(|| serde_json::to_vec(&self.value).unwrap_or_default().into())
            .clone()
    }
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.value, self.revision)
    }
}

/// What an event did.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum EventKind {
    /// The object is new.
    Added,
    /// The object changed.
    Modified,
    /// The object is gone; `object` is its last state.
    Deleted,
}

/// A write, as the history keeps it.
#[derive(Clone, Debug)]
pub struct Event {
    /// The revision of the write.
    pub revision: u64,
    /// What it did.
    pub kind: EventKind,
    /// Which object.
    pub key: Key,
    /// The new state, or the last one of a deleted object (with the revision of the deletion).
    pub object: Arc<Object>,
    /// The state before, unless it is new.
    pub previous: Option<Arc<Object>>,
}

/// The asked revision is older than what the history of the resource holds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Compacted {
    /// The oldest revision from which events are still known.
    pub oldest: u64,
}

/// Objects of a resource, by namespace and name.
pub type Snapshot = BTreeMap<(String, String), Arc<Object>>;

#[derive(Default)]
struct Resource {
    objects: Snapshot,
    history: VecDeque<Event>,
    /// Revision of the newest event that is no longer in the history.
    compacted: u64,
}

/// See the module's header.
pub struct Store {
    revision: u64,
    history_len: usize,
    resources: BTreeMap<ResourceId, Resource>,
}

impl Store {
    /// An empty store whose history keeps `history_len` events a resource (at least one).
    pub fn new(history_len: usize) -> Store {
        Store {
            revision: 1,
            history_len: history_len.max(1),
            resources: BTreeMap::new(),
        }
    }

    /// The revision of the newest write.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// The object at `key`.
    pub fn get(&self, key: &Key) -> Option<&Arc<Object>> {
        let resource = self.resources.get(&key.resource)?;
        resource.objects.get(&(key.namespace.clone(), key.name.clone()))
    }

    /// Objects of a resource in key order, all or of one namespace, after the key `after`.
    pub fn scan<'a>(
        &'a self,
        resource: &ResourceId,
        namespace: Option<&'a str>,
        after: Option<&(String, String)>,
    ) -> impl Iterator<Item = &'a Arc<Object>> + use<'a> {
        let start = match (after, namespace) {
            (Some(after), _) => Bound::Excluded(after.clone()),
            (None, Some(namespace)) => Bound::Included((namespace.to_owned(), String::new())),
            (None, None) => Bound::Unbounded,
        };
        self.resources
            .get(resource)
            .into_iter()
            .flat_map(move |r| r.objects.range((start.clone(), Bound::Unbounded)))
            .take_while(move |((ns, _), _)| namespace.is_none_or(|want| ns == want))
            .map(|(_, object)| object)
    }

    /// How many objects a resource has.
    pub fn count(&self, resource: &ResourceId) -> usize {
        self.resources.get(resource).map_or(0, |r| r.objects.len())
    }

    /// The resources that hold or held objects.
    pub fn resources(&self) -> impl Iterator<Item = &ResourceId> {
        self.resources.keys()
    }

    /// Writes an object; sets its `resourceVersion`.
    pub fn put(&mut self, key: Key, value: Value) -> Event {
        let object = self.next_version(value);
        let resource = self.resources.entry(key.resource.clone()).or_default();
        let slot = (key.namespace.clone(), key.name.clone());
        let previous = resource.objects.insert(slot, object.clone());
        let kind = if previous.is_some() {
            EventKind::Modified
        } else {
            EventKind::Added
        };
        self.record(Event {
            revision: object.revision,
            kind,
            key,
            object,
            previous,
        })
    }

    /// Removes an object; `last` is what watchers see as its last state.
    pub fn remove(&mut self, key: Key, last: Value) -> Option<Event> {
        let resource = self.resources.get_mut(&key.resource)?;
        let previous = resource
            .objects
            .remove(&(key.namespace.clone(), key.name.clone()))?;
        let object = self.next_version(last);
        let kind = EventKind::Deleted;
        Some(self.record(Event {
            revision: object.revision,
            kind,
            key,
            object,
            previous: Some(previous),
        }))
    }

    /// Forgets a resource with its history; watchers of it are told to list again.
    pub fn drop_resource(&mut self, resource: &ResourceId) {
        self.revision += 1;
        if let Some(resource) = self.resources.get_mut(resource) {
            *resource = Resource {
                compacted: self.revision,
                ..Resource::default()
            };
        }
    }

    /// The events of a resource after `revision`, oldest first.
    pub fn since(
        &self,
        resource: &ResourceId,
        revision: u64,
    ) -> Result<impl Iterator<Item = &Event>, Compacted> {
        let resource = self.resources.get(resource);
        if let Some(resource) = resource.filter(|r| revision < r.compacted) {
            return Err(Compacted {
                oldest: resource.compacted,
            });
        }
        let from = resource.map_or(0, |r| {
            r.history.partition_point(|event| event.revision <= revision)
        });
        Ok(resource.into_iter().flat_map(move |r| r.history.range(from..)))
    }

    /// The objects of a resource as they were at `revision`.
    pub fn at(&self, resource: &ResourceId, revision: u64) -> Result<Snapshot, Compacted> {
        let later: Vec<&Event> = self.since(resource, revision)?.collect();
        let mut snapshot = self
            .resources
            .get(resource)
            .map(|r| r.objects.clone())
            .unwrap_or_default();
        for event in later.into_iter().rev() {
            let slot = (event.key.namespace.clone(), event.key.name.clone());
            match &event.previous {
                Some(previous) => snapshot.insert(slot, previous.clone()),
                None => snapshot.remove(&slot),
            };
        }
        Ok(snapshot)
    }

    fn next_version(&mut self, mut value: Value) -> Arc<Object> {
        self.revision += 1;
        meta::metadata_mut(&mut value).insert("resourceVersion".into(), json!(self.revision.to_string()));
        Arc::new(Object {
            value,
            revision: self.revision,
            json: OnceLock::new(),
        })
    }

    fn record(&mut self, event: Event) -> Event {
        let resource = self.resources.entry(event.key.resource.clone()).or_default();
        if resource.history.len() == self.history_len
            && let Some(oldest) = resource.history.pop_front()
        {
            resource.compacted = oldest.revision;
        }
        resource.history.push_back(event.clone());
        event
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(store: &mut Store, name: &str) -> Event {
        store.put(Key::new("pods", "ns", name), json!({"metadata": {"name": name}}))
    }

    #[test]
    fn history_is_bounded_and_old_revisions_are_refused() {
        let mut store = Store::new(2);
        let first = put(&mut store, "a").revision;
        let second = put(&mut store, "b").revision;
        let third = put(&mut store, "c").revision;
        let pods = ResourceId::from("pods");
        assert_eq!(
            store.since(&pods, first - 1).err(),
            Some(Compacted { oldest: first })
        );
        let seen: Vec<u64> = store.since(&pods, first).unwrap().map(|e| e.revision).collect();
        assert_eq!(seen, [second, third]);
        // Another resource's writes do not age this one's history.
        store.put(Key::new("nodes", "", "n"), json!({}));
        assert!(store.since(&pods, first).is_ok());
    }

    #[test]
    fn scan_pages_within_a_namespace() {
        let mut store = Store::new(8);
        for (ns, name) in [("a", "z"), ("b", "x"), ("b", "y"), ("c", "w")] {
            store.put(Key::new("pods", ns, name), json!({"metadata": {"name": name}}));
        }
        let pods = ResourceId::from("pods");
        let names = |ns, after: Option<(&str, &str)>| -> Vec<String> {
            let after = after.map(|(a, b)| (a.to_owned(), b.to_owned()));
            store
                .scan(&pods, ns, after.as_ref())
                .map(|o| meta::name(o.value()).to_owned())
                .collect()
        };
        assert_eq!(names(None, None), ["z", "x", "y", "w"]);
        assert_eq!(names(Some("b"), None), ["x", "y"]);
        assert_eq!(names(Some("b"), Some(("b", "x"))), ["y"]);
    }
}
