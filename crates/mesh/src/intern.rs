//! Values stored once and named by a number, counted so that what nobody names any more goes.

use std::{
    borrow::Borrow,
    hash::{BuildHasher, Hash},
};

use hashbrown::{DefaultHashBuilder, HashTable};

use crate::slab::Slab;

#[derive(Debug)]
pub(crate) struct Interner<T> {
    entries: Slab<(T, u32)>,
    index: HashTable<u32>,
    hasher: DefaultHashBuilder,
}

impl<T: Hash + Eq> Interner<T> {
    pub(crate) fn new() -> Self {
        Self {
            entries: Slab::new(),
            index: HashTable::new(),
            hasher: DefaultHashBuilder::default(),
        }
    }

    /// The number of `value`, with one more holder. True if the value is new.
    pub(crate) fn acquire<Q>(&mut self, value: &Q, make: impl FnOnce() -> T) -> (u32, bool)
    where
        T: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        let hash = self.hasher.hash_one(value);
        let found = self
            .index
            .find(hash, |at| self.entries[*at].0.borrow() == value)
            .copied();
        if let Some(at) = found {
            self.entries[at].1 += 1;
            return (at, false);
        }
        let at = self.entries.insert((make(), 1));
        let (entries, hasher) = (&self.entries, &self.hasher);
        self.index
            .insert_unique(hash, at, |at| hasher.hash_one(entries[*at].0.borrow()));
        (at, true)
    }

    /// One more holder of a number in use.
    pub(crate) fn retain(&mut self, at: u32) {
        self.entries[at].1 += 1;
    }

    /// One holder less; the value, if that was the last one.
    pub(crate) fn release(&mut self, at: u32) -> Option<T> {
        let entry = &mut self.entries[at];
        entry.1 -= 1;
        if entry.1 > 0 {
            return None;
        }
        let hash = self.hasher.hash_one(&entry.0);
        if let Ok(found) = self.index.find_entry(hash, |other| *other == at) {
            found.remove();
        }
        self.entries.remove(at).map(|(value, _)| value)
    }

    pub(crate) fn resolve(&self, at: u32) -> &T {
        &self.entries[at].0
    }
}

/// Texts. Number 0 is the empty text and needs no holder.
#[derive(Debug)]
pub(crate) struct Texts(Interner<Box<str>>);

impl Texts {
    pub(crate) fn new() -> Self {
        Self(Interner::new())
    }

    pub(crate) fn acquire(&mut self, text: &str) -> u32 {
        if text.is_empty() {
            return 0;
        }
        self.0.acquire(text, || text.into()).0 + 1
    }

    pub(crate) fn retain(&mut self, at: u32) {
        if at != 0 {
            self.0.retain(at - 1);
        }
    }

    pub(crate) fn release(&mut self, at: u32) {
        if at != 0 {
            self.0.release(at - 1);
        }
    }

    pub(crate) fn resolve(&self, at: u32) -> &str {
        if at == 0 { "" } else { self.0.resolve(at - 1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_lives_as_long_as_it_has_holders() {
        let mut texts = Texts::new();
        let (a, b) = (texts.acquire("node-a"), texts.acquire("node-b"));
        assert_eq!((texts.acquire("node-a"), texts.acquire("")), (a, 0));
        texts.release(a);
        assert_eq!(
            (texts.resolve(a), texts.resolve(b), texts.resolve(0)),
            ("node-a", "node-b", "")
        );
        texts.release(a);
        assert_eq!(texts.acquire("node-c"), a, "the number is free again");
        assert_ne!(texts.acquire("node-a"), a);
        assert_eq!(texts.resolve(a), "node-c");
    }
}
