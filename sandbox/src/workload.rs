//! Programs for pods: a server that says who it is, and a client that asks it over and over and writes down every answer.
//!
//! A pod's image is not used in the sandbox, so the things that the demo, the tests and newcomers want to run come with it:
//! `isthmus sandbox workload serve` and `isthmus sandbox workload load`. Both speak TCP (HTTP/1.1 on it) and UDP.
//! The client's output is one JSON object ([`Answer`]) a request, so that whoever reads it can judge every single one.

use std::{
    io::Write as _,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::Semaphore,
    time::{Instant, timeout},
};

/// What a pod can run.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Workload {
    /// Answer every request with CLUSTER/POD_NAME (environment), on TCP and UDP, IPv4 and IPv6.
    Serve(ServeArgs),
    /// Ask an address over and over; print one JSON line a request.
    Load(LoadArgs),
}

/// Flags of the server.
#[derive(Clone, Debug, clap::Args)]
pub struct ServeArgs {
    /// Port to listen on.
    #[arg(long, default_value_t = 8080)]
    pub port: u16,
    /// How long to go on answering after SIGTERM, in milliseconds, as a well-behaved server does until nobody sends to it any more.
    #[arg(long, default_value_t = 2000)]
    pub drain_ms: u64,
}

/// Flags of the client.
#[derive(Clone, Debug, clap::Args)]
pub struct LoadArgs {
    /// Address and port, for example `10.101.0.7:80` or `[fd00:96::7]:80`.
    #[arg(long)]
    pub target: SocketAddr,
    /// Ask with datagrams instead of a new connection each time.
    #[arg(long)]
    pub udp: bool,
    /// Ask over one connection that stays open, instead of a new one each time.
    #[arg(long, conflicts_with = "udp")]
    pub keep: bool,
    /// Requests a second.
    #[arg(long, default_value_t = 100)]
    pub rate: u32,
    /// Stop after so many requests; 0 = go on until the output closes or a signal comes.
    #[arg(long, default_value_t = 0)]
    pub count: u64,
    /// A request without an answer for so long has failed, in milliseconds.
    #[arg(long, default_value_t = 2000)]
    pub timeout_ms: u64,
}

/// One request as the client saw it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Answer {
    /// Unix microseconds when the request began.
    pub at_us: u64,
    /// How long it took, in microseconds.
    pub took_us: u64,
    /// CLUSTER/POD_NAME of who answered; empty if it failed.
    pub from: String,
    /// Why it failed; empty if it did not.
    pub error: String,
}

/// Most requests under way at once; a client that is slower than its rate waits.
const UNDER_WAY_MAX: usize = 256;
/// Most connections that the server holds at once.
const CONNECTIONS_MAX: usize = 4096;
/// Longest request or answer that is read, in bytes.
const MESSAGE_LEN_MAX: usize = 4096;

/// Runs a workload to its end.
pub async fn run(workload: Workload) -> anyhow::Result<()> {
    match workload {
        Workload::Serve(args) => serve(args).await,
        Workload::Load(args) => load(args).await,
    }
}

async fn serve(args: ServeArgs) -> anyhow::Result<()> {
    let name = |variable: &str| std::env::var(variable).unwrap_or_else(|_| "unknown".to_owned());
    let identity: Arc<str> = format!("{}/{}", name("CLUSTER"), name("POD_NAME")).into();
    let any = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), args.port);
    let listener = TcpListener::bind(any)
        .await
        .with_context(|| format!("cannot listen on TCP port {}", args.port))?;
    let datagrams = UdpSocket::bind(any)
        .await
        .with_context(|| format!("cannot listen on UDP port {}", args.port))?;
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    println!("{identity} listens on port {}", args.port);
    let stop = async {
        terminate.recv().await;
        println!("{identity} goes on for {} ms", args.drain_ms);
        tokio::time::sleep(Duration::from_millis(args.drain_ms)).await;
    };
    tokio::select! {
        () = stop => Ok(()),
        result = serve_tcp(&listener, &identity) => result,
        result = serve_udp(&datagrams, &identity) => result,
    }
}

async fn serve_tcp(listener: &TcpListener, identity: &Arc<str>) -> anyhow::Result<()> {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let slot = slots
            .clone()
            .acquire_owned()
            .await
            .context("the server is stopping")?;
        let Ok((mut stream, _)) = listener.accept().await else {
            continue;
        };
        let identity = identity.clone();
        tokio::spawn(async move {
            let _slot = slot;
            let mut request = vec![0; MESSAGE_LEN_MAX];
            let answer = format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{identity}\n",
                identity.len() + 1
            );
            // Requests of our client and of curl fit one segment; a read is a request.
            while let Ok(1..) = stream.read(&mut request).await {
                if stream.write_all(answer.as_bytes()).await.is_err() {
                    return;
                }
            }
        });
    }
}

async fn serve_udp(socket: &UdpSocket, identity: &Arc<str>) -> anyhow::Result<()> {
    let mut request = vec![0; MESSAGE_LEN_MAX];
    loop {
        if let Ok((_, peer)) = socket.recv_from(&mut request).await {
            // A peer that is gone is no reason to stop.
            let _ = socket.send_to(format!("{identity}\n").as_bytes(), peer).await;
        }
    }
}

async fn load(args: LoadArgs) -> anyhow::Result<()> {
    if args.rate == 0 {
        bail!("--rate is 0: it takes the number of requests a second, at least 1");
    }
    let mut tick = tokio::time::interval(Duration::from_secs(1) / args.rate);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let limit = Duration::from_millis(args.timeout_ms);
    let (answers, mut lines) = tokio::sync::mpsc::channel::<Answer>(UNDER_WAY_MAX);
    // A pipe whose reader is slow blocks: not on a thread that other requests need.
    let printer = tokio::task::spawn_blocking(move || {
        let mut out = std::io::stdout().lock();
        while let Some(answer) = lines.blocking_recv() {
            serde_json::to_writer(&mut out, &answer)?;
            out.write_all(b"\n")?;
            out.flush()?;
        }
        anyhow::Ok(())
    });
    let under_way = Arc::new(Semaphore::new(UNDER_WAY_MAX));
    let mut kept = None;
    let mut sent = 0;
    while (args.count == 0 || sent < args.count) && !printer.is_finished() {
        tick.tick().await;
        sent += 1;
        if args.keep {
            let answer = measure(limit, ask_kept(&mut kept, args.target)).await;
            if !answer.error.is_empty() {
                kept = None;
            }
            if answers.send(answer).await.is_err() {
                break;
            }
            continue;
        }
        let slot = under_way
            .clone()
            .acquire_owned()
            .await
            .context("the client is stopping")?;
        let (answers, target, udp) = (answers.clone(), args.target, args.udp);
        tokio::spawn(async move {
            let answer = if udp {
                measure(limit, ask_udp(target)).await
            } else {
                measure(limit, ask_tcp(target)).await
            };
            // The printer is gone only when the output is closed; then nobody waits for this answer.
            let _ = answers.send(answer).await;
            drop(slot);
        });
    }
    drop(answers);
    printer.await.context("the printer panicked")?
}

async fn measure(limit: Duration, request: impl Future<Output = anyhow::Result<String>>) -> Answer {
    let at_us = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_micros() as u64);
    let begun = Instant::now();
    let (from, error) = match timeout(limit, request).await {
        Ok(Ok(from)) => (from, String::new()),
        Ok(Err(error)) => (String::new(), format!("{error:#}")),
        Err(_) => (
            String::new(),
            format!("no answer within {} ms", limit.as_millis()),
        ),
    };
    Answer {
        at_us,
        took_us: begun.elapsed().as_micros() as u64,
        from,
        error,
    }
}

async fn ask_tcp(target: SocketAddr) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(target).await.context("connect")?;
    exchange(&mut stream).await
}

async fn ask_kept(kept: &mut Option<TcpStream>, target: SocketAddr) -> anyhow::Result<String> {
    let stream = match kept {
        Some(stream) => stream,
        None => kept.insert(TcpStream::connect(target).await.context("connect")?),
    };
    exchange(stream).await
}

async fn exchange(stream: &mut TcpStream) -> anyhow::Result<String> {
    stream
        .write_all(b"GET / HTTP/1.1\r\nHost: isthmus\r\n\r\n")
        .await
        .context("send")?;
    let mut answer = vec![0; MESSAGE_LEN_MAX];
    let length = stream.read(&mut answer).await.context("receive")?;
    let text = std::str::from_utf8(&answer[..length]).context("the answer is not text")?;
    match text.split_once("\r\n\r\n") {
        Some((_, body)) if !body.trim().is_empty() => Ok(body.trim().to_owned()),
        _ => bail!("the connection closed without an answer"),
    }
}

async fn ask_udp(target: SocketAddr) -> anyhow::Result<String> {
    let any: SocketAddr = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse()?;
    let socket = UdpSocket::bind(any).await.context("bind")?;
    socket.send_to(b"who?\n", target).await.context("send")?;
    let mut answer = vec![0; MESSAGE_LEN_MAX];
    let (length, peer) = socket.recv_from(&mut answer).await.context("receive")?;
    if peer != target {
        bail!("the answer came from {peer}, not from {target}");
    }
    Ok(String::from_utf8_lossy(&answer[..length]).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_closed_port_is_a_failed_answer() {
        // Port 1 on loopback: nobody listens.
        let answer = measure(Duration::from_secs(2), ask_tcp("127.0.0.1:1".parse().unwrap())).await;
        assert!(
            answer.from.is_empty() && answer.error.contains("connect"),
            "{answer:?}"
        );
    }

    #[tokio::test]
    async fn the_server_names_itself_on_tcp_and_udp() {
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let (listener, socket) = (
            TcpListener::bind(any).await.unwrap(),
            UdpSocket::bind(any).await.unwrap(),
        );
        let (tcp, udp) = (listener.local_addr().unwrap(), socket.local_addr().unwrap());
        let identity: Arc<str> = "east/pod-1".into();
        let (for_tcp, for_udp) = (identity.clone(), identity);
        tokio::spawn(async move { serve_tcp(&listener, &for_tcp).await });
        tokio::spawn(async move { serve_udp(&socket, &for_udp).await });
        assert_eq!(ask_tcp(tcp).await.unwrap(), "east/pod-1");
        assert_eq!(ask_udp(udp).await.unwrap(), "east/pod-1");
        let mut kept = None;
        for _ in 0..3 {
            assert_eq!(ask_kept(&mut kept, tcp).await.unwrap(), "east/pod-1");
        }
    }
}
