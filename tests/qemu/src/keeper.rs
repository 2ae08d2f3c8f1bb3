//! A shell that holds something for its owner (a process, a namespace) and never outlives it: it says one line when it has
//! it, and lets go when its standard input closes. That happens also when the owner is killed. (A death signal to a child
//! would follow the thread that started it, not the process.)

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

/// The shell.
#[derive(Debug)]
pub(crate) struct Keeper(Child);

impl Keeper {
    /// Starts one; gives the line that it says.
    pub(crate) fn start(command: &mut Command) -> std::io::Result<(Self, String)> {
        let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        // Dropped, and so ended, when it says nothing.
        let mut keeper = Self(piped.spawn()?);
        let mut line = String::new();
        if let Some(output) = keeper.0.stdout.take() {
            BufReader::new(output).read_line(&mut line)?;
        }
        Ok((keeper, line.trim().to_owned()))
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }

    /// Whether it still holds something.
    pub(crate) fn runs(&mut self) -> bool {
        matches!(self.0.try_wait(), Ok(None))
    }

    /// Waits for its end by itself: what it holds has ended.
    pub(crate) fn wait(mut self) {
        // An error means that it is gone.
        let _ = self.0.wait();
    }

    /// Takes its input away, as the end of the owner does.
    #[cfg(test)]
    pub(crate) fn abandon(&mut self) {
        drop(self.0.stdin.take());
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // Errors mean that it ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
