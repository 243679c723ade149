//! From shares to slots: how many slots each backend gets, so that a uniform choice of a slot gives each its share.
//!
//! In: shares of ranks, weights of backends. Out: numbers of slots, bounded by [`bound`] in all.
//!
//! Invariants: a rank that others help out gets no more than its share; the rank that carries the rest, the last one with a
//! share, always has a slot; within a rank slots are as the weights, or as close as the bound allows; which backends are left
//! out then follows from their addresses alone. The same input in any order gives the same numbers.

use isthmus_bpf_abi::Address;

use super::{
    order::RANKS_MAX,
    select::{Shares, WHOLE},
};
use crate::mix::mix;

/// A backend that takes traffic.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Bid {
    pub(crate) key: (Address, u16),
    /// Number of the candidate.
    pub(crate) at: u32,
    pub(crate) rank: u8,
    /// At least 1. Weight times how far slow start has got.
    pub(crate) weight: u32,
    /// The answer.
    pub(crate) slots: u32,
}

/// Most slots that so many backends get, if they do not all get one.
pub(crate) const fn bound(backends: usize) -> u32 {
    let twice = backends.saturating_mul(2);
    if twice < 1024 {
        1024
    } else if twice > u16::MAX as usize {
        u16::MAX as u32
    } else {
        twice as u32
    }
}

/// Backends of one rank, by the hash of their address.
struct Field {
    share: u64,
    bids: Vec<usize>,
    /// Weights reduced to small numbers, in the order of `bids`.
    units: Vec<u32>,
    base: u32,
}

/// Says how many slots each bid gets.
pub(crate) fn allot(shares: &Shares, bids: &mut [Bid]) {
    bids.iter_mut().for_each(|bid| bid.slots = 0);
    let bound = bound(bids.len());
    let mut fields: Vec<Field> = (0..RANKS_MAX)
        .filter(|rank| shares.0[*rank] > 0)
        .map(|rank| field(u64::from(shares.0[rank]), rank as u8, bids, bound))
        .filter(|field| !field.bids.is_empty())
        .collect();
    let Some(carrier) = fields.pop() else { return };
    let (total, limited) = best_total(&fields, &carrier, bound);
    for (field, slots) in fields.iter().zip(&limited) {
        spread(field, *slots, bids);
    }
    let left = total.saturating_sub(limited.iter().sum()).max(1);
    // Rounded up, so that the limited ranks stay below their shares.
    let left = if left >= carrier.base {
        left.div_ceil(carrier.base) * carrier.base
    } else {
        left
    };
    spread(&carrier, left, bids);
}

fn field(share: u64, rank: u8, bids: &[Bid], bound: u32) -> Field {
    let mut members: Vec<usize> = (0..bids.len()).filter(|at| bids[*at].rank == rank).collect();
    members.sort_unstable_by_key(|at| (hash(&bids[*at].key), bids[*at].key));
    let common = members
        .iter()
        .fold(0, |common, at| gcd(common, bids[*at].weight))
        .max(1);
    let mut units: Vec<u32> = members.iter().map(|at| bids[*at].weight / common).collect();
    let sum: u64 = units.iter().map(|unit| u64::from(*unit)).sum();
    // Half of the bound leaves room for other ranks.
    let most = u64::from(bound / 2).max(members.len() as u64);
    if sum > most {
        for unit in &mut units {
            // At most `most`, which is 32 bits wide.
            *unit = ((u64::from(*unit) * most / sum) as u32).max(1);
        }
    }
    Field {
        share,
        base: units.iter().sum(),
        bids: members,
        units,
    }
}

/// The number of slots in all that comes closest to the shares, and how many the limited ranks get of them.
fn best_total(limited: &[Field], carrier: &Field, bound: u32) -> (u32, Vec<u32>) {
    if limited.is_empty() {
        return (carrier.base, vec![]);
    }
    let slots = |total: u32| -> Vec<u32> {
        let of = |field: &Field| {
            let share = (field.share * u64::from(total) / u64::from(WHOLE)) as u32;
            let few = share < field.base;
            if few {
                share
            } else {
                share / field.base * field.base
            }
        };
        limited.iter().map(of).collect()
    };
    // In parts of a million: how much of their shares the limited ranks do not get, with `total` slots. Too few slots for a
    // rank's weights count as none of its share, and the fewer the worse.
    let short = |total: u32, slots: &[u32]| -> u64 {
        let each = limited.iter().zip(slots);
        each.map(|(field, slots)| {
            let got = u64::from(*slots) * u64::from(WHOLE) / u64::from(total);
            let missing = match slots.checked_sub(field.base) {
                Some(_) => field.share.saturating_sub(got),
                None => field.share + field.share * u64::from(field.base - slots) / u64::from(field.base),
            };
            missing * 1_000_000 / u64::from(WHOLE)
        })
        .sum()
    };
    let mut best: Option<(u64, u32, Vec<u32>)> = None;
    for times in 1u64.. {
        let total = (times * u64::from(carrier.base) * u64::from(WHOLE)).div_ceil(carrier.share);
        if total > bound.into() {
            break;
        }
        let total = total as u32;
        let got = slots(total);
        let miss = short(total, &got);
        if best.as_ref().is_none_or(|(least, ..)| miss < *least) {
            best = Some((miss, total, got));
        }
        if miss < 10_000 {
            break;
        }
    }
    match best {
        Some((_, total, got)) => (total, got),
        // The carrier has more backends than slots are left for.
        None => (bound, slots(bound)),
    }
}

/// Gives `slots` to the backends of a rank: whole multiples of their weights, or what comes closest.
fn spread(field: &Field, slots: u32, bids: &mut [Bid]) {
    let part = |unit: u32| (u64::from(unit) * u64::from(slots) / u64::from(field.base)) as u32;
    let mut left = slots;
    for (at, unit) in field.bids.iter().zip(&field.units) {
        bids[*at].slots = part(*unit);
        left -= part(*unit);
    }
    // Fewer than there are backends: each was rounded down.
    for at in field.bids.iter().take(left as usize) {
        bids[*at].slots += 1;
    }
}

const fn gcd(mut a: u32, mut b: u32) -> u32 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// An order of backends that has nothing to do with how addresses are given out.
fn hash((address, port): &(Address, u16)) -> u64 {
    let half = |from: usize| -> u64 {
        address[from..from + 8]
            .iter()
            .fold(0, |word, byte| word << 8 | u64::from(*byte))
    };
    mix(mix(mix(half(0)) ^ half(8)) ^ u64::from(*port))
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn bids(ranks: &[&[u32]]) -> Vec<Bid> {
        let mut list = Vec::new();
        for (rank, weights) in (0u8..).zip(ranks) {
            for weight in *weights {
                let number = list.len() as u16;
                list.push(Bid {
                    key: ([0; 16], number),
                    at: number.into(),
                    rank,
                    weight: *weight,
                    slots: 0,
                });
            }
        }
        list
    }

    fn shares(parts: &[f64]) -> Shares {
        let mut shares = Shares::default();
        let mut left = WHOLE;
        for (rank, part) in parts.iter().enumerate() {
            shares.0[rank] = ((f64::from(WHOLE) * part) as u32).min(left);
            left -= shares.0[rank];
        }
        shares.0[parts.len() - 1] += left;
        shares
    }

    fn check(parts: &[f64], ranks: &[&[u32]]) -> Vec<Vec<u32>> {
        let mut bids = bids(ranks);
        allot(&shares(parts), &mut bids);
        (0..ranks.len())
            .map(|rank| {
                let of_rank = bids.iter().filter(|bid| usize::from(bid.rank) == rank);
                of_rank.map(|bid| bid.slots).collect()
            })
            .collect()
    }

    #[test]
    fn weights_become_slots_in_their_lowest_terms() {
        assert_eq!(check(&[1.0], &[&[1, 1, 1]]), [[1, 1, 1]]);
        assert_eq!(check(&[1.0], &[&[50, 100, 150]]), [[1, 2, 3]]);
        assert_eq!(check(&[1.0], &[&[8, 8, 1]]), [[8, 8, 1]]);
    }

    #[test]
    fn one_of_thirty_keeps_a_thirtieth() {
        let got = check(&[1.0 / 30.0, 29.0 / 30.0], &[&[1], &[1; 30]]);
        let (local, remote): (u32, u32) = (got[0][0], got[1].iter().sum());
        assert!(local >= 1 && local * 30 <= local + remote, "{got:?}");
        assert!(
            got[1].iter().all(|slots| *slots == got[1][0]),
            "alike in a rank: {got:?}"
        );
    }

    #[test]
    fn few_slots_for_many_go_to_a_few() {
        let got = check(&[29.0 / 30.0, 1.0 / 30.0], &[&[1; 29], &[1; 300]]);
        let (limited, carrier): (u32, u32) = (got[0].iter().sum(), got[1].iter().sum());
        assert!(carrier >= 1 && limited + carrier <= 2 * bound(329));
        assert!(got[0].iter().all(|slots| *slots > 0));
        assert!(f64::from(limited) / f64::from(limited + carrier) > 0.9);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(600))]

        #[test]
        fn slots_are_bounded_and_limits_hold(
            ranks in vec((vec(prop_oneof![4 => Just(1u32), 1 => 1u32..70_000], 1..60), 1u32..1000), 1..6),
        ) {
            let whole: u32 = ranks.iter().map(|(_, part)| part).sum();
            let parts: Vec<f64> = ranks.iter().map(|(_, part)| f64::from(*part) / f64::from(whole)).collect();
            let shares = shares(&parts);
            let weights: Vec<&[u32]> = ranks.iter().map(|(weights, _)| weights.as_slice()).collect();
            let mut list = bids(&weights);
            allot(&shares, &mut list);
            let total: u32 = list.iter().map(|bid| bid.slots).sum();
            prop_assert!(total >= 1 && total <= 2 * bound(list.len()));
            for rank in 0..ranks.len() - 1 {
                let got: u32 = list.iter().filter(|bid| usize::from(bid.rank) == rank).map(|bid| bid.slots).sum();
                prop_assert!(u64::from(got) * u64::from(WHOLE) <= u64::from(shares.0[rank]) * u64::from(total), "rank {rank} has {got} of {total}");
            }
            let carrier: u32 = list.iter().filter(|bid| usize::from(bid.rank) == ranks.len() - 1).map(|bid| bid.slots).sum();
            prop_assert!(carrier > 0);
            // In any order the same.
            let before = list.clone();
            list.reverse();
            allot(&shares, &mut list);
            list.reverse();
            prop_assert_eq!(before, list);
        }
    }
}
