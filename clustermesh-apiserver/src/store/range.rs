//! Range, with etcd's semantics. One difference is deliberate: an answer for a named revision carries that revision in its
//! header, so that a reader which takes it from there for the next page or the watch misses nothing.

mod budget;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, btree_map::Entry as Slot},
    ops::Bound,
    sync::Arc,
};

use bytes::Bytes;
use isthmus_proto::etcdserverpb::{
    RangeRequest, RangeResponse, ResponseHeader,
    range_request::{SortOrder, SortTarget},
};

use super::{
    Entry, History, Route, Store, SubId,
    content::{Bounds, Content},
};
pub use budget::Budget;

/// Why a range is not answered.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum RangeError {
    /// The revision is too old.
    #[error("etcdserver: mvcc: required revision has been compacted")]
    Compacted,
    /// The revision does not exist yet.
    #[error("etcdserver: mvcc: required revision is a future revision")]
    Future,
    /// It is more than may be looked at.
    #[error("etcdserver: request is too large")]
    TooLarge,
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

const EVERYTHING: Bounds<'static> = (Bound::Unbounded, Bound::Unbounded);

impl Store {
    /// Answers `request` from the view `route`.
    pub fn range(&self, route: &Route, request: &RangeRequest) -> Result<RangeResponse, RangeError> {
        self.range_within(route, request, &mut Budget::unlimited())
    }

    /// The same, as far as `budget` reaches.
    pub fn range_within(
        &self,
        route: &Route,
        request: &RangeRequest,
        budget: &mut Budget,
    ) -> Result<RangeResponse, RangeError> {
        let within = bounds(&request.key, &request.range_end);
        View::new(self, route, within.unwrap_or(EVERYTHING)).range(request, budget)
    }

    /// The view `route`, for any number of ranges.
    pub fn view(&self, route: &Route) -> View<'_> {
        View::new(self, route, EVERYTHING)
    }
}

/// What a key held at an earlier revision, and where it lives.
#[derive(Debug)]
struct Undone<'s> {
    before: Option<&'s Arc<Entry>>,
    sub: Option<&'s SubId>,
}

/// Keys that changed since a revision.
type Undo<'s> = BTreeMap<&'s [u8], Undone<'s>>;

/// What the ranges of one request are answered from. The way back to a revision is gone once, however many ranges are at it.
#[derive(Debug)]
pub struct View<'s> {
    store: &'s Store,
    merged: bool,
    contents: Vec<&'s Content>,
    /// `None` = there is no such source.
    history: Option<&'s History>,
    header: ResponseHeader,
    /// All ranges lie in these.
    within: Bounds<'s>,
    undos: BTreeMap<i64, Undo<'s>>,
}

impl<'s> View<'s> {
    fn new(store: &'s Store, route: &Route, within: Bounds<'s>) -> Self {
        let (contents, history) = match route {
            Route::Sub(id) => {
                let sub = store.subs.get(id);
                let content = sub.map(|sub| &sub.content);
                (content.into_iter().collect(), sub.map(|sub| &sub.history))
            }
            Route::Merged => {
                let subs = store.subs.values().map(|sub| &sub.content);
                (subs.chain([&store.local]).collect(), Some(&store.merged))
            }
        };
        Self {
            store,
            merged: *route == Route::Merged,
            contents,
            history,
            header: store.header(route),
            within,
            undos: BTreeMap::new(),
        }
    }

    /// Of the present.
    pub fn header(&self) -> &ResponseHeader {
        &self.header
    }

    /// Answers `request` as far as `budget` reaches.
    pub fn range(
        &mut self,
        request: &RangeRequest,
        budget: &mut Budget,
    ) -> Result<RangeResponse, RangeError> {
        let at = if request.revision > 0 {
            request.revision
        } else {
            self.header.revision
        };
        if at > self.header.revision {
            return Err(RangeError::Future);
        }
        let floor = self.history.map(History::content_floor);
        if at < floor.unwrap_or(self.header.revision) {
            return Err(RangeError::Compacted);
        }
        let mut response = RangeResponse {
            header: Some(ResponseHeader {
                revision: at,
                ..self.header
            }),
            ..Default::default()
        };
        let Some(bounds) = bounds(&request.key, &request.range_end) else {
            return Ok(response);
        };
        let undo = match self.undos.entry(at) {
            Slot::Occupied(slot) => slot.into_mut(),
            Slot::Vacant(slot) => slot.insert(undo(self.history, at, &self.within, budget)?),
        };
        let mut count = 0;
        for (key, undone) in undo.range::<[u8], _>(bounds) {
            budget.look_at_change()?;
            let content = match undone.sub {
                Some(id) => self.store.subs.get(id).map(|sub| &sub.content),
                None => Some(&self.store.local),
            };
            let present = content.and_then(|content| content.get(key));
            count += i64::from(undone.before.is_some()) - i64::from(present.is_some());
        }
        let mut sources = Vec::with_capacity(self.contents.len());
        for content in &self.contents {
            let (entries, len) = content.range(&bounds);
            if len > 0 {
                sources.push(entries);
                count += len as i64;
            }
        }
        response.count = count;
        let now = merged(sources).filter(|entry| !undo.contains_key(entry.key()));
        let then = undo
            .range::<[u8], _>(bounds)
            .filter_map(|(_, undone)| undone.before);
        let selection = Selection {
            request,
            merged: self.merged,
        };
        selection.fill(&mut response, in_order(now, then), budget)?;
        Ok(response)
    }
}

/// For each key in `within` that changed after revision `at`: what it held then.
fn undo<'s>(
    history: Option<&'s History>,
    at: i64,
    within: &Bounds<'_>,
    budget: &mut Budget,
) -> Result<Undo<'s>, RangeError> {
    let mut undo = Undo::new();
    let batches = history.into_iter().flat_map(|history| history.since(at + 1));
    for batch in batches {
        for event in &batch.events {
            budget.look_at_change()?;
            if std::ops::RangeBounds::<[u8]>::contains(within, event.key()) {
                undo.entry(event.key()).or_insert(Undone {
                    before: event.before.known(),
                    sub: batch.sub.as_ref(),
                });
            }
        }
    }
    Ok(undo)
}

/// All, which are in key order each and have no key in common, in key order. No more of them is looked at than is taken.
fn merged<'e>(sources: Vec<impl Iterator<Item = &'e Arc<Entry>>>) -> impl Iterator<Item = &'e Arc<Entry>> {
    let mut sources: Vec<_> = sources.into_iter().map(Iterator::peekable).collect();
    let heads = sources.iter_mut().enumerate();
    let heads = heads.filter_map(|(at, source)| source.peek().map(|entry| Reverse((entry.key(), at))));
    let mut heads: BinaryHeap<Reverse<(&'e [u8], usize)>> = heads.collect();
    std::iter::from_fn(move || {
        let Reverse((_, at)) = heads.pop()?;
        let entry = sources[at].next();
        if let Some(next) = sources[at].peek() {
            heads.push(Reverse((next.key(), at)));
        }
        entry
    })
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

struct Selection<'r> {
    request: &'r RangeRequest,
    merged: bool,
}

impl Selection<'_> {
    fn fill<'e>(
        &self,
        response: &mut RangeResponse,
        entries: impl Iterator<Item = &'e Arc<Entry>>,
        budget: &mut Budget,
    ) -> Result<(), RangeError> {
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
        let mut page: Vec<&Arc<Entry>> = Vec::new();
        for entry in entries.take(look_at) {
            budget.look(1)?;
            if self.passes(entry) {
                page.push(entry);
            }
        }
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
        Ok(())
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

#[cfg(test)]
mod tests;
