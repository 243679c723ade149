//! The peers: kube-proxy's rules for iptables and for nftables, as kube-proxy 1.33 writes them, in a namespace.
//!
//! In: services. Out: what is fed to `iptables-restore` or `nft -f`, and how long they took. Rules for IPv4 and TCP, with the pods'
//! CIDR known (`--cluster-cidr`), node ports on but none used.

pub mod iptables;
pub mod nftables;

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    time::{Duration, Instant},
};

use anyhow::Result;

pub use self::{iptables::Iptables, nftables::Nftables};
use crate::lab;

/// Feeds `input` to a command in a namespace, and says how long it took.
fn feed(namespace: &str, command: &[&str], input: &str) -> Result<Duration> {
    let mut whole = vec!["ip", "netns", "exec", namespace];
    whole.extend(command);
    let begun = Instant::now();
    lab::feed(&whole, input)?;
    Ok(begun.elapsed())
}

/// Letters and digits that stand for `what` in names of chains, as many as `length` (at most 24).
fn hash(what: &impl Hash, length: usize) -> String {
    let mut text = String::new();
    for part in 0..2_u8 {
        let mut hasher = DefaultHasher::new();
        (part, what).hash(&mut hasher);
        let number = hasher.finish();
        text.extend(
            (0..12).map(|at| {
                char::from(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"[(number >> (5 * at)) as usize & 31])
            }),
        );
    }
    text.truncate(length);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_their_length_and_differ() {
        assert_eq!(hash(&1, 16).len(), 16);
        assert_eq!(hash(&1, 8), hash(&1, 16)[..8]);
        assert_ne!(hash(&1, 16), hash(&2, 16));
    }
}
