//! Certificates from files: loading, rotation, refusal of what does not fit, names of peers.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on has failed"
)]

use std::{fs, path::Path, sync::Arc};

use isthmus_tls::{ClientTls, PeerNameError, ServerTls, TlsError, peer_common_name};
use rcgen::{CertificateParams, DnType, Issuer, KeyPair};

struct Pair {
    cert: rcgen::Certificate,
    key: KeyPair,
}

fn ca() -> (Issuer<'static, KeyPair>, String) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let pem = params.self_signed(&key).unwrap().pem();
    (Issuer::new(params, key), pem)
}

fn issue(issuer: &Issuer<'_, KeyPair>, names: &[&str]) -> Pair {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    params.distinguished_name = rcgen::DistinguishedName::new();
    for name in names {
        params.distinguished_name.push(DnType::CommonName, *name);
    }
    let cert = params.signed_by(&key, issuer).unwrap();
    Pair { cert, key }
}

fn write(dir: &Path, pair: &Pair) {
    fs::write(dir.join("tls.crt"), pair.cert.pem()).unwrap();
    fs::write(dir.join("tls.key"), pair.key.serialize_pem()).unwrap();
}

#[test]
fn server_follows_its_files_and_keeps_the_last_good_ones() {
    let dir = tempfile::tempdir().unwrap();
    let (issuer, ca_pem) = ca();
    fs::write(dir.path().join("ca.crt"), ca_pem).unwrap();
    write(dir.path(), &issue(&issuer, &["a"]));
    let [cert, key, ca_file] = ["tls.crt", "tls.key", "ca.crt"].map(|name| dir.path().join(name));
    let tls = ServerTls::from_files(&cert, &key, &ca_file).unwrap();
    let first = tls.config();
    assert_eq!(first.alpn_protocols, [b"h2"]);
    assert!(
        Arc::ptr_eq(&first, &tls.config()),
        "unchanged files are not read again"
    );

    let next = issue(&issuer, &["b"]);
    fs::write(&cert, next.cert.pem()).unwrap();
    assert!(
        Arc::ptr_eq(&first, &tls.config()),
        "a half-done rotation changes nothing"
    );
    fs::write(&key, next.key.serialize_pem()).unwrap();
    let second = tls.config();
    assert!(!Arc::ptr_eq(&first, &second));

    fs::write(&ca_file, "nothing here").unwrap();
    assert!(
        Arc::ptr_eq(&second, &tls.config()),
        "a bad CA file changes nothing"
    );
}

#[test]
fn errors_name_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("absent.crt");
    let error = ClientTls::from_files(&missing, None).err().unwrap();
    assert!(matches!(error, TlsError::Read { .. }));
    assert!(error.to_string().contains("absent.crt"));

    let (issuer, ca_pem) = ca();
    let ca_file = dir.path().join("ca.crt");
    fs::write(&ca_file, ca_pem).unwrap();
    write(dir.path(), &issue(&issuer, &["a"]));
    fs::write(
        dir.path().join("tls.key"),
        issue(&issuer, &["b"]).key.serialize_pem(),
    )
    .unwrap();
    let (cert, key) = (dir.path().join("tls.crt"), dir.path().join("tls.key"));
    let error = ClientTls::from_files(&ca_file, Some((&cert, &key)))
        .err()
        .unwrap();
    assert!(matches!(error, TlsError::Config { .. }), "{error}");
}

#[test]
fn common_name_is_taken_from_the_leaf() {
    let (issuer, _) = ca();
    let name = |names: &[&str]| {
        let pair = issue(&issuer, names);
        peer_common_name(&[pair.cert.der().clone()])
    };
    assert_eq!(name(&["remote-c2"]).unwrap(), "remote-c2");
    assert!(matches!(name(&[]), Err(PeerNameError::NoName)));
    assert!(matches!(
        name(&["x".repeat(65).as_str()]),
        Err(PeerNameError::NoName)
    ));
    assert!(matches!(peer_common_name(&[]), Err(PeerNameError::Absent)));
    assert!(matches!(
        peer_common_name(&[vec![1, 2, 3].into()]),
        Err(PeerNameError::Malformed(_))
    ));
}
