//! Finds a toolchain that compiles for `bpfel-unknown-none`, and builds the BPF programs with it.
//!
//! In: what is installed. Out: the object's path, or a sentence that says what to install. Used by `build.rs` and by
//! `cargo xtask bpf`, so it depends on the standard library alone.
//!
//! The target has no prebuilt `core`: the compiler must accept `-Z build-std` and have the library's source. Two
//! places have both: a rustup nightly with `rust-src`, and Debian's own rustc with `rust-web-src`. `bpf-linker` loads
//! LLVM at run time from a folder that we name, of the same major version as the compiler's.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

/// What to install, for the error.
const INSTALL: &str = "install one of:
  - rustup toolchain install nightly --component rust-src
  - Debian: apt-get install --no-install-recommends rustc-web cargo-web rust-web-src
and the linker:
  - cargo install bpf-linker --version 0.10.0 --locked";

/// Variables of the outer cargo that would reach into the inner one.
const SCRUBBED_PREFIXES: [&str; 8] = [
    "CARGO_PKG_",
    "CARGO_CFG_",
    "CARGO_FEATURE_",
    "CARGO_MANIFEST_",
    "CARGO_BUILD_",
    "CARGO_TARGET_",
    "CARGO_PROFILE_",
    "RUSTDOC",
];
const SCRUBBED: [&str; 22] = [
    "CARGO",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_INCREMENTAL",
    "CARGO_MAKEFLAGS",
    "CARGO_PRIMARY_PACKAGE",
    "CARGO_CRATE_NAME",
    "CARGO_BIN_NAME",
    "RUSTC",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTC_LINKER",
    "RUSTFLAGS",
    "RUSTUP_TOOLCHAIN",
    "RUST_RECURSION_COUNT",
    "TARGET",
    "HOST",
    "OUT_DIR",
    "OPT_LEVEL",
    "PROFILE",
    "DEBUG",
    "MAKEFLAGS",
    "LD_LIBRARY_PATH",
];

/// A way to run cargo for the BPF target.
pub struct Toolchain {
    /// For people: which one was found.
    pub description: String,
    cargo: Vec<OsString>,
    env: Vec<(&'static str, OsString)>,
    linker_dir: PathBuf,
    llvm_dirs: Vec<PathBuf>,
}

/// Finds a toolchain and the linker.
pub fn find() -> Result<Toolchain, String> {
    let linker_dir = find_linker().ok_or_else(|| format!("bpf-linker is not installed; {INSTALL}"))?;
    nightly(&linker_dir)
        .or_else(|| debian(&linker_dir))
        .ok_or_else(|| format!("no compiler here can build for bpfel-unknown-none; {INSTALL}"))
}

impl Toolchain {
    /// Builds the programs in `programs` below `target_dir`; returns the object's path.
    pub fn build(&self, programs: &Path, target_dir: &Path) -> Result<PathBuf, String> {
        let mut command = Command::new(&self.cargo[0]);
        for (name, _) in env::vars_os() {
            let text = name.to_string_lossy();
            if SCRUBBED.contains(&&*text) || SCRUBBED_PREFIXES.iter().any(|prefix| text.starts_with(prefix)) {
                command.env_remove(&name);
            }
        }
        let mut path = vec![self.linker_dir.clone()];
        path.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
        command
            .args(&self.cargo[1..])
            .args([
                "build",
                "--release",
                "--locked",
                "-Z",
                "build-std=core",
                "--target",
                "bpfel-unknown-none",
            ])
            .arg("--target-dir")
            .arg(target_dir)
            .current_dir(programs)
            .env(
                "PATH",
                env::join_paths(path).map_err(|error| format!("PATH cannot be extended: {error}"))?,
            )
            .env(
                "LD_LIBRARY_PATH",
                env::join_paths(&self.llvm_dirs).map_err(|error| format!("odd path of LLVM: {error}"))?,
            )
            .envs(self.env.iter().map(|(name, value)| (*name, value.clone())));
        let output = command
            .output()
            .map_err(|error| format!("cannot run {:?}: {error}", self.cargo[0]))?;
        if !output.status.success() {
            return Err(format!(
                "building the BPF programs with {} failed ({}):\n{}",
                self.description,
                output.status,
                String::from_utf8_lossy(&output.stderr)
            ));
        }
        Ok(target_dir.join("bpfel-unknown-none/release/isthmus"))
    }
}

/// rustup's nightly, if it has the library's source.
fn nightly(linker_dir: &Path) -> Option<Toolchain> {
    let sysroot = PathBuf::from(capture(
        "rustup",
        &["run", "nightly", "rustc", "--print", "sysroot"],
    )?);
    if !has_library_source(&sysroot) {
        return None;
    }
    let mut llvm_dirs = vec![sysroot.join("lib")];
    let version = capture("rustup", &["run", "nightly", "rustc", "-vV"])?;
    llvm_dirs.extend(llvm_dirs_of(llvm_major(&version)?));
    Some(Toolchain {
        description: "rustup's nightly".to_owned(),
        cargo: ["rustup", "run", "nightly", "cargo"].map(OsString::from).to_vec(),
        env: Vec::new(),
        linker_dir: linker_dir.to_owned(),
        llvm_dirs,
    })
}

/// Debian's compiler. It is a stable one; RUSTC_BOOTSTRAP makes it take `-Z` flags.
fn debian(linker_dir: &Path) -> Option<Toolchain> {
    let rustc = "/usr/bin/rustc";
    let sysroot = PathBuf::from(capture(rustc, &["--print", "sysroot"])?);
    if !has_library_source(&sysroot) || !Path::new("/usr/bin/cargo").exists() {
        return None;
    }
    let version = capture(rustc, &["-vV"])?;
    Some(Toolchain {
        description: version.lines().next().unwrap_or(rustc).to_owned(),
        cargo: vec!["/usr/bin/cargo".into()],
        env: vec![("RUSTC", rustc.into()), ("RUSTC_BOOTSTRAP", "1".into())],
        linker_dir: linker_dir.to_owned(),
        llvm_dirs: llvm_dirs_of(llvm_major(&version)?),
    })
}

fn has_library_source(sysroot: &Path) -> bool {
    sysroot
        .join("lib/rustlib/src/rust/library/core/Cargo.toml")
        .exists()
}

/// "22" from `LLVM version: 22.1.2`.
fn llvm_major(version: &str) -> Option<&str> {
    version
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: "))?
        .split('.')
        .next()
}

/// Folders with an LLVM of that major version: those of rustup's toolchains. The system's own are searched anyway.
fn llvm_dirs_of(major: &str) -> Vec<PathBuf> {
    let home = env::var_os("RUSTUP_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(home()?.join(".rustup")));
    let Some(toolchains) = home.and_then(|home| home.join("toolchains").read_dir().ok()) else {
        return Vec::new();
    };
    let mut dirs: Vec<PathBuf> = toolchains
        .flatten()
        .map(|toolchain| toolchain.path().join("lib"))
        .filter(|lib| {
            lib.read_dir().is_ok_and(|files| {
                files.flatten().any(|file| {
                    file.file_name()
                        .to_string_lossy()
                        .starts_with(&format!("libLLVM.so.{major}."))
                })
            })
        })
        .collect();
    dirs.sort();
    dirs
}

/// The folder of `bpf-linker`: in PATH, or where cargo installs.
fn find_linker() -> Option<PathBuf> {
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(home()?.join(".cargo")));
    env::split_paths(&env::var_os("PATH").unwrap_or_default())
        .chain(cargo_home.map(|home| home.join("bin")))
        .find(|dir| dir.join("bpf-linker").is_file())
}

fn home() -> Option<PathBuf> {
    env::var_os("HOME").map(PathBuf::from)
}

/// What a command prints, without the last newline; nothing if it cannot run or fails.
fn capture(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program)
        .args(args)
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("RUSTC")
        .env("RUSTUP_AUTO_INSTALL", "0")
        .env_remove("LD_LIBRARY_PATH")
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}
