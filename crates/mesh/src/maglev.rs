//! Maglev tables: which backend a flow's hash leads to, alike on every node, with little change when backends change.
//!
//! In: backends with weights, a table size, a seed. Out: for each entry of the table the number of a backend. The method is
//! that of Maglev (Eisenbud and others, NSDI 2016), with weights as Cilium has them: a backend of half the greatest weight
//! takes every second turn.
//!
//! Invariants: the table follows from addresses, ports, weights, size and seed alone, whatever the order of the input; every
//! entry names a backend if there is one. Cilium's tables have other hashes: a mesh does not mix both in front of one service.

use isthmus_bpf_abi::{Address, MAGLEV_TABLE_SIZE_DEFAULT};

use crate::mix::mix;

/// Sizes that a table may have: primes, as Cilium has them.
pub const TABLE_SIZES: [u32; 10] = [251, 509, 1021, 2039, 4093, 8191, 16_381, 32_749, 65_521, 131_071];

/// Length of a seed in bytes.
pub const SEED_LEN: usize = 12;

/// How tables are made; the same on all nodes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MaglevConfig {
    /// Entries of each table: one of [`TABLE_SIZES`].
    pub table_size: u32,
    /// Seed of the hashes (Cilium's `maglev.hashSeed`, decoded).
    pub seed: [u8; SEED_LEN],
    /// Services that do not say how backends are chosen have a table too.
    pub by_default: bool,
}

impl Default for MaglevConfig {
    /// Cilium's defaults: its seed is `JLfvgnHc2kaSUFaI`.
    fn default() -> Self {
        Self {
            table_size: MAGLEV_TABLE_SIZE_DEFAULT,
            seed: [
                0x24, 0xb7, 0xef, 0x82, 0x71, 0xdc, 0xda, 0x46, 0x92, 0x50, 0x56, 0x88,
            ],
            by_default: false,
        }
    }
}

/// A backend for a table.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MaglevBackend {
    /// Address.
    pub address: Address,
    /// Port, host order.
    pub port: u16,
    /// Weight, against those of the others. 0 counts as 1.
    pub weight: u64,
    /// What entries of the table name.
    pub id: u32,
}

struct Turn {
    at: u32,
    skip: u32,
    credit: u64,
    weight: u64,
    id: u32,
}

/// Makes a table of `size` entries, a prime; empty if there are no backends. Of more backends than entries some have none.
pub fn table(seed: &[u8; SEED_LEN], size: u32, backends: &[MaglevBackend]) -> Vec<u32> {
    if backends.is_empty() || size < 2 {
        return Vec::new();
    }
    let word = |bytes: &[u8]| bytes.iter().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
    let seeds = (mix(word(&seed[..8])), mix(word(&seed[4..])));
    let hash = |seed: u64, backend: &MaglevBackend| {
        let address = &backend.address;
        let half = mix(seed ^ word(&address[..8]));
        mix(mix(half ^ word(&address[8..])) ^ u64::from(backend.port))
    };
    let most = backends
        .iter()
        .map(|backend| backend.weight.max(1))
        .max()
        .unwrap_or(1);
    let mut turns: Vec<(u64, Turn)> = backends
        .iter()
        .map(|backend| {
            let (first, second) = (hash(seeds.0, backend), hash(seeds.1, backend));
            let turn = Turn {
                at: (first % u64::from(size)) as u32,
                skip: (second % u64::from(size - 1)) as u32 + 1,
                credit: 0,
                weight: backend.weight.max(1),
                id: backend.id,
            };
            // In this order backends take turns: no input order shows through.
            (mix(first ^ second.rotate_left(32)), turn)
        })
        .collect();
    turns.sort_by_key(|(order, turn)| (*order, turn.at, turn.skip, turn.id));
    let mut entries = vec![u32::MAX; size as usize];
    let mut owners = entries.clone();
    let mut left = size;
    loop {
        for (number, (_, turn)) in (0u32..).zip(&mut turns) {
            turn.credit += turn.weight;
            if turn.credit < most {
                continue;
            }
            turn.credit -= most;
            // The size is prime, so the walk comes to every entry, and one is free.
            while owners[turn.at as usize] != u32::MAX {
                turn.at = step(turn.at, turn.skip, size);
            }
            owners[turn.at as usize] = number;
            entries[turn.at as usize] = turn.id;
            left -= 1;
            if left == 0 {
                return entries;
            }
        }
    }
}

const fn step(at: u32, skip: u32, size: u32) -> u32 {
    let next = at + skip;
    if next >= size { next - size } else { next }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn backend(number: u32, weight: u64) -> MaglevBackend {
        let [.., a, b] = number.to_be_bytes();
        MaglevBackend {
            address: isthmus_bpf_abi::ipv4_mapped([10, 1, a, b]),
            port: 8080,
            weight,
            id: number + 1,
        }
    }

    fn even(numbers: impl IntoIterator<Item = u32>) -> Vec<MaglevBackend> {
        numbers.into_iter().map(|number| backend(number, 1)).collect()
    }

    const SEED: [u8; SEED_LEN] = *b"twelve bytes";

    fn counts(table: &[u32]) -> BTreeMap<u32, usize> {
        let mut counts = BTreeMap::new();
        table.iter().for_each(|id| *counts.entry(*id).or_default() += 1);
        counts
    }

    #[test]
    fn sizes_are_primes() {
        for size in TABLE_SIZES {
            assert!(
                (2..).take_while(|by| by * by <= size).all(|by| size % by != 0),
                "{size}"
            );
        }
        assert!(TABLE_SIZES.contains(&MaglevConfig::default().table_size));
    }

    #[test]
    fn a_table_is_the_same_wherever_it_is_made() {
        // A fixed table: another build or machine must come to the same, or nodes disagree during an upgrade.
        let table = table(&SEED, 251, &even(0..5));
        let sum = table.iter().fold(0u64, |sum, id| mix(sum ^ u64::from(*id)));
        assert_eq!(sum, 13_283_529_356_648_160_898);
    }

    #[test]
    fn one_of_many_that_goes_takes_little_with_it() {
        for backends in [10u32, 100, 1000] {
            let before = table(&SEED, 16_381, &even(0..backends));
            let after = table(&SEED, 16_381, &even((0..backends).filter(|number| *number != 3)));
            let gone = before.iter().filter(|id| **id == 4).count();
            let moved = before.iter().zip(&after).filter(|(a, b)| a != b).count();
            // Entries of others that move too: a few in a hundred of the table.
            assert!(
                moved - gone <= 16_381 * 4 / 100,
                "{backends}: {gone} gone, {moved} moved"
            );
        }
    }

    #[test]
    fn another_seed_is_another_table() {
        let (one, other) = (
            table(&SEED, 251, &even(0..9)),
            table(b"other_bytes!", 251, &even(0..9)),
        );
        assert_ne!(one, other);
        assert_eq!(table(&SEED, 251, &[]), []);
        assert_eq!(counts(&table(&SEED, 251, &even(0..1))), [(1, 251)].into());
        assert_eq!(table(&SEED, 251, &even(0..600)).len(), 251);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn entries_follow_the_weights(weights in proptest::collection::vec(1u64..50, 1..40), seed in any::<[u8; SEED_LEN]>()) {
            let mut backends: Vec<_> = (0u32..).zip(&weights).map(|(number, weight)| backend(number, *weight)).collect();
            let made = table(&seed, 4093, &backends);
            let counts = counts(&made);
            let whole: u64 = weights.iter().sum();
            for backend in &backends {
                let got = counts.get(&backend.id).copied().unwrap_or(0) as f64;
                let want = 4093.0 * backend.weight as f64 / whole as f64;
                // Turns are whole, and the last round may end in the middle.
                prop_assert!((got - want).abs() <= 2.0 + want * 0.05, "{got} for {want}");
            }
            backends.reverse();
            prop_assert_eq!(table(&seed, 4093, &backends), made);
        }
    }
}
