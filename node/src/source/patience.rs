//! Waiting for what keeps a source from being read and passes by itself: a volume whose I/O is paused (event 5120, code 5979),
//! a file that somebody else holds. The same handle is tried first, then the disk is opened again (facts, section 6).
//!
//! It waits on the thread that reads, as a read does that the system itself lets stand still; it ends at once when the job
//! closes its sources.

use std::io;
use std::time::{Duration, Instant};

use outrider_disk::DiskError;
use outrider_process::backoff::Backoff;
use tokio_util::task::TaskTracker;

const FIRST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(1);
/// How soon a waiting reader notices that the job closes its sources.
const SLICE: Duration = Duration::from_millis(50);
/// Failures on one handle before the disk is opened anew.
const SAME_HANDLE: u32 = 3;

/// How long a job waits for its sources.
#[derive(Clone)]
pub(super) struct Patience {
    longest: Duration,
    sources: TaskTracker,
}

/// What a caller does at the next try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Try {
    /// The same again.
    Same,
    /// On a new handle.
    Anew,
}

impl Patience {
    pub(super) fn new(longest: Duration, sources: TaskTracker) -> Self {
        Self { longest, sources }
    }

    /// Does something until it works, fails for good, or has failed for too long. Blocks.
    pub(super) fn keep<T>(
        &self,
        mut attempt: impl FnMut(Try) -> Result<T, DiskError>,
    ) -> Result<T, DiskError> {
        let begun = Instant::now();
        let mut pauses = Backoff::new(FIRST, LONGEST, Backoff::any_seed());
        let mut failures = 0;
        loop {
            let how = if failures < SAME_HANDLE { Try::Same } else { Try::Anew };
            let error = match attempt(how) {
                Err(error) if why(&error).is_some() => error,
                answer => return answer,
            };
            failures += 1;
            let waited = begun.elapsed();
            if waited >= self.longest || self.sources.is_closed() {
                return Err(told(error, waited));
            }
            if failures == 1 {
                tracing::warn!(error = %error, "a source cannot be read now; it is waited for");
            }
            self.sleep(pauses.next_wait().min(self.longest - waited));
        }
    }

    fn sleep(&self, pause: Duration) {
        let until = Instant::now() + pause;
        while !self.sources.is_closed() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(SLICE));
        }
    }
}

/// What keeps us, if it is something that passes.
fn why(error: &DiskError) -> Option<&'static str> {
    let DiskError::Io { source, .. } = error else { return None };
    match source.kind() {
        io::ErrorKind::TimedOut => Some(
            "the volume's I/O is paused or its storage is away; look at event 5120 and at Get-ClusterSharedVolumeState",
        ),
        io::ErrorKind::ResourceBusy => {
            Some("somebody else holds the file; look for backup and antivirus programs on the host")
        }
        _ => None,
    }
}

/// The error after all that waiting.
fn told(error: DiskError, waited: Duration) -> DiskError {
    let Some(why) = why(&error) else { return error };
    match error {
        DiskError::Io { path, op, source } => {
            let text = format!("{source}; waited {} s: {why}", waited.as_secs());
            DiskError::Io { path, op, source: io::Error::new(source.kind(), text) }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failing(kind: io::ErrorKind) -> DiskError {
        DiskError::Io { path: "/csv/a.vhdx".into(), op: "read", source: kind.into() }
    }

    #[test]
    fn what_passes_is_waited_for_first_on_the_same_handle() {
        let patience = Patience::new(Duration::from_secs(60), TaskTracker::new());
        let mut tries = Vec::new();
        let answer = patience.keep(|how| {
            tries.push(how);
            if tries.len() < 5 { Err(failing(io::ErrorKind::TimedOut)) } else { Ok(7) }
        });
        assert_eq!(answer.ok(), Some(7));
        assert_eq!(tries, [Try::Same, Try::Same, Try::Same, Try::Anew, Try::Anew]);
    }

    #[test]
    fn what_does_not_pass_is_told_at_once_and_what_takes_too_long_in_a_sentence() {
        let patience = Patience::new(Duration::from_millis(20), TaskTracker::new());
        let mut tries = 0;
        let answer: Result<(), _> = patience.keep(|_| {
            tries += 1;
            Err(failing(io::ErrorKind::PermissionDenied))
        });
        assert!(answer.is_err() && tries == 1);
        let answer: Result<(), _> = patience.keep(|_| Err(failing(io::ErrorKind::TimedOut)));
        let text = answer.expect_err("it lasts").to_string();
        assert!(text.contains("/csv/a.vhdx") && text.contains("5120"), "{text}");
    }

    #[test]
    fn a_job_that_closes_its_sources_is_not_kept() {
        let sources = TaskTracker::new();
        let patience = Patience::new(Duration::from_secs(3600), sources.clone());
        let waits = std::thread::spawn(move || {
            patience.keep(|_| Err::<(), _>(failing(io::ErrorKind::ResourceBusy)))
        });
        sources.close();
        assert!(waits.join().expect("no panic").is_err());
    }
}
