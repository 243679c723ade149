//! An agent that only keeps books.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use isthmus_proto::agent::{
    AllocateRequest, AllocateResponse, Attachment, CheckEndpointRequest, CheckEndpointResponse,
    CniStatusRequest, CniStatusResponse, CreateEndpointRequest, CreateEndpointResponse,
    DeleteEndpointRequest, DeleteEndpointResponse, GarbageCollectRequest, GarbageCollectResponse,
    cni_server::{Cni, CniServer},
};
use tokio::{net::UnixListener, task::JoinHandle};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status, transport::Server};

#[derive(Default)]
struct Books {
    numbers: BTreeMap<String, u32>,
    endpoints: BTreeMap<String, CreateEndpointRequest>,
    refuse_create: bool,
    unavailable_until: Option<Instant>,
    also_collect: Vec<String>,
}

#[derive(Clone, Default)]
struct Service(Arc<Mutex<Books>>);

impl Service {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.0.lock().expect("no panic while locked")
    }
}

/// A running (or stopped) fake.
pub struct FakeAgent {
    service: Service,
    dir: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    server: Mutex<Option<JoinHandle<()>>>,
}

impl FakeAgent {
    pub fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build();
        let agent = Self {
            service: Service::default(),
            dir: tempfile::tempdir().expect("a temporary directory"),
            runtime: runtime.expect("a runtime"),
            server: Mutex::new(None),
        };
        agent.restart();
        agent
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }

    pub fn stop(&self) {
        if let Some(server) = self.server.lock().expect("no panic while locked").take() {
            server.abort();
            // Aborted: the error says so.
            let _ = self.runtime.block_on(server);
        }
        remove(&self.socket());
    }

    pub fn restart(&self) {
        remove(&self.socket());
        let guard = self.runtime.enter();
        // Bound before this returns: whoever connects then waits at most for the accept.
        let listener = UnixListener::bind(self.socket()).expect("bind");
        let service = CniServer::new(self.service.clone());
        let server = Server::builder()
            .add_service(service)
            .serve_with_incoming(UnixListenerStream::new(listener));
        *self.server.lock().expect("no panic while locked") =
            Some(self.runtime.spawn(async move { server.await.expect("serve") }));
        drop(guard);
    }

    /// Comes back, and says for a while that it is not ready.
    pub fn restart_after_refusing(&self, time: Duration) {
        self.service.books().unavailable_until = Some(Instant::now() + time);
        self.restart();
    }

    pub fn endpoint(&self, container: &str) -> Option<CreateEndpointRequest> {
        self.service.books().endpoints.get(container).cloned()
    }

    pub fn forget(&self, container: &str) {
        self.service.books().endpoints.remove(container);
    }

    pub fn allocated(&self) -> usize {
        self.service.books().numbers.len()
    }

    pub fn refuse_create(&self, refuse: bool) {
        self.service.books().refuse_create = refuse;
    }

    pub fn also_collect(&self, host_ifname: &str) {
        self.service.books().also_collect.push(host_ifname.to_owned());
    }
}

fn remove(socket: &Path) {
    // Absent at first.
    let _ = std::fs::remove_file(socket);
}

fn container(attachment: Option<Attachment>) -> Result<String, Status> {
    match attachment {
        Some(attachment) if attachment.ifname == "eth0" => Ok(attachment.container_id),
        _ => Err(Status::invalid_argument("no attachment")),
    }
}

#[tonic::async_trait]
impl Cni for Service {
    async fn allocate(
        &self,
        request: Request<AllocateRequest>,
    ) -> Result<Response<AllocateResponse>, Status> {
        let container = container(request.into_inner().attachment)?;
        let mut books = self.books();
        if books
            .unavailable_until
            .is_some_and(|until| Instant::now() < until)
        {
            return Err(Status::unavailable("starting"));
        }
        let next = (1..)
            .find(|number| !books.numbers.values().any(|used| used == number))
            .expect("endless");
        let number = *books.numbers.entry(container).or_insert(next);
        Ok(Response::new(AllocateResponse {
            endpoint_id: number,
            ipv4: format!("10.1.0.{}", number + 1),
            ipv6: format!("fd00:1::{}", number + 1),
            ipv4_gateway: "169.254.1.1".into(),
            ipv6_gateway: "fe80::1".into(),
            mtu: 1450,
            host_ifname: format!("lxc{number}"),
        }))
    }

    async fn create_endpoint(
        &self,
        request: Request<CreateEndpointRequest>,
    ) -> Result<Response<CreateEndpointResponse>, Status> {
        let request = request.into_inner();
        let mut books = self.books();
        if books.refuse_create {
            return Err(Status::internal("programs do not load"));
        }
        books
            .endpoints
            .insert(container(request.attachment.clone())?, request);
        Ok(Response::new(CreateEndpointResponse {}))
    }

    async fn delete_endpoint(
        &self,
        request: Request<DeleteEndpointRequest>,
    ) -> Result<Response<DeleteEndpointResponse>, Status> {
        let container = container(request.into_inner().attachment)?;
        let mut books = self.books();
        books.endpoints.remove(&container);
        let number = books.numbers.remove(&container);
        Ok(Response::new(DeleteEndpointResponse {
            existed: number.is_some(),
            host_ifname: number.map(|number| format!("lxc{number}")).unwrap_or_default(),
        }))
    }

    async fn check_endpoint(
        &self,
        request: Request<CheckEndpointRequest>,
    ) -> Result<Response<CheckEndpointResponse>, Status> {
        let request = request.into_inner();
        let container = container(request.attachment)?;
        let books = self.books();
        let endpoint = books
            .endpoints
            .get(&container)
            .ok_or_else(|| Status::failed_precondition("no such endpoint"))?;
        if endpoint.host_ifindex != request.host_ifindex || request.ips.len() != 2 {
            return Err(Status::failed_precondition("another interface"));
        }
        Ok(Response::new(CheckEndpointResponse {}))
    }

    async fn cni_status(&self, _: Request<CniStatusRequest>) -> Result<Response<CniStatusResponse>, Status> {
        Ok(Response::new(CniStatusResponse {}))
    }

    async fn garbage_collect(
        &self,
        request: Request<GarbageCollectRequest>,
    ) -> Result<Response<GarbageCollectResponse>, Status> {
        let valid: Vec<_> = request
            .into_inner()
            .valid
            .into_iter()
            .map(|valid| valid.container_id)
            .collect();
        let mut books = self.books();
        let mut response = GarbageCollectResponse::default();
        let gone: Vec<_> = books
            .numbers
            .keys()
            .filter(|container| !valid.contains(container))
            .cloned()
            .collect();
        for container in gone {
            books.endpoints.remove(&container);
            let number = books.numbers.remove(&container).unwrap_or_default();
            response.removed.push(Attachment {
                container_id: container,
                ifname: "eth0".into(),
            });
            response.removed_host_ifnames.push(format!("lxc{number}"));
        }
        response.removed_host_ifnames.append(&mut books.also_collect);
        Ok(Response::new(response))
    }
}
