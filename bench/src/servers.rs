//! The servers that are measured: etcd and our API server as processes of their own on loopback, with the
//! same certificates. A server ends with its value, also when the measurement failed.

use std::{
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use tokio_rustls::rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};

/// A server that does not answer after so long has failed. (To list 500,000 keys from etcd 3.4 in pages takes a minute or two: it
/// walks over all that are left for each.)
const START_MAX: Duration = Duration::from_secs(180);
/// Clock ticks a second in /proc: 100 on every architecture that Isthmus runs on.
const TICKS_PER_SECOND: f64 = 100.0;
/// Common name that may read everything of cluster `bench`.
const CLIENT: &str = "admin-bench";
/// Common names of the other clients.
const CLIENTS: [&str; 2] = ["remote", "local-bench"];

/// A CA, a server certificate and a client certificate, as files.
pub struct Certificates {
    dir: TempDir,
}

impl Certificates {
    /// Makes them.
    pub fn new() -> Result<Self> {
        let dir = tempfile::tempdir().context("a directory for certificates")?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![])?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        std::fs::write(dir.path().join("ca.crt"), params.self_signed(&key)?.pem())?;
        let issuer = Issuer::new(params, key);
        for name in ["server", CLIENT].into_iter().chain(CLIENTS) {
            let pair = KeyPair::generate()?;
            let mut params = CertificateParams::new(vec!["localhost".into(), "127.0.0.1".into()])?;
            params.distinguished_name = DistinguishedName::new();
            params.distinguished_name.push(DnType::CommonName, name);
            std::fs::write(
                dir.path().join(format!("{name}.crt")),
                params.signed_by(&pair, &issuer)?.pem(),
            )?;
            std::fs::write(dir.path().join(format!("{name}.key")), pair.serialize_pem())?;
        }
        Ok(Self { dir })
    }

    /// Path of `ca.crt`, `server.crt` or `server.key`.
    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    /// Certificate chain and key of `server` or the client.
    pub fn chain(&self, name: &str) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
        let chain = CertificateDer::pem_file_iter(self.path(&format!("{name}.crt")))?
            .collect::<std::result::Result<_, _>>()?;
        Ok((
            chain,
            PrivateKeyDer::from_pem_file(self.path(&format!("{name}.key")))?,
        ))
    }

    /// A client that shows the client certificate and speaks HTTP/2.
    pub fn client_config(&self) -> Result<Arc<ClientConfig>> {
        self.client_config_of(CLIENT)
    }

    /// The same with the certificate of another client.
    pub fn client_config_of(&self, name: &str) -> Result<Arc<ClientConfig>> {
        let mut roots = RootCertStore::empty();
        for root in CertificateDer::pem_file_iter(self.path("ca.crt"))? {
            roots.add(root?)?;
        }
        let (chain, key) = self.chain(name)?;
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }

    /// The file that tells a follower of ours how to read the server at `address` as client `name`.
    pub fn etcd_config(&self, address: SocketAddr, name: &str) -> String {
        let path = |file: &str| self.path(file).display().to_string();
        format!(
            "endpoints: ['https://{address}']\ntrusted-ca-file: '{}'\ncert-file: '{}'\nkey-file: '{}'\n",
            path("ca.crt"),
            path(&format!("{name}.crt")),
            path(&format!("{name}.key")),
        )
    }

    /// etcd's kind of client to a server with these certificates.
    pub async fn client(&self, address: SocketAddr) -> Result<Client> {
        let read = |file: &str| std::fs::read(self.path(file));
        let tls = TlsOptions::new()
            .ca_certificate(Certificate::from_pem(read("ca.crt")?))
            .identity(Identity::from_pem(
                read(&format!("{CLIENT}.crt"))?,
                read(&format!("{CLIENT}.key"))?,
            ))
            .domain_name("localhost");
        let options = ConnectOptions::new().with_tls(tls);
        Ok(Client::connect([format!("https://{address}")], Some(options)).await?)
    }
}

/// A child process; killed with the value.
pub struct Process(Child);

impl Process {
    /// Starts `command`; `hint` says how to get the program.
    pub fn spawn(command: &mut Command, hint: &str) -> Result<Self> {
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let program = command.get_program().display().to_string();
        Ok(Self(
            child.with_context(|| format!("cannot run {program}; {hint}"))?,
        ))
    }

    /// CPU time that it has used, in seconds.
    pub fn cpu_seconds(&self) -> Result<f64> {
        cpu_seconds(&PathBuf::from(format!("/proc/{}/stat", self.0.id())))
    }

    /// Its resident memory.
    pub fn rss_kib(&self) -> Result<f64> {
        rss_kib(&self.0.id().to_string())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may be gone already; then there is nothing to end.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Resident memory of a process, or of `self`.
pub fn rss_kib(process: &str) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    kib.context("no VmRSS")?.parse().context("VmRSS")
}

/// User and system time of a `stat` file of /proc.
pub fn cpu_seconds(stat: &Path) -> Result<f64> {
    let stat = std::fs::read_to_string(stat)?;
    // The name, in parentheses, may hold anything. utime and stime are the 12th and 13th field after it.
    let fields = stat.rsplit_once(')').context("no name")?.1;
    let ticks = fields.split_whitespace().skip(11).take(2);
    let ticks: Vec<f64> = ticks.map(str::parse).collect::<std::result::Result<_, _>>()?;
    Ok(ticks.iter().sum::<f64>() / TICKS_PER_SECOND)
}

/// An etcd of one member, with a TLS address and a plain one.
pub struct Etcd {
    /// The process.
    pub process: Process,
    /// Mutual TLS.
    pub address: SocketAddr,
    plain: SocketAddr,
    data: TempDir,
}

impl Etcd {
    /// Starts it with an empty directory and waits until it answers.
    pub async fn start(certificates: &Certificates) -> Result<Self> {
        let data = tempfile::tempdir()?;
        let (address, plain, peer) = (free_address()?, free_address()?, free_address()?);
        let clients = format!("https://{address},http://{plain}");
        let peer = format!("http://{peer}");
        let mut command = Command::new("etcd");
        command.arg("--data-dir").arg(data.path());
        command.args([
            "--listen-client-urls",
            &clients,
            "--advertise-client-urls",
            &clients,
        ]);
        command.args([
            "--listen-peer-urls",
            &peer,
            "--initial-advertise-peer-urls",
            &peer,
        ]);
        command.args([
            "--initial-cluster",
            &format!("default={peer}"),
            "--client-cert-auth",
        ]);
        command.arg("--cert-file").arg(certificates.path("server.crt"));
        command.arg("--key-file").arg(certificates.path("server.key"));
        command.arg("--trusted-ca-file").arg(certificates.path("ca.crt"));
        let etcd = Self {
            process: Process::spawn(&mut command, "on Debian: apt-get install etcd-server")?,
            address,
            plain,
            data,
        };
        until_answered("etcd", async || etcd.client().await?.get("x", None).await).await?;
        Ok(etcd)
    }

    /// Its data directory.
    pub fn data(&self) -> &Path {
        self.data.path()
    }

    /// A client without TLS, to write with.
    pub async fn client(&self) -> std::result::Result<Client, etcd_client::Error> {
        Client::connect([format!("http://{}", self.plain)], None).await
    }
}

/// Where an API server has its files and its addresses; one that starts again has the same.
pub struct Place {
    /// Mutual TLS.
    pub address: SocketAddr,
    /// Admin endpoint.
    pub admin: SocketAddr,
    files: TempDir,
    store: Vec<String>,
}

impl Place {
    fn new(store: impl FnOnce(&Path) -> Result<Vec<String>>) -> Result<Self> {
        let files = tempfile::tempdir()?;
        std::fs::create_dir(files.path().join("remotes"))?;
        Ok(Self {
            address: free_address()?,
            admin: free_address()?,
            store: store(files.path())?,
            files,
        })
    }

    /// Its cluster's state is in `etcd`.
    pub fn with_etcd(etcd: &Etcd) -> Result<Self> {
        Self::new(|files| {
            let config = files.join("etcd.yaml");
            std::fs::write(&config, format!("endpoints: ['http://{}']\n", etcd.plain))?;
            Ok(vec!["--etcd-config".to_owned(), config.display().to_string()])
        })
    }

    /// Its cluster's state is in a file of its own.
    pub fn embedded() -> Result<Self> {
        Self::new(|files| {
            let data_dir = files.join("data").display().to_string();
            Ok(["--store", "embedded", "--data-dir", &data_dir]
                .map(str::to_owned)
                .into())
        })
    }

    /// Writes the file of a remote cluster.
    pub fn configure_remote(&self, name: &str, text: &str) -> Result<()> {
        Ok(std::fs::write(
            self.files.path().join("remotes").join(name),
            text,
        )?)
    }
}

/// Our API server.
pub struct Apiserver {
    /// The process.
    pub process: Process,
    /// Mutual TLS.
    pub address: SocketAddr,
    _place: Option<Place>,
}

impl Apiserver {
    /// Starts one that follows `etcd`, and waits until it serves what `etcd` holds.
    pub async fn start(certificates: &Certificates, etcd: &Etcd) -> Result<Self> {
        let place = Place::with_etcd(etcd)?;
        let address = place.address;
        let mut server = Self::spawn(certificates, &place)?;
        server._place = Some(place);
        until_answered("the API server", async || {
            let mut client = certificates.client(address).await?;
            anyhow::Ok(client.get("cilium/state/x", None).await?)
        })
        .await?;
        Ok(server)
    }

    /// Starts one at `place`; it does not answer yet.
    pub fn spawn(certificates: &Certificates, place: &Place) -> Result<Self> {
        let program = std::env::current_exe()
            .context("where am I")?
            .with_file_name("isthmus-clustermesh-apiserver");
        let mut command = Command::new(program);
        command.args([
            "--cluster-name",
            "bench",
            "--cluster-id",
            "1",
            "--log-level",
            "warn",
        ]);
        command.args(&place.store);
        command
            .arg("--clustermesh-config")
            .arg(place.files.path().join("remotes"));
        command.args([
            "--listen",
            &place.address.to_string(),
            "--admin-listen",
            &place.admin.to_string(),
        ]);
        command
            .arg("--tls-cert-file")
            .arg(certificates.path("server.crt"));
        command.arg("--tls-key-file").arg(certificates.path("server.key"));
        command
            .arg("--tls-client-ca-file")
            .arg(certificates.path("ca.crt"));
        let hint = "build with `cargo build --release --workspace --bins`";
        Ok(Self {
            process: Process::spawn(&mut command, hint)?,
            address: place.address,
            _place: None,
        })
    }
}

/// Waits until `call` succeeds.
pub async fn until_answered<T, E: Into<anyhow::Error>>(
    what: &str,
    mut call: impl AsyncFnMut() -> std::result::Result<T, E>,
) -> Result<()> {
    let deadline = Instant::now() + START_MAX;
    loop {
        match call().await {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > deadline => {
                return Err(error.into())
                    .with_context(|| format!("{what} does not answer after {START_MAX:?}"));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// An address of loopback that was free a moment ago.
pub fn free_address() -> Result<SocketAddr> {
    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    if !address.ip().is_loopback() {
        bail!("{address} is not on loopback");
    }
    Ok(address)
}
