//! Which sandboxes there are on this machine: one directory each below the state root.
//!
//! A lock file makes the choice of an index and the making of the directory one step, so that two sandboxes that
//! start at the same time get different indexes. The plan in the directory is written before anything else is made:
//! whatever exists of a sandbox can be found and removed from it.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use nix::fcntl::{Flock, FlockArg};

use crate::netns;
use crate::plan::{Machine, Plan, Request};

/// Where sandboxes keep their state unless told otherwise.
pub const DEFAULT_STATE_ROOT: &str = "/run/isthmus-sandbox";

/// Claims a name and a free index, and writes the plan.
pub fn claim(request: &Request, machine: Machine) -> anyhow::Result<Plan> {
    let root = machine.state_root.clone();
    std::fs::create_dir_all(&root).with_context(|| format!("cannot make {}", root.display()))?;
    let _lock = lock(&root)?;
    let directory = root.join(&request.name);
    if directory.exists() {
        bail!(
            "a sandbox named `{0}` exists: remove it with `isthmus sandbox down --name {0}`, or choose another --name",
            request.name
        );
    }
    let taken: Vec<u8> = all(&root)
        .into_iter()
        .filter_map(|(_, plan)| plan.map(|plan| plan.index))
        .collect();
    let free = |index: &u8| {
        !taken.contains(index)
            && netns::names_with_prefix(&Plan::netns_prefix(*index)).is_empty()
            && !Path::new("/sys/class/net")
                .join(Plan::root_device(*index))
                .exists()
    };
    let index = (0..=u8::MAX)
        .find(free)
        .context("all 256 indexes for sandboxes are in use: remove one with `isthmus sandbox down`")?;
    let plan = Plan::new(request, index, machine);
    std::fs::create_dir(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let text = serde_json::to_vec_pretty(&plan).context("cannot write the plan as JSON")?;
    let file = Plan::plan_file(&directory);
    std::fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(plan)
}

/// The plan of the sandbox named `name`.
pub fn load(state_root: &Path, name: &str) -> anyhow::Result<Plan> {
    let directory = state_root.join(name);
    if !directory.exists() {
        let others: Vec<String> = all(state_root).into_iter().map(|(name, _)| name).collect();
        let others = if others.is_empty() {
            String::new()
        } else {
            format!(" (there is {})", others.join(", "))
        };
        bail!(
            "there is no sandbox named `{name}`{others}: start one with `isthmus sandbox up --name {name}`"
        );
    }
    read_plan(&directory).with_context(|| {
        format!("the sandbox `{name}` is damaged: remove it with `isthmus sandbox down --name {name}`")
    })
}

/// All sandboxes: (name, plan), the plan absent where its file cannot be read.
pub fn all(state_root: &Path) -> Vec<(String, Option<Plan>)> {
    let entries = std::fs::read_dir(state_root).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| {
            Some((
                entry.file_name().into_string().ok()?,
                read_plan(&entry.path()).ok(),
            ))
        })
        .collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

/// Removes the state directory; the last one out removes the root too.
pub fn forget(state_root: &Path, name: &str) -> io::Result<()> {
    match std::fs::remove_dir_all(state_root.join(name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    if all(state_root).is_empty() {
        // Fails when something else is in there, which then stays.
        let _ = std::fs::remove_file(lock_file(state_root));
        let _ = std::fs::remove_dir(state_root);
    }
    Ok(())
}

fn read_plan(directory: &Path) -> anyhow::Result<Plan> {
    let file = Plan::plan_file(directory);
    let text = std::fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is not a sandbox's plan", file.display()))
}

fn lock_file(root: &Path) -> PathBuf {
    root.join(".lock")
}

/// Held until dropped. The file may vanish with the last sandbox between open and lock: then the lock guards nothing
/// and is taken again.
fn lock(root: &Path) -> anyhow::Result<Flock<File>> {
    let path = lock_file(root);
    loop {
        std::fs::create_dir_all(root).with_context(|| format!("cannot make {}", root.display()))?;
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        let lock = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, error)| error)
            .with_context(|| format!("cannot lock {}", path.display()))?;
        let same = |on_disk: std::fs::Metadata| {
            use std::os::unix::fs::MetadataExt;
            lock.metadata().is_ok_and(|ours| ours.ino() == on_disk.ino())
        };
        if std::fs::metadata(&path).is_ok_and(same) {
            return Ok(lock);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::ClusterRequest;

    fn machine(root: &Path) -> Machine {
        Machine {
            state_root: root.into(),
            cgroup_mount: "/sys/fs/cgroup".into(),
            bpffs_mount: "/sys/fs/bpf".into(),
            bin_dir: "/usr/bin".into(),
        }
    }

    fn request(name: &str) -> Request {
        Request {
            name: name.into(),
            clusters: ClusterRequest::defaults(1),
            nodes: 1,
            ipv6: true,
            components: true,
            store: crate::plan::StoreKind::Etcd,
        }
    }

    #[test]
    fn two_sandboxes_get_different_indexes_and_a_removed_ones_is_used_again() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().join("state");
        let first = claim(&request("a"), machine(&root)).unwrap();
        let second = claim(&request("b"), machine(&root)).unwrap();
        assert_ne!(first.index, second.index);
        assert_eq!(load(&root, "b").unwrap(), second);
        forget(&root, "a").unwrap();
        let third = claim(&request("c"), machine(&root)).unwrap();
        assert_eq!(third.index, first.index);
        forget(&root, "b").unwrap();
        forget(&root, "c").unwrap();
        assert!(!root.exists());
    }

    #[test]
    fn a_name_is_claimed_once() {
        let root = tempfile::tempdir().unwrap();
        claim(&request("a"), machine(root.path())).unwrap();
        let error = claim(&request("a"), machine(root.path()))
            .unwrap_err()
            .to_string();
        assert!(error.contains("isthmus sandbox down --name a"), "{error}");
        assert!(
            load(root.path(), "other")
                .unwrap_err()
                .to_string()
                .contains("no sandbox named `other`")
        );
    }
}
