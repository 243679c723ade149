//! A client that takes the server for one etcd, as Cilium's agent does: it pins the first cluster ID that it sees, on every
//! message of every call, and reads a mirror through one connection.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use isthmus_model::ClusterName;
use isthmus_proto::etcdserverpb::{
    RangeRequest, RangeResponse, ResponseHeader, StatusRequest, WatchCreateRequest, kv_client::KvClient,
    maintenance_client::MaintenanceClient, watch_request::RequestUnion,
};
use isthmus_wire::keys::{self, Kind, Scope};
use tokio::task::JoinHandle;
use tonic::{Status, transport::Channel};

use crate::{
    both::{Session, channel},
    clusters::{Cluster, exact, pair, write_file},
    lab::{Apiserver, Pki, config, eventually},
};

/// The ID that was seen first.
#[derive(Clone, Default)]
struct Pin(Arc<AtomicU64>);

impl Pin {
    fn check(&self, header: Option<&ResponseHeader>, what: &str) -> i64 {
        let header = header.unwrap_or_else(|| panic!("{what} has no header"));
        assert_ne!(header.cluster_id, 0, "{what}");
        let pinned = self
            .0
            .compare_exchange(0, header.cluster_id, Ordering::SeqCst, Ordering::SeqCst);
        let pinned = pinned.err().unwrap_or(header.cluster_id);
        assert_eq!(header.cluster_id, pinned, "cluster id mismatch on {what}");
        header.revision
    }
}

/// One prefix, listed and watched until the test ends.
struct Followed {
    content: Arc<std::sync::Mutex<(BTreeMap<Bytes, Bytes>, usize)>>,
    task: JoinHandle<()>,
}

impl Followed {
    fn now(&self) -> BTreeMap<Bytes, Bytes> {
        assert!(!self.task.is_finished(), "it failed");
        self.content.lock().unwrap().0.clone()
    }

    fn listings(&self) -> usize {
        self.content.lock().unwrap().1
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The client object of an agent: what it pins lasts over all of its connections.
#[derive(Clone)]
struct Agent {
    channel: Channel,
    pin: Pin,
}

fn range_end(prefix: &str) -> Bytes {
    keys::range_end(prefix.as_bytes())[..].to_vec().into()
}

impl Agent {
    async fn range(&self, request: RangeRequest) -> Result<RangeResponse, Status> {
        let answer = KvClient::new(self.channel.clone())
            .range(request)
            .await?
            .into_inner();
        self.pin.check(answer.header.as_ref(), "a range");
        Ok(answer)
    }

    /// Pages of 2, all at the first one's revision.
    async fn list(&self, prefix: &str) -> Result<(BTreeMap<Bytes, Bytes>, i64), Status> {
        let (mut key, mut revision, mut all) = (Bytes::from(prefix.to_owned()), 0, BTreeMap::new());
        loop {
            let page = self
                .range(RangeRequest {
                    key,
                    range_end: range_end(prefix),
                    limit: 2,
                    revision,
                    serializable: true,
                    ..Default::default()
                })
                .await?;
            if revision == 0 {
                revision = page.header.unwrap().revision;
            }
            key = page
                .kvs
                .last()
                .map_or(Bytes::new(), |last| [&last.key[..], b"\0"].concat().into());
            all.extend(page.kvs.into_iter().map(|kv| (kv.key, kv.value)));
            if !page.more {
                return Ok((all, revision));
            }
        }
    }

    /// Lists and watches as Cilium and etcd's client do: a lost stream is resumed from the client's own revision, anything
    /// else is listed again.
    fn follow(&self, prefix: &str) -> Followed {
        let content = Arc::new(std::sync::Mutex::new((BTreeMap::new(), 0)));
        let (agent, prefix, shared) = (self.clone(), prefix.to_owned(), content.clone());
        let task = tokio::spawn(async move {
            loop {
                let Ok((all, revision)) = agent.list(&prefix).await else {
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                    continue;
                };
                {
                    let mut content = shared.lock().unwrap();
                    *content = (all, content.1 + 1);
                }
                let mut next = revision + 1;
                while agent.watch(&prefix, &mut next, &shared).await {
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                }
            }
        });
        Followed { content, task }
    }

    /// Returns whether the stream was lost, and the watch is to be resumed.
    async fn watch(
        &self,
        prefix: &str,
        next: &mut i64,
        content: &std::sync::Mutex<(BTreeMap<Bytes, Bytes>, usize)>,
    ) -> bool {
        let mut session = Session::open(self.channel.clone());
        session
            .send(RequestUnion::CreateRequest(WatchCreateRequest {
                key: prefix.to_owned().into(),
                range_end: range_end(prefix),
                start_revision: *next,
                ..Default::default()
            }))
            .await;
        while let Ok(answer) = session.answer().await {
            let revision = self.pin.check(answer.header.as_ref(), "a watch's message");
            if answer.canceled {
                assert!(answer.compact_revision > 0, "{answer:?}");
                return false;
            }
            let mut content = content.lock().unwrap();
            for event in answer.events {
                let kv = event.kv.unwrap();
                assert!(kv.mod_revision >= *next, "an old event");
                if event.r#type == 0 {
                    content.0.insert(kv.key, kv.value);
                } else {
                    content.0.remove(&kv.key);
                }
                *next = (*next).max(kv.mod_revision);
            }
            // Of a created watch the header says nothing about what is still to be told.
            if !answer.created {
                *next = (*next).max(revision + 1);
            }
        }
        true
    }
}

/// All that an agent of the cluster reads of `remote` in its own server's mirror.
struct Mirror {
    agent: Agent,
    followed: BTreeMap<String, Followed>,
}

impl Mirror {
    async fn open(here: &Cluster, remote: &str, pki: &Pki) -> Self {
        let name = ClusterName::new(remote).unwrap();
        let agent = Agent {
            channel: channel(pki, here.address(), &format!("local-{}", here.name)).await,
            pin: Pin::default(),
        };
        let mut prefixes = vec!["cilium/.heartbeat".to_owned(), format!("cilium/synced/{remote}/")];
        for kind in [Kind::Nodes, Kind::Services, Kind::Identities, Kind::Ip] {
            prefixes.push(kind.prefix(Scope::Cache, &name).unwrap());
        }
        let followed = prefixes
            .into_iter()
            .map(|prefix| (prefix.clone(), agent.follow(&prefix)));
        Self {
            followed: followed.collect(),
            agent,
        }
    }

    /// Waits until it holds what `there` has published, and its config and canaries.
    async fn equals(&self, here: &Cluster, there: &Cluster, pki: &Pki) {
        let config = keys::cluster_config(&there.name);
        eventually("the agent sees the config, through the same client", || async {
            let request = RangeRequest {
                key: config.clone().into(),
                ..Default::default()
            };
            let answer = self.agent.range(request).await.ok()?;
            (!answer.kvs.is_empty()).then_some(())
        })
        .await;
        eventually("the agent has all", || async {
            let mut admin = pki.client(here.address(), &format!("admin-{}", here.name)).await;
            for (prefix, followed) in &self.followed {
                let options = etcd_client::GetOptions::new().with_prefix();
                let want = admin.get(prefix.as_str(), Some(options)).await.ok()?;
                let mut want: BTreeMap<Bytes, Bytes> = want
                    .kvs()
                    .iter()
                    .map(|kv| {
                        (
                            Bytes::copy_from_slice(kv.key()),
                            Bytes::copy_from_slice(kv.value()),
                        )
                    })
                    .collect();
                let mut got = followed.now();
                // It beats.
                let beat = b"cilium/.heartbeat";
                if want.remove(&beat[..]).is_some() != got.remove(&beat[..]).is_some() || want != got {
                    return None;
                }
            }
            Some(())
        })
        .await;
        exact(
            here,
            there,
            pki,
            &[Kind::Nodes, Kind::Services, Kind::Identities, Kind::Ip],
        )
        .await;
    }

    fn nodes(&self, remote: &str) -> &Followed {
        &self.followed[&format!("cilium/cache/nodes/v1/{remote}/")]
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_pins_an_id_reads_a_mirror_over_restarts_and_other_histories() {
    let pki = Pki::new();
    let (mut a, mut b) = pair(&pki).await;
    let mirror = Mirror::open(&a, "b", &pki).await;
    mirror.equals(&a, &b, &pki).await;
    let status = MaintenanceClient::new(mirror.agent.channel.clone())
        .status(StatusRequest {})
        .await
        .unwrap();
    mirror
        .agent
        .pin
        .check(status.into_inner().header.as_ref(), "the status");
    b.put_node("n2");
    b.writer().flush().await;
    mirror.equals(&a, &b, &pki).await;
    // Our own readers still see the source's ID.
    let theirs = b
        .etcd
        .client()
        .await
        .unwrap()
        .get("x", None)
        .await
        .unwrap()
        .header()
        .unwrap()
        .cluster_id();
    let own = isthmus_kvstore::Client::connect(&pki.config(a.address(), "local-a"), &crate::lab::quick())
        .await
        .unwrap();
    let nodes = RangeRequest {
        key: "cilium/cache/nodes/v1/b/".into(),
        range_end: range_end("cilium/cache/nodes/v1/b/"),
        ..Default::default()
    };
    let (header, _) = own.range(nodes.clone()).await.unwrap();
    assert_eq!(header.cluster_id, theirs);

    // The server restarts, and things change while it is away.
    let stopped = a.server.take().unwrap().stop().await;
    b.put_node("n3");
    b.writer().delete(b.key(Kind::Nodes, "n2").as_bytes());
    b.writer().flush().await;
    a.server = Some(Apiserver::start(stopped).await);
    mirror.equals(&a, &b, &pki).await;

    // Another replica shows the same ID on everything.
    let files = tempfile::tempdir().unwrap();
    write_file(files.path(), "b", &pki.yaml(b.address(), "remote-a"));
    let mut replica = config("a", 1, a.etcd.config(), &pki);
    replica.clustermesh_config = Some(files.path().to_owned());
    let replica = Apiserver::start(replica).await;
    replica.ready().await;
    let elsewhere = Agent {
        channel: channel(&pki, replica.address, "local-a").await,
        pin: mirror.agent.pin.clone(),
    };
    for prefix in mirror.followed.keys() {
        let listed = eventually("the replica has read it", || async {
            elsewhere.list(prefix).await.ok()
        })
        .await;
        // A watch that comes from the other one: it goes on, or ends as compacted, and does not stay deaf.
        let mut next = listed.1 + 1;
        let content = std::sync::Mutex::new((listed.0, 1));
        let watching = elsewhere.watch(prefix, &mut next, &content);
        let soon = tokio::time::timeout(std::time::Duration::from_millis(100), watching).await;
        assert!(soon.is_err(), "a watch right after a list goes on");
    }
    replica.stop().await;

    // The remote cluster's etcd begins anew, at low revisions and with other content.
    let first = b.etcd.client().await.unwrap();
    let padding = async |mut client: etcd_client::Client, count: usize| {
        let mut revision = 0;
        for _ in 0..count {
            let put = client.put("cilium/state/padding", "", None).await.unwrap();
            revision = put.header().unwrap().revision();
        }
        revision
    };
    let old = padding(first, 300).await;
    b.put_node("o1");
    b.writer().flush().await;
    mirror.equals(&a, &b, &pki).await;
    let listings = mirror.nodes("b").listings();
    b.etcd.restart_empty().await;
    b.publisher = crate::lab::Publisher::start(&b.etcd);
    b.publish().await;
    b.put_node("n9");
    b.writer().flush().await;
    mirror.equals(&a, &b, &pki).await;
    eventually("it was told to list again", || async {
        (mirror.nodes("b").listings() > listings).then_some(())
    })
    .await;
    mirror.equals(&a, &b, &pki).await;
    let has = |name: &str| {
        mirror
            .nodes("b")
            .now()
            .contains_key(format!("cilium/cache/nodes/v1/b/{name}").as_bytes())
    };
    assert!(has("n1") && has("n9") && !has("n3"));

    // The new history passes the old revisions. Who comes with one of those over another connection is told to list, though the
    // revision exists; and who has listed is believed.
    padding(b.etcd.client().await.unwrap(), 400).await;
    b.put_node("n10");
    b.writer().flush().await;
    mirror.equals(&a, &b, &pki).await;
    let late = Agent {
        channel: channel(&pki, a.address(), "local-a").await,
        pin: mirror.agent.pin.clone(),
    };
    let prefix = "cilium/cache/nodes/v1/b/";
    let content = std::sync::Mutex::new((BTreeMap::new(), 0));
    let soon = std::time::Duration::from_secs(60);
    let resumed = tokio::time::timeout(soon, late.watch(prefix, &mut (old - 20), &content)).await;
    assert_eq!(
        resumed.ok(),
        Some(false),
        "a start in another history ends as compacted"
    );
    let (all, revision) = late.list(prefix).await.unwrap();
    let content = std::sync::Mutex::new((all, 1));
    let mut next = revision + 1;
    let moment = std::time::Duration::from_millis(200);
    let watching = tokio::time::timeout(moment, late.watch(prefix, &mut next, &content)).await;
    assert!(watching.is_err(), "a watch right after a list goes on");
}
