//! Builds the BPF programs and hands their object to `src/object.rs`.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::exit,
};

#[path = "build/toolchain.rs"]
mod toolchain;

fn main() {
    let manifest_dir = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let programs = manifest_dir.join("../../bpf-programs");
    for watched in ["src", "Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", programs.join(watched).display());
    }
    println!(
        "cargo::rerun-if-changed={}",
        manifest_dir.join("../bpf-abi/src").display()
    );
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build/toolchain.rs");
    println!("cargo::rerun-if-env-changed=PATH");

    let out_dir = PathBuf::from(variable("OUT_DIR"));
    let built = toolchain::find().and_then(|found| found.build(&programs, &target_dir(&out_dir)));
    let copied = built.and_then(|object| {
        fs::copy(&object, out_dir.join("isthmus.o"))
            .map_err(|error| format!("cannot copy {}: {error}", object.display()))
    });
    if let Err(message) = copied {
        println!("cargo::error={}", message.replace('\n', "\ncargo::error="));
        exit(1);
    }
}

/// One folder for all profiles of the outer build (`target/bpf-programs`): the inner one is always a release build,
/// and its `core` takes half a minute.
fn target_dir(out_dir: &Path) -> PathBuf {
    // OUT_DIR is <target>/<profile>/build/<package>-<hash>/out.
    out_dir.ancestors().nth(4).unwrap_or(out_dir).join("bpf-programs")
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("cargo sets {name} for build scripts"))
}
