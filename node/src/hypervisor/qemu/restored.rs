//! VMs from recovery points: their definitions in the sockets folder, their processes.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use outrider_proto::ids::VmGuid;
use serde_json::Value;
use uuid::Uuid;

use super::Qemu;
use super::checkpoint::Open;
use super::definition::{self, DefinedDisk, Definition, FORMAT, Wanted};
use super::error::QemuError;
use super::machine::Machine;
use super::process;
use crate::hypervisor::facts::Format;
use crate::hypervisor::{DiskSeen, NewVm, Power, ReplicaRole, VmSeen};

/// How long a QEMU may take to show up, and to end.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

impl Qemu {
    /// Writes the definition of a VM for its recovery point.
    pub(super) fn write_definition(
        &self,
        machine: &Machine,
        open: &Open,
    ) -> Result<PathBuf, QemuError> {
        let (argv, cwd) = process::started_with(machine.qmp.peer());
        if argv.is_empty() {
            tracing::warn!(
                vm = machine.name,
                "the command line of its process cannot be read: the agent needs the rights of its user"
            );
        }
        let disks = open.disks.iter().map(|of| DefinedDisk {
            slot: of.disk.slot.clone(),
            path: of.disk.image.to_string_lossy().into_owned(),
            format: of.disk.format.clone(),
            size: of.disk.size,
        });
        let qmp = machine.qmp.socket().to_owned();
        let definition = Definition {
            format: FORMAT.into(),
            name: machine.name.clone(),
            uuid: machine.vm.0,
            argv,
            cwd,
            qga: qmp.with_extension("qga"),
            qmp,
            disks: disks.collect(),
        };
        let folder = self.scratch.join("definitions").join(machine.vm.to_string());
        let path = folder.join(definition::FILE);
        std::fs::create_dir_all(&folder)
            .and_then(|()| std::fs::write(&path, as_text(&definition)))
            .map_err(failed("write", &path))?;
        Ok(path)
    }

    /// The definitions in the sockets folder.
    fn definitions(&self) -> Vec<(PathBuf, Definition)> {
        let files = std::fs::read_dir(self.fleet.folder()).into_iter().flatten().flatten();
        let files = files.map(|f| f.path()).filter(|p| p.extension().is_some_and(|e| e == "json"));
        files
            .filter_map(|path| match std::fs::read(&path).map(|text| Definition::parse(&text)) {
                Ok(Ok(definition)) => Some((path, definition)),
                Ok(Err(reason)) => {
                    tracing::warn!(file = %path.display(), reason, "a VM definition cannot be read");
                    None
                }
                Err(_) => None,
            })
            .collect()
    }

    pub(super) fn definition(&self, vm: VmGuid) -> Option<(PathBuf, Definition)> {
        self.definitions().into_iter().find(|(_, d)| d.uuid == vm.0)
    }

    /// VMs that are defined here and do not run. They claim nothing: their process may be elsewhere.
    pub(super) fn defined_only(&self, running: &[VmSeen]) -> Vec<VmSeen> {
        let all = self.definitions().into_iter().map(|(_, d)| d);
        all.filter(|d| running.iter().all(|vm| vm.guid.0 != d.uuid))
            .map(|d| VmSeen {
                guid: VmGuid(d.uuid),
                name: d.name,
                power: Power::Off,
                replica: ReplicaRole::None,
                realized: false,
                clustered: false,
                cluster_owner: None,
                generation: 0,
                version: String::new(),
                disks: d
                    .disks
                    .into_iter()
                    .map(|disk| DiskSeen {
                        disk_id: None,
                        size: disk.size,
                        slot: disk.slot,
                        path: disk.path,
                        format: Format::Image,
                        uncapturable: Some(
                            "the VM does not run: QEMU reads its disks only while it does",
                        ),
                    })
                    .collect(),
            })
            .collect()
    }

    /// Makes a VM's definition out of a recovery point's.
    pub(super) fn define(&self, new: &NewVm) -> Result<VmGuid, QemuError> {
        let unusable =
            |reason: String| QemuError::Definition { path: new.definition.clone(), reason };
        let text = std::fs::read(&new.definition).map_err(failed("read", &new.definition))?;
        let original = Definition::parse(&text).map_err(unusable)?;
        let uuid = if new.keep_guid { original.uuid } else { Uuid::new_v4() };
        let wanted = Wanted {
            name: &new.name,
            uuid,
            sockets: self.fleet.folder(),
            disks: &new.disks,
            disconnect: new.networks.disconnect,
        };
        let made = original.rewritten(&wanted).map_err(unusable)?;
        let path = made.qmp.with_extension("json");
        let listens = std::os::unix::net::UnixStream::connect(&made.qmp).is_ok();
        if listens {
            return Err(QemuError::NameTaken { path: made.qmp });
        }
        let mut options = std::fs::File::options();
        let mut file = match options.write(true).create_new(true).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                return Err(QemuError::NameTaken { path });
            }
            Err(e) => return Err(failed("make", &path)(e)),
        };
        std::io::Write::write_all(&mut file, &as_text(&made))
            .and_then(|()| file.sync_all())
            .map_err(failed("write", &path))?;
        Ok(VmGuid(uuid))
    }

    /// Starts a defined VM and waits until it runs.
    pub(super) async fn power_on(&self, vm: VmGuid) -> Result<(), QemuError> {
        if self.fleet.find(vm).is_none() {
            let Some((_, definition)) = self.definition(vm) else {
                return Err(QemuError::NotRunning { vm });
            };
            let ended = process::start(&definition, self.fleet.tasks()).await?;
            // It may end before anybody has looked at it.
            let started = || match self.fleet.find(vm) {
                Some(_) => Some(true),
                None => ended.load(Ordering::Acquire).then_some(false),
            };
            if !self.wait_for("see a started VM", started).await? {
                let log = definition.qmp.with_extension("log");
                let said = process::last_line(&log);
                return Err(QemuError::EndedSoon { vm: definition.name, said, log });
            }
        }
        let machine = self.fleet.find(vm).ok_or(QemuError::NotRunning { vm })?;
        // Its starter may have used -S.
        let state = machine.run_state().await?;
        if matches!(state.as_str(), "prelaunch" | "paused") {
            machine.qmp.execute("cont", Value::Null).await?;
        }
        Ok(())
    }

    /// Ends a VM's QEMU at once.
    pub(super) async fn power_off(&self, vm: VmGuid) -> Result<(), QemuError> {
        let Some(machine) = self.fleet.find(vm) else { return Ok(()) };
        match machine.qmp.execute("quit", Value::Null).await {
            Ok(_) => {}
            Err(e) if e.is_gone() => {}
            Err(e) => return Err(e.into()),
        }
        self.wait_for("see a VM end", || self.fleet.find(vm).is_none().then_some(())).await
    }

    /// Forgets a VM that a restore had defined.
    pub(super) fn forget(&self, vm: VmGuid) -> Result<(), QemuError> {
        match self.definition(vm) {
            Some((path, _)) => std::fs::remove_file(&path).map_err(failed("remove", &path)),
            None => Ok(()),
        }
    }

    async fn wait_for<T>(&self, doing: &str, look: impl Fn() -> Option<T>) -> Result<T, QemuError> {
        let seen = async {
            loop {
                if let Some(seen) = look() {
                    return seen;
                }
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        let late = |_| QemuError::TooLong { doing: doing.to_owned(), waited: PATIENCE };
        tokio::time::timeout(PATIENCE, seen).await.map_err(late)
    }
}

fn as_text(definition: &Definition) -> Vec<u8> {
    // Plain strings and numbers always have a text.
    serde_json::to_vec_pretty(definition).unwrap_or_default()
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> QemuError {
    let path = path.to_owned();
    move |e| QemuError::File { doing, path, reason: e.to_string() }
}
