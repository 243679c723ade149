//! The fuzz targets for what others' servers answer and for configuration files, with inputs that are nearly right.

#[path = "../../../fuzz/bodies/etcd_config.rs"]
mod etcd_config;
#[path = "../../../fuzz/bodies/follower.rs"]
mod follower;

use isthmus_proto::{
    etcdserverpb::{RangeResponse, ResponseHeader, WatchResponse},
    mvccpb::{Event, KeyValue},
};
use proptest::{collection::vec, prelude::*};
use prost::Message;

fn header() -> impl Strategy<Value = Option<ResponseHeader>> {
    let header = (0u64..3, -1i64..12).prop_map(|(cluster_id, revision)| ResponseHeader {
        cluster_id,
        revision,
        ..Default::default()
    });
    proptest::option::weighted(0.9, header)
}

fn key_value() -> impl Strategy<Value = KeyValue> {
    (0u8..8, -1i64..12, 0usize..3).prop_map(|(key, modified, len)| KeyValue {
        key: if key == 7 {
            "x".into()
        } else {
            format!("cilium/state/{key}").into()
        },
        create_revision: modified,
        mod_revision: modified,
        version: 1,
        value: vec![b'v'; len].into(),
        lease: 0,
    })
}

fn input() -> impl Strategy<Value = Vec<u8>> {
    let page =
        (header(), vec(key_value(), 0..4), any::<bool>(), -1i64..5).prop_map(|(header, kvs, more, count)| {
            RangeResponse {
                header,
                kvs,
                more,
                count,
            }
            .encode_to_vec()
        });
    let events = vec((-1i32..3, proptest::option::weighted(0.9, key_value())), 0..4);
    let events = events.prop_map(|events| {
        let event = |(kind, kv)| Event {
            r#type: kind,
            kv,
            prev_kv: None,
        };
        events.into_iter().map(event).collect::<Vec<_>>()
    });
    let flags = (prop::bool::weighted(0.3), prop::bool::weighted(0.2));
    let watch = (header(), events, flags, 0i64..12).prop_map(
        |(header, events, (created, canceled), compact_revision)| {
            WatchResponse {
                header,
                events,
                created,
                canceled,
                compact_revision,
                ..Default::default()
            }
            .encode_to_vec()
        },
    );
    let framed = |kind: u8, message: Vec<u8>| {
        let len = u8::try_from(message.len()).unwrap_or_default();
        [&[kind, len], &message[..usize::from(len)]].concat()
    };
    prop_oneof![
        1 => Just(framed(0, vec![])),
        1 => (0u8..2).prop_map(move |kind| framed(kind, vec![])),
        3 => (2u8..6, page).prop_map(move |(kind, page)| framed(kind, page)),
        4 => watch.prop_map(move |watch| framed(8, watch)),
        1 => vec(any::<u8>(), 0..40),
    ]
}

proptest! {
    #[test]
    fn no_answer_breaks_a_follower(inputs in vec(input(), 0..20)) {
        let mut bytes = vec![0, 0];
        bytes.extend(inputs.concat());
        follower::run(&bytes);
    }

    #[test]
    fn no_file_breaks_the_configuration(lines in vec(prop_oneof![
        Just("endpoints:".to_owned()),
        Just("- https://a:2379".to_owned()),
        Just("- http://[::1]:2379/x?y".to_owned()),
        Just("endpoints: ['https://a b:1', 'http://:2', 'x']".to_owned()),
        Just("trusted-ca-file: /ca".to_owned()),
        Just("cert-file: /c".to_owned()),
        Just("key-file: /k".to_owned()),
        Just("cilium-host-aliases: [{hostname: a, ips: [1.2.3.4, x]}]".to_owned()),
        Just("cilium-host-aliases: {a: {ips: ['::1']}}".to_owned()),
        "[ -~]{0,30}",
        r#"- ['"]?https?://[a-z0-9.:\[\]/@-]{0,20}"#,
    ], 0..8)) {
        etcd_config::run(lines.join("\n").as_bytes());
    }
}
