//! One connection: asks what the followers want asked, and gives them the answers.
//!
//! Watches are created one at a time, as etcd's own client does: a created answer does not say which request it is for.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use isthmus_proto::etcdserverpb::{
    WatchCancelRequest, WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse,
    watch_request::RequestUnion,
};
use isthmus_runtime::{Backoff, backoff};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

use super::{
    Followed, Update,
    calls::{Answer, Asked, Call, answer, concerns_feed_only, next_page_len},
    stream::{Stream, StreamEvent},
};
use crate::{
    client::{CallError, Client, header},
    config::EtcdConfig,
    connect::Options,
    follower::{Effect, Feed, Follower, Input},
};

/// Requests that wait for the watch stream: at most one create, and cancels.
const REQUESTS_MAX: usize = 1024;

/// A feed that is refused is asked for again after this time at most: the upstream answers, so asking is cheap.
const FEED_RETRY_CAP: Duration = Duration::from_secs(5);

/// The watch that etcd names when it answers for all.
const ALL_WATCHES: i64 = -1;

/// How a session ended.
pub(super) enum End {
    ConsumerGone,
    Lost(String),
}

type Answers = FuturesUnordered<BoxFuture<'static, (Asked, Result<Answer, CallError>)>>;

/// A watch that is to be made.
struct Create {
    feed: Arc<str>,
    token: u64,
    start_revision: i64,
    prev_kv: bool,
}

pub(super) struct Session<'a> {
    client: Client,
    options: &'a Options,
    followed: &'a mut BTreeMap<Arc<str>, Followed>,
    tokens: &'a mut u64,
    sink: &'a mpsc::Sender<Update>,
    answered: bool,
    answers: Answers,
    stream: Stream,
    requests: Option<mpsc::Sender<WatchRequest>>,
    /// The feed whose create is unanswered.
    creating: Option<(Arc<str>, u64)>,
    /// When that answer is overdue: all others wait behind it.
    creating_until: Instant,
    to_create: VecDeque<Create>,
    watches: HashMap<i64, (Arc<str>, u64)>,
}

impl<'a> Session<'a> {
    pub(super) fn new(
        client: Client,
        options: &'a Options,
        followed: &'a mut BTreeMap<Arc<str>, Followed>,
        tokens: &'a mut u64,
        sink: &'a mpsc::Sender<Update>,
    ) -> Self {
        Self {
            client,
            options,
            followed,
            tokens,
            sink,
            answered: false,
            answers: FuturesUnordered::new(),
            stream: Stream::None,
            requests: None,
            creating: None,
            creating_until: Instant::now(),
            to_create: VecDeque::new(),
            watches: HashMap::new(),
        }
    }

    /// Whether the upstream answered anything.
    pub(super) fn answered(&self) -> bool {
        self.answered
    }

    /// Runs until the connection is lost, or `upstream` names another one to make.
    pub(super) async fn run(
        &mut self,
        wanted: &mut watch::Receiver<BTreeMap<Arc<str>, Feed>>,
        upstream: &mut watch::Receiver<EtcdConfig>,
    ) -> End {
        let mut feeds_open = true;
        let result = async {
            let names: Vec<Arc<str>> = self.followed.keys().cloned().collect();
            for name in names {
                self.input(&name, Input::Connected).await?;
            }
            let feeds = wanted.borrow_and_update().clone();
            self.on_wanted(feeds).await?;
            loop {
                tokio::select! {
                    // In this order: an answer that has come is no overdue one, also if we were busy meanwhile.
                    biased;
                    // Not around this loop: what a follower was given must reach the consumer.
                    Ok(()) = upstream.changed() => {
                        return Err(End::Lost("its configuration was changed".to_owned()));
                    }
                    changed = wanted.changed(), if feeds_open => {
                        feeds_open = changed.is_ok();
                        let feeds = wanted.borrow_and_update().clone();
                        self.on_wanted(feeds).await?;
                    }
                    Some((asked, result)) = self.answers.next() => self.on_answer(asked, result).await?,
                    event = self.stream.next() => self.on_stream(event).await?,
                    () = tokio::time::sleep_until(self.creating_until), if self.creating.is_some() => {
                        let patience = self.options.call_timeout;
                        return Err(End::Lost(format!("no answer to a watch request within {patience:?}")));
                    }
                    () = self.sink.closed() => return Err(End::ConsumerGone),
                }
            }
        };
        match result.await {
            Ok(never) => never,
            Err(end) => end,
        }
    }

    async fn on_wanted(&mut self, wanted: BTreeMap<Arc<str>, Feed>) -> Result<(), End> {
        let gone: Vec<Arc<str>> = self
            .followed
            .iter()
            .filter(|(name, followed)| wanted.get(*name) != Some(followed.follower.feed()))
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            self.unwatch(&name).await?;
            self.followed.remove(&name);
        }
        for (name, feed) in wanted {
            if self.followed.contains_key(&name) {
                continue;
            }
            *self.tokens += 1;
            let followed = Followed {
                follower: Follower::new(feed),
                token: *self.tokens,
                page_len: self.options.page_len.max(1),
                expected: 0,
                backoff: Backoff::new(
                    self.options.retry_base,
                    self.options.retry_cap.min(FEED_RETRY_CAP),
                ),
            };
            self.followed.insert(name.clone(), followed);
            self.input(&name, Input::Connected).await?;
        }
        Ok(())
    }

    /// Gives a follower an input and does what it wants done.
    async fn input(&mut self, name: &Arc<str>, input: Input) -> Result<(), End> {
        let Some(followed) = self.followed.get_mut(name) else {
            return Ok(());
        };
        let connects = matches!(
            &input,
            Input::Connected | Input::Checked { .. } | Input::CheckFailed
        );
        let events = matches!(&input, Input::Events { .. });
        let effects = followed.follower.on(input);
        // A watch that was refused or compacted, or an answer of another history than the one before, leads to a list; one
        // that follows another closely waits. Whoever answers so every time must not keep us busy.
        let lists = |effect: &Effect| matches!(effect, Effect::List { revision: 0, .. });
        let delay = if !connects && effects.iter().any(lists) {
            followed.backoff.next(backoff::random())
        } else {
            Duration::ZERO
        };
        if events && delay.is_zero() {
            followed.backoff.reset();
        }
        let (token, page_len, expected) = (followed.token, followed.page_len, followed.expected);
        for effect in effects {
            match effect {
                Effect::List { start, revision } => {
                    let call = Call::List {
                        start,
                        revision,
                        page_len,
                    };
                    self.ask(name, token, call, delay);
                }
                Effect::Check { key, revision } => {
                    self.ask(name, token, Call::Check { key, revision }, delay)
                }
                Effect::Watch {
                    start_revision,
                    prev_kv,
                } => {
                    self.to_create.push_back(Create {
                        feed: name.clone(),
                        token,
                        start_revision,
                        prev_kv,
                    });
                    self.create_next().await?;
                }
                Effect::AskProgress => {
                    let ask = RequestUnion::ProgressRequest(WatchProgressRequest {});
                    self.request(ask).await?;
                }
                Effect::History(history) => {
                    let feed = name.clone();
                    self.send(Update::History { feed, history }).await?;
                }
                Effect::Unwatch => self.unwatch(name).await?,
                Effect::Listing { header, trusted } => {
                    self.send(Update::Listing {
                        feed: name.clone(),
                        cluster_id: header.cluster_id,
                        revision: header.revision,
                        trusted,
                        expected,
                    })
                    .await?;
                }
                Effect::Listed { header, new_history } => {
                    self.send(Update::Listed {
                        feed: name.clone(),
                        cluster_id: header.cluster_id,
                        revision: header.revision,
                        new_history,
                    })
                    .await?;
                }
                Effect::Changes { revision, changes } => {
                    self.send(Update::Changes {
                        feed: name.clone(),
                        revision,
                        changes,
                    })
                    .await?;
                }
                Effect::Synced { header } => {
                    self.send(Update::Synced {
                        feed: name.clone(),
                        cluster_id: header.cluster_id,
                        revision: header.revision,
                    })
                    .await?;
                }
            }
        }
        Ok(())
    }

    async fn send(&mut self, update: Update) -> Result<(), End> {
        self.sink.send(update).await.map_err(|_| End::ConsumerGone)
    }

    async fn on_first_answer(&mut self) -> Result<(), End> {
        if !self.answered {
            self.answered = true;
            self.send(Update::Connected {
                client: self.client.clone(),
            })
            .await?;
        }
        Ok(())
    }

    // Unary calls.

    fn ask(&mut self, name: &Arc<str>, token: u64, call: Call, delay: Duration) {
        let Some(followed) = self.followed.get(name) else {
            return;
        };
        let delay = match (&self.options.lists, &call) {
            (Some(pace), Call::List { revision: 0, .. }) => delay.max(pace.take()),
            _ => delay,
        };
        let feed = followed.follower.feed().clone();
        let client = self.client.clone();
        let asked = Asked {
            feed: name.clone(),
            token,
            call,
        };
        self.answers.push(Box::pin(async move {
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            let result = answer(&client, &feed, &asked.call).await;
            (asked, result)
        }));
    }

    async fn on_answer(&mut self, asked: Asked, result: Result<Answer, CallError>) -> Result<(), End> {
        let Some(followed) = self.followed.get_mut(&asked.feed) else {
            return Ok(());
        };
        if followed.token != asked.token {
            return Ok(());
        }
        let error = match result {
            Ok(answer) => {
                if let (
                    Answer::Page(_, page),
                    Call::List {
                        revision, page_len, ..
                    },
                ) = (&answer, &asked.call)
                {
                    if *revision == 0 {
                        followed.expected = u64::try_from(page.count).unwrap_or(0);
                    }
                    let (keys, bytes) = (
                        page.kvs.len(),
                        page.kvs.iter().map(|kv| kv.key.len() + kv.value.len()).sum(),
                    );
                    followed.page_len = next_page_len(*page_len, self.options.page_len.max(1), keys, bytes);
                }
                self.on_first_answer().await?;
                let input = match answer {
                    Answer::Page(header, page) => Input::Page {
                        header,
                        kvs: page.kvs,
                        more: page.more,
                        unreadable: matches!(asked.call, Call::Key { .. }),
                    },
                    Answer::Checked {
                        header,
                        mod_revision,
                        count,
                    } => Input::Checked {
                        header,
                        mod_revision,
                        count,
                    },
                };
                return self.input(&asked.feed, input).await;
            }
            Err(error) => error,
        };
        match (error, asked.call) {
            (error @ (CallError::Compacted | CallError::Future), Call::Check { revision, .. }) => {
                tracing::debug!(feed = %asked.feed, revision, %error, "cannot resume; listing again");
                self.input(&asked.feed, Input::CheckFailed).await
            }
            (CallError::Compacted | CallError::Future, Call::List { .. } | Call::Key { .. }) => {
                self.input(&asked.feed, Input::PageCompacted).await
            }
            (
                CallError::TooLarge(_),
                Call::List {
                    start,
                    revision,
                    page_len,
                },
            ) => {
                let call = if page_len > 1 {
                    followed.page_len = page_len / 2;
                    Call::List {
                        start,
                        revision,
                        page_len: page_len / 2,
                    }
                } else {
                    Call::Key { start, revision }
                };
                self.ask(&asked.feed, asked.token, call, Duration::ZERO);
                Ok(())
            }
            (error, call) if concerns_feed_only(&error) => {
                let delay = followed.backoff.next(backoff::random());
                self.ask(&asked.feed, asked.token, call, delay);
                self.on_first_answer().await?;
                self.send(Update::Failed {
                    feed: asked.feed,
                    error: error.to_string(),
                })
                .await
            }
            (error, _) => Err(End::Lost(error.to_string())),
        }
    }

    // Watches.

    async fn create_next(&mut self) -> Result<(), End> {
        while self.creating.is_none() {
            let Some(next) = self.to_create.pop_front() else {
                return Ok(());
            };
            let Some(followed) = self
                .followed
                .get(&next.feed)
                .filter(|followed| followed.token == next.token)
            else {
                continue;
            };
            let feed = followed.follower.feed();
            let create = WatchCreateRequest {
                key: feed.key.clone(),
                range_end: feed.range_end.clone(),
                start_revision: next.start_revision,
                prev_kv: next.prev_kv,
                // Moves the position of a quiet feed, which keeps it clear of compaction.
                progress_notify: true,
                ..Default::default()
            };
            self.creating = Some((next.feed, next.token));
            self.creating_until = Instant::now() + self.options.call_timeout;
            self.request(RequestUnion::CreateRequest(create)).await?;
        }
        Ok(())
    }

    async fn request(&mut self, union: RequestUnion) -> Result<(), End> {
        let requests = match &self.requests {
            Some(requests) => requests.clone(),
            None => {
                let (sender, receiver) = mpsc::channel(REQUESTS_MAX);
                let client = self.client.clone();
                self.stream = Stream::Opening(Box::pin(async move { client.watch(receiver).await }));
                self.requests = Some(sender.clone());
                sender
            }
        };
        // Waiting here could wait for ever: nobody reads the answers meanwhile.
        requests
            .try_send(WatchRequest {
                request_union: Some(union),
            })
            .map_err(|_| End::Lost("the watch stream takes no requests".to_owned()))
    }

    async fn unwatch(&mut self, name: &Arc<str>) -> Result<(), End> {
        self.to_create.retain(|queued| queued.feed != *name);
        let ids: Vec<i64> = self
            .watches
            .iter()
            .filter(|(_, (watched, _))| watched == name)
            .map(|(id, _)| *id)
            .collect();
        for watch_id in ids {
            self.watches.remove(&watch_id);
            self.request(RequestUnion::CancelRequest(WatchCancelRequest { watch_id }))
                .await?;
        }
        Ok(())
    }

    async fn on_stream(&mut self, event: StreamEvent) -> Result<(), End> {
        let (end, too_large) = match event {
            StreamEvent::Opened(Ok(stream)) => {
                self.stream = Stream::Open(Box::new(stream));
                return Ok(());
            }
            StreamEvent::Message(Ok(Some(message))) => return self.on_message(message).await,
            StreamEvent::Message(Ok(None)) => {
                (End::Lost("the server ended the watch stream".to_owned()), false)
            }
            StreamEvent::Opened(Err(error)) => {
                let too_large = matches!(error, CallError::TooLarge(_));
                (End::Lost(error.to_string()), too_large)
            }
            StreamEvent::Message(Err(status)) => {
                let error = self.client.error(status);
                let too_large = matches!(error, CallError::TooLarge(_));
                (End::Lost(error.to_string()), too_large)
            }
        };
        if too_large {
            self.on_too_large().await?;
        }
        Err(end)
    }

    /// A message of the stream cannot be read. Resuming would meet the same message again; a list reads it in parts or passes it
    /// by. It most likely is of the history, if that is on its way, and that can be done without.
    async fn on_too_large(&mut self) -> Result<(), End> {
        let history = self.followed.values().any(|feed| feed.follower.awaits_history());
        let mut lost = Vec::new();
        for (name, followed) in self.followed.iter_mut() {
            if followed.follower.awaits_history() == history {
                let effects = followed.follower.on(Input::Canceled { compacted: 0 });
                let told = effects.into_iter().filter_map(|effect| match effect {
                    Effect::History(history) => Some(history),
                    // The connection ends here; the next one asks again.
                    _ => None,
                });
                lost.extend(told.map(|history| (name.clone(), history)));
            }
        }
        for (feed, history) in lost {
            self.send(Update::History { feed, history }).await?;
        }
        Ok(())
    }

    async fn on_message(&mut self, message: WatchResponse) -> Result<(), End> {
        let header = header(message.header.as_ref()).map_err(|error| End::Lost(error.to_string()))?;
        self.on_first_answer().await?;
        if message.created {
            let Some((name, token)) = self.creating.take() else {
                return Ok(());
            };
            let known = self
                .followed
                .get(&name)
                .is_some_and(|followed| followed.token == token);
            match (known, message.canceled) {
                (true, true) => {
                    let error = format!("watch refused: {}", message.cancel_reason);
                    self.send(Update::Failed {
                        feed: name.clone(),
                        error,
                    })
                    .await?;
                    self.input(&name, Input::Canceled { compacted: 0 }).await?;
                }
                (true, false) => {
                    self.watches.insert(message.watch_id, (name.clone(), token));
                    self.input(&name, Input::Created { header }).await?;
                }
                (false, true) => {}
                (false, false) => {
                    let cancel = WatchCancelRequest {
                        watch_id: message.watch_id,
                    };
                    self.request(RequestUnion::CancelRequest(cancel)).await?;
                }
            }
            return self.create_next().await;
        }
        if message.canceled {
            let Some((name, _)) = self.watches.remove(&message.watch_id) else {
                return Ok(());
            };
            tracing::debug!(feed = %name, compacted = message.compact_revision, reason = message.cancel_reason, "watch ended; listing again");
            let compacted = message.compact_revision;
            return self.input(&name, Input::Canceled { compacted }).await;
        }
        if message.watch_id == ALL_WATCHES && message.events.is_empty() {
            let waiting = |name: &Arc<str>| {
                let followed = self.followed.get(name);
                followed.is_some_and(|followed| followed.follower.awaits_history())
            };
            let names = self.watches.values().map(|(name, _)| name.clone());
            for name in names.filter(waiting).collect::<Vec<_>>() {
                self.input(&name, Input::NoProof).await?;
            }
            return Ok(());
        }
        match self.watches.get(&message.watch_id).cloned() {
            Some((name, _)) => {
                self.input(
                    &name,
                    Input::Events {
                        header,
                        events: message.events,
                    },
                )
                .await
            }
            None => Ok(()),
        }
    }
}
