//! The node's devices and routes: VXLAN device, router addresses, forwarding, devices to the outside, routes to remote pod CIDRs
//! and to local pods.
//!
//! In: what this node is ([`LocalNode`]), remote pod CIDRs, local endpoints. Out: kernel state, and whether endpoints can
//! be made ([`Network`]). One task; each pass compares everything wanted with everything there. Between two full passes
//! "there" is what the last pass left, so that a new pod costs two netlink calls and not a dump of all routes.
//!
//! Invariant: before every cluster's nodes are listed, of the routes into the overlay only those that this process made are
//! removed: others may be an earlier agent's, to nodes that nobody has told of yet.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc, time::Duration};

use ipnet::IpNet;
use isthmus_bpf_abi::{NodeConfig, PrefixKey};
use isthmus_datapath::{
    Datapath,
    device::{self, VxlanConfig},
    outside::{self, OutsideDevice},
    routes::{self, Route},
};
use isthmus_model::ClusterId;
use isthmus_runtime::{Backoff, CancellationToken, backoff};
use rtnetlink::Handle;
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    config::Outside,
    endpoints::keeper::{EndpointList, Network, Request, chain},
    node::LocalNode,
};

/// Time between two passes without a change.
const PASS_INTERVAL: Duration = Duration::from_secs(60);

/// Pod CIDRs of other nodes.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct RemoteCidrs {
    /// The CIDRs.
    pub cidrs: BTreeSet<IpNet>,
    /// All nodes of all clusters are in; routes to others may go.
    pub complete: bool,
}

/// What the task watches.
#[derive(Debug)]
pub struct Inputs {
    /// This node; an error while its object is missing or unusable.
    pub node: watch::Receiver<Result<LocalNode, String>>,
    /// Other nodes.
    pub cidrs: watch::Receiver<Arc<RemoteCidrs>>,
    /// Local endpoints.
    pub endpoints: mpsc::Receiver<(EndpointList, oneshot::Sender<()>)>,
}

/// Values that do not change.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The cluster's ID.
    pub cluster_id: ClusterId,
    /// UDP port of the tunnels.
    pub tunnel_port: u16,
    /// MTU from the flag.
    pub mtu: Option<u32>,
    /// What the programs do, bits of `bpf-abi`'s `feature`.
    pub features: u32,
    /// Entries of each Maglev table.
    pub maglev_table_size: u32,
    /// Devices to the outside, and what is done there.
    pub outside: Outside,
}

/// Who is told.
#[derive(Debug)]
pub struct Outputs {
    /// Whether endpoints can be made.
    pub network: watch::Sender<Network>,
    /// Hears of the pod CIDRs.
    pub keeper: mpsc::Sender<Request>,
}

/// A step of the set-up failed.
#[derive(Debug, thiserror::Error)]
enum SetupError {
    #[error(transparent)]
    Device(#[from] device::DeviceError),
    #[error(transparent)]
    Attach(#[from] isthmus_datapath::AttachError),
    #[error("cannot write the node's configuration")]
    Config(#[source] isthmus_datapath::MapError),
    #[error("cannot read the range of local ports")]
    LocalPorts(#[source] std::io::Error),
    #[error(transparent)]
    Routes(#[from] routes::RouteError),
    #[error("the agent is stopping")]
    Stopping,
}

struct Task {
    netlink: Handle,
    datapath: Arc<Datapath>,
    settings: Settings,
    endpoints: EndpointList,
    waiting: Vec<oneshot::Sender<()>>,
    /// What the last pass left; `None` asks for a full pass.
    left: Option<Left>,
    /// Destinations in the overlay that were wanted at some time.
    known: BTreeSet<(IpAddr, u8)>,
    /// What was last said of the devices to the outside.
    said: String,
}

/// What a pass left in the kernel.
struct Left {
    /// The node that was set up, its VXLAN device and MTU.
    node: Option<(LocalNode, u32, u32)>,
    routes: BTreeSet<Route>,
}

/// Works until `shutdown`.
pub async fn run(
    netlink: Handle,
    datapath: Arc<Datapath>,
    settings: Settings,
    endpoints: EndpointList,
    mut inputs: Inputs,
    outputs: Outputs,
    shutdown: CancellationToken,
) {
    let mut task = Task {
        netlink,
        datapath,
        settings,
        endpoints,
        waiting: vec![],
        left: None,
        known: BTreeSet::new(),
        said: String::new(),
    };
    let mut retry = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
    loop {
        let node = inputs.node.borrow_and_update().clone();
        let cidrs = inputs.cidrs.borrow_and_update().clone();
        let pause = match task.pass(&node, &cidrs).await {
            Ok(network) => {
                if let Ok(node) = &node {
                    let cidrs = Request::Cidrs(node.ipv4_cidr, node.ipv6_cidr);
                    if outputs.keeper.send(cidrs).await.is_err() {
                        return;
                    }
                }
                tell(&outputs.network, network);
                for waiting in task.waiting.drain(..) {
                    // Who waited may have given up.
                    let _ = waiting.send(());
                }
                retry.reset();
                PASS_INTERVAL
            }
            Err(error) => {
                let why = chain(&error);
                tracing::warn!(error = why, "network set-up of this node failed; trying again");
                task.left = None;
                // What works already goes on working: only a node that was never ready is not ready now.
                let ready = matches!(*outputs.network.borrow(), Network::Ready { .. });
                if !ready {
                    tell(&outputs.network, Network::NotReady(why));
                }
                retry.next(backoff::random())
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => return,
            changed = inputs.node.changed() => if changed.is_err() { return },
            changed = inputs.cidrs.changed() => if changed.is_err() { return },
            message = inputs.endpoints.recv() => match message {
                None => return,
                Some((list, done)) => {
                    task.endpoints = list;
                    task.waiting.push(done);
                }
            },
            () = tokio::time::sleep(pause) => task.left = None,
        }
        while let Ok((list, done)) = inputs.endpoints.try_recv() {
            task.endpoints = list;
            task.waiting.push(done);
        }
    }
}

fn tell(network: &watch::Sender<Network>, now: Network) {
    network.send_if_modified(|before| {
        let changed = *before != now;
        if changed {
            match &now {
                Network::Ready { mtu } => tracing::info!(mtu, "network of this node is set up"),
                Network::NotReady(why) => tracing::info!(why, "network of this node is not set up"),
            }
            *before = now;
        }
        changed
    });
}

impl Task {
    /// One pass. An unknown node is no error: routes to local pods are kept all the same.
    async fn pass(
        &mut self,
        node: &Result<LocalNode, String>,
        cidrs: &RemoteCidrs,
    ) -> Result<Network, SetupError> {
        let (done, actual) = match self.left.take() {
            Some(left) => (left.node, left.routes),
            None => (None, routes::dump(&self.netlink).await?),
        };
        let set_up = match (node, done) {
            (Err(_), _) => None,
            (Ok(node), Some(done)) if done.0 == *node => Some(done),
            (Ok(node), _) => {
                let (vxlan_ifindex, mtu) = self.set_up(node).await?;
                Some((node.clone(), vxlan_ifindex, mtu))
            }
        };
        let overlay = set_up.as_ref().map(|(node, ifindex, _)| (node, *ifindex));
        let wanted = wanted_routes(overlay, cidrs, &self.endpoints);
        let mut plan = routes::plan(&actual, &wanted);
        if overlay.is_none() || !cidrs.complete {
            let local: BTreeSet<u32> = self.endpoints.iter().filter_map(ifindex).collect();
            let known = overlay.is_some().then_some(&self.known);
            plan.remove.retain(|route| may_go(route, known, &local));
        }
        if let Some((_, vxlan_ifindex)) = overlay {
            let routes = wanted.iter().filter(|route| route.ifindex == vxlan_ifindex);
            self.known.extend(routes.map(destination));
        }
        let mut errors = routes::apply(&self.netlink, &plan).await;
        if let Some(first) = errors.pop() {
            return Err(first.into());
        }
        let replaced: BTreeSet<_> = plan.put.iter().map(destination).collect();
        let mut routes: BTreeSet<Route> = actual
            .into_iter()
            .filter(|route| !replaced.contains(&destination(route)) && !plan.remove.contains(route))
            .collect();
        routes.extend(plan.put);
        if overlay.is_some() {
            // What is gone need not be remembered.
            let there: BTreeSet<_> = routes.iter().map(destination).collect();
            self.known.retain(|known| there.contains(known));
        }
        let network = match (node, &set_up) {
            (Ok(_), Some((_, _, mtu))) => Network::Ready { mtu: *mtu },
            (Err(why), _) => Network::NotReady(why.clone()),
            (Ok(_), None) => Network::NotReady(String::new()),
        };
        self.left = Some(Left { node: set_up, routes });
        Ok(network)
    }

    /// Device, addresses, programs, configuration; all of it may be there already. Returns the device and the MTU.
    async fn set_up(&mut self, node: &LocalNode) -> Result<(u32, u32), SetupError> {
        let mtu = match self.settings.mtu {
            Some(mtu) => mtu,
            None => device::overlay_mtu(&self.netlink, node.tunnel_endpoint).await?,
        };
        let vxlan = VxlanConfig {
            port: self.settings.tunnel_port,
            mtu,
            router_ips: node.router_ips.clone(),
        };
        let vxlan_ifindex = device::ensure_vxlan(&self.netlink, &vxlan).await?;
        let settings = &self.settings;
        let found = outside::survey(&self.netlink).await?;
        let (devices, missing) = outside::choose(&found, &settings.outside.devices, &node.addresses);
        let missing: Vec<_> = missing.iter().map(|pattern| pattern.as_str()).collect();
        let said = describe(&devices, &missing);
        let features = settings.features | settings.outside.features;
        let config = node.config(
            settings.cluster_id,
            vxlan_ifindex,
            features,
            settings.maglev_table_size,
        );
        let tunnel_port = settings.tunnel_port;
        let no_masquerade = no_masquerade(&settings.outside.keep_source, node);
        let datapath = Arc::clone(&self.datapath);
        let steps = move || {
            device::enable_forwarding()?;
            let local = outside::local_ports().map_err(SetupError::LocalPorts)?;
            let (ports, apart) = outside::snat_ports(&local);
            let config = NodeConfig {
                snat_port_min: *ports.start(),
                snat_port_max: *ports.end(),
                tunnel_port,
                ..config
            };
            let tables = datapath.tables();
            // First the configuration and what it needs: the programs drop what they cannot judge.
            tables
                .set_no_masquerade(&no_masquerade)
                .and_then(|()| tables.set_devices(&devices.iter().map(OutsideDevice::entry).collect()))
                .and_then(|()| tables.set_node_config(&config))
                .map_err(SetupError::Config)?;
            datapath.attach_overlay(vxlan_ifindex)?;
            let ifindexes: Vec<u32> = devices.iter().map(|device| device.ifindex).collect();
            // A device that does not take a program must not keep pods from working.
            let failed = datapath.attach_outside(&ifindexes);
            let errors: Vec<String> = failed.iter().map(|error| chain(error)).collect();
            let clash = (!apart).then_some(local);
            Ok((errors, clash))
        };
        let (errors, clash) = tokio::task::spawn_blocking(steps)
            .await
            .unwrap_or(Err(SetupError::Stopping))?;
        for error in errors {
            tracing::warn!(
                error,
                "a device to the outside has no hooks; trying again in a minute"
            );
        }
        if self.said != said {
            tracing::info!("{said}");
            if let Some(local) = clash {
                tracing::warn!(
                    from = local.start(),
                    to = local.end(),
                    "the node's own sockets may take any port (net.ipv4.ip_local_port_range): their connections may meet those of pods and clients that leave with the node's address"
                );
            }
            self.said = said;
        }
        Ok((vxlan_ifindex, mtu))
    }
}

/// What the log says of the devices to the outside.
fn describe(devices: &[OutsideDevice], missing: &[&str]) -> String {
    let names: Vec<_> = devices.iter().map(|device| device.name.as_str()).collect();
    let mut text = if names.is_empty() {
        "no device leads outside: node ports and masquerading do nothing (--devices names them)".to_owned()
    } else {
        format!("devices to the outside: {}", names.join(", "))
    };
    if !missing.is_empty() {
        text.push_str(&format!(
            "; --devices also names {}, and none is so called",
            missing.join(", ")
        ));
    }
    text
}

/// What pods reach from their own addresses: the prefixes of the flags, and other pods of the node.
fn no_masquerade(keep_source: &[IpNet], node: &LocalNode) -> BTreeSet<PrefixKey> {
    let own = [node.ipv4_cidr.map(IpNet::V4), node.ipv6_cidr.map(IpNet::V6)];
    let key = |cidr: &IpNet| PrefixKey {
        prefix_len: if cidr.addr().is_ipv4() { 96 } else { 0 } + u32::from(cidr.prefix_len()),
        address: isthmus_mesh::to_address(cidr.network()),
    };
    keep_source.iter().chain(own.iter().flatten()).map(key).collect()
}

/// Whether a route that nobody wants may go before every cluster's nodes are listed: one to a local pod, and, if this node
/// is known, one into the overlay that was wanted before, so that who wanted it has withdrawn it.
fn may_go(route: &Route, known: Option<&BTreeSet<(IpAddr, u8)>>, local: &BTreeSet<u32>) -> bool {
    known.is_some_and(|known| known.contains(&destination(route)))
        || is_host(route) && local.contains(&route.ifindex)
}

/// Every route that should be there.
fn wanted_routes(
    overlay: Option<(&LocalNode, u32)>,
    remote: &RemoteCidrs,
    endpoints: &EndpointList,
) -> BTreeSet<Route> {
    let source = |ip: IpAddr| overlay.and_then(|(node, _)| node.router_ip(ip.is_ipv4()));
    let mut wanted = BTreeSet::new();
    for endpoint in endpoints.iter() {
        let Some(ifindex) = ifindex(endpoint) else {
            continue;
        };
        wanted.extend(endpoint.ips().map(|ip| Route {
            destination: ip,
            prefix_len: if ip.is_ipv4() { 32 } else { 128 },
            ifindex,
            source: source(ip),
        }));
    }
    if let Some((node, vxlan_ifindex)) = overlay {
        let families = |cidr: &&IpNet| node.router_ip(cidr.addr().is_ipv4()).is_some();
        let own = [node.ipv4_cidr.map(IpNet::V4), node.ipv6_cidr.map(IpNet::V6)];
        // A remote CIDR that covers this node's own would draw local traffic away; longer ones inside it are no better.
        let foreign = |cidr: &&IpNet| {
            !own.iter()
                .flatten()
                .any(|own| own.contains(*cidr) || cidr.contains(own))
        };
        wanted.extend(
            remote
                .cidrs
                .iter()
                .filter(families)
                .filter(foreign)
                .map(|cidr| Route {
                    destination: cidr.network(),
                    prefix_len: cidr.prefix_len(),
                    ifindex: vxlan_ifindex,
                    source: source(cidr.addr()),
                }),
        );
    }
    wanted
}

fn ifindex(endpoint: &crate::endpoints::Endpoint) -> Option<u32> {
    endpoint.device.as_ref().map(|device| device.host_ifindex)
}

fn destination(route: &Route) -> (IpAddr, u8) {
    (route.destination, route.prefix_len)
}

fn is_host(route: &Route) -> bool {
    route.prefix_len == if route.destination.is_ipv4() { 32 } else { 128 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoints::{Attachment, Device, Endpoint, Pod};

    fn node() -> LocalNode {
        LocalNode {
            ipv4: Some([172, 18, 0, 2].into()),
            ipv6: None,
            tunnel_endpoint: [172, 18, 0, 2].into(),
            ipv4_cidr: Some("10.1.0.0/24".parse().unwrap()),
            ipv6_cidr: None,
            router_ips: vec!["10.1.0.1".parse().unwrap()],
            addresses: vec![],
        }
    }

    fn endpoints() -> EndpointList {
        Arc::new([Endpoint {
            id: 1,
            attachment: Attachment {
                container_id: "c".into(),
                ifname: "eth0".into(),
            },
            pod: Pod::default(),
            ipv4: Some("10.1.0.2".parse().unwrap()),
            ipv6: None,
            host_ifname: "lxc1".into(),
            device: Some(Device {
                netns: String::new(),
                host_ifindex: 9,
                host_mac: [0; 6],
                pod_mac: [0; 6],
            }),
        }])
    }

    fn cidrs(cidrs: &[&str]) -> RemoteCidrs {
        RemoteCidrs {
            cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(),
            complete: true,
        }
    }

    #[test]
    fn routes_lead_to_pods_and_into_the_overlay() {
        let remote = cidrs(&["10.2.0.0/24", "fd00:2::/64"]);
        let wanted = wanted_routes(Some((&node(), 7)), &remote, &endpoints());
        let text: Vec<_> = wanted
            .iter()
            .map(|r| format!("{}/{} {} {:?}", r.destination, r.prefix_len, r.ifindex, r.source))
            .collect();
        // No IPv6 route: this node has no IPv6 address in the pod network to send from.
        assert_eq!(
            text,
            ["10.1.0.2/32 9 Some(10.1.0.1)", "10.2.0.0/24 7 Some(10.1.0.1)"]
        );
    }

    #[test]
    fn excluded_prefixes_and_the_nodes_own_keep_their_source() {
        let keep: Vec<IpNet> = ["10.0.0.0/8", "fd00::/8"]
            .map(|cidr| cidr.parse().unwrap())
            .into();
        let bits: Vec<u32> = no_masquerade(&keep, &node())
            .iter()
            .map(|key| key.prefix_len)
            .collect();
        assert_eq!(bits, [8, 104, 120]);
    }

    #[test]
    fn a_remote_cidr_never_covers_the_own_one() {
        let remote = cidrs(&["10.1.0.0/24", "10.0.0.0/8", "10.1.0.128/25", "10.1.1.0/24"]);
        let wanted = wanted_routes(Some((&node(), 7)), &remote, &(Arc::new([]) as EndpointList));
        assert_eq!(wanted.len(), 1);
    }

    #[test]
    fn routes_that_were_withdrawn_go_and_an_earlier_agents_stay() {
        let remote = cidrs(&["10.2.0.0/24", "10.3.0.0/24"]);
        let wanted = wanted_routes(Some((&node(), 7)), &remote, &endpoints());
        let known = BTreeSet::from([("10.2.0.0".parse().unwrap(), 24)]);
        let local = BTreeSet::from([9]);
        let gone = |known| -> Vec<String> {
            let gone = wanted.iter().filter(|route| may_go(route, known, &local));
            gone.map(|route| route.destination.to_string()).collect()
        };
        assert_eq!(gone(Some(&known)), ["10.1.0.2", "10.2.0.0"]);
        assert_eq!(gone(None), ["10.1.0.2"], "the node's object is missing");
    }

    #[test]
    fn without_a_node_pods_keep_their_routes() {
        let wanted = wanted_routes(None, &cidrs(&["10.2.0.0/24"]), &endpoints());
        assert_eq!(wanted.len(), 1);
    }
}
