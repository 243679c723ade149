//! Follows feeds of one upstream over one connection and one watch stream, and hands their changes to a consumer.
//!
//! In: an [`EtcdConfig`] and a set of feeds that may change at any time. Out: [`Update`]s over a bounded channel; while it is
//! full nothing is read from the upstream, whose flow control then holds it back.
//!
//! Invariants: a lost or paused upstream is noticed by HTTP/2 pings, its feeds keep what is known, and the connection is made
//! again with jittered backoff. The decisions about lists and watches are [`crate::follower`]'s. Which client calls is decided
//! by whose store it is ([`crate::client`]); what followers are told does not depend on it.

mod calls;
mod session;
mod stream;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use isthmus_runtime::{Backoff, CancellationToken, backoff};
use tokio::sync::{mpsc, watch};

use crate::{
    client::{Client, Owner},
    config::EtcdConfig,
    connect::Options,
    follower::{Change, Feed, Follower, History, Input},
};
use session::{End, Session};

/// What the upstream told. `feed` is [`Feed::name`].
#[derive(Clone, Debug)]
pub enum Update {
    /// A connection stands and has answered. Feeds that were synced before are still as stale as before, until they say
    /// [`Update::Synced`] again.
    Connected {
        /// The connection, for calls beside.
        client: Client,
    },
    /// The connection is gone, or could not be made. What is known stays, and is stale from now on.
    Disconnected {
        /// Why, for people.
        error: String,
        /// When it is tried again.
        retry_in: Duration,
    },
    /// The feed is listed (again). Changes from here to [`Update::Listed`] are the difference to what was reported before.
    /// A list that is interrupted begins once more, with another of these; what it has reported so far stays reported.
    Listing {
        /// Feed.
        feed: Arc<str>,
        /// The store's cluster ID.
        cluster_id: u64,
        /// Revision of the list.
        revision: i64,
        /// The history is certainly the one that was followed before.
        trusted: bool,
        /// Keys that the feed had when the list began, as the upstream says.
        expected: u64,
    },
    /// What happened before a list, of a feed that asks for it.
    History {
        /// Feed.
        feed: Arc<str>,
        /// What.
        history: History,
    },
    /// The list is at its end; [`Update::Synced`] follows.
    Listed {
        /// Feed.
        feed: Arc<str>,
        /// The store's cluster ID.
        cluster_id: u64,
        /// Revision of the list.
        revision: i64,
        /// Revisions that were reported before the list do not compare with those of the list and after it.
        new_history: bool,
    },
    /// Changes of whole revisions.
    Changes {
        /// Feed.
        feed: Arc<str>,
        /// Everything up to this revision was delivered (in a list: is delivered at its end).
        revision: i64,
        /// In revision order; in a list in key order. May be empty: then only the revision moved.
        changes: Vec<Change>,
    },
    /// What was reported equals the store at this revision, and changes follow as they happen.
    Synced {
        /// Feed.
        feed: Arc<str>,
        /// The store's cluster ID.
        cluster_id: u64,
        /// Revision.
        revision: i64,
    },
    /// The upstream refuses this feed, for example because the certificate has no right to it. It is tried again.
    Failed {
        /// Feed.
        feed: Arc<str>,
        /// Why, for people.
        error: String,
    },
}

/// The set of feeds that are followed. Dropping it changes nothing.
#[derive(Clone, Debug)]
pub struct Feeds(Arc<watch::Sender<BTreeMap<Arc<str>, Feed>>>);

impl Feeds {
    /// Adds a feed, or replaces the one of the same name.
    pub fn add(&self, feed: Feed) {
        self.0.send_if_modified(|feeds| {
            let changed = feeds.get(&feed.name) != Some(&feed);
            feeds.insert(feed.name.clone(), feed);
            changed
        });
    }

    /// Removes a feed. Updates of it that are on their way may still arrive. Added again, it begins with a list.
    pub fn remove(&self, name: &str) {
        self.0.send_if_modified(|feeds| feeds.remove(name).is_some());
    }
}

/// A running follow. It ends when `updates` is dropped or the token is cancelled.
#[derive(Debug)]
pub struct Follow {
    /// What is followed.
    pub feeds: Feeds,
    /// What the upstream told.
    pub updates: mpsc::Receiver<Update>,
    upstream: watch::Sender<EtcdConfig>,
}

impl Follow {
    /// Goes on at another address of the same store, or with other certificates. What is known stays, and is resumed there; if it
    /// is another store after all, that is noticed, and listed.
    pub fn set_upstream(&self, config: EtcdConfig) {
        self.upstream.send_if_modified(|before| {
            let changed = *before != config;
            *before = config;
            changed
        });
    }
}

/// Starts to follow `feeds`.
pub fn follow(
    config: EtcdConfig,
    options: Options,
    feeds: impl IntoIterator<Item = Feed>,
    shutdown: CancellationToken,
) -> Follow {
    follow_in(Owner::Others, config, options, feeds, shutdown)
}

/// Starts to follow `feeds` in `owner`'s store.
pub(crate) fn follow_in(
    owner: Owner,
    config: EtcdConfig,
    options: Options,
    feeds: impl IntoIterator<Item = Feed>,
    shutdown: CancellationToken,
) -> Follow {
    let feeds = feeds.into_iter().map(|feed| (feed.name.clone(), feed)).collect();
    let (feeds, wanted) = watch::channel(feeds);
    let (upstream, config) = watch::channel(config);
    let (sink, updates) = mpsc::channel(options.queue_len_max.max(1));
    tokio::spawn(async move {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = run(owner, config, options, wanted, sink) => {}
        }
    });
    Follow {
        feeds: Feeds(Arc::new(feeds)),
        updates,
        upstream,
    }
}

/// What is kept of a feed from one connection to the next.
struct Followed {
    follower: Follower,
    /// Tells this feed from an earlier one of the same name.
    token: u64,
    /// Halved when a page is too large.
    page_len: i64,
    /// Keys that the feed has, as the first page of the list said.
    expected: u64,
    /// Between lists that did not lead to a lasting watch.
    backoff: Backoff,
}

async fn run(
    owner: Owner,
    mut upstream: watch::Receiver<EtcdConfig>,
    options: Options,
    mut wanted: watch::Receiver<BTreeMap<Arc<str>, Feed>>,
    sink: mpsc::Sender<Update>,
) {
    let mut followed: BTreeMap<Arc<str>, Followed> = BTreeMap::new();
    let mut backoff = Backoff::new(options.retry_base, options.retry_cap);
    let mut tokens = 0;
    loop {
        if let Some(pace) = &options.connects {
            tokio::select! {
                () = tokio::time::sleep(pace.take()) => {}
                () = sink.closed() => return,
            }
        }
        let config = upstream.borrow_and_update().clone();
        let connected = tokio::select! {
            connected = Client::connect_to(owner, &config, &options) => connected,
            Ok(()) = upstream.changed() => continue,
        };
        let error = match connected {
            Err(error) => chain(&error),
            Ok(client) => {
                let mut session = Session::new(client, &options, &mut followed, &mut tokens, &sink);
                let end = session.run(&mut wanted, &mut upstream).await;
                if session.answered() {
                    backoff.reset();
                }
                match end {
                    End::ConsumerGone => return,
                    End::Lost(error) => error,
                }
            }
        };
        for feed in followed.values_mut() {
            feed.follower.on(Input::Disconnected);
        }
        let delay = backoff.next(backoff::random());
        tracing::debug!(error, ?delay, "upstream lost; connecting again");
        let update = Update::Disconnected {
            error,
            retry_in: delay,
        };
        if sink.send(update).await.is_err() {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            Ok(()) = upstream.changed() => backoff.reset(),
            () = sink.closed() => return,
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
