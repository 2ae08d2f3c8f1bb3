//! Configuration files, and VMs made from them: import, planned VM, realize.
//!
//! The lab's `.vmcx` is JSON; `.vmrs` and `.vmgs` hold bytes that only have to come back unchanged.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::classes;
use crate::cluster::{Cluster, now};
use crate::disks;
use crate::error::LabError;
use crate::hardware::{GroupSettings, Hardware};
use crate::jobs::JobError;
use crate::model::{CREATED, Checkpoint, DELETED, Disk, FrozenDisk, Power, State, Vm, guid};
use crate::shape::{Device, Shape};

/// Longest definition file that is read.
const MAX_DEFINITION: u64 = 1 << 20;

/// Bytes of the runtime state of a saved VM.
const SAVED_MEMORY: usize = (9 << 20) + 123;

/// What a definition file says.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Definition {
    id: Uuid,
    name: String,
    generation: u8,
    version: String,
    checkpoint: Option<Uuid>,
    disks: Vec<DefinedDisk>,
    #[serde(default)]
    hardware: Hardware,
    /// Checkpoints that it follows, oldest first: GUID, name.
    #[serde(default)]
    ancestors: Vec<(Uuid, String)>,
    /// The checkpoint that it follows itself.
    #[serde(default)]
    parent: Option<Uuid>,
    /// Of a checkpoint's definition: the checkpoint's name.
    #[serde(default)]
    own_name: Option<String>,
    /// Of a checkpoint's definition: the checkpoint's remarks, and whether it carries a saved state.
    #[serde(default)]
    notes: String,
    #[serde(default)]
    saved: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct DefinedDisk {
    id: Uuid,
    location: u32,
    /// None: no checkpoint holds it.
    path: Option<PathBuf>,
    /// What such a disk is; none: pass-through.
    #[serde(default)]
    device: Option<Device>,
}

/// Folder, below the VM's, of its own configuration.
pub(crate) const VM_FOLDER: &str = "Virtual Machines";
/// Folder, below the VM's, of its checkpoints' configurations.
pub(crate) const CHECKPOINT_FOLDER: &str = "Snapshots";

fn write_set(vm: &Vm, stem: &Path, checkpoint: Option<Uuid>) -> Result<(), LabError> {
    write_definition(vm, stem, checkpoint)?;
    let what = format!("of {} at {}", vm.guid(), stem.display());
    let mut runtime = format!("runtime state {what}").into_bytes();
    if vm.power == Power::Saved {
        runtime = memory(runtime);
    }
    for (extension, content) in
        [("vmrs", runtime), ("vmgs", format!("guest state {what}").into_bytes())]
    {
        let path = stem.with_extension(extension);
        std::fs::write(&path, content).map_err(LabError::io("write", path))?;
    }
    Ok(())
}

/// A saved VM's memory behind its runtime state: much of it zeros, and of no round length.
fn memory(mut state: Vec<u8>) -> Vec<u8> {
    state.resize(SAVED_MEMORY, 0);
    for (at, byte) in state.iter_mut().enumerate().skip(SAVED_MEMORY - (1 << 20)) {
        *byte = (at / 300) as u8;
    }
    state
}

fn write_definition(vm: &Vm, stem: &Path, checkpoint: Option<Uuid>) -> Result<(), LabError> {
    let frozen = checkpoint.and_then(|id| vm.checkpoints.iter().find(|c| c.id == id));
    let virtual_disks: Vec<DefinedDisk> = match frozen {
        // Also those that the VM itself has no more.
        Some(c) => {
            let disk = |f: &FrozenDisk| DefinedDisk {
                id: f.disk,
                location: f.location,
                path: Some(f.path.clone()),
                device: None,
            };
            c.disks.iter().map(disk).collect()
        }
        None => {
            let virtual_disks = vm.disks.iter().filter(|d| d.is_virtual());
            let disk = |d: &Disk| DefinedDisk {
                id: d.id,
                location: d.location,
                path: d.leaf().map(Path::to_owned),
                device: None,
            };
            virtual_disks.map(disk).collect()
        }
    };
    // A checkpoint's definition names the disks that it left out, too.
    let others = vm.disks.iter().filter(|d| !d.is_virtual()).map(|d| DefinedDisk {
        id: d.id,
        location: d.location,
        path: None,
        device: d.device.clone(),
    });
    let mut disks: Vec<DefinedDisk> = virtual_disks.into_iter().chain(others).collect();
    disks.sort_by_key(|d| d.location);
    let of = frozen.map_or(&vm.hardware, |c| &c.hardware);
    let definition = Definition {
        id: vm.id,
        name: vm.name.clone(),
        generation: vm.generation,
        version: vm.version.clone(),
        checkpoint,
        disks,
        hardware: Hardware {
            saved_on: (vm.power == Power::Saved)
                .then(|| of.saved_on.clone().unwrap_or_else(|| vm.host.clone())),
            ..of.clone()
        },
        ancestors: vm
            .checkpoints
            .iter()
            .take_while(|c| Some(c.id) != checkpoint)
            .filter(|c| !c.recovery)
            .map(|c| (c.id, c.name.clone()))
            .collect(),
        own_name: frozen.map(|c| c.name.clone()),
        parent: match frozen {
            Some(c) => c.parent,
            None => vm.current,
        },
        notes: frozen.map(|c| c.notes.clone()).unwrap_or_default(),
        saved: frozen.is_some_and(|c| c.saved),
    };
    let text =
        serde_json::to_vec_pretty(&definition).map_err(|e| LabError::Config(e.to_string()))?;
    let folder = stem.parent().unwrap_or(stem);
    std::fs::create_dir_all(folder).map_err(LabError::io("make the folder", folder))?;
    let path = stem.with_extension("vmcx");
    std::fs::write(&path, text).map_err(LabError::io("write", path))
}

/// Writes the files of the VM's own configuration.
pub(crate) fn write_vm_files(vm: &Vm) -> Result<(), LabError> {
    write_set(vm, &vm.folder.join(VM_FOLDER).join(vm.guid()), None)
}

fn checkpoint_stem(vm: &Vm, checkpoint: Uuid) -> PathBuf {
    vm.folder.join(CHECKPOINT_FOLDER).join(guid(checkpoint))
}

/// Writes the files of a checkpoint's configuration.
pub(crate) fn write_checkpoint_files(vm: &Vm, checkpoint: Uuid) -> Result<(), LabError> {
    write_set(vm, &checkpoint_stem(vm, checkpoint), Some(checkpoint))
}

/// Removes the files of a checkpoint's configuration.
pub(crate) fn remove_checkpoint_files(vm: &Vm, checkpoint: Uuid) {
    remove_set(&checkpoint_stem(vm, checkpoint));
}

/// Removes the files of the VM's own configuration.
pub(crate) fn remove_vm_files(vm: &Vm) {
    remove_set(&vm.folder.join(VM_FOLDER).join(vm.guid()));
}

fn remove_set(stem: &Path) {
    for extension in ["vmcx", "vmrs", "vmgs"] {
        let path = stem.with_extension(extension);
        if let Err(e) = std::fs::remove_file(&path)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), error = %e, "a configuration file stays behind");
        }
    }
}

/// Reads a definition file into a planned VM on `host`. Blocks.
pub(crate) fn import(
    cluster: &Cluster,
    host: &str,
    file: &Path,
    snapshots: &Path,
    new_id: bool,
) -> Result<Uuid, JobError> {
    let broken = |why: String| {
        JobError::new(
            32773,
            format!("the definition file {} cannot be imported: {why}", file.display()),
        )
    };
    let length = std::fs::metadata(file).map_err(|e| broken(e.to_string()))?.len();
    if length > MAX_DEFINITION {
        return Err(broken(format!("it is {length} bytes long")));
    }
    let text = std::fs::read(file).map_err(|e| broken(e.to_string()))?;
    let definition: Definition =
        serde_json::from_slice(&text).map_err(|e| broken(e.to_string()))?;
    let parent = file.parent().unwrap_or(file);
    let in_subfolder = parent.file_name().is_some_and(|n| n == VM_FOLDER || n == CHECKPOINT_FOLDER);
    let folder = if in_subfolder { parent.parent().unwrap_or(parent) } else { parent };
    let disks = definition.disks.iter().map(|d| Disk {
        id: d.id,
        location: d.location,
        chain: d.path.iter().cloned().collect(),
        device: d.device.clone(),
        size: 0,
        disk_id: Uuid::nil(),
    });
    let disks: Vec<Disk> = disks.collect();
    cluster.change(|s| {
        let id = if new_id { s.new_guid() } else { definition.id };
        if s.vms.contains_key(&id) || s.planned.contains_key(&id) {
            return Err(JobError::new(
                32775,
                format!("a virtual machine with the identifier {} exists already", guid(id)),
            ));
        }
        let mut vm = Vm::new(id, &definition.name, host, folder.to_owned());
        vm.generation = definition.generation;
        vm.version.clone_from(&definition.version);
        vm.disks = disks;
        vm.power = if definition.hardware.saved_on.is_some() { Power::Saved } else { Power::Off };
        vm.hardware = definition.hardware.clone();
        vm.rights = false;
        vm.checkpoints = planned_checkpoints(&definition.ancestors, snapshots);
        vm.current = definition.parent.filter(|p| vm.checkpoints.iter().any(|c| c.id == *p));
        if new_id {
            // A copy: its checkpoints are others, too.
            rename_checkpoints(s, &mut vm);
        }
        let target = classes::planned_system(&vm, host);
        s.planned.insert(id, vm);
        s.notify(Some(host), CREATED, target, None);
        Ok(id)
    })
}

impl Vm {
    /// A VM that is off, without disks.
    pub(crate) fn new(id: Uuid, name: &str, host: &str, folder: PathBuf) -> Self {
        Self {
            id,
            name: name.to_owned(),
            generation: 2,
            version: "10.0".into(),
            host: host.to_owned(),
            owner: None,
            before: Default::default(),
            power: Power::Off,
            busy: None,
            migration: None,
            disks: Vec::new(),
            checkpoints: Vec::new(),
            last_applied: None,
            current: None,
            reference_points: Vec::new(),
            merges: Vec::new(),
            folder,
            created: now(),
            vss: true,
            shape: Shape::default(),
            steady: None,
            io: Arc::default(),
            hardware: Hardware::default(),
            rights: true,
            group: GroupSettings::default(),
            cluster_failures: 0,
        }
    }
}

/// Gives the checkpoints of a planned VM GUIDs of their own.
fn rename_checkpoints(s: &mut State, vm: &mut Vm) {
    let new: Vec<(Uuid, Uuid)> = vm.checkpoints.iter().map(|c| (c.id, s.new_guid())).collect();
    let renamed = |id: Uuid| new.iter().find(|(old, _)| *old == id).map_or(id, |(_, new)| *new);
    for checkpoint in &mut vm.checkpoints {
        checkpoint.id = renamed(checkpoint.id);
        checkpoint.parent = checkpoint.parent.map(renamed);
    }
    vm.current = vm.current.map(renamed);
}

/// Checkpoints of a planned VM: those whose definitions are in the folder, and the missing ones.
fn planned_checkpoints(ancestors: &[(Uuid, String)], folder: &Path) -> Vec<Checkpoint> {
    let checkpoint = |(id, name): &(Uuid, String)| {
        let read = || read_checkpoint(*id, folder);
        (!folder.as_os_str().is_empty()).then(read).flatten().unwrap_or_else(|| Checkpoint {
            id: *id,
            name: name.clone(),
            recovery: false,
            consistency: 0,
            created: now(),
            disks: Vec::new(),
            parent: None,
            notes: String::new(),
            saved: false,
            hardware: Hardware::default(),
            file_id: *id,
            missing: true,
        })
    };
    ancestors.iter().map(checkpoint).collect()
}

/// A checkpoint's definition file.
fn read_checkpoint(id: Uuid, folder: &Path) -> Option<Checkpoint> {
    let file = folder.join(guid(id)).with_extension("vmcx");
    if std::fs::metadata(&file).ok()?.len() > MAX_DEFINITION {
        return None;
    }
    let definition: Definition = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
    let name = definition.own_name?;
    let disks = definition.disks.into_iter();
    let disks = disks.filter_map(|d| {
        let (disk, location) = (d.id, d.location);
        Some(FrozenDisk { disk, location, path: d.path?, chain: Vec::new(), mark: None })
    });
    Some(Checkpoint {
        id,
        name,
        recovery: false,
        consistency: 0,
        created: now(),
        disks: disks.collect(),
        parent: definition.parent,
        notes: definition.notes,
        saved: definition.saved,
        hardware: definition.hardware,
        file_id: id,
        missing: false,
    })
}

/// Takes the definitions of missing checkpoints of a planned VM from a folder.
pub(crate) fn import_checkpoints(
    cluster: &Cluster,
    id: Uuid,
    folder: &Path,
) -> Result<Vec<String>, JobError> {
    cluster.change(|s| {
        let planned =
            s.planned.get_mut(&id).ok_or_else(|| JobError::new(32773, "no such planned VM"))?;
        let mut made = Vec::new();
        for checkpoint in planned.checkpoints.iter_mut().filter(|c| c.missing) {
            if let Some(found) = read_checkpoint(checkpoint.file_id, folder) {
                made.push(classes::checkpoint_path(checkpoint.id));
                *checkpoint = Checkpoint { id: checkpoint.id, parent: checkpoint.parent, ..found };
            }
        }
        Ok(made)
    })
}

impl State {
    /// Whether another VM's chain has this file.
    fn file_in_use(&self, path: &Path) -> Option<&Vm> {
        self.vms.values().find(|vm| vm.disks.iter().any(|d| d.chain.iter().any(|p| p == path)))
    }
}

/// What keeps a planned VM from being realized, one sentence per device; with the disks' facts when nothing does.
pub(crate) fn validate(
    cluster: &Cluster,
    id: Uuid,
) -> Result<(Vec<Disk>, Vec<Checkpoint>), JobError> {
    let planned = cluster.read(|s| {
        let vm = s.planned.get(&id)?;
        let host = s.hosts.get(&vm.host)?;
        let mut problems = vm.device_problems(host);
        if !host.equipment.versions.contains(&vm.version) {
            let text =
                format!("Configuration version '{}' is not supported on this host.", vm.version);
            problems.push((classes::checkpoint_path(vm.id), text));
        }
        for disk in vm.disks.iter().filter(|d| !d.is_virtual()) {
            let missing = match &disk.device {
                Some(
                    Device::Shared(file) | Device::VhdSet(file) | Device::PersistentMemory(file),
                ) => {
                    (!file.exists()).then(|| format!("disk {}: it cannot be found", file.display()))
                }
                Some(Device::FibreChannel) => None,
                None => Some("the physical disk cannot be found on this host".to_owned()),
            };
            problems.extend(missing.map(|text| (classes::disk_path(id, disk), text)));
        }
        Some((vm.disks.clone(), vm.checkpoints.clone(), problems))
    });
    let (mut planned, mut checkpoints, mut problems) =
        planned.ok_or_else(|| JobError::new(32773, "no such planned VM"))?;
    for disk in planned.iter_mut().filter(|d| d.is_virtual()) {
        let Some(path) = disk.leaf().map(Path::to_owned) else { continue };
        if let Some(other) = cluster.read(|s| s.file_in_use(&path).map(|vm| vm.name.clone())) {
            let text = format!("disk {}: in use by the virtual machine {other:?}", path.display());
            problems.push((classes::disk_path(id, disk), text));
            continue;
        }
        match disks::info(&path) {
            Ok(info) => {
                disk.size = info.size;
                disk.disk_id = info.disk_id;
            }
            Err(e) => problems
                .push((classes::disk_path(id, disk), format!("disk {}: {e}", path.display()))),
        }
        match outrider_disk::DiskChain::open(&path) {
            Ok(chain) => {
                disk.chain = chain.files();
                disk.chain.reverse();
            }
            Err(e) => tracing::debug!(error = %e, "reported above"),
        }
    }
    for checkpoint in &mut checkpoints {
        for disk in &mut checkpoint.disks {
            match outrider_disk::DiskChain::open(&disk.path) {
                Ok(chain) => disk.chain = chain.files().into_iter().rev().collect(),
                Err(e) => {
                    let text = format!("checkpoint {:?}: {e}", checkpoint.name);
                    problems.push((classes::checkpoint_path(checkpoint.id), text));
                }
            }
        }
    }
    if problems.is_empty() {
        return Ok((planned, checkpoints));
    }
    // The description is of no use; what is wrong is in the job's errors.
    Err(JobError {
        details: problems,
        ..JobError::new(32773, "The operation failed with error code '32773'.")
    })
}

/// The files of imported checkpoints under their GUIDs, their definitions with the paths of now.
fn keep_checkpoint_files(vm: &mut Vm) -> Result<(), LabError> {
    for at in 0..vm.checkpoints.len() {
        let (id, old) = (vm.checkpoints[at].id, vm.checkpoints[at].file_id);
        vm.checkpoints[at].file_id = id;
        let (from, to) = (checkpoint_stem(vm, old), checkpoint_stem(vm, id));
        for extension in ["vmrs", "vmgs"] {
            let (from, to) = (from.with_extension(extension), to.with_extension(extension));
            if from != to && from.exists() {
                std::fs::rename(&from, &to).map_err(LabError::io("rename", from))?;
            }
        }
        write_definition(vm, &to, Some(id))?;
        if from != to {
            remove_set(&from);
        }
    }
    Ok(())
}

/// Turns a planned VM into a real one. Blocks.
pub(crate) fn realize(cluster: &Cluster, id: Uuid) -> Result<(), JobError> {
    let (disks, checkpoints) = validate(cluster, id)?;
    cluster.change(|s| {
        let mut vm =
            s.planned.remove(&id).ok_or_else(|| JobError::new(32773, "no such planned VM"))?;
        s.notify(Some(&vm.host), DELETED, classes::planned_system(&vm, &vm.host), None);
        vm.disks = disks;
        vm.checkpoints = checkpoints;
        keep_checkpoint_files(&mut vm)?;
        // Hyper-V keeps the definition where it was told to, and removes the one that was imported only if it lies there.
        write_vm_files(&vm)?;
        let (host, target) = (vm.host.clone(), classes::computer_system(&vm));
        s.vms.insert(id, vm);
        s.notify(Some(&host), CREATED, target, None);
        Ok(())
    })
}

/// Removes a VM that is off, or a planned one; its disk files stay. Blocks.
pub(crate) fn destroy(cluster: &Cluster, id: Uuid) -> Result<(), LabError> {
    cluster.change(|s| {
        if let Some(vm) = s.planned.remove(&id) {
            s.notify(Some(&vm.host), DELETED, classes::planned_system(&vm, &vm.host), None);
            return Ok(());
        }
        let vm = s.vm(id)?;
        if vm.power.holds_disks() {
            return Err(LabError::refused(&vm.name, 32775, "the VM is running"));
        }
        let Some(vm) = s.vms.remove(&id) else { return Ok(()) };
        if let Some(steady) = &vm.steady {
            steady.stop.cancel();
        }
        remove_vm_files(&vm);
        s.notify(Some(&vm.host), DELETED, classes::computer_system(&vm), None);
        Ok(())
    })
}
