//! Load, made and answered by processes of their own in the pods' namespaces: the benchmark starts itself again as one.
//!
//! In: a request a line on standard input. Out: numbers, a line each, on standard output. A process ends when its input does.
//!
//! One thread on the first CPU makes load, those that answer are on the second: no figure depends on where the scheduler puts
//! them, and both go before whatever else runs on the machine. Connections end with a reset, so that no port is held back; client ports are used in turn, so that none comes again
//! while anybody may still remember it.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream},
    os::fd::AsRawFd,
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, connect, listen, setsockopt, socket,
        sockopt,
    },
    unistd::Pid,
};

/// The first argument of such a process.
pub const ARGUMENT: &str = "isthmus-load";
/// Takes connections and ends them.
pub const PORT_ACCEPT: u16 = 8080;
/// Echoes.
pub const PORT_ECHO: u16 = 8081;
/// Takes bytes, and says at the end how many they were.
pub const PORT_SINK: u16 = 8082;

/// Real-time priority: above all that else runs on the machine.
const PRIORITY: &str = "1";
/// Client ports, in turn.
const PORT_MIN: u16 = 1024;
/// Connections between two looks at the clock.
const STRIDE: u64 = 32;
/// A connection that takes longer has lost a packet.
const LOST: Duration = Duration::from_millis(500);
const CHUNK: usize = 128 << 10;
/// An answer comes within this time and that of the request.
const PATIENCE: Duration = Duration::from_secs(60);

/// A process in a pod.
pub struct Load {
    child: Child,
    input: Option<ChildStdin>,
    answers: mpsc::Receiver<String>,
}

impl Load {
    /// One that answers in `namespace`, at all its addresses.
    pub fn server(namespace: &str) -> Result<Self> {
        let mut load = Self::start(namespace, None, &["server".to_owned()])?;
        load.answer(Duration::ZERO)?;
        Ok(load)
    }

    /// One that makes load, from `sources`; in a cgroup or wherever this process is.
    pub fn client(namespace: &str, cgroup: Option<&Path>, sources: &[Ipv4Addr]) -> Result<Self> {
        let sources = sources.iter().map(Ipv4Addr::to_string);
        let arguments: Vec<String> = ["client".to_owned()].into_iter().chain(sources).collect();
        Self::start(namespace, cgroup, &arguments)
    }

    fn start(namespace: &str, cgroup: Option<&Path>, arguments: &[String]) -> Result<Self> {
        let itself = std::env::current_exe().context("the path of this program")?;
        let mut child = Command::new("chrt")
            .args(["--fifo", PRIORITY, "ip", "netns", "exec", namespace])
            .arg(itself)
            .arg(ARGUMENT)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run chrt")?;
        if let Some(cgroup) = cgroup {
            // It waits for its first request, so it has no socket yet.
            std::fs::write(cgroup.join("cgroup.procs"), child.id().to_string())
                .with_context(|| format!("moving a process to {}", cgroup.display()))?;
        }
        let input = child.stdin.take();
        let output = child.stdout.take().context("no standard output")?;
        let (sender, answers) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            child,
            input,
            answers,
        })
    }

    /// New connections for so long.
    pub fn connections(&mut self, to: SocketAddrV4, time: Duration) -> Result<Sample> {
        self.ask("connections", to, time)
    }

    /// A byte there and back over one connection for so long.
    pub fn round_trips(&mut self, to: SocketAddrV4, time: Duration) -> Result<Sample> {
        self.ask("round_trips", to, time)
    }

    /// Bytes over one connection for so long.
    pub fn bytes(&mut self, to: SocketAddrV4, time: Duration) -> Result<Sample> {
        self.ask("bytes", to, time)
    }

    fn ask(&mut self, what: &str, to: SocketAddrV4, time: Duration) -> Result<Sample> {
        let input = self.input.as_mut().context("no standard input")?;
        writeln!(input, "{what} {to} {}", time.as_nanos()).context("the load generator is gone")?;
        let answer = self.answer(time)?;
        let numbers: Vec<u64> = answer.split(' ').filter_map(|word| word.parse().ok()).collect();
        let [count, nanoseconds, lost] = numbers[..] else {
            bail!("{what} to {to}: {answer}");
        };
        ensure!(count > 0, "{what} to {to}: none");
        Ok(Sample {
            count,
            time: Duration::from_nanos(nanoseconds),
            lost,
        })
    }

    fn answer(&mut self, time: Duration) -> Result<String> {
        self.answers
            .recv_timeout(time + PATIENCE)
            .context("the load generator does not answer")
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        drop(self.input.take());
        // It ends with its input; if it hangs in a call, so.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What was done in a time.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Connections, round trips or bytes.
    pub count: u64,
    /// In this time.
    pub time: Duration,
    /// Connections that took so long that a packet must have been lost.
    pub lost: u64,
}

impl Sample {
    /// Things a second.
    pub fn rate(&self) -> f64 {
        self.count as f64 / self.time.as_secs_f64()
    }

    /// Microseconds a thing.
    pub fn each_us(&self) -> f64 {
        self.time.as_secs_f64() * 1e6 / self.count as f64
    }
}

/// The middle of values; of an even number of them the mean of the two in the middle.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        even if even.is_multiple_of(2) => f64::midpoint(values[middle - 1], values[middle]),
        _ => values[middle],
    }
}

/// What such a process does.
pub fn main(arguments: &[String]) -> Result<()> {
    match arguments.split_first() {
        Some((role, [])) if role == "server" => serve(),
        Some((role, sources)) if role == "client" => {
            let sources = sources
                .iter()
                .map(|source| source.parse().context("a source address"))
                .collect::<Result<Vec<Ipv4Addr>>>()?;
            make(Client { sources, turn: 0 })
        }
        _ => bail!("a load generator takes `server` or `client` and addresses"),
    }
}

/// Moves this thread to the CPU that is number `index` of those it may have (or the last).
fn pin(index: usize) -> Result<()> {
    let own = sched_getaffinity(Pid::from_raw(0)).context("sched_getaffinity")?;
    let allowed: Vec<usize> = (0..CpuSet::count())
        .filter(|cpu| own.is_set(*cpu).unwrap_or(false))
        .collect();
    let cpu = allowed.get(index).or(allowed.last()).context("no CPU")?;
    let mut one = CpuSet::new();
    one.set(*cpu).context("a CPU's number")?;
    sched_setaffinity(Pid::from_raw(0), &one).context("sched_setaffinity")
}

// === answering ===

fn serve() -> Result<()> {
    pin(1)?;
    let any = Ipv4Addr::UNSPECIFIED;
    let acceptor = socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    bind(
        acceptor.as_raw_fd(),
        &SockaddrIn::from(SocketAddrV4::new(any, PORT_ACCEPT)),
    )?;
    listen(&acceptor, Backlog::MAXALLOWABLE)?;
    let acceptor = TcpListener::from(acceptor);
    thread::spawn(move || acceptor.incoming().for_each(drop));
    answer(TcpListener::bind((any, PORT_ECHO))?, echo);
    answer(TcpListener::bind((any, PORT_SINK))?, sink);
    say("ready")?;
    // Until the one who asks has gone.
    std::io::stdin().lines().for_each(drop);
    Ok(())
}

/// Threads inherit the CPU.
fn answer(listener: TcpListener, with: fn(TcpStream) -> std::io::Result<()>) {
    thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            // A connection that breaks is the client's to report.
            thread::spawn(move || with(connection));
        }
    });
}

fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 {
        stream.write_all(&byte)?;
    }
    Ok(())
}

fn sink(mut stream: TcpStream) -> std::io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut total = 0_u64;
    loop {
        match stream.read(&mut buffer)? {
            0 => return stream.write_all(&total.to_be_bytes()),
            length => total += length as u64,
        }
    }
}

// === asking ===

struct Client {
    sources: Vec<Ipv4Addr>,
    turn: u64,
}

fn make(mut client: Client) -> Result<()> {
    pin(0)?;
    for line in std::io::stdin().lines() {
        let line = line?;
        let (what, to, time) = request(&line).with_context(|| format!("a request: {line}"))?;
        let outcome = match what {
            "connections" => client.connections(to, time),
            "round_trips" => round_trips(to, time),
            "bytes" => bytes(to, time),
            _ => bail!("a request: {line}"),
        };
        match outcome {
            Ok(sample) => say(&format!(
                "{} {} {}",
                sample.count,
                sample.time.as_nanos(),
                sample.lost
            ))?,
            Err(error) => say(&format!("{error:#}"))?,
        }
    }
    Ok(())
}

fn request(line: &str) -> Option<(&str, SocketAddrV4, Duration)> {
    let (what, rest) = line.split_once(' ')?;
    let (to, time) = rest.split_once(' ')?;
    Some((what, to.parse().ok()?, Duration::from_nanos(time.parse().ok()?)))
}

fn say(line: &str) -> Result<()> {
    let mut output = std::io::stdout();
    writeln!(output, "{line}")?;
    Ok(output.flush()?)
}

impl Client {
    fn connections(&mut self, to: SocketAddrV4, time: Duration) -> Result<Sample> {
        let to = SockaddrIn::from(to);
        let (begun, mut lost, mut count) = (Instant::now(), 0, 0);
        let mut before = Duration::ZERO;
        while before < time {
            for _ in 0..STRIDE {
                connect_once(self.next_source(), &to)?;
                count += 1;
            }
            let now = begun.elapsed();
            lost += u64::from(now - before > LOST);
            before = now;
        }
        Ok(Sample {
            count,
            time: before,
            lost,
        })
    }

    fn next_source(&mut self) -> SockaddrIn {
        let (address, port) = source(&self.sources, self.turn);
        self.turn += 1;
        SockaddrIn::from(SocketAddrV4::new(address, port))
    }
}

/// Who asks at this turn: every port of each address, then again.
fn source(addresses: &[Ipv4Addr], turn: u64) -> (Ipv4Addr, u16) {
    let ports = u64::from(u16::MAX - PORT_MIN) + 1;
    // Both are in range by the remainder.
    let port = PORT_MIN + (turn % ports) as u16;
    let address = addresses[((turn / ports) % addresses.len() as u64) as usize];
    (address, port)
}

fn connect_once(from: SockaddrIn, to: &SockaddrIn) -> Result<()> {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .context("a socket")?;
    let reset_at_once = nix::libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&socket, sockopt::Linger, &reset_at_once).context("SO_LINGER")?;
    bind(socket.as_raw_fd(), &from).with_context(|| format!("binding to {from}"))?;
    connect(socket.as_raw_fd(), to).with_context(|| format!("connecting from {from}"))
}

fn round_trips(to: SocketAddrV4, time: Duration) -> Result<Sample> {
    let mut stream = TcpStream::connect(to).context("connecting")?;
    stream.set_nodelay(true)?;
    let (begun, mut count) = (Instant::now(), 0);
    let mut byte = [7];
    loop {
        for _ in 0..STRIDE {
            stream.write_all(&byte)?;
            stream.read_exact(&mut byte)?;
        }
        count += STRIDE;
        let took = begun.elapsed();
        if took >= time {
            return Ok(Sample {
                count,
                time: took,
                lost: 0,
            });
        }
    }
}

fn bytes(to: SocketAddrV4, time: Duration) -> Result<Sample> {
    let mut stream = TcpStream::connect(to).context("connecting")?;
    let chunk = vec![7; CHUNK];
    let (begun, mut sent) = (Instant::now(), 0);
    while begun.elapsed() < time {
        stream.write_all(&chunk)?;
        sent += CHUNK as u64;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut count = [0; 8];
    stream.read_exact(&mut count)?;
    let took = begun.elapsed();
    ensure!(u64::from_be_bytes(count) == sent, "bytes were lost");
    Ok(Sample {
        count: sent,
        time: took,
        lost: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_port_of_every_address_has_its_turn() {
        let addresses = [Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2)];
        assert_eq!(source(&addresses, 0), (addresses[0], 1024));
        assert_eq!(source(&addresses, 64_511), (addresses[0], 65_535));
        assert_eq!(source(&addresses, 64_512), (addresses[1], 1024));
        assert_eq!(source(&addresses, 2 * 64_512), (addresses[0], 1024));
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(vec![]).is_nan());
    }

    #[test]
    fn requests_are_read_as_written() {
        let to: SocketAddrV4 = "10.0.0.1:80".parse().unwrap();
        assert_eq!(
            request("bytes 10.0.0.1:80 5"),
            Some(("bytes", to, Duration::from_nanos(5)))
        );
        assert_eq!(request("bytes 10.0.0.1:80"), None);
    }
}
