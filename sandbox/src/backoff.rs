//! How long to wait before something that ended is started again.
//!
//! Pure: time comes in as how long the thing ran. The first restart is immediate, as kubelet's is; then the delay
//! doubles from `first` to `max`; a run of at least `reset_after` starts the series anew.

use std::time::Duration;

/// A series of growing delays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backoff {
    first: Duration,
    max: Duration,
    reset_after: Duration,
    failures: u32,
}

impl Backoff {
    /// Containers: 0, 1 s, 2 s ... 30 s, anew after a minute (kubelet: 0, 10 s ... 300 s, ten minutes).
    pub const fn container() -> Self {
        Self::new(
            Duration::from_secs(1),
            Duration::from_secs(30),
            Duration::from_secs(60),
        )
    }

    /// Our own components: 0, 0.2 s ... 10 s, anew after half a minute.
    pub const fn component() -> Self {
        Self::new(
            Duration::from_millis(200),
            Duration::from_secs(10),
            Duration::from_secs(30),
        )
    }

    /// Attempts to attach a pod's network: 0, 0.25 s ... 10 s.
    pub const fn network() -> Self {
        Self::new(
            Duration::from_millis(250),
            Duration::from_secs(10),
            Duration::from_secs(30),
        )
    }

    const fn new(first: Duration, max: Duration, reset_after: Duration) -> Self {
        Self {
            first,
            max,
            reset_after,
            failures: 0,
        }
    }

    /// The delay before the next start, after a run of `ran_for`.
    pub fn after_run(&mut self, ran_for: Duration) -> Duration {
        if ran_for >= self.reset_after {
            self.failures = 0;
        }
        let delay = match self.failures {
            0 => Duration::ZERO,
            n => self
                .first
                .saturating_mul(1u32.checked_shl(n - 1).unwrap_or(u32::MAX))
                .min(self.max),
        };
        self.failures = self.failures.saturating_add(1);
        delay
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_limit_and_start_anew_after_a_long_run() {
        let mut backoff = Backoff::container();
        let delays: Vec<u64> = (0..8)
            .map(|_| backoff.after_run(Duration::ZERO).as_secs())
            .collect();
        assert_eq!(delays, [0, 1, 2, 4, 8, 16, 30, 30]);
        assert_eq!(backoff.after_run(Duration::from_secs(60)), Duration::ZERO);
        assert_eq!(backoff.after_run(Duration::from_secs(59)), Duration::from_secs(1));
    }

    #[test]
    fn endless_failures_do_not_overflow() {
        let mut backoff = Backoff::component();
        for _ in 0..100 {
            assert!(backoff.after_run(Duration::ZERO) <= Duration::from_secs(10));
        }
    }
}
