//! What a container runtime gives the CNI plugin: variables and a network configuration.

use isthmus_cni::{
    config::{NetworkConfig, version_of},
    request::{Environment, Request},
};

/// The first byte says which command, the rest is the configuration.
pub fn run(bytes: &[u8]) {
    let Some((kind, config)) = bytes.split_first() else {
        return;
    };
    let commands = ["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION", "add", ""];
    let _ = (version_of(config), NetworkConfig::parse(config));
    // A short part of it as the variables, too.
    let text = String::from_utf8_lossy(&config[..config.len().min(40)]).into_owned();
    let environment = Environment {
        command: Some(commands[usize::from(*kind) % commands.len()].into()),
        container_id: Some(text.clone().into()),
        netns: Some("/var/run/netns/x".into()),
        ifname: Some(text.clone().into()),
        args: Some(text.into()),
    };
    let _ = Request::parse(&environment, config);
    let usual = Environment {
        container_id: Some("c0ffee".into()),
        ifname: Some("eth0".into()),
        args: Some("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0".into()),
        ..environment
    };
    let _ = Request::parse(&usual, config);
}
