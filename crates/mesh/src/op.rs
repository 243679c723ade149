//! Map operations and plans: values that say what to write, in which order.
//!
//! Invariant: the operations of a plan are sorted by [`MapOp::phase`]; any prefix of them may be applied. Puts are
//! idempotent, and deleting what is absent counts as success.

use std::sync::Arc;

use isthmus_bpf_abi::{
    Backend, Endpoint, EndpointKey, IpcacheKey, IpcacheValue, MaglevChunk, MaglevKey, ServiceKey,
    ServiceValue, SourceRangeKey,
};

/// One write to one map.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum MapOp {
    /// Writes a frontend (slot 0) or one of its slots.
    ServicePut(ServiceKey, ServiceValue),
    /// Removes a frontend (slot 0) or one of its slots.
    ServiceDelete(ServiceKey),
    /// Writes a backend by its number.
    BackendPut(u32, Backend),
    /// Removes a backend.
    BackendDelete(u32),
    /// Writes a part of a Maglev table.
    MaglevPut(MaglevKey, Arc<MaglevChunk>),
    /// Removes a part of a Maglev table.
    MaglevDelete(MaglevKey),
    /// Lets a prefix ask a frontend.
    SourceRangePut(SourceRangeKey),
    /// No longer lets it.
    SourceRangeDelete(SourceRangeKey),
    /// Writes an ipcache entry.
    IpcachePut(IpcacheKey, IpcacheValue),
    /// Removes an ipcache entry.
    IpcacheDelete(IpcacheKey),
    /// Writes a local endpoint.
    EndpointPut(EndpointKey, Endpoint),
    /// Removes a local endpoint.
    EndpointDelete(EndpointKey),
}

/// The map entry that an operation writes: of two operations on one object the later one counts.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Object {
    /// Entry of `isthmus_services`.
    Service(ServiceKey),
    /// Entry of `isthmus_backends`.
    Backend(u32),
    /// Entry of `isthmus_maglev`.
    Maglev(MaglevKey),
    /// Entry of `isthmus_source_ranges`.
    SourceRange(SourceRangeKey),
    /// Entry of `isthmus_ipcache`.
    Ipcache(IpcacheKey),
    /// Entry of `isthmus_endpoints`.
    Endpoint(EndpointKey),
}

impl MapOp {
    /// Place in a plan. Within a phase all operations are of one kind on one map (frontends' puts and deletes share one), and
    /// their order does not matter.
    pub const fn phase(&self) -> u8 {
        match self {
            Self::IpcachePut(..) | Self::EndpointPut(..) => 0,
            Self::BackendPut(..) => 1,
            Self::SourceRangePut(_) => 2,
            Self::ServicePut(key, _) if key.slot != 0 => 3,
            Self::MaglevPut(..) => 4,
            Self::ServicePut(..) => 5,
            Self::ServiceDelete(key) if key.slot == 0 => 5,
            Self::ServiceDelete(..) => 6,
            Self::MaglevDelete(_) => 7,
            Self::SourceRangeDelete(_) => 8,
            Self::BackendDelete(..) => 9,
            Self::IpcacheDelete(..) | Self::EndpointDelete(..) => 10,
        }
    }

    /// The entry it writes.
    pub const fn object(&self) -> Object {
        match self {
            Self::ServicePut(key, _) | Self::ServiceDelete(key) => Object::Service(*key),
            Self::BackendPut(id, _) | Self::BackendDelete(id) => Object::Backend(*id),
            Self::MaglevPut(key, _) | Self::MaglevDelete(key) => Object::Maglev(*key),
            Self::SourceRangePut(key) | Self::SourceRangeDelete(key) => Object::SourceRange(*key),
            Self::IpcachePut(key, _) | Self::IpcacheDelete(key) => Object::Ipcache(*key),
            Self::EndpointPut(key, _) | Self::EndpointDelete(key) => Object::Endpoint(*key),
        }
    }
}

/// Operations in order, each with the failure domain it belongs to.
///
/// When an operation fails, the later ones of its domain must not be applied before it succeeded; other domains go on.
/// Domain 0 holds operations that depend on nothing.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Plan {
    /// What to write, in this order.
    pub ops: Vec<MapOp>,
    /// The failure domain of each of `ops`: as many.
    pub domains: Vec<u32>,
    /// Pairs of domains that have to do with each other from now on: what one holds up, the other waits for too.
    pub links: Vec<(u32, u32)>,
}

impl Plan {
    /// Whether nothing is to be done.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// How many operations there are.
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    /// A plan of independent operations.
    pub fn independent(ops: Vec<MapOp>) -> Self {
        let domains = vec![0; ops.len()];
        Self {
            ops,
            domains,
            links: Vec::new(),
        }
    }

    /// Puts `other`'s operations in among these, phase by phase.
    pub fn merge(&mut self, mut other: Self) {
        self.links.append(&mut other.links);
        if self.is_empty() {
            (self.ops, self.domains) = (other.ops, other.domains);
            return;
        }
        if other.is_empty() {
            return;
        }
        let mine = std::mem::take(&mut self.ops)
            .into_iter()
            .zip(std::mem::take(&mut self.domains));
        let mut both: Vec<(MapOp, u32)> = mine.chain(other.into_pairs()).collect();
        both.sort_by_key(|(op, _)| op.phase());
        (self.ops, self.domains) = both.into_iter().unzip();
    }

    /// Each operation with its domain.
    pub fn into_pairs(self) -> impl Iterator<Item = (MapOp, u32)> {
        self.ops.into_iter().zip(self.domains)
    }

    pub(crate) fn push(&mut self, op: MapOp, domain: u32) {
        self.ops.push(op);
        self.domains.push(domain);
    }

    pub(crate) fn append(&mut self, other: &mut Self) {
        self.ops.append(&mut other.ops);
        self.domains.append(&mut other.domains);
    }
}

/// Contents of the load-balancing maps, in any order.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct LbDump {
    /// `isthmus_services`.
    pub services: Vec<(ServiceKey, ServiceValue)>,
    /// `isthmus_backends`.
    pub backends: Vec<(u32, Backend)>,
    /// `isthmus_maglev`.
    pub maglev: Vec<(MaglevKey, Arc<MaglevChunk>)>,
    /// `isthmus_source_ranges`.
    pub source_ranges: Vec<SourceRangeKey>,
}
