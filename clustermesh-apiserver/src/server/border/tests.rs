//! The border's decisions under any order of steps, and its bounds.

use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::*;
use crate::server::bucket::Rate;

fn limits() -> ServerLimits {
    ServerLimits {
        connections: 12,
        connections_per_client: 5,
        connection_rate: Rate {
            per_second: 100,
            burst: 20,
        },
        connection_rate_per_address: Rate {
            per_second: 10,
            burst: 4,
        },
        client_list_keys: Rate {
            per_second: 1000,
            burst: 5000,
        },
        pending_bytes: 100,
        pending_bytes_in_all: 1000,
        stall_timeout: Duration::from_secs(60),
        ..ServerLimits::default()
    }
}

#[derive(Clone, Debug)]
enum Step {
    Knock(u8),
    Enter(u8),
    Leave(u8),
    List(u8, u64),
}

fn step() -> impl Strategy<Value = (u64, Step)> {
    let step = prop_oneof![
        (0u8..4).prop_map(Step::Knock),
        (0u8..4).prop_map(Step::Enter),
        (0u8..4).prop_map(Step::Leave),
        (0u8..4, 0u64..4000).prop_map(|(client, keys)| Step::List(client, keys)),
    ];
    (0u64..200, step)
}

proptest! {
    #[test]
    fn the_books_agree_with_what_happened(steps in proptest::collection::vec(step(), 1..200)) {
        let (limits, mut border, mut now) = (limits(), Border::default(), Duration::ZERO);
        let mut open = [0usize; 4];
        let mut knocks: Vec<(Duration, u8)> = vec![];
        for (gap, step) in steps {
            now += Duration::from_millis(gap);
            let total: usize = open.iter().sum();
            match step {
                Step::Knock(from) => {
                    let knock = border.knock(IpAddr::V4(Ipv4Addr::new(127, 0, 0, from)), &limits, now);
                    if total >= limits.connections {
                        prop_assert_eq!(knock, Knock::Refuse(Reason::Connections));
                    } else if knock != Knock::Refuse(Reason::ConnectionRate) {
                        knocks.push((now, from));
                    }
                }
                Step::Enter(client) => {
                    let entered = border.enter(&client.to_string(), &limits, now).map(|_| ());
                    let want = if total >= limits.connections {
                        Err(Reason::Connections)
                    } else if open[client as usize] >= limits.connections_per_client {
                        Err(Reason::ClientConnections)
                    } else {
                        open[client as usize] += 1;
                        Ok(())
                    };
                    prop_assert_eq!(entered, want);
                }
                Step::Leave(client) if open[client as usize] > 0 => {
                    open[client as usize] -= 1;
                    border.leave(&client.to_string(), now);
                }
                Step::List(client, keys) if open[client as usize] > 0 => {
                    let name = client.to_string();
                    let before = border.list_wait(&name, &limits, now);
                    border.listed(&name, keys, &limits, now);
                    prop_assert!(border.list_wait(&name, &limits, now) >= before);
                    let others = (0..4).filter(|other| *other != client);
                    // Nobody pays for another.
                    for other in others {
                        let mut alone = border.list_wait(&other.to_string(), &limits, now);
                        border.listed(&other.to_string(), 0, &limits, now);
                        alone = border.list_wait(&other.to_string(), &limits, now).saturating_sub(alone);
                        prop_assert_eq!(alone, Duration::ZERO);
                    }
                }
                _ => {}
            }
            prop_assert_eq!(border.connections(), open.iter().sum::<usize>());
        }
        for from in 0..4 {
            let times: Vec<_> = knocks.iter().filter(|(_, other)| *other == from).map(|(at, _)| *at).collect();
            for pair in times.windows(5) {
                prop_assert!(pair[4] - pair[0] >= Duration::from_millis(99), "five at once: {pair:?}");
            }
        }
        // When everybody has gone and the time is long enough, nothing is left.
        for (client, count) in open.into_iter().enumerate() {
            (0..count).for_each(|_| border.leave(&client.to_string(), now + Duration::from_secs(10_000)));
        }
        prop_assert_eq!(border.connections(), 0);
    }

    #[test]
    fn what_is_closed_is_what_stands_still_and_no_more_than_needed(
        connections in proptest::collection::vec((0usize..400, 0u64..120), 0..40),
    ) {
        let (limits, settled) = (limits(), Duration::from_secs(2));
        let all: Vec<_> = connections.iter().enumerate()
            .map(|(id, (pending, still))| (id, *pending, Duration::from_secs(*still)))
            .collect();
        let closed = to_close(all.clone(), &limits, settled);
        let is_closed = |id: &usize| closed.contains(id);
        for (id, pending, still) in &all {
            let stalled = *pending >= limits.pending_bytes && *still >= limits.stall_timeout;
            prop_assert!(!stalled || is_closed(id));
            prop_assert!(!is_closed(id) || (*pending > 0 && (stalled || *still >= settled)));
        }
        let left: usize = all.iter().filter(|(id, ..)| !is_closed(id)).map(|(_, pending, _)| pending).sum();
        let moving = all.iter().filter(|(id, _, still)| !is_closed(id) && *still >= settled).any(|(_, pending, _)| *pending > 0);
        prop_assert!(left <= limits.pending_bytes_in_all || !moving, "{left} bytes are left");
        // The last one was closed with a reason: without it there would be too much.
        if let Some((_, pending, still)) = closed.last().map(|id| all[*id]) {
            let stalled = pending >= limits.pending_bytes && still >= limits.stall_timeout;
            prop_assert!(stalled || left + pending > limits.pending_bytes_in_all);
        }
    }

    #[test]
    fn one_line_an_interval_and_none_forgotten(gaps in proptest::collection::vec(0u64..4_000, 1..100)) {
        let mut gate = LogGate::new(Duration::from_secs(5));
        let (mut now, mut lines, mut counted) = (Duration::ZERO, vec![], 0);
        for gap in &gaps {
            now += Duration::from_millis(*gap);
            if let Some(left_out) = gate.ask("a", now) {
                lines.push(now);
                counted += left_out + 1;
            }
        }
        prop_assert!(lines.windows(2).all(|pair| pair[1] - pair[0] >= Duration::from_secs(5)));
        let waiting = gate.last["a"].1;
        prop_assert_eq!(counted + waiting, gaps.len() as u64);
    }
}

#[test]
fn addresses_without_end_do_not_fill_the_books() {
    let (limits, mut border) = (limits(), Border::default());
    for number in 0..40_000u32 {
        let address = IpAddr::V4(Ipv4Addr::from(number));
        border.knock(address, &limits, Duration::from_micros(u64::from(number)));
    }
    assert!(border.addresses.len() <= ADDRESSES_MAX);
}

#[test]
fn a_client_that_comes_back_still_owes_what_it_owed() {
    let (limits, mut border) = (limits(), Border::default());
    let now = Duration::from_secs(1);
    border.enter("a", &limits, now).unwrap();
    border.listed("a", 7000, &limits, now);
    border.leave("a", now);
    border.enter("a", &limits, now).unwrap();
    assert_eq!(border.list_wait("a", &limits, now), Duration::from_secs(2));
    assert_eq!(border.list_wait("b", &limits, now), Duration::ZERO);
}

#[test]
fn places_are_taken_once() {
    let count = AtomicUsize::new(0);
    assert!(take_place(&count, 2) && take_place(&count, 2) && !take_place(&count, 2));
    assert_eq!(count.load(Ordering::Relaxed), 2);
}
