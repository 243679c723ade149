//! Kubernetes objects to the model: Services, EndpointSlices, Pods, Nodes, Namespaces and the annotations on them.
//!
//! In: objects as the Kubernetes API hands them out. Out: model values of the cluster that owns the objects, and what was left out
//! on the way as [`Warning`]s. All of it is pure: no client, no clock, no logging.
//!
//! Invariants: the same object always gives the same value, byte for byte once encoded; one bad field never loses the rest of
//! its object; nothing that a pod's author writes can claim another namespace, cluster or service account.
//! Annotations and label rules follow Cilium's `pkg/annotation` and `pkg/labelsfilter`.

use isthmus_model::{ClusterId, ClusterName, ServiceNameError};

pub mod annotations;
pub mod labels;
pub mod node;
pub mod pod;
pub mod service;
pub mod slice;

pub use labels::{LabelFilter, LabelFilterError};
pub use pod::Workload;
pub use slice::PackedSlice;

/// The cluster whose objects are converted.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Cluster {
    /// Its name.
    pub name: ClusterName,
    /// Its ID.
    pub id: ClusterId,
}

/// A value and what was left out or replaced while making it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Converted<T> {
    /// The value.
    pub value: T,
    /// In the order they were found.
    pub warnings: Vec<Warning>,
}

/// Something in an object that could not be used. The rest of the object is.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Warning {
    /// Annotation with a value that it does not take.
    #[error("annotation {name} is {value:?}; it takes {takes}; {used} is used")]
    Annotation {
        /// Which annotation.
        name: &'static str,
        /// Its value, shortened.
        value: String,
        /// What would be right.
        takes: &'static str,
        /// What is used in its place.
        used: &'static str,
    },
    /// Field with a value that is not valid.
    #[error("{field} {value:?} is not valid and is left out")]
    Field {
        /// Which field.
        field: &'static str,
        /// Its value, shortened.
        value: String,
    },
    /// List that is longer than readers accept.
    #[error("{field} has {len} entries; only the first {limit} are used")]
    TooMany {
        /// Which field.
        field: &'static str,
        /// Its length.
        len: usize,
        /// The limit.
        limit: usize,
    },
}

impl Warning {
    /// The label under which it is counted.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Annotation { .. } => "annotation",
            Self::Field { .. } => "field",
            Self::TooMany { .. } => "too_many",
        }
    }

    fn field(field: &'static str, value: &str) -> Self {
        Self::Field {
            field,
            value: shorten(value),
        }
    }
}

/// An object that cannot be published at all.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ConvertError {
    /// Without a name, or a namespace where one is needed.
    #[error("object has no {0}")]
    Missing(&'static str),
    /// Name that would not survive as a part of a key.
    #[error("name {0:?} is longer than 253 bytes or has characters that a key must not have")]
    Name(String),
    /// Service name that would not survive as a part of a key.
    #[error(transparent)]
    ServiceName(#[from] ServiceNameError),
}

/// Text for a message, at most 128 characters.
fn shorten(text: &str) -> String {
    text.chars().take(128).collect()
}

/// Keeps the first `limit` entries and says so if there were more.
fn truncate<T>(list: &mut Vec<T>, field: &'static str, limit: usize, warnings: &mut Vec<Warning>) {
    if list.len() > limit {
        warnings.push(Warning::TooMany {
            field,
            len: list.len(),
            limit,
        });
        list.truncate(limit);
    }
}

/// Checks that `name` can be one element of a key.
fn check_name(name: Option<&String>) -> Result<&str, ConvertError> {
    let name = name
        .filter(|name| !name.is_empty())
        .ok_or(ConvertError::Missing("name"))?;
    let valid = name.len() <= 253
        && name != "."
        && name != ".."
        && name
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && byte != b'/' && byte != b'~');
    if valid {
        Ok(name)
    } else {
        Err(ConvertError::Name(shorten(name)))
    }
}
