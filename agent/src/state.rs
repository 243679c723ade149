//! Everything the agent knows, and what its maps should hold because of it. Pure: no I/O, no clock, no async.
//!
//! In: [`Event`]s (keys and values of the upstream, local endpoints, which clusters answer probes) and one dump of the maps
//! at the start. Out: [`FeedChange`]s (what to follow), [`Plan`]s (what to write), and answers for people.
//!
//! The decisions are made in smaller cores: what to follow in [`sources`](crate::sources), what bytes mean in
//! [`decode`], what to program in `isthmus-mesh`. Here they are put together:
//!
//! ```text
//!     bytes -> decode -> Object -> LoadBalancer, Ipcache, Routes, endpoints -> Plan
//!                                  (and Sources says which of them are known in full)
//! ```
//!
//! Invariants: whatever the order in which sources arrive, the same content ends in the same maps; nothing that was found
//! in the maps goes away before all that could have named it is listed; a refused object changes nothing.

mod local;
mod objects;
pub mod views;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use isthmus_bpf_abi::{Endpoint as EndpointEntry, EndpointKey, IpcacheKey, IpcacheValue};
use isthmus_mesh::{Ipcache, LbDump, LoadBalancer, MaglevConfig, Plan, Routes, loadbalancer::Departed};
use isthmus_model::{
    ClusterId, ClusterName, IdentityRange, Labels, MaxConnectedClusters, Node, NumericIdentity, ServiceName,
};
use isthmus_wire::{ClusterConfig, Refusal, keys, refusal::VALUE_LEN_MAX, status::RemoteStatus};

pub use self::{
    local::LocalTables,
    views::{ClusterView, NodeView, RemoteView},
};
use crate::{
    decode::{self, Refusals, Source},
    endpoints::keeper::EndpointList,
    network::RemoteCidrs,
    sources::{Effect, Sources},
};

/// Something that happened.
#[derive(Debug)]
pub enum Event<'a> {
    /// A key has this value.
    Put {
        /// Feed that says so.
        feed: &'a str,
        /// Key.
        key: &'a [u8],
        /// Value.
        value: &'a [u8],
    },
    /// A key is gone.
    Delete {
        /// Feed that says so.
        feed: &'a str,
        /// Key.
        key: &'a [u8],
    },
    /// A key's value is larger than what is read.
    Oversized {
        /// Feed that says so.
        feed: &'a str,
        /// Key.
        key: &'a [u8],
        /// Length of the value.
        len: usize,
    },
    /// A feed was told in full.
    Synced {
        /// The feed.
        feed: &'a str,
    },
    /// The local endpoints.
    Endpoints(EndpointList),
    /// Whether a cluster answers probes.
    ClusterHealth(ClusterId, bool),
}

/// What to follow from now on.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum FeedChange {
    /// Begin.
    Add {
        /// Name for events; never used twice.
        name: Arc<str>,
        /// All keys that begin so.
        prefix: String,
        /// Larger values are not read.
        value_len_max: usize,
    },
    /// Stop. Events that still come with this name are ignored.
    Remove(Arc<str>),
}

/// What to tell an operator, once.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Notice {
    /// An object was refused.
    Refused {
        /// Its cluster.
        cluster: ClusterName,
        /// Its key.
        key: String,
        /// Label.
        reason: &'static str,
        /// For people.
        why: String,
    },
    /// A cluster joined the mesh.
    Joined(ClusterName, ClusterId),
    /// A cluster left the mesh; what it said is drained.
    Left(ClusterName, ClusterId),
}

/// Contents of all maps at the start, or for a full pass.
#[derive(Clone, Debug, Default)]
pub struct MapDump {
    /// Services and backends.
    pub lb: LbDump,
    /// The ipcache.
    pub ipcache: Vec<(IpcacheKey, IpcacheValue)>,
    /// Local endpoints.
    pub endpoints: Vec<(EndpointKey, EndpointEntry)>,
}

/// What does not change while the agent runs.
#[derive(Clone, Debug)]
pub struct Identity {
    /// This cluster.
    pub cluster: ClusterName,
    /// Its ID.
    pub cluster_id: ClusterId,
    /// Size of the mesh.
    pub max: MaxConnectedClusters,
    /// This node.
    pub node: String,
    /// How Maglev tables are made.
    pub maglev: MaglevConfig,
}

/// What a feed carries.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Feed {
    Configs,
    Statuses,
    Heartbeat,
    Canaries(ClusterName),
    Objects(Source),
}

/// The state. See the module.
#[derive(Debug)]
pub struct State {
    identity: Identity,
    sources: Sources,
    feeds: BTreeMap<Arc<str>, Feed>,
    feeds_made: u64,
    lb: LoadBalancer,
    ipcache: Ipcache,
    routes: Routes,
    local: LocalTables,
    nodes: BTreeMap<(ClusterName, String), Node>,
    identities: BTreeMap<NumericIdentity, Labels>,
    statuses: BTreeMap<ClusterName, RemoteStatus>,
    /// How many slices a service of Cilium's form became: they have no keys of their own.
    json_slices: BTreeMap<(ClusterName, ServiceName), usize>,
    /// Services of clusters that change their form, until the new form is listed. Rare, and as large as the cluster.
    rereading: BTreeMap<ClusterName, Vec<objects::Buffered>>,
    /// Global services of the own cluster.
    global: BTreeSet<ServiceName>,
    refusals: Refusals,
    notices: Vec<Notice>,
    /// Heartbeats seen; the shell has the clock.
    heartbeats: u64,
    heartbeat: Vec<u8>,
    routes_changed: bool,
    /// Something was listed in full since [`Self::on_settled`].
    listed: bool,
    /// Clusters of which everything was written to the maps once.
    applied: Vec<ClusterName>,
}

impl State {
    /// Knows what is in the maps, and nothing else.
    pub fn new(identity: Identity, dump: MapDump) -> Self {
        let mut lb = LoadBalancer::on_node(identity.cluster_id, &identity.node, identity.maglev);
        lb.restore(&dump.lb);
        let mut ipcache = Ipcache::new(identity.cluster_id, identity.max, &identity.node);
        ipcache.restore(&dump.ipcache);
        Self {
            sources: Sources::new(identity.cluster.clone(), identity.cluster_id, identity.max),
            routes: Routes::new(identity.cluster_id, &identity.node),
            identity,
            feeds: BTreeMap::new(),
            feeds_made: 0,
            lb,
            ipcache,
            local: LocalTables::new(dump.endpoints),
            nodes: BTreeMap::new(),
            identities: BTreeMap::new(),
            statuses: BTreeMap::new(),
            json_slices: BTreeMap::new(),
            rereading: BTreeMap::new(),
            global: BTreeSet::new(),
            refusals: Refusals::default(),
            notices: vec![],
            heartbeats: 0,
            heartbeat: vec![],
            routes_changed: true,
            listed: false,
            applied: vec![],
        }
    }

    /// What to follow from the start.
    pub fn first_feeds(&mut self) -> Vec<FeedChange> {
        let prefixes = [
            (Feed::Configs, keys::CLUSTER_CONFIG),
            (Feed::Statuses, keys::REMOTE_STATUS),
            (Feed::Heartbeat, keys::HEARTBEAT),
        ];
        prefixes
            .into_iter()
            .map(|(feed, prefix)| self.add_feed(feed, prefix.to_owned(), VALUE_LEN_MAX))
            .collect()
    }

    /// Whether events of this feed count.
    pub fn is_followed(&self, feed: &str) -> bool {
        self.feeds.contains_key(feed)
    }

    /// Takes in what happened.
    pub fn on(&mut self, event: Event<'_>) -> Vec<FeedChange> {
        match event {
            Event::Endpoints(list) => {
                self.local.set_endpoints(list);
                vec![]
            }
            Event::ClusterHealth(cluster, healthy) => {
                self.lb.set_cluster_health(cluster, healthy);
                vec![]
            }
            Event::Put { feed, key, value } => match self.feeds.get(feed).cloned() {
                Some(feed) => self.on_put(feed, key, value),
                None => vec![],
            },
            Event::Delete { feed, key } => match self.feeds.get(feed).cloned() {
                Some(feed) => self.on_delete(feed, key),
                None => vec![],
            },
            Event::Oversized { feed, key, len } => {
                if let Some(feed) = self.feeds.get(feed).cloned() {
                    let (cluster, limit) = match &feed {
                        Feed::Objects(source) => (source.cluster.clone(), source.kind.value_len_max()),
                        _ => (self.identity.cluster.clone(), VALUE_LEN_MAX),
                    };
                    self.refuse(&cluster, key, &Refusal::TooLarge { len, limit });
                }
                vec![]
            }
            Event::Synced { feed } => match self.feeds.get(feed).cloned() {
                Some(feed) => self.on_synced(feed),
                None => vec![],
            },
        }
    }

    /// The operations for what changed, at most about `ipcache_max` of them for the ipcache; the rest stays for the
    /// next call ([`Self::has_changes`]).
    pub fn drain(&mut self, ipcache_max: usize) -> Plan {
        let mut plan = self.lb.drain();
        plan.merge(self.ipcache.drain_at_most(ipcache_max));
        plan.merge(self.local.drain());
        plan
    }

    /// Backends that may have left in the drains since the last call.
    pub fn take_departed(&mut self) -> Departed {
        self.lb.take_departed()
    }

    /// Whether [`Self::drain`] has something to do.
    pub fn has_changes(&self) -> bool {
        self.lb.has_changes() || self.ipcache.has_changes() || self.local.has_changes()
    }

    /// Says the time since the agent's start: backends that start slowly go on.
    pub fn advance(&mut self, now: Duration) {
        self.lb.advance(now);
    }

    /// Every plan that was drained has been tried, and there is nothing to drain: what is listed is applied.
    pub fn on_settled(&mut self) {
        if !std::mem::take(&mut self.listed) {
            return;
        }
        let synced = self.sources.clusters().filter(|(_, cluster)| cluster.is_synced());
        for (name, _) in synced {
            if !self.applied.contains(name) {
                self.applied.push(name.clone());
            }
        }
    }

    /// What makes the maps, as dumped, what they should be after the last drain; anything in it is a surprise.
    pub fn audit(&self, dump: &MapDump) -> Plan {
        let mut plan = self.lb.audit(&dump.lb);
        plan.merge(self.ipcache.audit(&dump.ipcache));
        plan.merge(self.local.audit(&dump.endpoints));
        plan
    }

    /// What to log, since the last call.
    pub fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    /// Routes into the overlay, if they may have changed since the last call.
    pub fn take_routes(&mut self) -> Option<RemoteCidrs> {
        std::mem::take(&mut self.routes_changed).then(|| RemoteCidrs {
            cidrs: self.routes.routes().map(|route| route.destination).collect(),
            complete: self.ipcache.prune_ready(),
        })
    }

    // === feeds ===

    fn add_feed(&mut self, feed: Feed, prefix: String, value_len_max: usize) -> FeedChange {
        self.feeds_made += 1;
        let name: Arc<str> = format!("{prefix}#{}", self.feeds_made).into();
        self.feeds.insert(Arc::clone(&name), feed);
        FeedChange::Add {
            name,
            prefix,
            value_len_max,
        }
    }

    fn remove_feed(&mut self, feed: &Feed) -> Option<FeedChange> {
        let name = self
            .feeds
            .iter()
            .find(|(_, known)| *known == feed)
            .map(|(name, _)| Arc::clone(name))?;
        self.feeds.remove(&name);
        Some(FeedChange::Remove(name))
    }

    fn perform(&mut self, effects: Vec<Effect>) -> Vec<FeedChange> {
        let mut changes = vec![];
        for effect in effects {
            match effect {
                Effect::Join(name, id) => {
                    self.notices.push(Notice::Joined(name.clone(), id));
                    let prefix = format!("{}{name}/", keys::SYNCED);
                    changes.push(self.add_feed(Feed::Canaries(name), prefix, VALUE_LEN_MAX));
                }
                Effect::Follow(source) => {
                    let (prefix, limit) = (source.prefix(), source.kind.value_len_max());
                    changes.push(self.add_feed(Feed::Objects(source), prefix, limit));
                }
                Effect::Unfollow(source) => changes.extend(self.remove_feed(&Feed::Objects(source))),
                Effect::Reread(name, _) => {
                    self.rereading.insert(name, vec![]);
                }
                Effect::Drain(name, id) => {
                    changes.extend(self.remove_feed(&Feed::Canaries(name.clone())));
                    self.drain_cluster(&name, id);
                    self.notices.push(Notice::Left(name, id));
                }
            }
        }
        self.tell_clusters();
        changes
    }

    fn tell_clusters(&mut self) {
        if let Some(ids) = self.sources.all_ids() {
            self.lb.clusters_listed(ids.iter().copied());
            self.ipcache.clusters_listed(ids.iter().copied());
            self.routes.clusters_listed(ids.iter().copied());
            self.routes_changed = true;
        }
    }

    fn drain_cluster(&mut self, name: &ClusterName, id: ClusterId) {
        self.lb.cluster_removed(id);
        self.ipcache.cluster_removed(id);
        self.routes.cluster_removed(id);
        self.routes_changed = true;
        self.nodes.retain(|(cluster, _), _| cluster != name);
        let range = IdentityRange::of(id, self.identity.max);
        self.identities.retain(|identity, _| !range.contains(*identity));
        self.json_slices.retain(|(cluster, _), _| cluster != name);
        self.rereading.remove(name);
        self.applied.retain(|cluster| cluster != name);
    }

    // === what the upstream said ===

    fn on_put(&mut self, feed: Feed, key: &[u8], value: &[u8]) -> Vec<FeedChange> {
        match feed {
            Feed::Objects(source) => {
                let range = IdentityRange::of(source.cluster_id, self.identity.max);
                match decode::object(&source, range, key, value) {
                    Ok(object) => {
                        self.refusals.settle(key);
                        self.put_or_buffer(&source, object);
                    }
                    Err(refusal) => self.refuse(&source.cluster, key, &refusal),
                }
                vec![]
            }
            Feed::Heartbeat => {
                if self.heartbeat != value {
                    self.heartbeats += 1;
                    self.heartbeat = value.to_vec();
                }
                vec![]
            }
            Feed::Canaries(_) => {
                let effects = match keys::suffix(key, keys::SYNCED) {
                    Ok(suffix) => self.sources.on_canary(suffix),
                    Err(_) => vec![],
                };
                self.perform(effects)
            }
            Feed::Configs => {
                let read = cluster_of(key, keys::CLUSTER_CONFIG)
                    .and_then(|name| Ok((name, ClusterConfig::decode(value)?)));
                match read {
                    Ok((name, config)) => {
                        self.refusals.settle(key);
                        let effects = self.sources.on_config(&name, &config);
                        self.perform(effects)
                    }
                    Err(refusal) => {
                        let own = self.identity.cluster.clone();
                        self.refuse(&own, key, &refusal);
                        vec![]
                    }
                }
            }
            Feed::Statuses => {
                let read = cluster_of(key, keys::REMOTE_STATUS)
                    .and_then(|name| Ok((name, RemoteStatus::decode(value)?)));
                match read {
                    Ok((name, status)) => {
                        self.refusals.settle(key);
                        let before = self.sources.all_ids();
                        self.sources.on_status(&name, status.cluster_id);
                        self.statuses.insert(name, status);
                        if self.sources.all_ids() != before {
                            self.tell_clusters();
                        }
                    }
                    Err(refusal) => {
                        let own = self.identity.cluster.clone();
                        self.refuse(&own, key, &refusal);
                    }
                }
                vec![]
            }
        }
    }

    fn on_delete(&mut self, feed: Feed, key: &[u8]) -> Vec<FeedChange> {
        self.refusals.settle(key);
        match feed {
            Feed::Objects(source) => {
                // A key that does not read was refused when it was put: there is nothing to remove.
                if let Ok(name) = decode::object_name(&source, key) {
                    self.gone_or_buffer(&source, name);
                }
                vec![]
            }
            Feed::Heartbeat => vec![],
            Feed::Canaries(_) => {
                if let Ok(suffix) = keys::suffix(key, keys::SYNCED) {
                    self.sources.on_canary_gone(suffix);
                }
                vec![]
            }
            Feed::Configs => {
                let effects = match cluster_of(key, keys::CLUSTER_CONFIG) {
                    Ok(name) => self.sources.on_config_gone(&name),
                    Err(_) => vec![],
                };
                self.perform(effects)
            }
            Feed::Statuses => {
                let effects = match cluster_of(key, keys::REMOTE_STATUS) {
                    Ok(name) => {
                        self.statuses.remove(&name);
                        self.sources.on_status_gone(&name)
                    }
                    Err(_) => vec![],
                };
                self.perform(effects)
            }
        }
    }

    fn on_synced(&mut self, feed: Feed) -> Vec<FeedChange> {
        match feed {
            Feed::Configs => {
                self.sources.on_configs_listed();
                self.perform(vec![])
            }
            Feed::Statuses => {
                let effects = self.sources.on_statuses_listed();
                self.perform(effects)
            }
            Feed::Heartbeat | Feed::Canaries(_) => vec![],
            Feed::Objects(source) => {
                if self.sources.on_listed(&source) {
                    self.listed = true;
                    self.on_listed(&source);
                }
                vec![]
            }
        }
    }

    fn refuse(&mut self, cluster: &ClusterName, key: &[u8], refusal: &Refusal) {
        if self.refusals.count(cluster, key, refusal) {
            self.notices.push(Notice::Refused {
                cluster: cluster.clone(),
                key: String::from_utf8_lossy(key).chars().take(256).collect(),
                reason: refusal.reason(),
                why: crate::endpoints::keeper::chain(refusal),
            });
        }
    }
}

fn cluster_of(key: &[u8], prefix: &str) -> Result<ClusterName, Refusal> {
    Ok(ClusterName::new(keys::suffix(key, prefix)?)?)
}

#[cfg(test)]
mod tests;
