//! The shared state: changed under one lock, watched by whoever waits, heard by whoever subscribed.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::classes;
use crate::config::LabConfig;
use crate::error::LabError;
use crate::guest::Chance;
use crate::hardware::Equipment;
use crate::model::{Host, MODIFIED, Notice, State};

/// Events kept for slow subscribers before they are told that some were lost.
const EVENT_BACKLOG: usize = 1024;

/// The simulated cluster.
pub(crate) struct Cluster {
    pub(crate) config: LabConfig,
    state: Mutex<State>,
    changed: watch::Sender<u64>,
    events: broadcast::Sender<Arc<Notice>>,
    /// Everything the lab has spawned; joined at its end.
    pub(crate) tasks: TaskTracker,
    pub(crate) cancel: CancellationToken,
}

impl Cluster {
    pub(crate) fn new(
        mut config: LabConfig,
        cancel: CancellationToken,
    ) -> Result<Arc<Self>, LabError> {
        if config.hosts.is_empty() || config.csvs.is_empty() {
            return Err(LabError::Config("at least one host and one CSV are needed".into()));
        }
        for folder in config.csvs.iter().map(|c| &c.path).chain([&config.truth.dir]) {
            std::fs::create_dir_all(folder).map_err(LabError::io("make the folder", folder))?;
        }
        // A file has one name only: agents come back with the names that parents were found under.
        for csv in &mut config.csvs {
            csv.path = csv.path.canonicalize().map_err(LabError::io("find", &csv.path))?;
        }
        let hosts = config.hosts.iter().map(|name| {
            let host = Host {
                up: true,
                paused: false,
                // Longer ago than two starts of one host can be apart.
                started: now().saturating_sub(3600),
                connections: 0,
                life: CancellationToken::new(),
                wmi: CancellationToken::new(),
                equipment: Equipment::of(name),
            };
            (name.clone(), host)
        });
        let state = State {
            realm: config.realm.clone(),
            hosts: hosts.collect(),
            csvs: config.csvs.clone(),
            vms: Default::default(),
            planned: Default::default(),
            jobs: Default::default(),
            switch: config.checkpoint_on_migration,
            faults: Vec::new(),
            holds: Vec::new(),
            gates: Vec::new(),
            open_files: Default::default(),
            paused_reads: Default::default(),
            bytes_read: Default::default(),
            calls: Default::default(),
            truth: Vec::new(),
            chance: Chance::new(config.seed),
            counter: 0,
            outbox: Vec::new(),
            around: Default::default(),
        };
        Ok(Arc::new(Self {
            config,
            state: Mutex::new(state),
            changed: watch::Sender::new(0),
            events: broadcast::Sender::new(EVENT_BACKLOG),
            tasks: TaskTracker::new(),
            cancel,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while the state was locked is a bug that its own test shows; the lab goes on.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the state.
    pub(crate) fn read<R>(&self, look: impl FnOnce(&State) -> R) -> R {
        look(&self.lock())
    }

    /// Changes the state, then wakes those who wait for a condition. Events leave in the order of the changes.
    pub(crate) fn change<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        let result = {
            let mut state = self.lock();
            let result = change(&mut state);
            for notice in std::mem::take(&mut state.outbox) {
                // Nobody listening is fine.
                let _ = self.events.send(Arc::new(notice));
            }
            result
        };
        self.changed.send_modify(|n| *n += 1);
        result
    }

    /// Waits until `look` gives something; it is asked again after every change.
    pub(crate) async fn until<R>(&self, mut look: impl FnMut(&mut State) -> Option<R>) -> R {
        let mut changes = self.changed.subscribe();
        loop {
            changes.mark_unchanged();
            if let Some(found) = look(&mut self.lock()) {
                return found;
            }
            if changes.changed().await.is_err() {
                // The sender lives as long as `self`.
                std::future::pending::<()>().await;
            }
        }
    }

    pub(crate) fn events(&self) -> broadcast::Receiver<Arc<Notice>> {
        self.events.subscribe()
    }

    /// Changes a VM and tells subscribers of its host.
    pub(crate) fn change_vm<R>(
        &self,
        id: Uuid,
        change: impl FnOnce(&mut crate::model::Vm) -> R,
    ) -> Result<R, LabError> {
        self.change(|state| {
            let result = change(state.vm_mut(id)?);
            state.announce_vm(id);
            Ok(result)
        })
    }

    /// Runs work that blocks on disks and locks.
    pub(crate) async fn blocking<R: Send + 'static>(
        &self,
        work: impl FnOnce() -> R + Send + 'static,
    ) -> Result<R, LabError> {
        tokio::task::spawn_blocking(work).await.map_err(|_| LabError::Ending)
    }

    pub(crate) async fn pause(&self, ms: u64) {
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }
}

impl State {
    /// Tells the VM's host that its VM changed.
    pub(crate) fn announce_vm(&mut self, id: Uuid) {
        if let Some(vm) = self.vms.get(&id) {
            let (host, target) = (vm.host.clone(), classes::computer_system(vm));
            self.notify(Some(&host), MODIFIED, target, None);
        }
    }
}

/// Seconds since 1970, for things that carry their birthday.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
