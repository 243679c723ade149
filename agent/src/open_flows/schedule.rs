//! When to look for flows to departed backends. Pure; times are since any fixed point.
//!
//! In: departures, the time, how long walks take. Out: what to look for now. A departure is looked for at once, and twice more:
//! a connection that was on its way into the kernel's tables when its backend left is found then.
//!
//! Invariants: each departure is looked for [`DELAYS`]`.len()` times, the last time no sooner than the last delay after the
//! first; between two walks is a pause of [`PAUSE_MIN`] or [`PAUSE_FACTOR`] times what the walk took, whichever is longer;
//! all that is due goes into one walk, so what waits is bounded by walks a second.

use std::{collections::VecDeque, time::Duration};

use isthmus_mesh::loadbalancer::Departed;

/// When a departure is looked for, after its first walk began.
pub const DELAYS: [Duration; 3] = [Duration::ZERO, Duration::from_millis(100), Duration::from_secs(1)];
/// Least time between two walks.
pub const PAUSE_MIN: Duration = Duration::from_millis(20);
/// Times that a walk took, to pause after it.
pub const PAUSE_FACTOR: u32 = 4;

/// See the module.
#[derive(Debug, Default)]
pub struct Schedule {
    /// Not looked for yet.
    new: Departed,
    /// Of each delay after the first: what to look for, and when, ascending.
    later: [VecDeque<(Duration, Departed)>; DELAYS.len() - 1],
    resting_until: Duration,
}

impl Schedule {
    /// Adds backends to look for.
    pub fn add(&mut self, departed: &Departed) {
        self.new.merge(departed);
    }

    /// What to look for now, if anything. The caller says when it is [done](Self::done).
    pub fn due(&mut self, now: Duration) -> Option<Departed> {
        if self.wake_at().is_none_or(|at| at > now) {
            return None;
        }
        let mut batch = std::mem::take(&mut self.new);
        let mut moved = batch.clone();
        let mut before = Duration::ZERO;
        for (later, delay) in self.later.iter_mut().zip(&DELAYS[1..]) {
            let mut due = Departed::default();
            while let Some((_, departed)) = later.pop_front_if(|(at, _)| *at <= now) {
                due.merge(&departed);
            }
            if !moved.is_empty() {
                later.push_back((now + (*delay - before), moved));
            }
            batch.merge(&due);
            moved = due;
            before = *delay;
        }
        Some(batch)
    }

    /// A walk ended at `now`. `again`: it left something undone.
    pub fn done(&mut self, now: Duration, took: Duration, again: Option<&Departed>) {
        self.resting_until = now + PAUSE_MIN.max(took.saturating_mul(PAUSE_FACTOR));
        if let Some(departed) = again {
            self.new.merge(departed);
        }
    }

    /// When [`Self::due`] has something, as far as is known.
    pub fn wake_at(&self) -> Option<Duration> {
        let new = (!self.new.is_empty()).then_some(Duration::ZERO);
        let later = self.later.iter().filter_map(|later| Some(later.front()?.0));
        let first = later.chain(new).min()?;
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
    fn a_departure_is_looked_for_at_once_and_twice_more() {
        let ms = Duration::from_millis;
        let mut schedule = Schedule::default();
        assert_eq!(schedule.due(ms(5)), None);
        schedule.add(&one(1));
        assert_eq!(schedule.due(ms(5)), Some(one(1)));
        schedule.done(ms(7), ms(2), None);
        assert_eq!((schedule.due(ms(104)), schedule.wake_at()), (None, Some(ms(105))));
        assert_eq!(schedule.due(ms(105)), Some(one(1)));
        schedule.done(ms(106), ms(1), None);
        assert_eq!(schedule.wake_at(), Some(ms(1005)));
        assert_eq!(schedule.due(ms(1005)), Some(one(1)));
        schedule.done(ms(1006), ms(1), None);
        assert_eq!(schedule.wake_at(), None);
    }

    #[test]
    fn a_long_walk_is_followed_by_a_long_pause() {
        let ms = Duration::from_millis;
        let mut schedule = Schedule::default();
        schedule.add(&one(1));
        assert!(schedule.due(ms(0)).is_some());
        schedule.done(ms(300), ms(300), Some(&one(1)));
        assert_eq!(
            (schedule.due(ms(1499)), schedule.wake_at()),
            (None, Some(ms(1500)))
        );
        assert_eq!(schedule.due(ms(1500)), Some(one(1)));
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
                    schedule.add(&one(*number));
                }
                if let Some(departed) = schedule.due(ms(now)) {
                    let length = lengths.next().unwrap();
                    walks.push((now, length, departed));
                    now += length;
                    schedule.done(ms(now), ms(length), None);
                    prop_assert!(schedule.later.iter().all(|later| later.len() <= 60));
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
            for (at, number) in arrivals {
                let mine: Vec<u64> = walks
                    .iter()
                    .filter(|(began, _, departed)| *began >= at && departed.contains(&backend(number)))
                    .map(|(began, ..)| *began)
                    .collect();
                prop_assert!(mine.len() >= DELAYS.len(), "{mine:?} for {at}");
                prop_assert!(mine[mine.len() - 1] - at >= 1000, "{mine:?} for {at}");
                // No longer than the pause after a walk that was under way.
                prop_assert!(mine[0] - at <= 60 * 5, "{mine:?} for {at}");
            }
        }
    }
}
