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
};

use rustls::{
    RootCertStore,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};

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
            }),
        })
    }

    /// The value of the files as they are now, or of the last ones that were good.
    pub(crate) fn current(&self) -> Arc<T> {
        let stamps: Vec<Stamp> = self.paths.iter().map(|path| stamp(path)).collect();
        {
            let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
            if current.stamps == stamps {
                return current.value.clone();
            }
        }
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        // Whoever waited for another to build takes what that one has made.
        if current.stamps == stamps {
            return current.value.clone();
        }
        // Remembered also after a failure, so that a bad set of files is tried and logged once.
        current.stamps = stamps;
        match (self.build)() {
            Ok(value) => {
                tracing::info!(files = ?self.paths, "read changed TLS files");
                current.value = Arc::new(value);
                current.complaint = None;
            }
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, files = ?self.paths, "changed TLS files are not usable; keeping the last good ones");
                current.complaint = Some(match std::error::Error::source(&error) {
                    Some(source) => format!("{error}: {source}"),
                    None => error.to_string(),
                });
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
