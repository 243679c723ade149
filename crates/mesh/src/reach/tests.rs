//! The judge against a simulated network and clock: every shape of a partition, flapping, and random histories.

use isthmus_model::MaxConnectedClusters;
use proptest::prelude::*;

use super::*;

const STEP: Duration = Duration::from_millis(250);

fn c2() -> ClusterId {
    ClusterId::new(2, MaxConnectedClusters::C255).unwrap()
}

/// A cluster that is asked once a step, with a round trip of a step.
struct World {
    reach: Reach,
    now: Duration,
    data: Data,
    /// The state reaches us.
    control: bool,
    /// Probes get there; answers get back.
    there: bool,
    back: bool,
    changes: Vec<(Duration, bool)>,
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            reach: Reach::new(ReachConfig::default(), 7),
            now: Duration::from_secs(100),
            data: Data {
                speaks: true,
                ..Data::default()
            },
            control: true,
            there: true,
            back: true,
            changes: vec![],
        };
        world.run(Duration::from_secs(10));
        assert_eq!(world.changes, []);
        world
    }

    fn step(&mut self) {
        self.now += STEP;
        self.data.asked_at.get_or_insert(self.now);
        if self.there && self.back {
            self.data.answered_at = Some(self.now);
            self.data.unanswered = 0;
        } else {
            self.data.unanswered += 1;
        }
        let control = if self.control {
            Control::Fresh
        } else {
            Control::Stale
        };
        if let Some(change) = self.reach.observe(self.now, c2(), control, self.data) {
            assert_eq!(change.cluster, c2());
            self.changes.push((self.now, change.healthy));
        }
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.step();
        }
    }

    fn judgement(&self) -> Judgement {
        self.reach.judgements().next().unwrap().1
    }

    fn expect(&self, verdict: Verdict, reason: Reason) {
        let judgement = self.judgement();
        assert_eq!((judgement.verdict, judgement.reason), (verdict, reason));
    }
}

#[test]
fn a_partition_of_both_planes_takes_backends_out_within_three_seconds() {
    let mut world = World::new();
    let cut = world.now;
    (world.control, world.there, world.back) = (false, false, false);
    world.run(Duration::from_secs(60));
    let (at, healthy) = world.changes[0];
    assert!(!healthy && at - cut <= Duration::from_secs(3), "{:?}", at - cut);
    world.expect(Verdict::Unreachable, Reason::Both);
    assert_eq!(world.judgement().since, at);
    assert_eq!(world.changes.len(), 1);
}

#[test]
fn a_lost_control_plane_alone_changes_nothing_but_the_verdict() {
    let mut world = World::new();
    world.control = false;
    world.run(Duration::from_secs(3600));
    assert_eq!(world.changes, []);
    world.expect(Verdict::Suspect, Reason::ControlOnly);
    world.control = true;
    world.run(STEP);
    world.expect(Verdict::Reachable, Reason::Well);
}

#[test]
fn a_lost_data_plane_takes_backends_out_though_the_state_is_fresh() {
    let mut world = World::new();
    let cut = world.now;
    (world.there, world.back) = (false, false);
    world.run(Duration::from_secs(2));
    world.expect(Verdict::Suspect, Reason::Quiet);
    world.run(Duration::from_secs(10));
    world.expect(Verdict::Unreachable, Reason::DataOnly);
    assert!(world.changes[0].0 - cut <= Duration::from_secs(3));
}

#[test]
fn a_way_in_one_direction_is_no_way() {
    for (there, back) in [(true, false), (false, true)] {
        let mut world = World::new();
        let cut = world.now;
        (world.there, world.back) = (there, back);
        world.run(Duration::from_secs(10));
        world.expect(Verdict::Unreachable, Reason::DataOnly);
        assert!(world.changes[0].0 - cut <= Duration::from_secs(3));
    }
}

#[test]
fn backends_return_within_two_seconds_and_later_each_time_they_fail_again() {
    let mut world = World::new();
    let mut holds = vec![];
    for _ in 0..9 {
        world.there = false;
        world.run(Duration::from_secs(5));
        world.there = true;
        let healed = world.now;
        let before = world.changes.len();
        while world.changes.len() == before {
            world.step();
            if world.judgement().verdict == Verdict::Unreachable {
                world.expect(Verdict::Unreachable, Reason::Returning);
            }
        }
        holds.push(world.now - healed);
    }
    assert!(holds[0] <= Duration::from_secs(2), "{holds:?}");
    assert!(holds[0] < holds[2] && holds[2] < holds[4], "{holds:?}");
    assert!(
        holds.iter().all(|hold| *hold <= Duration::from_secs(62)),
        "{holds:?}"
    );
    // After a quiet time it is trusted again.
    world.run(Duration::from_secs(600));
    world.there = false;
    world.run(Duration::from_secs(5));
    world.there = true;
    let healed = world.now;
    world.run(Duration::from_secs(3));
    assert!(
        world
            .changes
            .last()
            .is_some_and(|(at, healthy)| *healthy && *at - healed <= Duration::from_secs(2))
    );
}

#[test]
fn answers_that_come_and_go_do_not_bring_it_back() {
    let mut world = World::new();
    world.there = false;
    world.run(Duration::from_secs(5));
    for _ in 0..20 {
        world.there = true;
        world.run(STEP * 2);
        world.there = false;
        world.run(Duration::from_secs(2));
    }
    assert_eq!(world.changes.len(), 1, "{:?}", world.changes);
}

#[test]
fn silence_of_nodes_that_never_spoke_means_nothing() {
    let mut world = World::new();
    world.data = Data {
        speaks: false,
        ..Data::default()
    };
    (world.there, world.control) = (false, true);
    world.run(Duration::from_secs(60));
    world.expect(Verdict::Reachable, Reason::Well);
    world.control = false;
    world.run(Duration::from_secs(60));
    world.expect(Verdict::Suspect, Reason::ControlBlind);
    assert_eq!(world.changes, []);
}

#[test]
fn a_cluster_that_was_never_heard_gets_twice_the_time() {
    let mut world = World::new();
    world.reach.retain(|_| false);
    world.data = Data {
        speaks: true,
        ..Data::default()
    };
    world.there = false;
    let began = world.now;
    world.run(Duration::from_secs(10));
    let (at, healthy) = world.changes[0];
    assert!(!healthy);
    assert!(at - began > Duration::from_secs(5) && at - began <= Duration::from_secs(6));
}

#[test]
fn a_cluster_that_leaves_the_mesh_is_forgotten() {
    let mut world = World::new();
    world.reach.retain(|cluster| cluster != c2());
    assert_eq!(world.reach.judgements().count(), 0);
}

#[test]
fn nodes_do_not_return_all_at_once() {
    let most = ReachConfig::default().jitter_max;
    let times: std::collections::BTreeSet<_> = (0..100)
        .map(|seed| jitter(seed, c2(), Some(Duration::from_secs(1)), most))
        .collect();
    assert!(times.len() > 90 && times.iter().all(|time| *time <= most));
}

proptest! {
    #[test]
    fn only_lasting_silence_takes_a_cluster_out(
        history in proptest::collection::vec((any::<bool>(), any::<bool>(), 1u32..40), 1..30),
    ) {
        let mut world = World::new();
        for (control, there, steps) in history {
            (world.control, world.there) = (control, there);
            for _ in 0..steps {
                let out_before = world.judgement().verdict == Verdict::Unreachable;
                let changes = world.changes.len();
                world.step();
                let out = world.judgement().verdict == Verdict::Unreachable;
                prop_assert_eq!(world.changes.len() - changes, usize::from(out != out_before));
                let silent = world.now - world.data.answered_at.unwrap();
                if out && !out_before {
                    prop_assert!(silent >= Duration::from_millis(2500) && world.data.unanswered >= UNANSWERED_MIN);
                }
                if !out {
                    prop_assert!(silent < Duration::from_millis(2500));
                }
            }
        }
        // Whatever was before: answers bring it back.
        (world.there, world.back) = (true, true);
        world.run(Duration::from_secs(62));
        prop_assert!(world.judgement().verdict != Verdict::Unreachable);
    }
}
