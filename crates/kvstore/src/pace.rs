//! How fast things may begin: so many at once, and then one in so much time. [`Bucket`] is pure; time is an argument.
//!
//! Two uses. Connections of one process to its many upstreams share a pace: what broke off together, because our own network
//! was away, is not made again in one moment. And each upstream's lists have one of their own: whatever makes us list again,
//! an upstream is not asked for all it has more often than this.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// A token bucket that says how long to wait; whoever asks will wait, so that nobody overtakes.
#[derive(Clone, Debug)]
pub struct Bucket {
    interval: Duration,
    burst: u32,
    /// When the bucket is full again.
    full_at: Duration,
}

impl Bucket {
    /// `burst` (at least 1) at once, and one more in each `interval`.
    pub const fn new(burst: u32, interval: Duration) -> Self {
        Self {
            interval,
            burst,
            full_at: Duration::ZERO,
        }
    }

    /// Takes a token; how long to wait until it is there.
    pub fn take(&mut self, now: Duration) -> Duration {
        let full_at = self.full_at.max(now);
        let spare = self.interval.saturating_mul(self.burst.saturating_sub(1));
        self.full_at = full_at.saturating_add(self.interval);
        full_at.saturating_sub(spare).saturating_sub(now)
    }
}

/// A bucket that is shared. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Pace {
    bucket: Arc<Mutex<Bucket>>,
    begun: Instant,
}

impl Pace {
    /// `burst` at once, and one more in each `interval`.
    pub fn new(burst: u32, interval: Duration) -> Self {
        Self {
            bucket: Arc::new(Mutex::new(Bucket::new(burst, interval))),
            begun: Instant::now(),
        }
    }

    /// Takes a token; how long to wait until it is there.
    pub fn take(&self) -> Duration {
        let now = self.begun.elapsed();
        // Nothing in there panics half-way.
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        bucket.take(now)
    }
}

#[cfg(test)]
mod tests {
    use isthmus_runtime::Backoff;
    use proptest::prelude::*;

    use super::*;

    const WINDOW: Duration = Duration::from_millis(100);

    /// Most that lie in any window.
    fn densest(mut times: Vec<Duration>) -> usize {
        times.sort();
        let (mut first, mut most) = (0, 0);
        for (last, at) in times.iter().enumerate() {
            while *at >= times[first] + WINDOW {
                first += 1;
            }
            most = most.max(last + 1 - first);
        }
        most
    }

    /// Tries of `peers` that failed together at time 0, each failing again and again until `until`; with one pace for all, or
    /// each by itself.
    fn tries(peers: usize, until: Duration, randoms: &[f64], mut pace: Option<Bucket>) -> Vec<Duration> {
        let mut backoffs = vec![Backoff::new(Duration::from_secs(1), Duration::from_secs(30)); peers];
        let mut randoms = randoms.iter().cycle();
        let mut due: Vec<(Duration, usize)> = (0..peers)
            .map(|peer| (backoffs[peer].next(*randoms.next().unwrap()), peer))
            .collect();
        let mut tried = Vec::new();
        while let Some(next) = due
            .iter()
            .enumerate()
            .min_by_key(|(_, at)| **at)
            .map(|(index, _)| index)
        {
            let (at, peer) = due.swap_remove(next);
            if at > until {
                continue;
            }
            let wait = pace.as_mut().map_or(Duration::ZERO, |pace| pace.take(at));
            tried.push(at + wait);
            due.push((at + wait + backoffs[peer].next(*randoms.next().unwrap()), peer));
        }
        tried
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn no_window_has_more_than_the_burst_and_its_share(
            burst in 1u32..50,
            interval_ms in 1u64..200,
            steps in proptest::collection::vec(0u64..300, 1..200),
        ) {
            let interval = Duration::from_millis(interval_ms);
            let (mut bucket, mut now, mut times) = (Bucket::new(burst, interval), Duration::ZERO, Vec::new());
            for step in steps {
                // Most come together.
                now += Duration::from_millis(step.saturating_sub(200));
                let at = now + bucket.take(now);
                prop_assert!(times.last().is_none_or(|last| at >= *last), "nobody overtakes");
                times.push(at);
            }
            let share = WINDOW.as_millis().div_ceil(u128::from(interval_ms)) as usize;
            prop_assert!(densest(times) <= burst as usize + share);
        }

        #[test]
        fn two_hundred_and_fifty_peers_do_not_stampede(seed in any::<u64>()) {
            let mut state = seed;
            let randoms: Vec<f64> = (0..4096).map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 11) as f64 / (1u64 << 53) as f64
            }).collect();
            let until = Duration::from_secs(20);
            // From one process, the mirror's pace: its connections to all peers.
            let paced = tries(250, until, &randoms, Some(Bucket::new(25, Duration::from_millis(4))));
            prop_assert!(densest(paced) <= 50);
            // Of 250 processes to one that came back, jitter alone: half a second for the first try.
            let alone = tries(250, until, &randoms, None);
            prop_assert!(densest(alone) <= 100, "of 250");
        }
    }

    #[test]
    fn who_comes_seldom_never_waits() {
        let mut bucket = Bucket::new(2, Duration::from_secs(1));
        let at = |bucket: &mut Bucket, ms| bucket.take(Duration::from_millis(ms));
        assert_eq!(at(&mut bucket, 5_000), Duration::ZERO);
        assert_eq!(at(&mut bucket, 5_000), Duration::ZERO);
        assert_eq!(at(&mut bucket, 5_000), Duration::from_secs(1));
        assert_eq!(at(&mut bucket, 9_000), Duration::ZERO);
    }
}
