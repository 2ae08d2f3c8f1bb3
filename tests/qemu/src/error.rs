//! What can go wrong with real VMs.

use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

/// Each says what happened, to what, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something is not installed.
    #[error("{what} is missing: {remedy}")]
    Missing {
        /// What.
        what: String,
        /// How to get it.
        remedy: String,
    },
    /// A file or folder.
    #[error("{action} {path} failed: {source}")]
    File {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A tool that ended badly.
    #[error("{command} ended with {status}: {output}")]
    Tool {
        /// The command line.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        output: String,
    },
    /// A tool that could not be started.
    #[error("{command} does not start: {source}")]
    Start {
        /// The command line.
        command: String,
        /// Why.
        source: std::io::Error,
    },
    /// QEMU refused a command.
    #[error("{vm}: QEMU refused {command}: {reason}")]
    Refused {
        /// Which VM.
        vm: String,
        /// The command.
        command: String,
        /// QEMU's words.
        reason: String,
    },
    /// A VM's process is gone, or its monitor.
    #[error("{vm}: its QEMU process is gone: {reason}")]
    Gone {
        /// Which VM.
        vm: String,
        /// What is known.
        reason: String,
    },
    /// Something did not happen in time.
    #[error("{what} did not happen within {after:?}; last seen: {seen}")]
    Late {
        /// What was waited for.
        what: String,
        /// How long.
        after: Duration,
        /// The last state.
        seen: String,
    },
    /// No such VM or host.
    #[error("there is no {kind} {name:?} here")]
    Unknown {
        /// "host" or "VM".
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// A kernel module that cannot be used.
    #[error("kernel module {name} of {release}: {reason}")]
    Module {
        /// Its name.
        name: String,
        /// Kernel release.
        release: String,
        /// Why.
        reason: String,
    },
}

impl Error {
    /// For `map_err` at a file operation.
    pub(crate) fn file<'a>(
        action: &'static str,
        path: &'a std::path::Path,
    ) -> impl FnOnce(std::io::Error) -> Self + 'a {
        move |source| Self::File { action, path: path.to_owned(), source }
    }
}

/// Runs a tool to its end and gives what it printed.
///
/// # Errors
/// [`Error::Start`] or [`Error::Tool`].
pub(crate) fn run(command: &mut std::process::Command) -> Result<String, Error> {
    let text = format!("{command:?}");
    let output = command
        .stdin(std::process::Stdio::null())
        .output()
        .map_err(|source| Error::Start { command: text.clone(), source })?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(said);
    }
    let output_text = format!("{said}{}", String::from_utf8_lossy(&output.stderr));
    Err(Error::Tool { command: text, status: output.status, output: output_text.trim().to_owned() })
}
