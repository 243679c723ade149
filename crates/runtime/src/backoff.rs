//! How long to wait before the next try: exponential with a cap, and jitter so that many who failed together do not retry together.

use std::time::Duration;

/// Exponential backoff with "equal jitter": half of each delay is fixed, the other half random.
#[derive(Clone, Debug)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    failures: u32,
}

impl Backoff {
    /// Delays start around `base` and never exceed `cap`.
    pub const fn new(base: Duration, cap: Duration) -> Self {
        Self {
            base,
            cap,
            failures: 0,
        }
    }

    /// The delay before the next try. `random` is uniform in 0..1; pass [`random`] outside tests.
    pub fn next(&mut self, random: f64) -> Duration {
        let full = self
            .base
            .saturating_mul(1u32.checked_shl(self.failures.min(20)).unwrap_or(u32::MAX))
            .min(self.cap);
        self.failures = self.failures.saturating_add(1);
        full / 2 + full.mul_f64(random.clamp(0.0, 1.0) / 2.0)
    }

    /// Call after a success.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// Failures since the last success.
    pub const fn failures(&self) -> u32 {
        self.failures
    }
}

/// A uniform number in 0..1 for [`Backoff::next`].
pub fn random() -> f64 {
    rand::random::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn delays_grow_to_the_cap_and_stay_positive(randoms in proptest::collection::vec(0.0f64..1.0, 1..60)) {
            let (base, cap) = (Duration::from_millis(50), Duration::from_secs(30));
            let mut backoff = Backoff::new(base, cap);
            for random in randoms {
                let delay = backoff.next(random);
                prop_assert!(delay >= base / 2 && delay <= cap);
            }
            backoff.reset();
            prop_assert!(backoff.next(0.5) <= base);
        }
    }
}
