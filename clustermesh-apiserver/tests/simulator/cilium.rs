//! A model of Cilium's client on etcd's: it pins the first cluster ID that it sees, lists in pages, watches from the next revision
//! on, and goes on at another server right after the last event it was told. It lists again if that is compacted.

use std::collections::BTreeSet;

use bytes::Bytes;
use isthmus_kvstore::follower::Header;
use isthmus_proto::mvccpb::{Event, KeyValue, event::EventType};

use super::{
    engine::{Received, View, name},
    etcd::Etcd,
    link::{Answer, Ask, Call, Link, Say},
    mood::{Fault, Figures},
};

pub struct Cilium {
    prefix: &'static str,
    fault: Fault,
    pub view: View,
    pinned: Option<u64>,
    /// First page's header, and the keys that were listed.
    listing: Option<(Option<Header>, BTreeSet<String>)>,
    /// Where a watch goes on.
    next: Option<i64>,
    number: u32,
}

impl Cilium {
    pub fn new(prefix: &'static str, fault: Fault) -> Self {
        Self {
            prefix,
            fault,
            view: View::default(),
            pinned: None,
            listing: None,
            next: None,
            number: 0,
        }
    }

    pub fn is_watching(&self) -> bool {
        self.next.is_some()
    }

    pub fn on_connected(&mut self, link: &mut Link) {
        match self.next {
            Some(_) => self.watch(link),
            None => self.list(link),
        }
    }

    pub fn on_disconnected(&mut self) {
        self.listing = None;
    }

    fn list(&mut self, link: &mut Link) {
        self.next = None;
        self.listing = Some((None, BTreeSet::new()));
        link.calls.push(Call::List {
            start: Bytes::from(self.prefix),
            revision: 0,
        });
    }

    fn watch(&mut self, link: &mut Link) {
        let Some(mut start) = self.next else { return };
        if self.fault == Fault::ResumesOneEarly {
            start -= 1;
        }
        self.number += 1;
        link.asks.push_back(Ask::Watch {
            number: self.number,
            start,
            prev_kv: false,
        });
    }

    /// True if this client is thrown away for a new one, on a new connection.
    pub fn on(&mut self, received: Received, link: &mut Link, etcd: &Etcd, figures: &mut Figures) -> bool {
        let header = match &received {
            Received::Answer(Answer::Page { header, .. } | Answer::Checked { header, .. }) => Some(*header),
            Received::Say(
                Say::Created { header, .. }
                | Say::Events { header, .. }
                | Say::Canceled { header, .. }
                | Say::Progress { header },
            ) => Some(*header),
            Received::Answer(Answer::OutOfRange { .. }) => None,
        };
        if let Some(header) = header
            && *self.pinned.get_or_insert(header.cluster_id) != header.cluster_id
        {
            self.pinned = None;
            self.next = None;
            self.listing = None;
            return true;
        }
        match received {
            Received::Answer(Answer::Page { header, kvs, more }) => {
                self.on_page(link, etcd, header, kvs, more, figures)
            }
            // A page's revision is compacted.
            Received::Answer(_) => self.list(link),
            Received::Say(Say::Events {
                number,
                header,
                events,
            }) if number == self.number && self.next.is_some() => {
                self.on_events(etcd, header, events, figures)
            }
            Received::Say(Say::Canceled { number, .. }) if number == self.number => self.list(link),
            Received::Say(_) => {}
        }
        false
    }

    fn on_page(
        &mut self,
        link: &mut Link,
        etcd: &Etcd,
        header: Header,
        kvs: Vec<KeyValue>,
        more: bool,
        figures: &mut Figures,
    ) {
        let Some((first, listed)) = &mut self.listing else {
            return;
        };
        let first = *first.get_or_insert(header);
        let last = kvs.last().map(|kv| kv.key.clone());
        for kv in kvs {
            let name = name(&kv.key, self.prefix);
            listed.insert(name.clone());
            self.view.put(name, kv.mod_revision);
        }
        if let Some(last) = last.filter(|_| more) {
            link.calls.push(Call::List {
                start: [&last[..], b"\0"].concat().into(),
                revision: first.revision,
            });
            return;
        }
        self.view.content.retain(|name, _| listed.contains(name));
        self.listing = None;
        self.view.lists += 1;
        self.view.claim(etcd, first, figures);
        self.next = Some(first.revision + 1);
        self.watch(link);
    }

    fn on_events(&mut self, etcd: &Etcd, header: Header, events: Vec<Event>, figures: &mut Figures) {
        let told: Vec<_> = events
            .iter()
            .map(|event| {
                let kv = event.kv.as_ref().unwrap();
                let put = event.r#type() == EventType::Put;
                (name(&kv.key, self.prefix), kv.mod_revision, put)
            })
            .collect();
        self.next = match told.last() {
            Some((_, last, _)) => Some(last + 1),
            None => self.next.max(Some(header.revision + 1)),
        };
        self.view.told(etcd, header, told, figures);
    }
}
