//! What is known in full: which clusters exist, and which of their tables have been listed to the end.
//!
//! Restored map entries are pruned by this and by nothing else. A source that was listed stays listed: losing the
//! connection later freezes its state and does not empty it.

use std::collections::BTreeSet;

use isthmus_model::ClusterId;

/// A table of one cluster.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Source {
    /// Cluster that the table describes.
    pub cluster: ClusterId,
    /// Which table.
    pub table: SourceTable,
}

/// The tables that a cluster publishes. For a cluster read through Cilium's service JSON, `Frames` and `Slices` are
/// synced together.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum SourceTable {
    /// Service frames.
    Frames,
    /// Slices of endpoints.
    Slices,
    /// Nodes.
    Nodes,
    /// Address to identity entries.
    IpEntries,
}

/// Progress of listing, for the tables that one merge reads.
#[derive(Debug)]
pub(crate) struct Sync {
    tables: &'static [SourceTable],
    synced: BTreeSet<(u16, SourceTable)>,
    /// Every cluster of the mesh, once the list of clusters itself is complete.
    clusters: Option<BTreeSet<u16>>,
}

impl Sync {
    pub(crate) fn new(tables: &'static [SourceTable]) -> Self {
        Self {
            tables,
            synced: BTreeSet::new(),
            clusters: None,
        }
    }

    /// Notes that `source` was listed in full. False if it was known, or is read by another merge.
    pub(crate) fn on_synced(&mut self, source: Source) -> bool {
        self.tables.contains(&source.table) && self.synced.insert((source.cluster.get(), source.table))
    }

    pub(crate) fn on_clusters(&mut self, clusters: impl IntoIterator<Item = u16>) {
        self.clusters = Some(clusters.into_iter().collect());
    }

    pub(crate) fn on_removed(&mut self, cluster: u16) {
        self.synced.retain(|(of, _)| *of != cluster);
        if let Some(clusters) = &mut self.clusters {
            clusters.remove(&cluster);
        }
    }

    /// Whether what `cluster` does not name by now does not exist there.
    pub(crate) fn complete(&self, cluster: u16) -> bool {
        let gone = self
            .clusters
            .as_ref()
            .is_some_and(|known| !known.contains(&cluster));
        gone || self
            .tables
            .iter()
            .all(|table| self.synced.contains(&(cluster, *table)))
    }

    /// Whether that holds for every cluster.
    pub(crate) fn all_complete(&self) -> bool {
        self.clusters
            .as_ref()
            .is_some_and(|known| known.iter().all(|cluster| self.complete(*cluster)))
    }
}
