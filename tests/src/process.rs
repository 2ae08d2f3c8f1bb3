//! One process of the fabric: started, waited for, stopped, killed; never left behind.

use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use outrider_process::ports::Ready;
use rustix::process::{Pid, Signal, kill_process};

use crate::binary::Program;
use crate::wait::DEADLINE;

/// Lines of a log that a failed test shows.
const TAIL: usize = 60;

/// A process with its configuration, its log and the place where it says that it serves.
#[derive(Debug)]
pub struct Process {
    role: &'static str,
    name: String,
    dir: PathBuf,
    child: Option<Child>,
    starts: u32,
    program: Program,
}

impl Process {
    /// Starts `outrider ROLE --config DIR/ROLE-NAME.toml`.
    #[must_use]
    pub fn start(role: &'static str, name: &str, dir: &Path, config: &str) -> Self {
        Self::start_with(Program::native(), role, name, dir, config)
    }

    /// The same with another build of the program.
    #[must_use]
    pub fn start_with(
        program: Program,
        role: &'static str,
        name: &str,
        dir: &Path,
        config: &str,
    ) -> Self {
        let (name, dir) = (name.to_owned(), dir.to_owned());
        let mut process = Self { role, name, dir, child: None, starts: 0, program };
        std::fs::write(process.config_file(), config).expect("the folder is writable");
        process.restart();
        process
    }

    /// Starts it again; whatever ran before is gone.
    pub fn restart(&mut self) {
        self.kill();
        self.starts += 1;
        let log = File::options().create(true).append(true).open(self.log()).expect("a log");
        let mut command = self.program.command();
        command.arg(self.role).arg("--config").arg(self.config_file());
        command.arg("--ready-file").arg(self.ready_file());
        // Held open by this test: the process leaves when the test dies in any way.
        command.arg("--until-stdin-closes").stdin(Stdio::piped());
        command.stdout(log.try_clone().expect("a handle")).stderr(log);
        self.child = Some(command.spawn().expect("the program starts"));
    }

    /// Its name in the fabric.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    fn file(&self, extension: &str) -> PathBuf {
        self.dir.join(format!("{}-{}.{extension}", self.role, self.name))
    }

    fn config_file(&self) -> PathBuf {
        self.file("toml")
    }

    fn ready_file(&self) -> PathBuf {
        // A name for each start: an old file must not speak for a new process.
        self.file(&format!("{}.ready", self.starts))
    }

    /// Its log, of all starts together.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.file("log")
    }

    /// What the log says so far.
    #[must_use]
    pub fn logged(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log()).unwrap_or_default()).into_owned()
    }

    /// Waits until it serves.
    ///
    /// # Errors
    /// Its log, when it ended instead.
    pub async fn try_ready(&mut self) -> Result<Ready, String> {
        let give_up = Instant::now() + DEADLINE;
        loop {
            if let Some(ready) = Ready::wait(&self.ready_file(), Duration::from_millis(200)).await {
                return Ok(ready);
            }
            let ended = self.exited();
            if ended.is_some() || Instant::now() > give_up {
                let state = ended.map_or("is not ready".to_owned(), |s| format!("ended with {s}"));
                return Err(format!("{} {} {state}:\n{}", self.role, self.name, self.tail()));
            }
        }
    }

    /// Waits until it serves; panics with its log when it does not.
    pub async fn ready(&mut self) -> Ready {
        self.try_ready().await.unwrap_or_else(|reason| panic!("{reason}"))
    }

    /// Where it serves metrics and health.
    pub async fn observability(&mut self) -> SocketAddr {
        let ready = self.ready().await;
        let mut named = ["metrics", "observability"].iter().filter_map(|n| ready.addresses.get(*n));
        *named.next().unwrap_or_else(|| panic!("it tells where: {ready:?}"))
    }

    /// How it ended, if it did.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.as_mut()?.try_wait().expect("a child of ours")
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw).expect("a process id");
        kill_process(pid, signal).expect("a child of ours can be signalled");
    }

    /// SIGSTOP: it does nothing at all until [`Self::resume`].
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// SIGCONT.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// SIGKILL, and its end waited for.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // An error means that it ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM; gives how it ended.
    pub async fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        crate::eventually(&format!("{} {} leaves", self.role, self.name), async || {
            self.exited().ok_or_else(|| "it still runs".to_owned())
        })
        .await
    }

    fn tail(&self) -> String {
        let log = self.logged();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(TAIL)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("---- {} {}\n{}", self.role, self.name, self.tail());
        }
    }
}
