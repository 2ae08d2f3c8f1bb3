//! The demo's processes: this very binary, started, watched, killed and stopped.
//!
//! Nothing outlives the demo. Every child holds the read end of a pipe whose write end is ours, and leaves when it
//! closes (`--until-stdin-closes`): that holds even when the demo itself is killed with SIGKILL. A child that dies
//! unasked is started again, as a service manager would do. With `--keep` the pipe is left out on purpose.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use outrider_process::ports::Ready;
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::tell::Tell;
use crate::report::Failure;

/// A process serves within this or has failed. Generous: two cores may be busy with three disks.
const READY: Duration = Duration::from_secs(60);
/// An orderly stop takes no longer.
const STOP: Duration = Duration::from_secs(20);
/// Unasked deaths of one process after which something is wrong with it, not with what kills it.
const DEATHS: u32 = 20;

/// Which process, and from which configuration.
#[derive(Debug, Clone)]
pub(super) struct Spec {
    /// Name in this demo, unique.
    pub(super) name: String,
    /// Subcommand.
    pub(super) role: &'static str,
    /// Its configuration file.
    pub(super) config: PathBuf,
}

/// All processes of the demo.
#[derive(Debug)]
pub(super) struct Processes {
    dir: PathBuf,
    exe: PathBuf,
    keep: bool,
    tell: Tell,
    running: BTreeMap<String, Handle>,
    fatal: watch::Sender<Option<String>>,
}

#[derive(Debug)]
struct Handle {
    orders: mpsc::Sender<Order>,
    facts: Arc<Mutex<Facts>>,
    task: JoinHandle<()>,
}

/// What is known of a process.
#[derive(Debug, Default, Clone)]
pub(super) struct Facts {
    /// While it runs.
    pub(super) pid: Option<u32>,
    /// Addresses by purpose.
    pub(super) ready: Option<Ready>,
    /// Largest resident set of all its lives, bytes; 0 where the system does not tell.
    pub(super) peak_rss: u64,
    /// How often it was started.
    pub(super) starts: u32,
}

enum Order {
    Start(oneshot::Sender<Result<(), Failure>>),
    Kill(oneshot::Sender<()>),
    Stop(oneshot::Sender<Option<String>>),
}

impl Processes {
    pub(super) fn new(dir: &Path, keep: bool, tell: Tell) -> Result<Self, Failure> {
        let exe = std::env::current_exe()?;
        for folder in ["logs", "ready"] {
            std::fs::create_dir_all(dir.join(folder))?;
        }
        let (fatal, _) = watch::channel(None);
        Ok(Self { dir: dir.to_owned(), exe, keep, tell, running: BTreeMap::new(), fatal })
    }

    /// Says when a process cannot be kept alive.
    pub(super) fn fatal(&self) -> watch::Receiver<Option<String>> {
        self.fatal.subscribe()
    }

    /// Starts processes side by side and returns when all serve.
    pub(super) async fn start(&mut self, specs: Vec<Spec>) -> Result<(), Failure> {
        let mut answers = Vec::new();
        for spec in specs {
            let (orders, inbox) = mpsc::channel(4);
            let facts = Arc::new(Mutex::new(Facts::default()));
            let keeper = Keeper {
                spec: spec.clone(),
                dir: self.dir.clone(),
                exe: self.exe.clone(),
                keep: self.keep,
                tell: self.tell,
                facts: Arc::clone(&facts),
                fatal: self.fatal.clone(),
                lifeline: Mutex::new(None),
            };
            let task = tokio::spawn(keeper.run(inbox));
            let (answer, started) = oneshot::channel();
            let order = orders.send(Order::Start(answer)).await;
            self.running.insert(spec.name.clone(), Handle { orders, facts, task });
            answers.push((spec.name, order.is_ok(), started));
        }
        for (name, ordered, started) in answers {
            match started.await {
                Ok(result) if ordered => result?,
                _ => return Err(Failure::new(format!("the keeper of {name} is gone"))),
            }
        }
        Ok(())
    }

    /// Kills a process with SIGKILL; it stays down.
    pub(super) async fn kill(&self, name: &str) -> Result<u32, Failure> {
        let pid = self.facts(name)?.pid.unwrap_or_default();
        self.order(name, Order::Kill).await?;
        Ok(pid)
    }

    /// Starts a process that was killed.
    pub(super) async fn restart(&self, name: &str) -> Result<(), Failure> {
        self.order(name, Order::Start).await?
    }

    async fn order<T>(
        &self,
        name: &str,
        order: impl FnOnce(oneshot::Sender<T>) -> Order,
    ) -> Result<T, Failure> {
        let gone = || Failure::new(format!("no process {name:?} is kept here"));
        let (answer, done) = oneshot::channel();
        let handle = self.running.get(name).ok_or_else(gone)?;
        handle.orders.send(order(answer)).await.map_err(|_| gone())?;
        done.await.map_err(|_| gone())
    }

    pub(super) fn facts(&self, name: &str) -> Result<Facts, Failure> {
        let handle = self.running.get(name);
        let handle =
            handle.ok_or_else(|| Failure::new(format!("no process {name:?} is kept here")))?;
        Ok(lock(&handle.facts).clone())
    }

    /// Facts of all, with the resident sets as they are now.
    pub(super) fn all(&self) -> Vec<(String, Facts)> {
        let fresh = |handle: &Handle| {
            let mut facts = lock(&handle.facts);
            facts.note_rss();
            facts.clone()
        };
        self.running.iter().map(|(name, handle)| (name.clone(), fresh(handle))).collect()
    }

    /// Leaves all running (`--keep`).
    pub(super) fn let_go(self) {
        for handle in self.running.into_values() {
            // The child is not killed on drop with `--keep`.
            handle.task.abort();
        }
    }

    /// Stops all, the ones started last first. Gives a sentence for each that did not leave in order.
    pub(super) async fn stop(&mut self) -> Vec<String> {
        let mut complaints = Vec::new();
        let order = ["node", "storage", "coordinator", "lab"];
        let running = std::mem::take(&mut self.running);
        let mut groups: BTreeMap<usize, Vec<Handle>> = BTreeMap::new();
        for (name, handle) in running {
            // Names begin with the role: see `configs`.
            let place = order.iter().position(|role| name.starts_with(role)).unwrap_or(order.len());
            groups.entry(place).or_default().push(handle);
        }
        for handles in groups.into_values() {
            let mut waits = Vec::new();
            for handle in handles {
                let (answer, done) = oneshot::channel();
                // A keeper that is gone has nothing to stop.
                let _ = handle.orders.send(Order::Stop(answer)).await;
                waits.push((done, handle.task));
            }
            for (done, task) in waits {
                complaints.extend(done.await.ok().flatten());
                if task.await.is_err() {
                    complaints.push("the keeper of a process panicked".to_owned());
                }
            }
        }
        complaints
    }
}

fn lock(facts: &Mutex<Facts>) -> std::sync::MutexGuard<'_, Facts> {
    facts.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Facts {
    fn note_rss(&mut self) {
        if let Some(pid) = self.pid {
            self.peak_rss = self.peak_rss.max(peak_rss(pid));
        }
    }
}

/// VmHWM of a process on Linux, 0 elsewhere.
fn peak_rss(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    let kib = line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// Owns one process for the length of the demo.
struct Keeper {
    spec: Spec,
    dir: PathBuf,
    exe: PathBuf,
    keep: bool,
    tell: Tell,
    facts: Arc<Mutex<Facts>>,
    fatal: watch::Sender<Option<String>>,
    /// The child's lifeline. Kept apart from the child, since waiting for a child closes its standard input.
    lifeline: Mutex<Option<ChildStdin>>,
}

impl Keeper {
    async fn run(self, mut orders: mpsc::Receiver<Order>) {
        let mut child: Option<Child> = None;
        let mut deaths = 0;
        loop {
            let order = match &mut child {
                Some(running) => tokio::select! {
                    order = orders.recv() => order,
                    status = running.wait() => {
                        child = None;
                        deaths += 1;
                        match self.revive(&status, deaths).await {
                            Ok(revived) => child = Some(revived),
                            Err(failure) => {
                                self.fatal.send_replace(Some(failure.to_string()));
                            }
                        }
                        continue;
                    }
                },
                None => orders.recv().await,
            };
            match order {
                Some(Order::Start(answer)) => {
                    let started =
                        if child.is_some() { Ok(None) } else { self.launch().await.map(Some) };
                    // Whoever asked may have been cancelled.
                    let _ = answer.send(started.map(|new| child = new.or(child.take())));
                }
                Some(Order::Kill(answer)) => {
                    if let Some(running) = child.take() {
                        self.kill(running).await;
                    }
                    let _ = answer.send(());
                }
                Some(Order::Stop(answer)) => {
                    let complaint = match child.take() {
                        Some(running) => self.stop(running).await,
                        None => None,
                    };
                    let _ = answer.send(complaint);
                    return;
                }
                // The demo is gone (a panic); `kill_on_drop` ends the child.
                None => return,
            }
        }
    }

    async fn revive(
        &self,
        status: &std::io::Result<ExitStatus>,
        deaths: u32,
    ) -> Result<Child, Failure> {
        let name = &self.spec.name;
        let how = status.as_ref().map_or_else(ToString::to_string, ToString::to_string);
        lock(&self.facts).pid = None;
        if self.spec.role == "lab" {
            return Err(self
                .failure("the simulated cluster died, and its VMs with it".into())
                .because(how));
        }
        if deaths > DEATHS {
            return Err(self.failure(format!("{name} died {deaths} times")).because(how));
        }
        self.tell.say(format!("    ! {name} died unasked ({how}); starting it again"));
        self.launch().await
    }

    async fn launch(&self) -> Result<Child, Failure> {
        let name = &self.spec.name;
        let starts = {
            let mut facts = lock(&self.facts);
            facts.starts += 1;
            facts.ready = None;
            facts.starts
        };
        let ready_file = self.dir.join("ready").join(format!("{name}-{starts}.json"));
        let log = std::fs::File::options().create(true).append(true).open(self.log())?;
        let mut command = Command::new(&self.exe);
        command.arg(self.spec.role).arg("--config").arg(&self.spec.config);
        command.arg("--ready-file").arg(&ready_file);
        command.stdout(log.try_clone()?).stderr(log).env_remove("OUTRIDER_LOG");
        if self.keep {
            command.stdin(Stdio::null());
        } else {
            command.arg("--until-stdin-closes").stdin(Stdio::piped()).kill_on_drop(true);
        }
        // A group of its own: Ctrl-C is for the demo, which then stops them in order.
        #[cfg(unix)]
        command.process_group(0);
        let mut child =
            command.spawn().map_err(|e| Failure::from(e).during(format!("cannot start {name}")))?;
        *self.lifeline.lock().unwrap_or_else(PoisonError::into_inner) = child.stdin.take();
        lock(&self.facts).pid = child.id();
        let ready = tokio::select! {
            ready = Ready::wait(&ready_file, READY) => ready,
            status = child.wait() => {
                lock(&self.facts).pid = None;
                let how = status.map_or_else(|e| e.to_string(), |s| s.to_string());
                return Err(self.failure(format!("{name} ended at its start ({how})")));
            }
        };
        let Some(ready) = ready else {
            self.kill(child).await;
            return Err(self.failure(format!("{name} did not serve within {} s", READY.as_secs())));
        };
        lock(&self.facts).ready = Some(ready);
        Ok(child)
    }

    fn log(&self) -> PathBuf {
        self.dir.join("logs").join(format!("{}.log", self.spec.name))
    }

    /// A failure with the end of the process's log.
    fn failure(&self, what: String) -> Failure {
        let log = std::fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<_> = log.lines().rev().take(6).collect();
        let failure = Failure::new(what).hint(format!("The log is {}.", self.log().display()));
        lines.into_iter().rev().fold(failure, Failure::because)
    }

    async fn kill(&self, mut child: Child) {
        lock(&self.facts).note_rss();
        // Both fail only when it has ended already.
        let _ = child.start_kill();
        let _ = child.wait().await;
        lock(&self.facts).pid = None;
    }

    async fn stop(&self, mut child: Child) -> Option<String> {
        lock(&self.facts).note_rss();
        ask_to_leave(&child);
        // Without signals the closing pipe is what asks.
        *self.lifeline.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let complaint = match tokio::time::timeout(STOP, child.wait()).await {
            Ok(Ok(status)) if status.success() => None,
            Ok(Ok(status)) => Some(format!("{} left with {status}", self.spec.name)),
            Ok(Err(error)) => Some(format!("{}: {error}", self.spec.name)),
            Err(_) => {
                let _ = child.start_kill();
                let _ = child.wait().await;
                Some(format!(
                    "{} did not leave within {} s and was killed",
                    self.spec.name,
                    STOP.as_secs()
                ))
            }
        };
        lock(&self.facts).pid = None;
        complaint
    }
}

#[cfg(unix)]
fn ask_to_leave(child: &Child) {
    let pid =
        child.id().and_then(|id| i32::try_from(id).ok()).and_then(rustix::process::Pid::from_raw);
    if let Some(pid) = pid {
        // It fails only when the process has ended already.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
}

#[cfg(not(unix))]
fn ask_to_leave(_child: &Child) {}
