//! Address management: which address of a pod CIDR a new endpoint gets.
//!
//! In: the CIDR, the addresses in use. Out: addresses. Pure; one [`Pool`] a family.
//!
//! Invariants: an address is handed out to one endpoint at a time; network, broadcast and router address never are;
//! of the free addresses the one that was in use the longest time ago goes next, so that peers' caches and half-closed
//! connections of its former owner have run out. Memory is bounded: at most [`Pool::ADDRESSES_MAX`] addresses of a
//! CIDR are used (an IPv6 /64 has more than a node can have pods).

use std::{
    collections::{BTreeSet, VecDeque},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;

/// The free and used addresses of one pod CIDR.
#[derive(Clone, Debug)]
pub struct Pool {
    cidr: IpNet,
    /// Offsets from the network address, in the order in which they will be handed out.
    free: VecDeque<u32>,
    used: BTreeSet<u32>,
    size: u32,
}

impl Pool {
    /// Most addresses of a CIDR that are handed out at the same time.
    pub const ADDRESSES_MAX: u32 = 65_533;
    /// Offset of the first address after the network's and the router's.
    const FIRST: u32 = 2;

    /// A pool of `cidr` where `used` are taken (those outside it are ignored) and handing out goes on after `last`.
    pub fn new(cidr: IpNet, used: impl IntoIterator<Item = IpAddr>, last: Option<IpAddr>) -> Self {
        let cidr = cidr.trunc();
        let size = usable(cidr);
        let offset_of = |ip: IpAddr| offset(cidr, ip).filter(|offset| in_pool(*offset, size));
        let used: BTreeSet<u32> = used.into_iter().filter_map(offset_of).collect();
        let start = last
            .and_then(offset_of)
            .map_or(0, |offset| offset - Self::FIRST + 1);
        let free = (0..size)
            .map(|step| (start + step) % size + Self::FIRST)
            .filter(|offset| !used.contains(offset))
            .collect();
        Self {
            cidr,
            free,
            used,
            size,
        }
    }

    /// The CIDR.
    pub fn cidr(&self) -> IpNet {
        self.cidr
    }

    /// How many addresses can still be handed out.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// How many are handed out.
    pub fn used(&self) -> usize {
        self.used.len()
    }

    /// Takes the next address. `None`: all are in use.
    pub fn allocate(&mut self) -> Option<IpAddr> {
        let offset = self.free.pop_front()?;
        self.used.insert(offset);
        Some(address(self.cidr, offset))
    }

    /// Gives an address back; it will be handed out after all that are free now. False if it was not in use here.
    pub fn release(&mut self, ip: IpAddr) -> bool {
        let Some(offset) = offset(self.cidr, ip).filter(|offset| in_pool(*offset, self.size)) else {
            return false;
        };
        let was_used = self.used.remove(&offset);
        if was_used {
            self.free.push_back(offset);
        }
        was_used
    }
}

fn in_pool(offset: u32, size: u32) -> bool {
    offset >= Pool::FIRST && offset - Pool::FIRST < size
}

/// How many addresses endpoints may get: all but network, router and (IPv4) broadcast address, up to the limit.
fn usable(cidr: IpNet) -> u32 {
    let host_bits = u32::from(cidr.max_prefix_len() - cidr.prefix_len());
    let reserved = match cidr {
        IpNet::V4(_) => 3,
        IpNet::V6(_) => 2,
    };
    let all = 1u64.checked_shl(host_bits.min(32)).unwrap_or(u64::MAX);
    let usable = all.saturating_sub(reserved).min(Pool::ADDRESSES_MAX.into());
    // At most ADDRESSES_MAX, so it fits.
    usable as u32
}

fn offset(cidr: IpNet, ip: IpAddr) -> Option<u32> {
    if !cidr.contains(&ip) {
        return None;
    }
    let offset = match (cidr.network(), ip) {
        (IpAddr::V4(network), IpAddr::V4(ip)) => u128::from(u32::from(ip) - u32::from(network)),
        (IpAddr::V6(network), IpAddr::V6(ip)) => u128::from(ip) - u128::from(network),
        _ => return None,
    };
    u32::try_from(offset).ok()
}

/// `offset` lies within the CIDR, so the sum cannot overflow.
fn address(cidr: IpNet, offset: u32) -> IpAddr {
    match cidr.network() {
        IpAddr::V4(network) => Ipv4Addr::from(u32::from(network) + offset).into(),
        IpAddr::V6(network) => Ipv6Addr::from(u128::from(network) + u128::from(offset)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pool(cidr: &str) -> Pool {
        Pool::new(cidr.parse().unwrap(), [], None)
    }

    fn next(pool: &mut Pool) -> Option<String> {
        pool.allocate().map(|ip| ip.to_string())
    }

    #[test]
    fn network_router_and_broadcast_stay_out() {
        let mut four = pool("10.1.0.0/29");
        let all: Vec<_> = std::iter::from_fn(|| next(&mut four)).collect();
        assert_eq!(all, ["10.1.0.2", "10.1.0.3", "10.1.0.4", "10.1.0.5", "10.1.0.6"]);
        let mut six = pool("fd00::/126");
        let all: Vec<_> = std::iter::from_fn(|| next(&mut six)).collect();
        assert_eq!(all, ["fd00::2", "fd00::3"]);
    }

    #[test]
    fn tiny_and_huge_cidrs_are_bounded() {
        for cidr in ["10.0.0.0/31", "10.0.0.0/32", "fd00::/127", "fd00::/128"] {
            assert_eq!(pool(cidr).free(), 0, "{cidr}");
        }
        assert_eq!(pool("10.0.0.0/30").free(), 1);
        for cidr in ["10.0.0.0/8", "fd00::/64", "::/0", "0.0.0.0/0"] {
            assert_eq!(pool(cidr).free(), Pool::ADDRESSES_MAX as usize, "{cidr}");
        }
    }

    #[test]
    fn freed_addresses_come_last_and_a_restart_goes_on_after_the_last_one() {
        let mut pool = pool("10.1.0.0/29");
        let first = pool.allocate().unwrap();
        pool.release(first);
        assert_eq!(next(&mut pool).unwrap(), "10.1.0.3");
        let mut restarted = Pool::new(
            pool.cidr(),
            ["10.1.0.5".parse().unwrap(), "192.0.2.1".parse().unwrap()],
            Some("10.1.0.4".parse().unwrap()),
        );
        let all: Vec<_> = std::iter::from_fn(|| next(&mut restarted)).collect();
        assert_eq!(all, ["10.1.0.6", "10.1.0.2", "10.1.0.3", "10.1.0.4"]);
    }

    proptest! {
        /// Any history of calls, and a restart after each prefix of it, keeps the invariants.
        #[test]
        fn no_address_has_two_owners(
            bits in 24u8..=32,
            steps in proptest::collection::vec(proptest::option::of(0usize..40), 0..200),
        ) {
            let cidr: IpNet = format!("10.9.8.0/{bits}").parse().unwrap();
            let mut pool = Pool::new(cidr, [], None);
            let (mut owned, mut last) = (Vec::<IpAddr>::new(), None);
            let total = pool.free();
            for step in steps {
                match step {
                    None => match pool.allocate() {
                        Some(ip) => {
                            prop_assert!(!owned.contains(&ip));
                            prop_assert!(cidr.contains(&ip) && ip != cidr.network());
                            prop_assert_ne!(Some(ip), isthmus_model::Node::router_ip_of(cidr));
                            prop_assert_ne!(ip, cidr.broadcast());
                            owned.push(ip);
                            last = Some(ip);
                        }
                        None => prop_assert_eq!(owned.len(), total),
                    },
                    Some(index) if !owned.is_empty() => {
                        let ip = owned.swap_remove(index % owned.len());
                        prop_assert!(pool.release(ip));
                        prop_assert!(!pool.release(ip));
                    }
                    Some(_) => {}
                }
                prop_assert_eq!(pool.used(), owned.len());
                prop_assert_eq!(pool.used() + pool.free(), total);
                let mut restarted = Pool::new(cidr, owned.iter().copied(), last);
                prop_assert_eq!(restarted.free(), pool.free());
                if let Some(ip) = restarted.allocate() {
                    prop_assert!(!owned.contains(&ip));
                }
            }
        }

        #[test]
        fn release_of_foreign_addresses_changes_nothing(ip: std::net::Ipv4Addr) {
            let mut pool = pool("10.1.0.0/24");
            prop_assert!(!pool.release(ip.into()));
            prop_assert_eq!(pool.used(), 0);
        }
    }
}
