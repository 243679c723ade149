//! The usable objects of one kind, kept by watch events.
//!
//! Invariants: rows go only when their object was deleted, became unusable, or is missing from a *complete* new list.

use std::collections::{BTreeMap, BTreeSet};

use isthmus_k8s::{ConvertError, Converted};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::runtime::watcher::Event;

use super::report::{Kind, Log, ObjectKey, Problem};

#[derive(Debug)]
pub(super) struct Table<V> {
    rows: BTreeMap<ObjectKey, V>,
    /// What a list that is going on has named so far.
    listing: Option<BTreeSet<ObjectKey>>,
    synced: bool,
}

/// A row that changed, and what it was.
#[derive(Debug)]
pub(super) struct Changed<V> {
    pub(super) key: ObjectKey,
    pub(super) old: Option<V>,
}

impl<V> Default for Table<V> {
    fn default() -> Self {
        Self {
            rows: BTreeMap::new(),
            listing: None,
            synced: false,
        }
    }
}

impl<V: PartialEq> Table<V> {
    /// Takes in an event; `convert` makes a row of an object, or none if it is of no use.
    pub(super) fn on<O>(
        &mut self,
        kind: Kind,
        event: Event<O>,
        convert: impl Fn(&O) -> Result<Option<Converted<V>>, ConvertError>,
        log: &mut Log,
    ) -> Vec<Changed<V>>
    where
        O: k8s_openapi::Metadata<Ty = ObjectMeta>,
    {
        let mut upsert = |table: &mut Self, object: &O| {
            let key = ObjectKey::of(object.metadata());
            let (value, problems) = match convert(object) {
                Ok(None) => (None, vec![]),
                Ok(Some(Converted { value, warnings })) => {
                    (Some(value), warnings.into_iter().map(Problem::Warning).collect())
                }
                Err(error) => (None, vec![Problem::Refused(error)]),
            };
            log.record(kind, &key, problems);
            if let Some(listing) = &mut table.listing {
                listing.insert(key.clone());
            }
            table.set(key, value)
        };
        match event {
            Event::Init => {
                self.listing = Some(BTreeSet::new());
                vec![]
            }
            Event::InitApply(object) | Event::Apply(object) => upsert(self, &object).into_iter().collect(),
            Event::Delete(object) => {
                let key = ObjectKey::of(object.metadata());
                log.record(kind, &key, vec![]);
                self.set(key, None).into_iter().collect()
            }
            Event::InitDone => {
                self.synced = true;
                let Some(listed) = self.listing.take() else {
                    return vec![];
                };
                let gone = self.rows.extract_if(.., |key, _| !listed.contains(key));
                let gone: Vec<_> = gone.map(|(key, old)| Changed { key, old: Some(old) }).collect();
                for changed in &gone {
                    log.record(kind, &changed.key, vec![]);
                }
                gone
            }
        }
    }

    /// Sets a row and says what it was, if that differs.
    fn set(&mut self, key: ObjectKey, value: Option<V>) -> Option<Changed<V>> {
        if self.rows.get(&key) == value.as_ref() {
            return None;
        }
        let old = match value {
            Some(value) => self.rows.insert(key.clone(), value),
            None => self.rows.remove(&key),
        };
        Some(Changed { key, old })
    }
}

impl<V> Table<V> {
    pub(super) fn get(&self, key: &ObjectKey) -> Option<&V> {
        self.rows.get(key)
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &ObjectKey> {
        self.rows.keys()
    }

    pub(super) fn in_namespace<'t>(&'t self, namespace: &'t str) -> impl Iterator<Item = &'t ObjectKey> {
        let first = ObjectKey {
            namespace: namespace.into(),
            name: "".into(),
        };
        self.rows
            .range(first..)
            .map(|(key, _)| key)
            .take_while(move |key| &*key.namespace == namespace)
    }

    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    pub(super) fn is_synced(&self) -> bool {
        self.synced
    }
}
