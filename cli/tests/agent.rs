//! The real command against a fake agent: what it prints, and how it exits.

use std::{
    path::PathBuf,
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use isthmus_proto::agent::{
    Backend, ClusterMeshStatusRequest, ClusterMeshStatusResponse, Frontend, Health, ListServicesRequest,
    ListServicesResponse, RemoteCluster, Service, ShowTableRequest, ShowTableResponse, StatusRequest,
    StatusResponse, Subsystem,
    local_server::{Local, LocalServer},
};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status, transport::Server};

/// Becomes well after some questions.
#[derive(Clone, Default)]
struct Fake {
    until_well: Arc<AtomicU32>,
}

impl Fake {
    fn is_well(&self) -> bool {
        self.until_well
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1))
            .is_err()
    }
}

#[tonic::async_trait]
impl Local for Fake {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let health = if self.is_well() {
            Health::Ok
        } else {
            Health::Failed
        };
        Ok(Response::new(StatusResponse {
            cluster_name: "east".into(),
            cluster_id: 1,
            node_name: "east-1".into(),
            version: "0.1.0".into(),
            health: health.into(),
            subsystems: vec![Subsystem {
                name: "kvstore".into(),
                health: health.into(),
                message: "m".into(),
                age_ms: 0,
            }],
        }))
    }

    async fn list_services(
        &self,
        request: Request<ListServicesRequest>,
    ) -> Result<Response<ListServicesResponse>, Status> {
        let backend = |used| Backend {
            address: "10.1.0.2:80".into(),
            cluster: "west".into(),
            used,
            ..Backend::default()
        };
        let mut backends = vec![backend(true)];
        if request.into_inner().all_backends {
            backends.push(backend(false));
        }
        let service = |namespace: &str| Service {
            namespace: namespace.into(),
            name: "web".into(),
            frontends: vec![Frontend {
                address: "10.96.0.1:80".into(),
                backends: backends.clone(),
                ..Frontend::default()
            }],
            ..Service::default()
        };
        Ok(Response::new(ListServicesResponse {
            services: vec![service("default"), service("other")],
        }))
    }

    async fn cluster_mesh_status(
        &self,
        _: Request<ClusterMeshStatusRequest>,
    ) -> Result<Response<ClusterMeshStatusResponse>, Status> {
        let ready = self.is_well();
        let west = RemoteCluster {
            name: "west".into(),
            cluster_id: 2,
            connected: ready,
            ready,
            ..RemoteCluster::default()
        };
        Ok(Response::new(ClusterMeshStatusResponse {
            clusters: vec![west],
            global_services: 1,
            replicas: vec![],
        }))
    }

    type ShowTableStream = tokio_stream::Iter<std::vec::IntoIter<Result<ShowTableResponse, Status>>>;

    async fn show_table(
        &self,
        request: Request<ShowTableRequest>,
    ) -> Result<Response<Self::ShowTableStream>, Status> {
        if request.into_inner().table != "nodes" {
            return Err(Status::not_found("there is no such table; there are: nodes"));
        }
        let parts: Vec<_> = [r#"[{"name":"#, r#""a"}]"#]
            .map(|json| Ok(ShowTableResponse { json: json.into() }))
            .into();
        Ok(Response::new(tokio_stream::iter(parts)))
    }
}

struct Agent {
    fake: Fake,
    dir: tempfile::TempDir,
    _runtime: tokio::runtime::Runtime,
}

impl Agent {
    fn start(until_well: u32) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let fake = Fake {
            until_well: Arc::new(until_well.into()),
        };
        let guard = runtime.enter();
        let listener = UnixListener::bind(dir.path().join("agent.sock")).expect("bind");
        let service = LocalServer::new(fake.clone());
        runtime.spawn(
            Server::builder()
                .add_service(service)
                .serve_with_incoming(UnixListenerStream::new(listener)),
        );
        drop(guard);
        Self {
            fake,
            dir,
            _runtime: runtime,
        }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }

    fn isthmus(&self, arguments: &str) -> Output {
        isthmus(&self.socket(), arguments)
    }
}

fn isthmus(socket: &std::path::Path, arguments: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_isthmus"))
        .args(arguments.split(' '))
        .env("ISTHMUS_SOCKET_PATH", socket)
        .env("ISTHMUS_BPF_ROOT", socket)
        .output()
        .expect("run isthmus")
}

fn text(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("UTF-8");
    (
        output.status.code().expect("not ended by a signal"),
        text(&output.stdout),
        text(&output.stderr),
    )
}

#[test]
fn status_exits_as_the_agent_is() {
    let agent = Agent::start(1);
    let (code, stdout, _) = text(&agent.isthmus("status"));
    assert_eq!(code, 1);
    assert!(stdout.contains("kvstore     failed"), "{stdout}");
    let (code, stdout, _) = text(&agent.isthmus("status -o json"));
    assert_eq!(code, 0);
    let value: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(value["health"], "ok");
    assert!(!stdout.contains('\u{1b}'));
}

#[test]
fn waiting_ends_when_all_is_well_or_time_is_up() {
    let agent = Agent::start(2);
    let (code, stdout, _) = text(&agent.isthmus("clustermesh status --wait --wait-duration 30s"));
    assert_eq!(code, 0, "{stdout}");
    assert!(
        stdout.starts_with("ClusterMesh: 1/1 remote clusters ready, 1 global services\n"),
        "{stdout}"
    );

    agent.fake.until_well.store(u32::MAX, Ordering::SeqCst);
    let (code, stdout, _) = text(&agent.isthmus("status --wait --wait-duration 300ms"));
    assert_eq!(code, 1);
    assert!(stdout.contains("failed"), "{stdout}");
}

#[test]
fn services_can_be_narrowed() {
    let agent = Agent::start(0);
    let (code, stdout, _) = text(&agent.isthmus("service list -n default"));
    assert_eq!((code, stdout.lines().count()), (0, 2), "{stdout}");
    assert!(stdout.contains("1 (west 1)"), "{stdout}");
    let (_, stdout, _) = text(&agent.isthmus("service list --all-backends"));
    assert_eq!(stdout.lines().count(), 5, "{stdout}");
}

#[test]
fn tables_are_put_together() {
    let agent = Agent::start(0);
    assert_eq!(
        text(&agent.isthmus("db show nodes")),
        (0, "NAME\na\n".into(), String::new())
    );
    let (code, _, stderr) = text(&agent.isthmus("db show nothing"));
    assert_eq!(code, 1);
    assert!(stderr.contains("there are: nodes"), "{stderr}");
}

#[test]
fn versions_of_both_sides() {
    let agent = Agent::start(0);
    let (code, stdout, _) = text(&agent.isthmus("version"));
    assert_eq!(code, 0);
    assert!(
        stdout.contains("Agent:  0.1.0 (node east-1, cluster east)"),
        "{stdout}"
    );
}

#[test]
fn an_absent_agent_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("none.sock");
    for command in ["status", "service list", "clustermesh status", "db show nodes"] {
        let (code, stdout, stderr) = text(&isthmus(&socket, command));
        assert_eq!((code, stdout.as_str()), (1, ""), "{command}");
        assert!(
            stderr.contains("--socket-path") && stderr.contains("ISTHMUS_SOCKET_PATH"),
            "{command}: {stderr}"
        );
    }
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let (code, _, stderr) = text(&isthmus(&socket, "status"));
    assert_eq!(code, 1);
    assert!(stderr.contains("left from one that ended"), "{stderr}");
    // `version` has an answer of its own.
    assert_eq!(text(&isthmus(&socket, "version")).0, 0);
}

#[test]
fn absent_maps_are_explained() {
    let dir = tempfile::tempdir().unwrap();
    let (code, stdout, stderr) = text(&isthmus(dir.path(), "bpf lb list"));
    assert_eq!((code, stdout.as_str()), (1, ""));
    assert!(
        stderr.contains("--bpf-root") || stderr.contains("root"),
        "{stderr}"
    );
}

#[test]
fn wrong_arguments_exit_with_64() {
    let dir = tempfile::tempdir().unwrap();
    for arguments in [
        "",
        "nothing",
        "status --wait-duration 5",
        "status -o xml",
        "db show",
    ] {
        let (code, stdout, stderr) = text(&isthmus(dir.path(), arguments));
        assert_eq!((code, stdout.as_str()), (64, ""), "{arguments}");
        assert!(!stderr.is_empty());
    }
    let (_, _, stderr) = text(&isthmus(dir.path(), "status --wait-duration 5"));
    assert!(
        stderr.contains("--wait-duration") && stderr.contains("30s"),
        "{stderr}"
    );
    assert_eq!(text(&isthmus(dir.path(), "bpf lb list --help")).0, 0);
}

#[test]
fn shells_get_scripts() {
    let dir = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let (code, stdout, _) = text(&isthmus(dir.path(), &format!("completion {shell}")));
        assert_eq!(code, 0);
        assert!(stdout.contains("clustermesh"), "{shell}");
    }
}
