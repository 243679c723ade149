//! The full pass: now and then all maps are dumped and compared with what they should hold. What it finds is counted as a
//! bug, and fixed. Rounds go on meanwhile.

use std::{sync::Arc, time::Duration};

use isthmus_datapath::{Datapath, MapError};
use isthmus_mesh::LbDump;

use super::Rounds;
use crate::{
    endpoints::keeper::chain,
    metrics::{MapLabel, OutcomeLabel},
    state::MapDump,
};

impl Rounds {
    pub(super) fn on_dump(&mut self, dump: Result<MapDump, MapError>) {
        let now = self.now();
        let outcome = match dump {
            Err(error) => {
                let why = chain(&error);
                tracing::warn!(error = why, "maps cannot be dumped to be compared");
                self.facts.compare_error = Some(why);
                self.reconciler.full_pass_done(now, 0);
                "failed"
            }
            Ok(dump) => {
                self.facts.compare_error = None;
                self.repair(now, &dump);
                "ok"
            }
        };
        self.written.clear();
        let label = OutcomeLabel { outcome };
        self.outputs.metrics.compares.get_or_create(&label).inc();
    }

    /// Entries that rounds wrote since the dump began are left out: of those the dump says nothing.
    pub(super) fn repair(&mut self, now: Duration, dump: &MapDump) {
        if self.batch.is_some() || !self.reconciler.is_idle() || self.facts.state.has_changes() {
            // Rounds are under way: what would be found could be theirs. The pass is done again soon.
            self.reconciler.full_pass_done(now, 0);
            return;
        }
        let mut plan = self.facts.state.audit(dump);
        let keep: Vec<bool> = plan
            .ops
            .iter()
            .map(|op| !self.written.contains(&op.object()))
            .collect();
        let mut kept = keep.iter();
        plan.ops.retain(|_| kept.next().copied().unwrap_or(false));
        let mut kept = keep.iter();
        plan.domains.retain(|_| kept.next().copied().unwrap_or(false));
        self.reconciler.full_pass_done(now, plan.len());
        if plan.is_empty() {
            return;
        }
        for op in &plan.ops {
            let map = crate::housekeeping::map_of(op);
            self.outputs
                .metrics
                .compare_fixes
                .get_or_create(&MapLabel { map })
                .inc();
        }
        tracing::error!(
            entries = plan.len(),
            first = ?plan.ops.first(),
            "map entries were not what they should be and are being fixed: a bug, or somebody else writes them"
        );
        self.revision += 1;
        self.reconciler.begin(now, plan, self.revision);
        self.round_open = true;
    }
}

/// Everything that the maps hold. Blocks.
pub fn dump(datapath: &Datapath) -> Result<MapDump, MapError> {
    let tables = datapath.tables();
    Ok(MapDump {
        lb: LbDump {
            services: tables.services.dump()?,
            backends: tables
                .backends
                .dump()?
                .into_iter()
                .map(|(key, value)| (key.id, value))
                .collect(),
            maglev: tables
                .maglev
                .dump()?
                .into_iter()
                .map(|(key, chunk)| (key, Arc::new(chunk)))
                .collect(),
            source_ranges: tables
                .source_ranges
                .dump()?
                .into_iter()
                .map(|(key, _)| key)
                .collect(),
        },
        ipcache: tables.ipcache.dump()?,
        endpoints: tables.endpoints.dump()?,
    })
}
