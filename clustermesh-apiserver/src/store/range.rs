//! Range, with etcd's semantics. One difference is deliberate: an answer for a named revision carries that revision in its
//! header, so that a reader which takes it from there for the next page or the watch misses nothing.

use std::{collections::BTreeMap, ops::Bound, sync::Arc};

use bytes::Bytes;
use isthmus_proto::etcdserverpb::{
    RangeRequest, RangeResponse,
    range_request::{SortOrder, SortTarget},
};

use super::{
    Entry, History, Route, Store,
    content::{Bounds, Content},
};

/// Why a range is not answered.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum RangeError {
    /// The revision is too old.
    #[error("etcdserver: mvcc: required revision has been compacted")]
    Compacted,
    /// The revision does not exist yet.
    #[error("etcdserver: mvcc: required revision is a future revision")]
    Future,
}

/// The bounds that etcd means; `None` = nothing lies between.
fn bounds<'r>(key: &'r [u8], range_end: &'r [u8]) -> Option<Bounds<'r>> {
    match range_end {
        [] => Some((Bound::Included(key), Bound::Included(key))),
        [0] => Some((Bound::Included(key), Bound::Unbounded)),
        end if end > key => Some((Bound::Included(key), Bound::Excluded(end))),
        _ => None,
    }
}

impl Store {
    /// Answers `request` from the view `route`.
    pub fn range(&self, route: &Route, request: &RangeRequest) -> Result<RangeResponse, RangeError> {
        let merged = *route == Route::Merged;
        let mut header = self.header(route);
        let at = if request.revision > 0 {
            request.revision
        } else {
            header.revision
        };
        let empty = History::new(header.revision);
        let (contents, history): (Vec<&Content>, &History) = match route {
            Route::Sub(id) => match self.subs.get(id) {
                Some(sub) => (vec![&sub.content], &sub.history),
                None => (vec![], &empty),
            },
            Route::Merged => {
                let subs = self.subs.values().map(|sub| &sub.content);
                (subs.chain([&self.local]).collect(), &self.merged)
            }
        };
        if at > header.revision {
            return Err(RangeError::Future);
        }
        if at < history.content_floor() {
            return Err(RangeError::Compacted);
        }
        header.revision = at;
        let mut response = RangeResponse {
            header: Some(header),
            ..Default::default()
        };
        let Some(bounds) = bounds(&request.key, &request.range_end) else {
            return Ok(response);
        };
        let selection = Selection { request, merged };
        let undo = undo(history, at, &bounds);
        if let [content] = contents.as_slice() {
            let (entries, count) = content.range(&bounds);
            let now = entries.filter(|entry| !undo.contains_key(entry.key()));
            let then = undo.values().flatten().copied();
            let changed_since = undo.keys().filter(|key| content.get(key).is_some()).count();
            response.count = (count - changed_since + then.clone().count()) as i64;
            selection.fill(&mut response, in_order(now, then));
        } else {
            let mut entries: Vec<&Arc<Entry>> = contents
                .iter()
                .flat_map(|content| content.range(&bounds).0)
                .filter(|entry| !undo.contains_key(entry.key()))
                .chain(undo.values().flatten().copied())
                .collect();
            entries.sort_unstable_by(|a, b| a.key().cmp(b.key()));
            response.count = entries.len() as i64;
            selection.fill(&mut response, entries.into_iter());
        }
        Ok(response)
    }
}

/// Both, which are in key order and have no key in common, in key order.
fn in_order<'e>(
    a: impl Iterator<Item = &'e Arc<Entry>>,
    b: impl Iterator<Item = &'e Arc<Entry>>,
) -> impl Iterator<Item = &'e Arc<Entry>> {
    let (mut a, mut b) = (a.peekable(), b.peekable());
    std::iter::from_fn(move || match (a.peek(), b.peek()) {
        (Some(next), Some(other)) if other.key() < next.key() => b.next(),
        (Some(_), _) => a.next(),
        (None, _) => b.next(),
    })
}

/// For each key in range that changed after revision `at`: what it held then.
fn undo<'h>(
    history: &'h History,
    at: i64,
    bounds: &Bounds<'_>,
) -> BTreeMap<&'h [u8], Option<&'h Arc<Entry>>> {
    let mut undo = BTreeMap::new();
    for batch in history.since(at + 1) {
        for event in &batch.events {
            if std::ops::RangeBounds::<[u8]>::contains(bounds, event.key()) {
                undo.entry(event.key()).or_insert(event.before.known());
            }
        }
    }
    undo
}

struct Selection<'r> {
    request: &'r RangeRequest,
    merged: bool,
}

impl Selection<'_> {
    fn fill<'e>(&self, response: &mut RangeResponse, entries: impl Iterator<Item = &'e Arc<Entry>>) {
        let request = self.request;
        let limit = usize::try_from(request.limit).ok().filter(|limit| *limit > 0);
        let filtered = request.min_mod_revision != 0
            || request.max_mod_revision != 0
            || request.min_create_revision != 0
            || request.max_create_revision != 0;
        let sorted = request.sort_order() != SortOrder::None || request.sort_target() != SortTarget::Key;
        // Unless everything has to be looked at, only the page and one more key are: also if it is sorted without an order, for
        // etcd limits such a range first.
        let ordered = request.sort_order() != SortOrder::None;
        let look_at = match limit {
            _ if request.count_only => 0,
            Some(limit) if !(ordered || filtered) => limit.saturating_add(1),
            _ => usize::MAX,
        };
        let mut page: Vec<&Arc<Entry>> = entries.take(look_at).filter(|entry| self.passes(entry)).collect();
        if sorted {
            self.sort(&mut page);
        }
        if let Some(limit) = limit
            && page.len() > limit
        {
            page.truncate(limit);
            response.more = true;
        }
        response.kvs = page
            .into_iter()
            .map(|entry| {
                let mut kv = entry.key_value(self.merged);
                if request.keys_only {
                    kv.value = Bytes::new();
                }
                kv
            })
            .collect();
    }

    fn passes(&self, entry: &Entry) -> bool {
        let request = self.request;
        let (create, modified) = (entry.create(self.merged), entry.modified(self.merged));
        (request.min_mod_revision == 0 || modified >= request.min_mod_revision)
            && (request.max_mod_revision == 0 || modified <= request.max_mod_revision)
            && (request.min_create_revision == 0 || create >= request.min_create_revision)
            && (request.max_create_revision == 0 || create <= request.max_create_revision)
    }

    /// Equal ones stay in key order, also when descending.
    fn sort(&self, page: &mut [&Arc<Entry>]) {
        let target = self.request.sort_target();
        let descending = self.request.sort_order() == SortOrder::Descend;
        page.sort_by(|a, b| {
            let ordering = match target {
                SortTarget::Key => a.key().cmp(b.key()),
                SortTarget::Version => a.revisions().version.cmp(&b.revisions().version),
                SortTarget::Create => a.create(self.merged).cmp(&b.create(self.merged)),
                SortTarget::Mod => a.modified(self.merged).cmp(&b.modified(self.merged)),
                SortTarget::Value => a.value().cmp(b.value()),
            };
            if descending { ordering.reverse() } else { ordering }
        });
    }
}
