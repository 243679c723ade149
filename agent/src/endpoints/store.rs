//! The endpoints file: written whole to a new file, synced, renamed over the old one, so that a crash at any moment
//! leaves the old or the new state.
//!
//! In: [`Saved`]. Out: [`Saved`]. A file that does not read is set aside, never overwritten: it holds the only record
//! of which pod has which address.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use super::Saved;

/// Name of the file in the state directory.
pub const FILE_NAME: &str = "endpoints.json";
/// Largest file that is read: 65,535 endpoints of about 500 bytes take half of it.
const FILE_LEN_MAX: u64 = 64 * 1024 * 1024;

/// Where and how the endpoints are kept.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
}

/// The endpoints file could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}", path.display())]
pub struct StoreError {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// What [`Store::load`] found.
#[derive(Debug)]
pub enum Loaded {
    /// There was no file.
    Nothing,
    /// The saved state.
    Saved(Saved),
    /// A file that does not read; it was moved to the path given, with the reason.
    Unreadable {
        /// Where it is now.
        kept_as: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

impl Store {
    /// Keeps the file in `dir`, which is made if it does not exist.
    pub fn new(dir: &Path) -> Result<Self, StoreError> {
        fs::create_dir_all(dir).map_err(failed("make directory", dir))?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// Reads the file.
    pub fn load(&self) -> Result<Loaded, StoreError> {
        let path = self.dir.join(FILE_NAME);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Loaded::Nothing),
            Err(error) => return Err(failed("read", &path)(error)),
        };
        let mut text = Vec::new();
        file.take(FILE_LEN_MAX + 1)
            .read_to_end(&mut text)
            .map_err(failed("read", &path))?;
        let why = if text.len() as u64 > FILE_LEN_MAX {
            format!("larger than {FILE_LEN_MAX} bytes")
        } else {
            match serde_json::from_slice(&text) {
                Ok(saved) => return Ok(Loaded::Saved(saved)),
                Err(error) => error.to_string(),
            }
        };
        let kept_as = self.dir.join(format!("{FILE_NAME}.unreadable"));
        fs::rename(&path, &kept_as).map_err(failed("set aside", &path))?;
        Ok(Loaded::Unreadable { kept_as, why })
    }

    /// Replaces the file.
    pub fn save(&self, saved: &Saved) -> Result<(), StoreError> {
        let path = self.dir.join(FILE_NAME);
        let new = self.dir.join(format!("{FILE_NAME}.new"));
        let text =
            serde_json::to_vec(saved).map_err(|error| failed("encode", &path)(io::Error::other(error)))?;
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)
            .map_err(failed("create", &new))?;
        file.write_all(&text)
            .and_then(|()| file.sync_all())
            .map_err(failed("write", &new))?;
        fs::rename(&new, &path).map_err(failed("replace", &path))?;
        // The rename itself is durable once the directory is.
        File::open(&self.dir)
            .and_then(|dir| dir.sync_all())
            .map_err(failed("sync", &self.dir))
    }

    /// Removes the file.
    pub fn remove(&self) -> Result<(), StoreError> {
        let path = self.dir.join(FILE_NAME);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", &path)(error)),
            _ => Ok(()),
        }
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError { action, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoints::{Attachment, Endpoints, Pod};

    fn saved() -> Saved {
        let mut endpoints = Endpoints::default();
        endpoints.set_cidrs(Some("10.0.0.0/24".parse().unwrap()), None);
        let attachment = Attachment {
            container_id: "c".into(),
            ifname: "eth0".into(),
        };
        endpoints.allocate(attachment, Pod::default()).unwrap();
        endpoints.saved()
    }

    #[test]
    fn what_was_saved_is_loaded_and_a_torn_write_is_not_seen() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(&dir.path().join("state")).unwrap();
        assert!(matches!(store.load().unwrap(), Loaded::Nothing));
        store.save(&saved()).unwrap();
        // A crash in the middle of the next write leaves a torn new file beside the whole old one.
        fs::write(dir.path().join("state/endpoints.json.new"), b"{\"endp").unwrap();
        match store.load().unwrap() {
            Loaded::Saved(loaded) => assert_eq!(loaded, saved()),
            other => panic!("{other:?}"),
        }
        store.remove().unwrap();
        store.remove().unwrap();
        assert!(matches!(store.load().unwrap(), Loaded::Nothing));
    }

    #[test]
    fn an_unreadable_file_is_kept_aside() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path()).unwrap();
        fs::write(dir.path().join(FILE_NAME), b"not json").unwrap();
        let Loaded::Unreadable { kept_as, .. } = store.load().unwrap() else {
            panic!("read it");
        };
        assert_eq!(fs::read(kept_as).unwrap(), b"not json");
        assert!(matches!(store.load().unwrap(), Loaded::Nothing));
    }
}
