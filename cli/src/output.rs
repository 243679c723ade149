//! How all commands print: aligned columns without borders for people, indented JSON for programs. No colour.
//!
//! In: rows, or values with serde. Out: text that ends in a newline. Pure.

use comfy_table::{Cell, CellAlignment, Table, presets::NOTHING};
use serde::Serialize;

/// How to print.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub enum Format {
    /// Columns for people.
    Table,
    /// More columns.
    Wide,
    /// JSON: field names stay from release to release.
    Json,
}

/// A table under construction.
#[derive(Debug)]
pub struct Columns {
    table: Table,
}

impl Columns {
    /// Headings, upper case as in kubectl. Those in `right` are numbers, aligned to the right.
    pub fn new(headings: &[&str], right: &[&str]) -> Self {
        let mut table = Table::new();
        table.load_preset(NOTHING).set_header(headings);
        for (column, heading) in table.column_iter_mut().zip(headings) {
            column.set_padding((0, 3));
            if right.contains(heading) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        Self { table }
    }

    /// A row. Empty cells become `-`.
    pub fn row<S: AsRef<str>>(&mut self, cells: impl IntoIterator<Item = S>) {
        let cells = cells.into_iter().map(|cell| match cell.as_ref() {
            "" => Cell::new("-"),
            text => Cell::new(one_line(text)),
        });
        self.table.add_row(cells.collect::<Vec<_>>());
    }

    /// The text; `empty` if there are no rows.
    pub fn finish(self, empty: &str) -> String {
        if self.table.is_empty() {
            return format!("{empty}\n");
        }
        let mut text = String::new();
        for line in self.table.lines() {
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Text of others in one line: a control character could move the cursor or break the columns.
pub fn one_line(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// Indented JSON.
pub fn json(value: &impl Serialize) -> String {
    // The views have string keys and no failing serializers.
    let mut text = serde_json::to_string_pretty(value).unwrap_or_default();
    text.push('\n');
    text
}

/// `yes` or `no`.
pub const fn yes_no(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}

/// A length of time in its two largest units; `-` for none.
pub fn age(ms: u64) -> String {
    match ms {
        0 => "-".into(),
        1..1_000 => format!("{ms}ms"),
        1_000..10_000 => format!("{}.{}s", ms / 1_000, ms % 1_000 / 100),
        10_000..60_000 => format!("{}s", ms / 1_000),
        60_000..3_600_000 => format!("{}m{}s", ms / 60_000, ms % 60_000 / 1_000),
        3_600_000..86_400_000 => format!("{}h{}m", ms / 3_600_000, ms % 3_600_000 / 60_000),
        _ => format!("{}d{}h", ms / 86_400_000, ms % 86_400_000 / 3_600_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align() {
        let mut columns = Columns::new(&["NAME", "COUNT", "NOTE"], &["COUNT"]);
        columns.row(["a", "5", ""]);
        columns.row(["long name", "1000", "x\ny"]);
        assert_eq!(
            columns.finish("none"),
            "NAME        COUNT   NOTE\na               5   -\nlong name    1000   x y\n"
        );
        assert_eq!(Columns::new(&["NAME"], &[]).finish("No names."), "No names.\n");
    }

    #[test]
    fn ages_have_two_units() {
        for (ms, want) in [
            (0, "-"),
            (7, "7ms"),
            (999, "999ms"),
            (1_250, "1.2s"),
            (59_999, "59s"),
            (61_000, "1m1s"),
            (3_600_000, "1h0m"),
            (90_000_000, "1d1h"),
        ] {
            assert_eq!(age(ms), want);
        }
    }
}
