//! The conntrack table: its sweep (what is over goes, in bounded steps, and nothing else), and what happens when it is full.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use isthmus_bpf_abi::{
    CtKey, CtValue, DropReason, PROTO_TCP, PROTO_UDP, TCP_ACK, TCP_SYN, ct_flag, ct_state, ipv4_mapped, maps,
};
use isthmus_datapath::{
    Tables,
    conntrack::{self, Sweep},
    map::BATCH_ENTRIES_MAX,
};

#[path = "support/frames.rs"]
mod frames;
#[path = "support/lab.rs"]
mod lab;
#[path = "support/pair.rs"]
mod pair;
#[path = "support/services.rs"]
mod services;
#[path = "support/transport.rs"]
mod transport;

use pair::{LOCAL, Node, OTHER, POD, REDIRECT, REMOTE, VIP};
use transport::{ends, read, tcp};

const ENTRIES: u32 = 20_000;
const NOW: u32 = 100_000;

fn key(number: u32) -> CtKey {
    let [_, a, b, c] = number.to_be_bytes();
    CtKey {
        source: ipv4_mapped([10, a, b, c]),
        destination: ipv4_mapped([10, 96, 0, 1]),
        source_port: [0x90, 0],
        destination_port: [0, 53],
        proto: if number.is_multiple_of(2) {
            PROTO_UDP
        } else {
            PROTO_TCP
        },
        pad: [0; 3],
    }
}

fn value(last_seen: u32) -> CtValue {
    CtValue {
        nat_address: ipv4_mapped([10, 1, 0, 5]),
        nat_port: [0, 53],
        state: ct_state::ESTABLISHED,
        flags: ct_flag::REVERSE,
        last_seen,
        backend_id: 1,
        service_id: 1,
        peer_address: [0; 16],
        peer_port: [0; 2],
        pad: [0; 2],
        ifindex: 0,
    }
}

/// Every fourth entry is a UDP flow that has been silent for 61 seconds; TCP flows may be silent longer.
#[test]
fn a_sweep_removes_what_is_over_in_bounded_steps() {
    let tables = Tables::create().unwrap();
    let keys: Vec<_> = (0..ENTRIES).map(key).collect();
    let age = |number: u32| if number % 4 < 2 { 61 } else { 60 };
    let values: Vec<_> = (0..ENTRIES).map(|number| value(NOW - age(number))).collect();
    assert!(tables.ct.put_batch(&keys, &values).is_empty());
    let mut sweep = Sweep::default();
    let mut steps = 0;
    while !sweep.is_over() {
        let before = sweep.seen;
        sweep.step(&tables, NOW).unwrap();
        assert!(
            sweep.seen - before <= 2 * BATCH_ENTRIES_MAX,
            "a step of {}",
            sweep.seen - before
        );
        steps += 1;
    }
    assert!(steps > 2, "{steps}");
    assert_eq!(
        (sweep.seen, sweep.removed),
        (ENTRIES as usize, ENTRIES as usize / 4)
    );
    let left = tables.ct.dump().unwrap();
    assert_eq!(left.len(), sweep.left());
    assert_eq!(conntrack::expired(&left, NOW), []);
    // A second sweep finds nothing to do; an empty table is one step.
    let mut again = Sweep::default();
    while !again.is_over() {
        again.step(&tables, NOW).unwrap();
    }
    assert_eq!((again.removed, again.seen), (0, sweep.left()));
    assert!(tables.ct.delete_batch(&keys).is_empty());
    let mut empty = Sweep::default();
    empty.step(&tables, NOW).unwrap();
    assert!(empty.is_over() && empty.seen == 0);
}

#[test]
fn a_clock_that_the_programs_read_later_removes_nothing() {
    let tables = Tables::create().unwrap();
    tables.ct.put(&key(2), &value(NOW + 1)).unwrap();
    let mut sweep = Sweep::default();
    sweep.step(&tables, NOW).unwrap();
    assert_eq!((sweep.seen, sweep.removed), (1, 0));
}

/// More flows than fit: the oldest entries make room, new flows go through, and an open one finds its backend again.
#[test]
fn a_full_table_breaks_no_flow() {
    Node::check(|node| {
        node.service(1, VIP[0], PROTO_TCP, &[LOCAL[0], REMOTE[0]]);
        let open: Vec<_> = (0..32)
            .map(|port| {
                let asked = ends(&format!("10.1.0.5:{}", 30_000 + port), VIP[0]);
                node.expect(
                    0,
                    &tcp(POD, asked, TCP_SYN, b""),
                    REDIRECT,
                    DropReason::Translated,
                );
                let out = node.send(0, &tcp(POD, asked, TCP_ACK, b"")).1;
                (asked, read(&out).ends)
            })
            .collect();
        let ct = &node.datapath.tables().ct;
        let keys: Vec<_> = (0..maps::CT_MAX * 3 / 2).map(key).collect();
        let values = vec![value(NOW); keys.len()];
        assert!(ct.put_batch(&keys, &values).is_empty());
        let len = ct.dump().unwrap().len() as u32;
        assert!((maps::CT_MAX / 2..=maps::CT_MAX).contains(&len), "{len}");
        // Whom the kernel spares is its own choice; these it has not.
        for (asked, reached) in open.iter().step_by(2) {
            ct.delete(&pair::key(*asked, PROTO_TCP)).unwrap();
            ct.delete(&pair::key(reached.back(), PROTO_TCP)).unwrap();
        }
        for (asked, reached) in open {
            let data = tcp(POD, asked, TCP_ACK, b"data");
            let out = node.expect(0, &data, REDIRECT, DropReason::Translated);
            assert_eq!(read(&out).ends, reached);
            if reached.destination == transport::end(LOCAL[0]) {
                let answer = tcp(OTHER, reached.back(), TCP_ACK, b"data");
                let out = node.expect(1, &answer, REDIRECT, DropReason::Translated);
                assert_eq!(read(&out).ends, asked.back());
            }
        }
        let asked = ends("10.1.0.5:20000", VIP[0]);
        node.expect(
            0,
            &tcp(POD, asked, TCP_SYN, b""),
            REDIRECT,
            DropReason::Translated,
        );
    });
}
