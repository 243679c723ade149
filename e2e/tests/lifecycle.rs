//! The sandbox itself: two side by side, removal after a crash, and nothing left behind.

use std::{path::Path, process::Command};

use anyhow::{Context, ensure};
use isthmus_e2e::{NAMESPACE, Sandbox, eventually, run};

/// Everything of sandbox `index` and `name` that is left on the machine.
fn leftovers(index: u8, name: &str) -> anyhow::Result<Vec<String>> {
    let mut found = vec![];
    let netns = Command::new("ip").args(["-o", "netns", "list"]).output()?;
    let prefix = format!("isb{index}-");
    found.extend(
        String::from_utf8_lossy(&netns.stdout)
            .lines()
            .filter(|line| line.starts_with(&prefix))
            .map(str::to_owned),
    );
    let links = Command::new("ip").args(["-o", "link"]).output()?;
    found.extend(
        String::from_utf8_lossy(&links.stdout)
            .lines()
            .filter(|line| line.contains(&prefix))
            .map(str::to_owned),
    );
    let mounts = std::fs::read_to_string("/proc/mounts")?;
    let cgroups = isthmus_sandbox::cgroup::cgroup2_mount(&mounts).context("no cgroup v2 mount")?;
    let bpffs = isthmus_sandbox::cgroup::mount_of_type(&mounts, "bpf").context("no bpffs mount")?;
    let paths = [
        isthmus_sandbox::plan::sandbox_cgroup(&cgroups, name),
        isthmus_sandbox::plan::sandbox_bpf_dir(&bpffs, name),
        Path::new(isthmus_sandbox::registry::DEFAULT_STATE_ROOT).join(name),
    ];
    found.extend(
        paths
            .iter()
            .filter(|path| path.exists())
            .map(|path| path.display().to_string()),
    );
    Ok(found)
}

#[tokio::test(flavor = "multi_thread")]
async fn two_sandboxes_live_side_by_side_and_leave_nothing() -> anyhow::Result<()> {
    let first = Sandbox::up("e2e-one", 1, 1).await?;
    let second = Sandbox::up("e2e-two", 1, 1).await?;
    let indexes = [first.client().plan().index, second.client().plan().index];
    ensure!(indexes[0] != indexes[1], "both have index {}", indexes[0]);
    for sandbox in [&first, &second] {
        sandbox.make_client("east", "client", None).await?;
    }
    drop(first);
    ensure!(
        leftovers(indexes[0], "e2e-one")?.is_empty(),
        "left: {:?}",
        leftovers(indexes[0], "e2e-one")?
    );
    // The other one goes on.
    second.client().wait_ready(isthmus_e2e::PATIENCE).await?;
    second
        .kubectl("east")
        .run(&["-n", NAMESPACE, "get", "pod", "client"])
        .await?;
    drop(second);
    ensure!(
        leftovers(indexes[1], "e2e-two")?.is_empty(),
        "left: {:?}",
        leftovers(indexes[1], "e2e-two")?
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn down_cleans_up_after_a_crash_of_the_supervisor() -> anyhow::Result<()> {
    let sandbox = Sandbox::up("e2e-crash", 1, 1).await?;
    let index = sandbox.client().plan().index;
    sandbox.make_client("east", "client", None).await?;
    ensure!(
        !leftovers(index, "e2e-crash")?.is_empty(),
        "the check for leftovers finds nothing of a running sandbox"
    );
    let supervisor = supervisor_pid("e2e-crash")?;
    let killed = Command::new("kill")
        .args(["-9", &supervisor.to_string()])
        .status()?;
    ensure!(killed.success(), "cannot kill the supervisor {supervisor}");
    eventually("the supervisor is gone", async || {
        ensure!(
            !Path::new(&format!("/proc/{supervisor}/cmdline")).exists(),
            "it is still there"
        );
        Ok(())
    })
    .await?;
    run("isthmus", &["sandbox", "down", "--name", "e2e-crash"])?;
    ensure!(
        leftovers(index, "e2e-crash")?.is_empty(),
        "left: {:?}",
        leftovers(index, "e2e-crash")?
    );
    // Once more is fine.
    run("isthmus", &["sandbox", "down", "--name", "e2e-crash"]).map(drop)
}

/// The process that runs `sandbox supervise` for `name`.
fn supervisor_pid(name: &str) -> anyhow::Result<u32> {
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        let Ok(command_line) = std::fs::read(path.join("cmdline")) else {
            continue;
        };
        let words: Vec<_> = command_line
            .split(|byte| *byte == 0)
            .map(String::from_utf8_lossy)
            .collect();
        if words.iter().any(|word| word == "supervise") && words.iter().any(|word| word.contains(name)) {
            return path
                .file_name()
                .and_then(|pid| pid.to_str())
                .context("no pid")?
                .parse()
                .context("pid");
        }
    }
    anyhow::bail!("no supervisor of {name} runs")
}
