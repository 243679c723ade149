//! The README's main job: the demo runs to its end, its JSON line says so, and nothing is left.

use anyhow::{Context, ensure};

#[test]
fn the_demo_keeps_its_promises() -> anyhow::Result<()> {
    let printed = isthmus_e2e::run("isthmus", &["sandbox", "demo"])?;
    let line = printed
        .lines()
        .rev()
        .find(|line| line.starts_with('{'))
        .context("the demo printed no JSON line")?;
    let report: serde_json::Value = serde_json::from_str(line)?;
    ensure!(
        report["demo"] == "global-service-failover" && report["ok"] == true,
        "{report}"
    );
    ensure!(
        report["failed_drain"] == 0 && report["failed_agent_restart"] == 0,
        "{report}"
    );
    ensure!(
        report["requests"].as_u64().context("no requests")? > 1000,
        "{report}"
    );
    ensure!(
        report["failover_ms"].as_f64().context("no failover_ms")? < 1000.0,
        "{report}"
    );
    let state = std::path::Path::new(isthmus_sandbox::registry::DEFAULT_STATE_ROOT).join("demo");
    ensure!(!state.exists(), "the demo left its sandbox: {}", state.display());
    Ok(())
}
