//! `isthmus sandbox ...`: arguments in, commands done, words for people out.

mod demo_run;
mod report;
mod up;

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use isthmus_runtime::telemetry::LogFormat;

use crate::control::Action;
use crate::plan::is_label;
use crate::{SandboxClient, registry, supervisor, teardown};

/// Exit code of a bad flag or value (`EX_USAGE`).
const USAGE: u8 = 64;

/// Whole clusters on one machine, to try things out and to test.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  isthmus sandbox up                              two clusters, east and west, of two nodes each
  isthmus sandbox up --name big --clusters 3 --nodes 4
  isthmus sandbox up --cluster eu=10 --cluster us=20
  export KUBECONFIG=$(isthmus sandbox kubeconfig); kubectl --context east get nodes
  isthmus sandbox status
  isthmus sandbox exec --cluster east web-0 -- curl -s http://10.101.0.10
  isthmus sandbox link west down                  cut west off from the others
  isthmus sandbox down

A sandbox needs root, cgroup v2, and the tools ip, nsenter and etcd. Containers run their command from this
machine's file system; images are ignored.")]
pub struct SandboxArgs {
    #[command(subcommand)]
    command: Command,
    /// The directory of the sandboxes' state.
    #[arg(long, global = true, hide = true, default_value = registry::DEFAULT_STATE_ROOT)]
    state_root: PathBuf,
}

#[derive(Clone, Debug, Subcommand)]
enum Command {
    /// Build a sandbox and wait until it is ready.
    Up(up::UpArgs),
    /// Remove a sandbox and all that belongs to it.
    Down(DownArgs),
    /// Show a sandbox's clusters, nodes and components.
    Status(StatusArgs),
    /// Run a command in a pod.
    Exec(ExecArgs),
    /// Print the path of the kubeconfig, which has a context per cluster.
    Kubeconfig(KubeconfigArgs),
    /// Do something to a component: stop, start, restart, kill, pause or resume it.
    Component(ComponentArgs),
    /// Take the link of a node, or of a cluster to all others, up or down.
    Link(LinkArgs),
    /// Build a sandbox, put a global service through everything that may happen to it, and remove it again.
    Demo(demo_run::DemoArgs),
    /// Programs for pods: a server that says who it is, a client that asks and writes down every answer.
    Workload {
        #[command(subcommand)]
        workload: crate::workload::Workload,
    },
    /// Own a sandbox (started by `up`).
    #[command(hide = true)]
    Supervise(NameArgs),
}

#[derive(Clone, Debug, Args)]
struct NameArgs {
    /// The sandbox's name.
    #[arg(long, default_value = "default")]
    name: String,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = "Example:
  isthmus sandbox down --name big

Removing a sandbox works in any state of it, and can be repeated.")]
struct DownArgs {
    #[command(flatten)]
    name: NameArgs,
    /// Remove all sandboxes of this machine.
    #[arg(long, conflicts_with = "name")]
    all: bool,
}

#[derive(Clone, Debug, Args)]
struct StatusArgs {
    #[command(flatten)]
    name: NameArgs,
    /// How to print it.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Output {
    Text,
    Json,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = "Example:
  isthmus sandbox exec --cluster west -n shop client -- sh -c 'curl -s http://$WEB_SERVICE_HOST'

The command sees the pod's network and environment and this machine's file system.")]
struct ExecArgs {
    #[command(flatten)]
    name: NameArgs,
    /// The pod's cluster; the sandbox's first one when it is not named.
    #[arg(long)]
    cluster: Option<String>,
    /// The pod's namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// The pod.
    pod: String,
    /// The command and its arguments.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  export KUBECONFIG=$(isthmus sandbox kubeconfig)
  eval \"$(isthmus sandbox kubeconfig --export)\"")]
struct KubeconfigArgs {
    #[command(flatten)]
    name: NameArgs,
    /// The kubeconfig of this cluster alone.
    #[arg(long)]
    cluster: Option<String>,
    /// Print the file's content instead of its path.
    #[arg(long)]
    content: bool,
    /// Print a line for the shell that sets KUBECONFIG.
    #[arg(long, conflicts_with = "content")]
    export: bool,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  isthmus sandbox component east-1/agent kill9    it is started again, as after any crash
  isthmus sandbox component west/apiserver stop   it stays down until it is started")]
struct ComponentArgs {
    #[command(flatten)]
    name: NameArgs,
    /// Its name, as `isthmus sandbox status` shows it.
    component: String,
    /// What to do.
    #[arg(value_enum)]
    action: ActionArg,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ActionArg {
    Stop,
    Start,
    Restart,
    Kill9,
    Pause,
    Resume,
}

impl From<ActionArg> for Action {
    fn from(action: ActionArg) -> Self {
        match action {
            ActionArg::Stop => Self::Stop,
            ActionArg::Start => Self::Start,
            ActionArg::Restart => Self::Restart,
            ActionArg::Kill9 => Self::Kill9,
            ActionArg::Pause => Self::Pause,
            ActionArg::Resume => Self::Resume,
        }
    }
}

#[derive(Clone, Debug, Args)]
struct LinkArgs {
    #[command(flatten)]
    name: NameArgs,
    /// A cluster or a node.
    target: String,
    /// Up or down.
    #[arg(value_enum)]
    state: LinkState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LinkState {
    Up,
    Down,
}

/// Does what was asked. Errors are for the caller to print; a refused flag is printed here and is exit code 64.
pub async fn run(args: SandboxArgs) -> anyhow::Result<ExitCode> {
    let root = args.state_root;
    match args.command {
        Command::Up(args) => return up::run(args, &root).await,
        Command::Down(DownArgs { name, all }) => {
            anyhow::ensure!(
                nix::unistd::geteuid().is_root(),
                "a sandbox belongs to root: run this as root (sudo)"
            );
            if all {
                let names = teardown::down_all(&root).await?;
                say(&format!(
                    "removed {} sandbox(es): {}",
                    names.len(),
                    names.join(", ")
                ))?;
                return Ok(ExitCode::SUCCESS);
            }
            if let Some(refusal) = check_name(&name.name) {
                return Ok(refusal);
            }
            let existed = teardown::down(&root, &name.name).await?;
            let what = if existed { "removed" } else { "there was no" };
            say(&format!("{what} sandbox `{}`", name.name))?;
        }
        Command::Status(StatusArgs { name, output }) => {
            let report = SandboxClient::open_in(&root, &name.name)?.status().await?;
            match output {
                Output::Text => say(&report::text(&report))?,
                Output::Json => say(&serde_json::to_string_pretty(&report)?)?,
            }
        }
        Command::Exec(args) => return exec(args, &root).await,
        Command::Kubeconfig(args) => kubeconfig(&args, &root)?,
        Command::Component(ComponentArgs {
            name,
            component,
            action,
        }) => {
            let client = SandboxClient::open_in(&root, &name.name)?;
            match action.into() {
                Action::Stop => client.stop(&component).await?,
                Action::Start => client.start(&component).await?,
                Action::Restart => client.restart(&component).await?,
                Action::Kill9 => client.kill9(&component).await?,
                Action::Pause => client.pause(&component).await?,
                Action::Resume => client.resume(&component).await?,
            }
        }
        Command::Link(LinkArgs { name, target, state }) => {
            SandboxClient::open_in(&root, &name.name)?
                .set_link(&target, state == LinkState::Up)
                .await?;
        }
        Command::Demo(args) => return demo_run::run(args, &root).await,
        Command::Workload { workload } => crate::workload::run(workload).await?,
        Command::Supervise(name) => {
            // Whoever embeds this command may have set logging up already, which is as good.
            let level = std::env::var("ISTHMUS_LOG_LEVEL").unwrap_or_else(|_| "info".into());
            let _ = isthmus_runtime::telemetry::init(LogFormat::Text, &level);
            supervisor::run(&root, &name.name).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn exec(args: ExecArgs, root: &std::path::Path) -> anyhow::Result<ExitCode> {
    let client = SandboxClient::open_in(root, &args.name.name)?;
    let first = client.plan().clusters.first().map(|cluster| cluster.name.clone());
    let cluster = args.cluster.or(first).context("the sandbox has no cluster")?;
    let mut command = client
        .exec(&cluster, &args.namespace, &args.pod)
        .await?
        .into_std();
    command.args(&args.command);
    // Becomes the command: its exit code is ours.
    Err(command.exec()).context("cannot run a shell")
}

fn kubeconfig(args: &KubeconfigArgs, root: &std::path::Path) -> anyhow::Result<()> {
    let plan = registry::load(root, &args.name.name)?;
    let path = match &args.cluster {
        None => plan.kubeconfig(),
        Some(name) => {
            let names: Vec<&str> = plan
                .clusters
                .iter()
                .map(|cluster| cluster.name.as_str())
                .collect();
            let known = plan.cluster(name);
            known
                .with_context(|| format!("--cluster: got `{name}`; the sandbox has {}", names.join(", ")))?;
            plan.cluster_kubeconfig(name)
        }
    };
    if args.content {
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        return say(text.trim_end());
    }
    let path = path.display();
    say(&if args.export {
        format!("export KUBECONFIG={path}")
    } else {
        path.to_string()
    })
}

/// A name that cannot be one is refused before it becomes part of a path.
fn check_name(name: &str) -> Option<ExitCode> {
    (!is_label(name, 20)).then(|| usage(&crate::plan::RequestError::Name(name.into())))
}

fn usage(message: &dyn std::fmt::Display) -> ExitCode {
    // Nothing is left to do when the terminal is gone.
    let _ = writeln!(std::io::stderr(), "error: {message}");
    ExitCode::from(USAGE)
}

fn say(line: &str) -> anyhow::Result<()> {
    match writeln!(std::io::stdout(), "{line}") {
        // The reader has seen enough (`| head`).
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("cannot write to standard output"),
    }
}
