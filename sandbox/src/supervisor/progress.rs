//! What the supervisor has done so far, line by line, for whoever waits for it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tracing::info;

use crate::control::Phase;

/// Lines and the phase. Bounded by the number of steps, which follows from the number of clusters and nodes.
#[derive(Clone, Debug)]
pub struct Progress {
    story: Arc<Mutex<(Vec<String>, Phase)>>,
    changed: watch::Sender<()>,
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            story: Arc::new(Mutex::new((Vec::new(), Phase::Starting))),
            changed: watch::Sender::new(()),
        }
    }
}

impl Progress {
    /// Adds a line.
    pub fn say(&self, line: impl Into<String>) {
        let line = line.into();
        info!("{line}");
        self.lock().0.push(line);
        self.changed.send_replace(());
    }

    /// Enters a phase.
    pub fn enter(&self, phase: Phase) {
        self.lock().1 = phase;
        self.changed.send_replace(());
    }

    /// The phase.
    pub fn phase(&self) -> Phase {
        self.lock().1.clone()
    }

    /// Lines from number `since` on; waits up to a second for news.
    pub async fn since(&self, since: usize) -> (Vec<String>, Phase) {
        let mut changed = self.changed.subscribe();
        let deadline = tokio::time::Instant::now() + Duration::from_secs(1);
        loop {
            let (lines, phase) = {
                let story = self.lock();
                (
                    story.0.iter().skip(since).cloned().collect::<Vec<_>>(),
                    story.1.clone(),
                )
            };
            if !lines.is_empty() || phase != Phase::Starting {
                return (lines, phase);
            }
            // The sender lives in `self`: only the deadline ends the wait.
            if tokio::time::timeout_at(deadline, changed.changed())
                .await
                .is_err()
            {
                return (lines, phase);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, (Vec<String>, Phase)> {
        self.story.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
