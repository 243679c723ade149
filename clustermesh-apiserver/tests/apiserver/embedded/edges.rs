//! Calls at the edges of what is allowed, one by one beside a real etcd: the same answers, words and codes.

use std::process::{Child, Command, Stdio};

use etcd_client::{
    Client, CompactionOptions, Compare, CompareOp, DeleteOptions, GetOptions, LeaseGrantOptions,
    LeaseTimeToLiveOptions, PutOptions, Txn, TxnOp,
};
use isthmus_clustermesh_apiserver::{StoreConfig, embedded::Limits};

use super::Watching;
use crate::{
    lab::{Apiserver, Etcd, Pki, embedded, eventually},
    script::{PREFIX, told},
};

/// What both are asked, in order, and their answers as text.
async fn edges(client: &mut Client) -> Vec<String> {
    let key = |key: &str| format!("{PREFIX}{key}");
    let mut answers = vec![];
    let mut add = |name: &str, answer: String| answers.push(format!("{name}: {answer}"));

    // Compaction: at 0 once, then never again; not of what is to come.
    for (name, at, physical) in [
        ("compact 0", 0, false),
        ("compact 0 again", 0, false),
        ("compact -1", -1, false),
        ("compact 1", 1, true),
        ("compact 1 again", 1, true),
        ("compact 2", 2, false),
    ] {
        let options = if physical {
            CompactionOptions::new().with_physical()
        } else {
            CompactionOptions::new()
        };
        add(name, told(client.compact(at, Some(options)).await));
    }

    // Leases.
    let with = |lease: i64| Some(PutOptions::new().with_lease(lease));
    for (name, id, ttl) in [
        ("grant", 7, 600),
        ("grant again", 7, 600),
        ("grant 0 seconds", 8, 0),
        ("grant -5 seconds", 9, -5),
        ("grant the longest", 10, 9_000_000_000),
        ("grant longer", 11, 9_000_000_001),
        ("grant with id -7", -7, 600),
    ] {
        let options = LeaseGrantOptions::new().with_id(id);
        add(name, told(client.lease_grant(ttl, Some(options)).await));
    }
    add(
        "put with lease -1",
        told(client.put(key("a"), "1", with(-1)).await),
    );
    add(
        "put with lease 99",
        told(client.put(key("a"), "1", with(99)).await),
    );
    add("put with lease", told(client.put(key("a"), "1", with(7)).await));
    add(
        "put with another",
        told(client.put(key("b"), "1", with(-7)).await),
    );
    add("get", told(client.get(key("a"), None).await));
    for id in [7, -7, 99, 0] {
        let options = Some(LeaseTimeToLiveOptions::new().with_keys());
        let answer = client.lease_time_to_live(id, options).await;
        let answer = answer.map(|info| (info.granted_ttl(), info.ttl() < 0, info.keys().to_vec()));
        add("time to live", told(answer));
        // This client asks once, and says itself that there is no such lease.
        let kept = client.lease_keep_alive(id).await;
        let answer = match kept {
            Ok((mut keeper, mut stream)) => {
                keeper.keep_alive().await.unwrap();
                told(stream.message().await)
            }
            Err(error) => error.to_string(),
        };
        add("keep alive", answer);
    }
    let compare = Compare::lease(key("a"), CompareOp::Equal, 7);
    let txn = Txn::new().when([compare]).and_then([TxnOp::get(key("a"), None)]);
    add("compare a lease", told(client.txn(txn).await));
    for id in [0, 99, 7, 7, -7] {
        add("revoke", told(client.lease_revoke(id).await));
    }
    add("get after revoke", told(client.get(key("a"), None).await));

    // Puts.
    add("put no key", told(client.put("", "1", None).await));
    for (name, options) in [
        ("keep no value", PutOptions::new().with_ignore_value()),
        ("keep no lease", PutOptions::new().with_ignore_lease()),
    ] {
        add(name, told(client.put(key("none"), "", Some(options)).await));
    }
    client.put(key("c"), "1", None).await.unwrap();
    for (name, value, options) in [
        ("a value to keep one", "2", PutOptions::new().with_ignore_value()),
        (
            "a lease to keep one",
            "2",
            PutOptions::new().with_ignore_lease().with_lease(3),
        ),
        ("keep", "", PutOptions::new().with_ignore_value().with_prev_key()),
    ] {
        add(name, told(client.put(key("c"), value, Some(options)).await));
    }

    // Transactions.
    let put = |number: usize| TxnOp::put(key(&format!("t/{number:03}")), "1", None);
    for count in [0, 128, 129] {
        let txn = Txn::new().and_then((0..count).map(put).collect::<Vec<_>>());
        add("operations", told(client.txn(txn).await));
    }
    let compares = (0..129).map(|_| Compare::version(key("c"), CompareOp::Equal, 1));
    let txn = Txn::new().when(compares.collect::<Vec<_>>());
    add("comparisons", told(client.txn(txn).await));
    for (name, ops) in [
        ("a key twice", vec![put(1), put(1)]),
        (
            "a put in a deletion",
            vec![
                TxnOp::delete(key("t/"), Some(DeleteOptions::new().with_prefix())),
                put(1),
            ],
        ),
        (
            "a deletion twice",
            vec![
                TxnOp::delete(key("t/001"), None),
                TxnOp::delete(key("t/001"), None),
            ],
        ),
        ("no key", vec![TxnOp::put("", "1", None)]),
        ("get no key", vec![TxnOp::get("", None)]),
        (
            "a key twice in one of two branches",
            vec![
                put(1),
                TxnOp::txn(Txn::new().and_then([put(2)]).or_else([put(1)])),
            ],
        ),
        (
            "a key in both branches",
            vec![TxnOp::txn(Txn::new().and_then([put(2)]).or_else([put(2)]))],
        ),
    ] {
        add(name, told(client.txn(Txn::new().and_then(ops)).await));
    }
    let revision = client.get("x", None).await.unwrap().header().unwrap().revision();
    for (name, at) in [
        ("-1", -1),
        ("of the compaction", 1),
        ("an older one", revision - 2),
        ("the last one", revision),
        ("the next one", revision + 1),
    ] {
        let options = GetOptions::new().with_prefix().with_revision(at).with_limit(3);
        let get = TxnOp::get(PREFIX, Some(options));
        let txn = Txn::new().and_then([put(500), get.clone()]).or_else([get]);
        let name = format!("in a transaction, revision {name}");
        add(&name, told(client.txn(txn).await));
    }

    // Deletions.
    for (name, from, options) in [
        ("nothing", "none", DeleteOptions::new().with_prev_key()),
        (
            "a range that ends before it begins",
            "t",
            DeleteOptions::new().with_range(key("a")),
        ),
        ("one", "t/000", DeleteOptions::new().with_prev_key()),
        ("many", "t/", DeleteOptions::new().with_prefix()),
    ] {
        add(name, told(client.delete(key(from), Some(options)).await));
    }
    add("delete no key", told(client.delete("", None).await));
    add(
        "members",
        told(client.member_list().await.map(|list| list.members().len())),
    );
    answers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_answers_at_the_edges_as_etcd_does() {
    let (pki, data, etcd) = (Pki::new(), tempfile::tempdir().unwrap(), Etcd::start().await);
    let server = Apiserver::start(embedded("c1", 1, data.path(), &pki)).await;
    let mut theirs = etcd.client().await.unwrap();
    let mut ours = pki.client(server.address, "admin-c1").await;
    let (want, got) = (edges(&mut theirs).await, edges(&mut ours).await);
    for (got, want) in got.iter().zip(&want) {
        assert_eq!(got, want);
    }
    assert_eq!(got.len(), want.len());
    // What a lease takes with it is told to watches in the same way, at the same revisions.
    let mut pair = vec![];
    for client in [&mut theirs, &mut ours] {
        let revision = client.get("x", None).await.unwrap().header().unwrap().revision();
        let mut watching = Watching::start(client, revision + 1).await;
        let id = client.lease_grant(2, None).await.unwrap().id();
        for name in ["l/1", "l/2"] {
            let options = Some(PutOptions::new().with_lease(id));
            client.put(format!("{PREFIX}{name}"), "1", options).await.unwrap();
        }
        watching.until(revision + 3).await;
        let with_id: Vec<String> = watching.told.drain(..2).collect();
        assert!(
            with_id
                .iter()
                .all(|event| event.contains(&format!("lease: {id}"))),
            "{with_id:?}"
        );
        let mut events: Vec<String> = watching.told.iter().map(|event| event.to_string()).collect();
        events.sort();
        pair.push(events);
    }
    assert_eq!(pair[1], pair[0]);
    server.stop().await;
}

/// An etcd of little room. Ends with the value.
struct SmallEtcd {
    child: Child,
    port: u16,
    _data: tempfile::TempDir,
}

impl SmallEtcd {
    async fn start(quota: u64) -> Self {
        let data = tempfile::tempdir().unwrap();
        let ports = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let [client, peer] = ports.map(|port| port.local_addr().unwrap());
        let [url, peer] = [client, peer].map(|address| format!("http://{address}"));
        let flag = |name: &str, value: &str| format!("--{name}={value}");
        let child = Command::new("etcd")
            .args([
                flag("data-dir", &data.path().join("etcd").display().to_string()),
                flag("listen-client-urls", &url),
                flag("advertise-client-urls", &url),
                flag("listen-peer-urls", &peer),
                flag("initial-advertise-peer-urls", &peer),
                flag("initial-cluster", &format!("default={peer}")),
                flag("quota-backend-bytes", &quota.to_string()),
            ])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("these tests need etcd on the PATH; on Debian: apt-get install etcd-server");
        let etcd = Self {
            child,
            port: client.port(),
            _data: data,
        };
        eventually("etcd answers", || async {
            let mut client = etcd.client().await?;
            client.get("x", None).await.ok()
        })
        .await;
        etcd
    }

    async fn client(&self) -> Option<Client> {
        Client::connect([format!("http://127.0.0.1:{}", self.port)], None)
            .await
            .ok()
    }
}

impl Drop for SmallEtcd {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// Fills the store, and tells what it answers then: whether a call is refused, and how.
async fn full(client: &mut Client) -> Vec<String> {
    let value = vec![7u8; 100_000];
    let refused = async {
        for number in 0.. {
            let key = format!("{PREFIX}{number}");
            if let Err(error) = client.put(key, value.clone(), None).await {
                return told(Err::<(), _>(error));
            }
        }
        unreachable!()
    };
    let mut answers = vec![
        tokio::time::timeout(std::time::Duration::from_secs(60), refused)
            .await
            .unwrap(),
    ];
    let short = |answer: String| match answer.split_once('(') {
        Some((kind, _)) if !answer.contains(": etcdserver:") => kind.to_owned(),
        _ => answer,
    };
    let put = || TxnOp::put(format!("{PREFIX}x"), vec![7u8; 100_000], None);
    let get = || TxnOp::get(format!("{PREFIX}0"), Some(GetOptions::new().with_keys_only()));
    for answer in [
        told(client.txn(Txn::new().and_then([put()]).or_else([get()])).await),
        told(client.txn(Txn::new().and_then([get()])).await),
        told(client.get(format!("{PREFIX}0"), None).await),
        told(
            client
                .alarm(etcd_client::AlarmAction::Get, etcd_client::AlarmType::None, None)
                .await
                .map(|answer| {
                    let alarms = answer.alarms().iter().map(|alarm| alarm.alarm());
                    alarms.collect::<Vec<_>>()
                }),
        ),
        told(client.delete(format!("{PREFIX}0"), None).await),
    ] {
        answers.push(short(answer));
    }
    answers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_store_answers_as_a_full_etcd_does() {
    let (pki, data) = (Pki::new(), tempfile::tempdir().unwrap());
    let etcd = SmallEtcd::start(2 * 1024 * 1024).await;
    let mut config = embedded("c1", 1, data.path(), &pki);
    config.store = StoreConfig::Embedded {
        data_dir: data.path().to_owned(),
        limits: Limits {
            quota_bytes: 2 * 1024 * 1024,
            ..Limits::default()
        },
    };
    let server = Apiserver::start(config).await;
    let mut theirs = etcd.client().await.unwrap();
    let mut ours = pki.client(server.address, "admin-c1").await;
    let (want, got) = (full(&mut theirs).await, full(&mut ours).await);
    assert_eq!(got, want);
    assert!(want[0].contains("database space exceeded"), "{want:?}");
    let status = ours.status().await.unwrap();
    assert!(status.db_size() > 1_000_000, "{status:?}");
    // Ours needs no defragmentation by hand: what was deleted is room.
    let delete = DeleteOptions::new().with_prefix();
    ours.delete(PREFIX, Some(delete)).await.unwrap();
    ours.put(format!("{PREFIX}x"), vec![7u8; 100_000], None)
        .await
        .unwrap();
    server.stop().await;
}
