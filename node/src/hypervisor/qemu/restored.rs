//! VMs from recovery points: their definitions in the sockets folder, their processes.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use outrider_proto::ids::VmGuid;
use serde_json::Value;
use uuid::Uuid;

use super::Qemu;
use super::blocks::{self, Disk};
use super::checkpoint::Open;
use super::definition::{self, DefinedDisk, Definition, FORMAT, Rewritten, Wanted};
use super::error::QemuError;
use super::machine::Machine;
use super::process;
use crate::hypervisor::facts::Format;
use crate::hypervisor::{
    Defined, DiskAside, DiskSeen, HypervisorError, NewVm, Power, ReplicaRole, SetAside, VmSeen,
};
use crate::lease::Lease;

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
        let definition = self.definition_of(machine, open);
        self.write_down(machine.vm, &definition)
    }

    /// A VM as its process is, with the disks of a checkpoint.
    pub(super) fn definition_of(&self, machine: &Machine, open: &Open) -> Definition {
        self.running(machine, open.disks.iter().map(|of| &of.disk))
    }

    /// A VM as its process is.
    fn running<'a>(&self, machine: &Machine, disks: impl Iterator<Item = &'a Disk>) -> Definition {
        let (argv, cwd) = process::started_with(machine.qmp.peer());
        let disks = disks.map(|disk| DefinedDisk {
            slot: disk.slot.clone(),
            path: disk.image.to_string_lossy().into_owned(),
            format: disk.format.clone(),
            size: disk.size,
        });
        let qmp = machine.qmp.socket().to_owned();
        Definition {
            format: FORMAT.into(),
            name: machine.name.clone(),
            uuid: machine.vm.0,
            argv,
            cwd,
            qga: qmp.with_extension("qga"),
            qmp,
            disks: disks.collect(),
            aside: false,
        }
    }

    fn write_down(&self, vm: VmGuid, definition: &Definition) -> Result<PathBuf, QemuError> {
        let folder = self.scratch.join("definitions").join(vm.to_string());
        let path = folder.join(definition::FILE);
        std::fs::create_dir_all(&folder)
            .and_then(|()| std::fs::write(&path, as_text(definition)))
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

    /// What a VM's definition becomes on this host; makes nothing.
    ///
    /// # Errors
    /// All that [`Self::define`] would refuse.
    pub(super) fn plan(&self, new: &NewVm) -> Result<Rewritten, QemuError> {
        let unusable =
            |reason: String| QemuError::Definition { path: new.definition.clone(), reason };
        let text = std::fs::read(&new.definition).map_err(failed("read", &new.definition))?;
        let original = Definition::parse(&text).map_err(unusable)?;
        let planned = if original.aside {
            Rewritten { definition: original, copies: Vec::new(), notes: Vec::new() }
        } else {
            let uuid = if new.keep_guid { original.uuid } else { Uuid::new_v4() };
            let wanted = Wanted {
                name: &new.name,
                uuid,
                sockets: self.fleet.folder(),
                disks: &new.disks,
                disconnect: new.networks.disconnect,
                folder: &new.folder,
                in_place: new.keep_guid && new.replaces == Some(VmGuid(original.uuid)),
            };
            original.rewritten(&wanted).map_err(unusable)?
        };
        let made = &planned.definition;
        // Whoever is to be replaced is in nobody's way.
        let replaced = new.replaces.and_then(|old| self.fleet.find(old));
        let is_replaced = replaced.is_some_and(|old| old.qmp.socket() == made.qmp);
        if !is_replaced && std::os::unix::net::UnixStream::connect(&made.qmp).is_ok() {
            return Err(QemuError::NameTaken { path: made.qmp.clone() });
        }
        let path = file_of(made);
        let old = new.replaces.and_then(|old| self.definition(old));
        if path.exists() && old.is_none_or(|(file, _)| file != path) {
            return Err(QemuError::NameTaken { path });
        }
        for (from, _) in &planned.copies {
            if let Err(e) = std::fs::File::open(from) {
                return Err(unusable(format!(
                    "the firmware's variables {} cannot be copied ({e}): copy that file to this host, or a fresh one of the \
                     firmware's package",
                    from.display()
                )));
            }
        }
        Ok(planned)
    }

    /// Makes a VM's definition out of a recovery point's.
    pub(super) fn define(&self, new: &NewVm) -> Result<Defined, QemuError> {
        let Rewritten { definition, copies, notes } = self.plan(new)?;
        for (from, to) in &copies {
            std::fs::copy(from, to).map_err(failed("copy the firmware's variables to", to))?;
        }
        write_new(&definition)?;
        Ok(Defined { vm: VmGuid(definition.uuid), mended: notes })
    }

    /// Stops a VM that is to be replaced. Before that, its definition is where a start finds it.
    pub(super) async fn put_aside(
        &self,
        lease: &Lease,
        vm: VmGuid,
    ) -> Result<SetAside, HypervisorError> {
        let known = self.definition(vm).map(|(_, definition)| definition);
        let Some(machine) = self.fleet.find(vm) else {
            let known = known.ok_or(HypervisorError::NoSuchVm { vm })?;
            let disks = known.disks.iter().map(|d| aside(vm, &d.slot, Path::new(&d.path)));
            let (disks, name) = (disks.collect(), known.name.clone());
            let kept = Definition { aside: true, ..known };
            let config = vec![self.write_down(vm, &kept)?];
            return Ok(SetAside { config, disks, name, ..SetAside::default() });
        };
        let found = machine.disks().await.map_err(QemuError::from)?;
        let ran = machine.run_state().await.map_err(QemuError::from)? == "running";
        let name = machine.name.clone();
        let unusable = |reason| QemuError::NotReplaced { vm: name.clone(), reason };
        let kept = self.running(&machine, found.iter()).set_aside().map_err(unusable)?;
        let config = vec![self.write_down(vm, &kept)?];
        if known.is_none() {
            write_new(&kept)?;
        }
        // Asked again: reading took its time.
        lease.may_mutate()?;
        if let Err(e) = self.power_off(vm).await {
            // What it is called does not outlive that it runs.
            if known.is_none() && self.fleet.find(vm).is_some() {
                self.forget(vm)?;
            }
            return Err(e.into());
        }
        let disks = found.iter().map(|d| aside(vm, &d.slot, &d.image)).collect();
        Ok(SetAside { config, disks, name, ran, ..SetAside::default() })
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

fn aside(vm: VmGuid, slot: &str, file: &Path) -> DiskAside {
    DiskAside { slot: slot.to_owned(), file: file.to_owned(), id: Some(blocks::disk_id(vm, slot)) }
}

/// The file of a definition in the sockets folder.
fn file_of(definition: &Definition) -> PathBuf {
    definition.qmp.with_extension("json")
}

/// Writes a definition where a start finds it, durably.
fn write_new(definition: &Definition) -> Result<(), QemuError> {
    let path = file_of(definition);
    let mut options = std::fs::File::options();
    let mut file = match options.write(true).create_new(true).open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            return Err(QemuError::NameTaken { path });
        }
        Err(e) => return Err(failed("make", &path)(e)),
    };
    std::io::Write::write_all(&mut file, &as_text(definition))
        .and_then(|()| file.sync_all())
        .map_err(failed("write", &path))
}

fn as_text(definition: &Definition) -> Vec<u8> {
    // Plain strings and numbers always have a text.
    serde_json::to_vec_pretty(definition).unwrap_or_default()
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> QemuError {
    let path = path.to_owned();
    move |e| QemuError::File { doing, path, reason: e.to_string() }
}
