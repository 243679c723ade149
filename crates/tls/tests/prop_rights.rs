//! Coverage of a range agrees with coverage of each of its keys.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on has failed"
)]

use isthmus_tls::rights::{KeyRange, Rights};
use proptest::prelude::*;

/// Short keys over three letters, so that ranges touch, nest and overlap often.
fn key() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(0u8..3, 0..3)
}

fn range() -> impl Strategy<Value = KeyRange> {
    (key(), key()).prop_map(|(start, end)| KeyRange::from_etcd(&start, &end))
}

/// Keys of up to four letters over the same alphabet: one letter more than any limit, so that each gap has a witness.
fn all_keys() -> Vec<Vec<u8>> {
    let mut keys = vec![vec![]];
    let mut from = 0;
    for _ in 0..4 {
        let to = keys.len();
        for index in from..to {
            for letter in 0..4 {
                let mut longer: Vec<u8> = keys[index].clone();
                longer.push(letter);
                keys.push(longer);
            }
        }
        from = to;
    }
    keys
}

proptest! {
    #[test]
    fn covered_means_that_each_key_is_granted(granted in proptest::collection::vec(range(), 0..5), asked in range()) {
        let rights = Rights::new(granted.clone());
        let inside: Vec<Vec<u8>> = all_keys().into_iter().filter(|key| asked.contains(key)).collect();
        let each = inside.iter().all(|key| granted.iter().any(|range| range.contains(key)));
        prop_assert_eq!(rights.covers(&asked), each && !inside.is_empty());
    }

    #[test]
    fn ranges_overlap_where_they_share_a_key(a in range(), b in range()) {
        let shared = all_keys().iter().any(|key| a.contains(key) && b.contains(key));
        prop_assert_eq!(a.overlaps(&b), shared);
    }

    #[test]
    fn hostile_names_never_panic(name in ".{0,80}") {
        let _ = Rights::of_common_name(&name, "c1");
    }
}
