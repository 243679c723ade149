//! Rules that every source file keeps: a header, a size, no unfinished marks, no words that do not belong here.

use std::{fs, path::Path};

use anyhow::Context;

/// A file longer than this holds more than one idea.
const LINES_MAX: usize = 600;

/// Marks of unfinished work, put together here so that this file does not contain them.
fn unfinished_marks() -> [String; 5] {
    [
        ["to", "do!("],
        ["unimple", "mented!("],
        ["FIX", "ME"],
        ["XX", "X:"],
        ["#[ign", "ore"],
    ]
    .map(|parts| parts.concat())
}

/// Everything that is wrong with the source files, one sentence each.
pub fn check(root: &Path) -> anyhow::Result<Vec<String>> {
    let mut found = vec![];
    visit(root, root, &mut found)?;
    Ok(found)
}

fn visit(root: &Path, folder: &Path, found: &mut Vec<String>) -> anyhow::Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        if path.is_dir() {
            if !matches!(name, "target" | ".git" | "gen" | ".cache") {
                visit(root, &path, found)?;
            }
        } else if name.ends_with(".rs") {
            let text =
                fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let shown = path.strip_prefix(root).unwrap_or(&path).display().to_string();
            found.extend(problems(&shown, &text));
        }
    }
    Ok(())
}

fn problems(path: &str, text: &str) -> Vec<String> {
    let mut found = vec![];
    let header = text
        .lines()
        .find(|line| !line.trim().is_empty() && !line.starts_with("#!["));
    if !header.is_some_and(|line| line.starts_with("//!")) {
        found.push(format!("{path} has no header: begin with //! and say what it is"));
    }
    let lines = text.lines().count();
    if lines > LINES_MAX {
        found.push(format!(
            "{path} has {lines} lines, more than {LINES_MAX}: split it by idea"
        ));
    }
    for mark in unfinished_marks() {
        if let Some(number) = text.lines().position(|line| line.contains(&mark)) {
            found.push(format!(
                "{path}:{} contains {mark}: finish it or file it",
                number + 1
            ));
        }
    }
    let stem = Path::new(path)
        .file_stem()
        .and_then(|stem| stem.to_str())
        .unwrap_or_default();
    if matches!(
        stem,
        "utils" | "util" | "helpers" | "common" | "manager" | "misc" | "mod"
    ) {
        found.push(format!("{path}: the name {stem} says nothing; name the idea"));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_are_named() {
        assert!(problems("a/b.rs", "//! What.\nfn f() {}\n").is_empty());
        assert!(problems("a/b.rs", "#![no_std]\n//! What.\n").is_empty());
        assert_eq!(problems("a/b.rs", "fn f() {}\n").len(), 1);
        assert_eq!(problems("a/utils.rs", "//! What.\n").len(), 1);
        assert_eq!(
            problems("a/b.rs", &format!("//! What.\n{}", "\n".repeat(600))).len(),
            1
        );
        let marks = unfinished_marks();
        assert_eq!(
            problems("a/b.rs", &format!("//! What.\n// {}\n", marks[2])).len(),
            1
        );
    }
}
