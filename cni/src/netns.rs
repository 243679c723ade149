//! Network namespaces: work inside a pod's, on a thread of its own.
//!
//! In: a path from the runtime, and what to do there. Out: its result. The process's other threads never leave the
//! node's namespace, and the thread that did ends with the work.

use std::{
    fs::File,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::sched::{CloneFlags, setns};

use crate::netlink::{Netlink, NetlinkError};

/// Going into a namespace failed, or the work there did.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// There is none.
    #[error("there is no network namespace at {path}")]
    Absent {
        /// Its path.
        path: PathBuf,
    },
    /// It cannot be opened or entered.
    #[error("cannot {doing} the network namespace {path}")]
    Enter {
        /// open, enter, compare.
        doing: &'static str,
        /// Its path.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A call inside.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The thread inside ended without a result.
    #[error("the work inside the network namespace {path} was cut short")]
    Lost {
        /// Its path.
        path: PathBuf,
    },
}

/// An open network namespace: it exists at least as long as this does. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Netns {
    file: Arc<File>,
    path: PathBuf,
}

impl Netns {
    /// Opens the namespace at `path`.
    pub fn open(path: &Path) -> Result<Self, NetnsError> {
        match File::open(path) {
            Ok(file) => Ok(Self {
                file: Arc::new(file),
                path: path.to_owned(),
            }),
            // ENOTDIR, ESRCH: below /proc, of a process that is gone.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(nix::libc::ENOENT | nix::libc::ENOTDIR | nix::libc::ESRCH)
                ) =>
            {
                Err(NetnsError::Absent {
                    path: path.to_owned(),
                })
            }
            Err(source) => Err(NetnsError::Enter {
                doing: "open",
                path: path.to_owned(),
                source,
            }),
        }
    }

    /// Its descriptor.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The path it was opened at.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is the one that the calling thread is in.
    pub fn is_current(&self) -> Result<bool, NetnsError> {
        let compare = || {
            let (there, here) = (
                self.file.metadata()?,
                std::fs::metadata("/proc/thread-self/ns/net")?,
            );
            Ok((there.dev(), there.ino()) == (here.dev(), here.ino()))
        };
        compare().map_err(|source| NetnsError::Enter {
            doing: "compare",
            path: self.path.clone(),
            source,
        })
    }

    /// Runs `work` inside, with a netlink socket of the namespace.
    pub async fn run<T, F>(&self, work: F) -> Result<T, NetnsError>
    where
        T: Send + 'static,
        F: AsyncFnOnce(Netlink) -> Result<T, NetlinkError> + Send + 'static,
    {
        let (done, result) = tokio::sync::oneshot::channel();
        let netns = self.clone();
        std::thread::spawn(move || {
            // The receiver is gone when the whole operation ran out of time: nobody waits for the result.
            let _ = done.send(netns.run_here(work));
        });
        result.await.unwrap_or_else(|_| {
            Err(NetnsError::Lost {
                path: self.path.clone(),
            })
        })
    }

    fn run_here<T, F>(&self, work: F) -> Result<T, NetnsError>
    where
        F: AsyncFnOnce(Netlink) -> Result<T, NetlinkError>,
    {
        let failed = |source| NetnsError::Enter {
            doing: "enter",
            path: self.path.clone(),
            source,
        };
        setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(|error| failed(error.into()))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(failed)?;
        runtime.block_on(async { Ok(work(Netlink::open()?).await?) })
    }
}
