//! A bounded ring of batches in revision order, and how far back it reaches.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use super::{Store, SubId, age::Ages, entry::Batch};

/// How much history is kept. What is dropped counts as compacted.
#[derive(Clone, Copy, Debug)]
pub struct HistoryLimits {
    /// Most batches.
    pub len: usize,
    /// Most bytes, counting keys, values and replaced values, unless the last batch alone has more.
    pub bytes: usize,
    /// Longest time.
    pub age: Duration,
}

impl HistoryLimits {
    /// As etcd is told to keep it in Cilium's clusters.
    pub const AGE: Duration = Duration::from_secs(3600);
}

impl Default for HistoryLimits {
    fn default() -> Self {
        Self {
            len: 100_000,
            bytes: 64 * 1024 * 1024,
            age: Self::AGE,
        }
    }
}

#[derive(Debug)]
pub(super) struct History {
    /// With the revision under which this ring orders them.
    batches: VecDeque<(i64, Arc<Batch>)>,
    bytes: usize,
    /// Batches at this revision and before are gone: a watch can start after it.
    floor: i64,
    /// Content before this revision cannot be told any more.
    content_floor: i64,
    /// Batches from this revision on, up to the floor, are on their way.
    expected: Option<i64>,
    ages: Ages,
}

impl History {
    /// Begins at `revision`: content is known there, and changes after it will be.
    pub(super) fn new(revision: i64) -> Self {
        Self {
            batches: VecDeque::new(),
            bytes: 0,
            floor: revision,
            content_floor: revision,
            expected: None,
            ages: Ages::default(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.batches.len()
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn floor(&self) -> i64 {
        self.floor
    }

    pub(super) fn content_floor(&self) -> i64 {
        self.content_floor
    }

    /// Whether a watch that begins at `next` has to wait for batches that are on their way.
    pub(super) fn is_expected(&self, next: i64) -> bool {
        next <= self.floor && self.expected.is_some_and(|from| from <= next)
    }

    /// The first revision that a watch can start at; it may have to wait.
    pub(super) fn first(&self) -> i64 {
        let floor = self.floor + 1;
        self.expected.map_or(floor, |from| from.min(floor))
    }

    pub(super) fn set_expected(&mut self, from: Option<i64>) {
        self.expected = from;
    }

    /// Puts batches before the first one, which `floor` and before it were compacted, and contents before `content_floor` not
    /// known. As many as there is room for beside what is there.
    pub(super) fn prepend(
        &mut self,
        batches: impl DoubleEndedIterator<Item = (i64, Arc<Batch>)>,
        floor: i64,
        content_floor: i64,
        limits: HistoryLimits,
    ) {
        let mut reached = floor;
        for (revision, batch) in batches.rev() {
            let bytes = self.bytes + batch.bytes();
            if self.batches.len() >= limits.len || bytes > limits.bytes {
                reached = revision;
                break;
            }
            self.bytes = bytes;
            self.batches.push_front((revision, batch));
        }
        self.floor = reached;
        self.content_floor = content_floor.max(reached);
    }

    /// Appends a batch; `revision` is not below the last one's. It stays however large it is, for else each such change would
    /// make all readers list.
    pub(super) fn push(&mut self, revision: i64, batch: Arc<Batch>, limits: HistoryLimits) {
        self.bytes += batch.bytes();
        self.batches.push_back((revision, batch));
        while self.batches.len() > limits.len || (self.bytes > limits.bytes && self.batches.len() > 1) {
            if let Some((revision, batch)) = self.batches.pop_front() {
                self.bytes -= batch.bytes();
                self.floor = self.floor.max(revision);
                self.content_floor = self.content_floor.max(revision);
            }
        }
    }

    /// Forgets batches before `revision`, whose content is the oldest that can be told then.
    pub(super) fn compact(&mut self, revision: i64) {
        while let Some((_, batch)) = self.batches.pop_front_if(|(at, _)| *at < revision) {
            self.bytes -= batch.bytes();
        }
        self.floor = self.floor.max(revision - 1);
        self.content_floor = self.content_floor.max(revision);
    }

    /// Forgets what is older than `age`.
    pub(super) fn forget_aged(&mut self, now: Duration, age: Duration) {
        // The last batch's own revision, not how far this is known to be complete: who watches has seen no more than that.
        let Some((last, _)) = self.batches.back() else {
            return;
        };
        let aged = self.ages.look(now, *last, age);
        if aged > 0 {
            self.compact(aged);
        }
    }

    /// Batches from `revision` on, oldest first.
    pub(super) fn since(&self, revision: i64) -> impl Iterator<Item = &Arc<Batch>> {
        let start = self.batches.partition_point(|(at, _)| *at < revision);
        self.batches.range(start..).map(|(_, batch)| batch)
    }
}

impl Store {
    /// Forgets what a source's history held before `revision`. The merged view keeps to its own limits.
    pub fn compact(&mut self, id: &SubId, revision: i64) {
        if let Some(sub) = self.subs.get_mut(id) {
            sub.history.compact(revision);
        }
    }
}
