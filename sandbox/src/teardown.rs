//! Removes a sandbox, whatever state it is in.
//!
//! Works from the name and the plan's file alone, asks nobody, and can be repeated. Order: end all processes (one
//! write to the sandbox's cgroup), then what they held: pinned BPF objects, namespaces, the veth, cgroups, files.
//! Each step is tried even when another failed; all errors come back together. The state directory goes last and only
//! when everything else is gone, so that the next attempt still knows what there is.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;

use crate::plan::{Plan, sandbox_bpf_dir, sandbox_cgroup};
use crate::{bpffs, cgroup, netns, registry};

/// How long ending processes may take before the cgroup counts as stuck.
const PATIENCE: Duration = Duration::from_secs(20);

/// What failed, for all steps.
#[derive(Default)]
struct Errors(Vec<String>);

impl Errors {
    fn keep(&mut self, what: &str, result: anyhow::Result<()>) {
        if let Err(error) = result {
            self.0.push(format!("{what}: {error:#}"));
        }
    }
}

/// Removes the sandbox named `name`. One that is not there is fine. Says whether there was anything.
pub async fn down(state_root: &Path, name: &str) -> anyhow::Result<bool> {
    let existed = state_root.join(name).exists();
    let plan = registry::load(state_root, name).ok();
    let mut errors = Errors::default();
    let mounts = std::fs::read_to_string("/proc/mounts").context("cannot read /proc/mounts")?;
    let group = cgroup::cgroup2_mount(&mounts).map(|mount| sandbox_cgroup(&mount, name));
    let had_group = group.as_ref().is_some_and(|group| group.exists());
    if let Some(group) = &group {
        errors.keep("ending its processes", end_processes(group).await);
    }
    if let Some(mount) = cgroup::mount_of_type(&mounts, "bpf") {
        let directory = sandbox_bpf_dir(&mount, name);
        errors.keep(
            "its pinned BPF objects",
            bpffs::remove(&directory).map_err(Into::into),
        );
        // The directory above is shared with other sandboxes: it goes with the last one.
        let _ = directory.parent().map(std::fs::remove_dir);
    }
    if let Some(plan) = &plan {
        errors.keep("its network namespaces", remove_network(plan.index).await);
    }
    if let Some(group) = &group {
        errors.keep(
            "its cgroups",
            cgroup::remove(group, PATIENCE).await.map_err(Into::into),
        );
    }
    if errors.0.is_empty() {
        errors.keep(
            "its files",
            registry::forget(state_root, name).map_err(Into::into),
        );
    }
    if errors.0.is_empty() {
        return Ok(existed || had_group);
    }
    anyhow::bail!(
        "the sandbox `{name}` is not removed completely; try again. {}",
        errors.0.join("; ")
    )
}

/// Removes all sandboxes, also namespaces and cgroups that no state directory knows of. Returns their names.
pub async fn down_all(state_root: &Path) -> anyhow::Result<Vec<String>> {
    let mut removed = Vec::new();
    let mut errors = Vec::new();
    let mut names: Vec<String> = registry::all(state_root)
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    for name in orphaned_cgroups() {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    for name in names {
        match down(state_root, &name).await {
            Ok(_) => removed.push(name),
            Err(error) => errors.push(format!("{error:#}")),
        }
    }
    for index in 0..=u8::MAX {
        if let Err(error) = remove_network(index).await {
            errors.push(format!("{error:#}"));
        }
    }
    if errors.is_empty() {
        Ok(removed)
    } else {
        anyhow::bail!(errors.join("\n"))
    }
}

async fn end_processes(group: &Path) -> anyhow::Result<()> {
    cgroup::kill(group)?;
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while cgroup::is_populated(group) {
        anyhow::ensure!(
            tokio::time::Instant::now() < deadline,
            "processes of {} do not end; see its cgroup.procs",
            group.display()
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
        // A process that was being made while the others died has joined since.
        cgroup::kill(group)?;
    }
    Ok(())
}

async fn remove_network(index: u8) -> anyhow::Result<()> {
    let mut first_error = netns::remove_root_device(&Plan::root_device(index)).await.err();
    for name in netns::names_with_prefix(&Plan::netns_prefix(index)) {
        first_error = netns::remove(&name).await.err().or(first_error);
    }
    first_error.map_or(Ok(()), |error| Err(error.into()))
}

/// The names of sandboxes that have a cgroup.
fn orphaned_cgroups() -> Vec<String> {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    let Some(mount) = cgroup::cgroup2_mount(&mounts) else {
        return Vec::new();
    };
    let entries = std::fs::read_dir(mount).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter_map(|name| name.strip_prefix("isthmus-sandbox-").map(str::to_owned))
        .filter(|name| crate::plan::is_label(name, 20))
        .collect()
}
