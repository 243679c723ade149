//! Present keys of the embedded store, in bytes that they share with the readers' store. Pure.
//!
//! Invariant: a key is there once, with the change that made it what it is.

use std::{borrow::Borrow, cmp::Ordering, collections::BTreeSet, ops::Bound};

use super::state::Place;
use crate::store::Encoded;

type Bounds<'b> = (Bound<&'b [u8]>, Bound<&'b [u8]>);

/// A key's value and where its change lies.
#[derive(Clone, Debug)]
pub(super) struct Record {
    pub(super) encoded: Encoded,
    /// Among the changes of its revision.
    pub(super) index: u32,
}

impl Record {
    pub(super) fn place(&self) -> Place {
        (self.encoded.revisions().modified, self.index)
    }

    /// Bytes that it takes in a log.
    pub(super) fn len(&self) -> usize {
        self.encoded.bytes().len()
    }
}

/// Records by key: each is its own key.
#[derive(Clone, Debug, Default)]
pub(super) struct Content {
    records: BTreeSet<ByKey>,
    bytes: usize,
}

impl Content {
    /// Bytes of all records.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn len(&self) -> usize {
        self.records.len()
    }

    pub(super) fn contains(&self, key: &[u8]) -> bool {
        self.records.contains(key)
    }

    pub(super) fn take(&mut self, key: &[u8]) -> Option<Record> {
        let record = self.records.take(key)?.0;
        self.bytes -= record.len();
        Some(record)
    }

    /// Whatever had the key before was taken out.
    pub(super) fn insert(&mut self, record: Record) {
        self.bytes += record.len();
        self.records.insert(ByKey(record));
    }

    /// In key order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Record> {
        self.records.iter().map(|record| &record.0)
    }

    /// The keys that etcd means by these two fields.
    pub(super) fn between(&self, key: &[u8], range_end: &[u8]) -> impl Iterator<Item = &Record> {
        let bounds: Option<Bounds<'_>> = match range_end {
            [] => Some((Bound::Included(key), Bound::Included(key))),
            [0] => Some((Bound::Included(key), Bound::Unbounded)),
            end if end > key => Some((Bound::Included(key), Bound::Excluded(end))),
            _ => None,
        };
        let range = bounds.map(|bounds| self.records.range::<[u8], _>(bounds));
        range.into_iter().flatten().map(|record| &record.0)
    }
}

/// Compares whole records, not keys alone.
impl PartialEq for Content {
    fn eq(&self, other: &Self) -> bool {
        let whole = |record: &ByKey| (record.0.encoded.clone(), record.0.index);
        self.records.iter().map(whole).eq(other.records.iter().map(whole))
    }
}

/// A record as a set sees it: its key.
#[derive(Clone, Debug)]
struct ByKey(Record);

impl Borrow<[u8]> for ByKey {
    fn borrow(&self) -> &[u8] {
        self.0.encoded.key()
    }
}

impl Ord for ByKey {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.encoded.key().cmp(other.0.encoded.key())
    }
}

impl PartialOrd for ByKey {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for ByKey {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for ByKey {}
