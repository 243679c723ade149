//! The selection, row by row, and its promises over random health.

use std::collections::BTreeMap;

use isthmus_model::{Affinity, Preference};
use proptest::prelude::*;

use super::*;

const CLASSES: [(bool, bool, Class); 6] = [
    (true, false, Class::Active),
    (true, false, Class::Terminating),
    (false, false, Class::Active),
    (false, false, Class::Terminating),
    (false, true, Class::Active),
    (false, true, Class::Terminating),
];

fn tally(order: &Order, (local, quarantined, class): (bool, bool, Class)) -> Tally {
    Tally {
        rank: order.rank(if local { 1 } else { 2 }),
        quarantined,
        class,
        weight: 1,
        hint: Hint::Foreign,
    }
}

fn affinity_order(affinity: Affinity) -> Order {
    Order::new(1, affinity, &Preference::default(), &BTreeMap::new())
}

/// `counts` as `LA LT RA RT QA QT`; the answer as the names of those that are used.
fn check(affinity: Affinity, numbers: [u32; 6], want: &str) {
    let order = affinity_order(affinity);
    let mut counts = Counts::new();
    for (kind, number) in CLASSES.into_iter().zip(numbers) {
        (0..number).for_each(|_| counts.add(tally(&order, kind)));
    }
    let picked = select(&order, &counts);
    let names = ["LA", "LT", "RA", "RT", "QA", "QT"];
    let got: Vec<_> = CLASSES
        .into_iter()
        .zip(names)
        .zip(numbers)
        .filter(|((kind, _), number)| *number > 0 && picked.takes(tally(&order, *kind)))
        .map(|((_, name), _)| name)
        .collect();
    assert_eq!(got.join(" "), want, "{affinity:?} {numbers:?}");
}

#[test]
fn no_affinity_uses_all_that_are_active() {
    check(Affinity::None, [1, 0, 1, 0, 0, 0], "LA RA");
    check(Affinity::None, [1, 1, 1, 1, 1, 1], "LA RA");
    check(Affinity::None, [0, 1, 1, 0, 0, 0], "RA");
    check(Affinity::None, [0, 1, 0, 1, 1, 1], "LT RT");
    check(Affinity::None, [0, 0, 0, 0, 1, 1], "QA");
    check(Affinity::None, [0, 0, 0, 0, 0, 1], "QT");
    check(Affinity::None, [0; 6], "");
}

#[test]
fn local_affinity_keeps_to_active_local_ones() {
    check(Affinity::Local, [1, 0, 1, 0, 0, 0], "LA");
    check(Affinity::Local, [1, 1, 0, 1, 1, 0], "LA");
    check(Affinity::Local, [0, 1, 1, 0, 0, 0], "RA");
    check(Affinity::Local, [0, 1, 0, 1, 0, 0], "LT RT");
    check(Affinity::Local, [0, 1, 0, 0, 1, 0], "LT");
    check(Affinity::Local, [0, 0, 1, 0, 1, 0], "RA");
    check(Affinity::Local, [0, 0, 0, 0, 1, 0], "QA");
}

#[test]
fn remote_affinity_keeps_to_healthy_remote_ones() {
    check(Affinity::Remote, [1, 0, 1, 0, 0, 0], "RA");
    check(Affinity::Remote, [1, 0, 0, 1, 0, 0], "RT");
    check(Affinity::Remote, [1, 0, 0, 0, 1, 0], "LA");
    check(Affinity::Remote, [0, 1, 0, 0, 1, 0], "LT");
    check(Affinity::Remote, [0, 0, 0, 0, 1, 1], "QA");
}

/// (healthy, of) for each rank; the answer in hundredths, rounded down.
fn shares_of(min: MinHealthy, spill_over: bool, ranks: &[(u32, u32)]) -> Vec<u32> {
    let order = Order {
        ranks: ranks.len() as u8,
        min,
        spill_over,
        ..Order::flat()
    };
    let mut counts = Counts::new();
    for (rank, (healthy, of)) in (0u8..).zip(ranks) {
        for number in 0..*of {
            counts.add(Tally {
                rank,
                quarantined: false,
                class: if number < *healthy {
                    Class::Active
                } else {
                    Class::Unusable
                },
                weight: 1,
                hint: Hint::Foreign,
            });
        }
    }
    let Picked::Active(shares) = select(&order, &counts) else {
        return vec![];
    };
    assert_eq!(shares.0.iter().sum::<u32>(), WHOLE);
    ranks
        .iter()
        .zip(shares.0)
        .map(|(_, share)| (u64::from(share) * 100 / u64::from(WHOLE)) as u32)
        .collect()
}

#[test]
fn a_tier_below_its_minimum_keeps_what_it_is_fit_for() {
    use MinHealthy::{Count, Percent};
    assert_eq!(shares_of(Percent(50), true, &[(1, 30), (30, 30)]), [3, 96]);
    assert_eq!(shares_of(Percent(50), true, &[(15, 30), (30, 30)]), [100, 0]);
    assert_eq!(
        shares_of(Percent(50), true, &[(6, 30), (6, 30), (1, 1)]),
        [19, 19, 60]
    );
    assert_eq!(shares_of(Percent(50), true, &[(6, 30), (3, 30)]), [66, 33]);
    assert_eq!(shares_of(Percent(50), true, &[(0, 30), (3, 30)]), [0, 100]);
    assert_eq!(shares_of(Count(2), true, &[(1, 1), (5, 5)]), [50, 50]);
    assert_eq!(shares_of(Count(2), true, &[(1, 4), (5, 5)]), [25, 75]);
    assert_eq!(shares_of(Count(1), true, &[(1, 30), (5, 5)]), [100, 0]);
}

#[test]
fn without_spill_over_a_tier_carries_all_or_nothing() {
    use MinHealthy::Percent;
    assert_eq!(shares_of(Percent(50), false, &[(1, 30), (30, 30)]), [0, 100]);
    assert_eq!(
        shares_of(Percent(50), false, &[(1, 30), (6, 30), (1, 1)]),
        [0, 0, 100]
    );
    assert_eq!(shares_of(Percent(50), false, &[(6, 30), (6, 30)]), [50, 50]);
}

#[test]
fn hints_hold_only_where_all_have_one_and_some_are_for_here() {
    let order = Order::flat();
    let check = |hints: &[Hint], want: bool| {
        let mut counts = Counts::new();
        for hint in hints {
            counts.add(Tally {
                hint: *hint,
                ..tally(&order, CLASSES[0])
            });
        }
        assert_eq!(counts.hints_hold(), want, "{hints:?}");
    };
    check(&[], false);
    check(&[Hint::Here, Hint::Elsewhere], true);
    check(&[Hint::Here, Hint::Elsewhere, Hint::Foreign], true);
    check(&[Hint::Here, Hint::None], false);
    check(&[Hint::Elsewhere], false);
}

fn some_min() -> impl Strategy<Value = MinHealthy> {
    prop_oneof![
        (1u16..40).prop_map(MinHealthy::Count),
        (1u8..=100).prop_map(MinHealthy::Percent)
    ]
}

fn some_class() -> impl Strategy<Value = Class> {
    prop_oneof![
        Just(Class::Active),
        Just(Class::Terminating),
        Just(Class::Unusable)
    ]
}

prop_compose! {
    fn some_tally(ranks: u8)(
        rank in 0..ranks, quarantined in any::<bool>(), class in some_class(), weight in 1u16..=20,
    ) -> Tally {
        Tally { rank, quarantined, class, weight, hint: Hint::Foreign }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Over random health: never a black hole, no share without a backend, and a tier that others can help out gets no more
    /// than its part of its capacity.
    #[test]
    fn shares_are_whole_fair_and_never_lost(
        (ranks, tallies) in (1u8..=9).prop_flat_map(|ranks| (Just(ranks), proptest::collection::vec(some_tally(ranks), 0..60))),
        min in some_min(), spill_over in any::<bool>(), first_holds in any::<bool>(),
    ) {
        let order = Order { ranks, min, spill_over, first_holds, ..Order::flat() };
        let mut counts = Counts::new();
        tallies.iter().for_each(|tally| counts.add(*tally));
        let picked = select(&order, &counts);
        let usable = tallies.iter().any(|tally| tally.class != Class::Unusable);
        let taken: Vec<_> = tallies.iter().filter(|tally| picked.takes(**tally)).collect();
        prop_assert_eq!(usable, !taken.is_empty(), "{:?}", picked);
        let healthy = tallies.iter().any(|tally| tally.class == Class::Active && !tally.quarantined);
        if let Picked::Active(shares) = picked {
            prop_assert_eq!(shares.0.iter().map(|share| u64::from(*share)).sum::<u64>(), u64::from(WHOLE));
            let helped = (0..ranks).any(|rank| {
                let count = counts.rank(rank);
                count.active > 0 && has_minimum(min, &count)
            });
            for rank in 0..ranks {
                let (count, share) = (counts.rank(rank), shares.of(rank));
                prop_assert!(share == 0 || count.active > 0);
                if helped && !has_minimum(min, &count) {
                    prop_assert!(u128::from(share) * u128::from(count.capacity) <= u128::from(WHOLE) * u128::from(count.active_weight) + u128::from(count.capacity));
                }
            }
        } else {
            prop_assert!(!healthy || first_holds);
        }
        // Taking all away again leaves nothing.
        tallies.iter().for_each(|tally| counts.remove(*tally));
        prop_assert_eq!(select(&order, &counts), Picked::Nothing);
    }
}
