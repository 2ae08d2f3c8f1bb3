//! The demo's voice: lines on standard output, or on standard error when the one JSON object goes to standard output.

use std::time::Instant;

/// Tells the story.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tell {
    json: bool,
    since: Instant,
}

impl Tell {
    pub(super) fn new(json: bool) -> Self {
        Self { json, since: Instant::now() }
    }

    /// One line.
    pub(super) fn say(&self, line: impl AsRef<str>) {
        if self.json {
            eprintln!("{}", line.as_ref());
        } else {
            println!("{}", line.as_ref());
        }
    }

    /// A step begins.
    pub(super) fn step(&self, title: &str) {
        self.say(format!("\n[{:6.1} s] {title}", self.since.elapsed().as_secs_f64()));
    }

    /// Something within a step.
    pub(super) fn note(&self, line: impl AsRef<str>) {
        self.say(format!("           {}", line.as_ref()));
    }
}
