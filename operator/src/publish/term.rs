//! A writer to etcd and how far it is: one for each term of leadership, or for the heartbeat alone.

use std::{pin::Pin, time::Duration};

use isthmus_kvstore::{EtcdConfig, Options, Writer, WriterOptions, WriterStatus};
use isthmus_runtime::CancellationToken;
use tokio::task::JoinHandle;

/// One writer and how far it is.
pub(super) struct Term {
    pub(super) writer: Writer,
    pub(super) task: JoinHandle<()>,
    pub(super) stop: CancellationToken,
    pub(super) phase: Phase,
    /// Its status when metrics were last counted.
    pub(super) counted: WriterStatus,
}

/// A term goes through these in order, except for the first.
pub(super) enum Phase {
    /// Not leading: only the heartbeat is written.
    Heartbeat,
    /// Reads what etcd holds.
    Listing,
    /// Waits for Kubernetes.
    Syncing,
    /// Waits until everything is written.
    Flushing(Pin<Box<dyn Future<Output = ()> + Send>>),
    /// Everything was written once.
    Live,
}

impl Term {
    /// Starts a writer that ends with `stop`.
    pub(super) fn start(
        etcd: &EtcdConfig,
        scopes: Vec<String>,
        phase: Phase,
        stop: CancellationToken,
    ) -> Self {
        let mut options = WriterOptions::new(scopes);
        options.connection = Options {
            call_timeout: Duration::from_secs(10),
            keep_alive_interval: Duration::from_secs(5),
            keep_alive_timeout: Duration::from_secs(5),
            // It is this cluster's own etcd, and few operators call.
            retry_cap: Duration::from_secs(5),
            ..Options::default()
        };
        let (writer, task) = Writer::start(etcd.clone(), options, stop.clone());
        Self {
            writer,
            task,
            stop,
            phase,
            counted: WriterStatus::default(),
        }
    }

    /// Whether what is desired goes to the writer.
    pub(super) fn publishes(&self) -> bool {
        matches!(self.phase, Phase::Flushing(_) | Phase::Live)
    }

    /// Resolves when the phase is over, or the writer has ended.
    pub(super) async fn progress(term: &mut Option<Self>) -> Progress {
        let Some(term) = term else {
            return std::future::pending().await;
        };
        let phase = async {
            match &mut term.phase {
                Phase::Listing => term.writer.listed().await,
                Phase::Flushing(flush) => flush.as_mut().await,
                Phase::Heartbeat | Phase::Syncing | Phase::Live => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = &mut term.task => Progress::Ended,
            () = phase => Progress::Done,
        }
    }
}

/// What ended.
pub(super) enum Progress {
    /// The phase.
    Done,
    /// The writer.
    Ended,
}
