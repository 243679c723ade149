//! `isthmus bpf metrics list`: packets by what became of them.

use isthmus_datapath::Counter;
use serde::Serialize;

use crate::output::{Columns, Format, json, yes_no};

/// JSON form.
#[derive(Debug, Serialize)]
struct View {
    reason: &'static str,
    direction: &'static str,
    drop: bool,
    packets: u64,
    bytes: u64,
}

/// The text.
pub fn render(counters: &[Counter], format: Format) -> String {
    let views = counters.iter().map(|counter| View {
        reason: counter.reason.name(),
        direction: counter.direction.name(),
        drop: counter.reason.is_drop(),
        packets: counter.value.packets,
        bytes: counter.value.bytes,
    });
    if format == Format::Json {
        return json(&views.collect::<Vec<_>>());
    }
    let mut columns = Columns::new(
        &["REASON", "DIRECTION", "DROP", "PACKETS", "BYTES"],
        &["PACKETS", "BYTES"],
    );
    for view in views {
        let (packets, bytes) = (view.packets.to_string(), view.bytes.to_string());
        columns.row([view.reason, view.direction, yes_no(view.drop), &*packets, &*bytes]);
    }
    columns.finish("Nothing was counted yet.")
}

#[cfg(test)]
mod tests {
    use super::*;
    use isthmus_bpf_abi::{Direction, DropReason, MetricsValue};

    #[test]
    fn drops_are_marked() {
        let counter = |reason, direction, packets, bytes| Counter {
            reason,
            direction,
            value: MetricsValue { packets, bytes },
        };
        let counters = [
            counter(DropReason::Forwarded, Direction::FromContainer, 1_000, 64_000),
            counter(DropReason::NoBackend, Direction::Socket, 3, 0),
        ];
        let want = "\
REASON       DIRECTION        DROP   PACKETS   BYTES
forwarded    from-container   no        1000   64000
no-backend   socket           yes          3       0
";
        assert_eq!(render(&counters, Format::Table), want);
        assert!(render(&counters, Format::Json).contains("\"drop\": true"));
        assert_eq!(render(&[], Format::Table), "Nothing was counted yet.\n");
    }
}
