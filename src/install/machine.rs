//! The machine that is installed on: files here, the service in `systemd` and `scm`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::places::Places;
use super::plan::Step;
use crate::report::Failure;

/// How long a process may take to be gone after its service has stopped.
const PROCESS_END: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(100);

/// What became of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Applied {
    /// The machine was changed.
    Changed,
    /// It was so already.
    Unchanged,
}

/// How the service is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Service {
    Absent,
    Stopped,
    Running,
    /// On its way up or down.
    Changing,
    /// It cannot be told: another root folder than this machine's.
    #[cfg_attr(windows, allow(dead_code))]
    Unknown,
}

impl Service {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Absent => "not installed",
            Self::Stopped => "stopped",
            Self::Running => "running",
            Self::Changing => "starting or stopping",
            Self::Unknown => "unknown",
        }
    }
}

/// An operating system, as far as installing needs it.
pub(crate) trait Machine {
    fn places(&self) -> &Places;
    /// The same as the agent will see them: an image is not mounted where it will run.
    fn places_inside(&self) -> Places;
    /// Whether this user may install.
    fn check_rights(&self) -> Result<(), Failure>;
    /// What hypervisor such a machine runs.
    fn hypervisor(&self) -> &'static str;
    /// The failover cluster that it belongs to.
    fn cluster(&self) -> Option<String>;
    /// Whether it is Windows.
    fn is_windows(&self) -> bool;
    fn service(&self) -> Result<Service, Failure>;
    /// Asks the service to start; returns at once.
    fn start(&self) -> Result<(), Failure>;
    /// Asks the service to stop; returns at once.
    fn stop(&self) -> Result<(), Failure>;
    /// Does a step of the service, or closes a folder; what only touches files is done here.
    fn apply(&self, step: &Step) -> Result<Applied, Failure>;
    /// Takes it back; what is gone already is fine.
    fn undo(&self, step: &Step) -> Result<Applied, Failure>;
    /// Removes the program, which may be the one that is running.
    fn remove_program(&self, path: &Path) -> Result<Applied, Failure>;
}

fn failed(doing: &str, path: &Path) -> impl FnOnce(io::Error) -> Failure {
    let what = format!("cannot {doing} {}", path.display());
    move |error| Failure::from(error).during(what)
}

/// Creates a folder.
pub(super) fn folder(path: &Path) -> Result<Applied, Failure> {
    if path.is_dir() {
        return Ok(Applied::Unchanged);
    }
    outrider_process::fs::create_dir_durable(path)?;
    Ok(Applied::Changed)
}

/// Whether the program at `to` differs from the one at `from`.
pub(crate) fn differs(from: &Path, to: &Path) -> Result<bool, Failure> {
    if same_file(from, to) || !to.exists() {
        return Ok(!to.exists());
    }
    let size = |path: &Path| fs::metadata(path).map(|m| m.len()).map_err(failed("look at", path));
    if size(from)? != size(to)? {
        return Ok(true);
    }
    let read = |path: &Path| fs::read(path).map_err(failed("read", path));
    Ok(read(from)? != read(to)?)
}

/// Copies the program so that its name always leads to a whole one.
pub(super) fn program(from: &Path, to: &Path) -> Result<Applied, Failure> {
    if !differs(from, to)? {
        return Ok(Applied::Unchanged);
    }
    let new = to.with_extension("new");
    fs::copy(from, &new).map_err(failed("copy the program to", &new))?;
    let file = fs::File::options().write(true).open(&new).map_err(failed("open", &new))?;
    file.sync_all().map_err(failed("sync", &new))?;
    drop(file);
    once_free(|| fs::rename(&new, to)).map_err(failed("replace", to))?;
    Ok(Applied::Changed)
}

/// Writes the configuration, unless there is one.
pub(super) fn config(path: &Path, content: &str) -> Result<Applied, Failure> {
    if path.exists() {
        return Ok(Applied::Unchanged);
    }
    outrider_process::fs::write_private(path, content.as_bytes())?;
    Ok(Applied::Changed)
}

/// Does something with a file that a process may still hold: a service of Windows tells its end a moment before its
/// process is gone, and until then its program cannot be replaced or removed.
fn once_free<T>(mut work: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    /// ERROR_SHARING_VIOLATION, which the standard library has no kind for.
    const SHARED: i32 = 32;
    let until = Instant::now() + PROCESS_END;
    loop {
        match work() {
            Err(error)
                if cfg!(windows)
                    && Instant::now() < until
                    && (error.kind() == io::ErrorKind::PermissionDenied
                        || error.raw_os_error() == Some(SHARED)) =>
            {
                // Windows tells nobody when a file is let go.
                std::thread::sleep(LOOK);
            }
            done => return done,
        }
    }
}

/// Removes a file.
pub(super) fn remove_file(path: &Path) -> Result<Applied, Failure> {
    match once_free(|| fs::remove_file(path)) {
        Ok(()) => Ok(Applied::Changed),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Applied::Unchanged),
        Err(error) => Err(failed("remove", path)(error)),
    }
}

/// Removes a folder of ours with all that is in it.
pub(super) fn remove_folder(path: &Path) -> Result<Applied, Failure> {
    match once_free(|| fs::remove_dir_all(path)) {
        Ok(()) => Ok(Applied::Changed),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Applied::Unchanged),
        Err(error) => Err(failed("remove", path)(error)),
    }
}

/// Removes a folder if nothing of others is in it.
pub(super) fn remove_if_empty(path: &Path) -> Applied {
    if fs::remove_dir(path).is_ok() { Applied::Changed } else { Applied::Unchanged }
}

fn same_file(a: &Path, b: &Path) -> bool {
    let real = |path: &Path| -> Option<PathBuf> { fs::canonicalize(path).ok() };
    matches!((real(a), real(b)), (Some(a), Some(b)) if a == b)
}

/// Runs a program of the system; its words are the failure's cause.
pub(super) fn run(program: &str, args: &[&str]) -> Result<String, Failure> {
    let shown = format!("{program} {}", args.join(" "));
    let output = std::process::Command::new(program)
        .args(args)
        .stdin(std::process::Stdio::null())
        .output()
        .map_err(|e| Failure::from(e).during(format!("cannot run {shown}")))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() {
        return Ok(text(&output.stdout));
    }
    let said = [text(&output.stderr), text(&output.stdout)];
    let said = said.iter().find(|s| !s.is_empty()).cloned().unwrap_or_default();
    Err(Failure::new(format!("{shown} failed ({})", output.status)).because(said))
}
