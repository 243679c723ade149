//! A real file system that gets full, or cannot be written to. Needs root, to mount one.

use std::{path::Path, time::Duration};

use etcd_client::Error;
use isthmus_clustermesh_apiserver::bind;
use isthmus_runtime::State;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;

use super::Watching;
use crate::{
    lab::{Apiserver, Pki, embedded, eventually},
    script::PREFIX,
};

/// A file system in memory, of a few mebibytes. Goes with the value.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn new(mebibytes: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let disk = Self(directory);
        disk.mount(MsFlags::empty(), &format!("size={mebibytes}m"));
        disk
    }

    fn mount(&self, flags: MsFlags, options: &str) {
        let tmpfs = Some("tmpfs");
        mount(tmpfs, self.path(), tmpfs, flags, Some(options))
            .expect("this test needs root, to mount a tmpfs");
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        umount2(self.path(), MntFlags::MNT_DETACH).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_refuses_writes_clearly_and_is_used_again_when_there_is_room() {
    let (pki, disk) = (Pki::new(), SmallDisk::new(24));
    let server = Apiserver::start(embedded("c1", 1, &disk.path().join("store"), &pki)).await;
    let mut client = pki.client(server.address, "admin-c1").await;
    let mut kept = 0;
    for round in 0..3 {
        client
            .put(format!("{PREFIX}kept/{round}"), "1", None)
            .await
            .unwrap();
        kept += 1;
        let mut watching = Watching::start(&mut client, 1).await;
        // Another program takes all the room.
        let filler = disk.path().join("filler");
        let mut file = std::fs::File::create(&filler).unwrap();
        let full = loop {
            if let Err(error) = std::io::Write::write_all(&mut file, &[1; 4096]) {
                break error;
            }
        };
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
        let refused = eventually("a write is refused", || async {
            let mut client = client.clone();
            let put = client.put(format!("{PREFIX}lost"), vec![round; 300_000], None);
            put.await.err()
        })
        .await;
        let Error::GRpcStatus(status) = &refused else {
            panic!("{refused}");
        };
        assert!(status.message().contains("No space left on device"), "{status:?}");
        let degraded =
            matches!(&server.health.snapshot()["store"], State::Degraded(why) if why.contains("No space"));
        assert!(degraded && server.health.is_ready());
        // Reads and watches go on.
        let answer = client.get(format!("{PREFIX}kept/{round}"), None).await.unwrap();
        assert_eq!(answer.count(), 1);
        let revision = answer.header().unwrap().revision();
        watching.until(revision).await;
        let begun = std::time::Instant::now();
        client.put(format!("{PREFIX}lost"), "1", None).await.unwrap_err();
        assert!(begun.elapsed() < Duration::from_secs(30), "it is refused at once");

        drop(file);
        std::fs::remove_file(&filler).unwrap();
        eventually("writes are taken again", || async {
            let mut client = client.clone();
            client.put(format!("{PREFIX}again"), "1", None).await.ok()
        })
        .await;
        for round in 0..kept {
            let answer = client.get(format!("{PREFIX}kept/{round}"), None).await.unwrap();
            assert_eq!(answer.count(), 1);
        }
    }
    // What is there now is there after a restart.
    let server = Apiserver::start(server.stop().await).await;
    let mut client = pki.client(server.address, "admin-c1").await;
    for round in 0..kept {
        let answer = client.get(format!("{PREFIX}kept/{round}"), None).await.unwrap();
        assert_eq!(answer.count(), 1);
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_cannot_be_written_to_is_said_at_the_start() {
    let (pki, disk) = (Pki::new(), SmallDisk::new(24));
    let config = embedded("c1", 1, &disk.path().join("store"), &pki);
    let server = Apiserver::start(config.clone()).await;
    server.stop().await;
    disk.mount(MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, "");
    let Err(error) = bind(config).await else {
        panic!("it starts");
    };
    let error = format!("{error:#}");
    assert!(
        error.contains("--data-dir") && error.contains("Read-only file system"),
        "{error}"
    );
}
