//! The program, killed in the middle of bursts of transactions.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
};

use etcd_client::{GetOptions, Txn, TxnOp};

use crate::{
    lab::{Pki, dump, eventually},
    script::PREFIX,
};

const WRITERS: usize = 8;
const ROUNDS: usize = 8;

/// The program itself.
struct Program(Child);

impl Program {
    fn start(address: SocketAddr, data: &Path, pki: &Pki) -> Self {
        let (cert, key) = pki.issue("server");
        let flag = |name: &str, value: &dyn std::fmt::Display| format!("--{name}={value}");
        let child = Command::new(env!("CARGO_BIN_EXE_isthmus-clustermesh-apiserver"))
            .args([
                flag("cluster-name", &"c1"),
                flag("cluster-id", &1),
                flag("store", &"embedded"),
                flag("data-dir", &data.display()),
                flag("listen", &address),
                flag("admin-listen", &"127.0.0.1:0"),
                flag("tls-cert-file", &cert.display()),
                flag("tls-key-file", &key.display()),
                flag("tls-client-ca-file", &pki.path("ca.crt").display()),
            ])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SIGKILL.
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Keys of a writer's transaction: three are put, those of the one before are deleted.
fn keys(round: usize, writer: usize, number: usize) -> [String; 3] {
    ["x", "y", "z"].map(|part| format!("{PREFIX}{round}/{writer}/{number:06}/{part}"))
}

/// Where each writer's transactions are: number and revision of the last one, if any.
type Standing = BTreeMap<(usize, usize), (usize, i64)>;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_transactions_survive_kills_and_none_is_there_in_part() {
    let (pki, data) = (Pki::new(), tempfile::tempdir().unwrap());
    let address = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let mut acknowledged = Standing::new();
    for round in 0..=ROUNDS {
        let program = Program::start(address, data.path(), &pki);
        eventually("the port is open", || async {
            tokio::net::TcpStream::connect(address).await.ok()
        })
        .await;
        let mut client = pki.client(address, "admin-c1").await;
        // Each writer has the three keys of one transaction, all of its revision.
        let mut found: BTreeMap<(usize, usize), Vec<(usize, i64)>> = BTreeMap::new();
        for (key, (_, create, modified)) in dump(&mut client, PREFIX).await {
            let text = std::str::from_utf8(&key).unwrap().strip_prefix(PREFIX).unwrap();
            let parts: Vec<&str> = text.split('/').collect();
            let number = |at: usize| parts[at].parse::<usize>().unwrap();
            assert_eq!(create, modified);
            found
                .entry((number(0), number(1)))
                .or_default()
                .push((number(2), modified));
        }
        for (writer, keys) in &found {
            assert!(
                keys.len() == 3 && keys.iter().all(|key| *key == keys[0]),
                "half a transaction of {writer:?} after kill {round}: {keys:?}"
            );
        }
        for (writer, (number, revision)) in &acknowledged {
            let (there, at) = found.get(writer).expect("a writer's keys")[0];
            // One more may have been written and not answered.
            assert!(
                (there, at) == (*number, *revision) || there == number + 1,
                "after kill {round}: {writer:?} is at {there} and was at {number}"
            );
        }
        acknowledged.extend(found.into_iter().map(|(writer, keys)| (writer, keys[0])));
        if round == ROUNDS {
            break;
        }
        let writers = (0..WRITERS).map(|writer| {
            let mut client = client.clone();
            tokio::spawn(async move {
                let mut last = None;
                for number in 0.. {
                    let puts = keys(round, writer, number).map(|key| TxnOp::put(key, "1", None));
                    let before = number.checked_sub(1).map(|before| keys(round, writer, before));
                    let deletes = before.into_iter().flatten().map(|key| TxnOp::delete(key, None));
                    let txn = Txn::new().and_then(puts.into_iter().chain(deletes).collect::<Vec<_>>());
                    let Ok(answer) = client.txn(txn).await else { break };
                    last = Some((number, answer.header().unwrap().revision()));
                }
                ((round, writer), last)
            })
        });
        let writers: Vec<_> = writers.collect();
        eventually("a burst is under way", || async {
            let mut client = client.clone();
            let options = GetOptions::new().with_prefix().with_count_only();
            let answer = client
                .get(format!("{PREFIX}{round}/"), Some(options))
                .await
                .ok()?;
            (answer.count() as usize == 3 * WRITERS).then_some(())
        })
        .await;
        drop(program);
        for writer in writers {
            let (writer, last) = writer.await.unwrap();
            acknowledged.insert(writer, last.expect("the burst was under way"));
        }
    }
    assert_eq!(acknowledged.len(), ROUNDS * WRITERS);
}
