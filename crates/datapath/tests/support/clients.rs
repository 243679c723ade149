//! Clients of services with real sockets, and much data both ways.
#![allow(dead_code, reason = "each test target uses some of it")]

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread::{self, JoinHandle},
    time::Duration,
};

/// How long an answer may take.
pub const TIMEOUT: Option<Duration> = Some(Duration::from_secs(60));
/// Bytes of a stream that needs many packets.
const STREAM: usize = 1 << 20;
/// Bytes of a datagram that needs fragments.
const DATAGRAM: usize = 5_000;

/// A socket that talks to `vip` alone.
pub fn udp_to(vip: &str) -> UdpSocket {
    let vip: SocketAddr = vip.parse().expect("address:port");
    let socket = UdpSocket::bind(if vip.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" }).expect("a socket");
    socket.set_read_timeout(TIMEOUT).expect("a timeout");
    socket.connect(vip).expect("a peer");
    socket
}

/// Both protocols hear at once that nobody is there.
pub fn is_refused(vip: &str) {
    let refused = TcpStream::connect(vip).expect_err("nobody listens");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{vip}");
    let socket = udp_to(vip);
    socket.send(b"?").expect("sent");
    let refused = socket.recv(&mut [0; 8]).expect_err("nobody listens");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{vip}");
}

/// Listens in the calling thread's namespace for one stream and then one datagram, and sends each back whole.
pub fn serve_bulk(target: &str) -> JoinHandle<()> {
    let listener = TcpListener::bind(target).expect("a listener");
    let datagrams = UdpSocket::bind(target).expect("a socket");
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        let mut received = vec![];
        stream.read_to_end(&mut received).expect("a stream");
        stream.write_all(&received).expect("sent");
        drop(stream);
        let mut datagram = vec![0; 65_536];
        let (length, from) = datagrams.recv_from(&mut datagram).expect("a datagram");
        datagrams.send_to(&datagram[..length], from).expect("sent");
    })
}

/// Sends [`serve_bulk`] what it waits for and compares what comes back. The datagram is larger than any packet here: fragments
/// both ways.
pub fn send_bulk(vip: &str) {
    let mut stream = TcpStream::connect(vip).expect("a connection");
    stream.set_read_timeout(TIMEOUT).expect("a timeout");
    let bulk: Vec<u8> = (0..STREAM).map(|at| (at * 7 / 3) as u8).collect();
    stream.write_all(&bulk).expect("sent");
    stream.shutdown(Shutdown::Write).expect("an end");
    let mut back = vec![];
    stream.read_to_end(&mut back).expect("a stream");
    assert!(back == bulk, "the same bytes");
    let socket = udp_to(vip);
    socket.send(&bulk[..DATAGRAM]).expect("sent");
    let mut datagram = [0; 65_536];
    let length = socket.recv(&mut datagram).expect("a datagram");
    assert!(datagram[..length] == bulk[..DATAGRAM], "{length} bytes");
}
