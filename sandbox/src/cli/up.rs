//! `isthmus sandbox up`: checks, claims a name, starts the supervisor, tells how it goes.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;

use super::{say, usage};
use crate::client::ClientError;
use crate::control::Phase;
use crate::plan::{ClusterRequest, Plan, Request, RequestError, StoreKind};
use crate::{SandboxClient, prerequisites, registry, teardown};

/// How much of the supervisor's log is shown when it fails.
const LOG_TAIL_LINES: usize = 20;

#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  isthmus sandbox up                              clusters east (ID 1) and west (ID 2), two nodes each
  isthmus sandbox up --clusters 3 --nodes 1       east, west and north
  isthmus sandbox up --name lab --cluster eu=10 --cluster us=20

Sandboxes with different names run side by side.")]
pub struct UpArgs {
    /// The sandbox's name.
    #[arg(long, default_value = "default")]
    name: String,
    /// How many clusters: east, west, north, south, c5 and so on, with IDs from 1.
    #[arg(long, default_value_t = 2)]
    clusters: usize,
    /// A cluster's name and ID; can be given several times, instead of --clusters.
    #[arg(long = "cluster", value_name = "NAME=ID", conflicts_with = "clusters")]
    named: Vec<String>,
    /// Nodes per cluster.
    #[arg(long, default_value_t = 2)]
    nodes: u8,
    /// Whether pods and services have IPv6 addresses beside IPv4 ones.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_value_t = true, default_missing_value = "true", action = clap::ArgAction::Set)]
    ipv6: bool,
    /// Where each cluster keeps its state: in an etcd, or in a file of its API server, without any etcd.
    #[arg(long, value_enum, default_value = "etcd")]
    store: StoreKind,
    /// How long to wait until everything is ready, in seconds.
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_value_t = 120, default_missing_value = "120")]
    wait: u64,
    /// Return as soon as the supervisor runs.
    #[arg(long, conflicts_with = "wait")]
    no_wait: bool,
    /// Leave a sandbox that could not be built as it is, to look at.
    #[arg(long)]
    keep_failed: bool,
    /// The directory with Isthmus' binaries; the one of this program when it is not named.
    #[arg(long)]
    bin_dir: Option<PathBuf>,
    /// Run etcd and the emulators only.
    #[arg(long, hide = true)]
    no_components: bool,
}

impl UpArgs {
    /// Two clusters of two nodes in a sandbox called `name`.
    pub fn of_demo(name: String, bin_dir: Option<PathBuf>) -> Self {
        Self {
            name,
            clusters: 2,
            named: vec![],
            nodes: 2,
            ipv6: true,
            store: StoreKind::Etcd,
            wait: 120,
            no_wait: false,
            keep_failed: false,
            bin_dir,
            no_components: false,
        }
    }
}

pub async fn run(args: UpArgs, state_root: &Path) -> anyhow::Result<ExitCode> {
    let request = match request_of(&args) {
        Ok(request) => request,
        Err(error) => return Ok(usage(&error)),
    };
    let bin_dir = args
        .bin_dir
        .clone()
        .unwrap_or_else(prerequisites::default_bin_dir);
    let bin_dir =
        std::path::absolute(&bin_dir).with_context(|| format!("--bin-dir {}", bin_dir.display()))?;
    let machine = match prerequisites::check(state_root, &bin_dir, request.components, request.store) {
        Ok(machine) => machine,
        Err(missing) => bail!(
            "this machine cannot run a sandbox yet:\n- {}",
            missing.join("\n- ")
        ),
    };
    let started = Instant::now();
    let plan = registry::claim(&request, machine)?;
    say(&format!("building sandbox `{}`", plan.name))?;
    let result = build(&args, &plan).await;
    match result {
        Ok(()) => finished(&args, &plan, started.elapsed()),
        Err(error) => {
            if !args.keep_failed {
                let _ = say(&log_tail(&plan));
                teardown::down(state_root, &plan.name)
                    .await
                    .context("removing what was built so far")?;
                return Err(error.context("the sandbox could not be built; what there was of it is removed"));
            }
            let log = plan.supervisor_log();
            Err(error.context(format!("the sandbox could not be built; see {}", log.display())))
        }
    }
}

fn request_of(args: &UpArgs) -> Result<Request, RequestError> {
    let clusters = if args.named.is_empty() {
        if args.clusters > crate::plan::MAX_CLUSTERS {
            return Err(RequestError::Clusters(args.clusters));
        }
        ClusterRequest::defaults(args.clusters)
    } else {
        args.named
            .iter()
            .map(|text| ClusterRequest::parse(text))
            .collect::<Result<_, _>>()?
    };
    let request = Request {
        name: args.name.clone(),
        clusters,
        nodes: args.nodes,
        ipv6: args.ipv6,
        components: !args.no_components,
        store: args.store,
    };
    request.check()?;
    Ok(request)
}

async fn build(args: &UpArgs, plan: &Plan) -> anyhow::Result<()> {
    let mut supervisor = start_supervisor(plan)?;
    let client = SandboxClient::of(plan.clone());
    let deadline = Instant::now() + Duration::from_secs(args.wait.max(1));
    let mut told = 0;
    loop {
        if let Some(status) = supervisor
            .try_wait()
            .context("cannot look after the supervisor")?
        {
            bail!("the supervisor ended ({status})");
        }
        match client.progress(told).await {
            Ok((lines, phase)) => {
                told += lines.len();
                lines.iter().try_for_each(|line| say(&format!("  {line}")))?;
                match phase {
                    Phase::Ready => return Ok(()),
                    Phase::Failed { message } => bail!(message),
                    Phase::Starting if args.no_wait => return Ok(()),
                    Phase::Starting => {}
                }
            }
            // It does not listen yet.
            Err(ClientError::Connect { .. }) => tokio::time::sleep(Duration::from_millis(10)).await,
            Err(error) => return Err(error.into()),
        }
        if Instant::now() >= deadline {
            let missing = client.wait_ready(Duration::ZERO).await.err();
            let missing = missing.map_or_else(String::new, |error| format!(": {error}"));
            bail!("--wait: {} s were not enough{missing}", args.wait);
        }
    }
}

/// Starts this program again as the supervisor: it outlives us, and writes to its log alone.
fn start_supervisor(plan: &Plan) -> anyhow::Result<Child> {
    std::fs::create_dir_all(plan.log_dir()).context("cannot make the directory of logs")?;
    let log = plan.supervisor_log();
    let log = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let program = std::env::current_exe().context("cannot find this program")?;
    Command::new(&program)
        .args(["sandbox", "supervise", "--name", &plan.name, "--state-root"])
        .arg(&plan.machine.state_root)
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("cannot share the log")?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot run {}", program.display()))
}

fn finished(args: &UpArgs, plan: &Plan, took: Duration) -> anyhow::Result<ExitCode> {
    let name = if plan.name == "default" {
        String::new()
    } else {
        format!(" --name {}", plan.name)
    };
    if args.no_wait {
        say(&format!("not waiting; see `isthmus sandbox status{name}`"))?;
        return Ok(ExitCode::SUCCESS);
    }
    say(&format!("ready after {:.1} s\n", took.as_secs_f32()))?;
    say(&format!(
        "  export KUBECONFIG=$(isthmus sandbox kubeconfig{name})"
    ))?;
    for cluster in &plan.clusters {
        say(&format!("  kubectl --context {} get nodes", cluster.name))?;
    }
    say(&format!("  isthmus sandbox down{name}"))?;
    Ok(ExitCode::SUCCESS)
}

fn log_tail(plan: &Plan) -> String {
    let text = std::fs::read_to_string(plan.supervisor_log()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let tail = &lines[lines.len().saturating_sub(LOG_TAIL_LINES)..];
    format!("the supervisor's log ends with:\n  {}", tail.join("\n  "))
}
