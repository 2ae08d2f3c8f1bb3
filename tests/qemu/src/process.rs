//! A QEMU process that never outlives its owner.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use crate::error::Error;
use crate::keeper::Keeper;
use crate::wait::until;

/// Starts its arguments, tells their process id, and kills them when its standard input closes.
const KEEPER: &str = r#"
exec 3<&0
"$@" 3<&- </dev/null >>"$OUTRIDER_VM_LOG" 2>&1 &
vm=$!
echo $vm
{ cat >/dev/null; kill -9 $vm; } <&3 >/dev/null 2>&1 &
watcher=$!
exec 3<&- 0<&-
wait $vm
code=$?
kill $watcher
exit $code
"#;

/// One QEMU process.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    /// `None` for one that somebody else started.
    keeper: Option<Keeper>,
}

impl Process {
    /// Starts a command line; what it says goes to `log`.
    ///
    /// # Errors
    /// [`Error::Start`].
    pub fn start(command_line: &[OsString], log: &Path) -> Result<Self, Error> {
        let text = || command_line.first().map_or_else(String::new, |c| c.display().to_string());
        let fail = |source| Error::Start { command: text(), source };
        let mut shell = Command::new("sh");
        shell
            .args(["-c", KEEPER, "outrider-keeper"])
            .args(command_line)
            .env("OUTRIDER_VM_LOG", log);
        let (keeper, line) = Keeper::start(&mut shell).map_err(fail)?;
        let pid = line.parse().ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| fail(std::io::Error::other("it tells no process id")))?;
        Ok(Self { pid, keeper: Some(keeper) })
    }

    /// Takes care of a process that somebody else started.
    #[must_use]
    pub fn adopt(pid: Pid) -> Self {
        Self { pid, keeper: None }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        match &mut self.keeper {
            Some(keeper) => keeper.runs(),
            None => test_kill_process(self.pid).is_ok() && !is_zombie(self.pid),
        }
    }

    /// SIGKILL, as a power cut of this VM.
    pub fn kill(&mut self) {
        if self.runs() {
            // An error means that it ended by itself.
            let _ = kill_process(self.pid, Signal::KILL);
        }
        if let Some(keeper) = self.keeper.take() {
            keeper.wait();
        }
    }

    /// SIGSTOP or SIGCONT: the whole VM stands still, its monitors too.
    pub fn pause(&self, paused: bool) {
        let signal = if paused { Signal::STOP } else { Signal::CONT };
        let _ = kill_process(self.pid, signal);
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// [`Error::Late`].
    pub async fn ended(&mut self, vm: &str, patience: Duration) -> Result<(), Error> {
        until(&format!("the end of {vm}'s process"), patience, async || {
            Ok(if self.runs() { Err("it runs".to_owned()) } else { Ok(()) })
        })
        .await
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Ended, and not yet noticed by whoever started it.
fn is_zombie(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
    stat.is_ok_and(|s| s.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z')))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper(dir: &Path) -> Process {
        let line = ["sleep", "600"].map(OsString::from);
        Process::start(&line, &dir.join("log")).expect("starts")
    }

    #[tokio::test]
    async fn it_ends_with_its_owner_however_that_ends() {
        let dir = tempfile::tempdir().expect("a folder");
        let mut first = sleeper(dir.path());
        assert!(first.runs());
        let mut watched = Process::adopt(first.pid());
        first.kill();
        watched.ended("sleeper", Duration::from_secs(10)).await.expect("killed");

        // As if the owner were gone: nobody holds the keeper's input any more.
        let mut second = sleeper(dir.path());
        let mut watched = Process::adopt(second.pid());
        second.keeper.as_mut().expect("it has one").abandon();
        watched.ended("sleeper", Duration::from_secs(10)).await.expect("killed by its keeper");
    }
}
