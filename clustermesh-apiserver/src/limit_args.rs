//! Flags that bound what clients may have, and how the server ends.

use clap::Args;
use isthmus_clustermesh_apiserver::server::{ServerLimits, bucket::Rate};
use isthmus_runtime::command_line::FlagError;

use crate::parse_duration;

/// What a full bucket holds, in seconds of its rate.
const BURST_SECONDS: u64 = 4;

/// Bounds for clients. A client is everything with the same common name in its certificate. 0 means no limit where it says so.
#[derive(Debug, Args)]
pub struct LimitArgs {
    /// Open connections, from all clients.
    #[arg(
        long,
        env = "ISTHMUS_MAX_CONNECTIONS",
        value_name = "NUMBER",
        default_value_t = 10_000
    )]
    max_connections: usize,
    /// Open connections of a client. All agents of a cluster are one client.
    #[arg(
        long,
        env = "ISTHMUS_MAX_CONNECTIONS_PER_CLIENT",
        value_name = "NUMBER",
        default_value_t = 8_000
    )]
    max_connections_per_client: usize,
    /// New connections a second from one address; ten times as many at once. 0 = no limit.
    #[arg(
        long,
        env = "ISTHMUS_CONNECTION_RATE_LIMIT",
        value_name = "NUMBER",
        default_value_t = 500
    )]
    connection_rate_limit: u64,
    /// Streams of a connection. Cilium's clients use one for watches and one for each call under way.
    #[arg(
        long,
        env = "ISTHMUS_MAX_STREAMS_PER_CONNECTION",
        value_name = "NUMBER",
        default_value_t = 128
    )]
    max_streams_per_connection: u32,
    /// Watches of a connection.
    #[arg(
        long,
        env = "ISTHMUS_MAX_WATCHES_PER_CONNECTION",
        value_name = "NUMBER",
        default_value_t = 8192
    )]
    max_watches_per_connection: usize,
    /// Keys a second that are looked at for a connection's lists; four times as many at once. More of them wait, or are refused.
    /// 0 = no limit.
    #[arg(
        long,
        env = "ISTHMUS_LIST_RATE_LIMIT",
        value_name = "NUMBER",
        default_value_t = 500_000
    )]
    list_rate_limit: u64,
    /// Mebibytes a second that a connection may list; eight times as many at once. 0 = no limit.
    #[arg(
        long,
        env = "ISTHMUS_LIST_BYTES_RATE_LIMIT",
        value_name = "MIB",
        default_value_t = 32
    )]
    list_bytes_rate_limit: u64,
    /// Keys a second that are looked at for the lists of all connections of a client; four times as many at once. 0 = no limit.
    #[arg(
        long,
        env = "ISTHMUS_LIST_RATE_LIMIT_PER_CLIENT",
        value_name = "NUMBER",
        default_value_t = 10_000_000
    )]
    list_rate_limit_per_client: u64,
    /// Mebibytes that may wait in a connection for its client to read them.
    #[arg(
        long,
        env = "ISTHMUS_MAX_PENDING_PER_CONNECTION",
        value_name = "MIB",
        default_value_t = 4
    )]
    max_pending_per_connection: usize,
    /// Mebibytes that may wait in all connections; above it those that stand still longest are closed.
    #[arg(long, env = "ISTHMUS_MAX_PENDING", value_name = "MIB", default_value_t = 1024)]
    max_pending: usize,
    /// Time from SIGTERM until no connection is accepted any longer, for load balancers to notice: 500ms, 3s, 1m.
    #[arg(
        long,
        env = "ISTHMUS_SHUTDOWN_GRACE",
        value_name = "DURATION",
        default_value = "3s"
    )]
    shutdown_grace: String,
    /// Clients that are not gone so long after they were sent away are cut off: 500ms, 10s, 1m.
    #[arg(
        long,
        env = "ISTHMUS_SHUTDOWN_TIMEOUT",
        value_name = "DURATION",
        default_value = "10s"
    )]
    shutdown_timeout: String,
}

impl LimitArgs {
    /// The limits that the flags say.
    pub fn limits(&self) -> Result<ServerLimits, FlagError> {
        let duration = |flag, text: &String| {
            let takes = "it takes a number with a unit: 500ms, 3s or 1m".to_owned();
            parse_duration(text).ok_or_else(|| FlagError::new(flag, text, takes))
        };
        for (flag, number) in [
            ("max-connections", self.max_connections),
            ("max-connections-per-client", self.max_connections_per_client),
            (
                "max-streams-per-connection",
                self.max_streams_per_connection as usize,
            ),
            ("max-watches-per-connection", self.max_watches_per_connection),
            ("max-pending-per-connection", self.max_pending_per_connection),
            ("max-pending", self.max_pending),
        ] {
            if number == 0 {
                let takes = "it takes 1 or more: with 0 nobody would be served".to_owned();
                return Err(FlagError::new(flag, number, takes));
            }
        }
        let mebibytes = |number: usize| number.saturating_mul(1024 * 1024);
        Ok(ServerLimits {
            connections: self.max_connections,
            connections_per_client: self.max_connections_per_client,
            connection_rate_per_address: Rate::over(self.connection_rate_limit, 10),
            streams: self.max_streams_per_connection,
            watches: self.max_watches_per_connection,
            list_keys: Rate::over(self.list_rate_limit, BURST_SECONDS),
            list_bytes: Rate::over(self.list_bytes_rate_limit.saturating_mul(1024 * 1024), 8),
            client_list_keys: Rate::over(self.list_rate_limit_per_client, BURST_SECONDS),
            pending_bytes: mebibytes(self.max_pending_per_connection),
            pending_bytes_in_all: mebibytes(self.max_pending),
            shutdown_grace: duration("shutdown-grace", &self.shutdown_grace)?,
            shutdown_timeout: duration("shutdown-timeout", &self.shutdown_timeout)?,
            ..ServerLimits::default()
        })
    }
}
