//! Requests: each refusal by its code, and no input that panics.

use super::*;
use proptest::prelude::*;

const CONFIG: &str = r#"{"cniVersion":"1.1.0","name":"isthmus","type":"isthmus-cni"}"#;
const ARGS: &str = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_UID=0a1b-2c";

fn environment(command: &str) -> Environment {
    Environment {
        command: Some(command.into()),
        container_id: Some("c0ffee".into()),
        netns: Some("/run/netns/p".into()),
        ifname: Some("eth0".into()),
        args: Some(ARGS.into()),
    }
}

fn refused(environment: &Environment, config: &str) -> Code {
    Request::parse(environment, config.as_bytes())
        .expect_err("must be refused")
        .code
}

#[test]
fn add_is_read() {
    let Ok(Request::Add {
        config,
        attachment,
        netns,
        pod,
    }) = Request::parse(&environment("ADD"), CONFIG.as_bytes())
    else {
        panic!("no ADD");
    };
    assert_eq!(config.version, CniVersion::V1_1_0);
    assert_eq!(config.agent_socket, PathBuf::from(config::AGENT_SOCKET_DEFAULT));
    assert_eq!(attachment.alias(), "isthmus:c0ffee/eth0");
    assert_eq!(netns, PathBuf::from("/run/netns/p"));
    let want = Pod {
        namespace: "default".into(),
        name: "web-0".into(),
        uid: "0a1b-2c".into(),
    };
    assert_eq!(pod, want);
}

#[test]
fn del_needs_neither_netns_nor_args() {
    let environment = Environment {
        netns: None,
        args: None,
        ..environment("DEL")
    };
    assert!(matches!(
        Request::parse(&environment, CONFIG.as_bytes()),
        Ok(Request::Del { netns: None, .. })
    ));
}

#[test]
fn wrong_environments_have_code_4() {
    let add = || environment("ADD");
    let wrong = [
        Environment {
            command: None,
            ..add()
        },
        Environment {
            command: Some("add".into()),
            ..add()
        },
        Environment {
            container_id: None,
            ..add()
        },
        Environment {
            container_id: Some("-x".into()),
            ..add()
        },
        Environment {
            container_id: Some("../x".into()),
            ..add()
        },
        Environment {
            container_id: Some("x".repeat(201).into()),
            ..add()
        },
        Environment { netns: None, ..add() },
        Environment {
            ifname: None,
            ..add()
        },
        Environment {
            ifname: Some("..".into()),
            ..add()
        },
        Environment {
            ifname: Some("a/b".into()),
            ..add()
        },
        Environment {
            ifname: Some("0123456789abcdef".into()),
            ..add()
        },
        Environment { args: None, ..add() },
        Environment {
            args: Some("K8S_POD_NAME".into()),
            ..add()
        },
        Environment {
            args: Some("K8S_POD_NAME=web".into()),
            ..add()
        },
        Environment {
            args: Some("K8S_POD_NAME=We b;K8S_POD_NAMESPACE=default".into()),
            ..add()
        },
    ];
    for environment in wrong {
        assert_eq!(
            refused(&environment, CONFIG),
            Code::InvalidEnvironment,
            "{environment:?}"
        );
    }
}

#[test]
fn wrong_configurations_have_their_codes() {
    let add = environment("ADD");
    let with = |fields: &str| format!(r#"{{"cniVersion":"1.1.0","name":"isthmus",{fields}}}"#);
    let cases = [
        ("{".to_owned(), Code::Decode),
        ("[]".to_owned(), Code::Decode),
        (r#"{"name":"isthmus"}"#.to_owned(), Code::IncompatibleVersion),
        (
            r#"{"cniVersion":"0.2.0","name":"isthmus"}"#.to_owned(),
            Code::IncompatibleVersion,
        ),
        (r#"{"cniVersion":"1.1.0"}"#.to_owned(), Code::InvalidConfig),
        (
            r#"{"cniVersion":"1.1.0","name":"a b"}"#.to_owned(),
            Code::InvalidConfig,
        ),
        (with(r#""agentSocket":"agent.sock""#), Code::InvalidConfig),
        (with(r#""logFile":"log""#), Code::InvalidConfig),
        (with(r#""ipam":{"type":"host-local"}"#), Code::UnsupportedField),
        (with(r#""prevResult":{}"#), Code::UnsupportedField),
        (
            with(&format!(r#""x":"{}""#, "y".repeat(config::CONFIG_LEN_MAX))),
            Code::InvalidConfig,
        ),
    ];
    for (config, code) in cases {
        assert_eq!(
            refused(&add, &config),
            code,
            "{}",
            &config[..config.len().min(100)]
        );
    }
    assert!(Request::parse(&add, with(r#""ipam":{},"unknown":1"#).as_bytes()).is_ok());
}

#[test]
fn commands_exist_since_their_version() {
    for version in CniVersion::ALL {
        let config = format!(
            r#"{{"cniVersion":"{version}","name":"isthmus","prevResult":{{}},"cni.dev/valid-attachments":[]}}"#
        );
        for (command, since) in [
            ("CHECK", CniVersion::V0_4_0),
            ("STATUS", CniVersion::V1_1_0),
            ("GC", CniVersion::V1_1_0),
        ] {
            let result = Request::parse(&environment(command), config.as_bytes());
            match result {
                Ok(_) => assert!(version >= since, "{command} in {version}"),
                Err(error) => {
                    assert!(version < since, "{command} in {version}: {error}");
                    assert_eq!(error.code, Code::IncompatibleVersion);
                }
            }
        }
    }
}

#[test]
fn garbage_collection_needs_a_list() {
    assert_eq!(refused(&environment("GC"), CONFIG), Code::InvalidConfig);
    for key in ["cni.dev/valid-attachments", "cni.dev/attachments"] {
        let config =
            format!(r#"{{"cniVersion":"1.1.0","name":"n","{key}":[{{"containerID":"c","ifname":"eth0"}}]}}"#);
        let Ok(Request::Gc { valid, .. }) = Request::parse(&environment("GC"), config.as_bytes()) else {
            panic!("no GC with {key}");
        };
        assert_eq!(
            valid,
            [ValidAttachment {
                container_id: "c".into(),
                ifname: "eth0".into()
            }]
        );
    }
}

#[test]
fn version_is_answered_whatever_the_input() {
    for (stdin, want) in [
        ("", CniVersion::CURRENT),
        ("null", CniVersion::CURRENT),
        (r#"{"cniVersion":"0.4.0"}"#, CniVersion::V0_4_0),
    ] {
        assert_eq!(
            Request::parse(&environment("VERSION"), stdin.as_bytes()),
            Ok(Request::Version { version: want })
        );
    }
}

#[test]
fn error_objects_carry_the_configuration_version() {
    let outcome = crate::run(&environment("ADDX"), br#"{"cniVersion":"0.4.0","name":"n"}"#);
    assert!(!outcome.success);
    let object: serde_json::Value = serde_json::from_str(&outcome.stdout).unwrap();
    assert_eq!(
        (&object["cniVersion"], &object["code"]),
        (&"0.4.0".into(), &4.into())
    );
    assert!(object["msg"].as_str().unwrap().contains("ADDX"));
}

proptest! {
    #[test]
    fn nothing_panics(
        command in prop_oneof![Just("ADD"), Just("DEL"), Just("CHECK"), Just("GC"), Just("STATUS"), Just("VERSION")],
        container in ".{0,40}", ifname in ".{0,20}", args in ".{0,80}", stdin in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let environment = Environment {
            command: Some(command.into()),
            container_id: Some(container.into()),
            netns: Some("/run/netns/p".into()),
            ifname: Some(ifname.into()),
            args: Some(args.into()),
        };
        let _ = Request::parse(&environment, &stdin);
    }

    #[test]
    fn what_is_accepted_is_well_formed(container in "[a-z0-9._/ -]{0,12}", ifname in "[a-z0-9.:/ ]{0,18}") {
        let environment = Environment {
            container_id: Some(container.into()), ifname: Some(ifname.into()), ..environment("DEL")
        };
        if let Ok(Request::Del { attachment, .. }) = Request::parse(&environment, CONFIG.as_bytes()) {
            prop_assert!(config::is_name(&attachment.container_id));
            prop_assert!(is_ifname(&attachment.ifname));
            prop_assert!(attachment.alias().len() < 256);
        }
    }
}
