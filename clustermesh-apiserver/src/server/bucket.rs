//! Token buckets: how much of something may be had at once and in the long run. Pure: the time, since any fixed moment, is an
//! argument.
//!
//! A bucket is kept as the time at which it will be full again, so it is one number however often it is used. What is taken
//! before its size is known may leave a debt; nothing more is given until that is paid by waiting.

use std::time::Duration;

/// So much a second in the long run, and so much at once.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Rate {
    /// Tokens a second; 0 = there is no limit.
    pub per_second: u64,
    /// Tokens of a full bucket.
    pub burst: u64,
}

impl Rate {
    /// No limit.
    pub const UNLIMITED: Self = Self {
        per_second: 0,
        burst: 0,
    };

    /// `per_second`, and what comes together in `seconds` at once.
    pub const fn over(per_second: u64, seconds: u64) -> Self {
        Self {
            per_second,
            burst: per_second.saturating_mul(seconds),
        }
    }

    /// How long it takes to fill in `tokens`.
    fn time(&self, tokens: u64) -> Duration {
        if self.per_second == 0 {
            return Duration::ZERO;
        }
        let nanos = u128::from(tokens) * 1_000_000_000 / u128::from(self.per_second);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// A bucket; full in the beginning.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Bucket {
    full_at: Duration,
}

impl Bucket {
    /// Takes `tokens` if there are so many; else says how long it takes until there are, and takes none. More than the burst
    /// are given when the bucket is full.
    pub fn take(&mut self, rate: &Rate, tokens: u64, now: Duration) -> Result<(), Duration> {
        let needed = rate.time(tokens.min(rate.burst));
        let after = self.full_at.max(now).saturating_add(needed);
        let wait = after.saturating_sub(now).saturating_sub(rate.time(rate.burst));
        if wait > Duration::ZERO {
            return Err(wait);
        }
        self.charge(rate, tokens, now);
        Ok(())
    }

    /// Takes `tokens` whether they are there or not.
    pub fn charge(&mut self, rate: &Rate, tokens: u64, now: Duration) {
        self.full_at = self.full_at.max(now).saturating_add(rate.time(tokens));
    }

    /// How long it takes until a debt is paid; nothing if there is none.
    pub fn wait(&self, rate: &Rate, now: Duration) -> Duration {
        self.full_at
            .saturating_sub(now)
            .saturating_sub(rate.time(rate.burst))
    }

    /// Whether it is as good as new.
    pub fn is_full(&self, now: Duration) -> bool {
        self.full_at <= now
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rate() -> impl Strategy<Value = Rate> {
        (1u64..5_000, 1u64..5_000).prop_map(|(per_second, burst)| Rate { per_second, burst })
    }

    proptest! {
        #[test]
        fn no_window_sees_more_than_the_burst_and_its_share(
            rate in rate(),
            asks in proptest::collection::vec((0u64..400, 1u64..300), 1..80),
        ) {
            let (mut bucket, mut now) = (Bucket::default(), Duration::ZERO);
            let mut given: Vec<(Duration, u64)> = vec![];
            for (gap, tokens) in asks {
                now += Duration::from_millis(gap);
                let tokens = tokens.min(rate.burst);
                match bucket.take(&rate, tokens, now) {
                    Ok(()) => given.push((now, tokens)),
                    Err(wait) => {
                        // What is refused is given after exactly the time that was named, and not before.
                        let mut early = bucket;
                        prop_assert!(early.take(&rate, tokens, now + wait - Duration::from_nanos(1)).is_err());
                        let mut late = bucket;
                        prop_assert!(late.take(&rate, tokens, now + wait).is_ok());
                    }
                }
            }
            for first in 0..given.len() {
                for last in first..given.len() {
                    let sum: u64 = given[first..=last].iter().map(|(_, tokens)| tokens).sum();
                    let seconds = (given[last].0 - given[first].0).as_secs_f64();
                    let most = rate.burst as f64 + rate.per_second as f64 * seconds;
                    // Times are whole nanoseconds.
                    let rounding = given.len() as f64 * rate.per_second as f64 / 1e9;
                    prop_assert!(sum as f64 <= most + rounding, "{sum} > {most}");
                }
            }
        }

        #[test]
        fn who_stays_below_the_rate_never_waits(rate in rate(), asks in proptest::collection::vec(1u64..300, 1..80)) {
            let (mut bucket, mut now) = (Bucket::default(), Duration::ZERO);
            for tokens in asks {
                prop_assert_eq!(bucket.take(&rate, tokens, now), Ok(()));
                now += rate.time(tokens);
            }
        }

        #[test]
        fn a_debt_is_paid_by_waiting(rate in rate(), tokens in 1u64..1_000_000) {
            let (mut bucket, now) = (Bucket::default(), Duration::from_secs(5));
            bucket.charge(&rate, tokens, now);
            let wait = bucket.wait(&rate, now);
            prop_assert_eq!(wait > Duration::ZERO, rate.time(tokens) > rate.time(rate.burst));
            prop_assert_eq!(bucket.wait(&rate, now + wait), Duration::ZERO);
            prop_assert!(bucket.is_full(now + rate.time(tokens)));
        }

        #[test]
        fn without_a_limit_nobody_waits(tokens in any::<u64>(), now in any::<u64>()) {
            let (mut bucket, now) = (Bucket::default(), Duration::from_nanos(now));
            bucket.charge(&Rate::UNLIMITED, tokens, now);
            prop_assert_eq!(bucket.take(&Rate::UNLIMITED, tokens, now), Ok(()));
            prop_assert_eq!(bucket.wait(&Rate::UNLIMITED, now), Duration::ZERO);
        }
    }
}
