//! A source's present entries in key order: short sorted runs, so that an entry costs its pointer, and the entries of a range
//! are counted without a look at them (each page of a list says how many there are).

use std::{ops::Bound, sync::Arc};

use super::entry::Entry;

/// Entries of a run; an insertion moves at most so many pointers.
const RUN_MAX: usize = 512;

/// Bounds of a range of keys.
pub(super) type Bounds<'r> = (Bound<&'r [u8]>, Bound<&'r [u8]>);

/// Entries by key.
#[derive(Debug, Default)]
pub(super) struct Content {
    /// None is empty.
    runs: Vec<Vec<Arc<Entry>>>,
    len: usize,
    bytes: usize,
}

/// A place between entries: a run, and how many of its entries lie before. Never at a run's end, but at the end of all.
type Place = (usize, usize);

impl Content {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Bytes of the entries, as they are kept.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Before the first entry that is not `before`.
    fn place(&self, before: impl Fn(&Entry) -> bool) -> Place {
        let run = self
            .runs
            .partition_point(|run| run.last().is_some_and(|last| before(last)));
        let index = self
            .runs
            .get(run)
            .map_or(0, |run| run.partition_point(|entry| before(entry)));
        (run, index)
    }

    fn find(&self, key: &[u8]) -> (Place, bool) {
        let place = self.place(|entry| entry.key() < key);
        let found = self.at(place).is_some_and(|entry| entry.key() == key);
        (place, found)
    }

    fn at(&self, (run, index): Place) -> Option<&Arc<Entry>> {
        self.runs.get(run)?.get(index)
    }

    pub(super) fn get(&self, key: &[u8]) -> Option<&Arc<Entry>> {
        let (place, found) = self.find(key);
        self.at(place).filter(|_| found)
    }

    /// Returns the entry that had the key before.
    pub(super) fn insert(&mut self, entry: Arc<Entry>) -> Option<Arc<Entry>> {
        let ((run, index), found) = self.find(entry.key());
        self.bytes += entry.encoded_len();
        if found {
            let before = std::mem::replace(&mut self.runs[run][index], entry);
            self.bytes -= before.encoded_len();
            return Some(before);
        }
        self.len += 1;
        // After the last of all it goes to the last run.
        let (run, index) = match (self.runs.get(run), self.runs.last()) {
            (Some(_), _) => (run, index),
            (None, Some(last)) => (run - 1, last.len()),
            (None, None) => {
                self.runs.push(vec![entry]);
                return None;
            }
        };
        if self.runs[run].len() < RUN_MAX {
            self.runs[run].insert(index, entry);
        } else if index == RUN_MAX {
            // Keys that come in order, as a list's do, leave full runs behind.
            self.runs.insert(run + 1, vec![entry]);
        } else {
            let upper = self.runs[run].split_off(RUN_MAX / 2);
            self.runs.insert(run + 1, upper);
            let (run, index) = if index > RUN_MAX / 2 {
                (run + 1, index - RUN_MAX / 2)
            } else {
                (run, index)
            };
            self.runs[run].insert(index, entry);
        }
        None
    }

    pub(super) fn remove(&mut self, key: &[u8]) -> Option<Arc<Entry>> {
        let ((run, index), found) = self.find(key);
        if !found {
            return None;
        }
        self.len -= 1;
        let entry = self.runs[run].remove(index);
        self.bytes -= entry.encoded_len();
        let left = self.runs[run].len();
        let next = self.runs.get(run + 1).map(Vec::len);
        if left == 0 {
            self.runs.remove(run);
        } else if next.is_some_and(|next| left + next <= RUN_MAX / 2) {
            let next = self.runs.remove(run + 1);
            self.runs[run].extend(next);
        }
        Some(entry)
    }

    /// All entries in key order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<Entry>> {
        self.runs.iter().flatten()
    }

    /// Those in `bounds`, and how many they are.
    pub(super) fn range(&self, bounds: &Bounds<'_>) -> (impl Iterator<Item = &Arc<Entry>>, usize) {
        let start = match bounds.0 {
            Bound::Included(key) => self.place(|entry| entry.key() < key),
            Bound::Excluded(key) => self.place(|entry| entry.key() <= key),
            Bound::Unbounded => (0, 0),
        };
        let end = match bounds.1 {
            Bound::Included(key) => self.place(|entry| entry.key() <= key),
            Bound::Excluded(key) => self.place(|entry| entry.key() < key),
            Bound::Unbounded => (self.runs.len(), 0),
        };
        let before_end: usize = self
            .runs
            .get(start.0..end.0)
            .map_or(0, |runs| runs.iter().map(Vec::len).sum());
        let count = (before_end + end.1).saturating_sub(start.1);
        let runs = self.runs.get(start.0..).unwrap_or_default();
        (runs.iter().flatten().skip(start.1).take(count), count)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::store::{Encoded, Revisions};

    fn entry(key: u16, version: i64) -> Arc<Entry> {
        let revisions = Revisions {
            create: 1,
            modified: version,
            version,
        };
        Arc::new(Entry::new(
            Encoded::new(&key.to_be_bytes(), b"v", revisions, 0),
            1,
            1,
        ))
    }

    fn bound(kind: u8, key: &[u8]) -> Bound<&[u8]> {
        match kind {
            0 => Bound::Included(key),
            1 => Bound::Excluded(key),
            _ => Bound::Unbounded,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn it_is_a_map_that_counts(
            begin in 0u16..4000,
            steps in proptest::collection::vec((0u16..4000, 0u8..8), 0..6000),
            ranges in proptest::collection::vec((0u8..3, 0u16..4100, 0u8..3, 0u16..4100), 40),
        ) {
            let (mut content, mut model) = (Content::default(), BTreeMap::<Bytes, i64>::new());
            let ordered = (0..begin).map(|key| (key, 0));
            for (version, (key, kind)) in ordered.chain(steps).enumerate() {
                let entry = entry(key, version as i64);
                let key = entry.shared_key();
                if kind < 4 {
                    let before = content.insert(entry).map(|entry| entry.revisions().version);
                    prop_assert_eq!(before, model.insert(key, version as i64));
                } else {
                    let before = content.remove(&key).map(|entry| entry.revisions().version);
                    prop_assert_eq!(before, model.remove(&key));
                }
            }
            let list = |entry: &Arc<Entry>| (entry.shared_key(), entry.revisions().version);
            prop_assert_eq!(content.len(), model.len());
            prop_assert_eq!(content.bytes(), content.iter().map(|entry| entry.encoded_len()).sum::<usize>());
            prop_assert!(content.iter().map(list).eq(model.clone()));
            prop_assert!(content.runs.iter().all(|run| (1..=RUN_MAX).contains(&run.len())));
            for (a, start, b, end) in ranges {
                let (start, end) = (start.min(end).to_be_bytes(), end.max(start).to_be_bytes());
                let bounds = (bound(a, &start), bound(b, &end));
                if start == end && (a, b) == (1, 1) { continue; }
                let (entries, count) = content.range(&bounds);
                let want: Vec<_> = model.range::<[u8], _>(bounds).map(|(key, version)| (key.clone(), *version)).collect();
                prop_assert_eq!(count, want.len());
                prop_assert_eq!(entries.map(list).collect::<Vec<_>>(), want);
            }
            for key in 0..4000u16 {
                let key = key.to_be_bytes();
                prop_assert_eq!(content.get(&key).map(|entry| entry.revisions().version), model.get(&key[..]).copied());
            }
        }
    }
}
