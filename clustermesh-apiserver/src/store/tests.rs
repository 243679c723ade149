//! The store against a plain model: every revision's whole content kept, every event kept.

use std::{collections::BTreeMap, time::Duration};

use isthmus_proto::{
    etcdserverpb::{
        RangeRequest, WatchResponse,
        range_request::{SortOrder, SortTarget},
    },
    mvccpb::{Event, KeyValue, event::EventType},
};
use isthmus_tls::rights::KeyRange;
use isthmus_wire::keys::{Kind, range_end};
use proptest::prelude::*;
use prost::Message;

use super::*;

const ID: u64 = 77;
const KEYS: [&str; 4] = [
    "cilium/state/a",
    "cilium/state/a/b",
    "cilium/state/b",
    "isthmus/state/c",
];
const PREFIXES: [&str; 4] = [
    "cilium/state/",
    "cilium/state/a",
    "isthmus/state/",
    "cilium/state/a/b",
];

fn own() -> ClusterName {
    ClusterName::new("c1").unwrap()
}

fn store(limits: HistoryLimits) -> Store {
    Store::new(own(), 5, limits, limits)
}

/// What etcd would hold: content and events by revision.
#[derive(Default)]
struct Model {
    revision: i64,
    contents: BTreeMap<i64, BTreeMap<&'static str, KeyValue>>,
    events: Vec<(i64, Vec<Event>)>,
}

impl Model {
    fn transact(&mut self, ops: &BTreeMap<usize, Option<u8>>) -> Vec<SourceChange> {
        let mut content = self.contents.get(&self.revision).cloned().unwrap_or_default();
        let revision = self.revision + 1;
        let (mut changes, mut events) = (vec![], vec![]);
        for (key, value) in ops {
            let key = KEYS[*key];
            let before = content.get(key).cloned();
            let (kind, kv) = match (value, &before) {
                (Some(value), _) => {
                    let kv = KeyValue {
                        key: key.into(),
                        value: vec![*value].into(),
                        create_revision: before.as_ref().map_or(revision, |kv| kv.create_revision),
                        mod_revision: revision,
                        version: before.as_ref().map_or(1, |kv| kv.version + 1),
                        lease: 0,
                    };
                    content.insert(key, kv.clone());
                    (EventType::Put, kv)
                }
                (None, Some(_)) => {
                    content.remove(key);
                    (
                        EventType::Delete,
                        KeyValue {
                            key: key.into(),
                            mod_revision: revision,
                            ..Default::default()
                        },
                    )
                }
                (None, None) => continue,
            };
            changes.push(change(kind, &kv));
            events.push(Event {
                r#type: kind as i32,
                kv: Some(kv),
                prev_kv: before,
            });
        }
        if !events.is_empty() {
            self.revision = revision;
            self.contents.insert(revision, content);
            self.events.push((revision, events));
        }
        changes
    }

    fn range(&self, revision: i64, prefix: &str) -> Vec<KeyValue> {
        let content = self
            .contents
            .range(..=revision)
            .next_back()
            .map(|(_, content)| content);
        content
            .into_iter()
            .flatten()
            .filter(|(key, _)| key.starts_with(prefix))
            .map(|(_, kv)| kv.clone())
            .collect()
    }
}

fn change(kind: EventType, kv: &KeyValue) -> SourceChange {
    match kind {
        EventType::Put => SourceChange::Put {
            key: kv.key.clone(),
            value: kv.value.clone(),
            create_revision: kv.create_revision,
            mod_revision: kv.mod_revision,
            version: kv.version,
        },
        EventType::Delete => SourceChange::Delete {
            key: kv.key.clone(),
            mod_revision: kv.mod_revision,
        },
    }
}

fn request(prefix: &str) -> RangeRequest {
    RangeRequest {
        key: Bytes::copy_from_slice(prefix.as_bytes()),
        range_end: range_end(prefix.as_bytes()).into(),
        ..Default::default()
    }
}

fn route(store: &Store, prefix: &str) -> Route {
    store.route(&KeyRange::prefix(prefix))
}

fn start(prefix: &str, start_revision: i64) -> WatchStart {
    WatchStart {
        range: KeyRange::prefix(prefix),
        start_revision,
        no_put: false,
        no_delete: false,
        prev_kv: false,
    }
}

fn decode(events: Vec<Bytes>) -> Vec<Event> {
    WatchResponse::decode(&events.concat()[..]).unwrap().events
}

fn ops() -> impl Strategy<Value = BTreeMap<usize, Option<u8>>> {
    let value = prop_oneof![3 => (0u8..4).prop_map(Some), 1 => Just(None)];
    proptest::collection::btree_map(0..KEYS.len(), value, 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn ranges_and_watches_agree_with_the_model(
        history in proptest::collection::vec(ops(), 1..20),
        listed in 0usize..20,
        len in 1usize..30,
        limit in 1i64..4,
        prefix in 0..PREFIXES.len(),
    ) {
        let prefix = PREFIXES[prefix];
        let mut model = Model { revision: 100, ..Default::default() };
        let mut store = store(HistoryLimits { len, bytes: usize::MAX, age: Duration::MAX });
        let listed = listed.min(history.len());
        for ops in &history[..listed] {
            model.transact(ops);
        }
        let all = model.range(i64::MAX, "");
        store.relist(&SubId::Own, Relist {
            cluster_id: ID, revision: model.revision, new_history: true,
            changes: all.iter().map(|kv| change(EventType::Put, kv)).collect(), present: None,
        });
        let listed_at = model.revision;
        // One watch lives through everything.
        let (mut live, header) = store.watch(start(prefix, 0));
        prop_assert_eq!((header.cluster_id, header.revision), (ID, listed_at));
        let mut seen = vec![];
        for ops in &history[listed..] {
            let changes = model.transact(ops);
            store.apply(&SubId::Own, model.revision, changes);
            while let Some(Next::Events { events, header, .. }) = store.next(&mut live) {
                let events = decode(events);
                prop_assert_eq!(events.last().unwrap().kv.as_ref().unwrap().mod_revision, header.revision);
                seen.extend(events);
            }
        }
        let wanted = |from: i64| -> Vec<Event> {
            let events = model.events.iter().filter(|(revision, _)| *revision >= from).flat_map(|(_, events)| events);
            let inside = events.filter(|event| event.kv.as_ref().unwrap().key.starts_with(prefix.as_bytes()));
            inside.cloned().map(|event| Event { prev_kv: None, ..event }).collect()
        };
        prop_assert_eq!(&seen, &wanted(listed_at + 1));

        // Every revision that is kept reads as it was; every other is refused.
        let route = route(&store, prefix);
        let changed: Vec<i64> = model.events.iter().map(|(revision, _)| *revision).filter(|revision| *revision > listed_at).collect();
        let floor = if changed.len() > len { changed[changed.len() - len - 1] } else { listed_at };
        for revision in 99..=model.revision + 1 {
            let answer = store.range(&route, &RangeRequest { revision, ..request(prefix) });
            let (_, next) = {
                let (mut cursor, header) = store.watch(start(prefix, revision));
                (header, store.next(&mut cursor))
            };
            if revision > model.revision {
                prop_assert_eq!(answer, Err(RangeError::Future));
                prop_assert!(next.is_none());
                continue;
            }
            if revision < floor {
                prop_assert_eq!(answer, Err(RangeError::Compacted));
            } else {
                let answer = answer.unwrap();
                prop_assert_eq!(answer.header.unwrap().revision, revision);
                prop_assert_eq!(&answer.kvs, &model.range(revision, prefix));
            }
            match next {
                Some(Next::Compacted { compact_revision, .. }) => {
                    prop_assert!(revision <= floor);
                    prop_assert_eq!(compact_revision, floor + 1);
                }
                Some(Next::Events { events, .. }) => prop_assert_eq!(decode(events), wanted(revision)),
                None => prop_assert!(wanted(revision).is_empty() && revision > floor),
            }
        }

        // Pages, pinned to the first one's revision, make up the whole.
        let mut pages = vec![];
        let mut page = RangeRequest { limit, ..request(prefix) };
        loop {
            let answer = store.range(&route, &page).unwrap();
            let rest = model.range(i64::MAX, prefix).into_iter().filter(|kv| kv.key >= page.key).count();
            prop_assert_eq!(answer.count as usize, rest);
            let Some(last) = answer.kvs.last() else { break };
            let mut next = last.key.to_vec();
            next.push(0);
            page.key = next.into();
            page.revision = answer.header.as_ref().unwrap().revision;
            let more = answer.more;
            pages.extend(answer.kvs);
            if !more { break }
        }
        prop_assert_eq!(pages, model.range(i64::MAX, prefix));
    }

    #[test]
    fn a_list_that_missed_something_ends_watches_and_history_leads_on_who_is_in_it(
        before in ops(),
        lost in proptest::collection::vec(ops(), 0..6),
        after in ops(),
        from in 0i64..8,
        forgotten in proptest::bool::weighted(0.3),
        len in 1usize..8,
    ) {
        let mut model = Model { revision: 100, ..Default::default() };
        let mut store = store(HistoryLimits { len, bytes: usize::MAX, age: Duration::MAX });
        let relist = |store: &mut Store, model: &Model, new_history| {
            let present = model.range(i64::MAX, "");
            let changes = present.iter().map(|kv| change(EventType::Put, kv)).collect();
            let present = Some(present.into_iter().map(|kv| kv.key).collect());
            store.relist(&SubId::Own, Relist { cluster_id: ID, revision: model.revision, new_history, changes, present });
        };
        model.transact(&before);
        let first = model.revision;
        relist(&mut store, &model, true);
        let (mut live, _) = store.watch(start("cilium/state/", 0));
        lost.iter().for_each(|ops| { model.transact(ops); });
        let listed = model.revision;
        relist(&mut store, &model, false);
        prop_assert_eq!(store.header(&Route::Sub(SubId::Own)), store.header_at(ID, listed));
        if listed > first {
            let compacted = matches!(store.next(&mut live), Some(Next::Compacted { .. }));
            prop_assert!(compacted);
        } else {
            prop_assert!(store.next(&mut live).is_none());
        }

        // Who comes from another replica waits for history, and is not told how far it is meanwhile.
        let from = first + 1 + from;
        store.expect_history(&SubId::Own, from);
        let (mut reader, _) = store.watch(start("cilium/state/", from));
        let (mut earlier, _) = store.watch(start("cilium/state/", first));
        if from <= listed {
            prop_assert!(store.is_held(&reader) && store.next(&mut reader).is_none());
            prop_assert!(store.progress(&mut reader, true).is_none());
            prop_assert!(store.is_arriving(&Route::Sub(SubId::Own), from - 1));
            let compacted = matches!(store.next(&mut earlier), Some(Next::Compacted { .. }));
            prop_assert!(compacted);
        }
        let past = model.events.iter().filter(|(at, _)| (from..=listed).contains(at));
        let past = past.flat_map(|(revision, events)| events.iter().map(|event| {
            let kv = event.kv.clone().unwrap();
            let encoded = |kv: &KeyValue| {
                let revisions = Revisions { create: kv.create_revision, modified: kv.mod_revision, version: kv.version };
                Encoded::new(&kv.key, &kv.value, revisions, 0)
            };
            let before = event.prev_kv.as_ref().map(encoded);
            PastChange {
                revision: *revision,
                entry: encoded(&kv),
                deleted: event.r#type() == EventType::Delete,
                before: if forgotten { PastBefore::Unknown } else { before.map_or(PastBefore::Absent, PastBefore::Known) },
            }
        }));
        store.backfill(&SubId::Own, from, listed, past.collect());
        let live = model.transact(&after);
        store.apply(&SubId::Own, model.revision, live);
        let want: Vec<Event> = model
            .events
            .iter()
            .filter(|(at, _)| *at >= from)
            .flat_map(|(_, events)| events.clone())
            .filter(|event| event.kv.as_ref().unwrap().key.starts_with(b"cilium/state/"))
            .map(|event| Event { prev_kv: None, ..event })
            .collect();
        let mut got = vec![];
        loop {
            match store.next(&mut reader) {
                Some(Next::Events { events, .. }) => got.extend(decode(events)),
                Some(Next::Compacted { compact_revision, .. }) => {
                    // There was room for less.
                    prop_assert!(from < compact_revision && model.events.len() > len);
                    break;
                }
                None => {
                    prop_assert_eq!(got, want);
                    break;
                }
            }
        }
        // Contents are told as they were, or not at all.
        for revision in from - 1..=model.revision {
            match store.range(&Route::Sub(SubId::Own), &RangeRequest { revision, ..request("cilium/state/") }) {
                Ok(answer) => prop_assert_eq!(answer.kvs, model.range(revision, "cilium/state/")),
                Err(error) => {
                    prop_assert_eq!(error, RangeError::Compacted);
                    prop_assert!(forgotten || model.events.len() > len || revision < first);
                }
            }
        }
    }
}

fn put(key: &str, value: &str, revision: i64) -> SourceChange {
    SourceChange::Put {
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: Bytes::copy_from_slice(value.as_bytes()),
        create_revision: revision,
        mod_revision: revision,
        version: 1,
    }
}

fn list(cluster_id: u64, revision: i64, changes: Vec<SourceChange>) -> Relist {
    Relist {
        cluster_id,
        revision,
        new_history: true,
        changes,
        present: None,
    }
}

#[test]
fn mirrored_keys_keep_their_source_and_the_merged_view_has_its_own() {
    let mut store = store(HistoryLimits::default());
    let c2 = SubId::Remote(ClusterName::new("c2").unwrap(), Kind::Nodes);
    let prefix = "cilium/cache/nodes/v1/c2/";
    assert_eq!(route(&store, prefix), Route::Merged, "not configured yet");
    store.add_sub(c2.clone());
    let (mut watch, header) = store.watch(start(prefix, 0));
    assert_eq!((header.cluster_id, header.revision), (5, 1), "not listed yet");
    let (mut merged, _) = store.watch(start("cilium/", 0));
    store.relist(
        &c2,
        list(9, 40, vec![put("cilium/cache/nodes/v1/c2/n1", "x", 33)]),
    );
    assert!(
        matches!(store.next(&mut watch), Some(Next::Compacted { .. })),
        "its history began"
    );
    let answer = store.range(&route(&store, prefix), &request(prefix)).unwrap();
    let header = answer.header.unwrap();
    assert_eq!(
        (header.cluster_id, header.revision, answer.kvs[0].mod_revision),
        (9, 40, 33)
    );
    let answer = store.range(&Route::Merged, &request("cilium/")).unwrap();
    assert_eq!(answer.header.as_ref().unwrap().cluster_id, 5);
    assert_eq!(answer.kvs[0].mod_revision, answer.header.unwrap().revision);
    let Some(Next::Events { header, events, .. }) = store.next(&mut merged) else {
        panic!()
    };
    let event = decode(events).remove(0).kv.unwrap();
    assert_eq!((header.cluster_id, event.mod_revision), (5, header.revision));

    // Removal: the watch ends, the merged view sees the deletion.
    let (mut watch, _) = store.watch(start(prefix, 41));
    assert!(store.next(&mut watch).is_none());
    store.remove_sub(&c2);
    store.add_sub(c2.clone());
    assert!(matches!(store.next(&mut watch), Some(Next::Compacted { .. })));
    let Some(Next::Events { events, .. }) = store.next(&mut merged) else {
        panic!()
    };
    assert_eq!(decode(events)[0].r#type(), EventType::Delete);
}

#[test]
fn a_reused_cluster_id_is_not_passed_on() {
    let mut store = store(HistoryLimits::default());
    store.relist(&SubId::Own, list(9, 5000, vec![put("cilium/state/x", "1", 4000)]));
    let route = route(&store, "cilium/state/");
    assert_eq!(store.header(&route).cluster_id, 9);
    // The etcd was emptied and kept its ID. The object's new value was refused, so that the old one stays.
    store.relist(&SubId::Own, list(9, 3, vec![]));
    let header = store.header(&route);
    assert_ne!(header.cluster_id, 9);
    assert_eq!(header.revision, 3);
    let kv = store
        .range(&route, &request("cilium/state/"))
        .unwrap()
        .kvs
        .remove(0);
    assert_eq!(kv.mod_revision, 3, "at a revision that exists");
    // Another ID is passed on as it is.
    store.relist(&SubId::Own, list(10, 3, vec![]));
    assert_eq!(store.header(&route).cluster_id, 10);
}

#[test]
fn local_keys_live_in_the_merged_view() {
    let mut store = store(HistoryLimits::default());
    let key = Bytes::from_static(b"isthmus/status/v1/remotes/c2");
    let (mut watch, _) = store.watch(start("isthmus/status/v1/remotes/", 0));
    store.put_local(key.clone(), "a".into());
    let revision = store.merged_revision();
    store.put_local(key.clone(), "a".into());
    assert_eq!(store.merged_revision(), revision, "an equal value is not written");
    store.put_local(key.clone(), "b".into());
    store.delete_local_prefix("isthmus/status/");
    let Some(Next::Events { events, header, .. }) = store.next(&mut watch) else {
        panic!()
    };
    let events = decode(events);
    assert_eq!(events.len(), 3);
    assert_eq!(header.revision, revision + 2);
    assert_eq!(events[1].kv.as_ref().unwrap().version, 2);
    assert_eq!(events[1].kv.as_ref().unwrap().create_revision, revision);
}

#[test]
fn progress_is_told_once_and_never_before_a_future_start() {
    let mut store = store(HistoryLimits::default());
    store.relist(&SubId::Own, list(9, 10, vec![]));
    let (mut watch, _) = store.watch(start("cilium/state/", 0));
    let (mut future, _) = store.watch(start("cilium/state/", 30));
    assert!(store.next(&mut watch).is_none() && store.next(&mut future).is_none());
    assert!(store.progress(&mut watch, false).is_none());
    assert!(store.progress(&mut watch, true).is_some(), "asked for");
    store.apply(&SubId::Own, 12, vec![put("isthmus/state/x", "1", 12)]);
    assert!(store.next(&mut watch).is_none());
    assert_eq!(store.progress(&mut watch, false).unwrap().revision, 12);
    assert!(store.progress(&mut watch, false).is_none());
    assert!(store.progress(&mut future, true).is_none());
    let changes = (13..=31)
        .map(|revision| put("cilium/state/y", &revision.to_string(), revision))
        .collect();
    store.apply(&SubId::Own, 31, changes);
    let Some(Next::Events { events, .. }) = store.next(&mut future) else {
        panic!()
    };
    assert_eq!(decode(events).len(), 2);
}

#[test]
fn etcds_sort_and_filter_options_hold() {
    let mut store = store(HistoryLimits::default());
    let changes = vec![
        put("cilium/state/a", "3", 5),
        put("cilium/state/b", "2", 9),
        put("cilium/state/c", "1", 7),
    ];
    store.relist(&SubId::Own, list(9, 10, changes));
    let route = route(&store, "cilium/state/");
    let keys = |request: RangeRequest| -> (String, i64, bool) {
        let answer = store.range(&route, &request).unwrap();
        let last = |kv: &KeyValue| char::from(*kv.key.last().unwrap());
        (answer.kvs.iter().map(last).collect(), answer.count, answer.more)
    };
    let base = || request("cilium/state/");
    let sorted = |target: SortTarget, order: SortOrder, limit| {
        keys(RangeRequest {
            sort_target: target as i32,
            sort_order: order as i32,
            limit,
            ..base()
        })
    };
    assert_eq!(
        sorted(SortTarget::Mod, SortOrder::Descend, 2),
        ("bc".into(), 3, true)
    );
    assert_eq!(
        sorted(SortTarget::Value, SortOrder::None, 0),
        ("cba".into(), 3, false)
    );
    assert_eq!(
        sorted(SortTarget::Key, SortOrder::Descend, 3),
        ("cba".into(), 3, false)
    );
    assert_eq!(
        keys(RangeRequest {
            min_mod_revision: 6,
            max_mod_revision: 8,
            ..base()
        }),
        ("c".into(), 3, false)
    );
    assert_eq!(
        keys(RangeRequest {
            max_create_revision: 5,
            limit: 1,
            ..base()
        }),
        ("a".into(), 3, false)
    );
    assert_eq!(
        keys(RangeRequest {
            count_only: true,
            ..base()
        }),
        (String::new(), 3, false)
    );
    assert_eq!(
        keys(RangeRequest {
            range_end: "a".into(),
            ..base()
        }),
        (String::new(), 0, false)
    );
    let kv = store
        .range(
            &route,
            &RangeRequest {
                keys_only: true,
                limit: 1,
                ..base()
            },
        )
        .unwrap()
        .kvs
        .remove(0);
    assert!(kv.value.is_empty() && kv.mod_revision == 5);
}
