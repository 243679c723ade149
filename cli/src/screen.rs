//! Lines about something that is waited for: drawn over each other on a terminal, and otherwise written when they change.
//!
//! They go to standard error, so that standard output has the result only.

use std::io::{self, IsTerminal, Write};

/// Where the lines go.
#[derive(Debug)]
pub struct Screen<W> {
    out: W,
    /// Draw over what was drawn; else append.
    redraw: bool,
    drawn: Vec<String>,
}

impl Screen<io::Stderr> {
    /// Standard error; redraws if that is a terminal.
    pub fn of_stderr() -> Self {
        let out = io::stderr();
        let redraw = out.is_terminal();
        Self::new(out, redraw)
    }
}

impl<W: Write> Screen<W> {
    /// Lines to `out`.
    pub fn new(out: W, redraw: bool) -> Self {
        Self {
            out,
            redraw,
            drawn: Vec::new(),
        }
    }

    /// Shows `lines` in place of those before.
    pub fn show(&mut self, lines: &[String]) {
        if self.drawn == lines {
            return;
        }
        let text: String = if self.redraw {
            let erase = self.erasure();
            let lines: Vec<String> = lines.iter().map(|line| format!("{line}\n")).collect();
            erase + &lines.concat()
        } else {
            // One line a change: a log is read from above.
            lines
                .iter()
                .filter(|line| !self.drawn.contains(line))
                .map(|line| format!("{line}\n"))
                .collect()
        };
        self.drawn = lines.to_vec();
        self.write(&text);
    }

    /// Takes away what was drawn over.
    pub fn clear(&mut self) {
        if self.redraw {
            let erase = self.erasure();
            self.write(&erase);
        }
        self.drawn.clear();
    }

    /// Back to the first line that was drawn, and everything from there on erased.
    fn erasure(&self) -> String {
        match self.drawn.len() {
            0 => String::new(),
            lines => format!("\x1b[{lines}A\x1b[J"),
        }
    }

    fn write(&mut self, text: &str) {
        // Whoever closed it does not want to see it; the command's result does not depend on it.
        let _ = self
            .out
            .write_all(text.as_bytes())
            .and_then(|()| self.out.flush());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(lines: &[&str]) -> Vec<String> {
        lines.iter().map(|line| (*line).to_owned()).collect()
    }

    fn text(redraw: bool) -> String {
        let mut screen = Screen::new(Vec::new(), redraw);
        screen.show(&lines(&["0/2", "  a: 10%", "  b: 20%"]));
        screen.show(&lines(&["0/2", "  a: 10%", "  b: 20%"]));
        screen.show(&lines(&["1/2", "  b: 30%"]));
        screen.clear();
        String::from_utf8(screen.out).unwrap()
    }

    #[test]
    fn a_terminal_is_drawn_over_and_a_file_gets_what_changed() {
        assert_eq!(
            text(true),
            "0/2\n  a: 10%\n  b: 20%\n\x1b[3A\x1b[J1/2\n  b: 30%\n\x1b[2A\x1b[J"
        );
        assert_eq!(text(false), "0/2\n  a: 10%\n  b: 20%\n1/2\n  b: 30%\n");
    }
}
