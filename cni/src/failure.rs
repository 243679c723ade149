//! Errors as the specification wants them: a number that the runtime acts on, and text for people.
//!
//! In: what went wrong. Out: the JSON object for standard output. Codes below 100 are the specification's.

use std::error::Error;

use serde::Serialize;

use crate::version::CniVersion;

/// The number in an error object.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub enum Code {
    /// The configuration's version is not supported, or has no such command.
    IncompatibleVersion = 1,
    /// A field of the configuration has a value that the plugin cannot honour.
    UnsupportedField = 2,
    /// The container does not exist; the runtime need not clean up.
    UnknownContainer = 3,
    /// A CNI_ variable is missing or wrong.
    InvalidEnvironment = 4,
    /// Input or output failed.
    Io = 5,
    /// The configuration is not JSON of the right shape.
    Decode = 6,
    /// The configuration is well formed and wrong.
    InvalidConfig = 7,
    /// Something that should pass: the runtime may repeat the command.
    TryAgainLater = 11,
    /// STATUS: ADD would fail.
    NotAvailable = 50,
    /// The agent refused.
    AgentRefused = 100,
    /// The kernel refused.
    Kernel = 101,
    /// The pod has an interface of that name that is not ours.
    InterfaceExists = 102,
    /// CHECK found a difference.
    CheckFailed = 103,
}

/// Why a command failed.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct CniError {
    /// What the runtime acts on.
    pub code: Code,
    /// One line: what failed, with which input, what to do.
    pub message: String,
    /// More for people: causes, what was undone. May be empty.
    pub details: String,
}

impl CniError {
    /// An error without details.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            details: String::new(),
        }
    }

    /// An error from another, whose causes become details.
    pub fn from_error(code: Code, error: &(dyn Error + 'static)) -> Self {
        let causes = std::iter::successors(error.source(), |&cause| cause.source());
        let details = causes.map(ToString::to_string).collect::<Vec<_>>().join(": ");
        Self {
            code,
            message: error.to_string(),
            details,
        }
    }

    /// Adds a sentence to the details.
    #[must_use]
    pub fn also(mut self, detail: &str) -> Self {
        if !self.details.is_empty() {
            self.details.push_str("; ");
        }
        self.details.push_str(detail);
        self
    }

    /// The error object.
    pub fn to_json(&self, version: CniVersion) -> String {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Object<'a> {
            cni_version: &'a str,
            code: u32,
            msg: &'a str,
            #[serde(skip_serializing_if = "str::is_empty")]
            details: &'a str,
        }
        crate::result::json(&Object {
            cni_version: version.as_str(),
            code: self.code as u32,
            msg: &self.message,
            details: &self.details,
        })
    }
}
