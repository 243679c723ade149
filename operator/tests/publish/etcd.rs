//! A real etcd on loopback, on random ports and in a directory of its own.

use std::{
    collections::BTreeMap,
    net::TcpListener,
    process::{Child, Command, Stdio},
    time::Duration,
};

use isthmus_kvstore::{Client, EtcdConfig, Options, plan::Op};
use isthmus_proto::etcdserverpb::RangeRequest;
use isthmus_wire::keys::HEARTBEAT;

use crate::eventually;

const PROGRAM: &str = "/usr/bin/etcd";

/// Ends with the value.
pub struct Etcd {
    dir: tempfile::TempDir,
    child: Option<Child>,
    client_url: String,
    peer_url: String,
}

/// A key's value and when it was last written.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Entry {
    pub value: Vec<u8>,
    pub mod_revision: i64,
}

/// Everything but the heartbeat, by key.
pub type Content = BTreeMap<String, Entry>;

impl Etcd {
    pub async fn start() -> Self {
        let url = || {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            format!("http://{}", listener.local_addr().unwrap())
        };
        let mut etcd = Self {
            dir: tempfile::tempdir().unwrap(),
            child: None,
            client_url: url(),
            peer_url: url(),
        };
        etcd.run().await;
        etcd
    }

    /// Starts the program (again), with what its directory holds.
    pub async fn run(&mut self) {
        let child = Command::new(PROGRAM)
            .args(["--name", "m", "--data-dir"])
            .arg(self.dir.path().join("data"))
            .args([
                "--listen-client-urls",
                &self.client_url,
                "--advertise-client-urls",
                &self.client_url,
            ])
            .args([
                "--listen-peer-urls",
                &self.peer_url,
                "--initial-advertise-peer-urls",
                &self.peer_url,
            ])
            .args([
                "--initial-cluster",
                &format!("m={}", self.peer_url),
                "--log-level",
                "error",
            ])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| {
                panic!("this test needs a real etcd at {PROGRAM} ({error}): apt-get install etcd-server")
            });
        self.child = Some(child);
        eventually("etcd answers", async || self.try_content().await.is_some()).await;
    }

    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Stops the program and removes what it held.
    pub fn wipe(&mut self) {
        self.stop();
        std::fs::remove_dir_all(self.dir.path().join("data")).unwrap();
    }

    pub fn config(&self) -> EtcdConfig {
        EtcdConfig::parse(&format!("endpoints: ['{}']", self.client_url)).unwrap()
    }

    async fn client(&self) -> Option<Client> {
        Client::connect(&self.config(), &Options::default()).await.ok()
    }

    async fn read(&self) -> Option<(Content, Option<Entry>, i64)> {
        let request = RangeRequest {
            key: vec![0].into(),
            range_end: vec![0].into(),
            ..Default::default()
        };
        let call = async { self.client().await?.range(request).await.ok() };
        let (header, response) = tokio::time::timeout(Duration::from_secs(5), call).await.ok()??;
        let entries = response.kvs.into_iter().map(|kv| {
            let entry = Entry {
                value: kv.value.to_vec(),
                mod_revision: kv.mod_revision,
            };
            (String::from_utf8(kv.key.to_vec()).unwrap(), entry)
        });
        let mut content: Content = entries.collect();
        let heartbeat = content.remove(HEARTBEAT);
        Some((content, heartbeat, header.revision))
    }

    async fn try_content(&self) -> Option<Content> {
        Some(self.read().await?.0)
    }

    /// Everything but the heartbeat.
    pub async fn content(&self) -> Content {
        self.try_content().await.expect("etcd answers")
    }

    /// When the heartbeat was last written; 0 if never.
    pub async fn heartbeat(&self) -> i64 {
        let (_, heartbeat, _) = self.read().await.expect("etcd answers");
        heartbeat.map_or(0, |heartbeat| heartbeat.mod_revision)
    }

    pub async fn put(&self, key: &str, value: &str) {
        self.write(Op::Put {
            key: key.to_owned().into(),
            value: value.to_owned().into(),
        })
        .await;
    }

    pub async fn delete(&self, key: &str) {
        self.write(Op::Delete {
            key: key.to_owned().into(),
        })
        .await;
    }

    async fn write(&self, op: Op) {
        let client = self.client().await.expect("etcd answers");
        client.write(&[op]).await.unwrap();
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.stop();
    }
}
