//! etcdctl as a client: what it shows of the server is what it shows of etcd.

use std::{
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    process::{Command, Stdio},
};

use crate::{both::Both, lab::Pki};

/// Whether there is one (Debian: etcd-client).
fn is_installed() -> bool {
    let found = Command::new("etcdctl")
        .arg("version")
        .stdout(Stdio::null())
        .status()
        .is_ok();
    if !found {
        eprintln!("SKIPPED: there is no etcdctl on the PATH; on Debian: apt-get install etcd-client");
    }
    found
}

/// etcdctl for one server.
#[derive(Clone)]
struct Ctl(Vec<String>);

impl Ctl {
    fn etcd(port: u16) -> Self {
        Self(vec![format!("--endpoints=http://127.0.0.1:{port}")])
    }

    fn ours(pki: &Pki, address: SocketAddr, name: &str) -> Self {
        let (cert, key) = pki.issue(name);
        Self(vec![
            format!("--endpoints=https://127.0.0.1:{}", address.port()),
            format!("--cacert={}", pki.path("ca.crt").display()),
            format!("--cert={}", cert.display()),
            format!("--key={}", key.display()),
        ])
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").args(&self.0).args(args);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// What it says, and whether it is content.
    async fn run(&self, args: &[&str], input: &'static str) -> (bool, String) {
        let mut command = self.command(args);
        command.stdin(Stdio::piped());
        let output = tokio::task::spawn_blocking(move || {
            let mut child = command.spawn().unwrap();
            child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
            child.wait_with_output().unwrap()
        });
        let output = output.await.unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        // Errors are a line of JSON with a time, and a line of words.
        let error = text(output.stderr);
        let error = error
            .lines()
            .filter(|line| line.starts_with("Error:"))
            .collect::<Vec<_>>()
            .join("\n");
        (output.status.success(), text(output.stdout) + &error)
    }

    /// The first lines of what it says.
    async fn lines(&self, args: &[&str], count: usize) -> Vec<String> {
        let mut child = self.command(args).spawn().unwrap();
        let stdout = child.stdout.take().unwrap();
        let lines = tokio::task::spawn_blocking(move || {
            let lines = BufReader::new(stdout).lines().take(count);
            lines.map(Result::unwrap).collect::<Vec<_>>()
        });
        let lines = tokio::time::timeout(std::time::Duration::from_secs(60), lines).await;
        child.kill().unwrap();
        child.wait().unwrap();
        lines.expect("so many lines come").unwrap()
    }
}

/// Without what differs between any two servers.
fn plain(text: &str, and: &[&str]) -> Vec<String> {
    let different = ["\"ClusterID\"", "\"MemberID\"", "\"RaftTerm\""];
    let differs = |line: &str| different.iter().chain(and).any(|start| line.starts_with(start));
    text.lines()
        .filter(|line| !differs(line))
        .map(str::to_owned)
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_shows_what_it_shows_of_etcd() {
    if !is_installed() {
        return;
    }
    let both = Both::start("remote-c2").await;
    let begin = both
        .write(&[("cilium/state/x/a", Some("1")), ("cilium/state/x/b", Some("2"))])
        .await;
    both.write(&[("cilium/state/x/c", Some("3"))]).await;
    both.write(&[("cilium/state/x/a", Some("4"))]).await;
    let last = both.write(&[("cilium/state/x/b", None)]).await;
    let theirs = Ctl::etcd(both.etcd.port);
    let ours = Ctl::ours(&both.pki, both.server.address, "remote-c2");
    let rev = format!("--rev={begin}");
    let prefix = "cilium/state/x/";
    for args in [
        &["get", "--prefix", prefix, "-w", "fields"][..],
        &["get", "--prefix", prefix, "--keys-only"],
        &["get", "--prefix", prefix, "--count-only", "-w", "fields"],
        &["get", "--prefix", prefix, "--limit=1", "-w", "fields"],
        &[
            "get",
            "--prefix",
            prefix,
            "--sort-by=MODIFY",
            "--order=DESCEND",
            "-w",
            "fields",
        ],
        &[
            "get",
            "--prefix",
            prefix,
            "--sort-by=VALUE",
            "--order=ASCEND",
            "--print-value-only",
        ],
        &["get", "--prefix", prefix, &rev],
        &["get", "--prefix", prefix, "--rev=1000000"],
        &["get", "--consistency=s", "cilium/state/x/a"],
        &["get", "cilium/state/x/a", "cilium/state/x/c"],
        &["get", "cilium/state/none"],
        &["get", ""],
        &["alarm", "list"],
        &["lease", "timetolive", "1234"],
        &["lease", "keep-alive", "--once", "1234"],
        &["lease", "revoke", "1234"],
        &["lease", "list"],
    ] {
        let (want_ok, want) = theirs.run(args, "").await;
        let (ok, got) = ours.run(args, "").await;
        assert_eq!((ok, plain(&got, &[])), (want_ok, plain(&want, &[])), "{args:?}");
    }
    let questions = "value(\"cilium/state/x/a\") = \"4\"\nversion(\"cilium/state/x/b\") = \"0\"\n\nget cilium/state/x/a\nget cilium/state/x/ cilium/state/x0\n\nget cilium/state/x/c\n\n";
    let (want_ok, want) = theirs.run(&["txn"], questions).await;
    assert!(want_ok && want.contains("SUCCESS"));
    assert_eq!(ours.run(&["txn"], questions).await, (want_ok, want));
    // Six events: what was before, and both of the first revision.
    let args = ["watch", "--prefix", prefix, "--prev-kv", &rev];
    let want = theirs.lines(&args, 17).await;
    assert_eq!(ours.lines(&args, 17).await, want);
    assert!(last > begin);
}

/// The ID in "lease 694d81417acd4a09 granted with TTL(60s)".
fn lease_id(text: &str) -> String {
    text.split_whitespace()
        .nth(1)
        .unwrap_or_else(|| panic!("{text}"))
        .to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_leases_locks_and_looks_around() {
    if !is_installed() {
        return;
    }
    let both = Both::start("remote-c2").await;
    let theirs = Ctl::etcd(both.etcd.port);
    let ours = Ctl::ours(&both.pki, both.server.address, "remote-c2");
    let mut told = vec![];
    for ctl in [&theirs, &ours] {
        let mut said = vec![];
        let (_, granted) = ctl.run(&["lease", "grant", "600"], "").await;
        let id = lease_id(&granted);
        said.push(granted);
        for args in [
            &["lease", "keep-alive", "--once", &id][..],
            &["lease", "list"],
            &["lease", "timetolive", &id, "--keys"],
            &["lease", "revoke", &id],
            &["lease", "revoke", &id],
            &["lease", "list"],
            &["lock", "cilium/.initlock", "echo", "held"],
            &["get", "--prefix", "cilium/.initlock/"],
            &["put", "cilium/state/x", "1"],
        ] {
            let (ok, text) = ctl.run(args, "").await;
            said.push(format!("{ok} {text}"));
        }
        // What is left of a lease is a matter of time.
        let said = said.iter().map(|text| {
            text.replace(&id, "ID")
                .replace("remaining(599s)", "remaining(600s)")
        });
        told.push(said.collect::<Vec<_>>());
    }
    let [want, got] = [&told[0], &told[1]].map(|told| told.split_last().unwrap());
    assert_eq!(got.1, want.1);
    // Etcd takes writes here, and the server does not.
    assert_eq!(
        (want.0.as_str(), got.0.as_str()),
        ("true OK\n", "false Error: etcdserver: permission denied")
    );
    let (ok, health) = ours.run(&["endpoint", "health"], "").await;
    assert!(ok, "{health}");
    let (ok, status) = ours.run(&["endpoint", "status", "-w", "fields"], "").await;
    assert!(ok && status.contains("\"Version\" : \"3.5.0\""), "{status}");
    let (ok, members) = ours.run(&["member", "list"], "").await;
    assert!(
        ok && members.lines().count() == 1 && members.contains("started"),
        "{members}"
    );
    let (ok, hash) = ours.run(&["endpoint", "hashkv"], "").await;
    assert!(!ok || hash.is_empty(), "{hash}");
    let admin = Ctl::ours(&both.pki, both.server.address, "admin-c1");
    for args in [
        &["member", "remove", "1"][..],
        &["defrag"],
        &["snapshot", "save", "/dev/null"],
    ] {
        let (ok, text) = admin.run(args, "").await;
        assert!(!ok, "{args:?}: {text}");
        let (ok, text) = ours.run(args, "").await;
        assert!(!ok, "{args:?}: {text}");
    }
}
