//! When to look for flows to departed backends. Pure; times are since any fixed point.
//!
//! In: departures, the time, how long walks take. Out: what to look for now. A departure is looked for after a moment, in which a
//! source may name the backend again that it moved from one slice to another, and twice more: a connection that was on its way
//! into the kernel's tables when its backend left is found then.
//!
//! Invariants: each departure is looked for [`DELAYS`]`.len()` times, none sooner than its delay says; between two walks is a
//! pause of [`PAUSE_MIN`] or [`PAUSE_FACTOR`] times what the walk took, whichever is longer; all that is due goes into one walk,
//! so what waits is bounded by time.

use std::{collections::VecDeque, time::Duration};

use isthmus_mesh::loadbalancer::Departed;

/// When a departure is looked for, each after the one before.
pub const DELAYS: [Duration; 3] = [
    Duration::from_millis(20),
    Duration::from_millis(100),
    Duration::from_secs(1),
];
/// Least time between two walks.
pub const PAUSE_MIN: Duration = Duration::from_millis(20);
/// Times that a walk took, to pause after it.
pub const PAUSE_FACTOR: u32 = 4;

/// See the module.
#[derive(Debug, Default)]
pub struct Schedule {
    /// Of each delay: what to look for, and when, ascending.
    stages: [VecDeque<(Duration, Departed)>; DELAYS.len()],
    resting_until: Duration,
}

impl Schedule {
    /// Adds backends that left by `now`.
    pub fn add(&mut self, now: Duration, departed: &Departed) {
        self.push(0, now, departed);
    }

    fn push(&mut self, stage: usize, now: Duration, departed: &Departed) {
        if departed.is_empty() {
            return;
        }
        // Rounded up to a millisecond, so that those of one time wait as one.
        let at = (now + DELAYS[stage]).as_millis() + 1;
        let at = Duration::from_millis(u64::try_from(at).unwrap_or(u64::MAX));
        match self.stages[stage].back_mut() {
            Some((before, waiting)) if *before == at => waiting.merge(departed),
            _ => self.stages[stage].push_back((at, departed.clone())),
        }
    }

    /// What to look for now, if anything. The caller says when it is [done](Self::done).
    pub fn due(&mut self, now: Duration) -> Option<Departed> {
        if self.wake_at().is_none_or(|at| at > now) {
            return None;
        }
        let mut batch = Departed::default();
        // From the last one on: what moves to the next stage is not due there yet.
        for stage in (0..self.stages.len()).rev() {
            let mut due = Departed::default();
            while let Some((_, departed)) = self.stages[stage].pop_front_if(|(at, _)| *at <= now) {
                due.merge(&departed);
            }
            if stage + 1 < self.stages.len() {
                self.push(stage + 1, now, &due);
            }
            batch.merge(&due);
        }
        Some(batch)
    }

    /// A walk ended at `now`. `again`: it left something undone.
    pub fn done(&mut self, now: Duration, took: Duration, again: Option<&Departed>) {
        self.resting_until = now + PAUSE_MIN.max(took.saturating_mul(PAUSE_FACTOR));
        if let Some(departed) = again {
            self.add(now, departed);
        }
    }

    /// When [`Self::due`] has something, as far as is known.
    pub fn wake_at(&self) -> Option<Duration> {
        let first = self
            .stages
            .iter()
            .filter_map(|stage| Some(stage.front()?.0))
            .min()?;
        Some(first.max(self.resting_until))
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn backend(number: u16) -> isthmus_mesh::loadbalancer::Destination {
        ([0; 16], number, 6)
    }

    fn one(number: u16) -> Departed {
        let mut departed = Departed::default();
        departed.add(backend(number));
        departed
    }

    #[test]
    fn a_departure_is_looked_for_after_a_moment_and_twice_more() {
        let ms = Duration::from_millis;
        let mut schedule = Schedule::default();
        assert_eq!((schedule.due(ms(5)), schedule.wake_at()), (None, None));
        schedule.add(ms(5), &one(1));
        assert_eq!((schedule.due(ms(25)), schedule.wake_at()), (None, Some(ms(26))));
        assert_eq!(schedule.due(ms(26)), Some(one(1)));
        schedule.done(ms(28), ms(2), None);
        assert_eq!((schedule.due(ms(126)), schedule.wake_at()), (None, Some(ms(127))));
        assert_eq!(schedule.due(ms(127)), Some(one(1)));
        schedule.done(ms(128), ms(1), None);
        assert_eq!(schedule.wake_at(), Some(ms(1128)));
        assert_eq!(schedule.due(ms(1128)), Some(one(1)));
        schedule.done(ms(1129), ms(1), None);
        assert_eq!(schedule.wake_at(), None);
    }

    #[test]
    fn a_long_walk_is_followed_by_a_long_pause() {
        let ms = Duration::from_millis;
        let mut schedule = Schedule::default();
        schedule.add(ms(0), &one(1));
        assert!(schedule.due(ms(21)).is_some());
        schedule.done(ms(300), ms(279), Some(&one(1)));
        let rest = 300 + 4 * 279;
        assert_eq!(
            (schedule.due(ms(rest - 1)), schedule.wake_at()),
            (None, Some(ms(rest)))
        );
        assert_eq!(schedule.due(ms(rest)), Some(one(1)));
    }

    proptest! {
        /// Any arrivals, walks of any length.
        #[test]
        fn every_departure_has_its_walks_and_every_walk_its_pause(
            arrivals in vec((0..3_000_u64, 0..8_u16), 1..40),
            lengths in vec(0..60_u64, 1..10),
        ) {
            let mut arrivals = arrivals;
            arrivals.sort_unstable();
            let ms = Duration::from_millis;
            let mut schedule = Schedule::default();
            let mut lengths = lengths.iter().copied().cycle();
            let (mut waiting, mut walks) = (arrivals.iter().peekable(), vec![]);
            let mut now = 0;
            loop {
                while let Some((_, number)) = waiting.next_if(|(at, _)| *at <= now) {
                    schedule.add(ms(now), &one(*number));
                }
                if let Some(departed) = schedule.due(ms(now)) {
                    let length = lengths.next().unwrap();
                    walks.push((now, length, departed));
                    now += length;
                    schedule.done(ms(now), ms(length), None);
                    prop_assert!(schedule.stages.iter().all(|stage| stage.len() <= 1002));
                    continue;
                }
                let wake = schedule.wake_at().map(|at| at.as_millis() as u64);
                let arrival = waiting.peek().map(|(at, _)| *at);
                match wake.into_iter().chain(arrival).min() {
                    Some(next) => { prop_assert!(next > now); now = next }
                    None => break,
                }
            }
            for pair in walks.windows(2) {
                let pause = pair[1].0 - (pair[0].0 + pair[0].1);
                prop_assert!(pause >= 20.max(4 * pair[0].1), "{pause} after {}", pair[0].1);
            }
            let mut seen = std::collections::BTreeSet::new();
            for (at, number) in arrivals {
                let mine: Vec<u64> = walks
                    .iter()
                    .filter(|(began, _, departed)| *began >= at && departed.contains(&backend(number)))
                    .map(|(began, ..)| *began)
                    .collect();
                prop_assert!(mine.len() >= DELAYS.len(), "{mine:?} for {at}");
                prop_assert!(mine[mine.len() - 1] - at >= 1120, "{mine:?} for {at}");
                if seen.insert(number) {
                    prop_assert!(mine[0] - at >= 20, "{mine:?} for {at}");
                }
                // No longer than the pause after a walk that was under way.
                prop_assert!(mine[0] - at <= 21 + 60 * 5, "{mine:?} for {at}");
            }
        }
    }
}
