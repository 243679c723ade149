//! Which sources are expected and which are complete.

use super::*;
use isthmus_wire::config::{Capabilities, IsthmusCapabilities};
use isthmus_wire::keys::{self, SYNCED as CANARIES};
use proptest::prelude::*;

const MAX: MaxConnectedClusters = MaxConnectedClusters::C255;

fn name(name: &str) -> ClusterName {
    ClusterName::new(name).unwrap()
}

fn id(id: u32) -> ClusterId {
    ClusterId::new(id, MAX).unwrap()
}

fn config(id: u32, slices: bool) -> ClusterConfig {
    ClusterConfig {
        id,
        capabilities: Capabilities {
            synced_canaries: true,
            ..Capabilities::default()
        },
        isthmus: slices.then_some(IsthmusCapabilities { slices: 1 }),
    }
}

fn sources() -> Sources {
    Sources::new(name("c1"), id(1), MAX)
}

fn canary(cluster: &str, kind: Kind, scope: Scope) -> String {
    let key = keys::canary(&name(cluster), kind, scope).unwrap();
    key.strip_prefix(CANARIES).unwrap().to_owned()
}

fn followed(effects: &[Effect]) -> Vec<(Kind, Scope)> {
    effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Follow(source) => Some((source.kind, source.scope)),
            _ => None,
        })
        .collect()
}

#[test]
fn the_own_cluster_is_read_at_its_local_keys_and_remotes_at_the_mirror() {
    let mut sources = sources();
    assert_eq!(
        sources.on_config(&name("c1"), &config(1, true)),
        [Effect::Join(name("c1"), id(1))]
    );
    assert_eq!(
        followed(&sources.on_canary(&canary("c1", Kind::Slices, Scope::Local))),
        [(Kind::Slices, Scope::Local)]
    );
    // The exported slices' canary is for other clusters.
    assert!(
        sources
            .on_canary(&canary("c1", Kind::Slices, Scope::State))
            .is_empty()
    );
    assert!(
        sources
            .on_canary(&canary("c2", Kind::Nodes, Scope::Cache))
            .is_empty()
    );
    let effects = sources.on_config(&name("c2"), &config(2, false));
    assert_eq!(followed(&effects), [(Kind::Nodes, Scope::Cache)]);
}

#[test]
fn without_canaries_everything_is_followed_at_once() {
    let mut sources = sources();
    let mut old = config(2, false);
    old.capabilities.synced_canaries = false;
    let effects = sources.on_config(&name("c2"), &old);
    assert_eq!(followed(&effects).len(), 4);
}

#[test]
fn another_form_is_read_anew() {
    let mut sources = sources();
    sources.on_statuses_listed();
    for kind in Kind::ALL {
        sources.on_canary(&canary("c2", kind, Scope::Cache));
    }
    sources.on_config(&name("c2"), &config(2, false));
    let effects = sources.on_config(&name("c2"), &config(2, true));
    assert!(matches!(&effects[0], Effect::Unfollow(source) if source.kind == Kind::Services));
    assert_eq!(
        followed(&effects),
        [(Kind::Frames, Scope::Cache), (Kind::Slices, Scope::Cache)]
    );
    assert!(sources.on_config(&name("c2"), &config(2, true)).is_empty());
}

#[test]
fn bad_configs_change_nothing_but_the_status() {
    let mut sources = sources();
    for (cluster, config) in [
        ("c1", config(3, true)),
        ("c2", config(1, true)),
        ("c3", config(0, true)),
    ] {
        assert!(sources.on_config(&name(cluster), &config).is_empty());
        assert!(sources.refused().contains_key(&name(cluster)));
    }
    sources.on_config(&name("c2"), &config(2, true));
    assert!(sources.on_config(&name("c4"), &config(2, true)).is_empty());
    let why = sources.refused()[&name("c4")].to_string();
    assert!(why.contains("c2"), "{why}");
}

#[test]
fn a_removed_cluster_is_drained_and_the_own_one_is_not() {
    let mut sources = sources();
    sources.on_statuses_listed();
    sources.on_canary(&canary("c2", Kind::Nodes, Scope::Cache));
    sources.on_config(&name("c2"), &config(2, true));
    let effects = sources.on_config_gone(&name("c2"));
    assert_eq!(effects.last(), Some(&Effect::Drain(name("c2"), id(2))));
    assert!(followed(&sources.on_config(&name("c2"), &config(2, true))).is_empty());
    sources.on_config(&name("c1"), &config(1, true));
    assert!(sources.on_config_gone(&name("c1")).is_empty());
    assert!(sources.own().is_some());
}

#[test]
fn a_cluster_with_a_new_name_joins_when_the_old_one_is_gone() {
    let mut sources = sources();
    let (old, new) = (name("c2"), name("c3"));
    sources.on_config(&old, &config(2, true));
    sources.on_status(&old, 2);
    sources.on_statuses_listed();
    // The feeds of configs and statuses are not in step.
    assert_eq!(sources.on_config_gone(&old), []);
    assert_eq!(sources.on_config(&new, &config(2, true)), []);
    assert!(sources.refused().contains_key(&new));
    let effects = sources.on_status_gone(&old);
    let drained = effects
        .iter()
        .position(|effect| *effect == Effect::Drain(old.clone(), id(2)));
    let joined = effects
        .iter()
        .position(|effect| *effect == Effect::Join(new.clone(), id(2)));
    assert!(drained.is_some() && drained < joined, "{effects:?}");
    assert!(sources.refused().is_empty());
    // The same when the holder changes its ID.
    assert_eq!(sources.on_config(&old, &config(2, true)), []);
    let effects = sources.on_config(&new, &config(4, true));
    assert!(effects.contains(&Effect::Join(old, id(2))), "{effects:?}");
}

#[test]
fn a_cluster_that_is_still_mirrored_stays_without_its_config() {
    let mut sources = sources();
    sources.on_config(&name("c1"), &config(1, true));
    sources.on_config(&name("c2"), &config(2, true));
    sources.on_status(&name("c2"), 2);
    sources.on_configs_listed();
    assert_eq!(sources.all_ids(), None);
    assert!(sources.on_statuses_listed().is_empty());
    assert_eq!(sources.all_ids(), Some([id(1), id(2)].into()));
    // The API server begins anew: configs are listed before it reached c2.
    assert!(sources.on_config_gone(&name("c2")).is_empty());
    assert!(sources.is_config_gone(&name("c2")));
    assert!(sources.on_config(&name("c2"), &config(2, true)).is_empty());
    assert!(sources.on_config_gone(&name("c2")).is_empty());
    let effects = sources.on_status_gone(&name("c2"));
    assert_eq!(effects.last(), Some(&Effect::Drain(name("c2"), id(2))));
    // One that never told its ID: what was restored of others may be its.
    sources.on_status(&name("c3"), 0);
    assert_eq!(sources.all_ids(), None);
    sources.on_status(&name("c3"), 3);
    assert_eq!(sources.all_ids(), Some([id(1), id(3)].into()));
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Config(u8, bool),
    Gone(u8),
    Canary(u8, usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1u8..4, any::<bool>()).prop_map(|(cluster, slices)| Step::Config(cluster, slices)),
        (1u8..4).prop_map(Step::Gone),
        (1u8..4, 0usize..6).prop_map(|(cluster, kind)| Step::Canary(cluster, kind)),
    ]
}

fn apply(sources: &mut Sources, step: Step) -> Vec<Effect> {
    match step {
        Step::Config(cluster, slices) => {
            sources.on_config(&name(&format!("c{cluster}")), &config(cluster.into(), slices))
        }
        Step::Gone(cluster) => sources.on_config_gone(&name(&format!("c{cluster}"))),
        Step::Canary(cluster, kind) => {
            let scope = if cluster != 1 {
                Scope::Cache
            } else {
                scope_of(Kind::ALL[kind], Scope::State)
            };
            sources.on_canary(&canary(&format!("c{cluster}"), Kind::ALL[kind], scope))
        }
    }
}

proptest! {
    /// Whatever happens: follow and unfollow alternate, a drained cluster has nothing followed, and what is
    /// followed in the end is what is wanted and has its canary.
    #[test]
    fn effects_are_consistent(steps in proptest::collection::vec(step(), 0..60)) {
        let mut sources = sources();
        sources.on_statuses_listed();
        let mut open = BTreeSet::new();
        for step in steps {
            for effect in apply(&mut sources, step) {
                match effect {
                    Effect::Follow(source) => prop_assert!(open.insert(source)),
                    Effect::Unfollow(source) => prop_assert!(open.remove(&source)),
                    Effect::Drain(cluster, _) => {
                        prop_assert!(open.iter().all(|source| source.cluster != cluster));
                    }
                    Effect::Join(..) | Effect::Reread(..) => {}
                }
            }
            for (cluster, state) in sources.clusters() {
                for (kind, scope) in state.wanted() {
                    let follows = open.contains(&source(cluster, state, kind));
                    prop_assert_eq!(follows, sources.canaries.contains(&(cluster.clone(), kind, scope)), "{:?}", kind);
                }
            }
        }
    }

    /// The order in which configs and canaries arrive does not matter.
    #[test]
    fn order_of_arrival_does_not_matter(order in Just((0..21usize).collect::<Vec<_>>()).prop_shuffle()) {
        let mut sources = sources();
        let mut open = BTreeSet::new();
        for number in order {
            let cluster = (number % 3 + 1) as u8;
            let step = match number / 3 {
                6 => Step::Config(cluster, true),
                kind => Step::Canary(cluster, kind),
            };
            for effect in apply(&mut sources, step) {
                if let Effect::Follow(source) = effect {
                    open.insert(source);
                }
            }
        }
        prop_assert_eq!(open.len(), 3 * 5);
    }

    #[test]
    fn hostile_canaries_never_panic(suffix in ".{0,80}") {
        sources().on_canary(&suffix);
    }
}
