//! The commands: what is done in which order, and undone when it fails.
//!
//! In: a request. Out: text for standard output, or an error object.
//!
//! ADD and DEL are in `attach` and `detach`. Invariants: nothing is removed unless it is a veth whose alias (or place
//! inside the pod's own namespace) says that it belongs to the attachment; whoever runs out of time says so with code 11.

mod attach;
mod detach;

use std::{future::Future, time::Duration};

use isthmus_proto::agent as api;

use crate::{
    agent::{Agent, AgentError, to_api},
    config::{NetworkConfig, ValidAttachment},
    failure::{CniError, Code},
    interface::{Interface, differences},
    netlink::{Netlink, NetlinkError},
    netns::{Netns, NetnsError},
    request::{Attachment, Request},
    result,
};

/// Longest time for a command; runtimes give up after two minutes.
const DEADLINE: Duration = Duration::from_secs(40);
/// Longest time for undoing a failed ADD, after [`DEADLINE`].
const UNDO_DEADLINE: Duration = Duration::from_secs(15);
/// How long an agent that is away is waited for: a restart, not an outage.
const PATIENCE: Duration = Duration::from_secs(3);

/// Carries `request` out.
pub async fn run(request: &Request) -> Result<String, CniError> {
    match request {
        Request::Version { version } => Ok(result::versions(*version)),
        Request::Add {
            config,
            attachment,
            netns,
            pod,
        } => {
            let agent = Agent::at(&config.agent_socket, PATIENCE);
            attach::run(&agent, config.version, attachment, netns, pod).await
        }
        Request::Del {
            config,
            attachment,
            netns,
        } => {
            let agent = Agent::at(&config.agent_socket, PATIENCE);
            in_time(DEADLINE, detach::run(&agent, attachment, netns.as_deref()))
                .await
                .map(|()| String::new())
        }
        Request::Check {
            config,
            attachment,
            netns,
        } => {
            let agent = Agent::at(&config.agent_socket, PATIENCE);
            in_time(DEADLINE, check(&agent, config, attachment, netns))
                .await
                .map(|()| String::new())
        }
        Request::Status { config } => {
            // A runtime asks often and wants to know now.
            let agent = Agent::at(&config.agent_socket, Duration::ZERO);
            in_time(DEADLINE, status(&agent)).await.map(|()| String::new())
        }
        Request::Gc { config, valid } => {
            let agent = Agent::at(&config.agent_socket, PATIENCE);
            in_time(DEADLINE, collect_garbage(&agent, valid))
                .await
                .map(|()| String::new())
        }
    }
}

async fn in_time<T>(limit: Duration, work: impl Future<Output = Result<T, CniError>>) -> Result<T, CniError> {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
        Err(CniError::new(
            Code::TryAgainLater,
            format!("not done after {} seconds", limit.as_secs()),
        ))
    })
}

impl From<NetlinkError> for CniError {
    fn from(error: NetlinkError) -> Self {
        Self::from_error(Code::Kernel, &error)
    }
}

impl From<NetnsError> for CniError {
    fn from(error: NetnsError) -> Self {
        let code = match &error {
            NetnsError::Absent { .. } => Code::UnknownContainer,
            _ => Code::Kernel,
        };
        Self::from_error(code, &error)
    }
}

impl From<AgentError> for CniError {
    fn from(error: AgentError) -> Self {
        error.into_cni(Code::AgentRefused)
    }
}

/// Opens the pod's namespace; the node's own is refused.
fn open_pod_netns(path: &std::path::Path) -> Result<Netns, CniError> {
    let netns = Netns::open(path)?;
    if netns.is_current()? {
        let message = format!(
            "CNI_NETNS {} is the plugin's own network namespace",
            path.display()
        );
        return Err(CniError::new(Code::InvalidEnvironment, message));
    }
    Ok(netns)
}

async fn check(
    agent: &Agent,
    config: &NetworkConfig,
    attachment: &Attachment,
    netns: &std::path::Path,
) -> Result<(), CniError> {
    let prev_result = config.prev_result.clone().unwrap_or_default();
    let interface = Interface::from_result(attachment, &prev_result)
        .map_err(|error| CniError::from_error(Code::InvalidConfig, &error))?;
    let netns = open_pod_netns(netns)?;
    let ifname = interface.ifname.clone();
    let pod = netns
        .run(async move |netlink| netlink.observe(&ifname).await)
        .await?;
    let host = Netlink::open()?.observe(&interface.host_ifname).await?;
    let found = differences(&interface, pod.as_ref(), host.as_ref());
    if !found.is_empty() {
        return Err(CniError::new(Code::CheckFailed, found.join("; ")));
    }
    let request = api::CheckEndpointRequest {
        attachment: Some(to_api(attachment)),
        host_ifname: interface.host_ifname,
        host_ifindex: host.map_or(0, |host| host.link.index),
        ips: interface
            .families
            .iter()
            .map(|family| family.address.to_string())
            .collect(),
    };
    agent
        .check_endpoint(&request)
        .await
        .map_err(|error| error.into_cni(Code::CheckFailed))
}

async fn status(agent: &Agent) -> Result<(), CniError> {
    agent.status().await.map_err(|error| {
        let error = error.into_cni(Code::NotAvailable);
        // Pods that exist keep their network without the agent: 50, not 51.
        CniError {
            code: Code::NotAvailable,
            ..error
        }
    })
}

async fn collect_garbage(agent: &Agent, valid: &[ValidAttachment]) -> Result<(), CniError> {
    let valid = valid.iter().map(|attachment| api::Attachment {
        container_id: attachment.container_id.clone(),
        ifname: attachment.ifname.clone(),
    });
    let answer = agent.collect_garbage(valid.collect()).await?;
    let removed: Vec<_> = answer
        .removed
        .into_iter()
        .map(|attachment| Attachment {
            container_id: attachment.container_id,
            ifname: attachment.ifname,
        })
        .collect();
    let netlink = Netlink::open()?;
    let mut failed: Option<CniError> = None;
    for name in &answer.removed_host_ifnames {
        let result = detach::delete_host_end(&netlink, name, &removed).await;
        if let Err(error) = result {
            let error = CniError::from(error);
            failed = Some(match failed {
                None => error,
                Some(first) => first.also(&error.message),
            });
        }
    }
    failed.map_or(Ok(()), Err)
}
