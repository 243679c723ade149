//! The follower against a simulated etcd: whatever is lost, compacted, emptied or begun anew, the consumer's view converges
//! to the store, equals it whenever it is said to, and never flaps on the way.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on has failed"
)]

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use isthmus_kvstore::{
    Change, Feed,
    follower::{Effect, Follower, Header, Input},
};
use isthmus_proto::mvccpb::{Event, KeyValue, event::EventType};
use proptest::prelude::*;

/// Keys under the feed's prefix, and one beside it.
const KEYS: [&str; 5] = ["p/a", "p/b", "p/b/c", "p/d", "q"];
/// Histories advance by this and each has its own remainder. So no two histories share a revision: that a key, its revision
/// and the number of keys all agree by chance is the one thing that the follower cannot tell.
const STRIDE: i64 = 16;

type Content = BTreeMap<Bytes, KeyValue>;

struct Store {
    cluster_id: u64,
    history: i64,
    revision: i64,
    compacted: i64,
    content: Content,
    log: Vec<(i64, Vec<Event>)>,
    /// Content at each revision.
    snapshots: BTreeMap<i64, Content>,
    /// For each key, when it was absent.
    absent: BTreeMap<&'static str, Vec<u64>>,
    now: u64,
}

impl Store {
    fn new() -> Self {
        let mut store = Self {
            cluster_id: 7,
            history: 0,
            revision: 0,
            compacted: 0,
            content: Content::new(),
            log: vec![],
            snapshots: BTreeMap::new(),
            absent: BTreeMap::new(),
            now: 0,
        };
        store.begin_history();
        store
    }

    fn begin_history(&mut self) {
        self.history += 1;
        self.revision = STRIDE + self.history % STRIDE;
        self.compacted = 0;
        self.content.clear();
        self.log.clear();
        self.snapshots = BTreeMap::from([(self.revision, Content::new())]);
        self.note();
    }

    fn header(&self) -> Header {
        Header {
            cluster_id: self.cluster_id,
            revision: self.revision,
        }
    }

    /// Values are the time of writing, so that a view shows how old it is.
    fn transact(&mut self, ops: &[(usize, bool)]) {
        self.now += 1;
        let revision = self.revision + STRIDE;
        let mut events: BTreeMap<Bytes, Event> = BTreeMap::new();
        for (key, put) in ops {
            let key = Bytes::from_static(KEYS[*key].as_bytes());
            if *put {
                let old = self.content.get(&key);
                let kv = KeyValue {
                    key: key.clone(),
                    create_revision: old.map_or(revision, |kv| kv.create_revision),
                    mod_revision: revision,
                    version: old.map_or(1, |kv| kv.version + 1),
                    value: self.now.to_be_bytes().to_vec().into(),
                    lease: 0,
                };
                self.content.insert(key.clone(), kv.clone());
                events.insert(key, event(EventType::Put, kv));
            } else if self.content.remove(&key).is_some() {
                let kv = KeyValue {
                    key: key.clone(),
                    mod_revision: revision,
                    ..Default::default()
                };
                events.insert(key, event(EventType::Delete, kv));
            }
        }
        if !events.is_empty() {
            self.revision = revision;
            self.snapshots.insert(revision, self.content.clone());
            self.log.push((revision, events.into_values().collect()));
        }
        self.note();
    }

    fn note(&mut self) {
        for key in KEYS {
            if !self.content.contains_key(key.as_bytes()) {
                self.absent.entry(key).or_default().push(self.now);
            }
        }
    }

    fn at(&self, revision: i64) -> Option<&Content> {
        let known = revision <= self.revision && revision >= self.compacted;
        known.then(|| {
            self.snapshots
                .range(..=revision)
                .next_back()
                .map(|(_, content)| content)
        })?
    }
}

fn event(kind: EventType, kv: KeyValue) -> Event {
    Event {
        r#type: kind as i32,
        kv: Some(kv),
        prev_kv: None,
    }
}

fn in_feed(key: &[u8]) -> bool {
    key.starts_with(b"p/")
}

struct World {
    store: Store,
    follower: Follower,
    connected: bool,
    asked: VecDeque<Effect>,
    /// Next revision of the watch, and whether it was answered.
    watch: Option<(i64, bool)>,
    view: BTreeMap<Bytes, u64>,
    newest_seen: BTreeMap<Bytes, u64>,
    page_len: usize,
    /// Of the last complete list: which history, and what the view was when it or a change was complete.
    synced_history: Option<i64>,
    synced_view: BTreeMap<Bytes, u64>,
    /// The view holds parts of a list that did not come to its end, perhaps of another history.
    interrupted: bool,
}

impl World {
    fn input(&mut self, input: Input) {
        for effect in self.follower.on(input) {
            match effect {
                Effect::List { .. } | Effect::Check { .. } => self.asked.push_back(effect),
                Effect::Watch { start_revision, .. } => self.watch = Some((start_revision, false)),
                Effect::Unwatch => self.watch = None,
                Effect::Listing { .. } | Effect::AskProgress | Effect::History(_) => {}
                Effect::Listed { new_history, .. } => {
                    let same = self.synced_history == Some(self.store.history);
                    assert!(new_history || same, "a new history was not noticed");
                    // Not noticing that it is the same is safe, and happens only if nothing old is left to tell by.
                    let old_left = values(&self.store.content)
                        .iter()
                        .any(|(key, time)| self.synced_view.get(key) == Some(time));
                    assert!(
                        !new_history || !same || !old_left || self.interrupted,
                        "the same history was not recognised"
                    );
                    self.interrupted = false;
                    self.synced_history = Some(self.store.history);
                }
                Effect::Changes { changes, .. } => changes.into_iter().for_each(|change| self.change(change)),
                Effect::Synced { header } => {
                    assert_eq!(header.cluster_id, self.store.cluster_id);
                    let content = &self
                        .store
                        .snapshots
                        .range(..=header.revision)
                        .next_back()
                        .unwrap()
                        .1;
                    assert_eq!(self.view, values(content), "view at {header:?}");
                    self.synced_view = self.view.clone();
                    // It may resume in another history if the view, an empty one, equals that one's content.
                    self.synced_history = Some(self.store.history);
                }
            }
        }
    }

    fn change(&mut self, change: Change) {
        match change {
            Change::Put { key, value, .. } => {
                let time = u64::from_be_bytes(value[..].try_into().unwrap());
                let newest = self.newest_seen.entry(key.clone()).or_default();
                assert!(time >= *newest, "{key:?} went back from {newest} to {time}");
                *newest = time;
                self.view.insert(key, time);
            }
            Change::Delete { key, .. } => {
                let since = self.view.remove(&key).expect("only what is known is deleted");
                let name = KEYS.into_iter().find(|name| name.as_bytes() == &key[..]).unwrap();
                let absent = self
                    .store
                    .absent
                    .get(name)
                    .is_some_and(|times| times.iter().any(|time| *time >= since));
                assert!(absent, "{name} was deleted, but was never absent since {since}");
            }
            Change::Refused { .. } => panic!("no value is large"),
        }
    }

    /// Answers the oldest unary call. Returns whether there was one.
    fn answer(&mut self) -> bool {
        let Some(effect) = self.asked.pop_front() else {
            return false;
        };
        let header = self.store.header();
        let input = match effect {
            Effect::List { start, revision } => {
                match self
                    .store
                    .at(if revision == 0 { header.revision } else { revision })
                {
                    None => Input::PageCompacted,
                    Some(content) => {
                        let mut rest = content
                            .range(start..)
                            .filter(|(key, _)| in_feed(key))
                            .map(|(_, kv)| kv.clone());
                        let kvs: Vec<_> = rest.by_ref().take(self.page_len).collect();
                        // As etcd does: the current revision, also in the answer to a historical read.
                        Input::Page {
                            header,
                            kvs,
                            more: rest.next().is_some(),
                            unreadable: false,
                        }
                    }
                }
            }
            Effect::Check { key, revision } => match self.store.at(revision) {
                None => Input::CheckFailed,
                Some(content) => Input::Checked {
                    header,
                    mod_revision: content.get(&key).map(|kv| kv.mod_revision),
                    count: content.keys().filter(|key| in_feed(key)).count() as i64,
                },
            },
            other => unreachable!("{other:?}"),
        };
        self.input(input);
        true
    }

    /// Lets the watch say its next thing, with at most `revisions` revisions. Returns whether it had something to say.
    fn watch(&mut self, revisions: usize) -> bool {
        let Some((next, created)) = self.watch else {
            return false;
        };
        let header = self.store.header();
        if !created {
            self.watch = Some((next, true));
            self.input(Input::Created { header });
            return true;
        }
        if next < self.store.compacted {
            self.watch = None;
            self.input(Input::Canceled { compacted: 0 });
            return true;
        }
        let batch: Vec<_> = self
            .store
            .log
            .iter()
            .filter(|(revision, _)| *revision >= next)
            .take(revisions)
            .cloned()
            .collect();
        let Some((last, _)) = batch.last() else {
            let moved = next <= header.revision;
            if moved {
                // Everything was delivered: a progress notification.
                self.watch = Some((header.revision + 1, true));
                self.input(Input::Events {
                    header,
                    events: vec![],
                });
            }
            return moved;
        };
        self.watch = Some((last + 1, true));
        let events: Vec<_> = batch
            .into_iter()
            .flat_map(|(_, events)| events)
            .filter(|event| in_feed(&event.kv.as_ref().unwrap().key))
            .collect();
        if !events.is_empty() {
            self.input(Input::Events { header, events });
        }
        true
    }

    fn disconnect(&mut self) {
        self.connected = false;
        self.asked.clear();
        self.watch = None;
        self.input(Input::Disconnected);
    }
}

fn values(content: &Content) -> BTreeMap<Bytes, u64> {
    content
        .iter()
        .filter(|(key, _)| in_feed(key))
        .map(|(key, kv)| (key.clone(), u64::from_be_bytes(kv.value[..].try_into().unwrap())))
        .collect()
}

#[derive(Clone, Debug)]
enum Step {
    Transact(Vec<(usize, bool)>),
    Compact,
    Answer,
    Watch(usize),
    Connect,
    Lose,
    /// Data lost, cluster ID kept: an etcd that starts with an empty directory.
    Empty,
    /// Data lost, another cluster.
    Replace,
    CancelWatch,
}

fn step() -> impl Strategy<Value = Step> {
    let ops = proptest::collection::vec((0..KEYS.len(), proptest::bool::weighted(0.7)), 1..4);
    prop_oneof![
        8 => ops.prop_map(Step::Transact),
        1 => Just(Step::Compact),
        6 => Just(Step::Answer),
        6 => (1usize..4).prop_map(Step::Watch),
        3 => Just(Step::Connect),
        1 => Just(Step::Lose),
        1 => Just(Step::Empty),
        1 => Just(Step::Replace),
        1 => Just(Step::CancelWatch),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn the_view_converges_and_never_flaps(steps in proptest::collection::vec(step(), 1..80), page_len in 1usize..4) {
        let mut world = World {
            store: Store::new(),
            follower: Follower::new(Feed::prefix("p/", 1024)),
            connected: false,
            asked: VecDeque::new(),
            watch: None,
            view: BTreeMap::new(),
            newest_seen: BTreeMap::new(),
            page_len,
            synced_history: None,
            synced_view: BTreeMap::new(),
            interrupted: false,
        };
        for step in steps {
            match step {
                Step::Transact(ops) => world.store.transact(&ops),
                Step::Compact => world.store.compacted = world.store.revision,
                Step::Answer => { world.answer(); }
                Step::Watch(revisions) => { world.watch(revisions); }
                Step::Connect if !world.connected => {
                    world.connected = true;
                    world.input(Input::Connected);
                }
                Step::Connect => {}
                Step::Lose => world.disconnect(),
                Step::Empty | Step::Replace => {
                    // The process ends, and its connections with it.
                    world.disconnect();
                    world.store.now += 1;
                    if matches!(step, Step::Replace) {
                        world.store.cluster_id += 1;
                    }
                    world.store.begin_history();
                    world.interrupted = true;
                }
                Step::CancelWatch => {
                    if matches!(world.watch, Some((_, true))) {
                        world.watch = None;
                        world.input(Input::Canceled { compacted: 0 });
                    }
                }
            }
        }
        if !world.connected {
            world.connected = true;
            world.input(Input::Connected);
        }
        while world.answer() || world.watch(2) {}
        prop_assert!(world.follower.is_live());
        prop_assert_eq!(&world.view, &values(&world.store.content));
        prop_assert_eq!(world.follower.len(), world.view.len());
    }
}

#[test]
fn late_and_hostile_answers_change_nothing() {
    let mut follower = Follower::new(Feed::prefix("p/", 4));
    let header = Header {
        cluster_id: 1,
        revision: 5,
    };
    let kv = |key: &'static str, value: &'static [u8], mod_revision| KeyValue {
        key: Bytes::from_static(key.as_bytes()),
        value: Bytes::from_static(value),
        mod_revision,
        ..Default::default()
    };
    assert_eq!(follower.on(Input::Created { header }), []);
    assert_eq!(
        follower.on(Input::Events {
            header,
            events: vec![]
        }),
        []
    );
    follower.on(Input::Connected);
    // A foreign key, one from the future, one too large; and a page that says "more" and does not get on.
    let kvs = vec![
        kv("a", b"", 1),
        kv("p/x", b"12345", 2),
        kv("p/y", b"1", 6),
        kv("o", b"", 2),
    ];
    let effects = follower.on(Input::Page {
        header,
        kvs,
        more: true,
        unreadable: false,
    });
    let Effect::Changes { changes, .. } = &effects[1] else {
        panic!("{effects:?}")
    };
    let refused = Change::Refused {
        key: Bytes::from_static(b"p/x"),
        mod_revision: 2,
        len: 5,
        surplus: false,
    };
    assert_eq!(*changes, [refused]);
    assert!(
        matches!(effects[2], Effect::Listed { .. }),
        "the list ends: {effects:?}"
    );
    let events = vec![event(EventType::Put, kv("q", b"", 7)), Event::default()];
    let effects = follower.on(Input::Events { header, events });
    assert_eq!(effects, []);
}

#[test]
fn keys_beyond_the_limit_are_refused_and_read_once_there_is_room() {
    let mut follower = Follower::new(Feed::prefix("p/", 10).with_keys_max(2, 9));
    let header = Header {
        cluster_id: 1,
        revision: 10,
    };
    let kv = |key: &str, mod_revision| KeyValue {
        key: Bytes::copy_from_slice(key.as_bytes()),
        mod_revision,
        ..Default::default()
    };
    let page = |keys: &[&str]| Input::Page {
        header,
        kvs: keys.iter().map(|key| kv(key, 2)).collect(),
        more: false,
        unreadable: false,
    };
    let told = |effects: &[Effect]| -> Vec<String> {
        let changes = effects.iter().flat_map(|effect| match effect {
            Effect::Changes { changes, .. } => changes.clone(),
            _ => vec![],
        });
        let text = |key: &Bytes| String::from_utf8_lossy(key).into_owned();
        changes
            .map(|change| match change {
                Change::Put { key, .. } => format!("+{}", text(&key)),
                Change::Delete { key, .. } => format!("-{}", text(&key)),
                Change::Refused { key, surplus, .. } => {
                    assert!(surplus);
                    format!("!{}", text(&key))
                }
            })
            .collect()
    };
    follower.on(Input::Connected);
    let effects = follower.on(page(&["p/a", "p/b", "p/c"]));
    assert_eq!(told(&effects), ["+p/a", "+p/b", "!p/c"]);
    assert_eq!(follower.len(), 2);
    follower.on(Input::Created { header });
    let put = |key, revision| Input::Events {
        header: Header { revision, ..header },
        events: vec![Event {
            kv: Some(kv(key, revision)),
            ..Default::default()
        }],
    };
    assert_eq!(told(&follower.on(put("p/d", 11))), ["!p/d"]);
    // Nor is a long one remembered, whatever room there is.
    follower.on(Input::Events {
        header: Header {
            revision: 11,
            ..header
        },
        events: vec![Event {
            r#type: EventType::Delete.into(),
            kv: Some(kv("p/b", 11)),
            ..Default::default()
        }],
    });
    assert_eq!(
        told(&follower.on(put("p/345678901", 11))),
        Vec::<String>::new(),
        "seen"
    );
    assert_eq!(
        told(&follower.on(put("p/a", 12))),
        ["+p/a"],
        "a known key goes on"
    );
    // Other keys took their place: what is gone must not keep them out.
    follower.on(Input::Canceled { compacted: 0 });
    let header = Header {
        revision: 13,
        ..header
    };
    let page = |keys: &[&str]| Input::Page {
        header,
        kvs: keys.iter().map(|key| kv(key, 13)).collect(),
        more: false,
        unreadable: false,
    };
    let effects = follower.on(page(&["p/x", "p/y"]));
    assert_eq!(told(&effects), ["!p/x", "!p/y", "-p/a", "-p/b"]);
    assert!(matches!(effects.last(), Some(Effect::List { .. })), "{effects:?}");
    let effects = follower.on(page(&["p/x", "p/y"]));
    assert_eq!(told(&effects), ["+p/x", "+p/y"]);
    assert!(
        matches!(effects.last(), Some(Effect::Watch { .. })),
        "{effects:?}"
    );
}
