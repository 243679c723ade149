//! Properties of the store: whoever lists and then watches knows what a later list says.

use std::collections::BTreeMap;

use isthmus_sandbox_kube::store::{EventKind, Key, ResourceId, Snapshot, Store};
use proptest::prelude::*;
use serde_json::json;

#[derive(Clone, Debug)]
enum Op {
    Put(u8, u8, u8),
    Remove(u8, u8),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0u8..2, 0u8..6, any::<u8>()).prop_map(|(r, n, v)| Op::Put(r, n, v)),
        1 => (0u8..2, 0u8..6).prop_map(|(r, n)| Op::Remove(r, n)),
    ]
}

fn resource(number: u8) -> ResourceId {
    ResourceId::from(if number == 0 { "pods" } else { "services" })
}

fn run(store: &mut Store, op: &Op) {
    let key = |r: u8, n: u8| Key::new(resource(r), "ns", &format!("n{n}"));
    match op {
        Op::Put(r, n, v) => {
            store.put(
                key(*r, *n),
                json!({"metadata": {"name": format!("n{n}")}, "v": v}),
            );
        }
        Op::Remove(r, n) => {
            store.remove(key(*r, *n), json!({"metadata": {"name": format!("n{n}")}}));
        }
    }
}

fn content(snapshot: &Snapshot) -> BTreeMap<String, (u64, String)> {
    snapshot
        .iter()
        .map(|((_, name), o)| (name.clone(), (o.revision(), o.value().to_string())))
        .collect()
}

proptest! {
    #[test]
    fn list_and_events_make_every_later_list(
        before in prop::collection::vec(op(), 0..40),
        after in prop::collection::vec(op(), 0..40),
        history_len in 1usize..60,
    ) {
        let mut store = Store::new(history_len);
        before.iter().for_each(|op| run(&mut store, op));
        let pods = resource(0);
        let revision = store.revision();
        let mut view = store.at(&pods, revision).unwrap();
        let listed = content(&view);
        after.iter().for_each(|op| run(&mut store, op));

        match store.since(&pods, revision) {
            Err(compacted) => {
                prop_assert!(compacted.oldest > revision);
                prop_assert_eq!(store.at(&pods, revision).err(), Some(compacted));
            }
            Ok(events) => {
                let mut last = revision;
                for event in events {
                    prop_assert!(event.revision > last);
                    last = event.revision;
                    let slot = (event.key.namespace.clone(), event.key.name.clone());
                    let known = view.contains_key(&slot);
                    prop_assert_eq!(event.kind == EventKind::Added, !known);
                    match event.kind {
                        EventKind::Deleted => view.remove(&slot),
                        EventKind::Added | EventKind::Modified => view.insert(slot, event.object.clone()),
                    };
                }
                let now = store.at(&pods, store.revision()).unwrap();
                prop_assert_eq!(content(&view), content(&now));
                // The past is still what it was.
                prop_assert_eq!(content(&store.at(&pods, revision).unwrap()), listed);
            }
        }
    }

    #[test]
    fn revisions_are_refused_exactly_when_an_event_after_them_is_gone(
        ops in prop::collection::vec(op(), 1..60), history_len in 1usize..20, asked in 0u64..70,
    ) {
        let mut store = Store::new(history_len);
        let mut pods = Vec::new();
        for op in &ops {
            let before = store.revision();
            run(&mut store, op);
            let of_pods = matches!(op, Op::Put(0, ..) | Op::Remove(0, _));
            if of_pods && store.revision() > before {
                pods.push(store.revision());
            }
        }
        let wanted: Vec<u64> = pods.iter().copied().filter(|r| *r > asked).collect();
        match store.since(&resource(0), asked) {
            Ok(events) => prop_assert_eq!(events.map(|e| e.revision).collect::<Vec<_>>(), wanted),
            Err(_) => prop_assert!(wanted.len() > history_len),
        }
    }
}
