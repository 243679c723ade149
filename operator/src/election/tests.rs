//! Leader election: never two leaders, whatever the clocks and lost answers.

use proptest::prelude::*;

use super::*;

const TIMING: Timing = Timing {
    lease_duration: Duration::from_secs(15),
    renew_deadline: Duration::from_secs(10),
    retry_period: Duration::from_secs(2),
};

const fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn wall(seconds: u64) -> Timestamp {
    Timestamp::from_second(seconds as i64).unwrap()
}

fn v(version: u32) -> String {
    version.to_string()
}

fn candidate(name: &str) -> Election {
    Election::new(name.to_owned(), TIMING)
}

#[test]
fn a_missing_or_released_lease_is_taken_at_once() {
    let mut a = candidate("a");
    let record = a.on_read(at(0), wall(0), None).unwrap();
    assert_eq!((record.holder.as_str(), record.transitions), ("a", 0));
    a.on_written(at(0), record, v(1));
    assert_eq!(a.role(at(9)), Role::Leading);
    let released = a.release(at(9), wall(9)).unwrap();
    assert_eq!(a.role(at(9)), Role::Unknown);
    let taken = candidate("b")
        .on_read(at(9), wall(9), Some((released, v(2))))
        .unwrap();
    assert_eq!((taken.holder.as_str(), taken.transitions), ("b", 1));
}

#[test]
fn leadership_ends_by_itself_before_another_may_take_over() {
    let (mut a, mut b) = (candidate("a"), candidate("b"));
    let record = a.on_read(at(0), wall(0), None).unwrap();
    a.on_written(at(0), record.clone(), v(1));
    assert_eq!(b.on_read(at(1), wall(1), Some((record.clone(), v(1)))), None);
    assert_eq!(b.role(at(1)), Role::Following { holder: "a".into() });
    assert_eq!(a.role(at(10)), Role::Unknown);
    assert_eq!(b.on_read(at(15), wall(15), Some((record.clone(), v(1)))), None);
    assert_eq!(
        b.on_read(at(16), wall(16), Some((record, v(1)))).unwrap().holder,
        "b"
    );
    assert_eq!(b.role(at(16)), Role::Unknown, "not before it is written");
}

#[test]
fn a_restarted_holder_of_the_same_name_goes_on() {
    let mut a = candidate("a");
    let record = Record {
        holder: "a".into(),
        duration: at(15),
        acquired: Some(wall(3)),
        renewed: Some(wall(4)),
        transitions: 7,
    };
    let renewed = a.on_read(at(0), wall(50), Some((record, v(1)))).unwrap();
    assert_eq!((renewed.acquired, renewed.transitions), (Some(wall(3)), 7));
}

#[test]
fn a_lease_that_was_taken_away_ends_leadership() {
    let mut a = candidate("a");
    let record = a.on_read(at(0), wall(0), None).unwrap();
    a.on_written(at(0), record.clone(), v(1));
    let stolen = Record {
        holder: "b".into(),
        ..record
    };
    assert_eq!(a.on_read(at(2), wall(2), Some((stolen, v(2)))), None);
    assert_eq!(a.role(at(2)), Role::Following { holder: "b".into() });
    assert_eq!(a.release(at(2), wall(2)), None);
}

proptest! {
    /// Candidates read and write one Lease in any order, with writes that take time or get lost, and wall clocks that are wrong.
    #[test]
    fn never_two_leaders(steps in proptest::collection::vec((0usize..3, 0u64..4, 0u8..4, -1000i64..1000), 1..200)) {
        let mut candidates = ["a", "b", "c"].map(candidate);
        let mut lease: Option<(Record, u32)> = None;
        let mut now = 0;
        for (who, delay, fate, skew) in steps {
            now += delay;
            let clock = Timestamp::from_second(1_000_000 + now as i64 + skew).unwrap();
            let version = lease.as_ref().map(|(_, version)| *version);
            let started = at(now);
            let seen = lease.as_ref().map(|(record, version)| (record.clone(), v(*version)));
            let step = candidates[who].on_read(at(now), clock, seen);
            if let Some(record) = step && fate > 0 {
                // 1: applied, but the answer is lost. 2: the answer is late.
                let written = version.unwrap_or(0) + 1;
                lease = Some((record.clone(), written));
                if fate == 2 {
                    now += 3;
                }
                if fate > 1 {
                    candidates[who].on_written(started, record, v(written));
                }
            }
            let leaders = candidates.iter().filter(|c| c.role(at(now)) == Role::Leading).count();
            prop_assert!(leaders <= 1, "{leaders} at {now}");
        }
    }
}
