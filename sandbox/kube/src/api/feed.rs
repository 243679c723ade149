//! Events as they happen: [`Feed`] for controllers, over several resources, and [`Watcher`] for the watch verb.
//!
//! Both read the store's history from a cursor when they are woken; there is no queue that could grow. Who falls
//! behind the history is told so.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Weak};

use serde_json::{Value, json};
use tokio::sync::Notify;

use super::KubeApi;
use crate::error::ApiError;
use crate::kind::Kind;
use crate::meta;
use crate::selector::{FieldSelector, LabelSelector};
use crate::store::{Event, EventKind, Object, ResourceId};

/// Who is woken by writes to which resources; none means all.
pub(crate) struct Subscriber {
    interest: Option<BTreeSet<ResourceId>>,
    notify: Weak<Notify>,
}

impl Subscriber {
    /// Wakes the subscriber if the resource interests it; false when it is gone.
    pub(crate) fn wake(&self, resource: &ResourceId) -> bool {
        let Some(notify) = self.notify.upgrade() else {
            return false;
        };
        if self
            .interest
            .as_ref()
            .is_none_or(|interest| interest.contains(resource))
        {
            notify.notify_one();
        }
        true
    }
}

/// What a feed found.
#[derive(Debug)]
pub enum Batch {
    /// Look at everything: this is the start, or events were missed.
    Resync,
    /// These events, in order; not empty.
    Events(Vec<Event>),
}

/// Events of some or all resources, for a controller.
pub struct Feed {
    api: KubeApi,
    interest: Option<BTreeSet<ResourceId>>,
    notify: Arc<Notify>,
    /// None before the first batch.
    cursor: Option<u64>,
}

/// Events that one batch has at most.
const BATCH_LEN_MAX: usize = 512;

impl Feed {
    /// A feed of `resources`, or of all when there are none.
    pub(crate) fn new(api: KubeApi, resources: &[ResourceId]) -> Feed {
        let interest: Option<BTreeSet<ResourceId>> = if resources.is_empty() {
            None
        } else {
            Some(resources.iter().cloned().collect())
        };
        let notify = Arc::new(Notify::new());
        let subscriber = Subscriber {
            interest: interest.clone(),
            notify: Arc::downgrade(&notify),
        };
        api.state().subscribers.push(subscriber);
        Feed {
            api,
            interest,
            notify,
            cursor: None,
        }
    }

    /// The next batch; waits until there is one. Cancel safe.
    pub async fn next(&mut self) -> Batch {
        loop {
            if let Some(batch) = self.poll() {
                return batch;
            }
            self.notify.notified().await;
        }
    }

    /// What there is now.
    pub fn poll(&mut self) -> Option<Batch> {
        let state = self.api.state();
        let revision = state.store.revision();
        let Some(cursor) = self.cursor else {
            self.cursor = Some(revision);
            return Some(Batch::Resync);
        };
        let mut events: Vec<Event> = Vec::new();
        let resources: Vec<&ResourceId> = match &self.interest {
            Some(interest) => interest.iter().collect(),
            None => state.store.resources().collect(),
        };
        for resource in resources {
            match state.store.since(resource, cursor) {
                Ok(found) => events.extend(found.take(BATCH_LEN_MAX).cloned()),
                Err(_) => {
                    self.cursor = Some(revision);
                    return Some(Batch::Resync);
                }
            }
        }
        events.sort_by_key(|event| event.revision);
        // Each resource gave its oldest ones, so the oldest of all are complete.
        if events.len() >= BATCH_LEN_MAX {
            events.truncate(BATCH_LEN_MAX);
            self.cursor = events.last().map(|event| event.revision);
        } else {
            self.cursor = Some(revision);
        }
        if events.is_empty() {
            None
        } else {
            Some(Batch::Events(events))
        }
    }
}

/// Options of the watch verb.
#[derive(Clone, Debug, Default)]
pub struct WatchOptions {
    /// Events after this revision; none or 0 starts with the current objects.
    pub resource_version: Option<u64>,
    /// Only objects with these labels.
    pub labels: LabelSelector,
    /// Only objects with these fields.
    pub fields: FieldSelector,
    /// Whether the client wants bookmarks.
    pub bookmarks: bool,
    /// Start with the current objects and mark their end (streaming list).
    pub send_initial_events: bool,
}

/// What a watcher yields.
#[derive(Clone, Debug)]
pub enum WatchEvent {
    /// The object is new, or begins to match.
    Added(Arc<Object>),
    /// The object changed.
    Modified(Arc<Object>),
    /// The object is gone, or does not match any more.
    Deleted(Arc<Object>),
    /// Everything up to this revision has been seen; `initial_end` marks the end of the initial events.
    Bookmark {
        /// The revision.
        revision: u64,
        /// Whether the initial events end here.
        initial_end: bool,
    },
    /// The watch cannot go on; list again.
    Failed(ApiError),
}

/// A running watch of one resource.
pub struct Watcher {
    feed: Feed,
    kind: Arc<Kind>,
    namespace: Option<String>,
    options: WatchOptions,
    pending: VecDeque<WatchEvent>,
    over: bool,
}

impl Watcher {
    pub(crate) fn start(
        api: &KubeApi,
        kind: Arc<Kind>,
        namespace: Option<&str>,
        options: WatchOptions,
    ) -> Result<Watcher, ApiError> {
        let mut feed = Feed::new(api.clone(), std::slice::from_ref(&kind.storage));
        let state = api.state();
        let revision = state.store.revision();
        let mut pending = VecDeque::new();
        let from = options.resource_version.filter(|r| *r > 0);
        if let Some(asked) = from.filter(|asked| *asked > revision) {
            return Err(ApiError::too_large_revision(asked, revision));
        }
        match from {
            Some(from) if !options.send_initial_events => {
                if let Err(compacted) = state.store.since(&kind.storage, from) {
                    return Err(ApiError::expired(from, compacted.oldest));
                }
                feed.cursor = Some(from);
            }
            _ => {
                let objects = state.store.scan(&kind.storage, namespace, None);
                let matching = objects
                    .filter(|o| options.labels.matches(o.value()) && options.fields.matches(o.value()));
                pending.extend(matching.map(|o| WatchEvent::Added(o.clone())));
                if options.send_initial_events {
                    pending.push_back(WatchEvent::Bookmark {
                        revision,
                        initial_end: true,
                    });
                }
                feed.cursor = Some(revision);
            }
        }
        drop(state);
        let namespace = namespace.map(str::to_owned);
        Ok(Watcher {
            feed,
            kind,
            namespace,
            options,
            pending,
            over: false,
        })
    }

    /// The kind that is watched.
    pub fn kind(&self) -> &Arc<Kind> {
        &self.kind
    }

    /// Whether the client wants bookmarks.
    pub fn wants_bookmarks(&self) -> bool {
        self.options.bookmarks
    }

    /// A bookmark at what has been delivered, if nothing waits.
    pub fn bookmark(&self) -> Option<WatchEvent> {
        let revision = self.feed.cursor.filter(|_| self.pending.is_empty())?;
        Some(WatchEvent::Bookmark {
            revision,
            initial_end: false,
        })
    }

    /// The next event; none after a failure. Cancel safe.
    pub async fn next(&mut self) -> Option<WatchEvent> {
        loop {
            if let Some(event) = self.pending.pop_front() {
                return Some(event);
            }
            if self.over {
                return None;
            }
            match self.feed.next().await {
                Batch::Events(events) => {
                    for event in events {
                        self.pending.extend(self.translate(event));
                    }
                }
                Batch::Resync => {
                    self.over = true;
                    let revision = self.feed.api.revision();
                    return Some(WatchEvent::Failed(ApiError::expired(
                        self.feed.cursor.unwrap_or(0),
                        revision,
                    )));
                }
            }
        }
    }

    /// An event that is there without waiting.
    pub fn try_next(&mut self) -> Option<WatchEvent> {
        self.pending.pop_front()
    }

    /// What an event means to this watcher, whose selectors the object may begin or cease to match.
    fn translate(&self, event: Event) -> Option<WatchEvent> {
        if self
            .namespace
            .as_ref()
            .is_some_and(|ns| *ns != event.key.namespace)
        {
            return None;
        }
        let fits = |o: &Arc<Object>| {
            self.options.labels.matches(o.value()) && self.options.fields.matches(o.value())
        };
        let before = event.previous.as_ref().is_some_and(fits);
        let after = event.kind != EventKind::Deleted && fits(&event.object);
        match (before, after) {
            (false, true) => Some(WatchEvent::Added(event.object)),
            (true, true) => Some(WatchEvent::Modified(event.object)),
            (true, false) if event.kind == EventKind::Deleted => Some(WatchEvent::Deleted(event.object)),
            (true, false) => {
                // The last state that matched, at the revision that ended it.
                let mut last = event.previous.map(|o| o.value().clone()).unwrap_or(Value::Null);
                meta::metadata_mut(&mut last)
                    .insert("resourceVersion".into(), json!(event.revision.to_string()));
                Some(WatchEvent::Deleted(Arc::new(Object::detached(last))))
            }
            (false, false) => None,
        }
    }
}
