//! cgroup v2 directories: made, joined, killed and removed.
//!
//! Each process of a sandbox is below the sandbox's own cgroup, so that one write ends them all, whatever became of
//! the supervisor. A process joins its cgroup before it becomes the program ([`enter`]), so nothing it starts escapes.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::process::Command;

/// The mount point of cgroup v2 in the text of /proc/mounts.
pub fn cgroup2_mount(mounts: &str) -> Option<PathBuf> {
    mount_of_type(mounts, "cgroup2")
}

/// The first mount point of the file system `kind` in the text of /proc/mounts.
pub fn mount_of_type(mounts: &str, kind: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (at, found) = (fields.next()?, fields.next()?);
        (found == kind).then(|| PathBuf::from(at.replace("\\040", " ")))
    })
}

/// Moves this process into `cgroup`, which is made if needed.
pub fn join(cgroup: &Path) -> io::Result<()> {
    std::fs::create_dir_all(cgroup)?;
    std::fs::write(cgroup.join("cgroup.procs"), "0")
}

/// A command that joins `cgroup`, enters the network namespace at `netns` and then becomes what is added with
/// `arg`: program first. The process keeps its ID all the way.
pub fn enter(cgroup: &Path, netns: Option<&Path>) -> Command {
    const SCRIPT: &str = r#"echo 0 > "$0/cgroup.procs" || exit 125; exec "$@""#;
    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg(SCRIPT).arg(cgroup);
    if let Some(netns) = netns {
        let mut flag = OsStr::new("--net=").to_owned();
        flag.push(netns);
        command.arg("nsenter").arg(flag).arg("--");
    }
    command
}

/// Kills everything in `cgroup` and below. One that is not there is fine.
pub fn kill(cgroup: &Path) -> io::Result<()> {
    match std::fs::write(cgroup.join("cgroup.kill"), "1") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Whether a process is left in `cgroup` or below.
pub fn is_populated(cgroup: &Path) -> bool {
    std::fs::read_to_string(cgroup.join("cgroup.events")).is_ok_and(|events| events.contains("populated 1"))
}

/// Kills everything in `cgroup`, waits for it to be empty and removes it. One that is not there is fine.
pub async fn remove(cgroup: &Path, patience: Duration) -> io::Result<()> {
    let deadline = tokio::time::Instant::now() + patience;
    let mut pause = Duration::from_millis(1);
    loop {
        kill(cgroup)?;
        match remove_tree(cgroup) {
            Ok(()) => return Ok(()),
            Err(error) if tokio::time::Instant::now() >= deadline => return Err(error),
            // Processes are still ending: the kernel answers EBUSY until they are gone.
            Err(_) => tokio::time::sleep(pause).await,
        }
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Removes the directories, the lowest first. Files in a cgroup go with their directory.
fn remove_tree(cgroup: &Path) -> io::Result<()> {
    let entries = match std::fs::read_dir(cgroup) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    match std::fs::remove_dir(cgroup) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup2_mount_is_found_beside_version_1() {
        let mounts = "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0\n";
        assert_eq!(cgroup2_mount(mounts), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(cgroup2_mount("proc /proc proc rw 0 0\nbroken\n"), None);
    }
}
