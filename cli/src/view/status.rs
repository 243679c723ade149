//! `isthmus status`: the agent's health, a line per subsystem.

use std::fmt::Write;

use isthmus_proto::agent::{Health, StatusResponse};
use serde::Serialize;

use crate::output::{Columns, Format, age, json, one_line};

/// JSON form.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct View<'a> {
    cluster_name: &'a str,
    cluster_id: u32,
    node_name: &'a str,
    version: &'a str,
    health: &'static str,
    subsystems: Vec<SubsystemView<'a>>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct SubsystemView<'a> {
    name: &'a str,
    health: &'static str,
    message: &'a str,
    /// Milliseconds since what this rests on was last confirmed; 0 if not applicable.
    age_ms: u64,
}

const fn word(health: Health) -> &'static str {
    match health {
        Health::Unknown => "starting",
        Health::Ok => "ok",
        Health::Degraded => "degraded",
        Health::Failed => "failed",
    }
}

/// Whether the node does its work: nothing has failed or is starting.
pub fn is_well(response: &StatusResponse) -> bool {
    let healths = response.subsystems.iter().map(|subsystem| subsystem.health());
    std::iter::once(response.health())
        .chain(healths)
        .all(|health| matches!(health, Health::Ok | Health::Degraded))
}

/// The text.
pub fn render(response: &StatusResponse, format: Format) -> String {
    if format == Format::Json {
        return json(&View {
            cluster_name: &response.cluster_name,
            cluster_id: response.cluster_id,
            node_name: &response.node_name,
            version: &response.version,
            health: word(response.health()),
            subsystems: response
                .subsystems
                .iter()
                .map(|subsystem| SubsystemView {
                    name: &subsystem.name,
                    health: word(subsystem.health()),
                    message: &subsystem.message,
                    age_ms: subsystem.age_ms,
                })
                .collect(),
        });
    }
    let mut text = String::new();
    // Writing to a String does not fail.
    let _ = write!(
        text,
        "Cluster:   {} (ID {})\nNode:      {}\nVersion:   {}\nHealth:    {}\n\n",
        one_line(&response.cluster_name),
        response.cluster_id,
        one_line(&response.node_name),
        one_line(&response.version),
        word(response.health()),
    );
    let mut columns = Columns::new(&["SUBSYSTEM", "HEALTH", "AGE", "MESSAGE"], &[]);
    for subsystem in &response.subsystems {
        columns.row([
            &*subsystem.name,
            word(subsystem.health()),
            &*age(subsystem.age_ms),
            &*subsystem.message,
        ]);
    }
    text + &columns.finish("The agent reports no subsystem.")
}

#[cfg(test)]
mod tests {
    use super::*;
    use isthmus_proto::agent::Subsystem;

    fn response() -> StatusResponse {
        let subsystem = |name: &str, health: Health, message: &str, age_ms| Subsystem {
            name: name.into(),
            health: health.into(),
            message: message.into(),
            age_ms,
        };
        StatusResponse {
            cluster_name: "east".into(),
            cluster_id: 1,
            node_name: "east-1".into(),
            version: "0.1.0".into(),
            health: Health::Degraded.into(),
            subsystems: vec![
                subsystem("kvstore", Health::Ok, "connected", 1_250),
                subsystem("clustermesh", Health::Degraded, "west is stale", 75_000),
                subsystem("endpoints", Health::Ok, "", 0),
            ],
        }
    }

    #[test]
    fn people_see_a_line_per_subsystem() {
        let want = "\
Cluster:   east (ID 1)
Node:      east-1
Version:   0.1.0
Health:    degraded

SUBSYSTEM     HEALTH     AGE     MESSAGE
kvstore       ok         1.2s    connected
clustermesh   degraded   1m15s   west is stale
endpoints     ok         -       -
";
        assert_eq!(render(&response(), Format::Table), want);
    }

    #[test]
    fn programs_see_json() {
        let value: serde_json::Value = serde_json::from_str(&render(&response(), Format::Json)).unwrap();
        assert_eq!(value["clusterId"], 1);
        assert_eq!(value["subsystems"][1]["health"], "degraded");
        assert_eq!(value["subsystems"][1]["ageMs"], 75_000);
    }

    #[test]
    fn degraded_is_well_and_starting_is_not() {
        assert!(is_well(&response()));
        for health in [Health::Failed, Health::Unknown] {
            let mut response = response();
            response.subsystems[2].health = health.into();
            assert!(!is_well(&response));
        }
    }
}
