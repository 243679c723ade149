//! The merge against its rules: a table of cases, and properties against a naive model.

mod addresses;
mod events;
mod maps;
mod merge_table;
mod naive;
mod properties;
mod restart;
mod retries;
