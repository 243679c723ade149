//! Verdicts over time and over CA bundles, without a socket; and that a resumed session still shows its peer's chain.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on has failed"
)]

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use isthmus_tls::{ClientTls, PeerRefusal, ServerTls, judge::next_expiry, peer_common_name};
use proptest::prelude::*;
use rcgen::{CertificateParams, DnType, Issuer, KeyPair, date_time_ymd};
use rustls::{
    ClientConnection, HandshakeKind, ServerConnection,
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tempfile::TempDir;

/// 2030-01-01 and 2031-01-01.
const BEGIN: u64 = 1_893_456_000;
const END: u64 = 1_924_992_000;

struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Ca {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            issuer: Issuer::new(params, key),
            pem,
        }
    }

    fn issue(
        &self,
        change: impl FnOnce(&mut CertificateParams),
    ) -> (CertificateDer<'static>, String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "remote-c2");
        change(&mut params);
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        (cert.der().clone(), cert.pem(), key.serialize_pem())
    }
}

struct Files {
    dir: TempDir,
}

impl Files {
    fn new(ca: &Ca) -> Self {
        let files = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        let (_, cert, key) = ca.issue(|_| ());
        files.write("tls.crt", &cert);
        files.write("tls.key", &key);
        files.write("ca.crt", &ca.pem);
        files
    }

    fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    fn write(&self, file: &str, text: &str) {
        fs::write(self.path(file), text).unwrap();
    }

    fn server(&self) -> ServerTls {
        let [cert, key, ca] = ["tls.crt", "tls.key", "ca.crt"].map(|file| self.path(file));
        ServerTls::from_files(&cert, &key, &ca).unwrap()
    }
}

fn at(seconds: u64) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(seconds))
}

fn for_a_year(params: &mut CertificateParams) {
    params.not_before = date_time_ymd(2030, 1, 1);
    params.not_after = date_time_ymd(2031, 1, 1);
}

proptest! {
    #[test]
    fn a_certificate_is_good_within_its_time_and_the_next_look_is_when_that_ends(
        offset in prop_oneof![-3i64..3, (END - BEGIN) as i64 - 3..(END - BEGIN) as i64 + 3, -1_000_000_000i64..1_000_000_000],
    ) {
        let ca = Ca::new();
        let (leaf, _, _) = ca.issue(for_a_year);
        let state = Files::new(&ca).server().current();
        let now = BEGIN.saturating_add_signed(offset);
        let verdict = state.judge(std::slice::from_ref(&leaf), at(now));
        let want = match now {
            _ if now < BEGIN => Err(PeerRefusal::NotYetValid),
            _ if now > END => Err(PeerRefusal::Expired),
            _ => Ok(()),
        };
        prop_assert_eq!(verdict, want);
        let next = next_expiry(std::slice::from_ref(&leaf), at(now));
        prop_assert_eq!(next, (now <= END).then(|| at(END + 1)));
        if let Some(next) = next {
            prop_assert_eq!(state.judge(&[leaf], next), Err(PeerRefusal::Expired));
        }
    }
}

#[test]
fn a_ca_that_leaves_the_bundle_takes_its_certificates_with_it() {
    let (old, new) = (Ca::new(), Ca::new());
    let files = Files::new(&old);
    let tls = files.server();
    let (theirs, ours) = (old.issue(|_| ()).0, new.issue(|_| ()).0);
    let now = UnixTime::now();
    let verdicts = |tls: &ServerTls| {
        let state = tls.current();
        [&theirs, &ours].map(|leaf| state.judge(std::slice::from_ref(leaf), now))
    };
    assert_eq!(verdicts(&tls), [Ok(()), Err(PeerRefusal::UnknownCa)]);
    files.write("ca.crt", &format!("{}{}", old.pem, new.pem));
    assert_eq!(verdicts(&tls), [Ok(()), Ok(())]);
    files.write("ca.crt", &new.pem);
    assert_eq!(verdicts(&tls), [Err(PeerRefusal::UnknownCa), Ok(())]);
    assert_eq!(tls.current().judge(&[], now), Err(PeerRefusal::Absent));
    let garbage = CertificateDer::from(vec![1, 2, 3]);
    assert_eq!(tls.current().judge(&[garbage], now), Err(PeerRefusal::Bad));
}

#[test]
fn an_unusable_set_of_files_is_complained_about_until_it_is_good() {
    let ca = Ca::new();
    let files = Files::new(&ca);
    let tls = files.server();
    let first = tls.current();
    assert_eq!(tls.complaint(), None);
    assert!(first.certificate_last_second().is_some() && first.client_ca_last_second().is_some());
    let (_, cert, key) = ca.issue(for_a_year);
    files.write("tls.key", &key);
    assert!(Arc::ptr_eq(&first, &tls.current()), "the old pair is used");
    assert!(tls.complaint().unwrap().contains("tls.key"));
    files.write("tls.crt", &cert);
    let second = tls.current();
    assert!(!Arc::ptr_eq(&first, &second) && tls.complaint().is_none());
    assert_eq!(second.certificate_last_second(), Some(END));
    fs::remove_file(files.path("ca.crt")).unwrap();
    assert!(Arc::ptr_eq(&second, &tls.current()));
    assert!(tls.complaint().unwrap().contains("ca.crt"));
    files.write("ca.crt", &ca.pem);
    tls.current();
    assert_eq!(tls.complaint(), None);
}

/// A handshake in memory.
fn handshake(client: &ClientTls, server: &ServerTls) -> ServerConnection {
    let name = ServerName::try_from("localhost").unwrap();
    let mut client = ClientConnection::new(client.config(), name).unwrap();
    let mut server = ServerConnection::new(server.config()).unwrap();
    let mut bytes = Vec::new();
    while client.is_handshaking() || server.is_handshaking() || client.wants_write() || server.wants_write() {
        bytes.clear();
        while client.wants_write() {
            client.write_tls(&mut bytes).unwrap();
        }
        let mut read = bytes.as_slice();
        while !read.is_empty() {
            server.read_tls(&mut read).unwrap();
            server.process_new_packets().unwrap();
        }
        bytes.clear();
        while server.wants_write() {
            server.write_tls(&mut bytes).unwrap();
        }
        let mut read = bytes.as_slice();
        while !read.is_empty() {
            client.read_tls(&mut read).unwrap();
            client.process_new_packets().unwrap();
        }
    }
    server
}

#[test]
fn a_resumed_session_shows_the_chain_and_a_changed_bundle_resumes_nothing() {
    let (ca, other) = (Ca::new(), Ca::new());
    let files = Files::new(&ca);
    let server = files.server();
    let (_, cert, key) = ca.issue(|_| ());
    files.write("client.crt", &cert);
    files.write("client.key", &key);
    let identity = (files.path("client.crt"), files.path("client.key"));
    let client = ClientTls::from_files(&files.path("ca.crt"), Some((&identity.0, &identity.1))).unwrap();
    let first = handshake(&client, &server);
    assert_eq!(first.handshake_kind(), Some(HandshakeKind::Full));
    let second = handshake(&client, &server);
    assert_eq!(second.handshake_kind(), Some(HandshakeKind::Resumed));
    let chain = second.peer_certificates().unwrap();
    assert_eq!(peer_common_name(chain).unwrap(), "remote-c2");
    let state = server.current();
    assert_eq!(state.judge(chain, UnixTime::now()), Ok(()));
    // Nobody but this judgement would notice.
    let later = next_expiry(chain, UnixTime::now()).unwrap();
    assert_eq!(state.judge(chain, later), Err(PeerRefusal::Expired));
    files.write("ca.crt", &format!("{}{}", ca.pem, other.pem));
    let third = handshake(&client, &server);
    assert_eq!(third.handshake_kind(), Some(HandshakeKind::Full));
}
