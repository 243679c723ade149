//! One client's stream of watches. It is polled by the connection when there is room to send: so nothing is queued for a slow
//! reader but its cursors, and what it has not read yet is in the history or, if it waits too long, counts as compacted.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    pin::Pin,
    sync::Arc,
    task::{Context as TaskContext, Poll},
};

use bytes::Bytes;
use futures::Stream;
use isthmus_proto::etcdserverpb::{
    ResponseHeader, WatchCreateRequest, WatchRequest, WatchResponse, watch_create_request::FilterType,
    watch_request::RequestUnion,
};
use isthmus_tls::rights::KeyRange;
use tokio::time::{Instant, Interval, MissedTickBehavior, Sleep, interval, sleep_until};
use tokio_stream::wrappers::WatchStream as Changes;
use tonic::{Status, Streaming};

use super::{Context, Peer, errors, face::Face, watch::Frame};
use crate::{
    shared::Shared,
    store::{Cursor, Next, Route, Store, SubId, WatchStart},
};

/// Answers that wait to be sent; while there are this many, no request is read.
const CONTROL_MAX: usize = 64;
/// What etcd answers for a watch that was not made.
const NO_WATCH: i64 = -1;
/// What etcd sends a notification to that concerns all watches.
const ALL_WATCHES: i64 = -1;
/// A response of so many bytes is split for a watch that asked for fragments: etcd's limit of a request, and what it adds for
/// gRPC.
const FRAGMENT_LEN: usize = 2 * 1024 * 1024;

/// Watches of a stream that are looked at before other streams have their turn.
const LOOKS_AT_ONCE: usize = 256;

struct Watch {
    cursor: Cursor,
    /// Of locks, which are a store of their own.
    of_locks: bool,
    progress_notify: bool,
    fragment: bool,
    /// It is in the queue.
    queued: bool,
}

/// What a stream needs once it has a watch of locks.
struct LockWatches {
    changes: Changes<i64>,
    ids: Vec<i64>,
}

pub(super) struct WatchStream {
    context: Arc<Context>,
    peer: Arc<Peer>,
    face: Face,
    requests: Streaming<WatchRequest>,
    /// Also wakes when the server stops.
    changes: Changes<i64>,
    /// Runs once a watch wants to be told of progress.
    ticker: Option<Interval>,
    /// What is left of a message that was split. Nothing comes between.
    fragments: VecDeque<Frame>,
    /// Answers to requests, oldest first.
    control: VecDeque<Frame>,
    /// Progress was asked for. The answer follows what there is to say.
    progress_asked: bool,
    watches: BTreeMap<i64, Watch>,
    by_route: HashMap<Route, Vec<i64>>,
    locks: Option<LockWatches>,
    /// Watches whose start lies in the future of what may be another history, and when that is not waited for any longer.
    futures: VecDeque<(Instant, i64)>,
    future_ends: Option<Pin<Box<Sleep>>>,
    /// Watches that may have something to say.
    queue: VecDeque<i64>,
    next_id: i64,
    /// Merged revision up to which changes were looked at.
    seen: i64,
    /// It has said something since then.
    told: bool,
    ended: bool,
}

impl WatchStream {
    pub(super) fn new(
        context: Arc<Context>,
        peer: Arc<Peer>,
        face: Face,
        requests: Streaming<WatchRequest>,
    ) -> Self {
        context.metrics.streams.inc();
        Self {
            peer,
            face,
            requests,
            changes: Changes::from_changes(context.shared.changes()),
            ticker: None,
            fragments: VecDeque::new(),
            control: VecDeque::new(),
            progress_asked: false,
            watches: BTreeMap::new(),
            by_route: HashMap::new(),
            locks: None,
            futures: VecDeque::new(),
            future_ends: None,
            queue: VecDeque::new(),
            next_id: 0,
            seen: context.shared.read(|store| store.merged_revision()),
            told: false,
            ended: false,
            context,
        }
    }

    fn on_request(&mut self, request: WatchRequest) -> Result<(), Status> {
        match request.request_union {
            Some(RequestUnion::CreateRequest(create)) => self.create(create)?,
            Some(RequestUnion::CancelRequest(cancel)) => {
                if let Some(watch) = self.remove(cancel.watch_id) {
                    let header = self.header(watch.of_locks, watch.cursor.route());
                    self.control.push_back(Frame::control(WatchResponse {
                        header: Some(header),
                        watch_id: cancel.watch_id,
                        canceled: true,
                        ..Default::default()
                    }));
                }
            }
            Some(RequestUnion::ProgressRequest(_)) => self.progress_asked = true,
            None => {}
        }
        Ok(())
    }

    /// The store that holds what a watch watches.
    fn store(&self, of_locks: bool) -> &Shared {
        if of_locks {
            &self.context.locks.shared
        } else {
            &self.context.shared
        }
    }

    /// A header of the view, as it is now, as the client is to see it.
    fn header(&self, of_locks: bool, route: &Route) -> ResponseHeader {
        let header = self.store(of_locks).read(|store| store.header(route));
        self.shown(header)
    }

    fn shown(&self, mut header: ResponseHeader) -> ResponseHeader {
        self.context
            .shared
            .read(|store| self.face.show(store, &mut header));
        header
    }

    fn create(&mut self, mut create: WatchCreateRequest) -> Result<(), Status> {
        if create.key.is_empty() {
            // As etcd does: from the first key on.
            create.key = Bytes::from_static(b"\0");
        }
        let range = KeyRange::from_etcd(&create.key, &create.range_end);
        let of_locks = self.context.locks_in(&self.peer, &range).is_some();
        let route = self.context.shared.read(|store| {
            let route = if of_locks {
                Route::Sub(SubId::Own)
            } else {
                store.route(&range)
            };
            self.face.is_served(store, &route).then_some(route)
        });
        let Some(route) = route else {
            return Err(errors::no_leader());
        };
        // What it would have to be told is not known here yet, and may be gone: who asks lists.
        let incomplete = !of_locks && self.context.shared.read(|store| store.is_incomplete(&range));
        let asked_id = create.watch_id;
        let refusal = if range.is_empty() {
            "mvcc: watcher range is empty".to_owned()
        } else if !of_locks && !self.peer.may_read(&range) {
            self.context.metrics.denied.inc();
            format!(
                "rpc error: code = PermissionDenied desc = {}",
                errors::PERMISSION_DENIED
            )
        } else if asked_id != 0 && self.watches.contains_key(&asked_id) {
            "mvcc: duplicate watch ID provided on the WatchStream".to_owned()
        } else if incomplete {
            errors::incomplete().message().to_owned()
        } else if !self.context.take_watch(&self.peer) {
            errors::TOO_MANY_REQUESTS.to_owned()
        } else {
            String::new()
        };
        if !refusal.is_empty() {
            let header = self.header(of_locks, &route);
            self.control.push_back(Frame::control(WatchResponse {
                compact_revision: if incomplete { header.revision.max(1) } else { 0 },
                header: Some(header),
                watch_id: NO_WATCH,
                created: true,
                canceled: true,
                cancel_reason: refusal,
                ..Default::default()
            }));
            return Ok(());
        }
        let has = |filter: FilterType| create.filters.contains(&(filter as i32));
        let start = WatchStart {
            start_revision: create.start_revision,
            no_put: has(FilterType::Noput),
            no_delete: has(FilterType::Nodelete),
            prev_kv: create.prev_kv,
            range,
        };
        let (cursor, header) = self.store(of_locks).read(|store| store.watch(start));
        let id = if asked_id != 0 { asked_id } else { self.free_id() };
        if create.progress_notify && self.ticker.is_none() {
            let mut ticker = interval(self.context.limits.progress_interval);
            ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
            self.ticker = Some(ticker);
        }
        let may_be_deaf = of_locks || self.face.doubts_future(cursor.route());
        if may_be_deaf && create.start_revision > header.revision + 1 {
            self.await_future(id);
        }
        let header = self.shown(header);
        if of_locks {
            let locks = &self.context.locks.shared;
            let watches = self.locks.get_or_insert_with(|| LockWatches {
                changes: Changes::from_changes(locks.changes()),
                ids: Vec::new(),
            });
            watches.ids.push(id);
        } else {
            self.by_route.entry(cursor.route().clone()).or_default().push(id);
        }
        self.watches.insert(
            id,
            Watch {
                cursor,
                of_locks,
                progress_notify: create.progress_notify,
                fragment: create.fragment,
                queued: true,
            },
        );
        self.queue.push_back(id);
        self.context.metrics.watches.inc();
        self.control.push_back(Frame::control(WatchResponse {
            header: Some(header),
            watch_id: id,
            created: true,
            ..Default::default()
        }));
        if !of_locks && create.start_revision > 0 {
            self.end_mistaken(id, &route, create.start_revision);
        }
        Ok(())
    }

    /// Ends a new watch whose start may be meant in an earlier history of its source, for a client that no ID tells of another
    /// one. After a list over the same connection, it is not.
    fn end_mistaken(&mut self, id: i64, route: &Route, start: i64) {
        let found = self.context.shared.read(|store| {
            let (epoch, outlived) = store.mistakable(route)?;
            let mistaken = start <= outlived + 1 && !self.peer.knows(route, epoch);
            mistaken.then(|| store.header(route))
        });
        if let (Face::One, Some(header)) = (self.face, found) {
            self.end(id, header, header.revision.max(1));
        }
    }

    /// IDs that are chosen here are never chosen twice in a stream, also not after a cancel; those that clients chose are free
    /// again then, as with etcd.
    fn free_id(&mut self) -> i64 {
        while self.watches.contains_key(&self.next_id) {
            self.next_id += 1;
        }
        self.next_id += 1;
        self.next_id - 1
    }

    fn remove(&mut self, id: i64) -> Option<Watch> {
        let watch = self.watches.remove(&id)?;
        // Another one may get its ID.
        self.futures.retain(|(_, other)| *other != id);
        if watch.of_locks {
            self.locks
                .iter_mut()
                .for_each(|locks| locks.ids.retain(|other| *other != id));
        } else if let Some(ids) = self.by_route.get_mut(watch.cursor.route()) {
            ids.retain(|other| *other != id);
            if ids.is_empty() {
                self.by_route.remove(watch.cursor.route());
            }
        }
        self.peer.watches_ended(1);
        self.context.metrics.watches.dec();
        Some(watch)
    }

    /// Begins to wait for the start of a watch, not for long.
    fn await_future(&mut self, id: i64) {
        let ends = Instant::now() + self.context.limits.future_watch_wait;
        self.futures.push_back((ends, id));
        if self.future_ends.is_none() {
            self.future_ends = Some(Box::pin(sleep_until(ends)));
        }
    }

    /// Ends the oldest of the watches that wait for a start in the future, unless it has been reached meanwhile.
    fn end_future(&mut self) {
        if let Some((_, id)) = self.futures.pop_front()
            && let Some(watch) = self.watches.get(&id)
            && let Some(header) = self
                .store(watch.of_locks)
                .read(|store| store.future_of(&watch.cursor))
        {
            self.end(id, header, header.revision.max(1));
        }
        self.future_ends = self.futures.front().map(|(ends, _)| Box::pin(sleep_until(*ends)));
    }

    /// Ends a watch whose next events cannot be told: its client has to list.
    fn end(&mut self, id: i64, header: ResponseHeader, compact_revision: i64) {
        self.remove(id);
        self.context.metrics.compacted.inc();
        let header = self.shown(header);
        self.control.push_back(Frame::control(WatchResponse {
            header: Some(header),
            watch_id: id,
            canceled: true,
            compact_revision,
            ..Default::default()
        }));
    }

    /// Queues the watches that the changes since the last time concern.
    fn on_changes(&mut self) {
        let context = self.context.clone();
        context.shared.read(|store| self.queue_changed(store));
    }

    fn queue_changed(&mut self, store: &Store) {
        if store.merged_revision() == self.seen {
            return;
        }
        let merged = self.by_route.get(&Route::Merged).into_iter().flatten();
        let ids: Vec<i64> = match store.changed_since(self.seen) {
            Some(subs) => subs
                .into_iter()
                .flatten()
                .filter_map(|id| self.by_route.get(&Route::Sub(id.clone())))
                .flatten()
                .chain(merged)
                .copied()
                .collect(),
            None => self.by_route.values().flatten().copied().collect(),
        };
        self.seen = store.merged_revision();
        self.told = false;
        ids.into_iter().for_each(|id| self.enqueue(id));
    }

    fn enqueue(&mut self, id: i64) {
        if let Some(watch) = self.watches.get_mut(&id)
            && !std::mem::replace(&mut watch.queued, true)
        {
            self.queue.push_back(id);
        }
    }

    fn on_lock_changes(&mut self) {
        let ids = self.locks.iter().flat_map(|locks| locks.ids.clone());
        ids.collect::<Vec<_>>()
            .into_iter()
            .for_each(|id| self.enqueue(id));
    }

    /// What the next queued watch has to say. Pending = there are many of them, and others have their turn first.
    fn poll_events(&mut self, cx: &mut TaskContext<'_>) -> Poll<Option<Frame>> {
        let mut looks = LOOKS_AT_ONCE;
        while let Some(id) = self.queue.pop_front() {
            if looks == 0 {
                self.queue.push_front(id);
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            looks -= 1;
            // Cancelled meanwhile.
            let Some(watch) = self.watches.get_mut(&id) else {
                continue;
            };
            let (of_locks, fragment, face) = (watch.of_locks, watch.fragment, self.face);
            let next = |store: &Store| {
                let mut next = store.next(&mut watch.cursor);
                if let Some(Next::Events { header, .. }) = &mut next
                    && !of_locks
                {
                    face.show(store, header);
                }
                next
            };
            let shared = if of_locks {
                &self.context.locks.shared
            } else {
                &self.context.shared
            };
            match shared.read(next) {
                None => watch.queued = false,
                Some(Next::Events { header, events, more }) => {
                    watch.queued = more;
                    if more {
                        // Others come first.
                        self.queue.push_back(id);
                    }
                    if !std::mem::replace(&mut self.told, true) {
                        self.context.shared.tells();
                    }
                    self.context.metrics.events.inc_by(events.len() as u64);
                    let header = if of_locks { self.shown(header) } else { header };
                    let head = WatchResponse {
                        header: Some(header),
                        watch_id: id,
                        ..Default::default()
                    };
                    let frame = Frame { head, events };
                    if fragment {
                        self.fragments = frame.into_fragments(FRAGMENT_LEN);
                        return Poll::Ready(self.fragments.pop_front());
                    }
                    return Poll::Ready(Some(frame));
                }
                Some(Next::Compacted {
                    header,
                    compact_revision,
                }) => {
                    self.end(id, header, compact_revision);
                    return Poll::Ready(self.control.pop_front());
                }
            }
        }
        Poll::Ready(None)
    }

    /// Tells watches that have seen everything how far that is: all of them if `asked`, else those that wanted to be told.
    /// While one of those that are asked about has something to say, nothing is said about any: it is asked again then.
    fn progress(&mut self, asked: bool) {
        let context = self.context.clone();
        context.shared.read(|store| {
            // First, so that who is not in the queue has seen all that there is now.
            self.queue_changed(store);
            if asked && !self.queue.is_empty() {
                return;
            }
            let held = |watch: &Watch| !watch.of_locks && store.is_held(&watch.cursor);
            if asked
                && let Some(route) = self.one_view()
                && !self.watches.values().any(held)
            {
                for watch in self.watches.values_mut() {
                    // One that has not begun yet is not told more by this.
                    let _ = store.progress(&mut watch.cursor, true);
                }
                self.say_progress(store, store.header(&route), ALL_WATCHES);
            } else {
                let due = self.watches.iter_mut().filter_map(|(id, watch)| {
                    let wanted = asked || watch.progress_notify;
                    if watch.queued || watch.of_locks || !wanted {
                        return None;
                    }
                    Some((store.progress(&mut watch.cursor, asked)?, *id))
                });
                let due: Vec<_> = due.collect();
                due.into_iter()
                    .for_each(|(header, id)| self.say_progress(store, header, id));
            }
            if asked {
                self.progress_asked = false;
            }
        });
    }

    /// The view that all watches are of, for a client that takes this server for one etcd: one message tells it about all.
    fn one_view(&self) -> Option<Route> {
        let mut routes = self.by_route.keys();
        let first = routes.next().cloned().unwrap_or(Route::Sub(SubId::Own));
        let locks = self.locks.as_ref().is_some_and(|locks| !locks.ids.is_empty());
        (self.face == Face::One && !locks && routes.next().is_none()).then_some(first)
    }

    fn say_progress(&mut self, store: &Store, mut header: ResponseHeader, watch_id: i64) {
        self.face.show(store, &mut header);
        self.control.push_back(Frame::control(WatchResponse {
            header: Some(header),
            watch_id,
            ..Default::default()
        }));
    }

    fn poll(&mut self, cx: &mut TaskContext<'_>) -> Poll<Option<Result<Frame, Status>>> {
        loop {
            let next = self.fragments.pop_front();
            if let Some(frame) = next.or_else(|| self.control.pop_front()) {
                return Poll::Ready(Some(Ok(frame)));
            }
            let mut requests_pending = false;
            while self.control.len() < CONTROL_MAX && !requests_pending {
                match Pin::new(&mut self.requests).poll_next(cx) {
                    Poll::Ready(Some(Ok(request))) => {
                        if let Err(status) = self.on_request(request) {
                            return Poll::Ready(Some(Err(status)));
                        }
                    }
                    Poll::Ready(Some(Err(status))) => return Poll::Ready(Some(Err(status))),
                    // The client is done.
                    Poll::Ready(None) => return Poll::Ready(None),
                    Poll::Pending => requests_pending = true,
                }
            }
            if !self.control.is_empty() {
                continue;
            }
            match self.poll_events(cx) {
                Poll::Ready(Some(frame)) => return Poll::Ready(Some(Ok(frame))),
                Poll::Ready(None) => {}
                Poll::Pending => return Poll::Pending,
            }
            if self.progress_asked {
                self.progress(true);
                continue;
            }
            if self.peer.leaves() {
                // What has changed since the last look is still said.
                self.on_changes();
                if self.queue.is_empty() {
                    return Poll::Ready(Some(Err(errors::stopped())));
                }
                continue;
            }
            match Pin::new(&mut self.changes).poll_next(cx) {
                Poll::Ready(Some(_)) => {
                    self.on_changes();
                    continue;
                }
                Poll::Ready(None) => return Poll::Ready(Some(Err(errors::stopped()))),
                Poll::Pending => {}
            }
            if let Some(locks) = &mut self.locks
                && Pin::new(&mut locks.changes).poll_next(cx).is_ready()
            {
                self.on_lock_changes();
                continue;
            }
            if let Some(ends) = &mut self.future_ends
                && ends.as_mut().poll(cx).is_ready()
            {
                self.end_future();
                continue;
            }
            if let Some(ticker) = &mut self.ticker
                && ticker.poll_tick(cx).is_ready()
            {
                self.progress(false);
                continue;
            }
            return Poll::Pending;
        }
    }
}

impl Stream for WatchStream {
    type Item = Result<Frame, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<Option<Self::Item>> {
        let stream = self.get_mut();
        if stream.ended {
            return Poll::Ready(None);
        }
        let polled = stream.poll(cx);
        stream.ended = matches!(polled, Poll::Ready(None | Some(Err(_))));
        polled
    }
}

impl Drop for WatchStream {
    fn drop(&mut self) {
        self.context.metrics.streams.dec();
        self.peer.watches_ended(self.watches.len());
        self.context.metrics.watches.dec_by(self.watches.len() as i64);
    }
}
