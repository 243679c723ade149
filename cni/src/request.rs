//! From environment and standard input to a typed request: all that can be refused without touching the system.
//!
//! In: the CNI_ variables and the configuration's bytes. Out: [`Request`]. Pure; a request that exists is well formed.

use std::{ffi::OsString, path::PathBuf};

use crate::{
    config::{self, NetworkConfig, ValidAttachment},
    failure::{CniError, Code},
    version::CniVersion,
};

/// Longest container ID: it must fit, with the interface's name, into the 255 bytes of an interface's alias.
const CONTAINER_ID_LEN_MAX: usize = 200;
/// Longest interface name: the kernel's limit.
pub const IFNAME_LEN_MAX: usize = 15;
/// Longest Kubernetes name (a DNS subdomain).
const K8S_NAME_LEN_MAX: usize = 253;

/// The CNI_ variables as they come; none if unset.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// CNI_COMMAND.
    pub command: Option<OsString>,
    /// CNI_CONTAINERID.
    pub container_id: Option<OsString>,
    /// CNI_NETNS.
    pub netns: Option<OsString>,
    /// CNI_IFNAME.
    pub ifname: Option<OsString>,
    /// CNI_ARGS.
    pub args: Option<OsString>,
}

impl Environment {
    /// The process's variables.
    pub fn of_process() -> Self {
        let set = |name| std::env::var_os(name).filter(|value: &OsString| !value.is_empty());
        Self {
            command: set("CNI_COMMAND"),
            container_id: set("CNI_CONTAINERID"),
            netns: set("CNI_NETNS"),
            ifname: set("CNI_IFNAME"),
            args: set("CNI_ARGS"),
        }
    }
}

/// One interface of one container.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Attachment {
    /// Container ID.
    pub container_id: String,
    /// Name inside the pod.
    pub ifname: String,
}

impl Attachment {
    /// Alias of the node's end of the pair: says whose it is, so that nothing else is ever removed by name.
    pub fn alias(&self) -> String {
        format!("isthmus:{}/{}", self.container_id, self.ifname)
    }
}

/// The pod that an attachment belongs to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Pod {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID; empty if the runtime does not pass it.
    pub uid: String,
}

/// What the runtime asks for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Request {
    /// Attach.
    Add {
        /// Network.
        config: NetworkConfig,
        /// Which interface.
        attachment: Attachment,
        /// Path of the pod's network namespace.
        netns: PathBuf,
        /// Whose.
        pod: Pod,
    },
    /// Detach.
    Del {
        /// Network.
        config: NetworkConfig,
        /// Which interface.
        attachment: Attachment,
        /// Path of the pod's network namespace, if there is one still.
        netns: Option<PathBuf>,
    },
    /// Compare with the result of ADD.
    Check {
        /// Network, with the result.
        config: NetworkConfig,
        /// Which interface.
        attachment: Attachment,
        /// Path of the pod's network namespace.
        netns: PathBuf,
    },
    /// Would ADD work?
    Status {
        /// Network.
        config: NetworkConfig,
    },
    /// Detach all but these.
    Gc {
        /// Network.
        config: NetworkConfig,
        /// What still exists.
        valid: Vec<ValidAttachment>,
    },
    /// Which versions?
    Version {
        /// Version of the answer.
        version: CniVersion,
    },
}

impl Request {
    /// Reads a request.
    pub fn parse(environment: &Environment, stdin: &[u8]) -> Result<Self, CniError> {
        let command = required(&environment.command, "CNI_COMMAND")?;
        if command == "VERSION" {
            return Ok(Self::Version {
                version: config::version_of(stdin).unwrap_or(CniVersion::CURRENT),
            });
        }
        let since = match command.as_str() {
            "ADD" | "DEL" => CniVersion::V0_3_0,
            "CHECK" => CniVersion::V0_4_0,
            "STATUS" | "GC" => CniVersion::V1_1_0,
            _ => {
                let command: String = command.chars().take(32).collect();
                return Err(environment_error(format!(
                    "CNI_COMMAND is {command:?}; it takes ADD, DEL, CHECK, STATUS, GC, VERSION"
                )));
            }
        };
        let config = NetworkConfig::parse(stdin)?;
        if config.version < since {
            let message = format!(
                "{command} exists since version {since}; the configuration has cniVersion {}",
                config.version
            );
            return Err(CniError::new(Code::IncompatibleVersion, message));
        }
        match command.as_str() {
            "ADD" => {
                if config.prev_result.is_some() {
                    let message = "prevResult is set: this plugin makes the interface itself and must come first in \
                                   the list of plugins";
                    return Err(CniError::new(Code::UnsupportedField, message));
                }
                let (attachment, netns) = (attachment(environment)?, required_netns(environment)?);
                Ok(Self::Add {
                    config,
                    attachment,
                    netns,
                    pod: pod(environment)?,
                })
            }
            "DEL" => {
                let attachment = attachment(environment)?;
                let netns = environment.netns.clone().map(PathBuf::from);
                Ok(Self::Del {
                    config,
                    attachment,
                    netns,
                })
            }
            "CHECK" => {
                if config.prev_result.is_none() {
                    let message = "CHECK needs prevResult, the result of ADD, in the configuration";
                    return Err(CniError::new(Code::InvalidConfig, message));
                }
                let (attachment, netns) = (attachment(environment)?, required_netns(environment)?);
                Ok(Self::Check {
                    config,
                    attachment,
                    netns,
                })
            }
            "STATUS" => Ok(Self::Status { config }),
            // The match above leaves GC alone.
            _ => {
                let mut config = config;
                // Absent is not empty: with an empty list every pod would lose its network.
                let valid = config.valid_attachments.take().ok_or_else(|| {
                    let message =
                        "GC needs cni.dev/valid-attachments in the configuration; it may be an empty list";
                    CniError::new(Code::InvalidConfig, message)
                })?;
                Ok(Self::Gc { config, valid })
            }
        }
    }
}

fn environment_error(message: impl Into<String>) -> CniError {
    CniError::new(Code::InvalidEnvironment, message)
}

fn required(value: &Option<OsString>, name: &str) -> Result<String, CniError> {
    let value = value
        .as_ref()
        .ok_or_else(|| environment_error(format!("{name} is not set")))?;
    let text = value
        .to_str()
        .ok_or_else(|| environment_error(format!("{name} is {value:?}, which is not UTF-8")))?;
    Ok(text.to_owned())
}

fn required_netns(environment: &Environment) -> Result<PathBuf, CniError> {
    environment
        .netns
        .clone()
        .map(PathBuf::from)
        .ok_or_else(|| environment_error("CNI_NETNS is not set"))
}

fn attachment(environment: &Environment) -> Result<Attachment, CniError> {
    let container_id = required(&environment.container_id, "CNI_CONTAINERID")?;
    if !config::is_name(&container_id) || container_id.len() > CONTAINER_ID_LEN_MAX {
        let shown: String = container_id.chars().take(64).collect();
        return Err(environment_error(format!(
            "CNI_CONTAINERID is {shown:?}; it takes at most {CONTAINER_ID_LEN_MAX} letters, digits, '_', '.' or '-', \
             starting with a letter or digit"
        )));
    }
    let ifname = required(&environment.ifname, "CNI_IFNAME")?;
    if !is_ifname(&ifname) {
        let shown: String = ifname.chars().take(64).collect();
        return Err(environment_error(format!(
            "CNI_IFNAME is {shown:?}; it takes at most {IFNAME_LEN_MAX} visible characters without '/' and ':'"
        )));
    }
    Ok(Attachment { container_id, ifname })
}

/// Whether the kernel would take `name` for an interface; stricter, ASCII alone.
pub fn is_ifname(name: &str) -> bool {
    (1..=IFNAME_LEN_MAX).contains(&name.len())
        && !matches!(name, "." | "..")
        && name
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && !b"/:%".contains(&byte))
}

/// The pod in CNI_ARGS: `KEY=VALUE` pairs between semicolons; other keys are the runtime's affair.
fn pod(environment: &Environment) -> Result<Pod, CniError> {
    let args = required(&environment.args, "CNI_ARGS")?;
    let mut pod = Pod {
        namespace: String::new(),
        name: String::new(),
        uid: String::new(),
    };
    for pair in args.split(';').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').ok_or_else(|| {
            let pair: String = pair.chars().take(64).collect();
            environment_error(format!("CNI_ARGS has {pair:?}, which is not KEY=VALUE"))
        })?;
        match key {
            "K8S_POD_NAMESPACE" => pod.namespace = value.to_owned(),
            "K8S_POD_NAME" => pod.name = value.to_owned(),
            "K8S_POD_UID" => pod.uid = value.to_owned(),
            _ => {}
        }
    }
    for (key, value) in [("K8S_POD_NAMESPACE", &pod.namespace), ("K8S_POD_NAME", &pod.name)] {
        if value.is_empty() {
            return Err(environment_error(format!(
                "CNI_ARGS has no {key}: only Kubernetes pods can be attached"
            )));
        }
        check_k8s_name(key, value)?;
    }
    if !pod.uid.is_empty() {
        check_k8s_name("K8S_POD_UID", &pod.uid)?;
    }
    Ok(pod)
}

fn check_k8s_name(key: &str, value: &str) -> Result<(), CniError> {
    let edge = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = value.as_bytes();
    let valid = value.len() <= K8S_NAME_LEN_MAX
        && bytes.first().is_some_and(edge)
        && bytes.last().is_some_and(edge)
        && bytes.iter().all(|byte| edge(byte) || b".-".contains(byte));
    if valid {
        return Ok(());
    }
    let shown: String = value.chars().take(64).collect();
    Err(environment_error(format!(
        "{key} in CNI_ARGS is {shown:?}, which is not a Kubernetes name"
    )))
}

#[cfg(test)]
mod tests;
