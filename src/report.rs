//! How a failure is told: once, at the end, the same way everywhere.
//!
//! ```text
//! error: no VM of that name or id is known: "web-9"
//! because: ...
//! hint: List the VMs with `outrider vm list`; an agent must run on the VM's host.
//! code: OUT-C-0005
//! ```

use std::error::Error;
use std::fmt;
use std::process::ExitCode;

use outrider_disk::DiskError;
use outrider_proto::error_code::{self, Class, ErrorCode};
use outrider_proto::status;
use serde_json::{Value, json};
use tonic::Status;

/// What the shell sees. Wrong usage (2) is clap's, and [`Failure::usage`]'s.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Something did not work.
    Failed = 1,
    /// The command line makes no sense.
    Usage = 2,
    /// Refused on purpose; something has to change first.
    Refused = 3,
    /// Done, but what was waited for has not come.
    Unfinished = 4,
}

/// A failure on its way to the operator. Any error becomes one by `?`.
#[derive(Debug)]
pub(crate) struct Failure {
    what: String,
    because: Vec<String>,
    hint: Option<String>,
    code: Option<String>,
    exit: Exit,
}

impl Failure {
    /// A failure in one sentence.
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), because: vec![], hint: None, code: None, exit: Exit::Failed }
    }

    /// A command line that clap lets pass and that makes no sense.
    pub(crate) fn usage(what: impl Into<String>) -> Self {
        Self { exit: Exit::Usage, ..Self::new(what) }
    }

    /// A refusal: nothing was done, and nothing will be until something changes.
    pub(crate) fn refused(what: impl Into<String>) -> Self {
        Self { exit: Exit::Refused, ..Self::new(what) }
    }

    /// Everything was done, and what was waited for did not come in time.
    pub(crate) fn unfinished(what: impl Into<String>) -> Self {
        Self { exit: Exit::Unfinished, ..Self::new(what) }
    }

    /// What to do about it.
    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds a cause below the sentence.
    #[must_use]
    pub(crate) fn because(mut self, cause: impl Into<String>) -> Self {
        self.because.push(cause.into());
        self
    }

    /// Puts a sentence of ours above what happened.
    #[must_use]
    pub(crate) fn during(mut self, what: impl Into<String>) -> Self {
        let inner = std::mem::replace(&mut self.what, what.into());
        self.because.insert(0, inner);
        self
    }

    /// The stable code, if the failure came with one.
    #[cfg(test)]
    pub(crate) fn code(&self) -> Option<&str> {
        self.code.as_deref()
    }

    pub(crate) fn exit(&self) -> Exit {
        self.exit
    }

    /// For `--json`.
    pub(crate) fn to_json(&self) -> Value {
        json!({
            "message": self.what, "because": self.because, "hint": self.hint, "code": self.code,
        })
    }

    /// Takes meaning, remedy and exit from a code.
    #[must_use]
    pub(crate) fn with_code(mut self, code: &str) -> Self {
        if let Some(known) = error_code::find(code) {
            self.hint.get_or_insert_with(|| known.remedy.to_owned());
            self.exit = exit_of(known);
        }
        self.code = Some(code.to_owned());
        self
    }

    fn of_status(status: &Status) -> Self {
        if let Some(detail) = status::detail(status) {
            return Self::new(detail.message).with_code(&detail.code);
        }
        let failure = Self::new(match status.message() {
            "" => format!("the coordinator answered {:?} without a word", status.code()),
            message => message.to_owned(),
        });
        let unreachable = matches!(
            status.code(),
            tonic::Code::Unavailable | tonic::Code::DeadlineExceeded | tonic::Code::Unknown
        );
        let mut failure = sources(failure, status.source());
        if unreachable {
            failure = failure.during("no coordinator could be reached").hint(
                "Check --coordinators, that a majority of the coordinators is running, and that --identity was issued \
                 by this fabric.",
            );
        }
        failure
    }
}

fn exit_of(code: &ErrorCode) -> Exit {
    if code.class == Class::Refused { Exit::Refused } else { Exit::Failed }
}

/// Appends the chain of causes, without those that a sentence above has told already.
fn sources(mut failure: Failure, mut source: Option<&(dyn Error + 'static)>) -> Failure {
    while let Some(cause) = source {
        let text = cause.to_string();
        let told =
            failure.what.contains(&text) || failure.because.iter().any(|b| b.contains(&text));
        if !told {
            failure.because.push(text);
        }
        source = cause.source();
    }
    failure
}

impl<E: Error + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        let error: &(dyn Error + 'static) = &error;
        if let Some(status) = error.downcast_ref::<Status>() {
            return Self::of_status(status);
        }
        let mut failure = sources(Self::new(error.to_string()), error.source());
        // The deepest of our own errors that carries a code decides.
        let mut at = Some(error);
        while let Some(e) = at {
            if let Some(code) = e.downcast_ref::<DiskError>().and_then(code_of_disk) {
                failure = failure.with_code(code.code);
            } else if let Some(inner) = e.downcast_ref::<Status>().and_then(status::detail) {
                failure = failure.with_code(&inner.code);
            }
            at = e.source();
        }
        failure
    }
}

/// The code of a disk's fault; `None` where the sentence alone says what to do.
fn code_of_disk(error: &DiskError) -> Option<ErrorCode> {
    match error {
        DiskError::ParentMissing { .. } | DiskError::ParentMismatch { .. } => {
            Some(error_code::PARENT_MISSING)
        }
        DiskError::NotAVirtualDisk { .. }
        | DiskError::Truncated { .. }
        | DiskError::Corrupt { .. }
        | DiskError::ChainCycle { .. }
        | DiskError::ChainTooDeep { .. } => Some(error_code::DISK_BROKEN),
        DiskError::Unsupported { .. } => Some(error_code::DISK_UNSUPPORTED),
        DiskError::OutOfBounds { .. }
        | DiskError::InvalidOption { .. }
        | DiskError::SizesDiffer { .. }
        | DiskError::WriterFailed { .. }
        | DiskError::Stopped { .. }
        | DiskError::Io { .. } => None,
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.what)?;
        for cause in &self.because {
            write!(f, "\nbecause: {cause}")?;
        }
        if let Some(hint) = &self.hint {
            write!(f, "\nhint: {hint}")?;
        }
        if let Some(code) = &self.code {
            write!(f, "\ncode: {code}")?;
        }
        Ok(())
    }
}

/// Tells the failure and gives the exit code. With `--json` the one object on standard output says it, too.
pub(crate) fn tell(failure: &Failure, json: bool) -> ExitCode {
    if json {
        println!("{}", json!({ "ok": false, "error": failure.to_json() }));
    }
    eprintln!("{failure}");
    ExitCode::from(failure.exit as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_told_with_its_remedy_and_refusals_exit_with_3() {
        let refusal = status::status(&error_code::UNKNOWN_VM, "no VM is called \"서울\"");
        let failure = Failure::from(refusal);
        assert_eq!(
            failure.to_string(),
            "error: no VM is called \"서울\"\nhint: List the VMs with `outrider vm list`; an agent must run on the \
             VM's host.\ncode: OUT-C-0005"
        );
        assert_eq!(failure.exit(), Exit::Refused);
        let unreachable = Failure::from(Status::unavailable("tcp connect error"));
        assert_eq!(unreachable.exit(), Exit::Failed);
        assert!(unreachable.to_string().contains("because: tcp connect error"));
    }

    #[test]
    fn causes_are_told_once_each() {
        let io = std::io::Error::other("the cable is out");
        let failure = Failure::from(io).during("cannot write x");
        assert_eq!(failure.to_string(), "error: cannot write x\nbecause: the cable is out");
    }
}
