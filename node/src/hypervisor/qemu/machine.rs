//! One running QEMU: who it is, what it does, what its disks are.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outrider_process::tasks::TaskSpawner;
use outrider_proto::ids::VmGuid;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::blocks::{self, Disk};
use super::error::QemuError;
use super::names;
use super::qmp::{Qmp, QmpError, QmpEvent};
use crate::hypervisor::facts::Format;
use crate::hypervisor::{DiskSeen, Power, ReplicaRole, VmSeen};

/// A QEMU process with an open monitor.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) qmp: Qmp,
    pub(super) vm: VmGuid,
    pub(super) name: String,
    /// One change of the block graph at a time.
    pub(super) graph: tokio::sync::Mutex<()>,
    /// Taken by who stops the VM for a moment, until it goes on.
    pub(super) still: Arc<tokio::sync::Mutex<()>>,
    /// A migration away from here is on its way.
    migrating: AtomicBool,
    /// A checkpoint of ours may be open.
    has_checkpoint: AtomicBool,
    last: Mutex<Option<VmSeen>>,
}

impl Machine {
    /// Connects to a monitor and asks who it is.
    ///
    /// # Errors
    /// [`QemuError`].
    pub(super) async fn open(
        socket: &Path,
        tasks: &TaskSpawner,
    ) -> Result<(Self, mpsc::Receiver<QmpEvent>), QemuError> {
        let (qmp, events) = Qmp::connect(socket, tasks).await?;
        let uuid = qmp.execute("query-uuid", Value::Null).await?;
        let vm =
            uuid["UUID"].as_str().and_then(|u| Uuid::try_parse(u).ok()).filter(|u| !u.is_nil());
        let Some(vm) = vm else {
            return Err(QmpError::Odd {
                socket: socket.to_owned(),
                command: "query-uuid".into(),
                detail: "the VM has no UUID and cannot be followed; start it with -uuid".into(),
            }
            .into());
        };
        let name = qmp.execute("query-name", Value::Null).await?;
        let name = name["name"].as_str().filter(|n| !n.is_empty());
        let name = name.map_or_else(|| stem(socket), str::to_owned);
        let machine = Self {
            qmp,
            vm: VmGuid(vm),
            name,
            graph: tokio::sync::Mutex::new(()),
            still: Arc::default(),
            migrating: AtomicBool::new(false),
            has_checkpoint: AtomicBool::new(false),
            last: Mutex::new(None),
        };
        machine.want_migration_events().await;
        Ok((machine, events))
    }

    /// MIGRATION events are off by default. During a migration they cannot be switched on: then RESUME and STOP have to do.
    async fn want_migration_events(&self) {
        let wanted = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        if let Err(e) = self.qmp.execute("migrate-set-capabilities", wanted).await {
            tracing::debug!(vm = self.name, error = %e, "no events of migrations");
        }
        self.ask_for_migration().await;
    }

    /// Whether a migration away from here is on its way, by QEMU's own word and not by events, which may have been missed.
    pub(super) async fn ask_for_migration(&self) {
        let arriving = self.run_state().await.is_ok_and(|s| s == "inmigrate");
        match self.qmp.execute("query-migrate", Value::Null).await {
            Ok(now) => {
                let status = now["status"].as_str().unwrap_or_default();
                self.set_migrating(is_leaving(status) && !arriving);
            }
            Err(e) => {
                tracing::debug!(vm = self.name, error = %e, "the state of migrations is unknown");
            }
        }
    }

    /// The guest agent's socket, when there is one.
    pub(super) fn agent_socket(&self) -> Option<PathBuf> {
        let socket = self.qmp.socket().with_extension("qga");
        socket.exists().then_some(socket)
    }

    pub(super) fn is_migrating(&self) -> bool {
        self.migrating.load(Ordering::Acquire)
    }

    pub(super) fn set_migrating(&self, migrating: bool) {
        self.migrating.store(migrating, Ordering::Release);
    }

    pub(super) fn has_checkpoint(&self) -> bool {
        self.has_checkpoint.load(Ordering::Acquire)
    }

    pub(super) fn set_has_checkpoint(&self, has: bool) {
        self.has_checkpoint.store(has, Ordering::Release);
    }

    /// The run state, such as "running".
    pub(super) async fn run_state(&self) -> Result<String, QmpError> {
        let status = self.qmp.execute("query-status", Value::Null).await?;
        Ok(status["status"].as_str().unwrap_or_default().to_owned())
    }

    /// The disks as they are now.
    pub(super) async fn disks(&self) -> Result<Vec<Disk>, QmpError> {
        let devices = self.qmp.execute("query-block", Value::Null).await?;
        let nodes = self.nodes().await?;
        // Only a filter of ours needs to be looked below.
        let ours = |d: &Value| {
            d["inserted"]["node-name"].as_str().is_some_and(|n| names::parse_node(n).is_some())
        };
        let filtered = devices.as_array().is_some_and(|all| all.iter().any(ours));
        let below = if filtered {
            blocks::below(&self.qmp.execute("x-debug-query-block-graph", Value::Null).await?)
        } else {
            Vec::new()
        };
        let mut disks = blocks::disks(&devices, &nodes, &below);
        if self.qmp.version() < super::IOTHREADS && self.has_iothreads().await? {
            for disk in &mut disks {
                disk.uncapturable.get_or_insert(super::IN_IOTHREAD);
            }
        }
        Ok(disks)
    }

    async fn has_iothreads(&self) -> Result<bool, QmpError> {
        let all = self.qmp.execute("query-iothreads", Value::Null).await?;
        Ok(all.as_array().is_some_and(|all| !all.is_empty()))
    }

    /// Whether dirty bitmaps that no image keeps travel with a migration.
    pub(super) async fn bitmaps_travel(&self) -> Result<bool, QmpError> {
        let all = self.qmp.execute("query-migrate-capabilities", Value::Null).await?;
        let all = all.as_array().into_iter().flatten();
        Ok(all.filter(|c| c["capability"] == "dirty-bitmaps").any(|c| c["state"] == true))
    }

    /// All named block nodes.
    pub(super) async fn nodes(&self) -> Result<Value, QmpError> {
        self.qmp.execute("query-named-block-nodes", json!({ "flat": true })).await
    }

    /// The VM as the coordinator is told.
    pub(super) async fn seen(&self) -> Result<VmSeen, QmpError> {
        let state = self.run_state().await?;
        let disks = self.disks().await?;
        let version = self.qmp.version();
        let too_old = version < super::OLDEST;
        // Until it is let go on, it may as well go on at the source.
        let holds_disks = disks.iter().all(|d| d.active);
        let disks = disks.into_iter().map(|d| DiskSeen {
            disk_id: Some(d.id(self.vm)),
            size: d.size,
            path: d.image.display().to_string(),
            uncapturable: d.uncapturable.or(too_old.then_some(super::TOO_OLD)),
            slot: d.slot,
            format: Format::Image,
        });
        let seen = VmSeen {
            guid: self.vm,
            name: self.name.clone(),
            power: power(&state),
            replica: ReplicaRole::None,
            realized: is_realized(&state) && holds_disks,
            clustered: false,
            cluster_owner: None,
            generation: 0,
            version: String::new(),
            disks: disks.collect(),
        };
        Ok(seen)
    }

    /// [`Self::seen`], when it differs from what was told last.
    pub(super) async fn news(&self) -> Result<Option<VmSeen>, QmpError> {
        let seen = self.seen().await?;
        let mut last = locked(&self.last);
        if last.as_ref() == Some(&seen) {
            return Ok(None);
        }
        *last = Some(seen.clone());
        Ok(Some(seen))
    }

    /// What was told last.
    pub(super) fn last(&self) -> Option<VmSeen> {
        locked(&self.last).clone()
    }
}

/// The name of a socket without its extension.
pub(super) fn stem(socket: &Path) -> String {
    socket.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Whether a migration of this status is about to take the VM away.
pub(super) fn is_leaving(status: &str) -> bool {
    matches!(
        status,
        "setup" | "active" | "pre-switchover" | "device" | "wait-unplug" | "postcopy-active"
    )
}

/// Whether the VM is here: not only on its way to here, and not gone from here.
fn is_realized(run_state: &str) -> bool {
    !matches!(run_state, "inmigrate" | "postmigrate")
}

fn power(run_state: &str) -> Power {
    match run_state {
        "running" => Power::Running,
        "shutdown" => Power::Off,
        "paused" | "prelaunch" | "debug" | "io-error" | "watchdog" | "guest-panicked"
        | "internal-error" | "suspended" => Power::Paused,
        _ => Power::Other,
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_on_its_way_is_not_here_and_one_that_has_left_neither() {
        for here in [
            "running",
            "paused",
            "shutdown",
            "prelaunch",
            "finish-migrate",
            "io-error",
            "suspended",
        ] {
            assert!(is_realized(here), "{here}");
        }
        assert!(!is_realized("inmigrate") && !is_realized("postmigrate"));
        assert_eq!(power("shutdown"), Power::Off);
        assert!(
            is_leaving("setup") && is_leaving("active") && !is_leaving("failed") && !is_leaving("")
        );
    }
}
