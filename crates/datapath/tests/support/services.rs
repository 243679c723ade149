//! Services in maps, and servers that answer with their name.
#![allow(dead_code, reason = "each test target uses some of it")]

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use isthmus_bpf_abi::{Address, Backend, PROTO_TCP, PROTO_UDP, ServiceKey, ServiceValue, backend_state};
use isthmus_datapath::{Datapath, MapOp};

use crate::lab::address;

/// What one service takes in the maps, in the planner's order: backends, slots, frontend.
pub fn service_ops(id: u32, vip: &str, proto: u8, backends: &[(u32, &str)]) -> Vec<MapOp> {
    let vip: SocketAddr = vip.parse().expect("frontend");
    let frontend = ServiceKey::frontend(address(&vip.ip().to_string()), vip.port(), proto);
    let mut ops: Vec<MapOp> = backends
        .iter()
        .map(|(id, socket)| MapOp::BackendPut(*id, backend(socket, proto)))
        .collect();
    ops.extend(backends.iter().enumerate().map(|(index, (backend, _))| {
        MapOp::ServicePut(
            frontend.at_slot(index as u16 + 1),
            ServiceValue::slot(id, *backend),
        )
    }));
    ops.push(MapOp::ServicePut(
        frontend,
        ServiceValue::frontend(id, backends.len() as u16, 0),
    ));
    ops
}

/// A backend's entry.
pub fn backend(socket: &str, proto: u8) -> Backend {
    let socket: SocketAddr = socket.parse().expect("backend");
    let address: Address = address(&socket.ip().to_string());
    Backend {
        address,
        port: socket.port().to_be_bytes(),
        proto,
        state: backend_state::ACTIVE,
        cluster_id: 1,
        zone: 0,
        pad: 0,
    }
}

/// Puts a service into the maps, for TCP and UDP.
pub fn put_service(datapath: &Datapath, id: u32, vip: &str, backends: &[(u32, &str)]) {
    for (number, proto) in [PROTO_TCP, PROTO_UDP].into_iter().enumerate() {
        // Each protocol has backends of its own, as services have.
        let own: Vec<_> = backends
            .iter()
            .map(|(id, socket)| (id * 2 + number as u32, *socket))
            .collect();
        let report = datapath.apply(&service_ops(id * 2 + number as u32, vip, proto, &own));
        assert!(report.is_complete(), "{:?}", report.failed);
    }
}

/// Answers each TCP connection and datagram at `socket` with `name`, then (TCP) echoes. Ends with the process: the
/// sockets live in a namespace of the test.
pub fn serve(socket: &str, name: &'static str) {
    let tcp = TcpListener::bind(socket).expect("TCP socket");
    thread::spawn(move || {
        for connection in tcp.incoming() {
            let Ok(mut connection) = connection else { return };
            thread::spawn(move || {
                let mut buffer = [0; 1024];
                let _ = connection.write_all(name.as_bytes());
                while let Ok(length @ 1..) = connection.read(&mut buffer) {
                    let _ = connection.write_all(&buffer[..length]);
                }
            });
        }
    });
    let udp = UdpSocket::bind(socket).expect("UDP socket");
    thread::spawn(move || {
        let mut buffer = [0; 1024];
        while let Ok((_, from)) = udp.recv_from(&mut buffer) {
            let _ = udp.send_to(name.as_bytes(), from);
        }
    });
}

/// Connects and returns the connection and the server's name.
pub fn connect(to: &str) -> std::io::Result<(TcpStream, String)> {
    let to: SocketAddr = to.parse().expect("address");
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut buffer = [0; 64];
    let length = stream.read(&mut buffer)?;
    Ok((stream, String::from_utf8_lossy(&buffer[..length]).into_owned()))
}

/// Sends one byte and expects it back.
pub fn echo(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(b"x")?;
    let mut byte = [0];
    stream.read_exact(&mut byte)
}

/// A UDP socket that gives up waiting after a while.
pub fn udp(bind: &str) -> UdpSocket {
    let socket = UdpSocket::bind(bind).expect("UDP socket");
    socket
        .set_read_timeout(Some(Duration::from_secs(5)))
        .expect("timeout");
    socket
}

/// What comes, and from where.
pub fn receive(socket: &UdpSocket) -> (String, SocketAddr) {
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer).expect("an answer");
    (String::from_utf8_lossy(&buffer[..length]).into_owned(), from)
}
