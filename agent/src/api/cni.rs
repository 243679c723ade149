//! The CNI plugin's calls: reads the messages, asks the [`keeper`], writes the answers.
//!
//! Codes: INVALID_ARGUMENT (the message is wrong), UNAVAILABLE (try again later), RESOURCE_EXHAUSTED (no address left),
//! NOT_FOUND (no allocation), FAILED_PRECONDITION (check found a difference), INTERNAL (kernel or disk).

use std::net::IpAddr;

use isthmus_proto::agent::{
    self as proto, AllocateRequest, AllocateResponse, CheckEndpointRequest, CheckEndpointResponse,
    CniStatusRequest, CniStatusResponse, CreateEndpointRequest, CreateEndpointResponse,
    DeleteEndpointRequest, DeleteEndpointResponse, GarbageCollectRequest, GarbageCollectResponse,
    cni_server::Cni,
};
use tokio::sync::{mpsc, oneshot};
use tonic::{Code, Request, Response, Status};

use crate::{
    endpoints::{
        Attachment, Device, EndpointError, Endpoints, Pod,
        keeper::{self, Found, KeeperError, NewDevice, chain},
    },
    node::{GATEWAY_IPV4, GATEWAY_IPV6},
};

/// Most addresses that a check may name.
const IPS_MAX: usize = 64;

/// The service.
#[derive(Clone, Debug)]
pub struct CniService {
    keeper: mpsc::Sender<keeper::Request>,
}

impl CniService {
    /// Calls go to this keeper.
    pub fn new(keeper: mpsc::Sender<keeper::Request>) -> Self {
        Self { keeper }
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, KeeperError>>) -> keeper::Request,
    ) -> Result<T, Status> {
        let (reply, answer) = oneshot::channel();
        let stopping = || status(&KeeperError::Stopping);
        self.keeper.send(request(reply)).await.map_err(|_| stopping())?;
        let answer = answer.await.map_err(|_| stopping())?;
        answer.map_err(|error| status(&error))
    }
}

#[tonic::async_trait]
impl Cni for CniService {
    async fn allocate(
        &self,
        request: Request<AllocateRequest>,
    ) -> Result<Response<AllocateResponse>, Status> {
        let request = request.into_inner();
        let attachment = attachment(request.attachment)?;
        let pod = Pod {
            namespace: request.namespace,
            name: request.pod_name,
            uid: request.pod_uid,
        };
        let (endpoint, mtu) = self
            .ask(|reply| keeper::Request::Allocate(attachment, pod, reply))
            .await?;
        let text = |ip: Option<String>| ip.unwrap_or_default();
        Ok(Response::new(AllocateResponse {
            endpoint_id: endpoint.id.into(),
            ipv4: text(endpoint.ipv4.map(|ip| ip.to_string())),
            ipv6: text(endpoint.ipv6.map(|ip| ip.to_string())),
            ipv4_gateway: text(endpoint.ipv4.map(|_| GATEWAY_IPV4.to_string())),
            ipv6_gateway: text(endpoint.ipv6.map(|_| GATEWAY_IPV6.to_string())),
            mtu,
            host_ifname: endpoint.host_ifname,
        }))
    }

    async fn create_endpoint(
        &self,
        request: Request<CreateEndpointRequest>,
    ) -> Result<Response<CreateEndpointResponse>, Status> {
        let request = request.into_inner();
        if request.host_ifindex == 0 {
            return Err(Status::invalid_argument(
                "host_ifindex is 0; it takes an interface's index",
            ));
        }
        let new = NewDevice {
            attachment: attachment(request.attachment)?,
            host_ifname: request.host_ifname,
            device: Device {
                netns: request.netns,
                host_ifindex: request.host_ifindex,
                host_mac: mac("host_mac", &request.host_mac)?,
                pod_mac: mac("pod_mac", &request.pod_mac)?,
            },
        };
        self.ask(|reply| keeper::Request::Create(new, reply)).await?;
        Ok(Response::new(CreateEndpointResponse {}))
    }

    async fn delete_endpoint(
        &self,
        request: Request<DeleteEndpointRequest>,
    ) -> Result<Response<DeleteEndpointResponse>, Status> {
        let attachment = attachment(request.into_inner().attachment)?;
        let endpoint = self
            .ask(|reply| keeper::Request::Delete(attachment, reply))
            .await?;
        Ok(Response::new(DeleteEndpointResponse {
            existed: endpoint.is_some(),
            host_ifname: endpoint.map(|endpoint| endpoint.host_ifname).unwrap_or_default(),
        }))
    }

    async fn check_endpoint(
        &self,
        request: Request<CheckEndpointRequest>,
    ) -> Result<Response<CheckEndpointResponse>, Status> {
        let request = request.into_inner();
        if request.ips.len() > IPS_MAX {
            return Err(Status::invalid_argument(format!(
                "ips has {} entries; it takes up to {IPS_MAX}",
                request.ips.len()
            )));
        }
        let ip = |text: &String| {
            text.parse::<IpAddr>()
                .map_err(|_| Status::invalid_argument(format!("ips has {text:?}; it takes IP addresses")))
        };
        let found = Found {
            attachment: attachment(request.attachment)?,
            host_ifname: request.host_ifname,
            host_ifindex: request.host_ifindex,
            ips: request.ips.iter().map(ip).collect::<Result<_, _>>()?,
        };
        self.ask(|reply| keeper::Request::Check(found, reply)).await?;
        Ok(Response::new(CheckEndpointResponse {}))
    }

    async fn cni_status(
        &self,
        _request: Request<CniStatusRequest>,
    ) -> Result<Response<CniStatusResponse>, Status> {
        match self.ask(keeper::Request::Status).await {
            Ok(()) => Ok(Response::new(CniStatusResponse {})),
            Err(status) => Err(Status::unavailable(status.message())),
        }
    }

    async fn garbage_collect(
        &self,
        request: Request<GarbageCollectRequest>,
    ) -> Result<Response<GarbageCollectResponse>, Status> {
        let valid = request.into_inner().valid;
        if valid.len() > Endpoints::MAX {
            return Err(Status::invalid_argument(format!(
                "valid has {} entries; a node has at most {}",
                valid.len(),
                Endpoints::MAX
            )));
        }
        let valid = valid
            .into_iter()
            .map(|one| attachment(Some(one)))
            .collect::<Result<_, _>>()?;
        let removed = self.ask(|reply| keeper::Request::Collect(valid, reply)).await?;
        Ok(Response::new(GarbageCollectResponse {
            removed_host_ifnames: removed.iter().map(|e| e.host_ifname.clone()).collect(),
            removed: removed
                .into_iter()
                .map(|endpoint| proto::Attachment {
                    container_id: endpoint.attachment.container_id,
                    ifname: endpoint.attachment.ifname,
                })
                .collect(),
        }))
    }
}

fn attachment(message: Option<proto::Attachment>) -> Result<Attachment, Status> {
    let message = message.ok_or_else(|| Status::invalid_argument("attachment is missing"))?;
    if message.container_id.is_empty() || message.ifname.is_empty() {
        return Err(Status::invalid_argument(
            "attachment needs both container_id and ifname",
        ));
    }
    Ok(Attachment {
        container_id: message.container_id,
        ifname: message.ifname,
    })
}

fn mac(field: &str, bytes: &[u8]) -> Result<[u8; 6], Status> {
    bytes
        .try_into()
        .map_err(|_| Status::invalid_argument(format!("{field} has {} bytes; it takes 6", bytes.len())))
}

fn status(error: &KeeperError) -> Status {
    let code = match error {
        KeeperError::Refused(EndpointError::NoCidr) => Code::Unavailable,
        KeeperError::Refused(EndpointError::Exhausted { .. } | EndpointError::TooMany(_)) => {
            Code::ResourceExhausted
        }
        KeeperError::Refused(EndpointError::Field { .. } | EndpointError::WrongInterface { .. }) => {
            Code::InvalidArgument
        }
        KeeperError::Refused(EndpointError::Unknown { .. }) => Code::NotFound,
        KeeperError::Refused(EndpointError::Differs(_)) => Code::FailedPrecondition,
        KeeperError::NotReady(_) | KeeperError::Late | KeeperError::Stopping => Code::Unavailable,
        KeeperError::Attach { .. } | KeeperError::Store(_) => Code::Internal,
    };
    Status::new(code, chain(error))
}
