//! A remote cluster step by step, without a connection.

use isthmus_model::ClusterId;
use isthmus_wire::status::Phase;

use super::*;
use crate::store::HistoryLimits;

pub(super) struct World {
    pub(super) store: Store,
    ids: ClusterIds,
    pub(super) remote: Remote,
}

impl World {
    fn new() -> Self {
        Self::with_grants(Grants::default())
    }

    pub(super) fn with_grants(grants: Grants) -> Self {
        let limits = HistoryLimits::default();
        let max = MaxConnectedClusters::C255;
        Self {
            store: Store::new(ClusterName::new("c1").unwrap(), 5, limits, limits),
            ids: ClusterIds::new(ClusterId::new(1, max).unwrap()),
            remote: Remote::new(ClusterName::new("c2").unwrap(), max, grants),
        }
    }

    pub(super) fn on(&mut self, update: Update, now_ms: u64) -> Vec<FeedChange> {
        self.remote.on(&mut self.store, &mut self.ids, update, now_ms)
    }

    fn beat(&mut self, value: &'static str, now_ms: u64) {
        let change = Change::Put {
            key: HEARTBEAT.into(),
            value: value.into(),
            create_revision: 1,
            mod_revision: 1,
            version: 1,
        };
        let update = Update::Changes {
            feed: HEARTBEAT.into(),
            revision: 1,
            changes: vec![change],
        };
        self.on(update, now_ms);
    }

    fn synced(&mut self, feed: &str, now_ms: u64) {
        let update = Update::Synced {
            feed: feed.into(),
            cluster_id: 9,
            revision: 1,
        };
        self.on(update, now_ms);
    }

    fn at(&mut self, now_ms: u64) -> &RemoteStatus {
        self.remote.on_tick(&mut self.store, &mut self.ids, now_ms);
        &self.remote.status
    }
}

#[test]
fn a_stopped_heart_is_told_of_while_the_connection_stands() {
    let mut world = World::new();
    world.beat("1", 1_000);
    world.synced(HEARTBEAT, 1_000);
    assert!(!world.at(121_000).stale);
    let status = world.at(121_001);
    assert!(status.stale && status.status.contains("heartbeat"), "{status:?}");
    assert_eq!(status.heartbeat_seen_ms, 1_000);

    // The same value again, from a server that started again with its etcd still away.
    world.on(
        Update::Disconnected {
            error: "gone".to_owned(),
            retry_in: std::time::Duration::from_secs(1),
        },
        130_000,
    );
    let status = world.at(130_000);
    assert!(!status.stale && status.status == "gone", "{status:?}");
    world.beat("1", 131_000);
    world.synced(HEARTBEAT, 131_000);
    assert!(world.at(131_000).stale);
    world.beat("2", 140_000);
    assert!(!world.at(140_000).stale);
}

#[test]
fn a_heart_that_never_beat_is_told_of_too() {
    let mut world = World::new();
    assert!(!world.at(1_000_000).stale, "no connection yet");
    world.synced(HEARTBEAT, 1_000_000);
    assert!(!world.at(1_120_000).stale);
    assert!(world.at(1_120_001).stale);
}

impl World {
    /// Its config says this ID; the feeds that follow.
    fn config(&mut self, id: u32) -> Vec<FeedChange> {
        self.config_text(format!("{{\"id\":{id}}}"))
    }

    /// The same with all kinds; the feeds of objects.
    pub(super) fn config_with_slices(&mut self, id: u32) -> Vec<Feed> {
        let changes = self.config_text(format!("{{\"id\":{id},\"isthmus\":{{\"slices\":1}}}}"));
        let feeds = changes.into_iter().filter_map(|change| match change {
            FeedChange::Add(feed) => Some(feed),
            FeedChange::Remove(_) => None,
        });
        feeds.collect()
    }

    fn config_text(&mut self, text: String) -> Vec<FeedChange> {
        let key = keys::cluster_config(&ClusterName::new("c2").unwrap());
        let change = Change::Put {
            key: key.clone().into(),
            value: text.into(),
            create_revision: 1,
            mod_revision: 1,
            version: 1,
        };
        let update = Update::Changes {
            feed: key.as_str().into(),
            revision: 1,
            changes: vec![change],
        };
        self.on(update, 0)
    }
}

#[test]
fn another_id_is_read_by_other_feeds() {
    let mut world = World::new();
    let first = world.config(2);
    let names = |changes: &[FeedChange]| -> BTreeSet<Arc<str>> {
        let added = changes.iter().filter_map(|change| match change {
            FeedChange::Add(feed) => Some(feed.name.clone()),
            FeedChange::Remove(_) => None,
        });
        added.collect()
    };
    assert_eq!(names(&first).len(), 4);
    assert_eq!(world.config(2), []);
    let second = world.config(3);
    assert!(names(&first).is_disjoint(&names(&second)), "{second:?}");
    let removed = second
        .iter()
        .filter(|change| matches!(change, FeedChange::Remove(_)));
    assert_eq!((removed.count(), names(&second).len()), (4, 4));
}

#[test]
fn keys_beyond_the_limit_are_refused_by_reason() {
    let mut world = World::new();
    let changes = world.config(2);
    let FeedChange::Add(feed) = &changes[0] else {
        panic!("{changes:?}");
    };
    assert!(feed.keys_max < usize::MAX);
    let change = Change::Refused {
        key: "cilium/state/nodes/v1/c2/n".into(),
        mod_revision: 1,
        len: 1,
        surplus: true,
    };
    let update = Update::Changes {
        feed: feed.name.clone(),
        revision: 1,
        changes: vec![change],
    };
    world.on(update, 0);
    assert_eq!(world.at(0).refused.get("too_many"), Some(&1));
}

#[test]
fn phases_tell_what_is_going_on_and_since_when() {
    let mut world = World::new();
    assert_eq!(world.at(0).phase, Phase::Connecting);
    let lost = |retry_ms| Update::Disconnected {
        error: "refused".to_owned(),
        retry_in: std::time::Duration::from_millis(retry_ms),
    };
    world.on(lost(500), 1_000);
    world.on(lost(700), 2_000);
    let status = world.at(2_000);
    assert_eq!(
        (status.phase, status.stale_since_ms),
        (Phase::Connecting, 0),
        "nothing was known"
    );
    assert_eq!(
        (status.retries, status.next_retry_ms, status.last_error.as_str()),
        (2, 2_700, "refused")
    );

    world.remote.on_connected(3_000);
    let config = keys::cluster_config(&ClusterName::new("c2").unwrap());
    world.synced(&config, 3_000);
    let feeds = world.config_with_slices(2);
    let status = world.at(3_000);
    assert_eq!(
        (status.phase, status.retries, status.next_retry_ms),
        (Phase::Listing, 0, 0)
    );
    assert_eq!(
        (status.progress.left_ms, status.connected_since_ms),
        (None, 3_000)
    );
    for (number, feed) in feeds.iter().enumerate() {
        let (feed, expected) = (feed.name.clone(), number as u64);
        world.on(
            Update::Listing {
                feed: feed.clone(),
                cluster_id: 9,
                revision: 1,
                trusted: false,
                expected,
            },
            3_000,
        );
    }
    let status = world.at(3_500);
    assert_eq!((status.phase, status.progress.expected), (Phase::Listing, 15));
    for feed in &feeds {
        let feed = feed.name.clone();
        world.on(
            Update::Listed {
                feed: feed.clone(),
                cluster_id: 9,
                revision: 1,
                new_history: true,
            },
            4_000,
        );
        world.synced(&feed, 4_000);
    }
    let status = world.at(4_000);
    assert_eq!(
        (status.phase, status.ready, status.progress.left_ms),
        (Phase::Synced, true, Some(0)),
        "{status:?}"
    );

    world.on(lost(500), 10_000);
    world.on(lost(900), 11_000);
    let status = world.at(20_000);
    assert_eq!(
        (status.phase, status.stale_since_ms, status.ready),
        (Phase::Stale, 10_000, true)
    );
    world.remote.on_connected(30_000);
    assert_eq!(
        world.at(30_000).phase,
        Phase::Listing,
        "until all feeds follow again"
    );
    world.config(1);
    assert_eq!(world.at(30_000).phase, Phase::Refused, "it has our ID");
    world.remote.on_leaving(&mut world.store, true, 31_000);
    assert_eq!(world.at(31_000).phase, Phase::Draining);
    world.remote.on_leaving(&mut world.store, false, 32_000);
    assert_eq!(world.at(32_000).phase, Phase::Refused);
}
