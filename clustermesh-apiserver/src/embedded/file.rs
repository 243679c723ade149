//! The file: a redb database with the log of changes, the leases, and what says whose it is.
//!
//! In: [`DiskWrite`]s, a group at a time. Out: what is stored, when it is opened.
//!
//! Invariants: a group is on disk, flushed, when [`File::commit`] returns, or not at all; every page is checked when a file is
//! opened, and one that is damaged, another cluster's or of another format is refused and not touched; only one process has a
//! directory; under the file's name there never is an unfinished one.

mod open;
mod rewrite;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use isthmus_model::ClusterName;
use redb::{Database, DatabaseError, Durability, TableDefinition};

use super::state::{DiskWrite, Loaded, Place};
pub use open::OpenError;
pub use rewrite::{CopyError, Copying};

/// Name of the file in the data directory.
const FILE_NAME: &str = "store.redb";
/// Name of one that is being made and will take its place.
const NEW_NAME: &str = "store.redb.new";
/// Name of the file that says that the directory is in use.
const LOCK_NAME: &str = "lock";
/// Memory for pages of the file. It is read once and then only written.
const CACHE_BYTES: usize = 16 * 1024 * 1024;

/// Changes by place, as protobuf `mvccpb.Event`.
const LOG: TableDefinition<'_, Place, &[u8]> = TableDefinition::new("log");
/// TTLs in seconds by lease.
const LEASES: TableDefinition<'_, i64, i64> = TableDefinition::new("leases");
/// Numbers: `format`, `history`, `compacted`.
const NUMBERS: TableDefinition<'_, &str, i64> = TableDefinition::new("numbers");
/// Texts: `cluster`.
const TEXTS: TableDefinition<'_, &str, &str> = TableDefinition::new("texts");
/// What is written to see whether the disk takes writes again, and removed at once.
const TRIAL: TableDefinition<'_, u8, &[u8]> = TableDefinition::new("trial");

/// Opens a database at a path, or makes one there. Tests put a bad disk behind it.
pub type OpenDatabase = Arc<dyn Fn(&Path) -> Result<Database, DatabaseError> + Send + Sync>;

/// A group that could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the store {}", path.display())]
pub struct CommitError {
    path: PathBuf,
    #[source]
    source: Box<redb::Error>,
}

/// A data directory that is this process' own.
pub struct Directory {
    path: PathBuf,
    cluster: ClusterName,
    open: OpenDatabase,
    /// Locked as long as it is open.
    _lock: std::fs::File,
}

/// An open store.
pub struct File {
    database: Database,
    path: PathBuf,
    directory: Arc<Directory>,
}

/// A store that was opened.
pub struct Opened {
    /// To write to.
    pub file: File,
    /// Identity of its history: random and not 0, the same as long as the file lives. Served as etcd's cluster ID.
    pub history: u64,
    /// What it holds.
    pub loaded: Loaded,
}

impl File {
    /// Opens the store of `cluster` in `directory`. One that is not there begins empty, with `new_history` (not 0).
    pub fn open(directory: &Path, cluster: &ClusterName, new_history: u64) -> Result<Opened, OpenError> {
        Arc::new(Directory::take(directory, cluster, open::database())?).open(new_history)
    }

    /// Where it is.
    pub fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    /// Its length in bytes; 0 if that cannot be told.
    pub fn len(&self) -> u64 {
        std::fs::metadata(&self.path).map_or(0, |metadata| metadata.len())
    }

    /// Never: it says whose it is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes a group and waits until it is on disk.
    pub fn commit(&self, writes: &[DiskWrite]) -> Result<(), CommitError> {
        self.write(Durability::Immediate, |transaction| {
            let mut log = transaction.open_table(LOG)?;
            let mut leases = transaction.open_table(LEASES)?;
            let mut numbers = transaction.open_table(NUMBERS)?;
            for write in writes {
                match write {
                    DiskWrite::Append(place, logged) => {
                        log.insert(place, &*logged.message(*place))?;
                    }
                    DiskWrite::Remove(place) => {
                        log.remove(place)?;
                    }
                    DiskWrite::Lease(id, ttl) => {
                        leases.insert(id, ttl)?;
                    }
                    DiskWrite::NoLease(id) => {
                        leases.remove(id)?;
                    }
                    DiskWrite::Compacted(at) => {
                        numbers.insert("compacted", at)?;
                    }
                }
            }
            Ok(())
        })
    }

    /// Whether so many bytes can be written. They are removed at once.
    pub fn try_write(&self, bytes: usize) -> Result<(), CommitError> {
        let trial = vec![0; bytes];
        self.write(Durability::Immediate, |transaction| {
            transaction.open_table(TRIAL)?.insert(0, trial.as_slice())?;
            Ok(())
        })?;
        self.write(Durability::Immediate, |transaction| {
            transaction.delete_table(TRIAL)?;
            Ok(())
        })
    }

    fn write(
        &self,
        durability: Durability,
        write: impl FnOnce(&redb::WriteTransaction) -> Result<(), redb::Error>,
    ) -> Result<(), CommitError> {
        let write = || {
            let mut transaction = self.database.begin_write()?;
            transaction.set_durability(durability)?;
            write(&transaction)?;
            transaction.commit()?;
            Ok(())
        };
        write().map_err(|error: redb::Error| self.error(error))
    }

    fn error(&self, source: redb::Error) -> CommitError {
        CommitError {
            path: self.path.clone(),
            source: Box::new(source),
        }
    }
}
