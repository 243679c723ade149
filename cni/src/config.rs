//! The network configuration on standard input.
//!
//! In: at most [`CONFIG_LEN_MAX`] bytes of JSON from the runtime. Out: [`NetworkConfig`], checked. Fields that the
//! plugin does not know are ignored, as the specification asks; known fields that it cannot honour are refused.

use std::{net::IpAddr, path::PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::{
    failure::{CniError, Code},
    version::CniVersion,
};

/// Longest configuration that is read: 1 MiB, room for the attachments of thousands of pods.
pub const CONFIG_LEN_MAX: usize = 1 << 20;
/// Where the agent listens if the configuration does not say.
pub const AGENT_SOCKET_DEFAULT: &str = "/var/run/isthmus/agent.sock";
/// Longest path of a unix socket: the kernel's limit.
const SOCKET_PATH_LEN_MAX: usize = 107;
/// Longest network name.
const NAME_LEN_MAX: usize = 253;

/// A checked configuration.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NetworkConfig {
    /// Version of configuration and result.
    pub version: CniVersion,
    /// The network's name.
    pub name: String,
    /// The agent's socket.
    pub agent_socket: PathBuf,
    /// Where to add a line per command; none if absent.
    pub log_file: Option<PathBuf>,
    /// Result of the ADD, for CHECK and DEL.
    pub prev_result: Option<PrevResult>,
    /// GC: the attachments that still exist. None if the runtime did not say.
    pub valid_attachments: Option<Vec<ValidAttachment>>,
}

/// An attachment that the runtime still has.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
pub struct ValidAttachment {
    /// Container.
    #[serde(rename = "containerID")]
    pub container_id: String,
    /// Interface.
    pub ifname: String,
}

/// What the plugin reads of an earlier result; the same in all supported versions.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(default)]
pub struct PrevResult {
    /// Interfaces, the host's and the pod's.
    pub interfaces: Vec<PrevInterface>,
    /// Addresses.
    pub ips: Vec<PrevIp>,
}

/// An interface of an earlier result.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(default)]
pub struct PrevInterface {
    /// Name.
    pub name: String,
    /// Text MAC address.
    pub mac: String,
    /// Path of the network namespace; empty for the host's.
    pub sandbox: String,
}

/// An address of an earlier result.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
pub struct PrevIp {
    /// With prefix length.
    pub address: String,
    /// Next hop.
    pub gateway: Option<IpAddr>,
}

/// The fields as they come.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    cni_version: Option<String>,
    name: Option<String>,
    agent_socket: Option<PathBuf>,
    log_file: Option<PathBuf>,
    ipam: Option<Value>,
    prev_result: Option<PrevResult>,
    #[serde(rename = "cni.dev/valid-attachments")]
    valid_attachments: Option<Vec<ValidAttachment>>,
    /// The name in drafts of 1.1.0; libcni sends both.
    #[serde(rename = "cni.dev/attachments")]
    attachments: Option<Vec<ValidAttachment>>,
}

/// The version that a configuration names, as far as it can be read: for the error object, and for VERSION.
pub fn version_of(config: &[u8]) -> Option<CniVersion> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Only {
        cni_version: String,
    }
    if config.len() > CONFIG_LEN_MAX {
        return None;
    }
    CniVersion::parse(&serde_json::from_slice::<Only>(config).ok()?.cni_version)
}

impl NetworkConfig {
    /// Reads and checks a configuration.
    pub fn parse(config: &[u8]) -> Result<Self, CniError> {
        if config.len() > CONFIG_LEN_MAX {
            return Err(invalid(format!(
                "the network configuration is longer than {CONFIG_LEN_MAX} bytes"
            )));
        }
        let raw: Raw = serde_json::from_slice(config).map_err(|error| {
            CniError::new(
                Code::Decode,
                format!("cannot decode the network configuration on standard input: {error}"),
            )
        })?;
        let text = raw.cni_version.unwrap_or_default();
        let version = CniVersion::parse(&text).ok_or_else(|| {
            let text: String = text.chars().take(32).collect();
            let message = format!(
                "cniVersion {text:?} is not supported; this plugin supports {}",
                CniVersion::list()
            );
            CniError::new(Code::IncompatibleVersion, message)
        })?;
        let name = raw.name.unwrap_or_default();
        if !is_name(&name) {
            let name: String = name.chars().take(64).collect();
            return Err(invalid(format!(
                "name {name:?} is not a network name: a letter or digit, then letters, digits, '_', '.' or '-'"
            )));
        }
        if let Some(ipam) = raw.ipam.filter(|ipam| ipam.get("type").is_some()) {
            let message = format!("ipam {ipam}: the agent assigns addresses; remove the field");
            return Err(CniError::new(Code::UnsupportedField, message));
        }
        let agent_socket = raw
            .agent_socket
            .unwrap_or_else(|| PathBuf::from(AGENT_SOCKET_DEFAULT));
        if !agent_socket.is_absolute() || agent_socket.as_os_str().len() > SOCKET_PATH_LEN_MAX {
            return Err(invalid(format!(
                "agentSocket {agent_socket:?} is not an absolute path of at most {SOCKET_PATH_LEN_MAX} bytes"
            )));
        }
        if let Some(path) = raw.log_file.as_ref().filter(|path| !path.is_absolute()) {
            return Err(invalid(format!("logFile {path:?} is not an absolute path")));
        }
        Ok(Self {
            version,
            name,
            agent_socket,
            log_file: raw.log_file,
            prev_result: raw.prev_result,
            valid_attachments: raw.valid_attachments.or(raw.attachments),
        })
    }
}

fn invalid(message: String) -> CniError {
    CniError::new(Code::InvalidConfig, message)
}

/// The specification's form of network names and container IDs.
pub fn is_name(text: &str) -> bool {
    let mut bytes = text.bytes();
    text.len() <= NAME_LEN_MAX
        && bytes.next().is_some_and(|byte| byte.is_ascii_alphanumeric())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
}
