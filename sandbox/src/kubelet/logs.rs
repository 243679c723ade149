//! The log of one container: a file of bounded size and one older part.
//!
//! What is written beyond a mebibyte moves the file aside and starts a new one: at most two of them are kept.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncRead, AsyncReadExt};

/// The size at which a log is moved aside.
pub const PART_SIZE_MAX: u64 = 1024 * 1024;

/// A log that is being written.
#[derive(Debug)]
pub struct BoundedLog {
    path: PathBuf,
    file: File,
    size: u64,
    size_max: u64,
}

impl BoundedLog {
    /// Opens the log at `path` and goes on at its end.
    pub fn open(path: PathBuf) -> io::Result<Self> {
        Self::with_limit(path, PART_SIZE_MAX)
    }

    fn with_limit(path: PathBuf, size_max: u64) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(&path)?;
        let size = file.metadata()?.len();
        Ok(Self {
            path,
            file,
            size,
            size_max,
        })
    }

    /// Adds `bytes`.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.size > 0 && self.size + bytes.len() as u64 > self.size_max {
            std::fs::rename(&self.path, older(&self.path))?;
            self.file = OpenOptions::new().create(true).append(true).open(&self.path)?;
            self.size = 0;
        }
        self.size += bytes.len() as u64;
        self.file.write_all(bytes)
    }
}

/// The log of a container of a pod.
pub fn file(pod_dir: &Path, container: &str) -> PathBuf {
    pod_dir.join(format!("{container}.log"))
}

/// All that is kept of the log at `path`, the oldest first.
pub fn read(path: &Path) -> Vec<u8> {
    let mut all = std::fs::read(older(path)).unwrap_or_default();
    all.extend(std::fs::read(path).unwrap_or_default());
    all
}

fn older(path: &Path) -> PathBuf {
    path.with_extension("log.1")
}

/// Copies what a process writes into its log, until the process and all that it started have closed their end.
pub async fn pump(mut from: impl AsyncRead + Unpin, log: Arc<Mutex<BoundedLog>>) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
        // A full disk loses lines; the process must not stand still for it.
        let _ = log.write(&buffer[..length]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_keeps_its_end_and_stays_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let path = file(directory.path(), "c");
        let mut log = BoundedLog::with_limit(path.clone(), 10).unwrap();
        for line in ["aaaa\n", "bbbb\n", "cccc\n", "dddd\n", "eeee\n"] {
            log.write(line.as_bytes()).unwrap();
        }
        assert_eq!(read(&path), b"cccc\ndddd\neeee\n");
    }

    #[test]
    fn a_log_goes_on_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let path = file(directory.path(), "c");
        BoundedLog::open(path.clone()).unwrap().write(b"one\n").unwrap();
        BoundedLog::open(path.clone()).unwrap().write(b"two\n").unwrap();
        assert_eq!(read(&path), b"one\ntwo\n");
    }
}
