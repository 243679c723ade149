//! An etcd, as far as followers see it, and what is true: every history's content and events at each revision.

use std::collections::BTreeMap;

use bytes::Bytes;
use isthmus_kvstore::follower::{BATCH_REVISIONS, Header};
use isthmus_proto::mvccpb::{Event, KeyValue, event::EventType};

/// The cluster's keys of a kind, as its own servers have them.
pub const STATE: &str = "cilium/state/nodes/v1/a/";
/// The same in a mirror.
pub const CACHE: &str = "cilium/cache/nodes/v1/a/";
/// The last part of keys that come and go, and of one that stays.
pub const NAMES: [&str; 4] = ["k0", "k1", "k2", "k3"];
pub const LASTING: &str = "base";

/// By the last part of the key.
pub type Content = BTreeMap<String, KeyValue>;
/// Last part of a key, revision, whether it is a PUT.
pub type Told = (String, i64, bool);

/// What happened in one history.
#[derive(Default)]
pub struct Past {
    pub contents: BTreeMap<i64, Content>,
    pub events: Vec<Told>,
}

impl Past {
    pub fn at(&self, revision: i64) -> BTreeMap<String, i64> {
        let content = self.contents.range(..=revision).next_back();
        let content = content.map(|(_, content)| content.clone()).unwrap_or_default();
        content
            .into_iter()
            .map(|(name, kv)| (name, kv.mod_revision))
            .collect()
    }

    /// Events after revision `after`, up to `upto`.
    pub fn told(&self, after: i64, upto: i64) -> Vec<Told> {
        let begin = self.events.partition_point(|(_, revision, _)| *revision <= after);
        let end = self.events.partition_point(|(_, revision, _)| *revision <= upto);
        self.events[begin..end.max(begin)].to_vec()
    }
}

/// A watch in it.
#[derive(Clone, Debug)]
pub struct EtcdWatch {
    pub next: i64,
    pub prev_kv: bool,
}

pub enum Said {
    Events(Header, Vec<Event>),
    Compacted(Header, i64),
}

pub struct Etcd {
    pub cluster_id: u64,
    pub revision: i64,
    pub compacted: i64,
    pub truth: BTreeMap<u64, Past>,
    /// IDs under which servers show a history that they have shown before.
    aliases: BTreeMap<u64, u64>,
    log: BTreeMap<i64, Vec<(Event, Option<KeyValue>)>>,
}

impl Etcd {
    pub fn new() -> Self {
        let mut etcd = Self {
            cluster_id: 100,
            revision: 1,
            compacted: 0,
            truth: BTreeMap::new(),
            aliases: BTreeMap::new(),
            log: BTreeMap::new(),
        };
        etcd.truth
            .entry(100)
            .or_default()
            .contents
            .insert(1, Content::new());
        etcd.write(&[(LASTING, true)]);
        // The very first revisions are the only ones that the first history does not reach.
        (0..4).for_each(|_| etcd.write(&[]));
        etcd
    }

    pub fn header(&self) -> Header {
        Header {
            cluster_id: self.cluster_id,
            revision: self.revision,
        }
    }

    fn past(&mut self) -> &mut Past {
        self.truth.entry(self.cluster_id).or_default()
    }

    /// A server shows `source`'s history as `shown`.
    pub fn note_id(&mut self, shown: u64, source: u64) {
        let source = self.aliases.get(&source).copied().unwrap_or(source);
        if shown != source {
            self.aliases.insert(shown, source);
        }
    }

    /// What is true of the history that is shown as `id`.
    pub fn truth_of(&self, id: u64) -> &Past {
        &self.truth[self.aliases.get(&id).unwrap_or(&id)]
    }

    pub fn content(&self) -> &Content {
        self.truth[&self.cluster_id].contents.last_key_value().unwrap().1
    }

    /// A transaction. One that changes nothing of the prefix takes a revision too.
    pub fn write(&mut self, ops: &[(&str, bool)]) {
        self.revision += 1;
        let revision = self.revision;
        let mut content = self.content().clone();
        let mut events = Vec::new();
        for (name, put) in ops {
            let before = content.get(*name).cloned();
            let key = Bytes::from(format!("{STATE}{name}"));
            let (kind, kv) = if *put {
                let kv = KeyValue {
                    key,
                    value: revision.to_string().into(),
                    create_revision: before.as_ref().map_or(revision, |kv| kv.create_revision),
                    mod_revision: revision,
                    version: before.as_ref().map_or(1, |kv| kv.version + 1),
                    lease: 0,
                };
                content.insert((*name).to_owned(), kv.clone());
                (EventType::Put, kv)
            } else if content.remove(*name).is_some() {
                let kv = KeyValue {
                    key,
                    mod_revision: revision,
                    ..Default::default()
                };
                (EventType::Delete, kv)
            } else {
                continue;
            };
            let event = Event {
                r#type: kind as i32,
                kv: Some(kv),
                prev_kv: None,
            };
            events.push((event, before));
            self.past().events.push(((*name).to_owned(), revision, *put));
        }
        if !events.is_empty() {
            self.past().contents.insert(revision, content);
            self.log.insert(revision, events);
        }
    }

    /// Forgets what `at` does not need. etcd up to 3.5 forgets also deletions of that revision itself, and lets watches begin
    /// there all the same.
    pub fn compact(&mut self, at: i64, deletions_too: bool) {
        if at <= self.compacted {
            return;
        }
        self.compacted = at;
        let alive: Vec<i64> = self.content_at(at).values().map(|kv| kv.mod_revision).collect();
        self.log.retain(|revision, events| {
            if *revision == at {
                events.retain(|(event, _)| match event.r#type() {
                    EventType::Put => alive.contains(revision),
                    EventType::Delete => !deletions_too,
                });
            }
            *revision >= at
        });
    }

    /// Another etcd in its place, which is given the same keys.
    pub fn replace(&mut self) {
        let names: Vec<String> = self.content().keys().cloned().collect();
        self.cluster_id += 1;
        self.revision = 1;
        self.compacted = 0;
        self.log.clear();
        self.past().contents.insert(1, Content::new());
        for name in names {
            self.write(&[(name.as_str(), true)]);
        }
    }

    fn content_at(&self, revision: i64) -> &Content {
        let contents = &self.truth[&self.cluster_id].contents;
        contents.range(..=revision).next_back().unwrap().1
    }

    /// `None` = compacted.
    pub fn range(&self, revision: i64) -> Option<&Content> {
        let at = if revision == 0 { self.revision } else { revision };
        (at >= self.compacted && at <= self.revision).then(|| self.content_at(at))
    }

    pub fn watch(&self, start: i64, prev_kv: bool) -> EtcdWatch {
        EtcdWatch {
            next: if start > 0 { start } else { self.revision + 1 },
            prev_kv,
        }
    }

    /// As its loop for watches that are behind does, and as its notification of those that are not.
    pub fn next(&self, watch: &mut EtcdWatch) -> Option<Said> {
        if watch.next > self.revision {
            return None;
        }
        if watch.next < self.compacted {
            return Some(Said::Compacted(self.header(), self.compacted));
        }
        let mut batches = self.log.range(watch.next..);
        let mut events = Vec::new();
        for (revision, batch) in batches.by_ref().take(BATCH_REVISIONS) {
            for (event, before) in batch {
                let known = watch.prev_kv && *revision > self.compacted;
                events.push(Event {
                    prev_kv: before.clone().filter(|_| known),
                    ..event.clone()
                });
            }
        }
        watch.next = batches
            .next()
            .map_or(self.revision + 1, |(revision, _)| *revision);
        (!events.is_empty()).then(|| Said::Events(self.header(), events))
    }
}
