//! The fuzz target for what a runtime gives the plugin, with inputs that are nearly right.

#[path = "../../fuzz/bodies/cni_stdin.rs"]
mod cni_stdin;

use proptest::{collection::vec, prelude::*};

fn value() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        Just("\"1.1.0\"".to_owned()),
        Just("\"0.4.0\"".to_owned()),
        Just("\"isthmus\"".to_owned()),
        Just("\"10.0.0.1/24\"".to_owned()),
        Just("\"eth0\"".to_owned()),
        Just("null".to_owned()),
        Just("-1".to_owned()),
        Just("1e99".to_owned()),
        "\"[ !#-\\[\\]-~]{0,12}\"",
    ];
    leaf.prop_recursive(4, 30, 5, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(|values| format!("[{}]", values.join(","))),
            vec((field(), inner), 0..6).prop_map(object),
        ]
    })
}

fn field() -> impl Strategy<Value = &'static str> {
    prop_oneof![
        Just("cniVersion"),
        Just("name"),
        Just("type"),
        Just("prevResult"),
        Just("interfaces"),
        Just("ips"),
        Just("address"),
        Just("interface"),
        Just("sandbox"),
        Just("mac"),
        Just("dns"),
        Just("cni.dev/valid-attachments"),
        Just("containerID"),
        Just("ifname"),
        Just("runtimeConfig"),
    ]
}

fn object(fields: Vec<(&'static str, String)>) -> String {
    let fields: Vec<String> = fields
        .iter()
        .map(|(name, value)| format!("\"{name}\":{value}"))
        .collect();
    format!("{{{}}}", fields.join(","))
}

proptest! {
    #[test]
    fn no_configuration_breaks_the_plugin(command in any::<u8>(), fields in vec((field(), value()), 0..8), rest in vec(any::<u8>(), 0..4)) {
        let mut all = vec![
            ("cniVersion", "\"1.1.0\"".to_owned()),
            ("name", "\"isthmus\"".to_owned()),
            ("type", "\"isthmus-cni\"".to_owned()),
        ];
        all.extend(fields);
        let mut bytes = vec![command];
        bytes.extend(object(all).bytes());
        bytes.extend(rest);
        cni_stdin::run(&bytes);
    }
}
