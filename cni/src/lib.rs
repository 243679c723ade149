//! The CNI plugin: connects pods to the node, on behalf of a container runtime.
//!
//! In: the CNI_ variables and a network configuration (specification 0.3.0 to 1.1.0). Out: a result or error object on
//! standard output; a veth pair whose one end is in the pod; the agent's knowledge of the endpoint.
//!
//! The plugin makes the pair and configures the pod's end; the agent assigns addresses and attaches programs. The pure
//! part ([`request`], [`config`], [`interface`], [`result`], [`failure`]) decides; [`agent`], [`netlink`], [`netns`] and
//! [`log`] do; [`operation`] has the order. The plugin keeps no state of its own.

pub mod agent;
pub mod config;
pub mod failure;
pub mod interface;
pub mod log;
pub mod netlink;
pub mod netns;
pub mod operation;
pub mod request;
pub mod result;
pub mod version;

use std::time::{Instant, SystemTime};

use failure::{CniError, Code};
use request::{Environment, Request};
use version::CniVersion;

/// What the process leaves behind.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Outcome {
    /// For standard output.
    pub stdout: String,
    /// Whether the command worked.
    pub success: bool,
}

/// Carries out the command that `environment` and `stdin` describe.
pub fn run(environment: &Environment, stdin: &[u8]) -> Outcome {
    let (now, begun) = (SystemTime::now(), Instant::now());
    let result = Request::parse(environment, stdin).and_then(|request| {
        let result = carry_out(&request);
        log::append(&request, &result, now, begun.elapsed());
        result
    });
    match result {
        Ok(stdout) => Outcome {
            stdout,
            success: true,
        },
        Err(error) => Outcome {
            stdout: error.to_json(config::version_of(stdin).unwrap_or(CniVersion::CURRENT)),
            success: false,
        },
    }
}

fn carry_out(request: &Request) -> Result<String, CniError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| {
            CniError::new(Code::Io, "cannot start the plugin's event loop").also(&error.to_string())
        })?;
    runtime.block_on(operation::run(request))
}
