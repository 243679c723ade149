//! Retry bookkeeping: which operations to try now, which wait for what, and how far the maps are.
//!
//! In: plans with the revision they bring about, results, and the time. Out: batches of operations. The loop around it is
//! `while let Some(batch) = next_batch(max) { results = apply(batch); complete(now, &results) }`, begun by
//! [`Reconciler::begin`].
//!
//! Invariants: after an operation failed, later ones of its failure domain are held until it succeeded, and newer ones
//! join them, the last for each object counting; what is held is tried again in the order of a plan, after a delay that
//! doubles up to a limit. Domains that a plan links, or that write one object while it is held, are one until nothing is
//! held any more. Other domains go on. Held operations are bounded by the maps' sizes: one for each object.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

use crate::{MapOp, Plan, op::Object};

/// When to try again. Times are since any fixed point, the same for all calls.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RetryConfig {
    /// Delay after the first failure.
    pub backoff_first: Duration,
    /// Longest delay.
    pub backoff_max: Duration,
    /// Time between full passes over the maps.
    pub full_pass_interval: Duration,
}

impl Default for RetryConfig {
    /// A map that is full empties in the agent's own pace, so a minute is the longest wait; the maps are ours alone, so a
    /// full pass every 10 minutes is for bugs.
    fn default() -> Self {
        Self {
            backoff_first: Duration::from_millis(100),
            backoff_max: Duration::from_secs(60),
            full_pass_interval: Duration::from_secs(600),
        }
    }
}

/// What fails together.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Domain {
    Object(Object),
    Number(u32),
}

impl Domain {
    const fn of(op: &MapOp, number: u32) -> Self {
        if number == 0 {
            Self::Object(op.object())
        } else {
            Self::Number(number)
        }
    }
}

#[derive(Debug)]
struct Held {
    ops: BTreeMap<Object, MapOp>,
    /// Lowest revision that is not in the maps because of these.
    since: u64,
    attempts: u32,
    retry_at: Duration,
    error: String,
}

impl Held {
    fn join(&mut self, mut other: Self) {
        self.ops.append(&mut other.ops);
        if other.since < self.since {
            (self.since, self.error) = (other.since, other.error);
        }
        self.attempts = self.attempts.max(other.attempts);
        self.retry_at = self.retry_at.max(other.retry_at);
    }
}

/// The domain that stands for `number` and all that it is linked to.
fn root(parents: &BTreeMap<u32, u32>, mut number: u32) -> u32 {
    while let Some(&parent) = parents.get(&number) {
        number = parent;
    }
    number
}

/// How far the maps are.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Progress {
    /// Revision of the newest plan.
    pub submitted: u64,
    /// Everything up to this revision is in the maps.
    pub applied: u64,
    /// Operations waiting for another try.
    pub held: usize,
    /// The error that waits longest; `None` when nothing is held.
    pub error: Option<String>,
    /// Operations applied, ever.
    pub applied_total: u64,
    /// Operations failed, ever.
    pub failed_total: u64,
    /// Operations that full passes found necessary, ever.
    pub repaired_total: u64,
}

/// The bookkeeping. See the module.
#[derive(Debug)]
pub struct Reconciler {
    config: RetryConfig,
    held: BTreeMap<Domain, Held>,
    /// From a domain to one that it is part of.
    parents: BTreeMap<u32, u32>,
    round: Vec<(MapOp, u32)>,
    /// First of `round` that is not done.
    done: usize,
    /// How many of `round` the last batch looked at, and where those it took are.
    batch: Vec<usize>,
    failed: BTreeSet<Domain>,
    /// Domains tried again in this round, with attempts and since.
    retried: BTreeMap<Domain, (u32, u64)>,
    revision: u64,
    full_pass_at: Duration,
    applied_total: u64,
    failed_total: u64,
    repaired_total: u64,
}

impl Reconciler {
    /// Bookkeeping with nothing to do. The first full pass is due an interval after `now`.
    pub fn new(config: RetryConfig, now: Duration) -> Self {
        Self {
            config,
            held: BTreeMap::new(),
            parents: BTreeMap::new(),
            round: Vec::new(),
            done: 0,
            batch: Vec::new(),
            failed: BTreeSet::new(),
            retried: BTreeMap::new(),
            revision: 0,
            full_pass_at: now + config.full_pass_interval,
            applied_total: 0,
            failed_total: 0,
            repaired_total: 0,
        }
    }

    /// Begins a round with a plan (it may be empty) that brings the maps to `revision`, and with what is due again.
    ///
    /// # Panics
    /// If the round before is not done: batches are missing.
    pub fn begin(&mut self, now: Duration, plan: Plan, revision: u64) {
        assert!(self.is_idle(), "a round begins when the one before is done");
        self.round.clear();
        self.done = 0;
        self.failed.clear();
        self.retried.clear();
        let before = self.revision;
        self.revision = revision.max(before);
        if self.held.is_empty() {
            self.parents.clear();
        }
        for (a, b) in &plan.links {
            self.link(*a, *b);
        }
        if self.held.is_empty() {
            self.round = plan.into_pairs().collect();
            if !self.parents.is_empty() {
                let parents = &self.parents;
                self.round
                    .iter_mut()
                    .for_each(|(_, number)| *number = root(parents, *number));
            }
            return;
        }
        self.link_by_objects(&plan);
        for (op, number) in plan.into_pairs() {
            let number = root(&self.parents, number);
            match self.held.get_mut(&Domain::of(&op, number)) {
                Some(held) => drop(held.ops.insert(op.object(), op)),
                None => self.round.push((op, number)),
            }
        }
        let due: Vec<Domain> = self
            .held
            .iter()
            .filter(|(_, held)| held.retry_at <= now)
            .map(|(domain, _)| *domain)
            .collect();
        for domain in due {
            let Some(held) = self.held.remove(&domain) else {
                continue;
            };
            let number = match domain {
                Domain::Object(_) => 0,
                Domain::Number(number) => number,
            };
            self.round.extend(held.ops.into_values().map(|op| (op, number)));
            self.retried.insert(domain, (held.attempts, held.since));
        }
        self.round.sort_by_key(|(op, _)| op.phase());
    }

    /// Makes two domains one, with what they hold.
    fn link(&mut self, a: u32, b: u32) {
        let (a, b) = (root(&self.parents, a), root(&self.parents, b));
        if a == b || a == 0 || b == 0 {
            return;
        }
        self.parents.insert(b, a);
        let Some(theirs) = self.held.remove(&Domain::Number(b)) else {
            return;
        };
        match self.held.get_mut(&Domain::Number(a)) {
            Some(ours) => ours.join(theirs),
            None => drop(self.held.insert(Domain::Number(a), theirs)),
        }
    }

    /// Links each domain of the plan that writes an object to the domain that holds an operation on it.
    fn link_by_objects(&mut self, plan: &Plan) {
        let mut holders = BTreeMap::new();
        for (domain, held) in &self.held {
            if let Domain::Number(number) = domain {
                holders.extend(held.ops.keys().map(|object| (*object, *number)));
            }
        }
        for (op, number) in plan.ops.iter().zip(&plan.domains) {
            if let Some(holder) = holders.get(&op.object()) {
                self.link(*holder, *number);
            }
        }
    }

    /// The next operations to apply: of one phase, at most `max`. `None` when the round is done.
    ///
    /// # Panics
    /// If the batch before was not completed.
    pub fn next_batch(&mut self, max: usize) -> Option<Vec<MapOp>> {
        assert!(self.batch.is_empty(), "a batch is completed before the next one");
        let mut ops: Vec<MapOp> = Vec::new();
        while let Some((op, number)) = self.round.get(self.done) {
            if ops.first().is_some_and(|first| first.phase() != op.phase()) || ops.len() >= max.max(1) {
                break;
            }
            let domain = Domain::of(op, *number);
            if self.failed.is_empty() || !self.failed.contains(&domain) {
                ops.push(op.clone());
                self.batch.push(self.done);
            } else if let Some(held) = self.held.get_mut(&domain) {
                held.ops.insert(op.object(), op.clone());
            }
            self.done += 1;
        }
        (!ops.is_empty()).then_some(ops)
    }

    /// Takes the results of the last batch, one for each operation in order.
    ///
    /// # Panics
    /// If there are not as many results as operations.
    pub fn complete<E: fmt::Display>(&mut self, now: Duration, results: &[Result<(), E>]) {
        let batch = std::mem::take(&mut self.batch);
        assert_eq!(batch.len(), results.len(), "one result for each operation");
        for (place, result) in batch.into_iter().zip(results) {
            let Err(error) = result else {
                self.applied_total += 1;
                continue;
            };
            self.failed_total += 1;
            let (op, number) = &self.round[place];
            let domain = Domain::of(op, *number);
            self.failed.insert(domain);
            let (attempts, since) = self.retried.get(&domain).copied().unwrap_or((0, self.revision));
            let delay = self
                .config
                .backoff_first
                .saturating_mul(1 << attempts.min(20))
                .min(self.config.backoff_max);
            let held = self.held.entry(domain).or_insert_with(|| Held {
                ops: BTreeMap::new(),
                since,
                attempts: attempts + 1,
                retry_at: now + delay,
                error: error.to_string(),
            });
            held.ops.insert(op.object(), op.clone());
        }
    }

    /// Whether no round is under way.
    pub fn is_idle(&self) -> bool {
        self.done >= self.round.len() && self.batch.is_empty()
    }

    /// When to begin a round even if nothing changes: the next try or full pass.
    pub fn wake_at(&self) -> Duration {
        self.held
            .values()
            .map(|held| held.retry_at)
            .chain([self.full_pass_at])
            .min()
            .unwrap_or(self.full_pass_at)
    }

    /// Whether the maps should be dumped and compared. Not while something is held: that is known to differ.
    pub fn full_pass_due(&self, now: Duration) -> bool {
        self.is_idle() && self.held.is_empty() && now >= self.full_pass_at
    }

    /// Notes a full pass and how many operations it found necessary.
    pub fn full_pass_done(&mut self, now: Duration, repairs: usize) {
        self.full_pass_at = now + self.config.full_pass_interval;
        self.repaired_total += repairs as u64;
    }

    /// How far the maps are.
    pub fn progress(&self) -> Progress {
        let oldest = self.held.values().min_by_key(|held| held.since);
        let open = if self.is_idle() { None } else { Some(self.revision) };
        let since = oldest.map(|held| held.since).into_iter().chain(open).min();
        Progress {
            submitted: self.revision,
            applied: since.map_or(self.revision, |since| since.saturating_sub(1)),
            held: self.held.values().map(|held| held.ops.len()).sum(),
            error: oldest.map(|held| held.error.clone()),
            applied_total: self.applied_total,
            failed_total: self.failed_total,
            repaired_total: self.repaired_total,
        }
    }
}

#[cfg(test)]
mod tests;
