//! Revisions, end to end, simulated: an etcd, two API servers of its cluster, two of another cluster that mirror the first two,
//! and readers of all of them, under random schedules. Store, ingest and followers are the real ones; the network, etcd and
//! a model of Cilium's client are written here.
//!
//! The network delays, drops connections and reorders between calls and streams, not within a stream. Servers begin anew with
//! nothing, readers change replicas, histories are short and compacted, the etcd is replaced. After each step a reader that
//! claims a revision must hold that revision's content, and have been told exactly the events that lead there: none lost, none
//! twice, in order. When the network is kind in the end, all must converge.
//!
//! `ISTHMUS_SIMULATOR_SEED=<schedule>` runs one schedule of each mood and prints what arrives where.
//!
//! A check that cannot fail proves nothing: [`Fault`] breaks the servers and clients in ways that mistakes would, and each must
//! be found.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on has failed"
)]

mod cilium;
mod engine;
mod etcd;
mod link;
mod mood;
mod replica;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

use mood::{Fault, Figures, Mood};
use world::World;

/// Schedules of a test; `ISTHMUS_SIMULATOR_SCHEDULES` for more.
fn schedules(default: u64) -> u64 {
    let set = std::env::var("ISTHMUS_SIMULATOR_SCHEDULES").ok();
    set.and_then(|number| number.parse().ok()).unwrap_or(default)
}

/// Schedules from 0 on, or the one that is asked for.
fn seeds(default: u64) -> std::ops::Range<u64> {
    match one() {
        Some(seed) => seed..seed + 1,
        None => 0..schedules(default),
    }
}

fn one() -> Option<u64> {
    std::env::var("ISTHMUS_SIMULATOR_SEED").ok()?.parse().ok()
}

/// The first seed at which it goes wrong, and how, and what was done until then.
fn run(mood: Mood, fault: Fault, seeds: impl Iterator<Item = u64>) -> (Option<(u64, String)>, Figures) {
    let mut figures = Figures::default();
    for seed in seeds {
        let mut world = World::new(seed, mood, fault);
        world.trace = one().is_some() && fault == Fault::None;
        let result = catch_unwind(AssertUnwindSafe(|| world.run()));
        figures.add(&world.figures);
        if let Err(panic) = result {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            return (Some((seed, text.unwrap_or_default())), figures);
        }
    }
    (None, figures)
}

#[test]
fn no_reader_is_told_anything_but_what_happened_and_all_converge() {
    let (found, figures) = run(Mood::Wild, Fault::None, seeds(3000));
    println!("wild: {figures}");
    assert_eq!(found, None, "run this seed alone to see more");
    assert!(
        figures.schedules < 1000
            || figures.exact > 10_000 && figures.held > 50 && figures.resumed_below_list > 50,
        "{figures}"
    );
}

#[test]
fn nobody_lists_again_while_there_is_history_whoever_restarts() {
    let (found, figures) = run(Mood::Calm, Fault::None, seeds(1500));
    println!("calm: {figures}");
    assert_eq!(found, None, "run this seed alone to see more");
    assert!(
        figures.schedules < 1000 || figures.restarts > 1000 && figures.resumed_below_list > 50,
        "{figures}"
    );
}

#[test]
fn long_histories_come_in_several_messages() {
    let (found, figures) = run(Mood::Long, Fault::None, seeds(60));
    println!("long: {figures}");
    assert_eq!(found, None, "run this seed alone to see more");
}

#[test]
fn every_fault_is_found() {
    let mut missed = vec![];
    for (fault, mood) in Fault::ALL {
        let (found, figures) = run(mood, fault, 0..6000);
        match found {
            Some((seed, text)) => {
                let first = text.lines().next().unwrap_or_default().to_owned();
                println!("{fault:?}: schedule {seed}, {figures}: {first}");
            }
            None => missed.push(fault),
        }
    }
    assert_eq!(missed, [], "nothing noticed these faults");
}
