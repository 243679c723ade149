//! `isthmus clustermesh troubleshoot`: a line for each step.

use serde::Serialize;

use crate::{
    output::{Columns, Format, json},
    troubleshoot::Report,
};

/// JSON form.
#[derive(Debug, Serialize)]
struct View<'a> {
    cluster: &'a str,
    ok: bool,
    findings: Vec<FindingView<'a>>,
}

#[derive(Debug, Serialize)]
struct FindingView<'a> {
    step: &'a str,
    subject: &'a str,
    ok: bool,
    text: &'a str,
}

fn is_ok(report: &Report) -> bool {
    report.findings.iter().all(|finding| finding.ok)
}

/// Whether every step of every cluster works.
pub fn all_ok(reports: &[Report]) -> bool {
    reports.iter().all(is_ok)
}

/// The text.
pub fn render(reports: &[Report], format: Format) -> String {
    if format == Format::Json {
        let views = reports.iter().map(|report| View {
            cluster: report.cluster.as_str(),
            ok: is_ok(report),
            findings: report
                .findings
                .iter()
                .map(|finding| FindingView {
                    step: finding.step,
                    subject: &finding.subject,
                    ok: finding.ok,
                    text: &finding.text,
                })
                .collect(),
        });
        return json(&views.collect::<Vec<_>>());
    }
    let mut columns = Columns::new(&["CLUSTER", "STEP", "OF", "RESULT", "FOUND"], &[]);
    for report in reports {
        for finding in &report.findings {
            let result = if finding.ok { "ok" } else { "FAILED" };
            columns.row([
                report.cluster.as_str(),
                finding.step,
                &finding.subject,
                result,
                &finding.text,
            ]);
        }
    }
    columns.finish("No remote cluster.")
}

#[cfg(test)]
mod tests {
    use isthmus_kvstore::Finding;
    use isthmus_model::ClusterName;

    use super::*;

    #[test]
    fn each_step_has_its_line() {
        let finding = |step, ok, text: &str| Finding {
            step,
            subject: "10.0.0.1:2379".into(),
            ok,
            text: text.into(),
        };
        let reports = [Report {
            cluster: ClusterName::new("west").unwrap(),
            findings: vec![
                finding("tcp", true, "connected in 1ms"),
                finding("tls", false, "unknown CA\u{1b}"),
            ],
        }];
        let want = "\
CLUSTER   STEP   OF              RESULT   FOUND
west      tcp    10.0.0.1:2379   ok       connected in 1ms
west      tls    10.0.0.1:2379   FAILED   unknown CA
";
        assert_eq!(render(&reports, Format::Table), want);
        assert!(!all_ok(&reports));
        let value: serde_json::Value = serde_json::from_str(&render(&reports, Format::Json)).unwrap();
        assert_eq!(
            (&value[0]["ok"], &value[0]["findings"][1]["step"]),
            (&false.into(), &"tls".into())
        );
    }
}
