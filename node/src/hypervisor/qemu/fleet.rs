//! The QEMU processes of this host: one task for each `NAME.qmp` of the sockets folder, for as long as the socket is there.
//!
//! The folder is looked at twice a second; a socket that nobody listens at (its VM is off) is tried again at the same pace.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use outrider_process::tasks::{TaskGroup, TaskSpawner};
use outrider_proto::ids::VmGuid;
use tokio::sync::{mpsc, watch};

use super::checkpoint::Checkpoints;
use super::error::QemuError;
use super::machine::{Machine, is_leaving};
use super::qmp::{QmpError, QmpEvent};
use crate::hypervisor::{Change, ReplicaRole};

/// How often the folder is looked at, and a silent socket tried.
const LOOK: Duration = Duration::from_millis(500);
/// How often an open checkpoint's scratch files are looked at.
const SCRATCH: Duration = Duration::from_secs(1);
/// How long the first look may take before the agent goes on without a VM that does not answer.
const FIRST_LOOK: Duration = Duration::from_secs(5);
/// Differences waiting to be sent up.
const CHANGES: usize = 256;
/// libvirt's own sockets: recognised, not used.
const LIBVIRT: &str = "/var/lib/libvirt/qemu";

/// All QEMU processes.
#[derive(Clone)]
pub(super) struct Fleet {
    inner: Arc<Inner>,
}

struct Inner {
    folder: PathBuf,
    checkpoints: Checkpoints,
    machines: Mutex<BTreeMap<PathBuf, Arc<Machine>>>,
    listeners: Mutex<Vec<mpsc::Sender<Change>>>,
    /// Sockets with a task, and whether each has been tried once.
    watched: watch::Sender<BTreeMap<PathBuf, bool>>,
    tasks: TaskSpawner,
}

impl Fleet {
    /// Looks at the folder from now on; returns when every socket that is there has been tried.
    pub(super) async fn start(
        folder: PathBuf,
        checkpoints: Checkpoints,
        tasks: &TaskGroup,
    ) -> Self {
        let inner = Inner {
            folder,
            checkpoints,
            machines: Mutex::default(),
            listeners: Mutex::default(),
            watched: watch::Sender::new(BTreeMap::new()),
            tasks: tasks.spawner(),
        };
        let fleet = Self { inner: Arc::new(inner) };
        fleet.look();
        let looking = fleet.clone();
        let stop = tasks.token();
        tasks.spawn("sockets", async move {
            let mut told = BTreeSet::new();
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(LOOK) => {}
                }
                looking.look();
                tell_of_libvirt(&mut told);
            }
        });
        let mut watched = fleet.inner.watched.subscribe();
        let all_tried = watched.wait_for(|w| w.values().all(|tried| *tried));
        if tokio::time::timeout(FIRST_LOOK, all_tried).await.is_err() {
            tracing::warn!("not every QEMU of this host has answered yet");
        }
        fleet
    }

    /// Begins a task for every new socket.
    fn look(&self) {
        let entries = match std::fs::read_dir(&self.inner.folder) {
            Ok(entries) => entries,
            Err(e) => {
                tracing::warn!(folder = %self.inner.folder.display(), error = %e, "the sockets folder cannot be read");
                return;
            }
        };
        for entry in entries.flatten() {
            let socket = entry.path();
            if socket.extension().is_none_or(|e| e != "qmp") {
                continue;
            }
            let is_new = self.inner.watched.send_if_modified(|w| {
                let new = !w.contains_key(&socket);
                if new {
                    w.insert(socket.clone(), false);
                }
                new
            });
            if is_new {
                let fleet = self.clone();
                let name = format!("vm {}", socket.display());
                self.inner.tasks.spawn(&name, async move { fleet.keep(&socket).await });
            }
        }
    }

    /// Holds a socket's monitor for as long as the socket is there.
    async fn keep(&self, socket: &Path) {
        let stop = self.inner.tasks.token();
        let mut last_failure = String::new();
        // A VM whose monitor closed: gone, unless the next connection finds it again.
        let mut missing: Option<Arc<Machine>> = None;
        while socket.exists() && !stop.is_cancelled() {
            let opened = tokio::select! {
                () = stop.cancelled() => break,
                opened = Machine::open(socket, &self.inner.tasks) => opened,
            };
            match opened {
                Ok((machine, events)) => {
                    last_failure.clear();
                    if let Some(missing) = missing.take().filter(|m| m.vm != machine.vm) {
                        self.tell_gone(&missing);
                    }
                    let machine = Arc::new(machine);
                    self.hold(&machine, events).await;
                    missing = Some(machine);
                    // Whether it is gone is asked at once.
                    continue;
                }
                Err(failure) => {
                    if let Some(missing) = missing.take() {
                        self.tell_gone(&missing);
                    }
                    let text = failure.to_string();
                    if text != last_failure {
                        match &failure {
                            QemuError::Qmp(QmpError::Connect { .. }) => {
                                tracing::debug!(reason = text, "a VM is off");
                            }
                            _ => tracing::warn!(reason = text, "a VM cannot be reached"),
                        }
                        last_failure = text;
                    }
                }
            }
            self.tried(socket);
            tokio::select! {
                () = stop.cancelled() => break,
                () = tokio::time::sleep(LOOK) => {}
            }
        }
        if let Some(missing) = missing.filter(|_| !stop.is_cancelled()) {
            self.tell_gone(&missing);
        }
        self.inner.watched.send_modify(|w| {
            w.remove(socket);
        });
    }

    fn tell_gone(&self, machine: &Machine) {
        tracing::info!(vm = machine.name, guid = %machine.vm, "a VM's QEMU has ended");
        // Another process of this host may have the VM now (a migration within the host).
        match self.find(machine.vm).and_then(|other| other.last()) {
            Some(other) => self.tell(Change::Seen(Box::new(other))),
            None => self.tell(Change::Gone(machine.vm, ReplicaRole::None)),
        }
    }

    fn tried(&self, socket: &Path) {
        self.inner.watched.send_modify(|w| {
            if let Some(tried) = w.get_mut(socket) {
                *tried = true;
            }
        });
    }

    /// One QEMU from its greeting to the end of its monitor.
    async fn hold(&self, machine: &Arc<Machine>, mut events: mpsc::Receiver<QmpEvent>) {
        let stop = self.inner.tasks.token();
        let socket = machine.qmp.socket().to_owned();
        tracing::info!(vm = machine.name, guid = %machine.vm, qemu = %machine.qmp.version(), "a VM is here");
        // Before anybody hears of it: what a dead agent left is thawed, resumed and removed.
        self.inner.checkpoints.take_stock(machine).await;
        if machine.is_migrating() {
            self.inner.checkpoints.give_way(machine).await;
        }
        self.tell_news(machine).await;
        locked(&self.inner.machines).insert(socket.clone(), machine.clone());
        if let Some(seen) = machine.last() {
            self.tell(Change::Seen(Box::new(seen)));
        }
        self.tried(&socket);
        hint_at_bitmaps(machine).await;
        let mut tick = tokio::time::interval(SCRATCH);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                // The agent ends, not the VM: nothing is told.
                () = stop.cancelled() => return,
                event = events.recv() => match event {
                    Some(event) => self.happened(machine, event).await,
                    None => break,
                },
                _ = tick.tick() => {
                    if machine.has_checkpoint() {
                        self.inner.checkpoints.watch_scratch(machine).await;
                    }
                }
            }
        }
        locked(&self.inner.machines).remove(&socket);
    }

    async fn happened(&self, machine: &Arc<Machine>, event: QmpEvent) {
        match event.name.as_str() {
            "MIGRATION" => {
                let status = event.data["status"].as_str().unwrap_or_default();
                tracing::info!(vm = machine.name, status, "a migration");
                let leaving = is_leaving(status) && !self.is_arriving(machine).await;
                machine.set_migrating(leaving);
                if leaving {
                    self.inner.checkpoints.give_way(machine).await;
                } else {
                    self.tell_news(machine).await;
                }
            }
            // A short stop of our own, or the last moment of a migration: what follows tells more.
            "STOP" if machine.is_migrating() => {}
            "STOP" | "RESUME" | "SHUTDOWN" | "RESET" | "POWERDOWN" | "SUSPEND" | "WAKEUP"
            | "GUEST_PANICKED" | "BLOCK_IO_ERROR" | "DEVICE_DELETED" | "DEVICE_TRAY_MOVED" => {
                // A migration that failed, or only a short stop of our own while one goes on.
                if event.name == "RESUME" {
                    machine.ask_for_migration().await;
                }
                self.tell_news(machine).await;
            }
            "BLOCK_IMAGE_CORRUPTED" => {
                tracing::error!(vm = machine.name, detail = %event.data, "QEMU found a disk image corrupt; check it with qemu-img check");
            }
            _ => {}
        }
    }

    /// The target of a migration has the same events; it has nothing to give way with.
    async fn is_arriving(&self, machine: &Machine) -> bool {
        machine.run_state().await.is_ok_and(|s| s == "inmigrate")
    }

    async fn tell_news(&self, machine: &Machine) {
        match machine.news().await {
            Ok(Some(seen)) => {
                let known = locked(&self.inner.machines).contains_key(machine.qmp.socket());
                if known {
                    self.tell(Change::Seen(Box::new(seen)));
                }
            }
            Ok(None) => {}
            Err(e) => {
                tracing::debug!(vm = machine.name, error = %e, "a VM's state cannot be asked for");
            }
        }
    }

    /// Tells everybody who listens. Who does not keep up is dropped: its channel closes, and it takes a full inventory.
    fn tell(&self, change: Change) {
        locked(&self.inner.listeners).retain(|l| l.try_send(change.clone()).is_ok());
    }

    /// Differences from now on.
    pub(super) fn listen(&self) -> mpsc::Receiver<Change> {
        let (sender, receiver) = mpsc::channel(CHANGES);
        locked(&self.inner.listeners).push(sender);
        receiver
    }

    /// All machines, the realized ones of a GUID only where there are several.
    pub(super) fn machines(&self) -> Vec<Arc<Machine>> {
        let all: Vec<Arc<Machine>> = locked(&self.inner.machines).values().cloned().collect();
        let here = |m: &Arc<Machine>| m.last().is_some_and(|s| s.realized);
        let hidden = |m: &&Arc<Machine>| !here(m) && all.iter().any(|o| o.vm == m.vm && here(o));
        all.iter().filter(|m| !hidden(m)).cloned().collect()
    }

    /// The machine of a VM.
    pub(super) fn find(&self, vm: VmGuid) -> Option<Arc<Machine>> {
        self.machines().into_iter().find(|m| m.vm == vm)
    }

    /// The folder.
    pub(super) fn folder(&self) -> &Path {
        &self.inner.folder
    }

    /// What makes and removes checkpoints.
    pub(super) fn checkpoints(&self) -> &Checkpoints {
        &self.inner.checkpoints
    }

    /// Who spawns.
    pub(super) fn tasks(&self) -> &TaskSpawner {
        &self.inner.tasks
    }
}

/// Says beforehand what the first migration would cost.
async fn hint_at_bitmaps(machine: &Machine) {
    let Ok(disks) = machine.disks().await else { return };
    let forgetful = disks.iter().find(|d| d.uncapturable.is_none() && !d.persistent);
    if let (Some(disk), Ok(false)) = (forgetful, machine.bitmaps_travel().await) {
        tracing::warn!(
            vm = machine.name,
            disk = disk.slot,
            "a disk whose image keeps no bitmaps: after a migration without the capability dirty-bitmaps it is read in full"
        );
    }
}

/// Says once of each domain of libvirt how Outrider can reach it.
fn tell_of_libvirt(told: &mut BTreeSet<PathBuf>) {
    for entry in std::fs::read_dir(LIBVIRT).into_iter().flatten().flatten() {
        let monitor = entry.path().join("monitor.sock");
        if monitor.exists() && told.insert(monitor.clone()) {
            tracing::info!(
                monitor = %monitor.display(),
                "a libvirt domain: its monitor is libvirtd's; a second one through qemu:commandline lets Outrider protect it \
                 (docs/qemu.md)"
            );
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
