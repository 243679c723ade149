//! Life of an entry, its pair, and the spread of flows.

extern crate std;

use super::*;
use crate::{PROTO_UDP, ipv4_mapped, pick_slot};

fn key() -> CtKey {
    CtKey {
        source: ipv4_mapped([10, 1, 0, 5]),
        destination: ipv4_mapped([10, 96, 0, 10]),
        source_port: [0x90, 1],
        destination_port: [0, 80],
        proto: PROTO_TCP,
        pad: [0; 3],
    }
}

fn value() -> CtValue {
    CtValue {
        nat_address: ipv4_mapped([10, 2, 0, 5]),
        nat_port: [0x1f, 0x90],
        state: ct_state::OPENING,
        flags: 0,
        last_seen: 100,
        backend_id: 7,
        service_id: 3,
        peer_address: [0; 16],
        peer_port: [0; 2],
        pad: [0; 2],
        ifindex: 2,
    }
}

fn pair_of(key: &CtKey, value: &CtValue) -> (CtKey, CtValue) {
    let (mut pair_key, mut pair) = (*key, *value);
    ct_pair(key, value, &mut pair_key, &mut pair);
    (pair_key, pair)
}

#[test]
fn the_pair_of_a_pair_is_the_entry() {
    let (reverse, back) = pair_of(&key(), &value());
    assert_eq!(
        (reverse.source, reverse.source_port),
        (value().nat_address, value().nat_port)
    );
    assert_eq!(
        (reverse.destination, reverse.destination_port),
        (key().source, key().source_port)
    );
    assert_eq!(
        (back.nat_address, back.nat_port, back.flags),
        (key().destination, key().destination_port, ct_flag::REVERSE)
    );
    assert_eq!(pair_of(&reverse, &back), (key(), value()));
}

#[test]
fn a_pod_that_is_its_own_backend_talks_to_the_loopback_address() {
    let mut six = [0; 16];
    (six[0], six[15]) = (0xfd, 5);
    for (pod, loopback) in [(key().source, LOOPBACK_IPV4), (six, LOOPBACK_IPV6)] {
        let key = CtKey { source: pod, ..key() };
        let value = CtValue {
            nat_address: pod,
            flags: ct_flag::HAIRPIN,
            ..value()
        };
        let (reverse, back) = pair_of(&key, &value);
        assert_eq!((reverse.source, reverse.destination), (pod, loopback));
        assert_eq!(pair_of(&reverse, &back), (key, value));
    }
}

#[test]
fn a_flow_with_both_sides_replaced_finds_its_pair() {
    let peer = ipv4_mapped([10, 1, 0, 1]);
    let to_a_service = CtValue {
        flags: ct_flag::SNAT,
        peer_address: peer,
        peer_port: [4, 1],
        ..value()
    };
    let masqueraded = CtValue {
        nat_address: key().destination,
        nat_port: key().destination_port,
        ..to_a_service
    };
    for value in [to_a_service, masqueraded] {
        let (reverse, back) = pair_of(&key(), &value);
        assert_eq!(
            (reverse.source, reverse.destination, reverse.destination_port),
            (value.nat_address, peer, [4, 1])
        );
        assert_eq!(
            (back.nat_address, back.peer_address, back.peer_port),
            (key().destination, key().source, key().source_port)
        );
        assert_eq!(back.flags, ct_flag::SNAT | ct_flag::REVERSE);
        assert_eq!(pair_of(&reverse, &back), (key(), value));
    }
}

#[test]
fn ports_are_tried_all_over_their_range_and_never_beyond() {
    for (min, max) in [(1_024, 29_999), (1, u16::MAX), (7, 7)] {
        let mut seen = [false; 65_536];
        for hash in 0..400_000_u32 {
            let port = u16::from_be_bytes(snat_port(hash.wrapping_mul(2_654_435_761), 0, min, max));
            assert!((min..=max).contains(&port), "{port}");
            seen[usize::from(port)] = true;
        }
        let missed = (min..=max).filter(|port| !seen[usize::from(*port)]).count();
        assert!(missed * 50 <= usize::from(max - min), "{missed} of {min}..={max}");
    }
    let tries: std::collections::BTreeSet<_> = (0..SNAT_TRIES_MAX)
        .map(|attempt| snat_port(12_345, attempt, 1_024, 29_999))
        .collect();
    assert_eq!(tries.len(), SNAT_TRIES_MAX as usize);
}

/// Plays packets (from the client or not, TCP flags) to a flow; returns the state after each.
fn play<const N: usize>(packets: [(bool, u8); N]) -> [u8; N] {
    let mut now = (ct_state::OPENING, 0);
    packets.map(|(from_client, tcp_flags)| {
        let direction = if from_client { 0 } else { ct_flag::REVERSE };
        let (state, flags) = ct_step(PROTO_TCP, now.0, now.1 | direction, tcp_flags);
        now = (state, flags & !ct_flag::REVERSE);
        state
    })
}

#[test]
fn a_tcp_flow_opens_talks_and_closes() {
    use ct_state::*;
    const PSH_ACK: u8 = TCP_ACK | 8;
    assert_eq!(
        play([
            (true, TCP_SYN),
            (false, TCP_SYN | TCP_ACK),
            (true, TCP_ACK),
            (false, PSH_ACK),
            (true, TCP_FIN | TCP_ACK),
            (false, PSH_ACK),
            (false, TCP_FIN | TCP_ACK),
            (true, TCP_ACK),
            (true, TCP_SYN),
            (false, TCP_SYN | TCP_ACK),
            (true, PSH_ACK),
        ]),
        [
            OPENING,
            OPENING,
            ESTABLISHED,
            ESTABLISHED,
            ESTABLISHED,
            ESTABLISHED,
            CLOSING,
            CLOSING,
            OPENING,
            OPENING,
            ESTABLISHED
        ]
    );
    assert_eq!(play([(true, TCP_SYN), (false, TCP_RST | TCP_ACK)])[1], CLOSING);
}

#[test]
fn an_entry_is_over_after_its_silence_and_not_before() {
    let limits = [
        (PROTO_TCP, ct_state::OPENING, 60),
        (PROTO_TCP, ct_state::ESTABLISHED, 8000),
        (PROTO_TCP, ct_state::CLOSING, 10),
        (PROTO_UDP, ct_state::OPENING, 60),
        (PROTO_UDP, ct_state::ESTABLISHED, 60),
    ];
    for (proto, state, seconds) in limits {
        let key = CtKey { proto, ..key() };
        for last_seen in [100, u32::MAX - 5] {
            let value = CtValue {
                state,
                last_seen,
                ..value()
            };
            let at = |after: u32| ct_is_expired(&key, &value, last_seen.wrapping_add(after));
            assert_eq!(
                (at(0), at(seconds), at(seconds + 1)),
                (false, false, true),
                "{proto} {state}"
            );
            assert!(!at(u32::MAX), "a clock that was read a second ago");
        }
    }
}

#[test]
fn flows_spread_over_slots_and_every_field_counts() {
    let mut seen = [0_u32; 8];
    for port in 0..8_000_u16 {
        let key = CtKey {
            source_port: port.to_be_bytes(),
            ..key()
        };
        seen[pick_slot(tuple_hash(&key), 8) as usize - 1] += 1;
    }
    assert!(seen.iter().all(|&hits| (850..1150).contains(&hits)), "{seen:?}");
    let others = [
        CtKey {
            source: key().destination,
            ..key()
        },
        CtKey {
            destination: key().source,
            ..key()
        },
        CtKey {
            destination_port: [0, 81],
            ..key()
        },
        CtKey {
            proto: PROTO_UDP,
            ..key()
        },
    ];
    for other in others {
        assert_ne!(tuple_hash(&other), tuple_hash(&key()), "{other:?}");
    }
    // Nodes must agree, today's with tomorrow's.
    assert_eq!(tuple_hash(&key()), TUPLE_HASH);
}

const TUPLE_HASH: u32 = 3_225_552_874;
