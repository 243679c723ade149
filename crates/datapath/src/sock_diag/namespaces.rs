//! The network namespaces to look for sockets in: the calling thread's, those of pods, and where a pod's cannot be found by its
//! path, every one that a name or a process leads to.
//!
//! In: paths that the container runtime gave. Out: open namespaces, each once, one at a time: there may be more pods than a
//! process may have files open.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// Where `ip netns` and container runtimes keep names of namespaces.
const NAMED: &str = "/run/netns";
/// Namespaces that are looked at in one walk, beside those of pods.
const OTHERS_MAX: usize = 4096;

/// Calls `visit` with each namespace and a name for it, until it returns false. Returns how many there were.
pub fn walk(pods: &[PathBuf], mut visit: impl FnMut(&Path, &File) -> bool) -> io::Result<usize> {
    let own = Path::new("/proc/thread-self/ns/net");
    let mut seen = BTreeSet::new();
    // A walk changes what this path leads to.
    let file = File::open(own)?;
    seen.insert(identity(&file.metadata()?));
    if !visit(own, &file) {
        return Ok(seen.len());
    }
    let mut missing = false;
    for path in pods {
        match enter(path, &mut seen) {
            Some(Some(file)) if !visit(path, &file) => return Ok(seen.len()),
            Some(_) => {}
            None => missing = true,
        }
    }
    if !missing {
        return Ok(seen.len());
    }
    for path in others().take(OTHERS_MAX) {
        if let Some(Some(file)) = enter(&path, &mut seen)
            && !visit(&path, &file)
        {
            break;
        }
    }
    Ok(seen.len())
}

/// `None` if there is none at this path, `Some(None)` if it was visited before.
fn enter(path: &Path, seen: &mut BTreeSet<(u64, u64)>) -> Option<Option<File>> {
    let metadata = fs::metadata(path).ok()?;
    if seen.contains(&identity(&metadata)) {
        return Some(None);
    }
    // Whatever else is at that path must not hold this thread up.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .ok()?;
    seen.insert(identity(&file.metadata().ok()?))
        .then_some(file)
        .map_or(Some(None), |file| Some(Some(file)))
}

fn identity(metadata: &fs::Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

fn others() -> impl Iterator<Item = PathBuf> {
    let entries = |dir: &str| fs::read_dir(dir).into_iter().flatten().flatten();
    let processes = entries("/proc").filter(|entry| {
        let name = entry.file_name();
        name.as_encoded_bytes().iter().all(u8::is_ascii_digit)
    });
    entries(NAMED)
        .map(|entry| entry.path())
        .chain(processes.map(|entry| entry.path().join("ns/net")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walked(pods: &[PathBuf]) -> (Vec<PathBuf>, usize) {
        let mut paths = vec![];
        let count = walk(pods, |path, _| {
            paths.push(path.to_owned());
            true
        });
        (paths, count.expect("own namespace"))
    }

    #[test]
    fn each_namespace_is_visited_once() {
        let own = PathBuf::from(format!("/proc/{}/ns/net", std::process::id()));
        let (paths, count) = walked(&[own.clone(), own]);
        assert_eq!((paths.len(), count), (1, 1), "{paths:?}");
    }

    #[test]
    fn what_no_path_leads_to_is_searched_for() {
        let (paths, count) = walked(&[PathBuf::new()]);
        // Whatever else runs on this machine: never one twice, and this process's own only by the first name.
        assert_eq!(paths.len(), count);
        let own = format!("/proc/{}/ns/net", std::process::id());
        assert!(!paths.contains(&own.into()));
    }

    #[test]
    fn a_walk_ends_where_it_is_told_to() {
        let mut visits = 0;
        let count = walk(&[PathBuf::new()], |_, _| {
            visits += 1;
            false
        });
        assert_eq!((visits, count.expect("own namespace")), (1, 1));
    }
}
