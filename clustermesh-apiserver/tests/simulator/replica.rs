//! An API server: the real store and ingest, fed by a follower, and what it says to those who read it.

use std::time::Duration;

use bytes::Bytes;
use isthmus_clustermesh_apiserver::{
    ingest::{Ingest, Ingested, IngestedPast, past_before},
    store::{Cursor, HistoryLimits, Next, RangeError, Route, SourceChange, Store, SubId, WatchStart},
};
use isthmus_kvstore::{
    Change, History, Past,
    follower::{Effect, Header, Input},
};
use isthmus_model::ClusterName;
use isthmus_proto::etcdserverpb::{RangeRequest, ResponseHeader, WatchResponse};
use isthmus_tls::rights::KeyRange;
use isthmus_wire::keys::{Kind, range_end};
use prost::Message;

use super::{
    engine::Driver,
    etcd::{CACHE, Etcd, STATE},
    link::{Answer, Call, Link, Say},
    mood::{Fault, Figures},
};

/// Keys of a page.
const PAGE: i64 = 2;

pub struct Replica {
    pub driver: Driver,
    pub store: Store,
    ingest: Ingest,
    sub: SubId,
    /// Of the keys that it serves.
    to: &'static str,
    fault: Fault,
    /// Revision of the list that is under way.
    list: i64,
}

/// What it is told to be.
#[derive(Clone, Copy)]
pub struct Setup {
    /// A mirror of the first cluster, in the second.
    pub mirror: bool,
    /// Revisions that it asks for beyond the list.
    pub history: i64,
    /// How much it keeps.
    pub limits: HistoryLimits,
    /// Not 0.
    pub id: u64,
}

fn header(header: Option<ResponseHeader>) -> Header {
    let header = header.expect("every answer has a header");
    Header {
        cluster_id: header.cluster_id,
        revision: header.revision,
    }
}

impl Replica {
    pub fn new(setup: Setup, fault: Fault) -> Self {
        let Setup {
            mirror,
            history,
            limits,
            id,
        } = setup;
        let cluster = ClusterName::new(if mirror { "b" } else { "a" }).unwrap();
        let mut store = Store::new(cluster, id, limits, limits);
        let remote = SubId::Remote(ClusterName::new("a").unwrap(), Kind::Nodes);
        let sub = if mirror { remote } else { SubId::Own };
        store.add_sub(sub.clone());
        Self {
            driver: Driver::new(STATE, history, fault),
            store,
            ingest: Ingest::default(),
            sub,
            to: if mirror { CACHE } else { STATE },
            fault,
            list: 0,
        }
    }

    fn translate(&self, key: &[u8]) -> Bytes {
        let rest = key
            .strip_prefix(STATE.as_bytes())
            .expect("no other key was asked for");
        [self.to.as_bytes(), rest].concat().into()
    }

    fn change(&self, change: Change) -> Ingested {
        let key = self.translate(change.key());
        match change {
            Change::Put {
                value,
                create_revision,
                mod_revision,
                version,
                ..
            } => Ingested::Change(SourceChange::Put {
                key,
                value,
                create_revision,
                mod_revision,
                version,
            }),
            Change::Delete { mod_revision, .. } => {
                Ingested::Change(SourceChange::Delete { key, mod_revision })
            }
            Change::Refused { .. } => Ingested::Kept(key),
        }
    }

    fn past(&self, past: Past) -> IngestedPast {
        let key = self.translate(past.change.key());
        IngestedPast {
            revision: past.change.mod_revision(),
            before: past_before(&key, past.before, |_| true),
            change: self.change(past.change),
        }
    }

    pub fn on(&mut self, input: Input, link: &mut Link, etcd: &mut Etcd, now_ms: u64) {
        for effect in self.driver.follower.on(input) {
            let Some(effect) = self.driver.send(link, effect) else {
                continue;
            };
            match effect {
                Effect::Listing { header, trusted } => {
                    self.list = header.revision;
                    self.ingest.on_listing(trusted);
                }
                Effect::Changes { revision, changes } => {
                    let changes = changes.into_iter().map(|change| self.change(change)).collect();
                    self.ingest
                        .on_changes(&mut self.store, &self.sub, revision, changes);
                }
                Effect::Listed { header, new_history } => {
                    let Header { cluster_id, revision } = header;
                    self.ingest
                        .on_listed(&mut self.store, &self.sub, cluster_id, revision, new_history);
                    // What waits for canaries: they are there.
                    self.ingest.release(&mut self.store, &self.sub);
                    etcd.note_id(self.store.header(&self.route()).cluster_id, cluster_id);
                }
                Effect::History(history) => self.on_history(history, now_ms),
                Effect::Synced { .. } => {}
                other => panic!("nobody else takes {other:?}"),
            }
        }
    }

    fn on_history(&mut self, history: History, now_ms: u64) {
        let (ingest, store, sub) = (&mut self.ingest, &mut self.store, &self.sub.clone());
        match history {
            History::Begins { mut from } => {
                if self.fault == Fault::FloorTooLow {
                    from -= 2;
                }
                ingest.on_history_begins(store, sub, from, now_ms);
            }
            History::Events(mut past) => {
                if self.fault == Fault::LastPastIsDropped {
                    past.pop();
                }
                if self.fault == Fault::FirstPastIsTwice {
                    past.insert(0, past[0].clone());
                }
                let past = past.into_iter().map(|past| self.past(past)).collect();
                self.ingest.on_past(&self.store, sub, past);
                if self.fault == Fault::CompleteAtFirstSight {
                    self.ingest.on_history_complete(&mut self.store, sub);
                }
            }
            History::Complete => ingest.on_history_complete(store, sub),
            History::Lost => ingest.on_history_lost(store, sub),
        }
    }

    pub fn tick(&mut self, now_ms: u64) {
        self.ingest.on_tick(&mut self.store, &self.sub, now_ms);
        self.store.forget_aged(Duration::from_millis(now_ms));
    }

    // As a server.

    pub fn is_served(&self) -> bool {
        self.store.status(&self.sub).is_some_and(|sub| sub.listed)
    }

    fn route(&self) -> Route {
        Route::Sub(self.sub.clone())
    }

    fn range(
        &self,
        start: &[u8],
        single: bool,
        revision: i64,
        limit: i64,
    ) -> Result<(Header, Vec<isthmus_proto::mvccpb::KeyValue>, bool, i64), RangeError> {
        let range_end = if single {
            Bytes::new()
        } else {
            range_end(self.to.as_bytes()).into()
        };
        let request = RangeRequest {
            key: Bytes::copy_from_slice(start),
            range_end,
            revision,
            limit,
            ..Default::default()
        };
        let answer = self.store.range(&self.route(), &request)?;
        Ok((header(answer.header), answer.kvs, answer.more, answer.count))
    }

    /// `None` = it is not answered yet. `impatient` = the future is not waited for any longer.
    pub fn answer(&self, call: &Call, impatient: bool, figures: &mut Figures) -> Option<Answer> {
        let (revision, check) = match call {
            Call::List { revision, .. } => (*revision, false),
            Call::Check { revision, .. } => (*revision, true),
        };
        let result = match call {
            Call::List { start, revision } => self
                .range(start, false, *revision, PAGE)
                .map(|(header, kvs, more, _)| Answer::Page { header, kvs, more }),
            Call::Check { key, revision } => {
                self.range(key, true, *revision, 0).and_then(|(header, kvs, ..)| {
                    let (.., count) = self.range(self.to.as_bytes(), false, *revision, 0)?;
                    Ok(Answer::Checked {
                        header,
                        mod_revision: kvs.first().map(|kv| kv.mod_revision),
                        count,
                    })
                })
            }
        };
        match result {
            Ok(answer) => Some(answer),
            Err(RangeError::Future) if !impatient => None,
            Err(RangeError::Compacted) if self.store.is_arriving(&self.route(), revision) => {
                figures.held += 1;
                None
            }
            Err(_) => Some(Answer::OutOfRange { check }),
        }
    }

    pub fn watch(&self, start: i64, prev_kv: bool, figures: &mut Figures) -> (Cursor, Header) {
        if self.list > 0 && (1..=self.list).contains(&start) {
            figures.resumed_below_list += 1;
        }
        let (cursor, created) = self.store.watch(WatchStart {
            range: KeyRange::prefix(self.to),
            start_revision: start,
            no_put: false,
            no_delete: false,
            prev_kv,
        });
        (cursor, header(Some(created)))
    }

    pub fn next(&self, number: u32, cursor: &mut Cursor, figures: &mut Figures) -> Option<Say> {
        if self.store.is_held(cursor) {
            figures.held += 1;
        }
        Some(match self.store.next(cursor)? {
            Next::Events {
                header: said, events, ..
            } => {
                let events = events
                    .into_iter()
                    .flat_map(|event| WatchResponse::decode(event).unwrap().events);
                Say::Events {
                    number,
                    header: header(Some(said)),
                    events: events.collect(),
                }
            }
            Next::Compacted {
                header: said,
                compact_revision,
            } => Say::Canceled {
                number,
                header: header(Some(said)),
                compacted: compact_revision,
            },
        })
    }

    /// Tells how far a watch is that has seen everything.
    pub fn progress(
        &self,
        number: u32,
        cursor: &mut Cursor,
        always: bool,
        figures: &mut Figures,
    ) -> Option<Say> {
        if let Some(said) = self.next(number, cursor, figures) {
            return Some(said);
        }
        if self.fault == Fault::ProgressWhileHeld && self.store.is_held(cursor) {
            return Some(Say::Events {
                number,
                header: header(Some(self.store.header(&self.route()))),
                events: vec![],
            });
        }
        let said = self.store.progress(cursor, always)?;
        Some(Say::Events {
            number,
            header: header(Some(said)),
            events: vec![],
        })
    }
}
