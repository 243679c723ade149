//! `isthmus version`: this program's version, and the agent's.

use isthmus_proto::agent::StatusResponse;
use serde::Serialize;

use crate::output::{Format, json, one_line};

/// JSON form.
#[derive(Debug, Serialize)]
struct View<'a> {
    client: &'a str,
    /// Absent if no agent answers.
    agent: Option<&'a str>,
}

/// The text. `agent` is the agent's answer, or why there is none.
pub fn render(client: &str, agent: &Result<StatusResponse, String>, format: Format) -> String {
    if format == Format::Json {
        return json(&View {
            client,
            agent: agent.as_ref().ok().map(|status| &*status.version),
        });
    }
    let agent = match agent {
        Ok(status) => {
            format!(
                "{} (node {}, cluster {})",
                status.version, status.node_name, status.cluster_name
            )
        }
        // The first line says what, the others what to do.
        Err(why) => format!("unknown: {}", why.lines().next().unwrap_or_default()),
    };
    format!("Client: {client}\nAgent:  {}\n", one_line(&agent))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absent_agent_is_no_failure() {
        let absent = Err("no agent listens at /x\nstart one".to_owned());
        assert_eq!(
            render("0.1.0", &absent, Format::Table),
            "Client: 0.1.0\nAgent:  unknown: no agent listens at /x\n"
        );
        assert_eq!(
            render("0.1.0", &absent, Format::Json),
            "{\n  \"client\": \"0.1.0\",\n  \"agent\": null\n}\n"
        );
        let status = StatusResponse {
            version: "0.2.0".into(),
            node_name: "n1".into(),
            cluster_name: "east".into(),
            ..StatusResponse::default()
        };
        assert_eq!(
            render("0.1.0", &Ok(status), Format::Table),
            "Client: 0.1.0\nAgent:  0.2.0 (node n1, cluster east)\n"
        );
    }
}
