//! What is wrong with objects, said once.

use std::{collections::BTreeMap, fmt};

use isthmus_k8s::{ConvertError, Converted, Warning};
use k8s_openapi::{api::core::v1::Namespace, apimachinery::pkg::apis::meta::v1::ObjectMeta};

/// The kinds that are watched.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Kind {
    /// Services.
    Services,
    /// EndpointSlices.
    EndpointSlices,
    /// Pods.
    Pods,
    /// Nodes.
    Nodes,
    /// Namespaces.
    Namespaces,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 5] = [
        Self::Services,
        Self::EndpointSlices,
        Self::Pods,
        Self::Nodes,
        Self::Namespaces,
    ];

    /// Name for logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Services => "services",
            Self::EndpointSlices => "endpointslices",
            Self::Pods => "pods",
            Self::Nodes => "nodes",
            Self::Namespaces => "namespaces",
        }
    }
}

/// Which object of a kind.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ObjectKey {
    /// Namespace, empty for kinds that have none.
    pub namespace: Box<str>,
    /// Name.
    pub name: Box<str>,
}

impl ObjectKey {
    /// The key of an object.
    pub fn of(metadata: &ObjectMeta) -> Self {
        Self {
            namespace: metadata.namespace.as_deref().unwrap_or_default().into(),
            name: metadata.name.as_deref().unwrap_or_default().into(),
        }
    }

    /// The key of an object of a kind without namespaces.
    pub fn cluster_wide(name: &str) -> Self {
        Self {
            namespace: "".into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            self.name.fmt(f)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

/// What is wrong.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Problem {
    /// A part of it was left out.
    #[error(transparent)]
    Warning(#[from] Warning),
    /// The whole object was left out.
    #[error(transparent)]
    Refused(#[from] ConvertError),
}

impl Problem {
    /// The label under which it is counted.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Warning(warning) => warning.reason(),
            Self::Refused(_) => "refused",
        }
    }
}

/// Something wrong with an object.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Report {
    /// Its kind.
    pub kind: Kind,
    /// Which one.
    pub object: ObjectKey,
    /// What.
    pub problem: Problem,
}

/// Remembers what was said of which object. Holds an entry only for objects with problems.
#[derive(Debug, Default)]
pub(super) struct Log {
    known: BTreeMap<(Kind, ObjectKey), Vec<Problem>>,
    fresh: Vec<Report>,
}

impl Log {
    /// Records all problems of an object as it is now.
    pub(super) fn record(&mut self, kind: Kind, object: &ObjectKey, problems: Vec<Problem>) {
        if problems.is_empty() && self.known.is_empty() {
            return;
        }
        let at = (kind, object.clone());
        let known = self.known.remove(&at).unwrap_or_default();
        let fresh = problems.iter().filter(|problem| !known.contains(problem));
        self.fresh.extend(fresh.map(|problem| Report {
            kind,
            object: object.clone(),
            problem: problem.clone(),
        }));
        if !problems.is_empty() {
            self.known.insert(at, problems);
        }
    }

    pub(super) fn take(&mut self) -> Vec<Report> {
        std::mem::take(&mut self.fresh)
    }
}

/// What of a Namespace counts: its labels.
pub(super) fn namespace(
    object: &Namespace,
) -> Result<Option<Converted<BTreeMap<String, String>>>, ConvertError> {
    Ok(Some(Converted {
        value: object.metadata.labels.clone().unwrap_or_default(),
        warnings: vec![],
    }))
}
