//! A sandbox's status as a person reads it.

use comfy_table::{Table, presets};

use crate::control::{Phase, StatusReport};

/// The whole report.
pub fn text(report: &StatusReport) -> String {
    let phase = match &report.phase {
        Phase::Starting => "starting".to_owned(),
        Phase::Ready if report.components.iter().all(|component| component.ready) => "ready".into(),
        Phase::Ready => "up, not everything is ready".into(),
        Phase::Failed { message } => format!("failed: {message}"),
    };
    format!(
        "sandbox {}: {phase}\nkubeconfig: {}\n\n{}\n\n{}",
        report.name,
        report.kubeconfig.display(),
        nodes(report),
        components(report)
    )
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header);
    table
}

fn nodes(report: &StatusReport) -> Table {
    let mut table = table(&[
        "CLUSTER", "ID", "NODE", "ADDRESS", "PODS IN", "PODS", "NETWORK", "LINK",
    ]);
    for cluster in &report.clusters {
        for node in &cluster.nodes {
            let link = if !cluster.link_up {
                "cluster cut off"
            } else if node.link_up {
                "up"
            } else {
                "down"
            };
            table.add_row([
                cluster.name.clone(),
                cluster.id.to_string(),
                node.name.clone(),
                node.address.clone(),
                node.pod_cidrs.join(" "),
                node.pods.to_string(),
                if node.network_ready { "ready" } else { "not ready" }.into(),
                link.into(),
            ]);
        }
    }
    table
}

fn components(report: &StatusReport) -> Table {
    let mut table = table(&["COMPONENT", "STATE", "READY", "PID", "RESTARTS", "LOG"]);
    for component in &report.components {
        table.add_row([
            component.name.clone(),
            component.state.to_string(),
            if component.ready { "yes" } else { "no" }.into(),
            component.pid.map_or_else(|| "-".into(), |pid| pid.to_string()),
            component.restarts.to_string(),
            component.log.display().to_string(),
        ]);
    }
    table
}
