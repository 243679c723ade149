//! DEL: the interface, then the agent's endpoint and addresses. What is gone is no error.
//!
//! The interface goes first: once the agent has released the addresses and the name, another pod may have them. When the
//! agent is away the interface goes all the same, and code 11 makes the runtime repeat, so that no address leaks.

use std::path::Path;

use super::open_pod_netns;
use crate::{
    agent::Agent,
    failure::{CniError, Code},
    netlink::{Netlink, NetlinkError},
    request::Attachment,
};

/// Detaches.
pub async fn run(agent: &Agent, attachment: &Attachment, netns: Option<&Path>) -> Result<(), CniError> {
    let interface = match netns {
        Some(path) => delete_pod_end(path, &attachment.ifname).await,
        None => Ok(()),
    };
    let endpoint = delete_endpoint(agent, attachment).await;
    match (interface, endpoint) {
        (Ok(()), result) | (result, Ok(())) => result,
        (Err(first), Err(second)) => Err(first.also(&second.to_string())),
    }
}

/// Removes the pod's end, and with it the node's; the namespace may be gone.
async fn delete_pod_end(path: &Path, ifname: &str) -> Result<(), CniError> {
    let netns = match open_pod_netns(path) {
        Ok(netns) => netns,
        Err(error) if error.code == Code::UnknownContainer => return Ok(()),
        Err(error) => return Err(error),
    };
    let ifname = ifname.to_owned();
    let delete = async move |netlink: Netlink| match netlink.link(&ifname).await? {
        Some(link) if link.veth => netlink.delete_link(&link).await,
        _ => Ok(()),
    };
    Ok(netns.run(delete).await?)
}

async fn delete_endpoint(agent: &Agent, attachment: &Attachment) -> Result<(), CniError> {
    let answer = agent.delete_endpoint(attachment).await?;
    if answer.host_ifname.is_empty() {
        return Ok(());
    }
    // Only if the namespace's path is gone and a process still holds the namespace is anything left.
    delete_host_end(
        &Netlink::open()?,
        &answer.host_ifname,
        std::slice::from_ref(attachment),
    )
    .await?;
    Ok(())
}

/// Removes the node's end `name` if its alias says that it belongs to one of `owners`.
pub async fn delete_host_end(
    netlink: &Netlink,
    name: &str,
    owners: &[Attachment],
) -> Result<(), NetlinkError> {
    match netlink.link(name).await? {
        Some(link) if link.veth && owners.iter().any(|owner| owner.alias() == link.alias) => {
            netlink.delete_link(&link).await
        }
        _ => Ok(()),
    }
}
