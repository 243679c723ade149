//! The endpoints of this node: who has which number and addresses, and which interface.
//!
//! In: the CNI plugin's calls, the node's pod CIDRs, what the last agent saved. Out: endpoints. Pure; [`store`] keeps
//! it on disk, the agent's CNI service attaches programs.
//!
//! Invariants: every call may be repeated; a number, an address or an interface belongs to one endpoint at a time; at
//! most [`Endpoints::MAX`] exist, and texts from the plugin have a length limit, so that memory is bounded.

pub mod keeper;
pub mod store;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::ipam::Pool;

/// One interface of one container.
#[derive(Clone, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Attachment {
    /// The runtime's ID of the sandbox.
    pub container_id: String,
    /// Name of the interface inside.
    pub ifname: String,
}

/// The pod behind an attachment, for people.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Pod {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Kubernetes name.
    pub name: String,
    /// Kubernetes UID.
    pub uid: String,
}

/// The interface pair that the plugin made.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Device {
    /// Path of the network namespace.
    pub netns: String,
    /// Index of the node's end.
    pub host_ifindex: u32,
    /// MAC address of the node's end.
    pub host_mac: [u8; 6],
    /// MAC address of the pod's end.
    pub pod_mac: [u8; 6],
}

/// A local workload.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Endpoint {
    /// Number on this node.
    pub id: u16,
    /// Which interface of which container.
    pub attachment: Attachment,
    /// Which pod.
    pub pod: Pod,
    /// IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
    /// Name of the node's end of the interface pair.
    pub host_ifname: String,
    /// Set once the plugin made the interface pair.
    pub device: Option<Device>,
}

impl Endpoint {
    /// Its addresses.
    pub fn ips(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let four = self.ipv4.map(IpAddr::V4);
        four.into_iter().chain(self.ipv6.map(IpAddr::V6))
    }
}

/// What must outlive the agent.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Saved {
    /// All endpoints, by attachment.
    pub endpoints: Vec<Endpoint>,
    /// Number that was given last.
    pub last_id: u16,
    /// IPv4 address that was given last.
    pub last_ipv4: Option<Ipv4Addr>,
    /// IPv6 address that was given last.
    pub last_ipv6: Option<Ipv6Addr>,
}

/// Why a call was refused.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum EndpointError {
    /// The node object has not been seen.
    #[error(
        "the pod CIDRs of this node are not known yet: its node object was not published by the operator"
    )]
    NoCidr,
    /// Every address is in use.
    #[error("all {used} addresses of pod CIDR {cidr} are in use")]
    Exhausted {
        /// The CIDR.
        cidr: String,
        /// How many are in use.
        used: usize,
    },
    /// Every endpoint number is in use.
    #[error("this node has {0} endpoints, the most it can have")]
    TooMany(usize),
    /// A text of the call is empty or too long.
    #[error("{field} is {len} bytes long; it takes 1 to {max}")]
    Field {
        /// Which field.
        field: &'static str,
        /// Its length.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// No `Allocate` before.
    #[error("container {container_id:?} has no allocation for {ifname:?}: Allocate comes first")]
    Unknown {
        /// Its ID.
        container_id: String,
        /// Its interface.
        ifname: String,
    },
    /// The interface has another name than the one that was given out.
    #[error("the node's interface is named {got:?}, but {want:?} was given out")]
    WrongInterface {
        /// What the plugin made.
        got: String,
        /// What it was told to make.
        want: String,
    },
    /// What the plugin found differs from what the agent has.
    #[error("{0}")]
    Differs(String),
}

/// All endpoints, and the addresses for new ones.
#[derive(Clone, Debug, Default)]
pub struct Endpoints {
    by_attachment: BTreeMap<Attachment, Endpoint>,
    ids: BTreeSet<u16>,
    last_id: u16,
    last_ipv4: Option<Ipv4Addr>,
    last_ipv6: Option<Ipv6Addr>,
    ipv4: Option<Pool>,
    ipv6: Option<Pool>,
}

impl Endpoints {
    /// Most endpoints of a node.
    pub const MAX: usize = 65_535;
    const TEXT_LEN_MAX: usize = 512;

    /// Goes on from what was saved. Entries that contradict others (same number or address) are left out and returned.
    pub fn restore(saved: Saved) -> (Self, Vec<Endpoint>) {
        let mut endpoints = Self {
            last_id: saved.last_id,
            last_ipv4: saved.last_ipv4,
            last_ipv6: saved.last_ipv6,
            ..Self::default()
        };
        let (mut ips, mut left_out) = (BTreeSet::new(), vec![]);
        for endpoint in saved.endpoints {
            let free = endpoint.id != 0
                && !endpoints.ids.contains(&endpoint.id)
                && !endpoints.by_attachment.contains_key(&endpoint.attachment)
                && endpoint.ips().all(|ip| !ips.contains(&ip));
            if free {
                ips.extend(endpoint.ips());
                endpoints.ids.insert(endpoint.id);
                endpoints
                    .by_attachment
                    .insert(endpoint.attachment.clone(), endpoint);
            } else {
                left_out.push(endpoint);
            }
        }
        (endpoints, left_out)
    }

    /// What must outlive the agent.
    pub fn saved(&self) -> Saved {
        Saved {
            endpoints: self.by_attachment.values().cloned().collect(),
            last_id: self.last_id,
            last_ipv4: self.last_ipv4,
            last_ipv6: self.last_ipv6,
        }
    }

    /// Sets the pod CIDRs. Endpoints keep the addresses that they have, also outside the new CIDRs.
    pub fn set_cidrs(&mut self, ipv4: Option<Ipv4Net>, ipv6: Option<Ipv6Net>) {
        let used = || self.by_attachment.values().flat_map(Endpoint::ips);
        let four = ipv4.map(|cidr| Pool::new(cidr.into(), used(), self.last_ipv4.map(IpAddr::V4)));
        let six = ipv6.map(|cidr| Pool::new(cidr.into(), used(), self.last_ipv6.map(IpAddr::V6)));
        self.ipv4 = four;
        self.ipv6 = six;
    }

    /// The pools, IPv4 first.
    pub fn pools(&self) -> impl Iterator<Item = &Pool> {
        self.ipv4.iter().chain(&self.ipv6)
    }

    /// Why [`Self::allocate`] would be refused now.
    pub fn can_allocate(&self) -> Result<(), EndpointError> {
        if self.ipv4.is_none() && self.ipv6.is_none() {
            return Err(EndpointError::NoCidr);
        }
        if self.by_attachment.len() >= Self::MAX {
            return Err(EndpointError::TooMany(self.by_attachment.len()));
        }
        match self.pools().find(|pool| pool.free() == 0) {
            None => Ok(()),
            Some(pool) => Err(EndpointError::Exhausted {
                cidr: pool.cidr().to_string(),
                used: pool.used(),
            }),
        }
    }

    /// Reserves a number and addresses; the same ones again if the attachment has some.
    pub fn allocate(&mut self, attachment: Attachment, pod: Pod) -> Result<&Endpoint, EndpointError> {
        check_text("container_id", &attachment.container_id, 1)?;
        check_text("ifname", &attachment.ifname, 1)?;
        check_text("namespace", &pod.namespace, 0)?;
        check_text("pod_name", &pod.name, 0)?;
        check_text("pod_uid", &pod.uid, 0)?;
        if !self.by_attachment.contains_key(&attachment) {
            let endpoint = self.new_endpoint(attachment.clone(), pod)?;
            self.by_attachment.insert(attachment.clone(), endpoint);
        }
        self.by_attachment
            .get(&attachment)
            .ok_or_else(|| unknown(&attachment))
    }

    fn new_endpoint(&mut self, attachment: Attachment, pod: Pod) -> Result<Endpoint, EndpointError> {
        self.can_allocate()?;
        let id = self.free_id().ok_or(EndpointError::TooMany(self.ids.len()))?;
        let ipv4 = match self.ipv4.as_mut().and_then(Pool::allocate) {
            Some(IpAddr::V4(ip)) => Some(ip),
            _ => None,
        };
        let ipv6 = match self.ipv6.as_mut().and_then(Pool::allocate) {
            Some(IpAddr::V6(ip)) => Some(ip),
            _ => None,
        };
        self.ids.insert(id);
        self.last_id = id;
        self.last_ipv4 = ipv4.or(self.last_ipv4);
        self.last_ipv6 = ipv6.or(self.last_ipv6);
        Ok(Endpoint {
            id,
            host_ifname: self.free_host_ifname(&attachment),
            attachment,
            pod,
            ipv4,
            ipv6,
            device: None,
        })
    }

    /// The next number after the last one that is free: a number is reused as late as possible.
    fn free_id(&self) -> Option<u16> {
        let after = self.last_id.checked_add(1).unwrap_or(1);
        (after..=u16::MAX)
            .chain(1..after)
            .find(|id| !self.ids.contains(id))
    }

    /// 40 bits of hash collide once in a million nodes of 1,000 pods; a counter settles even that.
    fn free_host_ifname(&self, attachment: &Attachment) -> String {
        let taken: BTreeSet<&str> = self
            .by_attachment
            .values()
            .map(|e| e.host_ifname.as_str())
            .collect();
        let mut attempt = 0;
        loop {
            let name = host_ifname(attachment, attempt);
            if !taken.contains(name.as_str()) {
                return name;
            }
            attempt += 1;
        }
    }

    /// Records the interface pair of an allocated endpoint. Repeating the call replaces it.
    pub fn attach(
        &mut self,
        attachment: &Attachment,
        host_ifname: &str,
        device: Device,
    ) -> Result<&Endpoint, EndpointError> {
        check_text("netns", &device.netns, 0)?;
        let endpoint = self
            .by_attachment
            .get_mut(attachment)
            .ok_or_else(|| unknown(attachment))?;
        if endpoint.host_ifname != host_ifname {
            return Err(EndpointError::WrongInterface {
                got: host_ifname.chars().take(64).collect(),
                want: endpoint.host_ifname.clone(),
            });
        }
        endpoint.device = Some(device);
        Ok(endpoint)
    }

    /// Forgets an endpoint; its addresses are free again. `None`: there was none.
    pub fn release(&mut self, attachment: &Attachment) -> Option<Endpoint> {
        let endpoint = self.by_attachment.remove(attachment)?;
        self.ids.remove(&endpoint.id);
        for pool in self.ipv4.iter_mut().chain(&mut self.ipv6) {
            for ip in endpoint.ips() {
                pool.release(ip);
            }
        }
        Some(endpoint)
    }

    /// The endpoint of an attachment.
    pub fn find(&self, attachment: &Attachment) -> Option<&Endpoint> {
        self.by_attachment.get(attachment)
    }

    /// All endpoints, by attachment.
    pub fn iter(&self) -> impl Iterator<Item = &Endpoint> {
        self.by_attachment.values()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.by_attachment.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.by_attachment.is_empty()
    }

    /// Attachments that `valid` does not name.
    pub fn not_in(&self, valid: &BTreeSet<Attachment>) -> Vec<Attachment> {
        self.by_attachment
            .keys()
            .filter(|attachment| !valid.contains(attachment))
            .cloned()
            .collect()
    }

    /// Compares what the plugin found with what is recorded.
    pub fn check(
        &self,
        attachment: &Attachment,
        host_ifname: &str,
        host_ifindex: u32,
        ips: &[IpAddr],
    ) -> Result<(), EndpointError> {
        let endpoint = self.find(attachment).ok_or_else(|| unknown(attachment))?;
        let differs = |what: String| Err(EndpointError::Differs(what));
        let Some(device) = &endpoint.device else {
            return differs(format!(
                "endpoint {} has addresses but was never created",
                endpoint.id
            ));
        };
        if endpoint.host_ifname != host_ifname {
            return differs(format!(
                "endpoint {} is behind interface {:?}, the container behind {host_ifname:?}",
                endpoint.id, endpoint.host_ifname
            ));
        }
        if device.host_ifindex != host_ifindex {
            return differs(format!(
                "endpoint {} is behind interface number {}, but {host_ifname:?} now has number {host_ifindex}",
                endpoint.id, device.host_ifindex
            ));
        }
        let found: BTreeSet<IpAddr> = ips.iter().copied().collect();
        match endpoint.ips().find(|ip| !found.contains(ip)) {
            None => Ok(()),
            Some(missing) => differs(format!(
                "endpoint {} has address {missing}, which the container lacks",
                endpoint.id
            )),
        }
    }
}

fn unknown(attachment: &Attachment) -> EndpointError {
    EndpointError::Unknown {
        container_id: attachment.container_id.chars().take(128).collect(),
        ifname: attachment.ifname.chars().take(64).collect(),
    }
}

fn check_text(field: &'static str, text: &str, min: usize) -> Result<(), EndpointError> {
    if (min..=Endpoints::TEXT_LEN_MAX).contains(&text.len()) {
        Ok(())
    } else {
        Err(EndpointError::Field {
            field,
            len: text.len(),
            max: Endpoints::TEXT_LEN_MAX,
        })
    }
}

/// `lxc` and 10 hex digits: a device name has at most 15 characters. The hash is 64-bit FNV-1a: it must stay the same
/// in every release, which the standard library's hashers do not promise.
fn host_ifname(attachment: &Attachment, attempt: u32) -> String {
    let parts: [&[u8]; 4] = [
        attachment.container_id.as_bytes(),
        b"\0",
        attachment.ifname.as_bytes(),
        &attempt.to_be_bytes(),
    ];
    let hash = parts
        .iter()
        .flat_map(|part| part.iter())
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
    // The high bits of FNV are mixed least by the last bytes: fold them in.
    format!("lxc{:010x}", (hash ^ (hash >> 40)) & 0xff_ffff_ffff)
}

#[cfg(test)]
mod tests;
