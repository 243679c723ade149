//! The file over time: written to, replaced when it has grown, lost when the disk fails, and found again.
//!
//! In: groups of writes. Out: whether they are on disk, and a file that was found again.
//!
//! Invariants: after a failed write the file is not written to before it was read anew, for what of the write is on disk is
//! not known; a copy takes the file's place only when it holds everything that was acknowledged.

use std::{sync::Arc, time::Duration};

use isthmus_runtime::backoff::{self, Backoff};
use tokio::{
    task::{JoinHandle, spawn_blocking},
    time::{Instant, sleep},
};

use super::{
    file::{CommitError, CopyError, Directory, File, OpenError, Opened},
    state::DiskWrite,
};

/// How often a lost file is looked for.
const RETRY_BASE: Duration = Duration::from_millis(500);
const RETRY_CAP: Duration = Duration::from_secs(15);
/// What a disk must take before it is written to again.
const TRIAL_BYTES: usize = 1024 * 1024;
/// Writes that may wait for a copy; with more of them it is given up.
const SINCE_MAX: usize = 1_000_000;
/// Writes that are few enough to wait for when the copy takes the file's place.
const SINCE_FEW: usize = 500;
/// After a copy that failed, the next one waits.
const COPY_PAUSE: Duration = Duration::from_secs(600);

/// Writes that went to disk together.
type Writes = Arc<Vec<DiskWrite>>;

/// Something that happened to the file by itself.
pub(super) enum Happened {
    /// It can be used again. This is what it holds.
    Found(Box<Opened>),
    /// It cannot, and will not by itself.
    Unusable(OpenError),
    /// A part of a copy is done: [`Disk::go_on`] has to be called.
    Copied(Result<File, CopyError>),
}

/// Where the file is.
enum Place {
    Here(Arc<File>),
    Lost(JoinHandle<Result<Box<Opened>, OpenError>>),
}

/// A copy under way.
struct Rewrite {
    task: JoinHandle<Result<File, CopyError>>,
    /// What was written to the file and is not in the copy yet.
    since: Vec<Writes>,
    len: usize,
}

pub(super) struct Disk {
    place: Place,
    directory: Arc<Directory>,
    rewrite: Option<Rewrite>,
    not_before: Option<Instant>,
}

impl Disk {
    pub(super) fn new(file: File) -> Self {
        Self {
            directory: file.directory().clone(),
            place: Place::Here(Arc::new(file)),
            rewrite: None,
            not_before: None,
        }
    }

    /// Whether there is a file to write to.
    pub(super) fn is_here(&self) -> bool {
        matches!(self.place, Place::Here(_))
    }

    /// Bytes of the file; 0 if it is lost.
    pub(super) fn len(&self) -> u64 {
        match &self.place {
            Place::Here(file) => file.len(),
            Place::Lost(_) => 0,
        }
    }

    /// Writes a group, and returns when it is on disk. After an error the file is lost.
    pub(super) async fn commit(&mut self, writes: Vec<DiskWrite>) -> Result<(), String> {
        let Place::Here(file) = &self.place else {
            return Err("the store is not open".to_owned());
        };
        let (file, writes) = (file.clone(), Arc::new(writes));
        let group = writes.clone();
        if let Err(error) = blocking(spawn_blocking(move || file.commit(&group))).await {
            let error = chain(&error);
            self.lose();
            return Err(error);
        }
        if let Some(rewrite) = &mut self.rewrite {
            rewrite.len += writes.len();
            rewrite.since.push(writes);
            if rewrite.len > SINCE_MAX {
                tracing::warn!("writes come faster than the store can be copied; it stays as it is");
                self.give_up();
            }
        }
        Ok(())
    }

    /// Closes the file, and looks for it until it can be written to again.
    fn lose(&mut self) {
        self.rewrite = None;
        let directory = self.directory.clone();
        self.place = Place::Lost(tokio::spawn(async move {
            let mut retry = Backoff::new(RETRY_BASE, RETRY_CAP);
            loop {
                sleep(retry.next(backoff::random())).await;
                let directory = directory.clone();
                match blocking(spawn_blocking(move || find(&directory))).await {
                    Ok(opened) => return Ok(opened),
                    Err(Lost::Open(error)) if !error.may_pass() => return Err(error),
                    Err(error) => tracing::debug!(error = chain(&error), "the store is not usable yet"),
                }
            }
        }));
    }

    /// Ends what goes on beside writing. After this nobody has the directory but the file itself.
    pub(super) async fn close(&mut self) {
        if let Some(rewrite) = self.rewrite.take() {
            // What it made goes unused, and is removed when the next copy begins. A blocking task cannot be cut short.
            let _ = rewrite.task.await;
        }
        if let Place::Lost(search) = &self.place {
            search.abort();
        }
    }

    /// Takes the file that was found.
    pub(super) fn take(&mut self, file: File) {
        self.place = Place::Here(Arc::new(file));
    }

    /// Begins a copy, unless one is under way or has just failed.
    pub(super) fn rewrite(&mut self, now: Instant) {
        let Place::Here(file) = &self.place else { return };
        if self.rewrite.is_some() || self.not_before.is_some_and(|at| now < at) {
            return;
        }
        match file.copy() {
            Ok(copying) => {
                self.rewrite = Some(Rewrite {
                    task: spawn_blocking(|| copying.run()),
                    since: Vec::new(),
                    len: 0,
                });
            }
            Err(error) => {
                tracing::warn!(error = chain(&error), "the store cannot be copied");
                self.not_before = Some(now + COPY_PAUSE);
            }
        }
    }

    fn give_up(&mut self) {
        self.rewrite = None;
        self.not_before = Some(Instant::now() + COPY_PAUSE);
    }

    /// Waits for something to happen; for ever, if nothing can. May be dropped at any time.
    pub(super) async fn happens(&mut self) -> Happened {
        match (&mut self.place, &mut self.rewrite) {
            (Place::Lost(found), _) => match blocking(found).await {
                Ok(opened) => Happened::Found(opened),
                Err(error) => Happened::Unusable(error),
            },
            (Place::Here(_), Some(rewrite)) => Happened::Copied(blocking(&mut rewrite.task).await),
            (Place::Here(_), None) => std::future::pending().await,
        }
    }

    /// The copy goes on: with what was written meanwhile, until that is little; then it takes the file's place. Returns
    /// whether it did.
    pub(super) async fn go_on(&mut self, copied: Result<File, CopyError>) -> bool {
        let Some(Rewrite { since, len, .. }) = self.rewrite.take() else {
            return false;
        };
        let file = match copied {
            Ok(file) => file,
            Err(error) => {
                tracing::warn!(
                    error = chain(&error),
                    "the store was not copied; it stays as it is"
                );
                self.give_up();
                return false;
            }
        };
        let add = spawn_blocking(move || {
            for writes in since {
                file.commit(&writes)?;
            }
            Ok(file)
        });
        if len > SINCE_FEW {
            self.rewrite = Some(Rewrite {
                task: add,
                since: Vec::new(),
                len: 0,
            });
            return false;
        }
        // Nothing else is written until it has its place.
        let placed = blocking(add).await;
        let placed = match placed {
            Ok(file) => match blocking(spawn_blocking(|| file.take_place())).await {
                Ok(file) => Ok(file),
                Err(error) => {
                    // Which of the two has the name after a crash is not known: both are read anew.
                    tracing::error!(%error, "the store's copy cannot take its place");
                    self.lose();
                    return false;
                }
            },
            Err(error) => Err(error),
        };
        match placed {
            Ok(file) => {
                self.place = Place::Here(Arc::new(file));
                true
            }
            Err(error) => {
                tracing::warn!(
                    error = chain(&error),
                    "the store was not copied; it stays as it is"
                );
                self.give_up();
                false
            }
        }
    }
}

/// Why a file is still lost.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Write(#[from] CommitError),
}

fn find(directory: &Arc<Directory>) -> Result<Box<Opened>, Lost> {
    // Without the file there is nothing to find: a new one would be another history, and that is never used.
    let opened = directory.open_again()?;
    opened.file.try_write(TRIAL_BYTES)?;
    Ok(Box::new(opened))
}

/// A panic in a task is a broken invariant: it ends the task that waits too, and nothing more is acknowledged.
async fn blocking<T>(task: impl Future<Output = Result<T, tokio::task::JoinError>>) -> T {
    task.await
        .unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

/// An error and what caused it.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}
