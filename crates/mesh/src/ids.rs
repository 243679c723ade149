//! Numbers for services and backends: restored from the maps, then given out going round, so that a number just freed is
//! the last to be used again.

/// Gives out numbers 1..=limit. A number is live from `reserve` or `allocate` until `release`.
#[derive(Debug)]
pub struct IdAllocator {
    live: Vec<u64>,
    limit: u32,
    /// Where the search starts.
    next: u32,
    count: u32,
}

impl IdAllocator {
    /// An allocator with nothing live. `limit` bounds the memory too: a bit for each number that was ever reached.
    pub const fn new(limit: u32) -> Self {
        Self {
            live: Vec::new(),
            limit,
            next: 1,
            count: 0,
        }
    }

    /// Whether `id` is live.
    pub fn is_live(&self, id: u32) -> bool {
        let word = self.live.get(id as usize / 64);
        word.is_some_and(|word| word & (1 << (id % 64)) != 0)
    }

    /// Makes `id` live. False, and nothing changes, if it is out of range or live.
    pub fn reserve(&mut self, id: u32) -> bool {
        if id == 0 || id > self.limit || self.is_live(id) {
            return false;
        }
        let word = id as usize / 64;
        if self.live.len() <= word {
            self.live.resize(word + 1, 0);
        }
        self.live[word] |= 1 << (id % 64);
        self.count += 1;
        true
    }

    /// Makes the search start after all that is live now: for use once everything is restored.
    pub fn start_after_live(&mut self) {
        let highest = self.live.iter().rposition(|word| *word != 0);
        self.next = highest.map_or(1, |word| word as u32 * 64 + 64 - self.live[word].leading_zeros());
    }

    /// A number that is not live, or `None` when all are.
    pub fn allocate(&mut self) -> Option<u32> {
        if self.count >= self.limit {
            return None;
        }
        let mut id = self.next;
        loop {
            if id == 0 || id > self.limit {
                id = 1;
            }
            match self.live.get(id as usize / 64) {
                // A whole word is taken: step over it.
                Some(&word) if word >> (id % 64) == u64::MAX >> (id % 64) => id = (id / 64 + 1) * 64,
                Some(word) if word & (1 << (id % 64)) != 0 => id += 1,
                _ => break,
            }
        }
        self.reserve(id);
        self.next = id + 1;
        Some(id)
    }

    /// Gives a number back.
    pub fn release(&mut self, id: u32) {
        if self.is_live(id) {
            self.live[id as usize / 64] &= !(1 << (id % 64));
            self.count -= 1;
        }
    }

    /// How many are live.
    pub const fn len(&self) -> u32 {
        self.count
    }

    /// Whether none is live.
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_freed_number_comes_back_last() {
        let mut ids = IdAllocator::new(4);
        let got: Vec<_> = (0..3).map(|_| ids.allocate()).collect();
        assert_eq!(got, [Some(1), Some(2), Some(3)]);
        ids.release(2);
        assert_eq!(ids.allocate(), Some(4));
        assert_eq!(ids.allocate(), Some(2));
        assert_eq!(ids.allocate(), None);
    }

    #[test]
    fn the_search_starts_after_what_was_restored() {
        let mut ids = IdAllocator::new(1000);
        assert!(
            ids.reserve(7) && ids.reserve(128) && !ids.reserve(7) && !ids.reserve(0) && !ids.reserve(1001)
        );
        ids.start_after_live();
        assert_eq!(ids.allocate(), Some(129));
    }

    proptest! {
        #[test]
        fn a_live_number_is_never_given_out(steps in proptest::collection::vec((0u8..3, 1u32..200), 0..400), limit in 1u32..150) {
            let mut ids = IdAllocator::new(limit);
            let mut live = BTreeSet::new();
            for (step, id) in steps {
                match step {
                    0 => prop_assert_eq!(ids.reserve(id), id <= limit && live.insert(id)),
                    1 => {
                        live.remove(&id);
                        ids.release(id);
                    }
                    _ => match ids.allocate() {
                        Some(id) => prop_assert!((1..=limit).contains(&id) && live.insert(id)),
                        None => prop_assert_eq!(live.len() as u32, limit),
                    },
                }
                prop_assert_eq!(ids.len() as usize, live.len());
            }
        }
    }
}
