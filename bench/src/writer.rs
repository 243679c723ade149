//! The agent's way from what sources say to the maps, in one thread: merge, plan, retry bookkeeping, map writer.
//!
//! In: services, and which of their backends are ready. Out: map entries, and how many operations they took.

use std::{fmt::Display, time::Instant};

use anyhow::{Result, ensure};
use isthmus_datapath::{Tables, apply};
use isthmus_mesh::{LoadBalancer, Reconciler};

use crate::services::{Services, cluster};

/// Most operations of one call, as in the agent.
const BATCH_MAX: usize = 4096;

/// See the module.
pub struct Writer {
    merge: LoadBalancer,
    reconciler: Reconciler,
    begun: Instant,
    revision: u64,
    known: u32,
}

impl Writer {
    /// One that knows nothing, for maps that hold nothing.
    pub fn new() -> Result<Self> {
        let begun = Instant::now();
        Ok(Self {
            merge: LoadBalancer::new(cluster()?),
            reconciler: Reconciler::new(Default::default(), begun.elapsed()),
            begun,
            revision: 0,
            known: 0,
        })
    }

    /// The merge.
    pub fn merge(&mut self) -> &mut LoadBalancer {
        &mut self.merge
    }

    /// Learns of services until they are `count`; nothing is written yet.
    pub fn learn(&mut self, services: &Services, count: u32) -> Result<()> {
        for number in self.known..count {
            self.merge.upsert_frame(&Services::frame(number)?);
            self.merge.upsert_slice(&services.slice(number)?);
        }
        self.known = self.known.max(count);
        Ok(())
    }

    /// Writes what is known. Returns how many operations that took.
    pub fn write(&mut self, tables: &Tables) -> Result<usize> {
        let plan = self.merge.drain();
        let planned = plan.len();
        self.revision += 1;
        self.reconciler.begin(self.begun.elapsed(), plan, self.revision);
        while let Some(batch) = self.reconciler.next_batch(BATCH_MAX) {
            let report = apply::apply(tables, &batch);
            let results: Vec<Result<(), &dyn Display>> = (0..batch.len())
                .map(|at| {
                    report
                        .error(at)
                        .map_or(Ok(()), |error| Err(error as &dyn Display))
                })
                .collect();
            self.reconciler.complete(self.begun.elapsed(), &results);
        }
        let progress = self.reconciler.progress();
        ensure!(
            progress.held == 0,
            "{} operations failed: {:?}",
            progress.held,
            progress.error
        );
        Ok(planned)
    }
}
