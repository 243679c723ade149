//! What is desired, what the store holds, and which keys may differ. No I/O.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
};

use bytes::Bytes;
use isthmus_wire::keys::HEARTBEAT;

use super::Stored;
use crate::{
    follower::Change,
    plan::{Limits, Op, Plan, plan_writes},
};

struct Actual {
    value: Bytes,
    /// Revision at which the store took it; guards against events that are older than our own writes.
    mod_revision: i64,
}

/// Desired and actual content. Only keys marked dirty are compared, so that one change costs the same in a large store.
pub(super) struct Content {
    scopes: Vec<String>,
    pruned: BTreeSet<String>,
    desired: BTreeMap<Bytes, Bytes>,
    actual: BTreeMap<Bytes, Actual>,
    /// Keys that were put by this process and are not desired any more.
    dropped: BTreeSet<Bytes>,
    dirty: BTreeSet<Bytes>,
    /// Desired keys whose value is too large, here or for the store.
    refused: BTreeSet<Bytes>,
    generation: u64,
}

impl Content {
    pub(super) fn new(scopes: Vec<String>) -> Self {
        Self {
            scopes,
            pruned: BTreeSet::new(),
            desired: BTreeMap::new(),
            actual: BTreeMap::new(),
            dropped: BTreeSet::new(),
            dirty: BTreeSet::new(),
            refused: BTreeSet::new(),
            generation: 0,
        }
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    pub(super) fn pending(&self) -> usize {
        self.dirty.len()
    }

    pub(super) fn refused(&self) -> usize {
        self.refused.len()
    }

    /// Returns whether there may be something to write.
    pub(super) fn put(&mut self, key: Bytes, value: Bytes) -> bool {
        if !self.scopes.iter().any(|scope| key.starts_with(scope.as_bytes())) {
            tracing::error!(key = %String::from_utf8_lossy(&key), "key lies outside the writer's scopes; not written");
            return false;
        }
        if self.desired.get(&key) == Some(&value) {
            return false;
        }
        self.generation += 1;
        self.dropped.remove(&key);
        self.refused.remove(&key);
        self.desired.insert(key.clone(), value);
        self.dirty.insert(key);
        true
    }

    /// Returns whether there may be something to write.
    pub(super) fn delete(&mut self, key: &[u8]) -> bool {
        let Some((key, _)) = self.desired.remove_entry(key) else {
            return false;
        };
        self.generation += 1;
        self.refused.remove(&key);
        self.dropped.insert(key.clone());
        self.dirty.insert(key);
        true
    }

    pub(super) fn prune(&mut self, prefix: &str) {
        self.generation += 1;
        self.pruned.insert(prefix.to_owned());
        self.dirty
            .extend(keys_under(&self.actual, prefix.as_bytes()).cloned());
    }

    pub(super) fn stored(&self, prefix: &[u8]) -> Vec<Stored> {
        self.actual
            .range::<[u8], _>(from(prefix))
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, actual)| Stored {
                key: key.clone(),
                value: actual.value.clone(),
            })
            .collect()
    }

    /// The store's revisions perhaps begin anew: what is known about their order is worth nothing.
    pub(super) fn on_untrusted(&mut self, scope: &str) {
        for (_, actual) in self
            .actual
            .range_mut::<[u8], _>(from(scope.as_bytes()))
            .take_while(|(key, _)| key.starts_with(scope.as_bytes()))
        {
            actual.mod_revision = 0;
        }
    }

    /// Everything that is desired has to be looked at once the store is known.
    pub(super) fn on_listed(&mut self) {
        self.dirty.extend(self.desired.keys().cloned());
    }

    /// Takes in what the store told.
    pub(super) fn on_change(&mut self, change: Change) {
        let (key, value, mod_revision) = match change {
            Change::Put {
                key,
                value,
                mod_revision,
                ..
            } => (key, Some(value), mod_revision),
            Change::Delete { key, mod_revision } => (key, None, mod_revision),
            // Too large to be ours: an empty value stands for it, so that it is overwritten or deleted.
            Change::Refused {
                key, mod_revision, ..
            } => (key, Some(Bytes::new()), mod_revision),
        };
        if self
            .actual
            .get(&key)
            .is_some_and(|actual| actual.mod_revision > mod_revision)
        {
            return;
        }
        self.dirty.insert(key.clone());
        match value {
            Some(value) => self.set_actual(key, value, mod_revision),
            None => {
                self.actual.remove(&key);
            }
        }
    }

    /// Takes in what we wrote ourselves.
    pub(super) fn on_written(&mut self, ops: &[Op], revision: i64) {
        for op in ops {
            match op {
                Op::Put { key, value } => self.set_actual(key.clone(), value.clone(), revision),
                Op::Delete { key } => {
                    self.actual.remove(key);
                    self.dropped.remove(key);
                }
            }
        }
    }

    /// A write failed, perhaps after it was applied: those keys are to be looked at again.
    pub(super) fn on_failed(&mut self, ops: impl IntoIterator<Item = Op>) {
        self.dirty.extend(ops.into_iter().map(|op| op.key().clone()));
    }

    /// The store does not take it, and would not if it were asked again. The key keeps the value that the store has.
    pub(super) fn on_refused(&mut self, op: Op) {
        self.refused.insert(op.key().clone());
    }

    fn set_actual(&mut self, key: Bytes, value: Bytes, mod_revision: i64) {
        // One copy of an equal value is enough, and ours does not keep a whole message alive.
        let (key, value) = match self.desired.get_key_value(&key) {
            Some((own_key, own)) if *own == value => (own_key.clone(), own.clone()),
            _ => (Bytes::copy_from_slice(&key), Bytes::copy_from_slice(&value)),
        };
        self.actual.insert(key, Actual { value, mod_revision });
    }

    /// What to write for the keys that may differ; none of them is dirty afterwards.
    pub(super) fn take_plan(&mut self, limits: Limits) -> Plan {
        let dirty = std::mem::take(&mut self.dirty);
        let mut actual = BTreeMap::new();
        let mut desired = BTreeMap::new();
        for key in dirty {
            if let Some(value) = self.actual.get(&key) {
                actual.insert(key.clone(), value.value.clone());
            }
            if let Some(value) = self.desired.get(&key) {
                desired.insert(key, value.clone());
            }
        }
        let may_delete = |key: &[u8]| {
            key != HEARTBEAT.as_bytes()
                && (self.dropped.contains(key)
                    || self
                        .pruned
                        .iter()
                        .any(|prefix| key.starts_with(prefix.as_bytes())))
        };
        let plan = plan_writes(&actual, &desired, may_delete, limits);
        self.refused.extend(plan.refused.iter().cloned());
        plan
    }
}

fn from(prefix: &[u8]) -> (Bound<&[u8]>, Bound<&[u8]>) {
    (Bound::Included(prefix), Bound::Unbounded)
}

fn keys_under<'m>(actual: &'m BTreeMap<Bytes, Actual>, prefix: &'m [u8]) -> impl Iterator<Item = &'m Bytes> {
    actual
        .range::<[u8], _>(from(prefix))
        .map(|(key, _)| key)
        .take_while(move |key| key.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str, value: &str, mod_revision: i64) -> Change {
        Change::Put {
            key: Bytes::copy_from_slice(key.as_bytes()),
            value: Bytes::copy_from_slice(value.as_bytes()),
            create_revision: mod_revision,
            mod_revision,
            version: 1,
        }
    }

    fn txns(content: &mut Content) -> Vec<Vec<Op>> {
        content.take_plan(Limits::default()).txns
    }

    #[test]
    fn what_the_store_holds_already_is_not_written() {
        let mut content = Content::new(vec!["a/".into()]);
        content.put("a/1".into(), "x".into());
        content.on_change(put("a/1", "x", 7));
        content.on_change(put("a/2", "left behind", 8));
        content.on_listed();
        assert_eq!(txns(&mut content), Vec::<Vec<Op>>::new());
        content.prune("a/");
        assert_eq!(txns(&mut content), [[Op::Delete { key: "a/2".into() }]]);
    }

    #[test]
    fn late_events_do_not_undo_own_writes() {
        let mut content = Content::new(vec!["a/".into()]);
        content.put("a/1".into(), "new".into());
        let plan = content.take_plan(Limits::default());
        content.on_written(&plan.txns[0], 10);
        content.on_change(put("a/1", "old", 9));
        assert_eq!(txns(&mut content), Vec::<Vec<Op>>::new());
        content.on_change(put("a/1", "foreign", 11));
        assert_eq!(txns(&mut content).len(), 1);
        // A new history starts low; its content counts.
        content.on_untrusted("a/");
        content.on_change(put("a/1", "restored", 2));
        assert_eq!(txns(&mut content).len(), 1);
    }

    #[test]
    fn refused_keys_are_counted_until_their_value_changes() {
        let mut content = Content::new(vec!["a/".into()]);
        let limits = Limits {
            value: 3,
            ..Limits::default()
        };
        content.put("a/1".into(), "large".into());
        content.put("a/2".into(), "x".into());
        assert_eq!(content.take_plan(limits).txns.len(), 1);
        assert_eq!(content.refused(), 1);
        // Looked at again after a list, and still one.
        content.on_listed();
        content.take_plan(limits);
        assert_eq!(content.refused(), 1);
        content.put("a/1".into(), "y".into());
        assert_eq!(content.refused(), 0);
        content.on_refused(Op::Put {
            key: "a/1".into(),
            value: "y".into(),
        });
        content.delete(b"a/1");
        assert_eq!(content.refused(), 0);
    }

    #[test]
    fn own_keys_are_deleted_without_a_prune_and_foreign_ones_are_not() {
        let mut content = Content::new(vec!["a/".into()]);
        content.put("a/1".into(), "x".into());
        let plan = content.take_plan(Limits::default());
        content.on_written(&plan.txns[0], 3);
        content.on_change(put("a/2", "y", 4));
        content.delete(b"a/1");
        content.delete(b"a/2");
        assert_eq!(txns(&mut content), [[Op::Delete { key: "a/1".into() }]]);
        content.put("b/1".into(), "x".into());
        assert_eq!(txns(&mut content), Vec::<Vec<Op>>::new());
    }
}
