//! Plans under failing map writes: the maps stay valid, and end as they should.

use std::time::Duration;

use isthmus_mesh::{Reconciler, reconcile::RetryConfig};
use proptest::{collection::vec, prelude::*};

use crate::{
    events::{new_merge, some_events},
    maps::Maps,
    naive::Tables,
};

/// Runs a round in which the operations fail that `fails` says; lookups must resolve after each batch.
fn round(reconciler: &mut Reconciler, maps: &mut Maps, now: Duration, mut fails: impl FnMut() -> bool) {
    while let Some(batch) = reconciler.next_batch(3) {
        let results: Vec<Result<(), &str>> = batch
            .iter()
            .map(|op| {
                if fails() {
                    return Err("map is full");
                }
                maps.apply(op);
                Ok(())
            })
            .collect();
        reconciler.complete(now, &results);
        for (key, lookup) in maps.lookups() {
            assert!(lookup.iter().all(Option::is_some), "a lookup of {key:?} misses");
            let mut table = maps.table(&key).into_iter().flatten();
            assert!(
                table.all(|target| target.is_some()),
                "the table of {key:?} misses"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn failures_hold_up_only_what_depends_on_them(events in some_events(30), failures in vec(0u8..4, 1..50)) {
        let mut merge = new_merge();
        let (mut tables, mut maps) = (Tables::default(), Maps::default());
        let mut reconciler = Reconciler::new(RetryConfig::default(), Duration::ZERO);
        let mut chance = failures.iter().cycle();
        let mut now = Duration::ZERO;
        for (revision, event) in events.iter().enumerate() {
            event.act(&mut merge, &mut tables);
            now += Duration::from_millis(60);
            reconciler.begin(now, merge.drain(), revision as u64 + 1);
            round(&mut reconciler, &mut maps, now, || chance.next() == Some(&0));
        }
        now += Duration::from_secs(3600);
        reconciler.begin(now, merge.drain(), events.len() as u64);
        round(&mut reconciler, &mut maps, now, || false);
        prop_assert_eq!(Maps::of(&merge.desired()), maps);
        let progress = reconciler.progress();
        prop_assert_eq!((progress.held, progress.applied), (0, events.len() as u64));
    }
}
