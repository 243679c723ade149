//! Opening a store: the directory's lock, whose the file is, and all that it holds.

use std::{
    collections::BTreeMap,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
};

use isthmus_model::ClusterName;
use isthmus_proto::mvccpb::Event;
use prost::Message;
use redb::{Database, DatabaseError, Durability, ReadableDatabase, ReadableTable, TableError};

use super::{
    CACHE_BYTES, Directory, FILE_NAME, File, LEASES, LOCK_NAME, LOG, NEW_NAME, NUMBERS, OpenDatabase, Opened,
    TEXTS,
};
use crate::embedded::state::{Loaded, Loading, NEVER_COMPACTED};

/// Of the tables and what is in them. A store of a newer format is refused.
const FORMAT: i64 = 1;

/// Why a store cannot be opened. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory, or the disk below.
    #[error("cannot use {}", path.display())]
    Disk {
        /// Which file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody has it open.
    #[error("{} is in use by another process; a data directory belongs to one server", path.display())]
    InUse {
        /// The directory.
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

impl OpenError {
    /// Whether it may go away by itself.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Disk { .. } | Self::InUse { .. })
    }
}

/// The way of production: a file, of which every page is checked.
pub(super) fn database() -> OpenDatabase {
    Arc::new(|path| {
        let mut builder = Database::builder();
        builder.set_cache_size(CACHE_BYTES);
        builder.set_check_integrity_on_open(true);
        builder.create(path)
    })
}

/// What a file says about itself.
struct About {
    format: i64,
    history: i64,
    compacted: i64,
    cluster: String,
}

/// Makes a directory whose name outlives a loss of power.
fn make(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    make(parent)?;
    match std::fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
        made => made?,
    }
    std::fs::File::open(parent)?.sync_all()
}

impl Directory {
    /// Makes the directory if it is not there, and locks it.
    pub fn take(path: &Path, cluster: &ClusterName, open: OpenDatabase) -> Result<Self, OpenError> {
        let unusable = |path: &Path, source| OpenError::Disk {
            path: path.to_owned(),
            source,
        };
        make(path).map_err(|error| unusable(path, error))?;
        let lock_path = path.join(LOCK_NAME);
        let lock = std::fs::File::create(&lock_path).map_err(|error| unusable(&lock_path, error))?;
        lock.try_lock().map_err(|error| match error {
            std::fs::TryLockError::WouldBlock => OpenError::InUse {
                path: path.to_owned(),
            },
            std::fs::TryLockError::Error(error) => unusable(&lock_path, error),
        })?;
        Ok(Self {
            path: path.to_owned(),
            cluster: cluster.clone(),
            open,
            _lock: lock,
        })
    }

    /// The file's path.
    pub(super) fn file(&self) -> PathBuf {
        self.path.join(FILE_NAME)
    }

    /// Opens the store. One that is not there begins empty, with `new_history` (not 0).
    pub fn open(self: &Arc<Self>, new_history: u64) -> Result<Opened, OpenError> {
        self.open_or_begin(Some(new_history))
    }

    fn open_or_begin(self: &Arc<Self>, new_history: Option<u64>) -> Result<Opened, OpenError> {
        let path = self.file();
        // redb checks what it reads, and yet may panic over a page that no version of it wrote.
        catch_unwind(AssertUnwindSafe(|| self.open_at(&path, new_history))).unwrap_or_else(|_| {
            Err(OpenError::Unreadable {
                path,
                source: "reading it ended in a panic".into(),
            })
        })
    }

    /// Opens the store that was open before: one that is not there is not begun anew.
    pub fn open_again(self: &Arc<Self>) -> Result<Opened, OpenError> {
        self.open_or_begin(None)
    }

    fn open_at(self: &Arc<Self>, path: &Path, new_history: Option<u64>) -> Result<Opened, OpenError> {
        let unusable = |error: io::Error| OpenError::Disk {
            path: path.to_owned(),
            source: error,
        };
        let len = match std::fs::metadata(path) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let Some(new_history) = new_history else {
                    return Err(OpenError::Unreadable {
                        path: path.to_owned(),
                        source: error.into(),
                    });
                };
                self.begin(new_history)?;
                std::fs::metadata(path).map_err(unusable)?.len()
            }
            Err(error) => return Err(unusable(error)),
        };
        let error = |error: redb::Error| failure(path, error);
        if len == 0 {
            // An empty one would be taken for a new database, and all that it held for gone.
            return Err(error(redb::Error::Corrupted("it is empty".to_owned())));
        }
        let file = File {
            database: self.database(path)?,
            path: path.to_owned(),
            directory: self.clone(),
        };
        let about = file.about().map_err(error)?;
        if about.format != FORMAT {
            return Err(OpenError::OtherFormat {
                path: path.to_owned(),
                found: about.format,
            });
        }
        if about.cluster != self.cluster.as_str() {
            return Err(OpenError::OtherCluster {
                path: path.to_owned(),
                found: about.cluster,
                expected: self.cluster.clone(),
            });
        }
        let loaded = file.load(about.compacted).map_err(error)?;
        Ok(Opened {
            file,
            history: about.history.cast_unsigned(),
            loaded,
        })
    }

    pub(super) fn database(&self, path: &Path) -> Result<Database, OpenError> {
        (self.open)(path).map_err(|error| match error {
            DatabaseError::DatabaseAlreadyOpen => OpenError::InUse {
                path: path.to_owned(),
            },
            error => failure(path, error.into()),
        })
    }

    /// An empty database beside the file, to take its place when it is filled.
    pub(super) fn create(self: &Arc<Self>) -> Result<File, OpenError> {
        let path = self.path.join(NEW_NAME);
        // What a crash left.
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(OpenError::Disk { path, source: error });
            }
            _ => {}
        }
        Ok(File {
            database: self.database(&path)?,
            path,
            directory: self.clone(),
        })
    }

    /// Makes an empty store. It gets its name when it is whole.
    fn begin(self: &Arc<Self>, history: u64) -> Result<(), OpenError> {
        let file = self.create()?;
        let written = file.write(Durability::Immediate, |transaction| {
            let mut numbers = transaction.open_table(NUMBERS)?;
            numbers.insert("format", FORMAT)?;
            numbers.insert("history", history.cast_signed())?;
            numbers.insert("compacted", NEVER_COMPACTED)?;
            transaction
                .open_table(TEXTS)?
                .insert("cluster", self.cluster.as_str())?;
            transaction.open_table(LOG)?;
            transaction.open_table(LEASES)?;
            Ok(())
        });
        written.map_err(|error| failure(&error.path, *error.source))?;
        file.take_place().map_err(|source| OpenError::Disk {
            path: self.path.clone(),
            source,
        })?;
        Ok(())
    }
}

/// What redb's error means for a file: a disk that fails, or a file that is not good.
fn failure(path: &Path, error: redb::Error) -> OpenError {
    match error {
        redb::Error::Io(source) if source.kind() != io::ErrorKind::InvalidData => OpenError::Disk {
            path: path.to_owned(),
            source,
        },
        redb::Error::PreviousIo => OpenError::Disk {
            path: path.to_owned(),
            source: io::Error::other(error),
        },
        error => OpenError::Unreadable {
            path: path.to_owned(),
            source: Box::new(error),
        },
    }
}

impl File {
    /// What the file says about itself.
    fn about(&self) -> Result<About, redb::Error> {
        let transaction = self.database.begin_read()?;
        let foreign = || redb::Error::Corrupted("the tables are not ours".to_owned());
        let numbers = match transaction.open_table(NUMBERS) {
            Err(TableError::TableDoesNotExist(_)) => return Err(foreign()),
            table => table?,
        };
        let texts = transaction.open_table(TEXTS)?;
        let number = |key| {
            let missing = || redb::Error::Corrupted(format!("`{key}` is missing"));
            Ok::<_, redb::Error>(numbers.get(key)?.ok_or_else(missing)?.value())
        };
        let cluster = texts.get("cluster")?;
        Ok(About {
            format: number("format")?,
            history: number("history")?,
            compacted: number("compacted")?,
            cluster: cluster.map_or_else(String::new, |cluster| cluster.value().to_owned()),
        })
    }

    fn load(&self, compacted: i64) -> Result<Loaded, redb::Error> {
        let transaction = self.database.begin_read()?;
        let mut leases = BTreeMap::new();
        for entry in transaction.open_table(LEASES)?.iter()? {
            let (id, ttl) = entry?;
            leases.insert(id.value(), ttl.value());
        }
        let mut loading = Loading::new(compacted, leases);
        for entry in transaction.open_table(LOG)?.iter()? {
            let (place, event) = entry?;
            let place = place.value();
            let event = Event::decode(event.value());
            let event = event.map_err(|_| redb::Error::Corrupted(format!("change {place:?}")))?;
            let pushed = loading.push(place, event);
            pushed.map_err(|error| redb::Error::Corrupted(error.to_string()))?;
        }
        Ok(loading.end())
    }
}
