//! Tries a remote cluster's file step by step, and says which step fails: the file, the name, TCP, TLS with both sides'
//! certificates, the answer, and whether what answers is the cluster that the file is named after.
//!
//! Out: findings in the order of the steps. A step that fails ends the way of its address; others go on. Changes nothing.

use std::{
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use bytes::Bytes;
use isthmus_model::ClusterName;
use isthmus_tls::{ClientTls, judge::next_expiry, peer_common_name};
use isthmus_wire::{ClusterConfig, keys};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::{
    client::{CallError, Client, Owner, Part, Read},
    config::{Endpoint, EtcdConfig},
    connect::Options,
    replicas::resolve,
};

/// A certificate that ends sooner is worth a word.
const EXPIRY_NEAR_DAYS: u64 = 30;

/// What a step found.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Finding {
    /// `file`, `certificate`, `name`, `tcp`, `tls`, `etcd` or `cluster`.
    pub step: &'static str,
    /// File, endpoint or address that was tried.
    pub subject: String,
    /// It works.
    pub ok: bool,
    /// What was found, for people.
    pub text: String,
}

impl Finding {
    fn new(step: &'static str, subject: impl ToString, result: Result<String, String>) -> Self {
        let ok = result.is_ok();
        Self {
            step,
            subject: subject.to_string(),
            ok,
            text: result.unwrap_or_else(|text| text),
        }
    }
}

/// Tries the file at `path`, which is named after `cluster`. Each step at each address may take `patience`.
pub async fn troubleshoot(cluster: &ClusterName, path: &Path, patience: Duration) -> Vec<Finding> {
    let config = match EtcdConfig::from_file(path) {
        Ok(config) => config,
        Err(error) => return vec![Finding::new("file", path.display(), Err(causes(&error)))],
    };
    let endpoints = format!("{} endpoints", config.endpoints.len());
    let mut findings = vec![Finding::new("file", path.display(), Ok(endpoints))];
    if let Some((certificate, _)) = &config.identity {
        findings.push(Finding::new(
            "certificate",
            certificate.display(),
            own_certificate(certificate),
        ));
    }
    for endpoint in &config.endpoints {
        let found = tokio::time::timeout(patience, resolve(endpoint, &config)).await;
        match found.unwrap_or_else(|_| Err(format!("no answer within {patience:?}"))) {
            Err(error) => findings.push(Finding::new("name", endpoint, Err(error))),
            Ok(addresses) => {
                let list: Vec<String> = addresses.iter().map(|address| address.ip().to_string()).collect();
                findings.push(Finding::new("name", endpoint, Ok(list.join(", "))));
                for address in addresses {
                    findings.extend(try_address(cluster, endpoint, address, &config, patience).await);
                }
            }
        }
    }
    findings
}

async fn try_address(
    cluster: &ClusterName,
    endpoint: &Endpoint,
    address: SocketAddr,
    config: &EtcdConfig,
    patience: Duration,
) -> Vec<Finding> {
    let late = || format!("no answer within {patience:?}; is a firewall in the way?");
    let begun = Instant::now();
    let tcp = match tokio::time::timeout(patience, TcpStream::connect(address)).await {
        Ok(Ok(tcp)) => tcp,
        Ok(Err(error)) => return vec![Finding::new("tcp", address, Err(error.to_string()))],
        Err(_) => return vec![Finding::new("tcp", address, Err(late()))],
    };
    let mut findings = vec![Finding::new(
        "tcp",
        address,
        Ok(format!("connected in {:.1?}", begun.elapsed())),
    )];
    if endpoint.tls {
        let shaken = tokio::time::timeout(patience, handshake(endpoint, tcp, config)).await;
        let finding = Finding::new("tls", address, shaken.unwrap_or_else(|_| Err(late())));
        let ok = finding.ok;
        findings.push(finding);
        if !ok {
            return findings;
        }
    }
    let mut pinned = config.clone();
    pinned.endpoints = vec![endpoint.clone()];
    pinned
        .host_aliases
        .insert(endpoint.host.clone(), vec![address.ip()]);
    let options = Options {
        connect_timeout: patience,
        call_timeout: patience,
        ..Options::default()
    };
    let read = Read {
        start: Bytes::from(keys::cluster_config(cluster)),
        end: Bytes::new(),
        limit: 0,
        revision: 0,
        serializable: false,
        part: Part::All,
    };
    let answer = match Client::connect_to(Owner::Others, &pinned, &options).await {
        Ok(client) => client.read(&read).await.map_err(|error| match error {
            CallError::Denied => format!(
                "{error}; the certificate's name must be remote, remote-<this cluster> or local-<cluster>, and the file's name that of the \
                 cluster that answers"
            ),
            error => error.to_string(),
        }),
        Err(error) => Err(causes(&error)),
    };
    match answer {
        Err(error) => findings.push(Finding::new("etcd", address, Err(error))),
        Ok((header, page)) => {
            findings.push(Finding::new(
                "etcd",
                address,
                Ok(format!("answers, at revision {}", header.revision)),
            ));
            let told = match page.kvs.first().map(|kv| ClusterConfig::decode(&kv.value)) {
                None => Err(format!(
                    "it has no config of cluster {cluster}: the file is named after another cluster, or the operator there has not \
                     published it yet"
                )),
                Some(Err(refusal)) => Err(format!("its config of cluster {cluster} is not valid: {refusal}")),
                Some(Ok(config)) => Ok(format!(
                    "is {cluster}, with ID {} in a mesh of {}",
                    config.id, config.capabilities.max_connected_clusters
                )),
            };
            findings.push(Finding::new("cluster", address, told));
        }
    }
    findings
}

async fn handshake(endpoint: &Endpoint, tcp: TcpStream, config: &EtcdConfig) -> Result<String, String> {
    // EtcdConfig rules out an https endpoint without a CA.
    let ca = config.trusted_ca_file.as_deref().unwrap_or(Path::new(""));
    let identity = config.identity.as_ref();
    let identity = identity.map(|(certificate, key)| (certificate.as_path(), key.as_path()));
    let tls = ClientTls::from_files(ca, identity).map_err(|error| causes(&error))?;
    let name = ServerName::try_from(endpoint.host.clone()).map_err(|error| error.to_string())?;
    let stream = TlsConnector::from(tls.config())
        .connect(name, tcp)
        .await
        .map_err(|error| format!("{error}; trusted-ca-file is {}", ca.display()))?;
    let (_, session) = stream.get_ref();
    let chain = session.peer_certificates().unwrap_or_default();
    let name = peer_common_name(chain).unwrap_or_else(|_| "without a name".to_owned());
    let version = session
        .protocol_version()
        .map_or(String::new(), |version| format!("{version:?}, "));
    Ok(format!(
        "{version}server certificate {name}, {}",
        validity(chain)?
    ))
}

fn own_certificate(path: &Path) -> Result<String, String> {
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| format!("cannot be read: {error}"))?;
    let name = peer_common_name(&chain).map_err(|error| causes(&error))?;
    Ok(format!("client certificate {name}, {}", validity(&chain)?))
}

fn validity(chain: &[CertificateDer<'_>]) -> Result<String, String> {
    let now = UnixTime::now();
    // Of the leaf: the others of a chain outlive it, or the handshake fails.
    let end = chain.get(..1).and_then(|leaf| next_expiry(leaf, now));
    let left = end.map(|end| end.as_secs().saturating_sub(now.as_secs()) / 86_400);
    match left {
        None => Err("the certificate has expired, or is none".to_owned()),
        Some(days) if days < EXPIRY_NEAR_DAYS => Ok(format!("valid for {days} more days only")),
        Some(days) => Ok(format!("valid for {days} more days")),
    }
}

fn causes(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", causes(source)),
        None => error.to_string(),
    }
}
