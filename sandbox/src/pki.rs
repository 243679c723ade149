//! The certificates of a sandbox: one CA, a server certificate per cluster, clients by role.
//!
//! Out, in the sandbox's `pki` directory: `ca.crt`; per cluster `server-<c>`, `admin-<c>`, `local-<c>` (agents to
//! their own API server) and `remote-<c>` (this cluster's mirror to the API servers of others), each as `.crt` and
//! `.key`. The common name of a client certificate is its file's name: it decides what the client may read.
//! The CA's key is never written.

use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use crate::plan::Plan;

/// Why certificates could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// The generator refused.
    #[error("cannot make the certificate `{name}`")]
    Generate {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
    /// A file could not be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Makes and writes all certificates.
pub fn write_all(plan: &Plan) -> Result<(), PkiError> {
    let directory = plan.pki_dir();
    std::fs::create_dir_all(&directory).map_err(|source| PkiError::Write {
        path: directory.clone(),
        source,
    })?;
    let (ca_pem, ca) = authority(&plan.name)?;
    write(&directory, "ca.crt", &ca_pem)?;
    for cluster in &plan.clusters {
        let name = &cluster.name;
        let names = vec![
            "*.mesh.cilium.io".to_owned(),
            "clustermesh-apiserver.cilium.io".to_owned(),
            "localhost".to_owned(),
            "127.0.0.1".to_owned(),
            cluster.address.to_string(),
            cluster.loopback.to_string(),
        ];
        leaf(
            &directory,
            &ca,
            &format!("server-{name}"),
            names,
            ExtendedKeyUsagePurpose::ServerAuth,
        )?;
        for role in ["admin", "local", "remote"] {
            leaf(
                &directory,
                &ca,
                &format!("{role}-{name}"),
                Vec::new(),
                ExtendedKeyUsagePurpose::ClientAuth,
            )?;
        }
    }
    Ok(())
}

/// The CA, certificate and key of a client: what a cluster file names.
pub fn client_pair(plan: &Plan, role: &str, cluster: &str) -> (PathBuf, PathBuf, PathBuf) {
    let directory = plan.pki_dir();
    let file = |ending| directory.join(format!("{role}-{cluster}.{ending}"));
    (directory.join("ca.crt"), file("crt"), file("key"))
}

fn authority(sandbox: &str) -> Result<(String, Issuer<'static, KeyPair>), PkiError> {
    let name = format!("isthmus-sandbox-{sandbox}");
    let failed = |source| PkiError::Generate {
        name: name.clone(),
        source,
    };
    let mut params = CertificateParams::new(Vec::new()).map_err(failed)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name.push(DnType::CommonName, name.clone());
    validity(&mut params);
    let key = KeyPair::generate().map_err(failed)?;
    let certificate = params.self_signed(&key).map_err(failed)?;
    Ok((certificate.pem(), Issuer::new(params, key)))
}

fn leaf(
    directory: &Path,
    ca: &Issuer<'_, KeyPair>,
    name: &str,
    alternative_names: Vec<String>,
    usage: ExtendedKeyUsagePurpose,
) -> Result<(), PkiError> {
    let failed = |source| PkiError::Generate {
        name: name.into(),
        source,
    };
    let mut params = CertificateParams::new(alternative_names).map_err(failed)?;
    params.distinguished_name.push(DnType::CommonName, name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage];
    params.use_authority_key_identifier_extension = true;
    validity(&mut params);
    let key = KeyPair::generate().map_err(failed)?;
    let certificate = params.signed_by(&key, ca).map_err(failed)?;
    write(directory, &format!("{name}.crt"), &certificate.pem())?;
    write(directory, &format!("{name}.key"), &key.serialize_pem())
}

/// Long enough for any clock: a sandbox's certificates die with its directory.
fn validity(params: &mut CertificateParams) {
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2120, 1, 1);
}

fn write(directory: &Path, name: &str, pem: &str) -> Result<(), PkiError> {
    let path = directory.join(name);
    let mode = if name.ends_with(".key") { 0o600 } else { 0o644 };
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(mode);
    let result = options
        .open(&path)
        .and_then(|mut file| io::Write::write_all(&mut file, pem.as_bytes()));
    result.map_err(|source| PkiError::Write { path, source })
}
