//! The one task that changes endpoints: takes the plugin's calls one after the other, attaches programs, saves, and hands
//! the new list to those who program maps and routes.
//!
//! In: [`Request`]s, each with the sender of its answer. Out: answers; [`EndpointList`]s to the [`Sinks`].
//! The rules are in [`Endpoints`]; here are the steps around them and what happens when one fails.
//!
//! Invariants: a call is answered after what it changed was saved and, for a new endpoint, applied; a call that failed
//! half-way may be repeated and goes on from there.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc, time::Duration};

use ipnet::{Ipv4Net, Ipv6Net};
use isthmus_datapath::Datapath;
use nix::net::if_::if_nametoindex;
use tokio::sync::{mpsc, oneshot, watch};

use super::{
    Attachment, Device, Endpoint, EndpointError, Endpoints, Pod,
    store::{Loaded, Store, StoreError},
};

/// Calls that wait at most; the runtime starts a handful of pods at a time.
pub const REQUESTS_MAX: usize = 128;
/// How long a call waits for maps and routes.
const APPLY_TIMEOUT: Duration = Duration::from_secs(10);

/// All endpoints that have an interface.
pub type EndpointList = Arc<[Endpoint]>;

/// Where new lists go. The sender is answered when the list is applied.
#[derive(Clone, Debug)]
pub struct Sinks(pub Vec<mpsc::Sender<(EndpointList, oneshot::Sender<()>)>>);

/// What the network of this node is ready for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Network {
    /// Not yet, and why.
    NotReady(String),
    /// Endpoints can be made.
    Ready {
        /// MTU of pods' interfaces.
        mtu: u32,
    },
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// The rules say no.
    #[error(transparent)]
    Refused(#[from] EndpointError),
    /// The node is not set up; the call may be repeated later.
    #[error("{0}")]
    NotReady(String),
    /// The interface or the kernel say no.
    #[error("cannot attach the datapath to {ifname}")]
    Attach {
        /// The interface.
        ifname: String,
        /// Why not.
        #[source]
        source: isthmus_datapath::AttachError,
    },
    /// The endpoints file.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Maps or routes are not written yet; the call may be repeated.
    #[error("the datapath did not take the endpoint within {APPLY_TIMEOUT:?}; it is tried on")]
    Late,
    /// The agent is stopping.
    #[error("the agent is stopping")]
    Stopping,
}

type Reply<T> = oneshot::Sender<Result<T, KeeperError>>;

/// A new endpoint's interface.
#[derive(Clone, Debug)]
pub struct NewDevice {
    /// Whose.
    pub attachment: Attachment,
    /// Name of the node's end.
    pub host_ifname: String,
    /// The rest.
    pub device: Device,
}

/// What the plugin found.
#[derive(Clone, Debug)]
pub struct Found {
    /// Whose.
    pub attachment: Attachment,
    /// Name of the node's end.
    pub host_ifname: String,
    /// Its index.
    pub host_ifindex: u32,
    /// Addresses inside.
    pub ips: Vec<IpAddr>,
}

/// A call.
#[derive(Debug)]
pub enum Request {
    /// Reserve addresses. The answer has the MTU too.
    Allocate(Attachment, Pod, Reply<(Endpoint, u32)>),
    /// The interface is there.
    Create(NewDevice, Reply<()>),
    /// Remove the endpoint.
    Delete(Attachment, Reply<Option<Endpoint>>),
    /// Compare.
    Check(Found, Reply<()>),
    /// Would [`Request::Allocate`] work?
    Status(Reply<()>),
    /// Remove all that are not named.
    Collect(BTreeSet<Attachment>, Reply<Vec<Endpoint>>),
    /// The node's pod CIDRs.
    Cidrs(Option<Ipv4Net>, Option<Ipv6Net>),
    /// Counts for metrics.
    Usage(oneshot::Sender<Usage>),
}

/// How many addresses are used and free.
#[derive(Clone, Debug, Default)]
pub struct Usage {
    /// Family, used, free.
    pub pools: Vec<(&'static str, usize, usize)>,
}

/// What a new endpoint waits for.
#[derive(Clone, Debug)]
pub struct Gates {
    /// Devices and routes.
    pub network: watch::Receiver<Network>,
    /// The view of the clusters; an error says what is missing.
    pub pods: watch::Receiver<Result<(), String>>,
}

/// The task's state.
#[derive(Debug)]
pub struct Keeper {
    endpoints: Endpoints,
    cidrs: (Option<Ipv4Net>, Option<Ipv6Net>),
    store: Store,
    datapath: Arc<Datapath>,
    gates: Gates,
    sinks: Sinks,
    /// The file lacks the last change.
    unsaved: bool,
}

impl Keeper {
    /// Restores what was saved, drops endpoints whose interface is gone and attaches this build's programs to the rest.
    /// Blocks: reads files, calls the kernel.
    pub fn restore(
        store: Store,
        datapath: Arc<Datapath>,
        gates: Gates,
        sinks: Sinks,
    ) -> Result<Self, StoreError> {
        let saved = match store.load()? {
            Loaded::Nothing => Default::default(),
            Loaded::Saved(saved) => saved,
            Loaded::Unreadable { kept_as, why } => {
                tracing::error!(
                    why,
                    kept_as = %kept_as.display(),
                    "the endpoints file does not read and was set aside; pods of this node have to be restarted"
                );
                Default::default()
            }
        };
        let (mut endpoints, left_out) = Endpoints::restore(saved);
        for endpoint in &left_out {
            tracing::error!(
                endpoint = endpoint.id,
                pod = endpoint.pod.name,
                "saved endpoint contradicts another one and is left out"
            );
        }
        let gone: Vec<Attachment> = endpoints
            .iter()
            .filter(|endpoint| !interface_exists(endpoint))
            .map(|endpoint| endpoint.attachment.clone())
            .collect();
        for attachment in &gone {
            if let Some(endpoint) = endpoints.release(attachment) {
                tracing::info!(
                    endpoint = endpoint.id,
                    ifname = endpoint.host_ifname,
                    pod = endpoint.pod.name,
                    "interface of a saved endpoint is gone; forgetting the endpoint"
                );
            }
        }
        let mut ifindexes = vec![];
        for endpoint in endpoints.iter() {
            let Some(device) = &endpoint.device else { continue };
            ifindexes.push(device.host_ifindex);
            if let Err(error) = datapath.attach_endpoint(device.host_ifindex) {
                tracing::error!(endpoint = endpoint.id, ifname = endpoint.host_ifname, error = %chain(&error), "cannot attach");
            }
        }
        if let Err(error) = datapath.retain_endpoints(&ifindexes) {
            tracing::warn!(error = %chain(&error), "links of former endpoints stay behind");
        }
        Ok(Self {
            endpoints,
            cidrs: (None, None),
            store,
            datapath,
            gates,
            sinks,
            unsaved: !gone.is_empty() || !left_out.is_empty(),
        })
    }

    /// All endpoints that have an interface.
    pub fn list(&self) -> EndpointList {
        self.endpoints
            .iter()
            .filter(|endpoint| endpoint.device.is_some())
            .cloned()
            .collect()
    }

    /// Works until the senders are gone.
    pub async fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        while let Some(request) = requests.recv().await {
            self.on(request).await;
        }
    }

    async fn on(&mut self, request: Request) {
        // Who asked may have gone; what was done stays done.
        match request {
            Request::Allocate(attachment, pod, reply) => {
                let _ = reply.send(self.allocate(attachment, pod).await);
            }
            Request::Create(device, reply) => {
                let _ = reply.send(self.create(device).await);
            }
            Request::Delete(attachment, reply) => {
                let _ = reply.send(self.delete(&attachment).await);
            }
            Request::Check(found, reply) => {
                let result = self.endpoints.check(
                    &found.attachment,
                    &found.host_ifname,
                    found.host_ifindex,
                    &found.ips,
                );
                let _ = reply.send(result.map_err(KeeperError::from));
            }
            Request::Status(reply) => {
                let _ = reply.send(self.status());
            }
            Request::Collect(valid, reply) => {
                let _ = reply.send(self.collect(&valid).await);
            }
            Request::Cidrs(ipv4, ipv6) => {
                if self.cidrs != (ipv4, ipv6) {
                    self.cidrs = (ipv4, ipv6);
                    self.endpoints.set_cidrs(ipv4, ipv6);
                }
            }
            Request::Usage(reply) => {
                let family = |pool: &crate::ipam::Pool| {
                    if pool.cidr().addr().is_ipv4() {
                        "ipv4"
                    } else {
                        "ipv6"
                    }
                };
                let pools = self.endpoints.pools();
                let _ = reply.send(Usage {
                    pools: pools
                        .map(|pool| (family(pool), pool.used(), pool.free()))
                        .collect(),
                });
            }
        }
    }

    fn ready(&self) -> Result<u32, KeeperError> {
        let mtu = match &*self.gates.network.borrow() {
            Network::Ready { mtu } => *mtu,
            Network::NotReady(why) => return Err(KeeperError::NotReady(why.clone())),
        };
        self.gates.pods.borrow().clone().map_err(KeeperError::NotReady)?;
        Ok(mtu)
    }

    fn status(&self) -> Result<(), KeeperError> {
        self.ready()?;
        Ok(self.endpoints.can_allocate()?)
    }

    async fn allocate(&mut self, attachment: Attachment, pod: Pod) -> Result<(Endpoint, u32), KeeperError> {
        let mtu = self.ready()?;
        let known = self.endpoints.find(&attachment).is_some();
        let endpoint = self.endpoints.allocate(attachment.clone(), pod)?.clone();
        self.unsaved |= !known;
        if let Err(error) = self.save().await {
            if !known {
                self.endpoints.release(&attachment);
            }
            return Err(error);
        }
        Ok((endpoint, mtu))
    }

    async fn create(&mut self, new: NewDevice) -> Result<(), KeeperError> {
        self.ready()?;
        let ifindex = new.device.host_ifindex;
        let endpoint = self
            .endpoints
            .attach(&new.attachment, &new.host_ifname, new.device)?
            .clone();
        self.unsaved = true;
        let datapath = Arc::clone(&self.datapath);
        blocking(move || datapath.attach_endpoint(ifindex))
            .await?
            .map_err(|source| KeeperError::Attach {
                ifname: new.host_ifname,
                source,
            })?;
        self.save().await?;
        self.publish().await?;
        tracing::info!(
            endpoint = endpoint.id,
            namespace = endpoint.pod.namespace,
            pod = endpoint.pod.name,
            ipv4 = ?endpoint.ipv4,
            ipv6 = ?endpoint.ipv6,
            "endpoint is up"
        );
        Ok(())
    }

    async fn delete(&mut self, attachment: &Attachment) -> Result<Option<Endpoint>, KeeperError> {
        let endpoint = self.endpoints.release(attachment);
        if let Some(endpoint) = &endpoint {
            self.unsaved = true;
            self.detach(endpoint).await;
        }
        self.save().await?;
        if endpoint.is_some() {
            // A map entry that is late to go does no harm: its interface is gone, and its address rests.
            let _ = self.publish().await;
        }
        Ok(endpoint)
    }

    async fn collect(&mut self, valid: &BTreeSet<Attachment>) -> Result<Vec<Endpoint>, KeeperError> {
        let mut removed = vec![];
        for attachment in self.endpoints.not_in(valid) {
            if let Some(endpoint) = self.endpoints.release(&attachment) {
                self.unsaved = true;
                self.detach(&endpoint).await;
                removed.push(endpoint);
            }
        }
        self.save().await?;
        if !removed.is_empty() {
            let _ = self.publish().await;
        }
        Ok(removed)
    }

    async fn detach(&self, endpoint: &Endpoint) {
        let Some(device) = &endpoint.device else { return };
        let (datapath, ifindex) = (Arc::clone(&self.datapath), device.host_ifindex);
        if let Ok(Err(error)) = blocking(move || datapath.detach_endpoint(ifindex)).await {
            tracing::warn!(endpoint = endpoint.id, error = %chain(&error), "link of a removed endpoint stays behind");
        }
    }

    async fn save(&mut self) -> Result<(), KeeperError> {
        if self.unsaved {
            let (store, saved) = (self.store.clone(), self.endpoints.saved());
            blocking(move || store.save(&saved)).await??;
            self.unsaved = false;
        }
        Ok(())
    }

    /// Hands the list out and waits until it is applied everywhere.
    async fn publish(&self) -> Result<(), KeeperError> {
        let list = self.list();
        let mut applied = vec![];
        for sink in &self.sinks.0 {
            let (done, wait) = oneshot::channel();
            sink.send((Arc::clone(&list), done))
                .await
                .map_err(|_| KeeperError::Stopping)?;
            applied.push(wait);
        }
        let all = futures::future::join_all(applied);
        match tokio::time::timeout(APPLY_TIMEOUT, all).await {
            Ok(results) if results.iter().all(Result::is_ok) => Ok(()),
            Ok(_) => Err(KeeperError::Stopping),
            Err(_) => Err(KeeperError::Late),
        }
    }
}

/// Endpoints without an interface are kept: their container is being made, or the runtime will delete them.
fn interface_exists(endpoint: &Endpoint) -> bool {
    let Some(device) = &endpoint.device else {
        return true;
    };
    // Not /sys/class/net: what that shows is the network namespace of whoever mounted it.
    if_nametoindex(endpoint.host_ifname.as_str()).is_ok_and(|index| index == device.host_ifindex)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, KeeperError> {
    // Fails when the work panicked or the runtime is going down; either way this call did not happen.
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| KeeperError::Stopping)
}

/// An error with its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
