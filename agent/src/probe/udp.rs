//! Probes as UDP datagrams: their bytes, a responder on the node's router addresses, and the socket that probes leave from.
//!
//! Invariants: an answer is exactly as long as its question, and only our own questions are answered, so that the
//! responder amplifies nothing; answers are never answered, so two responders cannot start a loop.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use tokio::net::UdpSocket;

/// Length of every datagram.
pub const LEN: usize = 24;
const MAGIC: [u8; 8] = *b"isthmus1";
const QUESTION: u8 = 1;
const ANSWER: u8 = 2;

/// Bytes of a question.
pub fn question(nonce: u64) -> [u8; LEN] {
    message(QUESTION, nonce)
}

/// The answer to `datagram`, if it is a question.
pub fn answer_to(datagram: &[u8]) -> Option<[u8; LEN]> {
    parse(datagram, QUESTION).map(|nonce| message(ANSWER, nonce))
}

/// The nonce in `datagram`, if it is an answer.
pub fn answered(datagram: &[u8]) -> Option<u64> {
    parse(datagram, ANSWER)
}

fn message(kind: u8, nonce: u64) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8] = kind;
    bytes[16..].copy_from_slice(&nonce.to_be_bytes());
    bytes
}

fn parse(datagram: &[u8], kind: u8) -> Option<u64> {
    let bytes: &[u8; LEN] = datagram.try_into().ok()?;
    let (head, nonce) = bytes.split_at(16);
    let known = head[..8] == MAGIC && head[8] == kind && head[9..].iter().all(|byte| *byte == 0);
    known
        .then(|| nonce.try_into().ok().map(u64::from_be_bytes))
        .flatten()
}

/// Both sockets of one address family, on the same router address.
#[derive(Debug)]
pub struct ProbeSockets {
    responder: UdpSocket,
    prober: UdpSocket,
}

/// What arrived.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Answer {
    /// From which address.
    pub from: IpAddr,
    /// Its number.
    pub nonce: u64,
}

impl ProbeSockets {
    /// Binds both to `router_ip`, the responder to `port`.
    pub async fn bind(router_ip: IpAddr, port: u16) -> io::Result<Self> {
        let sockets = Self {
            responder: UdpSocket::bind(SocketAddr::new(router_ip, port)).await?,
            prober: UdpSocket::bind(SocketAddr::new(router_ip, 0)).await?,
        };
        // Until it was seen once that a socket can be written to, tokio would refuse to.
        sockets.responder.writable().await?;
        sockets.prober.writable().await?;
        Ok(sockets)
    }

    /// Sends a question. Never waits: a full socket buffer is a lost probe.
    pub fn ask(&self, to: SocketAddr, nonce: u64) -> io::Result<()> {
        self.prober.try_send_to(&question(nonce), to).map(|_| ())
    }

    /// Answers questions until one of our own is answered; returns that. May be dropped and called again.
    pub async fn next_answer(&self) -> Answer {
        let (mut incoming, mut answers) = ([0; LEN + 1], [0; LEN + 1]);
        loop {
            tokio::select! {
                received = self.responder.recv_from(&mut incoming) => {
                    // Errors here are ICMP answers to what we sent before; the next datagram is none the worse.
                    if let Ok((len, from)) = received
                        && let Some(answer) = incoming.get(..len).and_then(answer_to)
                    {
                        let _ = self.responder.try_send_to(&answer, from);
                    }
                }
                received = self.prober.recv_from(&mut answers) => {
                    if let Ok((len, from)) = received
                        && let Some(nonce) = answers.get(..len).and_then(answered)
                    {
                        return Answer { from: from.ip(), nonce };
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn only_questions_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..40), nonce: u64) {
            prop_assert_eq!(answer_to(&bytes), None);
            let answer = answer_to(&question(nonce)).unwrap();
            prop_assert_eq!(answered(&answer), Some(nonce));
            prop_assert_eq!(answer_to(&answer), None);
            prop_assert_eq!(answered(&question(nonce)), None);
        }
    }

    #[tokio::test]
    async fn two_agents_answer_each_other() {
        let (one, two) = (IpAddr::from([127, 0, 0, 1]), IpAddr::from([127, 0, 0, 2]));
        let one = ProbeSockets::bind(one, 0).await.unwrap();
        let two = ProbeSockets::bind(two, 0).await.unwrap();
        let to = two.responder.local_addr().unwrap();
        one.ask(to, 42).unwrap();
        let answer = tokio::select! {
            answer = one.next_answer() => answer,
            _ = two.next_answer() => panic!("nobody answers the second"),
        };
        assert_eq!(
            answer,
            Answer {
                from: to.ip(),
                nonce: 42
            }
        );
    }
}
