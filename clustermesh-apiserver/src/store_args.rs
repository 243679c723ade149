//! Flags that say where the own cluster's state is. Each belongs to one kind of store and is refused with the other, so that
//! nobody believes in a flag that does nothing.

use std::{path::PathBuf, time::Duration};

use clap::{Args, ValueEnum};
use isthmus_clustermesh_apiserver::{
    StoreConfig,
    embedded::{Limits, quota},
};
use isthmus_kvstore::EtcdConfig;
use isthmus_runtime::command_line::FlagError;

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum StoreKind {
    Etcd,
    Embedded,
}

/// Where the own cluster's state is.
#[derive(Debug, Args)]
pub struct StoreArgs {
    /// Where this cluster's state is: in an etcd, or in a file of this server, which the local operator then writes to through
    /// it. An embedded store is for a small cluster with a single replica.
    #[arg(long, env = "ISTHMUS_STORE", value_enum, default_value = "etcd")]
    store: StoreKind,
    /// YAML file that says where this cluster's etcd is; with --store etcd.
    #[arg(long, env = "ISTHMUS_ETCD_CONFIG", value_name = "FILE")]
    etcd_config: Option<PathBuf>,
    /// Directory of the embedded store, made if it is not there; with --store embedded.
    #[arg(long, env = "ISTHMUS_DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Bytes that the embedded store may hold before it refuses writes, its history included; 0 = 2 GiB, -1 = no bound. With
    /// --store embedded.
    #[arg(
        long,
        env = "ISTHMUS_QUOTA_BACKEND_BYTES",
        value_name = "BYTES",
        allow_negative_numbers = true
    )]
    quota_backend_bytes: Option<i64>,
}

impl StoreArgs {
    /// The store that the flags say; an embedded one keeps its past for `age`.
    pub fn config(self, age: Duration) -> Result<StoreConfig, FlagError> {
        let shown = |path: &PathBuf| path.display().to_string();
        let data_dir = self.data_dir.as_ref().map(shown);
        let quota = self.quota_backend_bytes.map(|bytes| bytes.to_string());
        match self.store {
            StoreKind::Etcd => {
                let needs = "with --store etcd it takes the YAML file that says where the etcd is; a file of this server's \
                             own is --store embedded with --data-dir";
                let Some(path) = self.etcd_config else {
                    return Err(FlagError::new("etcd-config", "", needs));
                };
                for (flag, got) in [("data-dir", data_dir), ("quota-backend-bytes", quota)] {
                    if let Some(got) = got {
                        let why =
                            "it is for --store embedded, and this is --store etcd; take one of them away";
                        return Err(FlagError::new(flag, got, why));
                    }
                }
                let etcd = EtcdConfig::from_file(&path)
                    .map_err(|error| FlagError::new("etcd-config", path.display(), chain(&error)))?;
                Ok(StoreConfig::Etcd(etcd))
            }
            StoreKind::Embedded => {
                if let Some(path) = &self.etcd_config {
                    let why = "it is for --store etcd, and this is --store embedded; take one of them away";
                    return Err(FlagError::new("etcd-config", path.display(), why));
                }
                let needs = "with --store embedded it takes the directory of the store, which is made if it is not there";
                let Some(data_dir) = self.data_dir.filter(|path| !path.as_os_str().is_empty()) else {
                    return Err(FlagError::new("data-dir", "", needs));
                };
                Ok(StoreConfig::Embedded {
                    data_dir,
                    limits: Limits {
                        age,
                        quota_bytes: quota::of_flag(self.quota_backend_bytes.unwrap_or_default()),
                        ..Limits::default()
                    },
                })
            }
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        store: StoreArgs,
    }

    fn check(flags: &[&str], want: Result<(), &str>) {
        let args = Program::try_parse_from([&["program"], flags].concat()).map_err(|error| error.to_string());
        let got = args.and_then(|args| {
            args.store
                .config(Duration::from_secs(3600))
                .map_err(|error| error.to_string())
        });
        match (got, want) {
            (Ok(_), Ok(())) => {}
            (Err(got), Err(want)) => assert!(got.starts_with(want), "{flags:?}: {got}"),
            (got, want) => panic!("{flags:?}: {got:?}, and not {want:?}"),
        }
    }

    #[test]
    fn every_combination_is_understood_or_refused_with_the_flag_that_is_wrong() {
        let etcd = "--store=etcd";
        let embedded = "--store=embedded";
        let missing = Err("--etcd-config is \"\": with --store etcd it takes the YAML file");
        check(&[], missing);
        check(&[etcd], missing);
        check(&[etcd, "--data-dir=d"], missing);
        check(&["--data-dir=d"], missing);
        check(
            &["--etcd-config=e", "--data-dir=d"],
            Err("--data-dir is \"d\": it is for --store embedded"),
        );
        check(
            &["--etcd-config=e", "--quota-backend-bytes=0"],
            Err("--quota-backend-bytes is \"0\": it is for --store embedded"),
        );
        check(
            &["--etcd-config=/nowhere/e"],
            Err("--etcd-config is \"/nowhere/e\": "),
        );
        check(&[embedded], Err("--data-dir is \"\": with --store embedded"));
        check(
            &[embedded, "--data-dir="],
            Err("error: a value is required for '--data-dir <DIR>'"),
        );
        check(
            &[embedded, "--data-dir=d", "--etcd-config=e"],
            Err("--etcd-config is \"e\": it is for --store etcd"),
        );
        check(&[embedded, "--data-dir=d"], Ok(()));
        check(&[embedded, "--data-dir=d", "--quota-backend-bytes=-1"], Ok(()));
        check(
            &[embedded, "--data-dir=d", "--quota-backend-bytes=much"],
            Err("error: invalid value 'much' for '--quota-backend-bytes <BYTES>'"),
        );
        check(
            &["--store=other"],
            Err("error: invalid value 'other' for '--store <STORE>'"),
        );
    }
}
