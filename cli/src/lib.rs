//! The `isthmus` command: shows what a node's agent knows and what its kernel does, and runs sandboxes.
//!
//! In: arguments; the agent's answers on its unix socket; pinned BPF maps. Out: text on standard output, and an exit
//! code: 0 done and well, 1 failed or not well, 64 wrong arguments.
//!
//! [`view`] and [`output`] are pure and make all text; [`agent`] and [`bpf`] fetch. Nothing here changes a node.

pub mod agent;
pub mod args;
pub mod bpf;
pub mod output;
pub mod screen;
pub mod troubleshoot;
pub mod view;

use std::{
    io::{self, Write},
    process::ExitCode,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use agent::{Agent, AgentError};
use args::{AgentArgs, Args, ClusterMeshCommand, Command, DbCommand, ServiceCommand, StatusArgs, WaitArgs};
use clap::CommandFactory;
use screen::Screen;

/// How often a waiting command asks again.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// Carries a command out.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Status(StatusArgs { agent, wait }) => {
            let ask = async || Agent::connect(&agent.socket_path).await?.status().await;
            let response = wait_for(&wait, ask, view::status::is_well).await?;
            print(&view::status::render(&response, agent.output))?;
            Ok(well(view::status::is_well(&response)))
        }
        Command::ClusterMesh(ClusterMeshCommand::Status(StatusArgs { agent, wait })) => {
            let ask = async |replicas| {
                let client = Agent::connect(&agent.socket_path).await?;
                client.cluster_mesh_status(replicas).await
            };
            if wait.wait {
                let mut screen = Screen::of_stderr();
                // Waiting means waiting for a mesh: an agent that just started knows no cluster yet.
                let done = |response: &_| {
                    screen.show(&view::clustermesh::waiting(response));
                    !response.clusters.is_empty() && view::clustermesh::all_ready(response)
                };
                let waited = wait_for(&wait, async || ask(false).await, done).await;
                screen.clear();
                waited?;
            }
            let response = ask(true).await?;
            print(&view::clustermesh::render(&response, agent.output, now_ms()))?;
            let known = !wait.wait || !response.clusters.is_empty();
            Ok(well(known && view::clustermesh::all_ready(&response)))
        }
        Command::ClusterMesh(ClusterMeshCommand::Troubleshoot(args)) => {
            let reports = troubleshoot::run(&args).await?;
            print(&view::troubleshoot::render(&reports, args.output))?;
            Ok(well(view::troubleshoot::all_ok(&reports)))
        }
        Command::Service(ServiceCommand::List {
            agent,
            namespace,
            all_backends,
        }) => {
            let mut services = Agent::connect(&agent.socket_path)
                .await?
                .services(all_backends)
                .await?;
            if let Some(namespace) = namespace {
                services.retain(|service| service.namespace == namespace);
            }
            print(&view::service::render(&services, agent.output, all_backends))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Db(DbCommand::Show { agent, table }) => {
            let text = Agent::connect(&agent.socket_path).await?.table(&table).await?;
            print(&view::table::render(&text, agent.output)?)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Bpf(command) => {
            print(&bpf::show(&command)?)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Version(AgentArgs { socket_path, output }) => {
            let ask = async || Agent::connect(&socket_path).await?.status().await;
            let agent = ask().await.map_err(|error: AgentError| error.to_string());
            print(&view::version::render(env!("CARGO_PKG_VERSION"), &agent, output))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "isthmus", &mut script);
            print(&String::from_utf8_lossy(&script))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Sandbox(args) => isthmus_sandbox::cli::run(args).await,
    }
}

/// Asks once, or until `done` or time is up; an agent that is not there yet is waited for too. The last answer.
async fn wait_for<T>(
    wait: &WaitArgs,
    ask: impl AsyncFn() -> Result<T, AgentError>,
    mut done: impl FnMut(&T) -> bool,
) -> Result<T, AgentError> {
    let begun = Instant::now();
    loop {
        let answer = ask().await;
        let stop = match &answer {
            Ok(answer) => done(answer),
            // Waiting gives no rights.
            Err(AgentError::Denied { .. }) => true,
            Err(_) => false,
        };
        if !wait.wait || stop || begun.elapsed() + POLL_INTERVAL > wait.wait_duration {
            return answer;
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn well(well: bool) -> ExitCode {
    if well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Writes to standard output. A reader that has seen enough (`| head`) is no failure.
fn print(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
        _ => Ok(()),
    }
}
