//! What a server that is not trusted may answer to a follower: any messages, in any order.

use std::collections::BTreeSet;

use bytes::Bytes;
use isthmus_kvstore::follower::{Feed, Follower, Header, Input};
use isthmus_proto::etcdserverpb::{RangeResponse, ResponseHeader, WatchResponse};
use prost::Message;

/// Keys that a feed may have.
const KEYS_MAX: usize = 50;

fn header(header: Option<ResponseHeader>) -> Header {
    header.map_or_else(Header::default, |header| Header {
        cluster_id: header.cluster_id,
        revision: header.revision,
    })
}

fn input(kind: u8, message: &[u8]) -> Option<Input> {
    Some(match kind % 10 {
        0 => Input::Connected,
        1 => Input::Disconnected,
        2 | 3 => {
            let page = RangeResponse::decode(Bytes::copy_from_slice(message)).ok()?;
            Input::Page {
                header: header(page.header),
                kvs: page.kvs,
                more: page.more,
                unreadable: kind >= 128,
            }
        }
        4 => Input::PageCompacted,
        5 => {
            let page = RangeResponse::decode(message).ok()?;
            Input::Checked {
                header: header(page.header),
                mod_revision: page.kvs.first().map(|kv| kv.mod_revision),
                count: page.count,
            }
        }
        6 => Input::CheckFailed,
        _ => {
            let answer = WatchResponse::decode(Bytes::copy_from_slice(message)).ok()?;
            let header = header(answer.header);
            if answer.canceled {
                Input::Canceled {
                    compacted: answer.compact_revision,
                }
            } else if answer.created {
                Input::Created { header }
            } else {
                Input::Events {
                    header,
                    events: answer.events,
                }
            }
        }
    })
}

/// Inputs: a byte that says of which kind, one that is a message's length, the message.
pub fn run(mut bytes: &[u8]) {
    let feed = Feed::prefix("cilium/state/", 1024).with_keys_max(KEYS_MAX, usize::MAX);
    let mut follower = Follower::new(feed);
    let mut told = BTreeSet::new();
    while let [kind, len, rest @ ..] = bytes {
        let (message, rest) = rest.split_at(rest.len().min(usize::from(*len)));
        bytes = rest;
        let Some(input) = input(*kind, message) else {
            continue;
        };
        let effects = follower.on(input);
        assert!(follower.len() <= KEYS_MAX);
        told.extend(effects.len().checked_sub(100_000));
    }
    assert!(told.is_empty(), "a message has effects without end");
}
