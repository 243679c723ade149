//! How far the reading of a remote cluster is, and how long it will take still. Pure: time is an argument.
//!
//! In: what each kind's list is expected to have, and what came of it when. Out: sums, rates over the last seconds, and the
//! time left, which is what is missing at the present rate.

use std::collections::{BTreeMap, VecDeque};

use isthmus_wire::{keys::Kind, status::ListProgress};

/// Rates are means over so much time. Longer: steadier; shorter: sooner right when the rate changes.
const WINDOW_MS: u64 = 10_000;
/// Samples closer to each other are one: at most 101 are kept.
const SAMPLE_MS: u64 = 100;
/// A rate of less time than this says nothing.
const SPAN_MIN_MS: u64 = 200;

#[derive(Clone, Copy, Debug, Default)]
struct Listing {
    expected: u64,
    received: u64,
    done: bool,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    at_ms: u64,
    keys: u64,
    bytes: u64,
}

/// The progress of one remote cluster.
#[derive(Debug, Default)]
pub struct Progress {
    kinds: BTreeMap<Kind, Listing>,
    /// Received in all lists since the start, which never falls.
    keys: u64,
    bytes: u64,
    samples: VecDeque<Sample>,
}

impl Progress {
    /// A list of `kind` begins.
    pub fn on_listing(&mut self, kind: Kind, expected: u64, now_ms: u64) {
        let idle = self.kinds.values().all(|listing| listing.done);
        if idle {
            // What came before it long ago is no rate.
            self.samples.clear();
            self.bytes = 0;
        }
        let listing = Listing {
            expected,
            ..Listing::default()
        };
        self.kinds.insert(kind, listing);
        self.sample(now_ms);
    }

    /// Entries of `kind` came. Outside of a list they are changes, which are no progress.
    pub fn on_received(&mut self, kind: Kind, keys: u64, bytes: u64, now_ms: u64) {
        let Some(listing) = self.kinds.get_mut(&kind).filter(|listing| !listing.done) else {
            return;
        };
        listing.received += keys;
        // More than was said: it has as many as came.
        listing.expected = listing.expected.max(listing.received);
        self.keys += keys;
        self.bytes += bytes;
        self.sample(now_ms);
    }

    /// The list of `kind` is at its end.
    pub fn on_listed(&mut self, kind: Kind) {
        if let Some(listing) = self.kinds.get_mut(&kind) {
            // One that told the difference only, or of which keys went meanwhile, is complete all the same.
            listing.received = listing.expected;
            listing.done = true;
        }
    }

    /// `kind` is not followed any more.
    pub fn forget(&mut self, kind: Kind) {
        self.kinds.remove(&kind);
    }

    /// How far it is. `complete` says that every kind's list has begun, so that nothing unknown is still to come.
    pub fn at(&self, now_ms: u64, complete: bool) -> ListProgress {
        let sum = |field: fn(&Listing) -> u64| self.kinds.values().map(field).sum::<u64>();
        let (expected, received) = (sum(|listing| listing.expected), sum(|listing| listing.received));
        let done = self.kinds.values().all(|listing| listing.done);
        let mut progress = ListProgress {
            received,
            expected,
            bytes: self.bytes,
            ..ListProgress::default()
        };
        if done {
            progress.left_ms = (complete && !self.kinds.is_empty()).then_some(0);
            return progress;
        }
        let Some(first) = self.samples.front() else {
            return progress;
        };
        // Up to now, not to the last sample: a stream that stands still gets slower.
        let span_ms = now_ms.saturating_sub(first.at_ms);
        if span_ms < SPAN_MIN_MS {
            return progress;
        }
        let per_second = |count: u64| count.saturating_mul(1000) / span_ms;
        progress.keys_per_second = per_second(self.keys - first.keys);
        progress.bytes_per_second = per_second(self.bytes.saturating_sub(first.bytes));
        let came = self.keys - first.keys;
        if complete && came > 0 {
            let missing = u128::from(expected - received);
            let left = missing * u128::from(span_ms) / u128::from(came);
            progress.left_ms = Some(u64::try_from(left).unwrap_or(u64::MAX));
        }
        progress
    }

    fn sample(&mut self, now_ms: u64) {
        let sample = Sample {
            at_ms: now_ms,
            keys: self.keys,
            bytes: self.bytes,
        };
        // The first of a window stands for its beginning and stays as it is.
        let close = |last: &Sample| now_ms.saturating_sub(last.at_ms) < SAMPLE_MS;
        match self.samples.back_mut() {
            Some(last) if close(last) => {
                if self.samples.len() > 1
                    && let Some(last) = self.samples.back_mut()
                {
                    let at_ms = last.at_ms;
                    *last = Sample { at_ms, ..sample };
                }
            }
            _ => self.samples.push_back(sample),
        }
        while self.samples.len() > 2
            && self
                .samples
                .get(1)
                .is_some_and(|next| now_ms.saturating_sub(next.at_ms) >= WINDOW_MS)
        {
            self.samples.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn figures_are_those_of_the_lists_and_changes_are_none() {
        let mut progress = Progress::default();
        assert_eq!(progress.at(0, false), ListProgress::default());
        progress.on_listing(Kind::Nodes, 100, 1_000);
        progress.on_listing(Kind::Ip, 300, 1_000);
        progress.on_received(Kind::Ip, 100, 5_000, 2_000);
        let at = progress.at(2_000, true);
        assert_eq!((at.received, at.expected, at.bytes), (100, 400, 5_000));
        assert_eq!(
            (at.keys_per_second, at.bytes_per_second, at.left_ms),
            (100, 5_000, Some(3_000))
        );
        assert_eq!(progress.at(2_000, false).left_ms, None, "other lists are to come");
        assert!(
            progress.at(60_000, true).left_ms > Some(100_000),
            "it stands still"
        );
        progress.on_received(Kind::Nodes, 100, 1, 2_500);
        progress.on_listed(Kind::Nodes);
        // Fewer than were said: some were deleted meanwhile.
        progress.on_received(Kind::Ip, 150, 1, 3_000);
        progress.on_listed(Kind::Ip);
        progress.on_received(Kind::Ip, 7, 7, 3_500);
        let done = progress.at(9_000, true);
        assert_eq!((done.received, done.expected, done.left_ms), (400, 400, Some(0)));
        assert_eq!((done.keys_per_second, done.bytes), (0, 5_002));
        // Again, of one kind.
        progress.on_listing(Kind::Ip, 300, 100_000);
        let again = progress.at(100_100, true);
        assert_eq!((again.received, again.expected, again.left_ms), (100, 400, None));
        progress.forget(Kind::Ip);
        assert_eq!(progress.at(100_100, true).expected, 100);
    }

    /// A steady stream of pages: the time left is right, within a fifth, as soon as it has run for a while.
    fn check(expected: u64, page: u64, interval_ms: u64, jitter: &[u64]) -> Result<(), TestCaseError> {
        let mut progress = Progress::default();
        let halves = [expected / 2, expected - expected / 2];
        let pages = expected.div_ceil(page);
        let end_ms = pages * interval_ms;
        progress.on_listing(Kind::Ip, halves[0], 0);
        progress.on_listing(Kind::Slices, halves[1], 0);
        let mut left = halves;
        for number in 1..=pages {
            let at = number * interval_ms + jitter[number as usize % jitter.len()] * interval_ms / 100;
            let (kind, which) = if left[0] > 0 {
                (Kind::Ip, 0)
            } else {
                (Kind::Slices, 1)
            };
            let keys = page.min(left[which]);
            left[which] -= keys;
            progress.on_received(kind, keys, keys * 100, at);
            let said = progress.at(at, true);
            prop_assert!(said.received <= said.expected);
            let truth = end_ms.saturating_sub(at);
            if number >= 20 && truth > 20 * interval_ms {
                let said = said.left_ms.unwrap();
                prop_assert!(
                    said.abs_diff(truth) * 5 < truth,
                    "{said} ms instead of {truth} after page {number}"
                );
            }
        }
        prop_assert!(progress.samples.len() <= 102);
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_time_left_of_a_steady_stream_is_right_within_a_fifth(
            pages in 60u64..800,
            page in 1u64..500,
            interval_ms in 10u64..600,
            jitter in proptest::collection::vec(0u64..90, 1..40),
        ) {
            check(pages * page, page, interval_ms, &jitter)?;
        }

        #[test]
        fn nothing_panics(steps in proptest::collection::vec((0usize..6, 0u8..5, any::<u64>(), 0u64..100_000), 0..80)) {
            let (mut progress, mut now) = (Progress::default(), 0);
            for (kind, what, number, later) in steps {
                let kind = Kind::ALL[kind];
                now += later;
                match what {
                    0 => progress.on_listing(kind, number >> 8, now),
                    1 => progress.on_received(kind, number >> 44, number >> 44, now),
                    2 => progress.on_listed(kind),
                    3 => progress.forget(kind),
                    _ => now = now.saturating_sub(later * 2),
                }
                let at = progress.at(now, what == 0);
                prop_assert!(at.received <= at.expected);
            }
        }
    }
}
