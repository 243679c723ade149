//! The directory of cluster files, as Cilium mounts it: a file for each cluster, named like it, beside keys and certificates.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::Path,
};

use isthmus_model::ClusterName;

/// Largest cluster file, in bytes.
const FILE_LEN_MAX: u64 = 1024 * 1024;
/// Most entries that are looked at.
const ENTRIES_MAX: usize = 4096;

/// What a look at the directory found.
#[derive(Debug, Default, Eq, PartialEq)]
pub struct Scan {
    /// Text of each cluster's file. The own cluster's is left out: charts give every cluster the same directory.
    pub files: BTreeMap<ClusterName, String>,
    /// Names of files that could be a cluster's and have no text of one now: never a cluster's file, or one that is being
    /// written or cannot be read at the moment.
    pub others: BTreeSet<ClusterName>,
    /// Files that are meant for a cluster and cannot be used, by file name.
    pub complaints: BTreeMap<String, String>,
}

/// Looks at `directory`. What counts is what Cilium counts: a file, not a directory, whose text contains `endpoints:`.
pub fn scan(directory: &Path, own: &ClusterName) -> io::Result<Scan> {
    let mut scan = Scan::default();
    for entry in fs::read_dir(directory)?.take(ENTRIES_MAX) {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // Kubernetes' own links (`..data`), and keys and certificates.
        if name.starts_with('.') {
            continue;
        }
        let text = read(&entry.path()).filter(|text| text.contains("endpoints:"));
        match (ClusterName::new(&name), text) {
            (Ok(name), _) if name == *own => {}
            (Ok(name), Some(text)) => {
                scan.files.insert(name, text);
            }
            (Ok(name), None) => {
                scan.others.insert(name);
            }
            (Err(error), Some(_)) => {
                scan.complaints.insert(name, error.to_string());
            }
            (Err(_), None) => {}
        }
    }
    Ok(scan)
}

/// A file's text. Follows symbolic links, which is how Secrets are mounted.
fn read(path: &Path) -> Option<String> {
    let metadata = fs::metadata(path).ok()?;
    if !metadata.is_file() || metadata.len() > FILE_LEN_MAX {
        return None;
    }
    fs::read_to_string(path).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_cluster_files_count() {
        let directory = tempfile::tempdir().unwrap();
        let own = ClusterName::new("c1").unwrap();
        for (name, text) in [
            ("c1", "endpoints: [http://a]"),
            ("c2", "endpoints: [http://b]"),
            ("C3", "endpoints: [http://c]"),
            ("..data", "endpoints: []"),
            ("common-etcd-client.crt", "-----BEGIN CERTIFICATE-----"),
            ("notes", "nothing"),
        ] {
            fs::write(directory.path().join(name), text).unwrap();
        }
        fs::create_dir(directory.path().join("c4")).unwrap();
        std::os::unix::fs::symlink("c2", directory.path().join("c5")).unwrap();
        fs::write(directory.path().join("c6"), b"endpoints: \xff").unwrap();
        let scan = scan(directory.path(), &own).unwrap();
        assert_eq!(
            scan.files.keys().map(ClusterName::as_str).collect::<Vec<_>>(),
            ["c2", "c5"]
        );
        assert_eq!(
            scan.others.iter().map(ClusterName::as_str).collect::<Vec<_>>(),
            ["c4", "c6", "notes"],
            "there, but not a cluster's now"
        );
        assert_eq!(scan.complaints.keys().collect::<Vec<_>>(), ["C3"]);
        assert!(super::scan(&directory.path().join("absent"), &own).is_err());
    }
}
