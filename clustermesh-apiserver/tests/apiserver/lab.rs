//! What the tests are made of: etcds, certificates, servers, clients, and waiting for a condition.

use std::{
    collections::BTreeMap,
    future::Future,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};
use isthmus_clustermesh_apiserver::{
    Config, StoreConfig, bind, embedded::Limits, mirror::readiness::ReadyTimeouts, server::ServerLimits,
    store::HistoryLimits,
};
use isthmus_kvstore::{Change, EtcdConfig, Feed, Options, Update, Writer, WriterOptions, follow};
use isthmus_model::{ClusterId, ClusterName, MaxConnectedClusters};
use isthmus_runtime::{CancellationToken, Health};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rcgen::{CertificateParams, DnType, Issuer, KeyPair};
use tempfile::TempDir;
use tokio::task::JoinHandle;

/// No condition of these tests takes longer, also on a loaded machine.
const DEADLINE: Duration = Duration::from_secs(30);

/// Waits until `condition` gives a value.
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut condition: impl FnMut() -> F) -> T {
    let wait = async {
        loop {
            if let Some(value) = condition().await {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(DEADLINE, wait)
        .await
        .unwrap_or_else(|_| panic!("within {DEADLINE:?} it did not come to this: {what}"))
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

/// Connections that notice a silent peer soon.
pub fn quick() -> Options {
    Options {
        connect_timeout: Duration::from_secs(2),
        call_timeout: Duration::from_secs(5),
        keep_alive_interval: Duration::from_millis(200),
        keep_alive_timeout: Duration::from_millis(1500),
        retry_cap: Duration::from_millis(300),
        ..Options::default()
    }
}

/// An etcd of one member. Ends with the value.
pub struct Etcd {
    child: Option<Child>,
    pub port: u16,
    peer_port: u16,
    data: TempDir,
}

impl Etcd {
    pub async fn start() -> Self {
        loop {
            let mut etcd = Self {
                child: None,
                port: free_port(),
                peer_port: free_port(),
                data: tempfile::tempdir().unwrap(),
            };
            if etcd.spawn().await {
                return etcd;
            }
        }
    }

    /// False if it ended at once: another test's etcd took one of the ports a moment before.
    async fn spawn(&mut self) -> bool {
        let [client, peer] = [self.port, self.peer_port].map(|port| format!("http://127.0.0.1:{port}"));
        let child = Command::new("etcd")
            .arg("--data-dir")
            .arg(self.data.path().join("etcd"))
            .args([
                "--listen-client-urls",
                &client,
                "--advertise-client-urls",
                &client,
            ])
            .args([
                "--listen-peer-urls",
                &peer,
                "--initial-advertise-peer-urls",
                &peer,
            ])
            .args([
                "--initial-cluster",
                &format!("default={peer}"),
                "--max-request-bytes",
                "16777216",
            ])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("these tests need etcd on the PATH; on Debian: apt-get install etcd-server");
        let child = Arc::new(Mutex::new(child));
        let answers = eventually("etcd answers", || async {
            let mut client = self.client().await.ok();
            let answer = match &mut client {
                Some(client) => client.get("x", None).await.ok(),
                None => None,
            };
            if child.lock().unwrap().try_wait().unwrap().is_some() {
                return Some(false);
            }
            answer.map(|_| true)
        })
        .await;
        self.child = Arc::into_inner(child).map(|child| child.into_inner().unwrap());
        answers
    }

    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    pub async fn restart(&mut self) {
        self.stop();
        assert!(self.spawn().await, "its ports were taken meanwhile");
    }

    /// Ends it and starts it with an empty directory: the same address, the same cluster ID, another history.
    pub async fn restart_empty(&mut self) {
        self.stop();
        std::fs::remove_dir_all(self.data.path().join("etcd")).unwrap();
        assert!(self.spawn().await, "its ports were taken meanwhile");
    }

    pub fn signal(&self, signal: Signal) {
        let pid = self.child.as_ref().unwrap().id();
        kill(Pid::from_raw(pid as i32), signal).unwrap();
    }

    pub async fn client(&self) -> Result<Client, etcd_client::Error> {
        Client::connect([format!("http://127.0.0.1:{}", self.port)], None).await
    }

    pub fn config(&self) -> EtcdConfig {
        EtcdConfig::parse(&format!("endpoints: ['http://127.0.0.1:{}']", self.port)).unwrap()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A CA and the certificates it has issued, as files.
pub struct Pki {
    pub dir: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Pki {
    pub fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ca.crt"), params.self_signed(&key).unwrap().pem()).unwrap();
        let pki = Self {
            dir,
            issuer: Issuer::new(params, key),
        };
        pki.issue("server");
        pki
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    /// Files `<name>.crt` and `<name>.key`.
    pub fn issue(&self, name: &str) -> (PathBuf, PathBuf) {
        let (cert, key) = (
            self.path(&format!("{name}.crt")),
            self.path(&format!("{name}.key")),
        );
        if !cert.exists() {
            self.issue_with(name, |_| ());
        }
        (cert, key)
    }

    /// The same, changed by `change`, also where there are such files.
    pub fn issue_with(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> (PathBuf, PathBuf) {
        let [cert, key] = ["crt", "key"].map(|end| self.path(&format!("{name}.{end}")));
        let pair = KeyPair::generate().unwrap();
        let names = vec![
            "localhost".to_owned(),
            "127.0.0.1".to_owned(),
            "a.mesh.cilium.io".to_owned(),
        ];
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        change(&mut params);
        std::fs::write(&cert, params.signed_by(&pair, &self.issuer).unwrap().pem()).unwrap();
        std::fs::write(&key, pair.serialize_pem()).unwrap();
        (cert, key)
    }

    /// The text of a cluster file.
    pub fn yaml(&self, address: SocketAddr, name: &str) -> String {
        let (cert, key) = self.issue(name);
        format!(
            "endpoints: ['https://a.mesh.cilium.io:{}']\ntrusted-ca-file: {}\ncert-file: {}\nkey-file: {}\n\
             cilium-host-aliases: [{{hostname: a.mesh.cilium.io, ips: [127.0.0.1]}}]\n",
            address.port(),
            self.path("ca.crt").display(),
            cert.display(),
            key.display(),
        )
    }

    pub fn config(&self, address: SocketAddr, name: &str) -> EtcdConfig {
        EtcdConfig::parse(&self.yaml(address, name)).unwrap()
    }

    /// etcd's own kind of client, by certificate.
    pub async fn client(&self, address: SocketAddr, name: &str) -> Client {
        let (cert, key) = self.issue(name);
        let read = |path: &Path| std::fs::read(path).unwrap();
        let tls = TlsOptions::new()
            .ca_certificate(Certificate::from_pem(read(&self.path("ca.crt"))))
            .identity(Identity::from_pem(read(&cert), read(&key)))
            .domain_name("localhost");
        let options = ConnectOptions::new().with_tls(tls).with_timeout(DEADLINE);
        Client::connect([format!("https://{address}")], Some(options))
            .await
            .unwrap()
    }
}

/// A running API server.
pub struct Apiserver {
    pub address: SocketAddr,
    pub health: Health,
    pub metrics: isthmus_runtime::Metrics,
    config: Config,
    shutdown: CancellationToken,
    task: JoinHandle<anyhow::Result<()>>,
}

pub fn cluster_id(id: u32) -> ClusterId {
    ClusterId::new(id, MaxConnectedClusters::C255).unwrap()
}

pub fn config(name: &str, id: u32, etcd: EtcdConfig, pki: &Pki) -> Config {
    let (tls_cert_file, tls_key_file) = pki.issue("server");
    Config {
        cluster: ClusterName::new(name).unwrap(),
        cluster_id: cluster_id(id),
        max: MaxConnectedClusters::C255,
        store: StoreConfig::Etcd(etcd),
        clustermesh_config: None,
        listen: "127.0.0.1:0".parse().unwrap(),
        tls_cert_file,
        tls_key_file,
        tls_client_ca_file: pki.path("ca.crt"),
        admin_listen: None,
        connection: quick(),
        limits: ServerLimits {
            progress_interval: Duration::from_millis(200),
            shutdown_grace: Duration::ZERO,
            shutdown_spread: Duration::from_millis(200),
            ..ServerLimits::default()
        },
        history: HistoryLimits::default(),
        remote_history: Config::REMOTE_HISTORY,
        ready: ReadyTimeouts::default(),
    }
}

/// The same with an embedded store in `data_dir`.
pub fn embedded(name: &str, id: u32, data_dir: &Path, pki: &Pki) -> Config {
    let nowhere = EtcdConfig::parse("endpoints: ['http://127.0.0.1:1']").unwrap();
    Config {
        store: StoreConfig::Embedded {
            data_dir: data_dir.to_owned(),
            limits: Limits::default(),
        },
        ..config(name, id, nowhere, pki)
    }
}

impl Apiserver {
    /// Starts it; it is ready when its etcd was listed.
    pub async fn start(config: Config) -> Self {
        let bound = bind(config.clone()).await.unwrap();
        let (address, health, metrics) = (bound.address().unwrap(), bound.health(), bound.metrics());
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(bound.run(shutdown.clone()));
        Self {
            address,
            health,
            metrics,
            config: Config {
                listen: address,
                ..config
            },
            shutdown,
            task,
        }
    }

    pub async fn ready(&self) {
        eventually("the server is ready", || async {
            self.health.is_ready().then_some(())
        })
        .await;
    }

    /// Value of a line of the metrics, by its name and labels without the prefix of all; 0 if it is not there.
    pub fn metric(&self, name: &str) -> i64 {
        let text = self.metrics.encode();
        let name = format!("isthmus_clustermesh_{name} ");
        let line = text.lines().find_map(|line| line.strip_prefix(&name));
        line.map_or(0, |value| value.parse().unwrap())
    }

    /// Tells it to stop, and does not wait.
    pub fn begin_to_stop(&self) {
        self.shutdown.cancel();
    }

    pub async fn stop(self) -> Config {
        self.shutdown.cancel();
        self.task.await.unwrap().unwrap();
        self.config
    }
}

/// A consumer's view of feeds: what it was told, and how often keys were deleted from it.
pub struct View {
    pub content: Arc<Mutex<ViewContent>>,
    _stop: tokio_util::sync::DropGuard,
}

#[derive(Clone, Debug, Default)]
pub struct ViewContent {
    pub keys: BTreeMap<Bytes, Bytes>,
    pub revisions: BTreeMap<Bytes, (i64, i64)>,
    pub synced: BTreeMap<Arc<str>, (u64, i64)>,
    pub connected: bool,
    pub listings: usize,
    pub deleted: Vec<Bytes>,
    pub refused: Vec<Bytes>,
    pub failed: Vec<String>,
}

impl View {
    pub fn open(config: EtcdConfig, feeds: Vec<Feed>) -> Self {
        let shutdown = CancellationToken::new();
        let mut follow = follow(config, quick(), feeds, shutdown.clone());
        let content = Arc::new(Mutex::new(ViewContent::default()));
        let shared = content.clone();
        tokio::spawn(async move {
            while let Some(update) = follow.updates.recv().await {
                let mut view = shared.lock().unwrap();
                match update {
                    Update::Connected { .. } => view.connected = true,
                    Update::Disconnected { .. } => {
                        view.connected = false;
                        view.synced.clear();
                    }
                    Update::Listing { .. } => view.listings += 1,
                    Update::Listed { .. } | Update::History { .. } => {}
                    Update::Changes { changes, .. } => {
                        changes.into_iter().for_each(|change| view.change(change))
                    }
                    Update::Synced {
                        feed,
                        cluster_id,
                        revision,
                    } => {
                        view.synced.insert(feed, (cluster_id, revision));
                    }
                    Update::Failed { error, .. } => view.failed.push(error),
                }
            }
        });
        Self {
            content,
            _stop: shutdown.drop_guard(),
        }
    }

    pub fn now(&self) -> ViewContent {
        self.content.lock().unwrap().clone()
    }

    /// Waits until the view is so.
    pub async fn until(&self, what: &str, condition: impl Fn(&ViewContent) -> bool) -> ViewContent {
        let what = format!("{what}; view: {:?}", "see the condition");
        eventually(&what, || async {
            let view = self.content.lock().unwrap();
            condition(&view).then(|| view.clone())
        })
        .await
    }
}

impl ViewContent {
    fn change(&mut self, change: Change) {
        match change {
            Change::Put {
                key,
                value,
                create_revision,
                mod_revision,
                ..
            } => {
                self.revisions
                    .insert(key.clone(), (create_revision, mod_revision));
                self.keys.insert(key, value);
            }
            Change::Delete { key, .. } => {
                self.keys.remove(&key);
                self.deleted.push(key);
            }
            Change::Refused { key, .. } => self.refused.push(key),
        }
    }

    pub fn value(&self, key: &str) -> Option<&Bytes> {
        self.keys.get(key.as_bytes())
    }
}

/// A writer to an etcd, as the operator runs it.
pub struct Publisher {
    pub writer: Writer,
    _stop: tokio_util::sync::DropGuard,
}

impl Publisher {
    pub fn start(etcd: &Etcd) -> Self {
        Self::to(etcd.config())
    }

    pub fn to(config: EtcdConfig) -> Self {
        let shutdown = CancellationToken::new();
        let mut options = WriterOptions::new(["cilium/", "isthmus/"]);
        options.connection = quick();
        options.heartbeat = Some(Duration::from_millis(300));
        let (writer, _) = Writer::start(config, options, shutdown.clone());
        Self {
            writer,
            _stop: shutdown.drop_guard(),
        }
    }
}

/// Everything under `prefix` in an etcd (or what speaks like one), with both revisions.
pub async fn dump(client: &mut Client, prefix: &str) -> BTreeMap<Bytes, (Bytes, i64, i64)> {
    try_dump(client, prefix).await.unwrap()
}

/// The same, or why it was refused: a mirror that is not read yet says so.
pub async fn try_dump(
    client: &mut Client,
    prefix: &str,
) -> Result<BTreeMap<Bytes, (Bytes, i64, i64)>, etcd_client::Error> {
    let options = etcd_client::GetOptions::new().with_prefix();
    let answer = client.get(prefix, Some(options)).await?;
    let entry = |kv: &etcd_client::KeyValue| {
        let value = Bytes::copy_from_slice(kv.value());
        (
            Bytes::copy_from_slice(kv.key()),
            (value, kv.create_revision(), kv.mod_revision()),
        )
    };
    Ok(answer.kvs().iter().map(entry).collect())
}
