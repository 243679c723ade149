//! One source: its present content, its history, and its place in its own revisions.

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;

use super::{
    Encoded, Revisions,
    content::Content,
    entry::{Changed, Entry},
    history::History,
};

/// A change of a source, in its own revisions.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum SourceChange {
    /// The key has this value.
    Put {
        /// Key.
        key: Bytes,
        /// Value; is copied.
        value: Bytes,
        /// Revision of its creation.
        create_revision: i64,
        /// Revision of this value.
        mod_revision: i64,
        /// Writes since its creation.
        version: i64,
    },
    /// The same, with a lease perhaps, in bytes that are shared with who made it.
    Shared(Encoded),
    /// The key is gone.
    Delete {
        /// Key.
        key: Bytes,
        /// Revision of the deletion.
        mod_revision: i64,
    },
}

impl SourceChange {
    /// The key.
    pub fn key(&self) -> &[u8] {
        match self {
            Self::Put { key, .. } | Self::Delete { key, .. } => key,
            Self::Shared(encoded) => encoded.key(),
        }
    }

    /// The same in bytes of its own, those of the entry that it becomes; a slice of a message keeps the whole message.
    pub fn on_its_own(self) -> Self {
        let mod_revision = self.mod_revision();
        match self.encoded() {
            Ok(encoded) => Self::Shared(encoded),
            Err(key) => Self::Delete {
                key: Bytes::copy_from_slice(&key),
                mod_revision,
            },
        }
    }

    /// The value's bytes, or the key that is gone.
    fn encoded(self) -> Result<Encoded, Bytes> {
        match self {
            Self::Put {
                key,
                value,
                create_revision,
                mod_revision,
                version,
            } => {
                let revisions = Revisions {
                    create: create_revision,
                    modified: mod_revision,
                    version,
                };
                Ok(Encoded::new(&key, &value, revisions, 0))
            }
            Self::Shared(encoded) => Ok(encoded),
            Self::Delete { key, .. } => Err(key),
        }
    }

    /// Revision of the change.
    pub fn mod_revision(&self) -> i64 {
        match self {
            Self::Put { mod_revision, .. } | Self::Delete { mod_revision, .. } => *mod_revision,
            Self::Shared(encoded) => encoded.revisions().modified,
        }
    }
}

/// A list of a source, as the difference to what it held before.
#[derive(Clone, Debug)]
pub struct Relist {
    /// The source's cluster ID.
    pub cluster_id: u64,
    /// Revision of the list.
    pub revision: i64,
    /// Revisions seen before do not compare with these.
    pub new_history: bool,
    /// Difference.
    pub changes: Vec<SourceChange>,
    /// If given, all keys that the source has: others are deleted.
    pub present: Option<BTreeSet<Bytes>>,
}

#[derive(Debug)]
pub(super) struct SubStore {
    /// What answers carry. The source's ID, unless that one was used for an earlier history.
    pub(super) cluster_id: u64,
    pub(super) source_id: u64,
    pub(super) revision: i64,
    pub(super) listed: bool,
    /// Merged revision at which this history began; a watch of an earlier one ends.
    pub(super) epoch: i64,
    /// Highest revision of the histories before this one; 0 if this is the first.
    pub(super) outlived: i64,
    pub(super) content: Content,
    pub(super) history: History,
}

impl SubStore {
    pub(super) fn new(server_id: u64, epoch: i64) -> Self {
        Self {
            cluster_id: server_id,
            source_id: server_id,
            revision: 1,
            listed: false,
            epoch,
            outlived: 0,
            content: Content::default(),
            history: History::new(1),
        }
    }

    /// Changes the content and returns what really changed.
    pub(super) fn replace(&mut self, changes: Vec<SourceChange>, merged_revision: i64) -> Vec<Changed> {
        let mut changed = Vec::with_capacity(changes.len());
        for change in changes {
            let encoded = match change.encoded() {
                Ok(encoded) => encoded,
                Err(key) => {
                    if let Some(before) = self.content.remove(&key) {
                        changed.push((None, Some(before)));
                    }
                    continue;
                }
            };
            let before = self.content.get(encoded.key()).cloned();
            if before.as_ref().is_some_and(|entry| entry.holds(&encoded)) {
                continue;
            }
            let merged_create = before
                .as_ref()
                .map_or(merged_revision, |entry| entry.merged_create);
            let entry = Arc::new(Entry::new(encoded, merged_create, merged_revision));
            self.content.insert(entry.clone());
            changed.push((Some(entry), before));
        }
        changed
    }

    /// Begins another history. `spare_id` takes the place of an ID that stood for an earlier history here.
    pub(super) fn begin_history(&mut self, source_id: u64, revision: i64, spare_id: u64, epoch: i64) {
        let reused = self.listed && (self.source_id == source_id || self.cluster_id == source_id);
        self.cluster_id = if reused { spare_id } else { source_id };
        self.source_id = source_id;
        if self.listed {
            self.outlived = self.outlived.max(self.revision);
        }
        self.revision = revision;
        self.epoch = epoch;
        self.history = History::new(revision);
        // Keys whose new value was refused keep the old one, at a revision that exists.
        let late: Vec<Arc<Entry>> = self
            .content
            .iter()
            .filter(|entry| entry.revisions().modified > revision)
            .cloned()
            .collect();
        for entry in late {
            let revisions = Revisions {
                create: revision,
                modified: revision,
                version: 1,
            };
            let encoded = Encoded::new(entry.key(), entry.value(), revisions, entry.lease());
            let entry = Entry::new(encoded, entry.merged_create, entry.merged_modified);
            self.content.insert(Arc::new(entry));
        }
    }
}
