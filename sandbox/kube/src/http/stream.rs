//! The watch verb over HTTP: a line of JSON per event, as soon as it happens.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::response::Response;
use http::header;
use serde_json::{Value, json};
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::accept::Accept;
use super::table;
use crate::api::{WatchEvent, Watcher};
use crate::store::Object;

/// How often a bookmark is sent.
const BOOKMARK_PERIOD: Duration = Duration::from_secs(30);

/// How long a watch lasts when the client does not say.
const WATCH_TIMEOUT: Duration = Duration::from_secs(45 * 60);

/// Bytes that one piece of the stream has, about, at most.
const PIECE_LEN: usize = 256 * 1024;

struct Running {
    watcher: Watcher,
    accept: Accept,
    deadline: Instant,
    bookmarks: Interval,
    shutdown: CancellationToken,
    over: bool,
    with_columns: bool,
}

/// The response of a watch; ends after `timeout`, on shutdown, or when the client goes.
pub fn watch(
    watcher: Watcher,
    accept: Accept,
    timeout: Option<Duration>,
    shutdown: CancellationToken,
) -> Response {
    let start = Instant::now();
    let mut bookmarks = tokio::time::interval_at(start + BOOKMARK_PERIOD, BOOKMARK_PERIOD);
    bookmarks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let deadline = start + timeout.unwrap_or(WATCH_TIMEOUT);
    let running = Running {
        watcher,
        accept,
        deadline,
        bookmarks,
        shutdown,
        over: false,
        with_columns: true,
    };
    let stream = futures::stream::unfold(running, |mut running| async move {
        let piece = running.next_piece().await?;
        Some((Ok::<Bytes, std::convert::Infallible>(piece), running))
    });
    let mut response = Response::new(Body::from_stream(stream));
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static("application/json"),
    );
    response
}

impl Running {
    /// The next event and all others that are there, or none at the end.
    async fn next_piece(&mut self) -> Option<Bytes> {
        if self.over {
            return None;
        }
        let first = tokio::select! {
            biased;
            () = self.shutdown.cancelled() => return None,
            event = self.watcher.next() => event?,
            _ = self.bookmarks.tick(), if self.watcher.wants_bookmarks() => self.watcher.bookmark()?,
            () = tokio::time::sleep_until(self.deadline) => {
                self.over = true;
                if !self.watcher.wants_bookmarks() {
                    return None;
                }
                self.watcher.bookmark()?
            }
        };
        let mut piece = Vec::new();
        self.encode(first, &mut piece);
        while piece.len() < PIECE_LEN
            && let Some(event) = self.watcher.try_next()
        {
            self.encode(event, &mut piece);
        }
        Some(piece.into())
    }

    fn encode(&mut self, event: WatchEvent, piece: &mut Vec<u8>) {
        let (kind, object) = match event {
            WatchEvent::Added(object) => ("ADDED", self.object(&object)),
            WatchEvent::Modified(object) => ("MODIFIED", self.object(&object)),
            WatchEvent::Deleted(object) => ("DELETED", self.object(&object)),
            WatchEvent::Bookmark {
                revision,
                initial_end,
            } => ("BOOKMARK", self.bookmark(revision, initial_end)),
            WatchEvent::Failed(error) => {
                self.over = true;
                ("ERROR", error.status().to_string().into())
            }
        };
        piece.extend_from_slice(b"{\"type\":\"");
        piece.extend_from_slice(kind.as_bytes());
        piece.extend_from_slice(b"\",\"object\":");
        piece.extend_from_slice(&object);
        piece.extend_from_slice(b"}\n");
    }

    fn object(&mut self, object: &Arc<Object>) -> Bytes {
        let kind = self.watcher.kind();
        match self.accept {
            Accept::Table(version) => {
                let mut table = table::render(kind, &[kind.to_wire(object.value())], version, true);
                if !std::mem::take(&mut self.with_columns)
                    && let Some(map) = table.as_object_mut()
                {
                    map.insert("columnDefinitions".into(), Value::Null);
                }
                table.to_string().into()
            }
            Accept::Metadata => table::only_metadata(object.value()).to_string().into(),
            _ if kind.is_storage_version() => object.json(),
            _ => kind.to_wire(object.value()).to_string().into(),
        }
    }

    fn bookmark(&self, revision: u64, initial_end: bool) -> Bytes {
        let kind = self.watcher.kind();
        let mut metadata = json!({"resourceVersion": revision.to_string(), "creationTimestamp": null});
        if initial_end {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let object = match self.accept {
            Accept::Table(version) => json!({
                "kind": "Table",
                "apiVersion": format!("meta.k8s.io/{version}"),
                "metadata": {"resourceVersion": revision.to_string()},
                "columnDefinitions": null,
                "rows": [],
            }),
            Accept::Metadata => {
                json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata})
            }
            _ => empty_of(kind, metadata),
        };
        object.to_string().into()
    }
}

/// A bookmark has the kind's type and no content; clients that decode it into the type must succeed.
fn empty_of(kind: &crate::kind::Kind, metadata: Value) -> Value {
    let bare = json!({"kind": kind.kind, "apiVersion": kind.api_version(), "metadata": metadata});
    match kind
        .check
        .filter(|_| kind.is_storage_version())
        .map(|check| check(&bare))
    {
        Some(Ok(full)) => full,
        _ => bare,
    }
}
