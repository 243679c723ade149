//! Packet counters by reason and direction: `isthmus_metrics`, a per-CPU array. Reason 0 is "forwarded"; every
//! early exit that drops has its own.

/// Value of `isthmus_metrics`, one per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::Immutable, zerocopy::IntoBytes)
)]
pub struct MetricsValue {
    /// Packets, or socket calls for the socket reasons.
    pub packets: u64,
    /// Bytes of them, 0 for socket calls.
    pub bytes: u64,
}
const _: () = assert!(size_of::<MetricsValue>() == 16);

/// Which way a packet went when it was counted.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Direction {
    /// From a pod into the node, at the host's side of its veth.
    FromContainer = 0,
    /// Out of the overlay into the node.
    FromOverlay = 1,
    /// From the node into the overlay.
    ToOverlay = 2,
    /// A socket call, before any packet.
    Socket = 3,
    /// From the node's stack to a pod, at the host's side of its veth.
    ToContainer = 4,
    /// From outside into the node, at one of its devices.
    FromHostDevice = 5,
    /// From the node to the outside, at one of its devices.
    ToHostDevice = 6,
}

/// How many values [`Direction`] has.
pub const DIRECTIONS: u32 = 7;
/// Room for reasons in the map; more than there are, so that a new one needs no new map.
pub const REASONS: u32 = 64;

impl Direction {
    /// All directions, in the order of their numbers.
    pub const ALL: [Self; DIRECTIONS as usize] = [
        Self::FromContainer,
        Self::FromOverlay,
        Self::ToOverlay,
        Self::Socket,
        Self::ToContainer,
        Self::FromHostDevice,
        Self::ToHostDevice,
    ];

    /// Name in metrics and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::FromContainer => "from-container",
            Self::FromOverlay => "from-overlay",
            Self::ToOverlay => "to-overlay",
            Self::Socket => "socket",
            Self::ToContainer => "to-container",
            Self::FromHostDevice => "from-host-device",
            Self::ToHostDevice => "to-host-device",
        }
    }
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $number:literal, $name:literal;)*) => {
        /// Why a packet or a socket call ended where it did.
        #[repr(u8)]
        #[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
        pub enum DropReason { $($(#[$doc])* $variant = $number,)* }

        impl DropReason {
            /// All reasons, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Name in metrics and on the command line.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

reasons! {
    /// Not a drop: sent on, delivered or handed to the stack.
    Forwarded = 0, "forwarded";
    /// The packet ends before its headers do.
    Truncated = 1, "truncated";
    /// Neither IPv4, IPv6 nor ARP.
    UnsupportedProtocol = 2, "unsupported-protocol";
    /// The source address is not one of the endpoint's own.
    InvalidSource = 3, "invalid-source";
    /// The source MAC address is not the endpoint's own.
    InvalidSourceMac = 4, "invalid-source-mac";
    /// A packet on the overlay's device without tunnel data.
    NoTunnelKey = 5, "no-tunnel-key";
    /// The VNI is not an identity that a remote may carry.
    InvalidVni = 6, "invalid-vni";
    /// Came through the overlay for an address that is not of this node.
    UnknownDestination = 7, "unknown-destination";
    /// Nothing in the ipcache says which node hosts the address.
    NoTunnelEndpoint = 8, "no-tunnel-endpoint";
    /// The ipcache says that the address does not answer.
    Unroutable = 9, "unroutable";
    /// The kernel refused to set the tunnel's data.
    EncapFailed = 10, "encap-failed";
    /// The kernel refused to write the packet's header.
    WriteFailed = 11, "write-failed";
    /// The agent has not written the node's configuration.
    NotConfigured = 12, "not-configured";
    /// The kernel refused to redirect the packet.
    RedirectFailed = 13, "redirect-failed";
    /// A frontend without a usable backend.
    NoBackend = 14, "no-backend";
    /// Every try met a slot or backend that was just being removed.
    BackendGone = 15, "backend-gone";
    /// The chosen backend's address family does not fit the socket's.
    FamilyMismatch = 16, "family-mismatch";
    /// The table that leads back from the backend to the frontend refused the entry.
    ReverseFailed = 17, "reverse-failed";
    /// Not a drop: a socket call or packet was sent to a backend, or a backend's packet came back.
    Translated = 18, "translated";
    /// The conntrack table refused the entry.
    CtFull = 19, "conntrack-full";
    /// The client has the same ports in use to every backend through another frontend.
    TupleInUse = 20, "tuple-in-use";
    /// The protocol's checksum allows no other port, and the backend has one (SCTP).
    UnsupportedTransport = 21, "unsupported-transport";
    /// A packet to the loopback address that belongs to no flow.
    LoopbackUnknown = 22, "loopback-unknown";
    /// The source is in none of the ranges that the service allows.
    SourceRange = 23, "source-range";
    /// No port of the node was free for the flow.
    NoSnatPort = 24, "no-snat-port";
    /// From outside to a cluster IP, which is for the inside.
    ClusterIpOutside = 25, "cluster-ip-outside";
    /// No route leads to the backend.
    NoRoute = 26, "no-route";
    /// A fragment that overtook its first: nothing says which flow it belongs to.
    FragmentUnknown = 27, "fragment-unknown";
    /// Its hops are used up: it has gone round between nodes, or comes from too far.
    TtlExpired = 28, "ttl-expired";
}

impl DropReason {
    /// Whether what was counted went on its way.
    pub const fn is_drop(self) -> bool {
        !matches!(self, Self::Forwarded | Self::Translated)
    }
}

/// Index in `isthmus_metrics`.
#[inline(always)]
pub const fn metric_index(reason: DropReason, direction: Direction) -> u32 {
    reason as u32 * DIRECTIONS + direction as u32
}

/// What an index of `isthmus_metrics` counts, if anything.
pub fn metric_of(index: u32) -> Option<(DropReason, Direction)> {
    let reason = DropReason::ALL.get((index / DIRECTIONS) as usize)?;
    Some((*reason, Direction::ALL[(index % DIRECTIONS) as usize]))
}
