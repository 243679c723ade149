//! The merge against its rules: a table of cases, and properties against a naive model.

#![expect(clippy::unwrap_used, reason = "tests panic, for the stack trace")]

mod addresses;
mod events;
mod flows;
mod maps;
mod merge_table;
mod naive;
mod preferences;
mod properties;
mod restart;
mod retries;
