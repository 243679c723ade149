//! The file: a redb database with the log of changes, the leases, and what says whose it is.
//!
//! In: [`DiskWrite`]s, a group at a time. Out: what is stored, when it is opened.
//!
//! Invariants: a group is on disk, flushed, when [`File::commit`] returns, or not at all; a file of another cluster, format
//! or kind is refused and not touched; only one process has it open.

use std::path::{Path, PathBuf};

use isthmus_model::ClusterName;
use isthmus_proto::mvccpb::Event;
use prost::Message;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition, TableError};

use super::state::{DiskWrite, InvalidLog, Loaded, Place, State, Stored};

/// Name of the file in the data directory.
const FILE_NAME: &str = "store.redb";
/// Of the tables and what is in them. A store of a newer format is refused.
const FORMAT: i64 = 1;
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

/// Why a store cannot be opened. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory.
    #[error("cannot use the directory {}", path.display())]
    Directory {
        /// Which one.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Somebody has it open.
    #[error("{} is in use by another process; a data directory belongs to one server", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// Another cluster's.
    #[error(
        "{} is the store of cluster `{found}`, not of `{expected}`; give each cluster its own --data-dir",
        path.display()
    )]
    OtherCluster {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        found: String,
        /// Whose it should be.
        expected: ClusterName,
    },
    /// Of a version that is not known.
    #[error("{} has format {found}, and this program knows format {FORMAT}; run the newer program", path.display())]
    OtherFormat {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: i64,
    },
    /// No store, or a damaged one.
    #[error(
        "{} is damaged or not a store; move it away to begin with an empty one, which the operator fills again",
        path.display()
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A group that could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the store {}; is the disk full?", path.display())]
pub struct CommitError {
    path: PathBuf,
    #[source]
    source: Box<redb::Error>,
}

/// An open store.
pub struct File {
    database: Database,
    path: PathBuf,
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

/// What a file says about itself.
struct About {
    format: i64,
    history: i64,
    compacted: i64,
    cluster: String,
}

impl File {
    /// Opens the store of `cluster` in `directory`. One that is not there begins empty, with `new_history` (not 0).
    pub fn open(directory: &Path, cluster: &ClusterName, new_history: u64) -> Result<Opened, OpenError> {
        let path = directory.join(FILE_NAME);
        let in_directory = |source| OpenError::Directory {
            path: directory.to_owned(),
            source,
        };
        std::fs::create_dir_all(directory).map_err(in_directory)?;
        let unreadable = |source: Box<dyn std::error::Error + Send + Sync>| OpenError::Unreadable {
            path: path.clone(),
            source,
        };
        let error = |error: redb::Error| unreadable(Box::new(error));
        // An empty file would be taken for a new database: it is one that a crash cut off before anything was in it.
        let database = Database::builder()
            .set_cache_size(CACHE_BYTES)
            .create(&path)
            .map_err(|error| match error {
                DatabaseError::DatabaseAlreadyOpen => OpenError::InUse { path: path.clone() },
                error => unreadable(Box::new(error)),
            })?;
        let file = Self {
            database,
            path: path.clone(),
        };
        let about = match file.about().map_err(error)? {
            Some(about) => about,
            None => {
                let about = About {
                    format: FORMAT,
                    history: new_history.cast_signed(),
                    compacted: 0,
                    cluster: cluster.to_string(),
                };
                file.begin(&about).map_err(error)?;
                // The file's name must be on disk too.
                std::fs::File::open(directory)
                    .and_then(|directory| directory.sync_all())
                    .map_err(in_directory)?;
                about
            }
        };
        if about.format != FORMAT {
            return Err(OpenError::OtherFormat {
                path,
                found: about.format,
            });
        }
        if about.cluster != cluster.as_str() {
            return Err(OpenError::OtherCluster {
                path,
                found: about.cluster,
                expected: cluster.clone(),
            });
        }
        let stored = file.stored(about.compacted)?;
        let loaded = State::load(stored).map_err(|error: InvalidLog| unreadable(Box::new(error)))?;
        Ok(Opened {
            file,
            history: about.history.cast_unsigned(),
            loaded,
        })
    }

    /// What the file says about itself; `None` for a new one.
    fn about(&self) -> Result<Option<About>, redb::Error> {
        let transaction = self.database.begin_read()?;
        let numbers = match transaction.open_table(NUMBERS) {
            Ok(table) => table,
            Err(TableError::TableDoesNotExist(_)) => {
                // Tables of others, and none of ours: not our file.
                return match transaction.list_tables()?.next() {
                    None => Ok(None),
                    Some(_) => Err(redb::Error::Corrupted("the tables are not ours".to_owned())),
                };
            }
            Err(error) => return Err(error.into()),
        };
        let texts = transaction.open_table(TEXTS)?;
        let number = |key| {
            let missing = || redb::Error::Corrupted(format!("`{key}` is missing"));
            Ok::<_, redb::Error>(numbers.get(key)?.ok_or_else(missing)?.value())
        };
        let cluster = texts.get("cluster")?;
        Ok(Some(About {
            format: number("format")?,
            history: number("history")?,
            compacted: number("compacted")?,
            cluster: cluster.map_or_else(String::new, |cluster| cluster.value().to_owned()),
        }))
    }

    fn begin(&self, about: &About) -> Result<(), redb::Error> {
        let transaction = self.database.begin_write()?;
        {
            let mut numbers = transaction.open_table(NUMBERS)?;
            numbers.insert("format", about.format)?;
            numbers.insert("history", about.history)?;
            numbers.insert("compacted", about.compacted)?;
            transaction
                .open_table(TEXTS)?
                .insert("cluster", about.cluster.as_str())?;
            transaction.open_table(LOG)?;
            transaction.open_table(LEASES)?;
        }
        transaction.commit()?;
        Ok(())
    }

    fn stored(&self, compacted: i64) -> Result<Stored, OpenError> {
        let unreadable = |source: Box<dyn std::error::Error + Send + Sync>| OpenError::Unreadable {
            path: self.path.clone(),
            source,
        };
        let read = || {
            let transaction = self.database.begin_read()?;
            let mut stored = Stored {
                compacted,
                ..Stored::default()
            };
            for entry in transaction.open_table(LEASES)?.iter()? {
                let (id, ttl) = entry?;
                stored.leases.insert(id.value(), ttl.value());
            }
            for entry in transaction.open_table(LOG)?.iter()? {
                let (place, event) = entry?;
                let place = place.value();
                let event = Event::decode(event.value());
                let event = event.map_err(|_| redb::Error::Corrupted(format!("change {place:?}")))?;
                stored.log.push((place, event));
            }
            Ok::<_, redb::Error>(stored)
        };
        read().map_err(|error| unreadable(Box::new(error)))
    }

    /// Writes a group and waits until it is on disk.
    pub fn commit(&self, writes: &[DiskWrite]) -> Result<(), CommitError> {
        let write = || {
            let transaction = self.database.begin_write()?;
            {
                let mut log = transaction.open_table(LOG)?;
                let mut leases = transaction.open_table(LEASES)?;
                let mut numbers = transaction.open_table(NUMBERS)?;
                for write in writes {
                    match write {
                        DiskWrite::Append(place, event) => {
                            log.insert(place, event.encode_to_vec().as_slice())?;
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
            }
            transaction.commit()?;
            Ok::<_, redb::Error>(())
        };
        write().map_err(|source| CommitError {
            path: self.path.clone(),
            source: Box::new(source),
        })
    }
}
