//! Guests that we hold still: frozen by their agent, or stopped for the moment in which the filters are put in.
//!
//! A guest that is held and forgotten is an outage, so: the intent is written to a file before, and the file is removed only
//! when the guest was seen to go on. A task of its own thaws, whatever becomes of the job that wanted the freeze. An agent that
//! starts releases what its predecessor held. Guests that somebody else froze or stopped are not touched.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use outrider_process::tasks::TaskSpawner;
use serde_json::Value;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::error::QemuError;
use super::guest::GuestAgent;
use super::machine::Machine;
use super::qmp::QmpError;

/// Pause before a guest that could not be thawed is tried again.
const AGAIN: Duration = Duration::from_millis(500);

/// Holds guests, and lets them go.
#[derive(Debug, Clone)]
pub(super) struct Held {
    /// Folder of the records.
    pub(super) folder: PathBuf,
    /// Longest freeze.
    pub(super) freeze: Duration,
    /// How long the guest agent may take to answer.
    pub(super) patience: Duration,
    pub(super) tasks: TaskSpawner,
}

/// A frozen guest. It is thawed by [`Frozen::thaw`], by being dropped, and after the longest freeze.
pub(super) struct Frozen {
    vm: String,
    patience: Duration,
    done: oneshot::Sender<()>,
    thawed: oneshot::Receiver<Result<(), String>>,
}

impl Frozen {
    /// Thaws.
    ///
    /// # Errors
    /// The guest was not frozen until now.
    pub(super) async fn thaw(self) -> Result<(), QemuError> {
        // The task may have thawed already and be gone.
        let _ = self.done.send(());
        let outcome = match tokio::time::timeout(self.patience, self.thawed).await {
            Ok(outcome) => {
                outcome.unwrap_or_else(|_| Err("was lost while the guest was frozen".into()))
            }
            Err(_) => Err("has not thawed the guest yet; it is asked again until it does".into()),
        };
        outcome.map_err(|reason| QemuError::Guest { vm: self.vm, reason })
    }
}

impl Held {
    /// Freezes the guest's file systems.
    ///
    /// # Errors
    /// [`QemuError::Guest`]: not frozen, or thawed again.
    pub(super) async fn freeze(&self, machine: &Arc<Machine>) -> Result<Frozen, QemuError> {
        let vm = machine.name.clone();
        let failed = |reason: String| QemuError::Guest { vm: vm.clone(), reason };
        let (frozen_in, frozen) = oneshot::channel();
        let (done, is_done) = oneshot::channel();
        let (thawed_in, thawed) = oneshot::channel();
        let (held, of) = (self.clone(), machine.clone());
        self.tasks.spawn(&format!("freeze {vm}"), async move {
            held.freeze_and_thaw(&of, frozen_in, is_done, thawed_in).await;
        });
        match frozen.await {
            Ok(Ok(())) => Ok(Frozen { vm, patience: 2 * self.patience, done, thawed }),
            Ok(Err(reason)) => Err(failed(reason)),
            Err(_) => Err(failed("was lost while it was to be frozen".into())),
        }
    }

    async fn freeze_and_thaw(
        &self,
        machine: &Machine,
        frozen: oneshot::Sender<Result<(), String>>,
        done: oneshot::Receiver<()>,
        thawed: oneshot::Sender<Result<(), String>>,
    ) {
        // Whoever asked may have gone; the guest is thawed all the same.
        let mut agent = match self.prepare(machine).await {
            Ok(agent) => agent,
            Err(reason) => {
                let _ = frozen.send(Err(reason));
                return;
            }
        };
        let began = Instant::now();
        match agent.execute("guest-fsfreeze-freeze", self.freeze).await {
            Ok(_) => {
                let _ = frozen.send(Ok(()));
            }
            Err(reason) => {
                let _ = frozen.send(Err(reason));
                // It may have frozen some, or do it later.
                self.thaw_for_certain(machine, Some(agent)).await;
                return;
            }
        }
        let left = self.freeze.saturating_sub(began.elapsed());
        let in_time = tokio::time::timeout(left, done).await.is_ok();
        let count = self.thaw_for_certain(machine, Some(agent)).await;
        let outcome = match (in_time, count) {
            (false, _) => {
                Err(format!("was thawed after {:?}, before the checkpoint was made", self.freeze))
            }
            (true, Some(0)) => {
                Err("had been thawed by somebody else before the checkpoint was made".to_owned())
            }
            (true, None) => Err("did not say that it is thawed".to_owned()),
            (true, Some(_)) => Ok(()),
        };
        let _ = thawed.send(outcome);
    }

    /// Connects, makes sure that nobody else has frozen the guest, and records the intent.
    async fn prepare(&self, machine: &Machine) -> Result<GuestAgent, String> {
        let socket = machine
            .agent_socket()
            .ok_or("has no socket NAME.qga beside the monitor: see docs/qemu.md")?;
        let mut agent = GuestAgent::connect(&socket, self.patience).await?;
        let status = agent.execute("guest-fsfreeze-status", self.patience).await?;
        if status.as_str() != Some("thawed") {
            return Err(
                "says that its file systems are frozen by somebody else; thaw them or wait".into(),
            );
        }
        self.record(machine, "frozen").map_err(|e| e.to_string())?;
        Ok(agent)
    }

    /// Thaws until the guest says so, or its QEMU is gone. Gives the number of file systems thawed, when it was told.
    async fn thaw_for_certain(&self, machine: &Machine, agent: Option<GuestAgent>) -> Option<u64> {
        let mut agent = agent;
        let mut count = None;
        loop {
            match self.thaw_once(machine, agent.take()).await {
                Ok((thawed, true)) => {
                    self.forget(machine, "frozen");
                    return Some(count.unwrap_or(0) + thawed);
                }
                Ok((thawed, false)) => count = Some(count.unwrap_or(0) + thawed),
                Err(reason) => {
                    tracing::error!(vm = machine.name, reason, "the guest could not be thawed yet");
                }
            }
            if machine.qmp.is_closed() {
                // The frozen state went with its QEMU, or travelled: the next agent looks by the record.
                return count;
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn thaw_once(
        &self,
        machine: &Machine,
        agent: Option<GuestAgent>,
    ) -> Result<(u64, bool), String> {
        let mut agent = match agent {
            Some(agent) => agent,
            None => {
                let socket = machine.agent_socket().ok_or("its socket is gone")?;
                GuestAgent::connect(&socket, self.patience).await?
            }
        };
        let count = agent.execute("guest-fsfreeze-thaw", self.patience).await?;
        let status = agent.execute("guest-fsfreeze-status", self.patience).await?;
        Ok((count.as_u64().unwrap_or(0), status.as_str() == Some("thawed")))
    }

    /// Sends commands while the VM stands still: a running one is stopped for them and goes on afterwards, whatever becomes
    /// of who asked. One that somebody else stopped is left as it is.
    ///
    /// # Errors
    /// [`QemuError`]: not sent; or sent, and the VM is not seen to go on yet.
    pub(super) async fn while_still(
        &self,
        machine: &Arc<Machine>,
        commands: Vec<(&'static str, Value)>,
    ) -> Result<Vec<Result<Value, QmpError>>, QemuError> {
        let (done, is_done) = oneshot::channel();
        let (held, of) = (self.clone(), machine.clone());
        self.tasks.spawn(&format!("still {}", machine.name), async move {
            held.stop_and_go(&of, commands, done).await;
        });
        let ending = || QemuError::Busy {
            vm: machine.name.clone(),
            what: "the agent is about to end".to_owned(),
        };
        is_done.await.unwrap_or_else(|_| Err(ending()))
    }

    async fn stop_and_go(
        &self,
        machine: &Machine,
        commands: Vec<(&'static str, Value)>,
        done: oneshot::Sender<Result<Vec<Result<Value, QmpError>>, QemuError>>,
    ) {
        // A VM that the one before us has not let go on yet is nobody else's `paused`.
        let Ok(_still) = machine.still.try_lock() else {
            let what = "it is not seen yet to go on after a short stop".to_owned();
            let _ = done.send(Err(QemuError::Busy { vm: machine.name.clone(), what }));
            return;
        };
        let stops = match self.may_stop(machine).await {
            Ok(stops) => stops,
            Err(e) => {
                let _ = done.send(Err(e));
                return;
            }
        };
        if !stops {
            let _ = done.send(Ok(machine.qmp.execute_all(commands).await));
            return;
        }
        let stop = std::iter::once(("stop", Value::Null));
        let mut answers = machine.qmp.execute_all(stop.chain(commands).collect()).await;
        // It may have stopped, whatever it said, unless it said no.
        let resumed = match answers.remove(0) {
            Err(e) if e.is_refusal() => {
                self.forget(machine, "stopped");
                let _ = done.send(Err(e.into()));
                return;
            }
            _ => self.resume(machine).await,
        };
        let unseen = resumed.is_err();
        let _ = done.send(resumed.map(|()| answers).map_err(QemuError::from));
        if unseen {
            self.resume_for_certain(machine).await;
        }
    }

    /// Whether it runs, so that we may stop it; then that is written down.
    async fn may_stop(&self, machine: &Machine) -> Result<bool, QemuError> {
        if machine.run_state().await? != "running" {
            return Ok(false);
        }
        // A stop in the last moments of a migration would travel: the VM would arrive paused, and stay so.
        machine.ask_for_migration().await;
        if machine.is_migrating() {
            let what = "a migration began".to_owned();
            return Err(QemuError::Busy { vm: machine.name.clone(), what });
        }
        self.record(machine, "stopped")?;
        Ok(true)
    }

    /// After a short stop: lets the VM go on. Only one that is `paused` still: one that a migration took away meanwhile
    /// (`finish-migrate`, `postmigrate`) runs elsewhere, and `cont` would make it run here as well, on the same disks.
    async fn resume(&self, machine: &Machine) -> Result<(), QmpError> {
        if machine.run_state().await? == "paused" {
            machine.qmp.execute("cont", Value::Null).await?;
        }
        self.forget(machine, "stopped");
        Ok(())
    }

    /// Lets a VM that we stopped go on until it was seen to, or its QEMU is gone.
    async fn resume_for_certain(&self, machine: &Machine) {
        while let Err(e) = self.resume(machine).await {
            tracing::error!(vm = machine.name, error = %e, "the VM could not be resumed yet");
            if machine.qmp.is_closed() {
                // The next connection looks by the record.
                return;
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Lets go what an earlier agent held in this VM.
    pub(super) async fn release(&self, machine: &Arc<Machine>) {
        if self.is_recorded(machine, "stopped") {
            tracing::warn!(
                vm = machine.name,
                "letting a VM go on that an earlier agent may have stopped for a moment"
            );
            // Held from now on: nobody is to see its `paused` before it goes on.
            let still = machine.still.clone().lock_owned().await;
            let (held, of) = (self.clone(), machine.clone());
            self.tasks.spawn(&format!("resume {}", machine.name), async move {
                held.resume_for_certain(&of).await;
                drop(still);
            });
        }
        if self.is_recorded(machine, "frozen") {
            tracing::warn!(vm = machine.name, "thawing a guest that an earlier agent had frozen");
            let (held, of) = (self.clone(), machine.clone());
            self.tasks.spawn(&format!("thaw {}", machine.name), async move {
                held.thaw_for_certain(&of, None).await;
            });
        }
    }

    fn path(&self, machine: &Machine, what: &str) -> PathBuf {
        self.folder.join(format!("{}.{what}", machine.vm))
    }

    /// Of this very process: a VM that was started anew is not held by us.
    fn is_recorded(&self, machine: &Machine, what: &str) -> bool {
        let path = self.path(machine, what);
        let Ok(text) = std::fs::read_to_string(&path) else { return false };
        let same = text.trim() == process(machine);
        if !same {
            self.forget(machine, what);
        }
        same
    }

    fn record(&self, machine: &Machine, what: &str) -> Result<(), QemuError> {
        let path = self.path(machine, what);
        let failed = |e: &dyn std::fmt::Display| QemuError::File {
            doing: "write",
            path: path.clone(),
            reason: e.to_string(),
        };
        std::fs::create_dir_all(&self.folder).map_err(|e| failed(&e))?;
        outrider_process::fs::write_atomic(&path, process(machine).as_bytes())
            .map_err(|e| failed(&e))
    }

    fn forget(&self, machine: &Machine, what: &str) {
        let path = self.path(machine, what);
        if let Err(e) = std::fs::remove_file(&path)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), error = %e, "a record stays behind");
        }
    }
}

fn process(machine: &Machine) -> String {
    machine.qmp.peer().map_or_else(String::new, |pid| pid.to_string())
}
