//! Applies an ordered list of map operations: neighbours of one kind become one batch, so the order that the planner
//! chose is kept at every moment.
//!
//! In: operations. Out: a report with one result for each. Repeating a list is safe; deleting what is absent succeeds.
//!
//! A failed operation does not stop those after it: a full ipcache must not keep a service from failing over. One
//! thing is held back: when a backend, slot or table could not be written, old slots may still name old backends, so the
//! deletions of backends in the same list are not done, and reported as [`OpError::Withheld`]. The caller plans again.

use isthmus_bpf_abi::{
    BackendKey, EndpointKey, IpcacheKey, MaglevKey, ServiceKey, SourceRangeKey, SourceRangeValue,
};
use isthmus_mesh::MapOp;

use crate::{
    map::{BATCH_ENTRIES_MAX, Failures, Layout, Map, MapError},
    tables::Tables,
};

/// Why an operation was not done.
#[derive(Debug, thiserror::Error)]
pub enum OpError {
    /// The kernel refused it.
    #[error(transparent)]
    Map(#[from] MapError),
    /// A backend's deletion, since a slot or backend before it could not be written.
    #[error("deletion withheld: a slot that could not be replaced may still name the backend")]
    Withheld,
}

/// What became of a list of operations.
#[derive(Debug, Default)]
pub struct ApplyReport {
    /// Operations in the list.
    pub total: usize,
    /// Those not done, by position, ascending.
    pub failed: Vec<(usize, OpError)>,
}

impl ApplyReport {
    /// Whether all were done.
    pub fn is_complete(&self) -> bool {
        self.failed.is_empty()
    }

    /// Why the operation at `index` was not done; nothing if it was.
    pub fn error(&self, index: usize) -> Option<&OpError> {
        let at = self
            .failed
            .binary_search_by_key(&index, |(failed, _)| *failed)
            .ok()?;
        Some(&self.failed[at].1)
    }
}

/// Applies `ops` in order.
pub fn apply(tables: &Tables, ops: &[MapOp]) -> ApplyReport {
    let mut report = ApplyReport {
        total: ops.len(),
        failed: Vec::new(),
    };
    let mut load_balancing_failed = false;
    let mut at = 0;
    for run in ops.chunk_by(|a, b| std::mem::discriminant(a) == std::mem::discriminant(b)) {
        if load_balancing_failed && matches!(run[0], MapOp::BackendDelete(_)) {
            report
                .failed
                .extend((at..at + run.len()).map(|index| (index, OpError::Withheld)));
        } else {
            let failures = apply_run(tables, run);
            load_balancing_failed |= !failures.is_empty()
                && matches!(
                    run[0],
                    MapOp::BackendPut(..) | MapOp::ServicePut(..) | MapOp::MaglevPut(..)
                );
            report.failed.extend(
                failures
                    .into_iter()
                    .map(|(index, error)| (at + index, OpError::Map(error))),
            );
        }
        at += run.len();
    }
    report
}

/// Applies operations of one kind.
fn apply_run(tables: &Tables, run: &[MapOp]) -> Failures {
    macro_rules! put {
        ($table:ident, $variant:ident) => {
            put_run(&tables.$table, run, |op| match op {
                MapOp::$variant(key, value) => Some((Key::of(key), *value)),
                _ => None,
            })
        };
    }
    macro_rules! delete {
        ($table:ident, $variant:ident) => {
            delete_run(&tables.$table, run, |op| match op {
                MapOp::$variant(key) => Some(Key::of(key)),
                _ => None,
            })
        };
    }
    match run.first() {
        None => Failures::new(),
        Some(MapOp::ServicePut(..)) => put!(services, ServicePut),
        Some(MapOp::ServiceDelete(_)) => delete!(services, ServiceDelete),
        Some(MapOp::BackendPut(..)) => put!(backends, BackendPut),
        Some(MapOp::BackendDelete(_)) => delete!(backends, BackendDelete),
        Some(MapOp::MaglevPut(..)) => put_run(&tables.maglev, run, |op| match op {
            MapOp::MaglevPut(key, chunk) => Some((*key, **chunk)),
            _ => None,
        }),
        Some(MapOp::MaglevDelete(_)) => delete!(maglev, MaglevDelete),
        Some(MapOp::SourceRangePut(_)) => put_run(&tables.source_ranges, run, |op| match op {
            MapOp::SourceRangePut(key) => Some((*key, SourceRangeValue { allowed: 1 })),
            _ => None,
        }),
        Some(MapOp::SourceRangeDelete(_)) => delete!(source_ranges, SourceRangeDelete),
        Some(MapOp::IpcachePut(..)) => put!(ipcache, IpcachePut),
        Some(MapOp::IpcacheDelete(_)) => delete!(ipcache, IpcacheDelete),
        Some(MapOp::EndpointPut(..)) => put!(endpoints, EndpointPut),
        Some(MapOp::EndpointDelete(_)) => delete!(endpoints, EndpointDelete),
    }
}

/// A map's key from what an operation names.
trait Key<T>: Layout {
    fn of(named: &T) -> Self;
}

impl Key<u32> for BackendKey {
    fn of(named: &u32) -> Self {
        Self { id: *named }
    }
}

macro_rules! named_by_key {
    ($($key:ty),*) => {
        $(impl Key<$key> for $key {
            fn of(named: &$key) -> Self {
                *named
            }
        })*
    };
}
named_by_key!(ServiceKey, IpcacheKey, EndpointKey, MaglevKey, SourceRangeKey);

/// Gathers a batch's worth of entries at a time: the buffers stay in the cache, whatever the list's length.
fn put_run<K: Layout, V: Layout>(
    map: &Map<K, V>,
    run: &[MapOp],
    entry: impl Fn(&MapOp) -> Option<(K, V)>,
) -> Failures {
    let mut failures = Failures::new();
    let mut keys = Vec::with_capacity(run.len().min(BATCH_ENTRIES_MAX));
    let mut values = Vec::with_capacity(keys.capacity());
    for (number, ops) in run.chunks(BATCH_ENTRIES_MAX).enumerate() {
        keys.clear();
        values.clear();
        for (key, value) in ops.iter().filter_map(&entry) {
            keys.push(key);
            values.push(value);
        }
        let base = number * BATCH_ENTRIES_MAX;
        failures.extend(
            map.put_batch(&keys, &values)
                .into_iter()
                .map(|(index, error)| (base + index, error)),
        );
    }
    failures
}

fn delete_run<K: Layout, V: Layout>(
    map: &Map<K, V>,
    run: &[MapOp],
    key: impl Fn(&MapOp) -> Option<K>,
) -> Failures {
    let mut failures = Failures::new();
    let mut keys = Vec::with_capacity(run.len().min(BATCH_ENTRIES_MAX));
    for (number, ops) in run.chunks(BATCH_ENTRIES_MAX).enumerate() {
        keys.clear();
        keys.extend(ops.iter().filter_map(&key));
        let base = number * BATCH_ENTRIES_MAX;
        failures.extend(
            map.delete_batch(&keys)
                .into_iter()
                .map(|(index, error)| (base + index, error)),
        );
    }
    failures
}
