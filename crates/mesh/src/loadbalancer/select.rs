//! Which of a frontend's backends take traffic, and how much of it each tier gets: one function of a few counts.
//!
//! Rules:
//! - Ranks are asked in their order. One that has its minimum of healthy backends carries all that is left. One below it
//!   keeps the share that its capacity is fit for, and the next gets the rest; without spill-over it is passed over as long as
//!   a later one has its minimum. If no rank has its minimum, what is left is spread in proportion to those shares.
//! - Without tiers the ranks are Cilium's affinity (`pkg/clustermesh/loadbalancer/selectbackends.go`).
//! - Terminating backends serve when no active one is left; those of a cluster that does not answer are the last resort.
//!
//! Invariant: something is picked whenever there is something.

use isthmus_model::MinHealthy;

use super::order::{Order, RANKS_MAX};

/// What a backend is good for.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Class {
    /// Ready, not terminating, of a weight above 0.
    Active,
    /// Terminating and still serving.
    Terminating,
    /// Neither.
    Unusable,
}

/// How one backend counts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Tally {
    pub(crate) rank: u8,
    /// Its cluster does not answer.
    pub(crate) quarantined: bool,
    pub(crate) class: Class,
    pub(crate) weight: u16,
    /// Of the local cluster: whether it has a hint, and the hint is for here.
    pub(crate) hint: Hint,
}

/// What a topology-aware hint says about a backend, seen from here.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Hint {
    /// Of another cluster: hints are not about it.
    Foreign,
    /// It has none.
    None,
    Here,
    Elsewhere,
}

/// Backends of one rank.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct RankCount {
    pub(crate) active: u32,
    pub(crate) active_weight: u64,
    /// Weight of all that the rank is meant to have, usable or not, reachable or not.
    pub(crate) capacity: u64,
    pub(crate) terminating: u32,
}

/// How many backends there are of each kind.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts {
    ranks: Vec<RankCount>,
    quarantined_active: u32,
    quarantined_terminating: u32,
    /// Active ones of the local cluster.
    unhinted: u32,
    hinted_here: u32,
}

impl Counts {
    pub(crate) const fn new() -> Self {
        Self {
            ranks: Vec::new(),
            quarantined_active: 0,
            quarantined_terminating: 0,
            unhinted: 0,
            hinted_here: 0,
        }
    }

    pub(crate) fn add(&mut self, tally: Tally) {
        self.count(tally, |number, by| *number += by, |number, by| *number += by);
    }

    pub(crate) fn remove(&mut self, tally: Tally) {
        self.count(tally, |number, by| *number -= by, |number, by| *number -= by);
    }

    fn count(&mut self, tally: Tally, number: impl Fn(&mut u32, u32), weight: impl Fn(&mut u64, u64)) {
        let at = usize::from(tally.rank);
        if self.ranks.len() <= at {
            self.ranks.resize(at + 1, RankCount::default());
        }
        let rank = &mut self.ranks[at];
        if tally.class != Class::Terminating {
            weight(&mut rank.capacity, tally.weight.into());
        }
        match (tally.quarantined, tally.class) {
            (_, Class::Unusable) => {}
            (false, Class::Active) => {
                number(&mut rank.active, 1);
                weight(&mut rank.active_weight, tally.weight.into());
                match tally.hint {
                    Hint::None => number(&mut self.unhinted, 1),
                    Hint::Here => number(&mut self.hinted_here, 1),
                    Hint::Foreign | Hint::Elsewhere => {}
                }
            }
            (false, Class::Terminating) => number(&mut rank.terminating, 1),
            (true, Class::Active) => number(&mut self.quarantined_active, 1),
            (true, Class::Terminating) => number(&mut self.quarantined_terminating, 1),
        }
    }

    pub(crate) fn rank(&self, rank: u8) -> RankCount {
        self.ranks.get(usize::from(rank)).copied().unwrap_or_default()
    }

    /// Whether the local cluster's active backends are taken by their hints: all have one, and there are some for here.
    pub(crate) const fn hints_hold(&self) -> bool {
        self.unhinted == 0 && self.hinted_here > 0
    }
}

/// All traffic, in the unit of [`Shares`].
pub(crate) const WHOLE: u32 = 1 << 30;

/// Each rank's share of the traffic; they sum up to [`WHOLE`].
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Shares(pub(crate) [u32; RANKS_MAX]);

impl Shares {
    pub(crate) const fn of(&self, rank: u8) -> u32 {
        self.0[rank as usize]
    }

    /// The rank that has all, if one has.
    pub(crate) fn single(&self) -> Option<u8> {
        (0u8..)
            .zip(self.0)
            .find_map(|(rank, share)| (share == WHOLE).then_some(rank))
    }
}

/// Who takes traffic.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) enum Picked {
    #[default]
    Nothing,
    /// Active backends of the ranks that have a share.
    Active(Shares),
    /// Terminating backends of these ranks, as bits.
    Terminating(u16),
    /// Active backends of clusters that do not answer.
    QuarantinedActive,
    /// Terminating ones of those.
    QuarantinedTerminating,
}

impl Picked {
    /// Whether a backend is among them; hints apart.
    pub(crate) const fn takes(&self, tally: Tally) -> bool {
        match (self, tally.class) {
            (Self::Active(shares), Class::Active) => !tally.quarantined && shares.of(tally.rank) > 0,
            (Self::Terminating(ranks), Class::Terminating) => {
                !tally.quarantined && *ranks & (1 << tally.rank) != 0
            }
            (Self::QuarantinedActive, Class::Active) | (Self::QuarantinedTerminating, Class::Terminating) => {
                tally.quarantined
            }
            _ => false,
        }
    }
}

/// Decides. [`Picked::Nothing`] only if there is nothing.
pub(crate) fn select(order: &Order, counts: &Counts) -> Picked {
    let first = counts.rank(0);
    if order.first_holds && first.active == 0 && first.terminating > 0 {
        return Picked::Terminating(1);
    }
    if let Some(shares) = shares(order, counts) {
        return Picked::Active(shares);
    }
    let terminating = (0..order.ranks)
        .filter(|rank| counts.rank(*rank).terminating > 0)
        .fold(0, |bits, rank| bits | 1 << rank);
    if terminating != 0 {
        Picked::Terminating(terminating)
    } else if counts.quarantined_active > 0 {
        Picked::QuarantinedActive
    } else if counts.quarantined_terminating > 0 {
        Picked::QuarantinedTerminating
    } else {
        Picked::Nothing
    }
}

/// How the ranks share the traffic; `None` if no reachable backend is active.
fn shares(order: &Order, counts: &Counts) -> Option<Shares> {
    let alive = || {
        (0..order.ranks)
            .map(|rank| (rank, counts.rank(rank)))
            .filter(|(_, count)| count.active > 0)
    };
    let mut shares = Shares::default();
    if !order.spill_over
        && let Some((rank, _)) = alive().find(|(_, count)| has_minimum(order.min, count))
    {
        shares.0[usize::from(rank)] = WHOLE;
        return Some(shares);
    }
    let mut left = WHOLE;
    let mut last = None;
    for (rank, count) in alive() {
        last = Some(rank);
        let takes = if has_minimum(order.min, &count) {
            left
        } else {
            left.min(fit_for(order.min, &count))
        };
        shares.0[usize::from(rank)] = takes;
        left -= takes;
        if left == 0 {
            return Some(shares);
        }
    }
    // Nobody has its minimum, and somebody must carry what is left.
    let last = last?;
    let given = u64::from(WHOLE - left);
    for share in &mut shares.0 {
        // At most WHOLE: a share is at most what was given.
        *share = (u64::from(*share) * u64::from(WHOLE) / given) as u32;
    }
    shares.0[usize::from(last)] += WHOLE - shares.0.iter().sum::<u32>();
    Some(shares)
}

fn has_minimum(min: MinHealthy, count: &RankCount) -> bool {
    match min {
        MinHealthy::Count(least) => count.active >= least.into(),
        // Weights are 16 bits and backends 32, so neither product overflows in practice; saturation would only favour the rank.
        MinHealthy::Percent(least) => {
            count.active_weight.saturating_mul(100) >= count.capacity.saturating_mul(least.into())
        }
    }
}

/// The share that a rank below its minimum is fit for: that of its healthy capacity, and no more than so many of the least number.
fn fit_for(min: MinHealthy, count: &RankCount) -> u32 {
    let part =
        |of: u64, all: u64| (u128::from(WHOLE) * u128::from(of.min(all)) / u128::from(all.max(1))) as u32;
    let by_capacity = part(count.active_weight, count.capacity);
    let by_number = match min {
        MinHealthy::Count(least) => part(count.active.into(), least.into()),
        MinHealthy::Percent(_) => WHOLE,
    };
    by_capacity.min(by_number).max(1)
}

#[cfg(test)]
mod tests;
