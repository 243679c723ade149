//! PEM files: reading them with a size limit, and noticing that they changed.
//!
//! A rotation replaces the certificate and the key one after the other, or swaps the symbolic link above both (Kubernetes
//! Secrets). So a change is noticed by the files' metadata, and a set of files that does not fit together leaves the last
//! good one in force.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, Instant},
};

use rustls::{
    RootCertStore,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};

/// Time until a file that could not be read is tried again: not the file may be at fault, but a table of open files that is full.
const RETRY: Duration = Duration::from_secs(1);

/// Largest PEM file that is read, in bytes.
const FILE_LEN_MAX: u64 = 4 * 1024 * 1024;

/// Why a TLS configuration could not be made from its files.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file is too large to be PEM of ours.
    #[error("{path} is {len} bytes long; a PEM file has at most {FILE_LEN_MAX}")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
    },
    /// A file holds no certificate or key, or a damaged one.
    #[error("{path} has no usable {what} in PEM form: {why}")]
    Pem {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
        /// The parser's words.
        why: String,
    },
    /// The pieces do not fit together, for example a key that belongs to another certificate.
    #[error("{paths} do not make a valid TLS configuration")]
    Config {
        /// The files.
        paths: String,
        /// Why not.
        #[source]
        source: rustls::Error,
    },
    /// The client CA cannot verify anything.
    #[error("{path} cannot be used to verify peers: {why}")]
    Verifier {
        /// The CA file.
        path: PathBuf,
        /// Why not.
        why: String,
    },
}

/// The one crypto provider.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let failed = |source| TlsError::Read {
        path: path.to_owned(),
        source,
    };
    let len = fs::metadata(path).map_err(failed)?.len();
    if len > FILE_LEN_MAX {
        return Err(TlsError::TooLarge {
            path: path.to_owned(),
            len,
        });
    }
    fs::read(path).map_err(failed)
}

fn pem(path: &Path, what: &'static str, why: impl ToString) -> TlsError {
    TlsError::Pem {
        path: path.to_owned(),
        what,
        why: why.to_string(),
    }
}

/// Reads a certificate chain, leaf first.
pub(crate) fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bytes = read(path)?;
    let chain = CertificateDer::pem_slice_iter(&bytes)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| pem(path, "certificate", error))?;
    if chain.is_empty() {
        return Err(pem(path, "certificate", "there is none"));
    }
    Ok(chain)
}

/// Reads a private key: PKCS#8, PKCS#1 or SEC1.
pub(crate) fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|error| pem(path, "private key", error))
}

/// Reads a bundle of CA certificates. One that webpki cannot use is an error: a CA that is silently missing is worse.
pub(crate) fn read_roots(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in read_certificates(path)? {
        roots
            .add(certificate)
            .map_err(|error| pem(path, "CA certificate", error))?;
    }
    Ok(roots)
}

/// What identifies a file's content without reading it: device, inode, length, change time.
type Stamp = Option<(u64, u64, u64, i64, i64)>;

fn stamp(path: &Path) -> Stamp {
    let metadata = fs::metadata(path).ok()?;
    Some((
        metadata.dev(),
        metadata.ino(),
        metadata.len(),
        metadata.ctime(),
        metadata.ctime_nsec(),
    ))
}

/// A value made from files, made again when one of them changed.
pub(crate) struct Reloading<T> {
    paths: Vec<PathBuf>,
    build: Box<dyn Fn() -> Result<T, TlsError> + Send + Sync>,
    current: RwLock<Current<T>>,
}

struct Current<T> {
    stamps: Vec<Stamp>,
    value: Arc<T>,
    /// Why the files as they are now are not the value.
    complaint: Option<String>,
    /// When they are read again, though they did not change.
    retry_at: Option<Instant>,
}

impl<T> Current<T> {
    fn is_of(&self, stamps: &[Stamp], now: Instant) -> bool {
        self.stamps == stamps && self.retry_at.is_none_or(|at| now < at)
    }
}

impl<T> Reloading<T> {
    /// Builds the first value; `paths` are the files that `build` reads.
    pub(crate) fn new(
        paths: Vec<PathBuf>,
        build: impl Fn() -> Result<T, TlsError> + Send + Sync + 'static,
    ) -> Result<Self, TlsError> {
        // Stamps first: a change between the two is then seen as a change next time.
        let stamps = paths.iter().map(|path| stamp(path)).collect();
        let value = Arc::new(build()?);
        Ok(Self {
            paths,
            build: Box::new(build),
            current: RwLock::new(Current {
                stamps,
                value,
                complaint: None,
                retry_at: None,
            }),
        })
    }

    /// The value of the files as they are now, or of the last ones that were good.
    pub(crate) fn current(&self) -> Arc<T> {
        self.current_at(Instant::now())
    }

    fn current_at(&self, now: Instant) -> Arc<T> {
        let stamps: Vec<Stamp> = self.paths.iter().map(|path| stamp(path)).collect();
        {
            let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
            if current.is_of(&stamps, now) {
                return current.value.clone();
            }
        }
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        // Whoever waited for another to build takes what that one has made.
        if current.is_of(&stamps, now) {
            return current.value.clone();
        }
        // Remembered also after a failure, so that a bad set of files is tried and logged once.
        current.stamps = stamps;
        match (self.build)() {
            Ok(value) => {
                tracing::info!(files = ?self.paths, "read changed TLS files");
                current.value = Arc::new(value);
                current.complaint = None;
                current.retry_at = None;
            }
            Err(error) => {
                let complaint = Some(match std::error::Error::source(&error) {
                    Some(source) => format!("{error}: {source}"),
                    None => error.to_string(),
                });
                if current.complaint != complaint {
                    tracing::warn!(error = &error as &dyn std::error::Error, files = ?self.paths, "changed TLS files are not usable; keeping the last good ones");
                }
                current.complaint = complaint;
                current.retry_at = matches!(error, TlsError::Read { .. }).then(|| now + RETRY);
            }
        }
        current.value.clone()
    }

    /// Why the files, as they were last looked at, are not what is used.
    pub(crate) fn complaint(&self) -> Option<String> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        current.complaint.clone()
    }
}

pub(crate) fn names(paths: &[&Path]) -> String {
    let names: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn files_that_could_not_be_read_are_tried_again_and_bad_ones_are_not() {
        let path = std::env::temp_dir().join(format!("isthmus-tls-files-{}", std::process::id()));
        fs::write(&path, "1").unwrap();
        let tries = Arc::new(AtomicU32::new(0));
        let (file, count) = (path.clone(), tries.clone());
        // 1: good. 2 and 3: no file can be opened. 4: good. 5: bad.
        let build = move || match count.fetch_add(1, Ordering::Relaxed) + 1 {
            2 | 3 => Err(TlsError::Read {
                path: file.clone(),
                source: io::Error::other("too many open files"),
            }),
            5 => Err(pem(&file, "key", "none")),
            number => Ok(number),
        };
        let reloading = Reloading::new(vec![path.clone()], build).unwrap();
        let now = Instant::now();
        assert_eq!(*reloading.current_at(now), 1);
        fs::write(&path, "22").unwrap();
        for (at, value, tried) in [
            (0, 1, 2),
            (999, 1, 2),
            (1000, 1, 3),
            (1999, 1, 3),
            (2000, 4, 4),
            (9000, 4, 4),
        ] {
            assert_eq!(
                *reloading.current_at(now + Duration::from_millis(at)),
                value,
                "{at}"
            );
            assert_eq!(tries.load(Ordering::Relaxed), tried, "{at}");
        }
        assert_eq!(reloading.complaint(), None);
        fs::write(&path, "333").unwrap();
        for at in [10_000, 20_000] {
            assert_eq!(*reloading.current_at(now + Duration::from_millis(at)), 4);
            assert_eq!(
                tries.load(Ordering::Relaxed),
                5,
                "what is bad is so until it changes"
            );
        }
        assert!(reloading.complaint().is_some());
        fs::remove_file(&path).unwrap();
    }
}
