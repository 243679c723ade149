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
use tokio::time::{Interval, MissedTickBehavior, interval};
use tokio_stream::wrappers::WatchStream as Changes;
use tonic::{Status, Streaming};

use super::{Context, Peer, errors, watch::Frame};
use crate::store::{Cursor, Next, Route, WatchStart};

/// Answers that wait to be sent; while there are this many, no request is read.
const CONTROL_MAX: usize = 64;
/// What etcd answers for a watch that was not made.
const NO_WATCH: i64 = -1;

struct Watch {
    cursor: Cursor,
    progress_notify: bool,
    /// It is in the queue.
    queued: bool,
    /// A progress notification was asked for while it had something to say.
    progress_due: bool,
}

pub(super) struct WatchStream {
    context: Arc<Context>,
    peer: Arc<Peer>,
    requests: Streaming<WatchRequest>,
    /// Also wakes when the server stops.
    changes: Changes<i64>,
    /// Runs once a watch wants to be told of progress.
    ticker: Option<Interval>,
    /// Answers to requests, oldest first.
    control: VecDeque<Frame>,
    watches: BTreeMap<i64, Watch>,
    by_route: HashMap<Route, Vec<i64>>,
    /// Watches that may have something to say.
    queue: VecDeque<i64>,
    next_id: i64,
    /// Merged revision up to which changes were looked at.
    seen: i64,
    ended: bool,
}

impl WatchStream {
    pub(super) fn new(context: Arc<Context>, peer: Arc<Peer>, requests: Streaming<WatchRequest>) -> Self {
        context.metrics.streams.inc();
        Self {
            peer,
            requests,
            changes: Changes::from_changes(context.shared.changes()),
            ticker: None,
            control: VecDeque::new(),
            watches: BTreeMap::new(),
            by_route: HashMap::new(),
            queue: VecDeque::new(),
            next_id: 0,
            seen: context.shared.read(|store| store.merged_revision()),
            ended: false,
            context,
        }
    }

    fn on_request(&mut self, request: WatchRequest) -> Result<(), Status> {
        match request.request_union {
            Some(RequestUnion::CreateRequest(create)) => self.create(create)?,
            Some(RequestUnion::CancelRequest(cancel)) => {
                if let Some(watch) = self.remove(cancel.watch_id) {
                    let header = self
                        .context
                        .shared
                        .read(|store| store.header(watch.cursor.route()));
                    self.control.push_back(Frame::control(WatchResponse {
                        header: Some(header),
                        watch_id: cancel.watch_id,
                        canceled: true,
                        ..Default::default()
                    }));
                }
            }
            Some(RequestUnion::ProgressRequest(_)) => self.progress(true),
            None => {}
        }
        Ok(())
    }

    fn create(&mut self, mut create: WatchCreateRequest) -> Result<(), Status> {
        if create.key.is_empty() {
            // As etcd does: from the first key on.
            create.key = Bytes::from_static(b"\0");
        }
        let range = KeyRange::from_etcd(&create.key, &create.range_end);
        let route = self.context.shared.read(|store| {
            let route = store.route(&range);
            store.is_served(&route).then_some(route)
        });
        let Some(route) = route else {
            return Err(errors::no_leader());
        };
        let asked_id = create.watch_id;
        let refusal = if range.is_empty() {
            "mvcc: watcher range is empty".to_owned()
        } else if !self.peer.may_read(&range) {
            self.context.metrics.denied.inc();
            format!(
                "rpc error: code = PermissionDenied desc = {}",
                errors::PERMISSION_DENIED
            )
        } else if asked_id != 0 && self.watches.contains_key(&asked_id) {
            "mvcc: duplicate watch ID provided on the WatchStream".to_owned()
        } else if !self.context.take_watch(&self.peer) {
            errors::TOO_MANY_REQUESTS.to_owned()
        } else {
            String::new()
        };
        if !refusal.is_empty() {
            let header = self.context.shared.read(|store| store.header(&route));
            self.control.push_back(Frame::control(WatchResponse {
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
        let (cursor, header) = self.context.shared.read(|store| store.watch(start));
        let id = if asked_id != 0 { asked_id } else { self.free_id() };
        if create.progress_notify && self.ticker.is_none() {
            let mut ticker = interval(self.context.limits.progress_interval);
            ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
            self.ticker = Some(ticker);
        }
        self.by_route.entry(cursor.route().clone()).or_default().push(id);
        self.watches.insert(
            id,
            Watch {
                cursor,
                progress_notify: create.progress_notify,
                queued: true,
                progress_due: false,
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
        Ok(())
    }

    /// IDs are never used twice in a stream, also not after a cancel.
    fn free_id(&mut self) -> i64 {
        while self.watches.contains_key(&self.next_id) {
            self.next_id += 1;
        }
        self.next_id += 1;
        self.next_id - 1
    }

    fn remove(&mut self, id: i64) -> Option<Watch> {
        let watch = self.watches.remove(&id)?;
        if let Some(ids) = self.by_route.get_mut(watch.cursor.route()) {
            ids.retain(|other| *other != id);
            if ids.is_empty() {
                self.by_route.remove(watch.cursor.route());
            }
        }
        self.peer.watches_ended(1);
        self.context.metrics.watches.dec();
        Some(watch)
    }

    /// Queues the watches that the changes since the last time concern.
    fn on_changes(&mut self) {
        let context = self.context.clone();
        context.shared.read(|store| {
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
                None => self.watches.keys().copied().collect(),
            };
            self.seen = store.merged_revision();
            for id in ids {
                if let Some(watch) = self.watches.get_mut(&id)
                    && !std::mem::replace(&mut watch.queued, true)
                {
                    self.queue.push_back(id);
                }
            }
        });
    }

    /// What the next queued watch has to say.
    fn next_events(&mut self) -> Option<Frame> {
        while let Some(id) = self.queue.pop_front() {
            // Cancelled meanwhile.
            let Some(watch) = self.watches.get_mut(&id) else {
                continue;
            };
            match self.context.shared.read(|store| store.next(&mut watch.cursor)) {
                None => {
                    self.told_all(id);
                    if let Some(progress) = self.control.pop_front() {
                        return Some(progress);
                    }
                }
                Some(Next::Events { header, events, more }) => {
                    if more {
                        // Others come first.
                        self.queue.push_back(id);
                    } else {
                        self.told_all(id);
                    }
                    self.context.metrics.events.inc_by(events.len() as u64);
                    let head = WatchResponse {
                        header: Some(header),
                        watch_id: id,
                        ..Default::default()
                    };
                    return Some(Frame { head, events });
                }
                Some(Next::Compacted {
                    header,
                    compact_revision,
                }) => {
                    self.remove(id);
                    self.context.metrics.compacted.inc();
                    return Some(Frame::control(WatchResponse {
                        header: Some(header),
                        watch_id: id,
                        canceled: true,
                        compact_revision,
                        cancel_reason: "mvcc: required revision has been compacted".to_owned(),
                        ..Default::default()
                    }));
                }
            }
        }
        None
    }

    /// The watch leaves the queue; if progress was asked for meanwhile, the answer follows what it said last.
    fn told_all(&mut self, id: i64) {
        let Some(watch) = self.watches.get_mut(&id) else {
            return;
        };
        watch.queued = false;
        if std::mem::take(&mut watch.progress_due) {
            let shared = &self.context.shared;
            let header = shared.read(|store| store.progress(&mut watch.cursor, true));
            let frame = header.map(|header| progress_frame(header, id));
            self.control.extend(frame);
        }
    }

    /// Tells watches that have seen everything how far that is: all of them if `asked`, else those that wanted to be told.
    fn progress(&mut self, asked: bool) {
        let context = self.context.clone();
        context.shared.read(|store| {
            for (id, watch) in &mut self.watches {
                if watch.queued {
                    watch.progress_due |= asked;
                    continue;
                }
                if !(asked || watch.progress_notify) {
                    continue;
                }
                if let Some(header) = store.progress(&mut watch.cursor, asked) {
                    self.control.push_back(progress_frame(header, *id));
                }
            }
        });
    }

    fn poll(&mut self, cx: &mut TaskContext<'_>) -> Poll<Option<Result<Frame, Status>>> {
        loop {
            if let Some(frame) = self.control.pop_front() {
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
            if let Some(frame) = self.next_events() {
                return Poll::Ready(Some(Ok(frame)));
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

fn progress_frame(header: ResponseHeader, watch_id: i64) -> Frame {
    Frame::control(WatchResponse {
        header: Some(header),
        watch_id,
        ..Default::default()
    })
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
