//! Watches: a cursor into a history, a range, and filters. What a watch says next follows from these and the store alone.

use std::sync::Arc;

use bytes::Bytes;
use isthmus_proto::etcdserverpb::ResponseHeader;
use isthmus_tls::rights::KeyRange;

use super::{Batch, History, Route, Store, SubId};

/// Most revisions in one message to a watch that catches up.
const CATCH_UP_REVISIONS_MAX: usize = 1000;
/// Bytes of events after which a message takes no further revision.
const CATCH_UP_BYTES: usize = 1024 * 1024;

/// What a watch is asked for.
#[derive(Clone, Debug)]
pub struct WatchStart {
    /// Keys.
    pub range: KeyRange,
    /// First revision to deliver; 0 = what comes from now on.
    pub start_revision: i64,
    /// No PUT events.
    pub no_put: bool,
    /// No DELETE events.
    pub no_delete: bool,
    /// Events carry the value before.
    pub prev_kv: bool,
}

/// A watch's place.
#[derive(Clone, Debug)]
pub struct Cursor {
    watch: WatchStart,
    route: Route,
    epoch: i64,
    /// First revision that was not looked at yet.
    next: i64,
    /// Highest revision that the reader was told about.
    told: i64,
}

/// What a watch says next.
#[derive(Clone, Debug)]
pub enum Next {
    /// Events of whole revisions.
    Events {
        /// Its revision is the last event's.
        header: ResponseHeader,
        /// Encoded events, each as a field of `WatchResponse`.
        events: Vec<Bytes>,
        /// There may be more to say already.
        more: bool,
    },
    /// What it would have to say next is gone; it ends.
    Compacted {
        /// Header.
        header: ResponseHeader,
        /// First revision that a new watch can start at.
        compact_revision: i64,
    },
}

impl Cursor {
    /// The view it watches.
    pub fn route(&self) -> &Route {
        &self.route
    }
}

impl Store {
    /// Begins a watch. The header is that of the view as it is now.
    pub fn watch(&self, watch: WatchStart) -> (Cursor, ResponseHeader) {
        let route = self.route(&watch.range);
        let header = self.header(&route);
        let next = if watch.start_revision > 0 {
            watch.start_revision
        } else {
            header.revision + 1
        };
        let epoch = match &route {
            Route::Sub(id) => self.subs.get(id).map_or(0, |sub| sub.epoch),
            Route::Merged => 0,
        };
        let cursor = Cursor {
            watch,
            route,
            epoch,
            next,
            told: header.revision,
        };
        (cursor, header)
    }

    /// What the watch says next, if it has to say something. After [`Next::Compacted`] it is over.
    pub fn next(&self, cursor: &mut Cursor) -> Option<Next> {
        let header = self.header(&cursor.route);
        let (history, gone): (&History, bool) = match &cursor.route {
            Route::Merged => (&self.merged, false),
            Route::Sub(id) => match self.subs.get(id) {
                Some(sub) => (&sub.history, sub.epoch != cursor.epoch),
                None => (&self.merged, true),
            },
        };
        if gone {
            return Some(Next::Compacted {
                compact_revision: header.revision.max(1),
                header,
            });
        }
        if history.is_expected(cursor.next) {
            // Held: what it has to be told first is on its way.
            return None;
        }
        if cursor.next <= history.floor() {
            return Some(Next::Compacted {
                compact_revision: history.first(),
                header,
            });
        }
        let merged = cursor.route == Route::Merged;
        let mut events = Vec::new();
        let (mut revisions, mut bytes, mut last, mut more) = (0, 0, 0, false);
        for batch in history.since(cursor.next) {
            let at = if merged {
                batch.merged_revision
            } else {
                batch.revision
            };
            let full = revisions >= CATCH_UP_REVISIONS_MAX || bytes >= CATCH_UP_BYTES;
            if full && at > last {
                more = true;
                break;
            }
            cursor.next = at + 1;
            let before = events.len();
            collect(&cursor.watch, batch, merged, &mut events);
            if events.len() > before {
                revisions += 1;
                last = at;
                bytes += events[before..].iter().map(Bytes::len).sum::<usize>();
            }
        }
        if events.is_empty() {
            // Up to here there was nothing for it. A start in the future stays where it is.
            cursor.next = cursor.next.max(cursor.watch.start_revision);
            return None;
        }
        cursor.told = last;
        Some(Next::Events {
            header: ResponseHeader {
                revision: last,
                ..header
            },
            events,
            more,
        })
    }

    /// Whether what the watch has to be told next is history that is on its way. It says nothing until that is there, or is
    /// known not to come.
    pub fn is_held(&self, cursor: &Cursor) -> bool {
        match &cursor.route {
            Route::Sub(id) => self
                .subs
                .get(id)
                .is_some_and(|sub| sub.epoch == cursor.epoch && sub.history.is_expected(cursor.next)),
            Route::Merged => false,
        }
    }

    /// The header of the view if a watch of it waits for a start that lies in its future. A source that was not listed yet has
    /// none: what the watch waits for then is the list.
    pub fn future_of(&self, cursor: &Cursor) -> Option<ResponseHeader> {
        let listed = match &cursor.route {
            Route::Sub(id) => self.subs.get(id).is_some_and(|sub| sub.listed),
            Route::Merged => true,
        };
        let header = self.header(&cursor.route);
        (listed && cursor.next > header.revision + 1).then_some(header)
    }

    /// The history of a mirrored kind whose revisions an earlier one had before it, so that a reader who is not told histories
    /// apart by an ID may mistake them: its epoch, and the revision up to which that is so.
    pub fn mistakable(&self, route: &Route) -> Option<(i64, i64)> {
        let Route::Sub(id @ SubId::Remote(..)) = route else {
            return None;
        };
        let sub = self.subs.get(id).filter(|sub| sub.outlived > 0)?;
        Some((sub.epoch, sub.outlived))
    }

    /// The header of a progress notification, if the watch has seen everything and the reader does not know yet how far
    /// that is. Call it only when [`next`](Self::next) had nothing to say.
    pub fn progress(&self, cursor: &mut Cursor, always: bool) -> Option<ResponseHeader> {
        if self.is_held(cursor) {
            return None;
        }
        let header = self.header(&cursor.route);
        let moved = header.revision > cursor.told;
        // A start in the future is not caught up with.
        let caught_up = cursor.next <= header.revision + 1;
        if !caught_up || !(moved || always) {
            return None;
        }
        cursor.told = header.revision;
        cursor.next = header.revision + 1;
        Some(header)
    }

    /// The sub-stores that changed after merged revision `since`; `None` in the list = this server's own keys. `None` = too
    /// long ago to tell.
    pub fn changed_since(&self, since: i64) -> Option<Vec<Option<&SubId>>> {
        if since < self.merged.floor() {
            return None;
        }
        let mut subs: Vec<Option<&SubId>> = self
            .merged
            .since(since + 1)
            .map(|batch| batch.sub.as_ref())
            .collect();
        subs.sort_unstable();
        subs.dedup();
        Some(subs)
    }
}

fn collect(watch: &WatchStart, batch: &Arc<Batch>, merged: bool, events: &mut Vec<Bytes>) {
    for event in &batch.events {
        let filtered = if event.is_put() {
            watch.no_put
        } else {
            watch.no_delete
        };
        if !filtered && watch.range.contains(event.key()) {
            events.push(batch.encoded(event, merged, watch.prev_kv));
        }
    }
}
