//! Ranges over several sources and revisions against whole copies, and how much is looked at for each.

use std::time::Duration;

use isthmus_model::ClusterName;
use isthmus_proto::mvccpb::KeyValue;
use isthmus_wire::keys::Kind;
use proptest::prelude::*;

use super::*;
use crate::store::{HistoryLimits, Relist, SourceChange};

const LIMITS: HistoryLimits = HistoryLimits {
    len: usize::MAX,
    bytes: usize::MAX,
    age: Duration::MAX,
};
const OWN: Route = Route::Sub(SubId::Own);

fn name(name: &str) -> ClusterName {
    ClusterName::new(name).unwrap()
}

fn put(key: &str, revision: i64) -> SourceChange {
    SourceChange::Put {
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: revision.to_string().into(),
        create_revision: revision,
        mod_revision: revision,
        version: 1,
    }
}

fn delete(key: &str, revision: i64) -> SourceChange {
    SourceChange::Delete {
        key: Bytes::copy_from_slice(key.as_bytes()),
        mod_revision: revision,
    }
}

/// Three sources whose keys lie between each other, and this server's own keys.
fn sources() -> [(SubId, &'static str); 3] {
    [
        (SubId::Own, "cilium/state/x/"),
        (
            SubId::Remote(name("c2"), Kind::Nodes),
            "cilium/cache/nodes/v1/c2/",
        ),
        (
            SubId::Remote(name("c3"), Kind::Nodes),
            "cilium/cache/nodes/v1/c3/",
        ),
    ]
}

fn store(keys: &[&str]) -> Store {
    let mut store = Store::new(name("c1"), 5, LIMITS, LIMITS);
    for (at, (id, prefix)) in sources().into_iter().enumerate() {
        store.add_sub(id.clone());
        let list = Relist {
            cluster_id: at as u64 + 1,
            revision: 1,
            new_history: false,
            changes: keys.iter().map(|key| put(&format!("{prefix}{key}"), 1)).collect(),
            present: None,
        };
        store.relist(&id, list);
    }
    store
}

fn everything() -> RangeRequest {
    RangeRequest {
        key: b"\0"[..].into(),
        range_end: b"\0"[..].into(),
        ..Default::default()
    }
}

/// Keys from `key` on, up to `end`.
fn between(all: &[KeyValue], key: &[u8], end: &[u8]) -> Vec<KeyValue> {
    let inside = |kv: &&KeyValue| kv.key[..] >= *key && (end == b"\0" || kv.key[..] < *end);
    all.iter().filter(inside).cloned().collect()
}

proptest! {
    #[test]
    fn every_revision_of_every_view_reads_as_it_was_in_any_pages(
        steps in proptest::collection::vec((0usize..5, 0usize..4, any::<bool>()), 0..24),
        limit in 1i64..6,
        key in prop_oneof![Just("\0"), Just("cilium/cache/nodes/v1/c2/b"), Just("cilium/state/x/b")],
        end in prop_oneof![Just("\0"), Just("cilium/state/x/c"), Just("z")],
    ) {
        let keys = ["a", "b", "b/c", "d"];
        let mut store = store(&keys[..2]);
        let routes: Vec<Route> = sources().into_iter().map(|(id, _)| Route::Sub(id)).chain([Route::Merged]).collect();
        // What there was at each revision that was reached.
        let mut seen: Vec<BTreeMap<i64, Vec<KeyValue>>> = vec![BTreeMap::new(); routes.len()];
        let look = |store: &Store, seen: &mut Vec<BTreeMap<i64, Vec<KeyValue>>>| {
            for (route, seen) in routes.iter().zip(seen) {
                let answer = store.range(route, &everything()).unwrap();
                seen.insert(answer.header.unwrap().revision, answer.kvs);
            }
        };
        look(&store, &mut seen);
        for (step, (source, key, puts)) in steps.into_iter().enumerate() {
            let at = step as i64 + 2;
            let key = keys[key];
            match sources().get(source) {
                Some((id, prefix)) => {
                    let key = format!("{prefix}{key}");
                    let change = if puts { put(&key, at) } else { delete(&key, at) };
                    store.apply(id, at, vec![change]);
                }
                None if source == 3 => {
                    let key = format!("cilium/synced/c2/{key}");
                    if puts {
                        store.put_local(key.into(), at.to_string().into());
                    } else {
                        store.delete_local(key.as_bytes());
                    }
                }
                // A source goes and comes back.
                None => {
                    let (id, _) = &sources()[1];
                    if puts && store.status(id).is_some() {
                        store.remove_sub(id);
                    } else {
                        store.add_sub(id.clone());
                    }
                    seen[1].clear();
                }
            }
            look(&store, &mut seen);
        }
        for (route, seen) in routes.iter().zip(&seen) {
            // One for all, and one for each.
            let mut view = store.view(route);
            for (revision, all) in seen {
                let want = between(all, key.as_bytes(), end.as_bytes());
                let mut pages = vec![];
                let mut page = RangeRequest {
                    key: key.as_bytes().into(), range_end: end.as_bytes().into(), revision: *revision, limit, ..Default::default()
                };
                loop {
                    let mut budget = Budget::unlimited();
                    let answer = store.range_within(route, &page, &mut budget).unwrap();
                    prop_assert_eq!(&view.range(&page, &mut Budget::unlimited()), &Ok(answer.clone()));
                    let rest = want.len() - pages.len();
                    prop_assert_eq!(answer.count as usize, rest, "{:?} at {}", route, revision);
                    // A page and the next key, and history twice: on the way back, and where it lies in the range.
                    prop_assert!(budget.looked() <= answer.kvs.len() + 1 + 2 * 26 / 4 + 1);
                    let Some(last) = answer.kvs.last() else { break };
                    page.key = [&last.key[..], &[0]].concat().into();
                    pages.extend(answer.kvs);
                    if !answer.more { break }
                }
                prop_assert_eq!(pages, want);
            }
        }
    }
}

/// A store of 1,000 keys of the own cluster, and 400 changes of one of them since.
fn grown() -> Store {
    let keys: Vec<String> = (0..1000).map(|at| format!("{at:03}")).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    let mut store = store(&keys);
    for at in 2..402 {
        store.apply(&SubId::Own, at, vec![put("cilium/state/x/500", at)]);
    }
    store
}

fn own(change: impl FnOnce(&mut RangeRequest)) -> RangeRequest {
    let mut request = RangeRequest {
        key: "cilium/state/x/".into(),
        range_end: "cilium/state/x0".into(),
        ..Default::default()
    };
    change(&mut request);
    request
}

fn looked(store: &Store, route: &Route, request: &RangeRequest) -> usize {
    let mut budget = Budget::unlimited();
    store.range_within(route, request, &mut budget).unwrap();
    budget.looked()
}

#[test]
fn what_is_looked_at_counts_and_not_what_is_answered() {
    let store = grown();
    let look = |change: &dyn Fn(&mut RangeRequest)| looked(&store, &OWN, &own(change));
    assert_eq!(look(&|_| ()), 1000);
    assert_eq!(look(&|request| request.limit = 10), 11);
    // Keys are counted without a look at them.
    assert_eq!(look(&|request| request.count_only = true), 0);
    // One key is answered to each of these.
    assert_eq!(look(&|request| request.min_mod_revision = 401), 1000);
    let newest = |request: &mut RangeRequest| {
        (request.limit, request.sort_order, request.sort_target) = (1, 2, 3);
    };
    assert_eq!(look(&newest), 1000);
    // On the way back there are 400 changes, and one changed key.
    assert_eq!(
        look(&|request| (request.limit, request.revision) = (1, 1)),
        2 + 401usize.div_ceil(4)
    );
    // A page is pinned 40 changes ago.
    assert_eq!(
        look(&|request| (request.limit, request.revision) = (100, 361)),
        101 + 41usize.div_ceil(4)
    );
    // Several sources are looked into no further than one.
    let page = RangeRequest {
        limit: 10,
        ..everything()
    };
    assert_eq!(looked(&store, &Route::Merged, &page), 11);
}

#[test]
fn the_way_back_is_gone_once_for_all_ranges_of_a_request() {
    let store = grown();
    let (mut view, mut budget) = (store.view(&OWN), Budget::unlimited());
    for _ in 0..100 {
        let answer = view.range(
            &own(|request| (request.limit, request.revision) = (1, 1)),
            &mut budget,
        );
        assert_eq!(answer.unwrap().kvs.len(), 1);
    }
    // 400 changes once; the changed key and two others each time.
    assert_eq!(budget.looked(), (400 + 100 * (1 + 2 * 4)) / 4);
}

#[test]
fn a_look_ends_where_the_budget_does() {
    let store = grown();
    for request in [
        own(|_| ()),
        own(|request| request.min_mod_revision = 401),
        own(|request| (request.limit, request.revision) = (1, 1)),
    ] {
        let mut budget = Budget::new(50, usize::MAX);
        let answer = store.range_within(&OWN, &request, &mut budget);
        assert_eq!((answer, budget.looked()), (Err(RangeError::TooLarge), 50));
    }
    let mut budget = Budget::new(50, 100);
    assert_eq!(budget.answer(60), Ok(()));
    assert_eq!(budget.answer(60), Err(RangeError::TooLarge));
}
