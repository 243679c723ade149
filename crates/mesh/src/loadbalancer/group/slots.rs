//! Slots of a group: who has how many, and how they move when that changes.
//!
//! Usually every backend that takes traffic has one slot, and a change costs what it changes. Where weights, tiers that share
//! or slow start ask for more, slots are counted out by [`allot`](super::super::allot) and all of the group is looked at.
//!
//! Invariants: slots have no holes; a backend keeps its slots until it has too many or fills the hole of another.

use super::{
    super::{
        allot::{Bid, allot},
        candidate::{Candidate, Context, GHOST, HELD, LEVELS, NO_SLOT},
        select::{Hint, Picked, WHOLE, select},
    },
    Group, SLOTS_MAX,
};
use crate::indexed::{Keyed, push_tight};

impl Group {
    /// Whether a candidate takes traffic, as far as its slots go.
    fn selected(&self, context: &Context, at: u32) -> bool {
        let candidate = &self.candidates[at];
        candidate.id != 0
            && candidate.alive()
            && (candidate.is(GHOST)
                || self.takes(context, candidate)
                || (candidate.is(HELD) && self.last_resort))
    }

    /// Whether the selection has a candidate.
    pub(in super::super) fn takes(&self, context: &Context, candidate: &Candidate) -> bool {
        let tally = context.tally(&self.order, &candidate.view());
        self.picked.takes(tally) && !(self.hinted && tally.hint == Hint::Elsewhere)
    }

    /// Every backend that takes traffic gets the same.
    fn is_even(&self) -> bool {
        let Picked::Active(shares) = self.picked else {
            return true;
        };
        self.ramps.is_empty()
            && shares.single().is_some_and(|rank| {
                let count = self.counts.rank(rank);
                count.active_weight == count.active.into()
            })
    }

    /// Those that take traffic by their share, with weights; ghosts and the last resort are not among them.
    pub(in super::super) fn bids(&self, context: &Context) -> Vec<Bid> {
        let mut bids = Vec::new();
        for at in self.candidates.live() {
            let candidate = &self.candidates[at];
            let counted = candidate.id != 0 && candidate.alive() && !candidate.is(GHOST);
            if !counted || !self.takes(context, candidate) {
                continue;
            }
            let (rank, weight) = match self.picked {
                Picked::Active(_) => (
                    self.order.rank(candidate.cluster),
                    u32::from(candidate.weight) * u32::from(candidate.level),
                ),
                // Nobody is healthy: all alike.
                _ => (0, 1),
            };
            bids.push(Bid {
                key: candidate.key(),
                at,
                rank,
                weight: weight.max(1),
                slots: 0,
            });
        }
        bids
    }

    pub(super) fn settle_slots(&mut self, context: &Context, dirty: &[u32], touched: &mut Vec<u32>) {
        let picked = select(&self.order, &self.counts);
        let hinted = matches!(picked, Picked::Active(_)) && self.counts.hints_hold();
        let last_resort = self.held > 0 && picked == Picked::Nothing && self.ghosts == 0;
        let all = picked != self.picked
            || hinted != self.hinted
            || self.overflow > 0
            || last_resort != self.last_resort
            || std::mem::take(&mut self.reselect);
        self.picked = picked;
        self.hinted = hinted;
        self.last_resort = last_resort;
        if !self.is_even() {
            self.uneven = true;
            self.settle_by_share(context, touched);
        } else {
            let live;
            let considered = if all || self.uneven {
                live = self.candidates.live();
                // Dead ones leave the index only after this.
                live.as_slice()
            } else {
                dirty
            };
            if std::mem::take(&mut self.uneven) {
                let wanted = considered.iter().map(|at| (*at, self.even_slots(context, *at)));
                let wanted: Vec<_> = wanted.collect();
                self.settle_counted(&wanted, touched);
            } else {
                self.settle_evenly(context, considered, touched);
            }
        }
        touched.sort_unstable();
        touched.dedup();
        touched.retain(|position| (*position as usize) < self.slots.len());
    }

    /// One slot for each; a ghost keeps what it has.
    fn even_slots(&self, context: &Context, at: u32) -> u32 {
        let candidate = &self.candidates[at];
        match self.selected(context, at) {
            false => 0,
            true if candidate.is(GHOST) => u32::from(candidate.slots).max(1),
            true => 1,
        }
    }

    fn settle_by_share(&mut self, context: &Context, touched: &mut Vec<u32>) {
        let Picked::Active(shares) = self.picked else {
            return;
        };
        let mut bids = self.bids(context);
        allot(&shares, &mut bids);
        let mut wanted: Vec<(u32, u32)> = bids.iter().map(|bid| (bid.at, bid.slots)).collect();
        let counted: std::collections::BTreeSet<u32> = bids.iter().map(|bid| bid.at).collect();
        for at in self.candidates.live() {
            if !counted.contains(&at) {
                wanted.push((at, self.even_slots(context, at)));
            }
        }
        wanted.sort_unstable();
        self.settle_counted(&wanted, touched);
    }

    /// Makes the slots of each candidate as many as wanted, of all that have or want some.
    fn settle_counted(&mut self, wanted: &[(u32, u32)], touched: &mut Vec<u32>) {
        let wants = |at: u32| {
            let found = wanted.binary_search_by_key(&at, |(at, _)| *at);
            found.map_or(0, |place| wanted[place].1)
        };
        for (at, _) in wanted {
            self.candidates[*at].slots = 0;
        }
        let mut holes = Vec::new();
        for position in 0..self.slots.len() as u32 {
            let at = self.slots[position as usize];
            let candidate = &mut self.candidates[at];
            if u32::from(candidate.slots) < wants(at) {
                candidate.slots += 1;
            } else {
                holes.push(position);
            }
        }
        let mut joining = Vec::new();
        for (at, slots) in wanted {
            let missing = slots - u32::from(self.candidates[*at].slots);
            joining.extend(std::iter::repeat_n(*at, missing as usize));
        }
        self.fill(holes, joining, touched);
        // Where each one's slots are may have changed all over.
        for (at, _) in wanted {
            self.candidates[*at].slot = NO_SLOT;
        }
        for (position, at) in (0u32..).zip(&self.slots) {
            self.candidates[*at].slot = position;
        }
    }

    fn settle_evenly(&mut self, context: &Context, considered: &[u32], touched: &mut Vec<u32>) {
        let (mut holes, mut joining) = (Vec::new(), Vec::new());
        let mut several = false;
        for &at in considered {
            let candidate = &self.candidates[at];
            several |= candidate.slots > 1 && !candidate.is(GHOST);
            match (candidate.has_slot(), self.selected(context, at)) {
                (true, false) => holes.push(candidate.slot),
                (false, true) => joining.push(at),
                _ => {}
            }
            several |= candidate.slots > 1 && !self.selected(context, at);
        }
        if several {
            // Restored with several slots, and named by now.
            let live = self.candidates.live();
            let wanted: Vec<_> = live
                .into_iter()
                .map(|at| (at, self.even_slots(context, at)))
                .collect();
            self.settle_counted(&wanted, touched);
            return;
        }
        for &hole in &holes {
            let at = self.slots[hole as usize];
            self.candidates[at].slot = NO_SLOT;
            self.candidates[at].slots = 0;
        }
        self.fill(holes, joining, touched);
    }

    /// Puts those that join into the holes, the lowest first, then behind the last slot; the last slots move into the holes
    /// that are left, from the highest down.
    fn fill(&mut self, mut holes: Vec<u32>, joining: Vec<u32>, touched: &mut Vec<u32>) {
        holes.sort_unstable_by(|a, b| b.cmp(a));
        let mut joining = joining.into_iter();
        while let Some(&hole) = holes.last() {
            let Some(at) = joining.next() else { break };
            holes.pop();
            self.slots[hole as usize] = at;
            self.candidates[at].slot = hole;
            self.candidates[at].slots += 1;
            touched.push(hole);
        }
        self.overflow = 0;
        for at in joining {
            if self.slots.len() >= SLOTS_MAX {
                self.overflow += 1;
                continue;
            }
            touched.push(self.slots.len() as u32);
            self.give_slot(at);
        }
        for hole in holes {
            self.slots.swap_remove(hole as usize);
            if let Some(&moved) = self.slots.get(hole as usize) {
                self.candidates[moved].slot = hole;
                touched.push(hole);
            }
        }
    }

    pub(super) fn give_slot(&mut self, at: u32) {
        let candidate = &mut self.candidates[at];
        candidate.slot = self.slots.len() as u32;
        candidate.slots += 1;
        push_tight(&mut self.slots, at);
    }

    // === slow start ===

    /// A candidate becomes able to take traffic: it starts slowly if others are there to carry the rest.
    pub(super) fn begin_slowly(&mut self, context: &Context, at: u32) {
        if self.slow_start_seconds == 0 || !self.seasoned {
            return;
        }
        self.candidates[at].level = 1;
        self.ramps.retain(|(of, _)| *of != at);
        self.ramps.push((at, context.now));
    }

    pub(super) fn end_slow_start(&mut self, at: u32) {
        if self.candidates[at].level != LEVELS {
            self.candidates[at].level = LEVELS;
            self.ramps.retain(|(of, _)| *of != at);
        }
    }

    /// Lets slow starts go on; true if one reached another step.
    pub(crate) fn advance(&mut self, context: &Context) -> bool {
        let (slow, now) = (u128::from(self.slow_start_seconds) * 1000, context.now);
        let candidates = &mut self.candidates;
        let mut changed = false;
        self.ramps.retain(|(at, since)| {
            let elapsed = now.saturating_sub(*since).as_millis();
            let steps = u128::from(LEVELS - 1);
            let level = (elapsed * steps)
                .checked_div(slow)
                .map_or(LEVELS, |done| 1 + done.min(steps) as u8);
            let candidate = &mut candidates[*at];
            changed |= candidate.level != level;
            candidate.level = level;
            level != LEVELS
        });
        self.reselect |= changed;
        changed
    }

    /// Whether slow starts are under way.
    pub(crate) const fn is_ramping(&self) -> bool {
        !self.ramps.is_empty()
    }

    /// Each candidate that takes traffic with its ideal share, for Maglev.
    pub(in super::super) fn ideal_shares(&self, context: &Context) -> Vec<(Bid, u64)> {
        let bids = self.bids(context);
        let share = |rank: u8| match self.picked {
            Picked::Active(shares) => u64::from(shares.of(rank)),
            _ => u64::from(WHOLE),
        };
        let sum = |rank: u8| -> u64 {
            let of_rank = bids.iter().filter(|bid| bid.rank == rank);
            of_rank.map(|bid| u64::from(bid.weight)).sum()
        };
        let sums: Vec<u64> = (0..self.order.ranks.max(1)).map(sum).collect();
        let shares: Vec<(Bid, u64)> = bids
            .iter()
            .map(|bid| {
                let all = sums[usize::from(bid.rank)].max(1);
                // A share has 30 bits, a weight 19.
                let ideal = share(bid.rank) * u64::from(bid.weight) / all;
                (*bid, ideal.max(1))
            })
            .collect();
        self.with_restored(shares)
    }

    /// Adds what takes traffic because nobody knows better yet: ghosts, and the last resort. As much as the best of the others.
    fn with_restored(&self, mut shares: Vec<(Bid, u64)>) -> Vec<(Bid, u64)> {
        if self.ghosts == 0 && !self.last_resort {
            return shares;
        }
        let most = shares.iter().map(|(_, share)| *share).max().unwrap_or(1);
        for at in self.candidates.live() {
            let candidate = &self.candidates[at];
            let restored = candidate.is(GHOST) || (candidate.is(HELD) && self.last_resort);
            if candidate.id != 0 && restored {
                let bid = Bid {
                    key: candidate.key(),
                    at,
                    rank: 0,
                    weight: 1,
                    slots: 1,
                };
                shares.push((bid, most));
            }
        }
        shares
    }

    /// Whether anything counts as active.
    pub(super) fn has_active(&self) -> bool {
        (0..self.order.ranks).any(|rank| self.counts.rank(rank).active > 0)
    }
}
