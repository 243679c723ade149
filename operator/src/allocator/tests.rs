//! Allocation of identity numbers: unique, stable, rested before reuse.

use isthmus_model::{
    ClusterId, MaxConnectedClusters,
    labels::{POLICY_CLUSTER, SOURCE_K8S},
};
use proptest::prelude::*;

use super::*;

const RETENTION: Retention = Retention {
    grace: Duration::from_secs(100),
    rest: Duration::from_secs(1000),
};

fn empty(seed: u32) -> Allocator {
    let max = MaxConnectedClusters::C511;
    let range = IdentityRange::of(ClusterId::new(2, max).unwrap(), max);
    Allocator::new(ClusterName::new("c2").unwrap(), range, RETENTION, seed)
}

fn labels(app: u32) -> Labels {
    let mut labels = Labels::default();
    labels.insert(SOURCE_K8S, "app", &app.to_string());
    labels.insert(SOURCE_K8S, POLICY_CLUSTER, "c2");
    labels
}

const fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn a_restart_keeps_numbers() {
    let mut before = empty(7);
    let numbers: Vec<_> = (0..50).map(|app| before.acquire(labels(app)).unwrap()).collect();
    let mut after = empty(99);
    for number in before.numbers() {
        let value = identity::encode(before.labels(number).unwrap());
        after.restore(number, &value, at(0)).unwrap();
    }
    for (app, number) in (0..50).rev().zip(numbers.iter().rev()) {
        assert_eq!(after.acquire(labels(app)).unwrap(), *number);
    }
    assert_eq!(after.collect(at(10_000)), []);
}

#[test]
fn what_readers_would_refuse_is_not_taken_over() {
    let mut allocator = empty(0);
    let good = identity::encode(&labels(1));
    assert!(
        allocator.restore(NumericIdentity(32_767), &good, at(0)).is_err(),
        "another cluster's range"
    );
    assert!(
        allocator
            .restore(NumericIdentity(65_536), b"k8s:app=a;", at(0))
            .is_err(),
        "no cluster"
    );
    assert!(
        allocator
            .restore(NumericIdentity(65_536), b"\xff", at(0))
            .is_err()
    );
    assert!(allocator.is_empty());
    assert!(allocator.restore(NumericIdentity(65_536), &good, at(0)).is_ok());
}

#[test]
fn of_two_numbers_for_the_same_labels_the_lower_one_stays() {
    for order in [[65_540, 65_550], [65_550, 65_540]] {
        let mut allocator = empty(0);
        for number in order {
            allocator
                .restore(NumericIdentity(number), &identity::encode(&labels(1)), at(0))
                .unwrap();
        }
        assert_eq!(allocator.acquire(labels(1)).unwrap(), NumericIdentity(65_540));
        assert_eq!(allocator.collect(at(100)), [NumericIdentity(65_550)]);
        assert_eq!(allocator.acquire(labels(1)).unwrap(), NumericIdentity(65_540));
    }
}

#[test]
fn unused_numbers_go_after_the_grace_period_and_rest() {
    let mut allocator = empty(0);
    let number = allocator.acquire(labels(1)).unwrap();
    allocator.release(number, at(10));
    assert_eq!(allocator.collect(at(109)), []);
    assert_eq!(
        allocator.acquire(labels(1)).unwrap(),
        number,
        "used again in time"
    );
    allocator.release(number, at(200));
    assert_eq!(allocator.collect(at(300)), [number]);
    assert_ne!(allocator.acquire(labels(1)).unwrap(), number);
}

#[test]
fn exhaustion_is_an_error_and_ends_when_numbers_have_rested() {
    let mut allocator = empty(12_345);
    let total = 32_768;
    let numbers: BTreeSet<_> = (0..total)
        .map(|app| allocator.acquire(labels(app)).unwrap())
        .collect();
    assert_eq!(numbers.len(), total as usize);
    let error = allocator.acquire(labels(total)).unwrap_err();
    assert_eq!((error.total, error.used, error.resting), (32_768, 32_768, 0));
    assert!(error.to_string().contains("--labels"));
    let known = allocator.acquire(labels(5)).unwrap();
    allocator.release(known, at(0));
    allocator.release(known, at(0));
    assert_eq!(allocator.collect(at(100)), [known]);
    assert_eq!(allocator.collect(at(1099)), []);
    assert_eq!(allocator.acquire(labels(total)).unwrap_err().resting, 1);
    assert_eq!(allocator.collect(at(1100)), []);
    assert_eq!(allocator.acquire(labels(total)).unwrap(), known);
}

#[derive(Clone, Debug)]
enum Step {
    Acquire(u32),
    Release(usize),
    Wait(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (0u32..12).prop_map(Step::Acquire),
        3 => any::<usize>().prop_map(Step::Release),
        1 => (0u64..400).prop_map(Step::Wait),
    ];
    proptest::collection::vec(step, 0..200)
}

proptest! {
    #[test]
    fn a_label_set_has_one_number_and_a_freed_number_rests(steps in steps(), seed in any::<u32>()) {
        let mut allocator = empty(seed);
        let mut held: Vec<(u32, NumericIdentity)> = vec![];
        let mut freed: BTreeMap<NumericIdentity, u64> = BTreeMap::new();
        let mut time = 0;
        for step in steps {
            match step {
                Step::Acquire(app) => {
                    let known = allocator.numbers().collect::<BTreeSet<_>>();
                    let number = allocator.acquire(labels(app)).unwrap();
                    if !known.contains(&number)
                        && let Some(when) = freed.get(&number)
                    {
                        prop_assert!(time - when >= 1000);
                    }
                    held.push((app, number));
                }
                Step::Release(index) if !held.is_empty() => {
                    let (_, number) = held.swap_remove(index % held.len());
                    allocator.release(number, at(time));
                }
                Step::Release(_) => {}
                Step::Wait(seconds) => {
                    time += seconds;
                    for number in allocator.collect(at(time)) {
                        prop_assert!(held.iter().all(|(_, held)| *held != number), "freed in use");
                        freed.insert(number, time);
                    }
                }
            }
            for (app, number) in &held {
                prop_assert_eq!(allocator.labels(*number), Some(&labels(*app)));
            }
            let distinct: BTreeSet<_> = allocator.numbers().map(|n| allocator.labels(n).cloned()).collect();
            prop_assert_eq!(distinct.len(), allocator.len());
        }
    }
}
