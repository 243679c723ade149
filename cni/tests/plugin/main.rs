//! The plugin's binary against a fake agent, in network namespaces of its own: what `ip` shows afterwards.
//!
//! Runs as root, or without it where the kernel allows user namespaces. Needs iproute2, util-linux and bash.

mod fake_agent;
mod namespaces;

use std::{path::PathBuf, time::Duration};

use fake_agent::FakeAgent;
use namespaces::{Namespace, Plugin};
use serde_json::{Value, json};

/// A node with an agent.
struct Node {
    namespace: Namespace,
    agent: FakeAgent,
}

impl Node {
    fn new() -> Self {
        let node = Self {
            namespace: Namespace::new(),
            agent: FakeAgent::start(),
        };
        for router in ["10.1.0.1/32", "fd00:1::1/128"] {
            node.namespace.ip(&format!("address add {router} dev lo nodad"));
        }
        node
    }

    fn plugin(&self, command: &str, container: &str, netns: Option<PathBuf>) -> Plugin {
        let config = json!({"cniVersion": "1.1.0", "name": "isthmus", "type": "isthmus-cni", "agentSocket": self.agent.socket()});
        Plugin {
            command: command.into(),
            container: container.into(),
            netns,
            config,
        }
    }

    /// Runs a command that must work.
    fn run(&self, plugin: &Plugin) -> Value {
        let (success, output) = self.namespace.run_plugin(plugin);
        assert!(success, "{} of {}: {output}", plugin.command, plugin.container);
        output
    }

    /// Runs a command that must fail; its code.
    fn fail(&self, plugin: &Plugin) -> (u64, String) {
        let (success, output) = self.namespace.run_plugin(plugin);
        assert!(
            !success,
            "{} of {} worked: {output}",
            plugin.command, plugin.container
        );
        (
            output["code"].as_u64().unwrap_or_default(),
            format!("{} {}", output["msg"], output["details"]),
        )
    }

    fn add(&self, container: &str, pod: &Namespace) -> Value {
        self.run(&self.plugin("ADD", container, Some(pod.netns())))
    }

    fn check(&self, container: &str, pod: &Namespace, result: &Value) -> Plugin {
        let mut plugin = self.plugin("CHECK", container, Some(pod.netns()));
        plugin.config["prevResult"] = result.clone();
        plugin
    }
}

fn names(links: &Value) -> Vec<String> {
    let links = links.as_array().expect("a list of links");
    links
        .iter()
        .map(|link| link["ifname"].as_str().unwrap_or_default().to_owned())
        .filter(|name| name != "lo")
        .collect()
}

#[test]
fn a_pod_lives_and_goes() {
    let node = Node::new();
    let pod = Namespace::inside(Some(&node.namespace));
    let result = node.add("c1", &pod);

    let (host, inner) = (node.namespace.links(), pod.links());
    assert_eq!(
        (names(&host), names(&inner)),
        (vec!["lxc1".to_owned()], vec!["eth0".to_owned()])
    );
    let find = |links: &Value, name: &str| {
        links
            .as_array()
            .unwrap()
            .iter()
            .find(|link| link["ifname"] == name)
            .unwrap()
            .clone()
    };
    let (host, inner) = (find(&host, "lxc1"), find(&inner, "eth0"));
    for end in [&host, &inner] {
        assert_eq!(end["mtu"], 1450);
        assert!(end["flags"].as_array().unwrap().contains(&json!("UP")), "{end}");
    }
    assert_eq!(host["ifalias"], "isthmus:c1/eth0");
    assert_eq!(result["interfaces"][0]["mac"], host["address"]);
    assert_eq!(result["interfaces"][1]["mac"], inner["address"]);
    assert_eq!(result["ips"][0]["address"], "10.1.0.2/32");
    assert_eq!(result["ips"][1]["address"], "fd00:1::2/128");

    let routes = |namespace: &Namespace, family: &str, device: &str| -> Vec<String> {
        let routes = namespace.ip_json(&format!("{family} route show dev {device}"));
        let routes = routes.as_array().unwrap().iter();
        let mut routes: Vec<_> = routes
            .map(|route| {
                format!(
                    "{} {}",
                    route["dst"].as_str().unwrap(),
                    route["gateway"].as_str().unwrap_or("-")
                )
            })
            // The kernel adds one for the link-local prefix and, in the pod, one for its own address.
            .filter(|route| route != "fe80::/64 -" && (device != "eth0" || route != "fd00:1::2 -"))
            .collect();
        routes.sort();
        routes
    };
    assert_eq!(
        routes(&pod, "-4", "eth0"),
        ["169.254.1.1 -", "default 169.254.1.1"]
    );
    assert_eq!(routes(&pod, "-6", "eth0"), ["default fe80::1", "fe80::1 -"]);
    assert_eq!(routes(&node.namespace, "-4", "lxc1"), ["10.1.0.2 -"]);
    assert_eq!(routes(&node.namespace, "-6", "lxc1"), ["fd00:1::2 -"]);
    let neighbours = pod.ip_json("neighbour show dev eth0 nud permanent");
    let neighbours: Vec<_> = neighbours
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["lladdr"].clone())
        .collect();
    assert_eq!(neighbours, [host["address"].clone(), host["address"].clone()]);

    // The neighbour entries alone must do: nothing answers for the next hop.
    for (from, to) in [
        (&pod, "10.1.0.1"),
        (&pod, "fd00:1::1"),
        (&node.namespace, "10.1.0.2"),
        (&node.namespace, "fd00:1::2"),
    ] {
        assert!(from.reaches(to), "{to} does not answer");
    }
    let endpoint = node.agent.endpoint("c1").expect("the agent knows the endpoint");
    assert_eq!(
        u64::from(endpoint.host_ifindex),
        host["ifindex"].as_u64().unwrap()
    );
    assert_eq!((endpoint.host_mac.len(), endpoint.pod_mac.len()), (6, 6));
    assert_eq!(
        (endpoint.namespace.as_str(), endpoint.pod_name.as_str()),
        ("default", "web-0")
    );

    node.run(&node.check("c1", &pod, &result));
    assert_eq!(
        node.add("c1", &pod),
        result,
        "a repeated ADD answers the same and changes nothing"
    );

    for _ in 0..2 {
        node.run(&node.plugin("DEL", "c1", Some(pod.netns())));
        assert_eq!(
            (names(&node.namespace.links()), names(&pod.links())),
            (vec![], vec![])
        );
        assert_eq!(node.agent.allocated(), 0);
    }
}

#[test]
fn check_finds_what_is_missing() {
    let node = Node::new();
    let pod = Namespace::inside(Some(&node.namespace));
    let result = node.add("c1", &pod);
    let check = node.check("c1", &pod, &result);
    for (namespace, damage, named) in [
        (&pod, "-6 route del default", "default route via fe80::1"),
        (
            &node.namespace,
            "-4 route del 10.1.0.2 dev lxc1",
            "route 10.1.0.2/32 dev lxc1",
        ),
        (
            &node.namespace,
            "neighbour del fd00:1::2 dev lxc1",
            "neighbour entry fd00:1::2",
        ),
        (&pod, "link set eth0 down", "eth0 is down"),
    ] {
        namespace.ip(damage);
        let (code, message) = node.fail(&check);
        assert_eq!(code, 103, "{message}");
        assert!(message.contains(named), "{damage}: {message}");
    }
    // An ADD after that makes it whole.
    let result = node.add("c1", &pod);
    node.run(&node.check("c1", &pod, &result));
    node.agent.forget("c1");
    let (code, message) = node.fail(&node.check("c1", &pod, &result));
    assert_eq!(code, 103, "{message}");
}

#[test]
fn a_failed_add_leaves_nothing() {
    let node = Node::new();
    let pod = Namespace::inside(Some(&node.namespace));
    node.agent.refuse_create(true);
    let (code, message) = node.fail(&node.plugin("ADD", "c1", Some(pod.netns())));
    assert_eq!(code, 100, "{message}");
    assert!(message.contains("programs do not load"), "{message}");
    assert_eq!(
        (names(&node.namespace.links()), names(&pod.links())),
        (vec![], vec![])
    );
    assert_eq!(node.agent.allocated(), 0);
    node.agent.refuse_create(false);
    node.add("c1", &pod);
}

#[test]
fn an_interface_of_somebody_else_stays() {
    let node = Node::new();
    let pod = Namespace::inside(Some(&node.namespace));
    pod.ip("link add eth0 type veth peer name other");
    let (code, message) = node.fail(&node.plugin("ADD", "c1", Some(pod.netns())));
    assert_eq!(code, 102, "{message}");
    assert_eq!(names(&pod.links()).len(), 2);
    assert_eq!(node.agent.allocated(), 0);
}

#[test]
fn without_an_agent_commands_can_be_repeated() {
    let node = Node::new();
    let pod = Namespace::inside(Some(&node.namespace));
    node.add("c1", &pod);
    node.agent.stop();
    let gone = Namespace::inside(Some(&node.namespace)).netns();
    let (code, message) = node.fail(&node.plugin("ADD", "c2", Some(gone)));
    assert_eq!(code, 3, "{message}");
    let other = Namespace::inside(Some(&node.namespace));
    let (code, message) = node.fail(&node.plugin("ADD", "c2", Some(other.netns())));
    assert_eq!(code, 11, "{message}");
    assert!(message.contains("isthmus-agent"), "{message}");
    let (code, message) = node.fail(&node.plugin("STATUS", "", None));
    assert_eq!(code, 50, "{message}");
    // The pod's network goes at once; the addresses when the agent is back.
    let del = node.plugin("DEL", "c1", Some(pod.netns()));
    let (code, message) = node.fail(&del);
    assert_eq!(code, 11, "{message}");
    assert_eq!(names(&node.namespace.links()), Vec::<String>::new());
    assert_eq!(node.agent.allocated(), 1);
    node.agent.restart();
    node.run(&del);
    assert_eq!(node.agent.allocated(), 0);
    node.run(&node.plugin("STATUS", "", None));
}

#[test]
fn an_agent_that_restarts_fails_no_pod() {
    let node = Node::new();
    let pod = Namespace::inside(Some(&node.namespace));
    node.agent.stop();
    std::thread::scope(|scope| {
        let add = scope.spawn(|| node.add("c1", &pod));
        node.agent.restart_after_refusing(Duration::from_millis(500));
        add.join().expect("ADD worked");
    });
}

#[test]
fn a_pod_whose_namespace_is_gone_is_removed() {
    let node = Node::new();
    let pod = Namespace::inside(Some(&node.namespace));
    node.add("c1", &pod);
    let netns = pod.netns();
    drop(pod);
    node.run(&node.plugin("DEL", "c1", Some(netns)));
    assert_eq!(node.agent.allocated(), 0);
    node.run(&node.plugin("DEL", "c1", None));
}

#[test]
fn the_node_namespace_is_no_pod() {
    let node = Node::new();
    for command in ["ADD", "DEL"] {
        let (code, message) = node.fail(&node.plugin(command, "c1", Some(node.namespace.netns())));
        assert_eq!(code, 4, "{message}");
    }
    let links = node.namespace.links();
    assert_eq!(names(&links), Vec::<String>::new());
}

#[test]
fn garbage_is_collected() {
    let node = Node::new();
    let pods = [
        Namespace::inside(Some(&node.namespace)),
        Namespace::inside(Some(&node.namespace)),
    ];
    node.add("c1", &pods[0]);
    node.add("c2", &pods[1]);
    // Somebody else's veth, with a name that the agent will name.
    node.namespace.ip("link add lxc9 type veth peer name lxc9p");
    node.agent.also_collect("lxc9");
    let mut plugin = node.plugin("GC", "", None);
    plugin.config["cni.dev/valid-attachments"] = json!([{"containerID": "c2", "ifname": "eth0"}]);
    node.run(&plugin);
    let mut left = names(&node.namespace.links());
    left.sort();
    assert_eq!(left, ["lxc2", "lxc9", "lxc9p"]);
    assert_eq!(node.agent.allocated(), 1);
    assert!(pods[1].reaches("10.1.0.1"));
}

#[test]
fn older_runtimes_get_older_results() {
    let node = Node::new();
    let pod = Namespace::inside(Some(&node.namespace));
    let mut plugin = node.plugin("ADD", "c1", Some(pod.netns()));
    plugin.config["cniVersion"] = "0.4.0".into();
    let result = node.run(&plugin);
    assert_eq!(
        (&result["cniVersion"], &result["ips"][0]["version"]),
        (&json!("0.4.0"), &json!("4"))
    );
    let mut check = node.check("c1", &pod, &result);
    check.config["cniVersion"] = "0.4.0".into();
    node.run(&check);

    plugin = node.plugin("VERSION", "", None);
    assert_eq!(
        node.run(&plugin)["supportedVersions"].as_array().unwrap().len(),
        5
    );
}

#[test]
fn commands_are_logged() {
    let node = Node::new();
    let pod = Namespace::inside(Some(&node.namespace));
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("cni.log");
    let mut plugin = node.plugin("ADD", "c1", Some(pod.netns()));
    plugin.config["logFile"] = log.to_str().unwrap().into();
    node.run(&plugin);
    node.agent.stop();
    plugin.command = "DEL".into();
    node.fail(&plugin);
    let lines: Vec<Value> = std::fs::read_to_string(log)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(
        (&lines[0]["pod"], &lines[0]["code"]),
        (&json!("default/web-0"), &json!(0))
    );
    assert_eq!(
        (&lines[1]["command"], &lines[1]["code"]),
        (&json!("DEL"), &json!(11))
    );
}
