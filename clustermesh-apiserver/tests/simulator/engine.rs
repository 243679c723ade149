//! A follower at the end of a link, and a reader that is one.

use std::collections::BTreeMap;

use isthmus_kvstore::{
    Change, Feed,
    follower::{Effect, Follower, Header, Input},
};

use super::{
    etcd::{Etcd, Told},
    link::{Answer, Ask, Call, Link, Say},
    mood::{Fault, Figures},
};

/// What a client was sent.
#[derive(Debug)]
pub enum Received {
    Answer(Answer),
    Say(Say),
}

/// Does what a session does: gives a follower what comes, and sends what it wants.
pub struct Driver {
    pub follower: Follower,
    pub prefix: &'static str,
    fault: Fault,
    number: u32,
    pub watch: Option<u32>,
}

impl Driver {
    pub fn new(prefix: &'static str, history: i64, fault: Fault) -> Self {
        Self {
            follower: Follower::new(Feed::prefix(prefix, 1024).with_history(history)),
            prefix,
            fault,
            number: 0,
            watch: None,
        }
    }

    pub fn input(&self, received: Received) -> Option<Input> {
        let mine = |number: u32| self.watch == Some(number);
        Some(match received {
            Received::Answer(Answer::Page { header, kvs, more }) => Input::Page {
                header,
                kvs,
                more,
                unreadable: false,
            },
            Received::Answer(Answer::Checked {
                header,
                mod_revision,
                count,
            }) => Input::Checked {
                header,
                mod_revision,
                count,
            },
            Received::Answer(Answer::OutOfRange { check: true }) => Input::CheckFailed,
            Received::Answer(Answer::OutOfRange { check: false }) => Input::PageCompacted,
            Received::Say(Say::Created { number, header }) if mine(number) => Input::Created { header },
            Received::Say(Say::Events {
                number,
                header,
                events,
            }) if mine(number) => Input::Events { header, events },
            Received::Say(Say::Canceled {
                number, compacted, ..
            }) if mine(number) => Input::Canceled { compacted },
            Received::Say(Say::Progress { header }) if self.follower.awaits_history() => match self.fault {
                Fault::ProgressForAllIsBelieved => Input::Events {
                    header,
                    events: vec![],
                },
                _ => Input::NoProof,
            },
            Received::Say(_) => return None,
        })
    }

    /// Sends what the effect asks for; others are the consumer's.
    pub fn send(&mut self, link: &mut Link, effect: Effect) -> Option<Effect> {
        match effect {
            Effect::List { start, revision } => link.calls.push(Call::List { start, revision }),
            Effect::Check { key, revision } => link.calls.push(Call::Check { key, revision }),
            Effect::AskProgress => link.asks.push_back(Ask::Progress),
            Effect::Watch {
                mut start_revision,
                prev_kv,
            } => {
                if self.fault == Fault::ResumesOneLate && !prev_kv {
                    start_revision += 1;
                }
                self.number += 1;
                self.watch = Some(self.number);
                link.asks.push_back(Ask::Watch {
                    number: self.number,
                    start: start_revision,
                    prev_kv,
                });
            }
            Effect::Unwatch => {
                if let Some(number) = self.watch.take() {
                    link.asks.push_back(Ask::Cancel { number });
                }
            }
            other => return Some(other),
        }
        None
    }
}

/// Last part of a key.
pub fn name(key: &[u8], prefix: &str) -> String {
    let rest = key
        .strip_prefix(prefix.as_bytes())
        .expect("no other key was asked for");
    String::from_utf8(rest.to_vec()).unwrap()
}

/// What a reader knows, held against what is true.
#[derive(Default)]
pub struct View {
    pub content: BTreeMap<String, i64>,
    /// Cluster ID and revision that the view is said to be of.
    pub claimed: Option<Header>,
    pub lists: u32,
}

impl View {
    pub fn put(&mut self, name: String, mod_revision: i64) {
        self.content.insert(name, mod_revision);
    }

    /// The view is now said to be the content at `header`.
    pub fn claim(&mut self, etcd: &Etcd, header: Header, figures: &mut Figures) {
        let past = etcd.truth_of(header.cluster_id);
        figures.views += 1;
        assert_eq!(self.content, past.at(header.revision), "content at {header:?}");
        self.claimed = Some(header);
    }

    /// It was told these events, and is at `header` now.
    pub fn told(&mut self, etcd: &Etcd, header: Header, told: Vec<Told>, figures: &mut Figures) {
        let past = etcd.truth_of(header.cluster_id);
        let claimed = self.claimed.expect("events come after a list");
        assert_eq!(claimed.cluster_id, header.cluster_id, "events of another history");
        figures.exact += told.len();
        let want = past.told(claimed.revision, header.revision);
        assert_eq!(told, want, "events after {claimed:?} up to {header:?}");
        for (name, mod_revision, put) in told {
            if put {
                self.content.insert(name, mod_revision);
            } else {
                self.content.remove(&name);
            }
        }
        self.claim(etcd, header, figures);
    }
}

/// A reader as the agents are.
pub struct Reader {
    pub driver: Driver,
    pub view: View,
    listing: bool,
}

impl Reader {
    pub fn new(prefix: &'static str, fault: Fault) -> Self {
        Self {
            driver: Driver::new(prefix, 0, fault),
            view: View::default(),
            listing: false,
        }
    }

    pub fn on(&mut self, input: Input, link: &mut Link, etcd: &Etcd, figures: &mut Figures) {
        let mut cluster_id = self.view.claimed.map_or(0, |claimed| claimed.cluster_id);
        for effect in self.driver.follower.on(input) {
            let Some(effect) = self.driver.send(link, effect) else {
                continue;
            };
            match effect {
                Effect::Listing { header, .. } => {
                    cluster_id = header.cluster_id;
                    self.listing = true;
                }
                Effect::Listed { .. } => {
                    self.listing = false;
                    self.view.lists += 1;
                }
                Effect::Changes { changes, .. } if self.listing => {
                    for change in changes {
                        let name = name(change.key(), self.driver.prefix);
                        match change {
                            Change::Put { mod_revision, .. } => self.view.put(name, mod_revision),
                            _ => {
                                self.view.content.remove(&name);
                            }
                        }
                    }
                }
                Effect::Changes { revision, changes } => {
                    let told = changes.iter().map(|change| {
                        let put = matches!(change, Change::Put { .. });
                        (name(change.key(), self.driver.prefix), change.mod_revision(), put)
                    });
                    let told = told.collect();
                    let header = Header { cluster_id, revision };
                    self.view.told(etcd, header, told, figures);
                }
                Effect::Synced { header } => self.view.claim(etcd, header, figures),
                other => panic!("a reader asks for no history: {other:?}"),
            }
        }
    }

    pub fn on_disconnected(&mut self, etcd: &Etcd, figures: &mut Figures) {
        self.driver.watch = None;
        self.on(Input::Disconnected, &mut Link::default(), etcd, figures);
    }
}
