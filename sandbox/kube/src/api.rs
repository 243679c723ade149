//! The server's state and its verbs: one lock around the pure store, and wake-ups for who watches.
//!
//! In: requests of the HTTP shell, of the in-process [`Client`], and of the controllers, all through the same verbs.
//! Out: objects, and [`Feed`]s of events. Invariants: every write is checked, stored and announced in one critical
//! section, so no reader sees half of it; watchers read from the bounded history and never slow a writer down.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::SystemTime;

use ipnet::{Ipv4Net, Ipv6Net};
use k8s_openapi::jiff::Timestamp;
use rand::Rng;
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::kind::{Kind, KindTable};
use crate::meta;
use crate::rules::services::ServiceNumbers;
use crate::runtime::PodRuntime;
use crate::store::{Event, Key, Object, ResourceId, Store};

mod client;
mod feed;
mod read;
mod write;

pub use client::Client;
pub use feed::{Batch, Feed, WatchEvent, WatchOptions, Watcher};
pub use read::{ListOptions, Page};
pub use write::{Deleted, WriteOptions, Written};

/// How a server is set up.
#[derive(Clone, Debug)]
pub struct Options {
    /// Addresses of services, v4. It is the primary family if it is there.
    pub service_network_v4: Option<Ipv4Net>,
    /// Addresses of services, v6.
    pub service_network_v6: Option<Ipv6Net>,
    /// Ports of NodePort services.
    pub node_ports: RangeInclusive<u16>,
    /// Events that are kept for watchers, per resource. Who is further behind has to list again.
    pub history_len: usize,
    /// Whether the controllers run (deployments, endpoint slices, garbage collection and so on).
    pub controllers: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            service_network_v4: Some(Ipv4Net::new_assert(Ipv4Addr::new(10, 96, 0, 0), 16)),
            service_network_v6: Some(Ipv6Net::new_assert(
                Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 0),
                112,
            )),
            node_ports: 30000..=32767,
            history_len: 8192,
            controllers: true,
        }
    }
}

/// A Kubernetes API. Clones share the same state.
#[derive(Clone)]
pub struct KubeApi {
    inner: Arc<Inner>,
}

struct Inner {
    options: Options,
    state: Mutex<State>,
    runtime: RwLock<Option<Arc<dyn PodRuntime>>>,
}

pub(crate) struct State {
    pub(crate) store: Store,
    pub(crate) kinds: KindTable,
    pub(crate) numbers: ServiceNumbers,
    pub(crate) subscribers: Vec<feed::Subscriber>,
}

impl KubeApi {
    /// An API with the namespaces of a new cluster and nothing else.
    pub fn new(options: Options) -> KubeApi {
        let numbers = ServiceNumbers::new(
            options.service_network_v4,
            options.service_network_v6,
            options.node_ports.clone(),
        );
        let state = State {
            store: Store::new(options.history_len),
            kinds: KindTable::builtin(),
            numbers,
            subscribers: Vec::new(),
        };
        let api = KubeApi {
            inner: Arc::new(Inner {
                options,
                state: Mutex::new(state),
                runtime: RwLock::new(None),
            }),
        };
        let client = api.client();
        for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
            // The store is empty and these names are valid, so nothing can refuse them.
            let created = client.create("namespaces", "", json!({"metadata": {"name": name}}));
            debug_assert!(created.is_ok(), "{created:?}");
        }
        api
    }

    /// The set-up.
    pub fn options(&self) -> &Options {
        &self.inner.options
    }

    /// A handle for use in this process.
    pub fn client(&self) -> Client {
        Client::new(self.clone())
    }

    /// Says who runs the pods, for logs and exec.
    pub fn set_runtime(&self, runtime: Arc<dyn PodRuntime>) {
        *self.inner.runtime.write().unwrap_or_else(PoisonError::into_inner) = Some(runtime);
    }

    pub(crate) fn runtime(&self) -> Option<Arc<dyn PodRuntime>> {
        self.inner
            .runtime
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The revision of the newest write.
    pub fn revision(&self) -> u64 {
        self.state().store.revision()
    }

    /// A write either stored everything or nothing, so the state is sound even after a panic elsewhere.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The kind at a path.
    pub fn kind(&self, group: &str, version: &str, plural: &str) -> Option<Arc<Kind>> {
        self.state().kinds.find(group, version, plural).cloned()
    }

    /// All kinds that are served now.
    pub fn kinds(&self) -> Vec<Arc<Kind>> {
        self.state().kinds.iter().cloned().collect()
    }

    /// The kind in which a resource is stored.
    pub(crate) fn storage_kind(&self, resource: &ResourceId) -> Result<Arc<Kind>, ApiError> {
        self.state()
            .kinds
            .of_storage(resource)
            .cloned()
            .ok_or_else(ApiError::unknown_path)
    }
}

impl State {
    /// Stores an object and wakes its watchers.
    fn put(&mut self, key: Key, value: Value) -> Arc<Object> {
        let event = self.store.put(key, value);
        if event.key.resource.as_str() == "customresourcedefinitions.apiextensions.k8s.io" {
            self.serve_custom(event.object.value());
        }
        self.announce(&event);
        event.object
    }

    /// Removes an object and wakes its watchers.
    fn remove(&mut self, key: Key, last: Value) -> Option<Arc<Object>> {
        let event = self.store.remove(key, last)?;
        match event.key.resource.as_str() {
            "services" => self.numbers.release(event.object.value()),
            "customresourcedefinitions.apiextensions.k8s.io" => {
                self.stop_serving_custom(event.object.value())
            }
            _ => {}
        }
        self.announce(&event);
        Some(event.object)
    }

    fn serve_custom(&mut self, definition: &Value) {
        self.kinds
            .remove_custom(&crate::kind::custom::storage_of(definition));
        for kind in crate::kind::custom::kinds(definition) {
            self.kinds.insert(kind);
        }
    }

    /// The objects of a kind go with its definition.
    fn stop_serving_custom(&mut self, definition: &Value) {
        let resource = crate::kind::custom::storage_of(definition);
        let objects: Vec<Value> = self
            .store
            .scan(&resource, None, None)
            .map(|o| o.value().clone())
            .collect();
        for object in objects {
            let key = Key::new(&resource, meta::namespace(&object), meta::name(&object));
            if let Some(event) = self.store.remove(key, object) {
                self.announce(&event);
            }
        }
        self.kinds.remove_custom(&resource);
        self.store.drop_resource(&resource);
    }

    fn announce(&mut self, event: &Event) {
        self.subscribers
            .retain(|subscriber| subscriber.wake(&event.key.resource));
    }
}

/// The wall clock, for the shells; the pure modules get the time as an argument.
pub(crate) fn now() -> Timestamp {
    let since = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let seconds = i64::try_from(since.as_secs()).unwrap_or(0);
    // Out of range only past the year 9999.
    Timestamp::from_second(seconds).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// A random UID (version 4).
fn new_uid() -> String {
    let mut b: [u8; 16] = rand::rng().random();
    b[6] = (b[6] & 0x0f) | 0x40;
    b[8] = (b[8] & 0x3f) | 0x80;
    let hex: String = b.iter().map(|byte| format!("{byte:02x}")).collect();
    format!(
        "{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    )
}

/// Letters that Kubernetes uses in generated names: no vowels, nothing that looks alike.
const NAME_LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

fn new_suffix() -> String {
    let mut rng = rand::rng();
    (0..5)
        .map(|_| char::from(NAME_LETTERS[rng.random_range(0..NAME_LETTERS.len())]))
        .collect()
}

/// The resources that namespaced objects can be in.
pub(crate) fn namespaced_resources(state: &State) -> BTreeSet<ResourceId> {
    state
        .kinds
        .iter()
        .filter(|kind| kind.namespaced)
        .map(|kind| kind.storage.clone())
        .collect()
}
