//! ADD: addresses from the agent, a veth pair into the pod, then the agent's programs.
//!
//! Idempotent: what a crashed ADD left is replaced, and a complete interface is reported as it is. A failure undoes all.

use std::path::Path;

use isthmus_proto::agent::{AllocateResponse, CreateEndpointRequest};

use super::{DEADLINE, UNDO_DEADLINE, detach, in_time, open_pod_netns};
use crate::{
    agent::{Agent, to_api},
    failure::{CniError, Code},
    interface::{Interface, Link, differences},
    netlink::{Netlink, NetlinkError},
    netns::Netns,
    request::{Attachment, Pod},
    result,
    version::CniVersion,
};

/// Attaches; the result's text.
pub async fn run(
    agent: &Agent,
    version: CniVersion,
    attachment: &Attachment,
    netns_path: &Path,
    pod: &Pod,
) -> Result<String, CniError> {
    let netns = open_pod_netns(netns_path)?;
    let netlink = Netlink::open()?;
    refuse_foreign(&netlink, &netns, attachment).await?;
    // Should this fail after the agent has allocated, then the runtime's DEL releases the addresses.
    let allocation = in_time(DEADLINE, async { Ok(agent.allocate(attachment, pod).await?) }).await?;
    match in_time(
        DEADLINE,
        attach(agent, &netlink, &netns, attachment, pod, &allocation),
    )
    .await
    {
        Ok((interface, host, pod)) => Ok(result::add(
            version,
            &interface,
            &host,
            &pod,
            &netns_path.to_string_lossy(),
        )),
        Err(error) => match in_time(UNDO_DEADLINE, detach::run(agent, attachment, Some(netns_path))).await {
            Ok(()) => Err(error),
            Err(undo) => Err(error.also(&format!("undoing it failed too: {undo}"))),
        },
    }
}

/// Fails if the pod has an interface of the wanted name that no earlier ADD of this attachment made.
async fn refuse_foreign(netlink: &Netlink, netns: &Netns, attachment: &Attachment) -> Result<(), CniError> {
    let ifname = attachment.ifname.clone();
    let Some(inner) = netns
        .run(async move |netlink| netlink.link(&ifname).await)
        .await?
    else {
        return Ok(());
    };
    let outer = match inner.peer.filter(|_| inner.veth) {
        Some(index) => netlink.link_at(index).await?,
        None => None,
    };
    if outer.is_some_and(|outer| outer.alias == attachment.alias()) {
        return Ok(());
    }
    let message = format!(
        "the pod has an interface {} already, which this plugin did not make",
        attachment.ifname
    );
    Err(CniError::new(Code::InterfaceExists, message))
}

async fn attach(
    agent: &Agent,
    netlink: &Netlink,
    netns: &Netns,
    attachment: &Attachment,
    pod: &Pod,
    allocation: &AllocateResponse,
) -> Result<(Interface, Link, Link), CniError> {
    let interface = Interface::from_allocation(attachment, allocation)
        .map_err(|error| CniError::from_error(Code::AgentRefused, &error))?;
    let (host, inner) = match complete(netlink, netns, &interface).await? {
        Some(ends) => ends,
        None => make(netlink, netns, attachment, &interface).await?,
    };
    let request = CreateEndpointRequest {
        attachment: Some(to_api(attachment)),
        namespace: pod.namespace.clone(),
        pod_name: pod.name.clone(),
        pod_uid: pod.uid.clone(),
        netns: netns.path().to_string_lossy().into_owned(),
        host_ifname: interface.host_ifname.clone(),
        host_ifindex: host.index,
        host_mac: host.mac.0.to_vec().into(),
        pod_mac: inner.mac.0.to_vec().into(),
    };
    agent.create_endpoint(&request).await?;
    Ok((interface, host, inner))
}

/// The two ends, if an earlier ADD finished them.
async fn complete(
    netlink: &Netlink,
    netns: &Netns,
    interface: &Interface,
) -> Result<Option<(Link, Link)>, CniError> {
    let ifname = interface.ifname.clone();
    let pod = netns
        .run(async move |netlink| netlink.observe(&ifname).await)
        .await?;
    let host = netlink.observe(&interface.host_ifname).await?;
    if !differences(interface, pod.as_ref(), host.as_ref()).is_empty() {
        return Ok(None);
    }
    Ok(host.zip(pod).map(|(host, pod)| (host.link, pod.link)))
}

async fn make(
    netlink: &Netlink,
    netns: &Netns,
    attachment: &Attachment,
    interface: &Interface,
) -> Result<(Link, Link), CniError> {
    // The agent says that the name is ours, so what bears it is left from an ADD that did not finish; and what has our
    // name inside the pod was found to be ours.
    if let Some(stale) = netlink
        .link(&interface.host_ifname)
        .await?
        .filter(|link| link.veth)
    {
        netlink.delete_link(&stale).await?;
    }
    let ifname = interface.ifname.clone();
    netns
        .run(async move |netlink| match netlink.link(&ifname).await? {
            Some(stale) => netlink.delete_link(&stale).await,
            None => Ok(()),
        })
        .await?;
    netlink
        .add_veth(&interface.host_ifname, &interface.ifname, netns, interface.mtu)
        .await?;
    let host = found(netlink, &interface.host_ifname).await?;
    netlink.set_up(&host, Some(&attachment.alias())).await?;
    let inner = {
        let (interface, host) = (interface.clone(), host.clone());
        netns
            .run(async move |netlink| configure_pod(&netlink, &interface, &host).await)
            .await?
    };
    for family in &interface.families {
        netlink.add_host_route(&host, family.address).await?;
        netlink.add_neighbour(&host, family.address, inner.mac).await?;
    }
    Ok((host, inner))
}

/// Inside the pod.
async fn configure_pod(netlink: &Netlink, interface: &Interface, host: &Link) -> Result<Link, NetlinkError> {
    let link = found(netlink, &interface.ifname).await?;
    if interface.families.iter().any(|family| family.address.is_ipv6()) {
        enable_ipv6(&link.name)?;
    }
    netlink.set_up(&link, None).await?;
    for family in &interface.families {
        netlink.add_address(&link, family.address).await?;
        netlink.add_neighbour(&link, family.gateway, host.mac).await?;
        netlink.add_host_route(&link, family.gateway).await?;
        netlink.add_default_route(&link, family.gateway).await?;
    }
    Ok(link)
}

/// Some runtimes switch IPv6 off in new namespaces. The file is the calling thread's namespace's.
fn enable_ipv6(ifname: &str) -> Result<(), NetlinkError> {
    let path = format!("/proc/sys/net/ipv6/conf/{ifname}/disable_ipv6");
    match std::fs::read_to_string(&path) {
        Ok(value) if value.trim() == "0" => Ok(()),
        _ => std::fs::write(&path, "0")
            .map_err(|source| NetlinkError::new(format!("switch IPv6 on with {path}"), source)),
    }
}

async fn found(netlink: &Netlink, name: &str) -> Result<Link, NetlinkError> {
    netlink.link(name).await?.ok_or_else(|| {
        NetlinkError::new(
            format!("find the link {name} that was just made"),
            std::io::ErrorKind::NotFound.into(),
        )
    })
}
