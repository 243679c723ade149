//! The direction of dependencies: pure crates below shells below binaries. `ARCHITECTURE.md` says why.

use std::{collections::BTreeMap, path::Path, process::Command};

use anyhow::{Context, bail};
use serde::Deserialize;

/// Tier of each package; a package may depend on lower tiers and on what [`SIDEWAYS`] names.
const TIERS: &[(&str, u8)] = &[
    ("isthmus-bpf-abi", 0),
    ("isthmus-model", 1),
    ("isthmus-wire", 1),
    ("isthmus-mesh", 1),
    ("isthmus-runtime", 2),
    ("isthmus-tls", 2),
    ("isthmus-kvstore", 2),
    ("isthmus-k8s", 2),
    ("isthmus-datapath", 2),
    ("isthmus-proto", 2),
    ("isthmus-agent", 3),
    ("isthmus-operator", 3),
    ("isthmus-clustermesh-apiserver", 3),
    ("isthmus-cni", 3),
    ("isthmus-sandbox-kube", 4),
    ("isthmus-sandbox", 4),
    // The command embeds the sandbox, so it stands above it.
    ("isthmus-cli", 5),
    ("isthmus-bench", 6),
    ("isthmus-e2e", 6),
    ("xtask", 6),
];

/// Dependencies inside one tier that are meant.
const SIDEWAYS: &[(&str, &str)] = &[
    ("isthmus-wire", "isthmus-model"),
    ("isthmus-mesh", "isthmus-model"),
    ("isthmus-kvstore", "isthmus-runtime"),
    ("isthmus-kvstore", "isthmus-tls"),
    // Other parties' servers are read without copies and without trust in event types; see kvstore/src/client.rs.
    ("isthmus-kvstore", "isthmus-proto"),
    ("isthmus-sandbox", "isthmus-sandbox-kube"),
];

/// Crates that do I/O, keep time or run tasks: never under a pure crate.
const IMPURE: &[&str] = &[
    "tokio",
    "aya",
    "kube",
    "tonic",
    "etcd-client",
    "hyper",
    "rand",
    "nix",
    "libc",
    "tracing-subscriber",
];

/// Sandbox crates may be used by no daemon: no code path of Isthmus is special-cased for them.
const DAEMONS_MAX_TIER: u8 = 3;

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    kind: Option<String>,
}

/// Everything that is wrong with the workspace's dependencies, one sentence each.
pub fn check(root: &Path) -> anyhow::Result<Vec<String>> {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--no-deps",
            "--format-version",
            "1",
            "--manifest-path",
        ])
        .arg(root.join("Cargo.toml"))
        .output()
        .context("cannot run cargo metadata")?;
    if !output.status.success() {
        bail!(
            "cargo metadata failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let metadata: Metadata = serde_json::from_slice(&output.stdout).context("cargo metadata is not JSON")?;
    Ok(violations(&metadata.packages))
}

fn violations(packages: &[Package]) -> Vec<String> {
    let tiers: BTreeMap<&str, u8> = TIERS.iter().copied().collect();
    let mut found = vec![];
    for package in packages {
        let Some(&tier) = tiers.get(package.name.as_str()) else {
            found.push(format!(
                "{} has no tier; add it to xtask/src/tiers.rs and to ARCHITECTURE.md",
                package.name
            ));
            continue;
        };
        // What tests use does not shape the product.
        for dependency in package
            .dependencies
            .iter()
            .filter(|dependency| dependency.kind.as_deref() != Some("dev"))
        {
            let name = dependency.name.as_str();
            if tier <= 1 && IMPURE.contains(&name) {
                found.push(format!(
                    "{} is pure (tier {tier}) and must not depend on {name}",
                    package.name
                ));
            }
            if let Some(&below) = tiers.get(name) {
                let meant = SIDEWAYS.contains(&(package.name.as_str(), name));
                if below > tier || below == tier && !meant {
                    found.push(format!(
                        "{} (tier {tier}) must not depend on {name} (tier {below}): dependencies point downwards",
                        package.name
                    ));
                }
                if tier <= DAEMONS_MAX_TIER && name.starts_with("isthmus-sandbox") {
                    found.push(format!("{} must not know about the sandbox", package.name));
                }
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, dependencies: &[&str]) -> Package {
        let dependency = |name: &&str| Dependency {
            name: (*name).to_owned(),
            kind: None,
        };
        Package {
            name: name.to_owned(),
            dependencies: dependencies.iter().map(dependency).collect(),
        }
    }

    #[test]
    fn the_workspace_keeps_its_direction() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        assert_eq!(check(&root).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn wrong_directions_are_named() {
        for (name, dependency, part) in [
            ("isthmus-mesh", "isthmus-kvstore", "downwards"),
            ("isthmus-mesh", "isthmus-wire", "downwards"),
            ("isthmus-wire", "tokio", "pure"),
            ("isthmus-agent", "isthmus-sandbox", "sandbox"),
            ("isthmus-agent", "isthmus-operator", "downwards"),
            ("isthmus-unknown", "serde", "no tier"),
        ] {
            let found = violations(&[package(name, &[dependency])]);
            assert!(
                found.iter().any(|text| text.contains(part)),
                "{name} -> {dependency}: {found:?}"
            );
        }
        assert!(violations(&[package("isthmus-agent", &["isthmus-mesh", "tokio"])]).is_empty());
    }
}
