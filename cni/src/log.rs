//! The optional log file: one JSON line per command, bounded.
//!
//! In: what was asked and how it ended. Out: a line appended in one write, so that concurrent plugins do not mix theirs.
//! At [`LOG_LEN_MAX`] the file is moved to `<name>.1`, over the one before. A log that cannot be written fails nothing:
//! the trouble goes to standard error.

use std::{
    fs::OpenOptions,
    io::{self, Write},
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::Serialize;

use crate::{failure::CniError, request::Request};

/// Size at which the file is put aside: 10 MiB.
pub const LOG_LEN_MAX: u64 = 10 << 20;

#[derive(Serialize)]
struct Line<'a> {
    /// Unix seconds.
    time: f64,
    command: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    container: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ifname: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pod: Option<String>,
    /// 0 if it worked, otherwise the error's code.
    code: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<&'a str>,
    duration_ms: u128,
}

/// Adds a line about `request` to the file that its configuration names, if it names one.
pub fn append(request: &Request, result: &Result<String, CniError>, now: SystemTime, duration: Duration) {
    let (command, config, attachment, pod) = match request {
        Request::Add {
            config,
            attachment,
            pod,
            ..
        } => ("ADD", config, Some(attachment), Some(pod)),
        Request::Del {
            config, attachment, ..
        } => ("DEL", config, Some(attachment), None),
        Request::Check {
            config, attachment, ..
        } => ("CHECK", config, Some(attachment), None),
        Request::Status { config } => ("STATUS", config, None, None),
        Request::Gc { config, .. } => ("GC", config, None, None),
        Request::Version { .. } => return,
    };
    let Some(path) = &config.log_file else { return };
    let error = result.as_ref().err();
    let line = crate::result::json(&Line {
        time: now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
        command,
        container: attachment.map(|attachment| attachment.container_id.as_str()),
        ifname: attachment.map(|attachment| attachment.ifname.as_str()),
        pod: pod.map(|pod| format!("{}/{}", pod.namespace, pod.name)),
        code: error.map_or(0, |error| error.code as u32),
        message: error.map(|error| error.message.as_str()),
        details: error
            .map(|error| error.details.as_str())
            .filter(|details| !details.is_empty()),
        duration_ms: duration.as_millis(),
    });
    if let Err(error) = write(path, &line) {
        eprintln!(
            "isthmus-cni: cannot write the log file {}: {error}",
            path.display()
        );
    }
}

fn write(path: &Path, line: &str) -> io::Result<()> {
    if std::fs::metadata(path).is_ok_and(|metadata| metadata.len() >= LOG_LEN_MAX) {
        let mut aside = path.as_os_str().to_owned();
        aside.push(".1");
        std::fs::rename(path, aside)?;
    }
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)?
        .write_all(line.as_bytes())
}
