//! The etcd client's YAML file, in the format that Cilium mounts for each cluster. Unknown fields are ignored.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::{Path, PathBuf},
};

use serde::Deserialize;

/// Largest file that is read, in bytes.
const FILE_LEN_MAX: u64 = 1024 * 1024;
/// Most endpoints of one file.
const ENDPOINTS_MAX: usize = 64;

/// Where an etcd is and how to be trusted by it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EtcdConfig {
    /// At least one.
    pub endpoints: Vec<Endpoint>,
    /// CA bundle that the server must chain to. Required for `https`.
    pub trusted_ca_file: Option<PathBuf>,
    /// Client certificate and key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Static name resolution, before DNS is asked.
    pub host_aliases: BTreeMap<String, Vec<IpAddr>>,
}

/// One server's address.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Endpoint {
    /// Whether TLS is spoken.
    pub tls: bool,
    /// Host name, or an address without brackets.
    pub host: String,
    /// Port.
    pub port: u16,
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        if self.host.contains(':') {
            write!(f, "{scheme}://[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{scheme}://{}:{}", self.host, self.port)
        }
    }
}

/// Why a file is not a usable etcd configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read the etcd configuration {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// It is too large.
    #[error("the etcd configuration {path} is {len} bytes long; it may have {FILE_LEN_MAX}")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
    },
    /// It is not YAML of this form.
    #[error("the etcd configuration is not valid YAML")]
    Yaml(#[source] serde_yaml_ng::Error),
    /// A field is wrong.
    #[error("{field} in the etcd configuration {why}")]
    Field {
        /// Which field.
        field: &'static str,
        /// What is wrong and what it takes.
        why: String,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Yaml {
    #[serde(default)]
    endpoints: Option<Vec<String>>,
    #[serde(default)]
    trusted_ca_file: Option<String>,
    #[serde(default)]
    ca_file: Option<String>,
    #[serde(default)]
    cert_file: Option<String>,
    #[serde(default)]
    key_file: Option<String>,
    #[serde(default)]
    insecure_skip_tls_verify: bool,
    #[serde(default)]
    username: Option<String>,
    #[serde(default)]
    cilium_host_aliases: Option<Aliases>,
}

/// New charts write a list, one earlier chart a map.
#[derive(Deserialize)]
#[serde(untagged)]
enum Aliases {
    List(Vec<Alias>),
    Map(BTreeMap<String, AliasIps>),
}

#[derive(Deserialize)]
struct Alias {
    hostname: String,
    ips: Vec<String>,
}

#[derive(Deserialize)]
struct AliasIps {
    ips: Vec<String>,
}

impl EtcdConfig {
    /// Reads `path`.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let failed = |source| ConfigError::Read {
            path: path.to_owned(),
            source,
        };
        let len = std::fs::metadata(path).map_err(failed)?.len();
        if len > FILE_LEN_MAX {
            return Err(ConfigError::TooLarge {
                path: path.to_owned(),
                len,
            });
        }
        Self::parse(&std::fs::read_to_string(path).map_err(failed)?)
    }

    /// Reads the text of a file.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let yaml: Yaml = serde_yaml_ng::from_str(text).map_err(ConfigError::Yaml)?;
        let texts = yaml.endpoints.unwrap_or_default();
        if texts.is_empty() || texts.len() > ENDPOINTS_MAX {
            return Err(field(
                "endpoints",
                format!("has {} entries; it takes 1 to {ENDPOINTS_MAX}", texts.len()),
            ));
        }
        let endpoints = texts
            .iter()
            .map(|text| parse_endpoint(text))
            .collect::<Result<Vec<_>, _>>()?;
        let path = |text: Option<String>| text.filter(|text| !text.is_empty()).map(PathBuf::from);
        let trusted_ca_file = path(yaml.trusted_ca_file).or(path(yaml.ca_file));
        let identity = match (path(yaml.cert_file), path(yaml.key_file)) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            _ => {
                return Err(field(
                    "cert-file, key-file",
                    "must be given both or not at all".into(),
                ));
            }
        };
        if yaml.insecure_skip_tls_verify {
            return Err(field(
                "insecure-skip-tls-verify",
                "is not supported: name the server's CA in trusted-ca-file instead".into(),
            ));
        }
        if yaml.username.is_some_and(|name| !name.is_empty()) {
            return Err(field(
                "username",
                "is not supported: give a client certificate in cert-file and key-file instead".into(),
            ));
        }
        if trusted_ca_file.is_none() && endpoints.iter().any(|endpoint| endpoint.tls) {
            return Err(field(
                "trusted-ca-file",
                "is missing; https endpoints need it".into(),
            ));
        }
        Ok(Self {
            endpoints,
            trusted_ca_file,
            identity,
            host_aliases: aliases(yaml.cilium_host_aliases)?,
        })
    }
}

fn field(field: &'static str, why: String) -> ConfigError {
    ConfigError::Field { field, why }
}

fn parse_endpoint(text: &str) -> Result<Endpoint, ConfigError> {
    let wrong = || {
        field(
            "endpoints",
            format!("has {text:?}; it takes URLs like https://host:2379"),
        )
    };
    let (tls, rest) = match text.split_once("://") {
        Some(("https", rest)) => (true, rest),
        Some(("http", rest)) => (false, rest),
        _ => return Err(wrong()),
    };
    let authority: http::uri::Authority = rest.trim_end_matches('/').parse().map_err(|_| wrong())?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    if host.is_empty() || authority.as_str().contains('@') {
        return Err(wrong());
    }
    // A port that is no number is an error; an absent one is etcd's.
    let port = match authority.port() {
        Some(port) => port.as_str().parse().map_err(|_| wrong())?,
        None if authority.as_str().ends_with(':') => return Err(wrong()),
        None => 2379,
    };
    Ok(Endpoint {
        tls,
        host: host.to_owned(),
        port,
    })
}

fn aliases(yaml: Option<Aliases>) -> Result<BTreeMap<String, Vec<IpAddr>>, ConfigError> {
    let wrong = |why: String| field("cilium-host-aliases", why);
    let pairs: Vec<(String, Vec<String>)> = match yaml {
        None => Vec::new(),
        Some(Aliases::List(list)) => list
            .into_iter()
            .map(|alias| (alias.hostname, alias.ips))
            .collect(),
        Some(Aliases::Map(map)) => map.into_iter().map(|(host, alias)| (host, alias.ips)).collect(),
    };
    let mut seen = BTreeSet::new();
    let mut aliases = BTreeMap::new();
    for (host, ips) in pairs {
        if host.is_empty() || !seen.insert(host.clone()) {
            return Err(wrong(format!(
                "names host {host:?} twice, or a host without a name"
            )));
        }
        let ips = ips
            .iter()
            .map(|ip| {
                ip.parse()
                    .map_err(|_| wrong(format!("has {ip:?} for host {host:?}; it takes IP addresses")))
            })
            .collect::<Result<Vec<IpAddr>, _>>()?;
        if ips.is_empty() {
            return Err(wrong(format!("has no address for host {host:?}")));
        }
        aliases.insert(host, ips);
    }
    Ok(aliases)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_what_ciliums_charts_write() {
        let config = EtcdConfig::parse(
            "endpoints:\n- https://c2.mesh.cilium.io:2379\n- https://[fd00::1]\n\
             trusted-ca-file: /var/lib/cilium/clustermesh/common-etcd-client-ca.crt\n\
             key-file: /k\ncert-file: /c\nauto-sync: true\n\
             cilium-host-aliases:\n- hostname: c2.mesh.cilium.io\n  ips: [172.18.0.4]\n",
        )
        .unwrap();
        assert_eq!(config.endpoints[0].to_string(), "https://c2.mesh.cilium.io:2379");
        assert_eq!(config.endpoints[1].to_string(), "https://[fd00::1]:2379");
        assert_eq!(config.identity, Some(("/c".into(), "/k".into())));
        let alias: IpAddr = "172.18.0.4".parse().unwrap();
        assert_eq!(config.host_aliases["c2.mesh.cilium.io"], [alias]);
        let map =
            EtcdConfig::parse("endpoints: ['http://127.0.0.1:1']\ncilium-host-aliases: {a: {ips: ['::1']}}");
        assert_eq!(map.unwrap().host_aliases.len(), 1);
    }

    #[test]
    fn errors_name_the_field() {
        for (text, words) in [
            ("a: 1", "endpoints"),
            ("endpoints: []", "endpoints"),
            ("endpoints: [c2:2379]", "endpoints"),
            ("endpoints: ['https://a:b']", "endpoints"),
            ("endpoints: ['https://a:']", "endpoints"),
            ("endpoints: ['https://u@a']", "endpoints"),
            ("endpoints: ['https://a']", "trusted-ca-file"),
            ("endpoints: ['http://a']\ncert-file: /c", "key-file"),
            (
                "endpoints: ['http://a']\ninsecure-skip-tls-verify: true",
                "trusted-ca-file",
            ),
            (
                "endpoints: ['http://a']\ncilium-host-aliases: [{hostname: a, ips: []}]",
                "aliases",
            ),
            ("endpoints: [", "YAML"),
        ] {
            let error = EtcdConfig::parse(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn hostile_text_never_panics(text in ".{0,200}", endpoint in ".{0,40}") {
            let _ = EtcdConfig::parse(&text);
            let _ = EtcdConfig::parse(&format!("endpoints: ['{endpoint}']"));
        }
    }
}
