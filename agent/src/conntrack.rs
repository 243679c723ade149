//! Sweeps the conntrack table every so often, until `shutdown`.
//!
//! In: the clock, the table. Out: flows that are over are gone, and numbers. A sweep is many short steps with pauses for
//! others between; one that fails is logged and tried again at its next time.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use isthmus_datapath::{
    Datapath,
    conntrack::{self, Sweep},
};
use isthmus_runtime::CancellationToken;

use crate::{
    endpoints::keeper::chain,
    metrics::{AgentMetrics, OutcomeLabel},
};

/// See the module.
pub async fn run(
    datapath: Arc<Datapath>,
    interval: Duration,
    metrics: AgentMetrics,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            () = tokio::time::sleep(interval) => {}
        }
        let started = Instant::now();
        let outcome = match sweep(&datapath, &shutdown).await {
            Ok(sweep) => {
                let left = i64::try_from(sweep.left()).unwrap_or(i64::MAX);
                metrics.conntrack_entries.set(left);
                metrics.conntrack_removed.inc_by(sweep.removed as u64);
                "ok"
            }
            Err(error) => {
                tracing::warn!(
                    error = chain(error.as_ref()),
                    "conntrack is not swept; trying again later"
                );
                "failed"
            }
        };
        metrics
            .conntrack_sweeps
            .get_or_create(&OutcomeLabel { outcome })
            .inc();
        metrics
            .conntrack_sweep_seconds
            .observe(started.elapsed().as_secs_f64());
    }
}

/// One walk over the table; it ends early at a shutdown.
async fn sweep(datapath: &Arc<Datapath>, shutdown: &CancellationToken) -> anyhow::Result<Sweep> {
    let mut sweep = Sweep::default();
    while !sweep.is_over() && !shutdown.is_cancelled() {
        let datapath = Arc::clone(datapath);
        sweep = tokio::task::spawn_blocking(move || -> anyhow::Result<Sweep> {
            sweep.step(datapath.tables(), conntrack::now()?)?;
            Ok(sweep)
        })
        .await??;
    }
    Ok(sweep)
}
