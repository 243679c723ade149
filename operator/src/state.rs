//! What the cluster's part of the kvstore shall hold, from what its Kubernetes API has told so far.
//!
//! In: watch events of five kinds ([`State::on`]), the identities that etcd holds ([`State::activate`]), the time. Out: exactly the
//! keys whose desired value changed ([`State::desired`]), in an order in which each of them may be written: identities before
//! the addresses that name them, deletions last. Frames and slices may come in any order: a reader joins them when it has both.
//!
//! Everything desired is a function of the tables and the allocator: [`State::everything`] computes it anew, and a property test
//! holds both against each other. Pure: no I/O, no clock.
//!
//! Invariants: an unchanged object changes no key; a key belongs to one unit, which alone decides on it; nothing is desired before
//! the identities of etcd were taken over, so that no number is ever given twice.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use bytes::Bytes;
use isthmus_k8s::{Cluster, LabelFilter, PackedSlice, Workload, node, pod, service, slice};
use isthmus_model::{IdentityRange, Labels, MaxConnectedClusters, Node, NumericIdentity, ServiceFrame};
use isthmus_wire::{Refusal, keys};
use k8s_openapi::api::{
    core::v1::{Namespace, Node as KubeNode, Pod, Service},
    discovery::v1::EndpointSlice,
};
use kube::runtime::watcher::Event;

use crate::allocator::{Allocator, Exhausted, Retention};
use prefixes::Prefixes;
use table::{Changed, Table};

pub mod prefixes;
mod render;
pub mod report;
mod table;

pub use report::{Kind, ObjectKey, Problem, Report};

/// An event of one of the five watches.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "the queue holds it boxed; a second box would be one allocation more per event"
)]
pub enum Input {
    /// Services.
    Service(Event<Service>),
    /// EndpointSlices.
    Slice(Event<EndpointSlice>),
    /// Pods.
    Pod(Event<Pod>),
    /// Nodes.
    Node(Event<KubeNode>),
    /// Namespaces.
    Namespace(Event<Namespace>),
}

/// A key whose desired value changed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Change {
    /// The whole key.
    pub key: Bytes,
    /// Its new value; `None` if it shall not exist.
    pub value: Option<Bytes>,
}

/// What decides on what is published.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The cluster.
    pub cluster: Cluster,
    /// Size of the mesh.
    pub max_clusters: MaxConnectedClusters,
    /// Which labels count for identities.
    pub filter: LabelFilter,
    /// Whether services are published in Cilium's form too.
    pub cilium_services: bool,
    /// How long identities stay.
    pub retention: Retention,
}

/// What decides on a few keys. The order is that of writing.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Unit {
    Identity(NumericIdentity),
    Ip(IpAddr),
    Node(ObjectKey),
    Slice(ObjectKey),
    Frame(ObjectKey),
    /// Cilium's form of a service.
    Blob(ObjectKey),
}

/// See the module.
pub struct State {
    settings: Settings,
    prefixes: Prefixes,
    services: Table<ServiceFrame>,
    slices: Table<PackedSlice>,
    pods: Table<Workload>,
    nodes: Table<Node>,
    namespaces: Table<BTreeMap<String, String>>,
    /// EndpointSlices of a Service.
    slices_of: BTreeMap<ObjectKey, BTreeSet<ObjectKey>>,
    /// Pods that claim an address.
    claims: BTreeMap<IpAddr, BTreeSet<ObjectKey>>,
    /// None while this process does not publish.
    allocator: Option<Allocator>,
    assigned: BTreeMap<ObjectKey, NumericIdentity>,
    /// Pods for which there was no number.
    starved: BTreeSet<ObjectKey>,
    exhausted: Option<Exhausted>,
    dirty: BTreeSet<Unit>,
    dirty_pods: BTreeSet<ObjectKey>,
    published: BTreeMap<Unit, Vec<(Bytes, Bytes)>>,
    reports: report::Log,
}

impl State {
    /// Knows nothing and publishes nothing.
    pub fn new(settings: Settings) -> Self {
        Self {
            prefixes: Prefixes::of(&settings.cluster.name),
            settings,
            services: Table::default(),
            slices: Table::default(),
            pods: Table::default(),
            nodes: Table::default(),
            namespaces: Table::default(),
            slices_of: BTreeMap::new(),
            claims: BTreeMap::new(),
            allocator: None,
            assigned: BTreeMap::new(),
            starved: BTreeSet::new(),
            exhausted: None,
            dirty: BTreeSet::new(),
            dirty_pods: BTreeSet::new(),
            published: BTreeMap::new(),
            reports: report::Log::default(),
        }
    }

    /// Takes in an event. What is wrong with its object is reported once, until the object changes.
    pub fn on(&mut self, input: Input) -> Vec<Report> {
        let cluster = &self.settings.cluster;
        let reports = &mut self.reports;
        match input {
            Input::Service(event) => {
                let convert = |object: &Service| Ok(Some(service::frame(object, cluster)?));
                let changed = self.services.on(Kind::Services, event, convert, reports);
                changed.into_iter().for_each(|changed| self.on_service(changed));
            }
            Input::Slice(event) => {
                let convert = |object: &EndpointSlice| slice::pack(object, cluster);
                let changed = self.slices.on(Kind::EndpointSlices, event, convert, reports);
                changed.into_iter().for_each(|changed| self.on_slice(changed));
            }
            Input::Pod(event) => {
                let changed = self.pods.on(Kind::Pods, event, pod::workload, reports);
                changed.into_iter().for_each(|changed| self.on_pod(changed));
            }
            Input::Node(event) => {
                let convert = |object: &KubeNode| Ok(Some(node::node(object, cluster)?));
                let changed = self.nodes.on(Kind::Nodes, event, convert, reports);
                self.dirty
                    .extend(changed.into_iter().map(|changed| Unit::Node(changed.key)));
            }
            Input::Namespace(event) => {
                let changed = self
                    .namespaces
                    .on(Kind::Namespaces, event, report::namespace, reports);
                for changed in changed {
                    let pods = self.pods.in_namespace(&changed.key.name);
                    self.dirty_pods.extend(pods.cloned());
                }
            }
        }
        self.reports.take()
    }

    fn on_service(&mut self, changed: Changed<ServiceFrame>) {
        let exported = |frame: Option<&ServiceFrame>| frame.map(service::is_exported);
        if exported(changed.old.as_ref()) != exported(self.services.get(&changed.key)) {
            let slices = self.slices_of.get(&changed.key).into_iter().flatten();
            self.dirty.extend(slices.cloned().map(Unit::Slice));
        }
        self.dirty.insert(Unit::Blob(changed.key.clone()));
        self.dirty.insert(Unit::Frame(changed.key));
    }

    fn on_slice(&mut self, changed: Changed<PackedSlice>) {
        let key = changed.key;
        let service_of = |packed: &PackedSlice| ObjectKey {
            namespace: packed.service.namespace.clone(),
            name: packed.service.name.clone(),
        };
        if let Some(service) = changed.old.as_ref().map(service_of) {
            if let Some(slices) = self.slices_of.get_mut(&service) {
                slices.remove(&key);
                if slices.is_empty() {
                    self.slices_of.remove(&service);
                }
            }
            self.dirty.insert(Unit::Blob(service));
        }
        if let Some(service) = self.slices.get(&key).map(service_of) {
            self.slices_of
                .entry(service.clone())
                .or_default()
                .insert(key.clone());
            self.dirty.insert(Unit::Blob(service));
        }
        self.dirty.insert(Unit::Slice(key));
    }

    fn on_pod(&mut self, changed: Changed<Workload>) {
        let key = changed.key;
        for ip in changed.old.iter().flat_map(|workload| &workload.ips) {
            if let Some(pods) = self.claims.get_mut(ip) {
                pods.remove(&key);
                if pods.is_empty() {
                    self.claims.remove(ip);
                }
            }
            self.dirty.insert(Unit::Ip(*ip));
        }
        for ip in self.pods.get(&key).iter().flat_map(|workload| &workload.ips) {
            self.claims.entry(*ip).or_default().insert(key.clone());
            self.dirty.insert(Unit::Ip(*ip));
        }
        self.dirty_pods.insert(key);
    }

    /// Whether all kinds were listed once.
    pub fn is_synced(&self) -> bool {
        Kind::ALL.into_iter().all(|kind| self.is_kind_synced(kind))
    }

    /// Whether a kind was listed once.
    pub fn is_kind_synced(&self, kind: Kind) -> bool {
        match kind {
            Kind::Services => self.services.is_synced(),
            Kind::EndpointSlices => self.slices.is_synced(),
            Kind::Pods => self.pods.is_synced(),
            Kind::Nodes => self.nodes.is_synced(),
            Kind::Namespaces => self.namespaces.is_synced(),
        }
    }

    /// How many objects of a kind are usable.
    pub fn len(&self, kind: Kind) -> usize {
        match kind {
            Kind::Services => self.services.len(),
            Kind::EndpointSlices => self.slices.len(),
            Kind::Pods => self.pods.len(),
            Kind::Nodes => self.nodes.len(),
            Kind::Namespaces => self.namespaces.len(),
        }
    }

    /// How many identities exist; 0 while this process does not publish.
    pub fn identities(&self) -> usize {
        self.allocator.as_ref().map_or(0, Allocator::len)
    }

    /// How many pods have no identity because no number is free, and why.
    pub fn exhausted(&self) -> Option<(usize, Exhausted)> {
        self.exhausted.map(|error| (self.starved.len(), error))
    }

    /// Begins to publish, with the identities that etcd holds: their keys and values. Everything is desired anew. Returns the keys
    /// that were not taken over; they are not desired.
    pub fn activate<'k>(
        &mut self,
        stored: impl IntoIterator<Item = (&'k [u8], &'k [u8])>,
        seed: u32,
        now: Duration,
    ) -> Vec<(String, Refusal)> {
        let Settings {
            cluster,
            max_clusters,
            retention,
            ..
        } = &self.settings;
        let range = IdentityRange::of(cluster.id, *max_clusters);
        let mut allocator = Allocator::new(cluster.name.clone(), range, *retention, seed);
        let mut refused = vec![];
        for (key, value) in stored {
            let restored = keys::suffix(key, &self.prefixes.identities)
                .and_then(keys::parse_identity)
                .and_then(|number| allocator.restore(number, value, now));
            if let Err(refusal) = restored {
                refused.push((String::from_utf8_lossy(key).into_owned(), refusal));
            }
        }
        self.deactivate();
        self.dirty = self.units();
        self.dirty.extend(allocator.numbers().map(Unit::Identity));
        self.dirty_pods = self.pods.keys().cloned().collect();
        self.allocator = Some(allocator);
        refused
    }

    /// Stops to publish: another process may allocate numbers from now on. What Kubernetes told is kept.
    pub fn deactivate(&mut self) {
        self.allocator = None;
        self.exhausted = None;
        self.assigned.clear();
        self.starved.clear();
        self.published.clear();
    }

    /// Frees identities that nobody uses, and serves pods that wait for a number.
    pub fn collect(&mut self, now: Duration) {
        let Some(allocator) = &mut self.allocator else {
            return;
        };
        let freed = allocator.collect(now);
        self.dirty.extend(freed.into_iter().map(Unit::Identity));
        self.dirty_pods.append(&mut self.starved);
    }

    /// The keys whose desired value changed since the last call. Empty while this process does not publish.
    pub fn desired(&mut self, now: Duration) -> Vec<Change> {
        if self.allocator.is_none() {
            return vec![];
        }
        self.assign(now);
        let (mut puts, mut deletes) = (vec![], vec![]);
        for unit in std::mem::take(&mut self.dirty) {
            let new = self.render(&unit);
            let old = self.published.remove(&unit).unwrap_or_default();
            for (key, value) in &new {
                if !old
                    .iter()
                    .any(|(old_key, old_value)| old_key == key && old_value == value)
                {
                    puts.push(Change {
                        key: key.clone(),
                        value: Some(value.clone()),
                    });
                }
            }
            let gone = old
                .into_iter()
                .filter(|(key, _)| !new.iter().any(|(new_key, _)| new_key == key));
            deletes.extend(gone.map(|(key, _)| Change { key, value: None }));
            if !new.is_empty() {
                self.published.insert(unit, new);
            }
        }
        puts.extend(deletes.into_iter().rev());
        puts
    }

    /// Gives each pod that changed the number of its labels.
    fn assign(&mut self, now: Duration) {
        let Some(allocator) = &mut self.allocator else {
            return;
        };
        for key in std::mem::take(&mut self.dirty_pods) {
            let workload = self.pods.get(&key);
            let wanted = workload.and_then(|workload| {
                // A pod whose namespace is not known yet has no identity yet; both are coming.
                let namespace = self
                    .namespaces
                    .get(&ObjectKey::cluster_wide(&workload.namespace))?;
                let Settings { filter, cluster, .. } = &self.settings;
                Some(filter.identity(&cluster.name, &workload.pod_labels(), namespace))
            });
            let old = self.assigned.get(&key).copied();
            let had = old.and_then(|number| allocator.labels(number));
            self.starved.remove(&key);
            if had == wanted.as_ref() {
                continue;
            }
            match wanted.map(|labels: Labels| allocator.acquire(labels)).transpose() {
                Ok(number) => {
                    self.dirty.extend(number.map(Unit::Identity));
                    if let Some(old) = old {
                        allocator.release(old, now);
                    }
                    match number {
                        Some(number) => self.assigned.insert(key, number),
                        None => self.assigned.remove(&key),
                    };
                }
                // The pod keeps the number it has, if any, until there is another one.
                Err(error) => {
                    self.exhausted = Some(error);
                    self.starved.insert(key);
                }
            }
            let ips = workload.into_iter().flat_map(|workload| &workload.ips);
            self.dirty.extend(ips.copied().map(Unit::Ip));
        }
        if self.starved.is_empty() {
            self.exhausted = None;
        }
    }
}

#[cfg(test)]
mod tests;
