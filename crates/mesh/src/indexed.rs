//! Compact records by key: one growing array, a table of numbers beside it, numbers that stay while a record lives.
//!
//! Costs per record: its size, at most a quarter more for growth, and about 9 bytes of index.

use std::hash::{BuildHasher, Hash};

use hashbrown::{DefaultHashBuilder, HashTable};

pub(crate) trait Keyed {
    type Key: Hash + Eq + Copy;

    fn key(&self) -> Self::Key;
}

#[derive(Debug)]
pub(crate) struct Indexed<T> {
    entries: Vec<T>,
    free: Vec<u32>,
    index: HashTable<u32>,
}

impl<T: Keyed> Indexed<T> {
    pub(crate) const fn new() -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
            index: HashTable::new(),
        }
    }

    pub(crate) fn find(&self, hasher: &DefaultHashBuilder, key: T::Key) -> Option<u32> {
        let entries = &self.entries;
        self.index
            .find(hasher.hash_one(key), |at| entries[*at as usize].key() == key)
            .copied()
    }

    /// Adds a record whose key is not there yet.
    pub(crate) fn insert(&mut self, hasher: &DefaultHashBuilder, value: T) -> u32 {
        let key = value.key();
        let at = if let Some(at) = self.free.pop() {
            self.entries[at as usize] = value;
            at
        } else {
            push_tight(&mut self.entries, value);
            (self.entries.len() - 1) as u32
        };
        let entries = &self.entries;
        self.index.insert_unique(hasher.hash_one(key), at, |at| {
            hasher.hash_one(entries[*at as usize].key())
        });
        at
    }

    /// Takes a record out of the index; its number may be given to another.
    pub(crate) fn remove(&mut self, hasher: &DefaultHashBuilder, at: u32) {
        let key = self.entries[at as usize].key();
        if let Ok(found) = self.index.find_entry(hasher.hash_one(key), |other| *other == at) {
            found.remove();
            self.free.push(at);
        }
    }

    pub(crate) fn reserve(&mut self, hasher: &DefaultHashBuilder, more: usize) {
        self.entries.reserve_exact(more.saturating_sub(self.free.len()));
        let entries = &self.entries;
        self.index
            .reserve(more, |at| hasher.hash_one(entries[*at as usize].key()));
    }

    /// Numbers in use, ascending.
    pub(crate) fn live(&self) -> Vec<u32> {
        if self.free.is_empty() {
            return (0..self.entries.len() as u32).collect();
        }
        let mut live: Vec<u32> = self.index.iter().copied().collect();
        live.sort_unstable();
        live
    }

    pub(crate) fn len(&self) -> usize {
        self.index.len()
    }
}

impl<T> std::ops::Index<u32> for Indexed<T> {
    type Output = T;

    fn index(&self, at: u32) -> &T {
        &self.entries[at as usize]
    }
}

impl<T> std::ops::IndexMut<u32> for Indexed<T> {
    fn index_mut(&mut self, at: u32) -> &mut T {
        &mut self.entries[at as usize]
    }
}

/// Pushes with growth by a quarter: the arrays live long, so memory counts more than moves.
pub(crate) fn push_tight<T>(list: &mut Vec<T>, value: T) {
    if list.len() == list.capacity() {
        list.reserve_exact((list.len() / 4).max(4));
    }
    list.push(value);
}
