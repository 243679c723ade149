//! A fresh file in place of one that has grown: a copy of what is stored, beside it, while writing goes on; then what was
//! written meanwhile; then its name.

use std::{io, sync::Arc};

use redb::{Durability, ReadTransaction, ReadableDatabase, ReadableTable};

use super::{CommitError, Directory, File, LEASES, LOG, NUMBERS, OpenError, TEXTS};
use crate::embedded::state::Place;

/// Bytes of a copied log after which it is flushed: what a copy holds in memory.
const CHUNK_BYTES: usize = 16 * 1024 * 1024;

/// A copy that can be made. It holds what is stored as it was when it began.
pub struct Copying {
    from: ReadTransaction,
    directory: Arc<Directory>,
}

/// Why there is no copy. The file itself is as it was.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The file cannot be read.
    #[error("cannot read the store")]
    Read(#[source] Box<redb::Error>),
    /// The copy cannot be made.
    #[error(transparent)]
    Create(#[from] OpenError),
    /// The copy cannot be written.
    #[error(transparent)]
    Write(#[from] CommitError),
}

impl File {
    /// Begins a copy of what is stored now.
    pub fn copy(&self) -> Result<Copying, CommitError> {
        let from = self
            .database
            .begin_read()
            .map_err(|error| self.error(error.into()))?;
        Ok(Copying {
            from,
            directory: self.directory.clone(),
        })
    }

    /// Gives a filled and flushed file its name, in place of the one that had it. That is on disk when this returns.
    pub fn take_place(mut self) -> io::Result<Self> {
        let path = self.directory.file();
        std::fs::rename(&self.path, &path)?;
        std::fs::File::open(&self.directory.path)?.sync_all()?;
        self.path = path;
        Ok(self)
    }
}

impl Copying {
    /// Makes it. It can be written to like the file that it is a copy of.
    pub fn run(self) -> Result<File, CopyError> {
        let read = |error: redb::Error| CopyError::Read(Box::new(error));
        let file = self.directory.create()?;
        let mut next: Option<Place> = Some((i64::MIN, 0));
        let mut first = true;
        while let Some(place) = next {
            let mut chunk = Vec::new();
            let mut bytes = 0;
            next = None;
            let log = self.from.open_table(LOG).map_err(|error| read(error.into()))?;
            for entry in log.range(place..).map_err(|error| read(error.into()))? {
                let (place, event) = entry.map_err(|error| read(error.into()))?;
                if bytes >= CHUNK_BYTES {
                    next = Some(place.value());
                    break;
                }
                bytes += event.value().len();
                chunk.push((place.value(), event));
            }
            file.write(Durability::Immediate, |transaction| {
                let mut log = transaction.open_table(LOG)?;
                for (place, event) in &chunk {
                    log.insert(place, event.value())?;
                }
                if std::mem::take(&mut first) {
                    self.copy_rest(transaction)?;
                }
                Ok(())
            })?;
        }
        Ok(file)
    }

    /// All but the log.
    fn copy_rest(&self, to: &redb::WriteTransaction) -> Result<(), redb::Error> {
        let mut leases = to.open_table(LEASES)?;
        for entry in self.from.open_table(LEASES)?.iter()? {
            let (id, ttl) = entry?;
            leases.insert(id.value(), ttl.value())?;
        }
        let mut numbers = to.open_table(NUMBERS)?;
        for entry in self.from.open_table(NUMBERS)?.iter()? {
            let (name, number) = entry?;
            numbers.insert(name.value(), number.value())?;
        }
        let mut texts = to.open_table(TEXTS)?;
        for entry in self.from.open_table(TEXTS)?.iter()? {
            let (name, text) = entry?;
            texts.insert(name.value(), text.value())?;
        }
        Ok(())
    }
}
