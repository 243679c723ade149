//! What probes mean: when the next one is due, and what a row of results says about a container.
//!
//! In: the probe's settings, results, the time since the pod was first seen. Out: ready, started, unhealthy.
//! Rules as kubelet has them: a startup probe holds back the others until it passed; a container is not ready before
//! its readiness probe passed; a liveness or startup probe that failed `failure_threshold` times in a row ends it.

use std::time::Duration;

use super::lifecycle::Time;

/// A probe's settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeSpec {
    /// Before the first one, from the start of the container.
    pub initial_delay: Duration,
    /// From one to the next.
    pub period: Duration,
    /// An answer that takes longer is a failure.
    pub timeout: Duration,
    /// So many in a row count as success.
    pub success_threshold: u32,
    /// So many in a row count as failure.
    pub failure_threshold: u32,
}

/// Which probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Has the container started?
    Startup,
    /// Can it serve?
    Readiness,
    /// Does it live?
    Liveness,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Unknown,
    Passing,
    Failing,
}

#[derive(Clone, Debug)]
struct Series {
    spec: ProbeSpec,
    next_at: Time,
    in_flight: bool,
    streak: (bool, u32),
    outcome: Outcome,
}

impl Series {
    fn new(spec: ProbeSpec, started: Time) -> Self {
        let next_at = started + spec.initial_delay;
        Self {
            spec,
            next_at,
            in_flight: false,
            streak: (true, 0),
            outcome: Outcome::Unknown,
        }
    }

    /// Returns whether this is the first failure of a row.
    fn on_result(&mut self, success: bool) -> bool {
        self.in_flight = false;
        let length = if self.streak.0 == success {
            self.streak.1.saturating_add(1)
        } else {
            1
        };
        self.streak = (success, length);
        if success && length >= self.spec.success_threshold {
            self.outcome = Outcome::Passing;
        }
        if !success && length >= self.spec.failure_threshold {
            self.outcome = Outcome::Failing;
        }
        !success && length == 1
    }
}

/// The probes of one run of a container.
#[derive(Clone, Debug, Default)]
pub struct Health {
    startup: Option<Series>,
    readiness: Option<Series>,
    liveness: Option<Series>,
}

impl Health {
    /// A container that was started at `started`.
    pub fn new(
        startup: Option<ProbeSpec>,
        readiness: Option<ProbeSpec>,
        liveness: Option<ProbeSpec>,
        started: Time,
    ) -> Self {
        let series = |spec: Option<ProbeSpec>| spec.map(|spec| Series::new(spec, started));
        Self {
            startup: series(startup),
            readiness: series(readiness),
            liveness: series(liveness),
        }
    }

    /// Whether the container counts as started.
    pub fn is_started(&self) -> bool {
        self.startup
            .as_ref()
            .is_none_or(|series| series.outcome == Outcome::Passing)
    }

    /// Whether the container can serve.
    pub fn is_ready(&self) -> bool {
        self.is_started()
            && self
                .readiness
                .as_ref()
                .is_none_or(|series| series.outcome == Outcome::Passing)
    }

    /// Whether the container is to be ended and started again.
    pub fn is_unhealthy(&self) -> bool {
        [&self.startup, &self.liveness]
            .into_iter()
            .flatten()
            .any(|series| series.outcome == Outcome::Failing)
    }

    /// The probes to run now; they count as running from here on.
    pub fn begin_due(&mut self, now: Time) -> Vec<(Kind, Duration)> {
        let mut due = Vec::new();
        for (kind, series) in self.active() {
            if !series.in_flight && now >= series.next_at {
                series.in_flight = true;
                series.next_at = now + series.spec.period;
                due.push((kind, series.spec.timeout));
            }
        }
        due
    }

    /// When the next probe is due.
    pub fn next_at(&mut self) -> Option<Time> {
        self.active()
            .filter(|(_, series)| !series.in_flight)
            .map(|(_, series)| series.next_at)
            .min()
    }

    /// Takes note of a result; returns whether it is the first failure of a row, which is worth telling.
    pub fn on_result(&mut self, kind: Kind, success: bool) -> bool {
        let series = match kind {
            Kind::Startup => &mut self.startup,
            Kind::Readiness => &mut self.readiness,
            Kind::Liveness => &mut self.liveness,
        };
        series.as_mut().is_some_and(|series| series.on_result(success))
    }

    fn active(&mut self) -> impl Iterator<Item = (Kind, &mut Series)> {
        let started = self.is_started();
        let startup = self
            .startup
            .as_mut()
            .filter(|_| !started)
            .map(|series| (Kind::Startup, series));
        let readiness = self
            .readiness
            .as_mut()
            .filter(|_| started)
            .map(|series| (Kind::Readiness, series));
        let liveness = self
            .liveness
            .as_mut()
            .filter(|_| started)
            .map(|series| (Kind::Liveness, series));
        [startup, readiness, liveness].into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spec(success_threshold: u32, failure_threshold: u32) -> ProbeSpec {
        ProbeSpec {
            initial_delay: Duration::from_secs(2),
            period: Duration::from_secs(1),
            timeout: Duration::from_millis(500),
            success_threshold,
            failure_threshold,
        }
    }

    const fn s(seconds: u64) -> Time {
        Duration::from_secs(seconds)
    }

    #[test]
    fn without_probes_a_container_is_ready_and_healthy() {
        let mut health = Health::default();
        assert!(health.is_ready() && health.is_started() && !health.is_unhealthy());
        assert_eq!(health.next_at(), None);
    }

    #[test]
    fn a_readiness_probe_waits_for_its_delay_and_turns_at_its_thresholds() {
        let mut health = Health::new(None, Some(spec(1, 2)), None, s(10));
        assert_eq!(health.next_at(), Some(s(12)));
        assert_eq!(health.begin_due(s(11)), []);
        assert_eq!(
            health.begin_due(s(12)),
            [(Kind::Readiness, Duration::from_millis(500))]
        );
        assert_eq!(health.begin_due(s(20)), [], "one at a time");
        assert!(!health.is_ready());
        health.on_result(Kind::Readiness, true);
        assert!(health.is_ready());
        assert_eq!(health.next_at(), Some(s(13)));
        health.on_result(Kind::Readiness, false);
        assert!(health.is_ready(), "one failure is below the threshold");
        health.on_result(Kind::Readiness, false);
        assert!(!health.is_ready());
    }

    #[test]
    fn a_startup_probe_holds_back_the_others() {
        let mut health = Health::new(Some(spec(1, 3)), Some(spec(1, 1)), Some(spec(1, 1)), s(0));
        assert_eq!(
            health.begin_due(s(5)),
            [(Kind::Startup, Duration::from_millis(500))]
        );
        health.on_result(Kind::Startup, true);
        let kinds: Vec<Kind> = health.begin_due(s(5)).into_iter().map(|(kind, _)| kind).collect();
        assert_eq!(kinds, [Kind::Readiness, Kind::Liveness]);
    }

    #[test]
    fn liveness_and_startup_failures_end_a_container_readiness_failures_do_not() {
        for (kind, want) in [
            (Kind::Startup, true),
            (Kind::Readiness, false),
            (Kind::Liveness, true),
        ] {
            let probe = |this: Kind| (this == kind).then(|| spec(1, 2));
            let mut health = Health::new(
                probe(Kind::Startup),
                probe(Kind::Readiness),
                probe(Kind::Liveness),
                s(0),
            );
            health.on_result(kind, false);
            assert!(!health.is_unhealthy());
            health.on_result(kind, false);
            assert_eq!(health.is_unhealthy(), want);
        }
    }

    proptest! {
        /// The outcome follows from the last row of equal results that reached its threshold.
        #[test]
        fn readiness_is_what_the_last_full_row_says(success in 1u32..4, failure in 1u32..4, results: Vec<bool>) {
            let mut health = Health::new(None, Some(spec(success, failure)), None, s(0));
            let (mut want, mut row) = (false, (true, 0));
            for result in results {
                health.on_result(Kind::Readiness, result);
                row = if row.0 == result { (result, row.1 + 1) } else { (result, 1) };
                if row.1 >= if result { success } else { failure } {
                    want = result;
                }
                prop_assert_eq!(health.is_ready(), want);
            }
        }
    }
}
