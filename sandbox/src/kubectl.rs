//! kubectl, as a user of the sandbox runs it: one context per cluster of a kubeconfig.

use std::{path::PathBuf, process::Stdio};

use anyhow::{Context, bail};
use tokio::{io::AsyncWriteExt, process::Command};

/// kubectl with one cluster's context.
#[derive(Clone, Debug)]
pub struct Kubectl {
    kubeconfig: PathBuf,
    context: String,
}

impl Kubectl {
    /// kubectl for the context named `context`.
    pub fn new(kubeconfig: impl Into<PathBuf>, context: impl Into<String>) -> Self {
        Self {
            kubeconfig: kubeconfig.into(),
            context: context.into(),
        }
    }

    /// Runs kubectl and returns what it printed; the error carries what it complained about.
    pub async fn run<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> anyhow::Result<String> {
        self.feed(args, "").await
    }

    /// Applies manifests.
    pub async fn apply(&self, manifests: &str) -> anyhow::Result<()> {
        self.feed(&["apply", "-f", "-"], manifests).await.map(drop)
    }

    /// One value of an object by JSONPath, for example `{.spec.clusterIP}`.
    pub async fn value(&self, namespace: &str, object: &str, path: &str) -> anyhow::Result<String> {
        self.run(&["-n", namespace, "get", object, "-o", &format!("jsonpath={path}")])
            .await
    }

    async fn feed<S: AsRef<std::ffi::OsStr>>(&self, args: &[S], input: &str) -> anyhow::Result<String> {
        let shown = || {
            args.iter()
                .map(|arg| arg.as_ref().to_string_lossy())
                .collect::<Vec<_>>()
                .join(" ")
        };
        let mut child = Command::new("kubectl")
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .args(["--context", &self.context])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("cannot run kubectl; install it (Debian: kubernetes-client)")?;
        let mut stdin = child.stdin.take().context("kubectl has no input")?;
        // kubectl may end without reading; its exit code says more than a broken pipe.
        let _ = stdin.write_all(input.as_bytes()).await;
        drop(stdin);
        let output = child
            .wait_with_output()
            .await
            .context("cannot wait for kubectl")?;
        if !output.status.success() {
            bail!(
                "kubectl {} ({}): {}",
                shown(),
                self.context,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}
