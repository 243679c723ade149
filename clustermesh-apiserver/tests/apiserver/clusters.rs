//! Whole clusters for the tests of the mirror: an etcd, what an operator writes there, and an API server.

use std::{collections::BTreeMap, net::SocketAddr, path::Path};

use etcd_client::Client;
use isthmus_kvstore::Writer;
use isthmus_model::{
    ClusterName, IdentityRange, IpEntry, Labels, MaxConnectedClusters, Node, NumericIdentity, ServiceFrame,
    ServiceName, ServicePort, Slice, SliceEndpoint, SlicePort, labels,
};
use isthmus_wire::{
    ClusterConfig, identity, ip,
    keys::{self, Kind, Scope},
    node, service, slice,
    status::RemoteStatus,
};

use crate::lab::{Apiserver, Etcd, Pki, Publisher, cluster_id, config, eventually, try_dump};

/// The size of the mesh.
pub const MAX: MaxConnectedClusters = MaxConnectedClusters::C255;

/// A cluster: etcd, what the operator writes, API server.
pub struct Cluster {
    pub name: ClusterName,
    pub id: u32,
    pub etcd: Etcd,
    pub publisher: Publisher,
    pub server: Option<Apiserver>,
    pub files: tempfile::TempDir,
}

impl Cluster {
    pub async fn start(name: &str, id: u32, pki: &Pki) -> Self {
        let etcd = Etcd::start().await;
        let publisher = Publisher::start(&etcd);
        let files = tempfile::tempdir().unwrap();
        let mut config = config(name, id, etcd.config(), pki);
        config.clustermesh_config = Some(files.path().to_owned());
        let server = Apiserver::start(config).await;
        server.ready().await;
        Self {
            name: ClusterName::new(name).unwrap(),
            id,
            etcd,
            publisher,
            server: Some(server),
            files,
        }
    }

    pub fn writer(&self) -> &Writer {
        &self.publisher.writer
    }

    pub fn address(&self) -> SocketAddr {
        self.server.as_ref().unwrap().address
    }

    pub fn configure(&self, remote: &str, text: &str) {
        write_file(self.files.path(), remote, text);
    }

    pub fn key(&self, kind: Kind, suffix: &str) -> String {
        format!("{}{suffix}", kind.prefix(Scope::State, &self.name).unwrap())
    }

    pub fn put(&self, kind: Kind, suffix: &str, value: impl Into<bytes::Bytes>) {
        self.writer().put(self.key(kind, suffix), value);
    }

    /// Config, canaries and one valid object of each kind.
    pub async fn publish(&self) {
        let (name, id) = (&self.name, cluster_id(self.id));
        self.writer().put(
            keys::cluster_config(name),
            ClusterConfig::of_cluster(id, MAX).encode(),
        );
        self.put_node("n1");
        let first = *IdentityRange::of(id, MAX).numbers().start();
        let address = format!("10.{}.0.21", self.id);
        self.put(Kind::Ip, &address, ip::encode(&self.ip_entry(&address, first)));
        let mut app = Labels::default();
        app.insert(labels::SOURCE_K8S, "app", "cart");
        app.insert(labels::SOURCE_K8S, labels::POLICY_CLUSTER, name.as_str());
        self.put(Kind::Identities, &first.to_string(), identity::encode(&app));
        let (frame, slice) = self.service();
        self.put(Kind::Services, "shop/cart", service::encode(&frame, [&slice]));
        self.put(Kind::Frames, "shop/cart", slice::encode_frame(&frame));
        self.put(Kind::Slices, "shop/cart/s0", slice::encode_slice(&slice));
        for kind in Kind::ALL {
            self.writer()
                .put(keys::canary(name, kind, Scope::State).unwrap(), "now");
        }
        self.writer().flush().await;
    }

    pub fn put_node(&self, node_name: &str) {
        self.put(Kind::Nodes, node_name, node::encode(&self.node(node_name)));
    }

    pub fn node(&self, node_name: &str) -> Node {
        Node {
            name: node_name.into(),
            cluster: self.name.clone(),
            cluster_id: cluster_id(self.id),
            internal_ips: vec!["172.18.0.3".parse().unwrap()],
            external_ips: vec![],
            router_ips: vec![],
            ipv4_alloc_cidr: Some(format!("10.{}.0.0/24", self.id).parse().unwrap()),
            ipv6_alloc_cidr: None,
            ipv4_health_ip: None,
            ipv6_health_ip: None,
            encryption_key: 0,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            identity: NumericIdentity::REMOTE_NODE,
            wireguard_public_key: String::new(),
            boot_id: String::new(),
        }
    }

    pub fn ip_entry(&self, address: &str, identity: u32) -> IpEntry {
        IpEntry {
            prefix: address.parse::<std::net::IpAddr>().unwrap().into(),
            host_ip: Some("172.18.0.3".parse().unwrap()),
            identity: NumericIdentity(identity),
            encryption_key: 0,
            namespace: "shop".into(),
            pod_name: "cart-0".into(),
            service_account: String::new(),
            named_ports: vec![],
        }
    }

    pub fn service(&self) -> (ServiceFrame, Slice) {
        let name = ServiceName::new("shop", "cart").unwrap();
        let protocol = isthmus_model::Protocol::Tcp;
        let frame = ServiceFrame {
            cluster: self.name.clone(),
            cluster_id: cluster_id(self.id),
            name: name.clone(),
            service_type: Default::default(),
            cluster_ips: vec!["10.96.7.7".parse().unwrap()],
            external_ips: vec![],
            ports: vec![ServicePort {
                name: "http".into(),
                protocol,
                port: 80,
                node_port: 0,
            }],
            global: true,
            shared: true,
            affinity: Default::default(),
            session_affinity: Default::default(),
            traffic: Default::default(),
            labels: BTreeMap::new(),
            selector: BTreeMap::new(),
        };
        let slice = Slice {
            cluster: self.name.clone(),
            cluster_id: cluster_id(self.id),
            service: name,
            slice: "s0".into(),
            ports: vec![SlicePort {
                name: "http".into(),
                protocol,
                port: 8080,
            }],
            endpoints: vec![SliceEndpoint::ready(
                format!("10.{}.0.21", self.id).parse().unwrap(),
            )],
        };
        (frame, slice)
    }

    /// What this cluster's server tells its agents about `remote`.
    pub async fn status(&self, pki: &Pki, remote: &str) -> Option<RemoteStatus> {
        let mut client = self.agent(pki).await;
        let answer = client
            .get(format!("{}{remote}", keys::REMOTE_STATUS), None)
            .await
            .ok()?;
        Some(RemoteStatus::decode(answer.kvs().first()?.value()).unwrap())
    }

    pub async fn agent(&self, pki: &Pki) -> Client {
        pki.client(self.address(), &format!("local-{}", self.name)).await
    }

    pub async fn until(
        &self,
        pki: &Pki,
        remote: &str,
        what: &str,
        condition: impl Fn(&RemoteStatus) -> bool,
    ) -> RemoteStatus {
        let mut last = None;
        let what = format!("{}'s status of {remote}: {what}", self.name);
        let result = tokio::time::timeout(std::time::Duration::from_secs(30), async {
            loop {
                last = self.status(pki, remote).await;
                if let Some(status) = last.as_ref().filter(|status| condition(status)) {
                    return status.clone();
                }
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        })
        .await;
        result.unwrap_or_else(|_| panic!("{what}, but it is {last:?}"))
    }
}

pub fn write_file(dir: &Path, name: &str, text: &str) {
    // As a mounted Secret does: whole or not at all.
    let hidden = dir.join(format!(".{name}"));
    std::fs::write(&hidden, text).unwrap();
    std::fs::rename(hidden, dir.join(name)).unwrap();
}

/// Both directions configured, both published.
pub async fn pair(pki: &Pki) -> (Cluster, Cluster) {
    let (a, b) = (
        Cluster::start("a", 1, pki).await,
        Cluster::start("b", 2, pki).await,
    );
    a.publish().await;
    b.publish().await;
    for (here, there) in [(&a, &b), (&b, &a)] {
        let text = pki.yaml(there.address(), &format!("remote-{}", here.name));
        here.configure(there.name.as_str(), &text);
        // Charts give all clusters the same files; the own one is skipped.
        here.configure(here.name.as_str(), &text);
    }
    (a, b)
}

/// `here`'s mirror of `there` holds exactly what `there`'s etcd holds, at the same revisions.
pub async fn exact(here: &Cluster, there: &Cluster, pki: &Pki, kinds: &[Kind]) {
    for kind in kinds {
        eventually(
            &format!("{}'s {kind:?} are mirrored exactly", there.name),
            || async {
                let mut source = there.etcd.client().await.ok()?;
                let mut agent = here.agent(pki).await;
                let from = kind.prefix(Scope::State, &there.name).unwrap();
                let to = kind.prefix(Scope::Cache, &there.name).unwrap();
                let strip = |map: BTreeMap<bytes::Bytes, (bytes::Bytes, i64, i64)>, prefix: &str| {
                    let strip = |(key, value): (bytes::Bytes, _)| (key.slice(prefix.len()..), value);
                    map.into_iter().map(strip).collect::<BTreeMap<_, _>>()
                };
                let want = strip(try_dump(&mut source, &from).await.ok()?, &from);
                let got = strip(try_dump(&mut agent, &to).await.ok()?, &to);
                (!want.is_empty() && want == got).then_some(())
            },
        )
        .await;
    }
}
