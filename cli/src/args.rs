//! The command line: every command, flag and example.
//!
//! In: arguments and ISTHMUS_ variables. Out: [`Args`]. A value that does not parse ends the process with 64.

use std::{path::PathBuf, time::Duration};

use clap::{Args as ArgGroup, Parser, Subcommand};
use isthmus_sandbox::cli::SandboxArgs;

use crate::output::Format;

/// Look at a node of Isthmus, and build clusters to try it out.
#[derive(Debug, Parser)]
#[command(
    name = "isthmus",
    version,
    after_help = "Examples:
  isthmus status                       is this node's agent well, and if not, what is wrong
  isthmus clustermesh status --wait    wait until every remote cluster is ready
  isthmus service list -n default      a namespace's services, with backends everywhere
  isthmus bpf lb list                  what the kernel does with a connection to a service
  isthmus sandbox up                   two clusters on this machine

Commands about a node ask its agent, on a unix socket that only root may use. Where several agents run, choose \
one with --socket-path (or ISTHMUS_SOCKET_PATH), and for `bpf` with --bpf-root (or ISTHMUS_BPF_ROOT).

Exit codes: 0 done and well, 1 failed or not well, 64 wrong arguments."
)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show whether this node's agent and its parts work.
    #[command(after_help = "Examples:
  isthmus status
  isthmus status --wait --wait-duration 2m
  isthmus status -o json

Exits with 1 if a part has failed or is still starting. `degraded` means that the part works on what it knows; \
AGE is how long ago what it rests on was last confirmed.")]
    Status(StatusArgs),
    /// Services and their backends, in all clusters.
    #[command(subcommand)]
    Service(ServiceCommand),
    /// The remote clusters.
    #[command(subcommand, name = "clustermesh")]
    ClusterMesh(ClusterMeshCommand),
    /// What is in the kernel: reads the agent's BPF maps, also when no agent runs.
    #[command(subcommand)]
    Bpf(BpfCommand),
    /// The agent's tables.
    #[command(subcommand)]
    Db(DbCommand),
    /// Show this program's version, and the agent's if one answers.
    #[command(after_help = "Examples:
  isthmus version
  isthmus version -o json")]
    Version(AgentArgs),
    /// Print a script that completes this command's arguments.
    #[command(after_help = "Examples:
  source <(isthmus completion bash)
  isthmus completion zsh > \"${fpath[1]}/_isthmus\"
  isthmus completion fish > ~/.config/fish/completions/isthmus.fish")]
    Completion {
        /// For which shell.
        shell: clap_complete::Shell,
    },
    /// Whole clusters on this machine, to try Isthmus out.
    Sandbox(SandboxArgs),
}

/// Flags of everything that asks the agent.
#[derive(Debug, ArgGroup)]
pub struct AgentArgs {
    /// The agent's socket.
    #[arg(
        long,
        env = "ISTHMUS_SOCKET_PATH",
        value_name = "PATH",
        default_value = "/var/run/isthmus/agent.sock"
    )]
    pub socket_path: PathBuf,
    /// How to print: for people, with more columns, or for programs.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    pub output: Format,
}

/// Flags of commands that can wait.
#[derive(Debug, ArgGroup)]
pub struct WaitArgs {
    /// Wait until all is well.
    #[arg(long)]
    pub wait: bool,
    /// How long to wait at most, for example 30s, 5m.
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = parse_duration)]
    pub wait_duration: Duration,
}

/// Flags of `status`.
#[derive(Debug, ArgGroup)]
pub struct StatusArgs {
    /// Agent.
    #[command(flatten)]
    pub agent: AgentArgs,
    /// Waiting.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// `service ...`
#[derive(Debug, Subcommand)]
pub enum ServiceCommand {
    /// List services and their backends.
    #[command(after_help = "Examples:
  isthmus service list
  isthmus service list -n default -o wide    a line per backend
  isthmus service list --all-backends        also backends that are not used, and why
  isthmus service list -o json")]
    List {
        /// Agent.
        #[command(flatten)]
        agent: AgentArgs,
        /// Only this namespace.
        #[arg(short, long)]
        namespace: Option<String>,
        /// Also backends that are known and not used, with the reason.
        #[arg(long)]
        all_backends: bool,
    },
}

/// `clustermesh ...`
#[derive(Debug, Subcommand)]
pub enum ClusterMeshCommand {
    /// Show every remote cluster: connection, what is known of it, what was refused and why.
    #[command(after_help = "Examples:
  isthmus clustermesh status
  isthmus clustermesh status --wait    until there is a remote cluster and all are ready
  isthmus clustermesh status -o json

A remote cluster is ready when it is connected, its configuration is accepted, everything of it is listed, and \
this node's datapath has it. PHASE is what the API server does with it: connecting, listing, synced, stale (what is \
known stays and may be old), refused or draining; PROGRESS how much of it is read, and the time left. HEARTBEAT is how \
long ago its heartbeat was last seen to change. Every replica of this cluster's API server is asked too; those that do \
not answer within 3 seconds are listed with the reason. Exits with 1 if a remote cluster is not ready.")]
    Status(StatusArgs),
    /// Try the way to each remote cluster step by step: file, certificate, name, TCP, TLS, answer, cluster.
    #[command(after_help = "Examples:
  isthmus clustermesh troubleshoot --clustermesh-config /var/lib/isthmus/clustermesh
  isthmus clustermesh troubleshoot west -o json

To be run where the API server runs: it reads the files that the server reads, and takes the ways that it takes. \
Nothing is changed. Exits with 1 if a step fails.")]
    Troubleshoot(TroubleshootArgs),
}

/// Flags of `clustermesh troubleshoot`.
#[derive(Debug, ArgGroup)]
pub struct TroubleshootArgs {
    /// Only these remote clusters.
    pub clusters: Vec<String>,
    /// Directory with a file for each remote cluster, as the API server has it.
    #[arg(
        long,
        env = "ISTHMUS_CLUSTERMESH_CONFIG",
        value_name = "DIR",
        default_value = "/var/lib/isthmus/clustermesh"
    )]
    pub clustermesh_config: PathBuf,
    /// How long a step may take, for example 500ms, 5s.
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = parse_duration)]
    pub step_duration: Duration,
    /// How to print: for people, with more columns, or for programs.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    pub output: Format,
}

/// Flags of everything that reads BPF maps.
#[derive(Debug, ArgGroup)]
pub struct BpfArgs {
    /// The BPF file system that the agent pins its maps in.
    #[arg(
        long,
        env = "ISTHMUS_BPF_ROOT",
        value_name = "PATH",
        default_value = "/sys/fs/bpf"
    )]
    pub bpf_root: PathBuf,
    /// How to print: for people, with more columns, or for programs.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    pub output: Format,
}

/// `bpf ...`
#[derive(Debug, Subcommand)]
pub enum BpfCommand {
    /// Load balancing: frontends and the backends in their slots.
    #[command(subcommand)]
    Lb(LbCommand),
    /// From address to identity and node.
    #[command(subcommand)]
    Ipcache(IpcacheCommand),
    /// Local endpoints by address.
    #[command(subcommand)]
    Endpoint(EndpointCommand),
    /// Packet counters.
    #[command(subcommand)]
    Metrics(MetricsCommand),
}

/// `bpf lb ...`
#[derive(Debug, Subcommand)]
pub enum LbCommand {
    /// List frontends, a line per slot, with the slot's backend.
    #[command(after_help = "Examples:
  isthmus bpf lb list
  isthmus bpf lb list --bpf-root /run/node-1/bpf -o json")]
    List(BpfArgs),
}

/// `bpf ipcache ...`
#[derive(Debug, Subcommand)]
pub enum IpcacheCommand {
    /// List prefixes with identity and tunnel endpoint.
    #[command(after_help = "Examples:
  isthmus bpf ipcache list
  isthmus bpf ipcache list -o json | jq '.[] | select(.remoteCluster)'")]
    List(BpfArgs),
}

/// `bpf endpoint ...`
#[derive(Debug, Subcommand)]
pub enum EndpointCommand {
    /// List local endpoints and the node's own addresses.
    #[command(after_help = "Examples:
  isthmus bpf endpoint list
  isthmus bpf endpoint list -o wide")]
    List(BpfArgs),
}

/// `bpf metrics ...`
#[derive(Debug, Subcommand)]
pub enum MetricsCommand {
    /// List packets by what became of them.
    #[command(after_help = "Examples:
  isthmus bpf metrics list
  isthmus bpf metrics list -o json | jq '.[] | select(.drop)'")]
    List(BpfArgs),
}

/// `db ...`
#[derive(Debug, Subcommand)]
pub enum DbCommand {
    /// Show a table. A name that is not one makes the agent list those it has.
    #[command(after_help = "Examples:
  isthmus db show services
  isthmus db show nodes -o json")]
    Show {
        /// Agent.
        #[command(flatten)]
        agent: AgentArgs,
        /// Which one.
        table: String,
    },
}

/// A duration such as `500ms`, `30s`, `5m`, `1h`.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let ms_per_unit = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err("it takes a whole number and ms, s, m or h, for example 30s".into()),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| "it takes a whole number and ms, s, m or h, for example 30s")?;
    number
        .checked_mul(ms_per_unit)
        .filter(|ms| *ms <= 86_400_000)
        .map(Duration::from_millis)
        .ok_or_else(|| "it takes at most 24h".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    /// Every command that does something shows examples.
    #[test]
    fn every_command_has_examples() {
        fn visit(command: &clap::Command, path: &str) {
            let path = format!("{path} {}", command.get_name());
            if path.starts_with(" isthmus sandbox") {
                return;
            }
            if command.has_subcommands() {
                command.get_subcommands().for_each(|sub| visit(sub, &path));
            } else {
                let help = command
                    .get_after_help()
                    .map(ToString::to_string)
                    .unwrap_or_default();
                assert!(help.starts_with("Example"), "`{path}` has no examples");
                assert!(
                    help.contains(path.trim()),
                    "the examples of `{path}` are of another command"
                );
            }
        }
        visit(&Args::command(), "");
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(parse_duration("1500ms"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse_duration("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(parse_duration("24h"), Ok(Duration::from_secs(86_400)));
        for wrong in [
            "",
            "5",
            "m",
            "-1s",
            "1.5s",
            "25h",
            "99999999999999999999s",
            "9999999999999999h",
        ] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }
}
