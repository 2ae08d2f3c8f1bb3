//! Taking the place of a VM. At every moment either the old VM exists, or the new one, or the trail says how to bring one of
//! them back, and its files are there:
//!
//! ```text
//! files of the new VM written -> rehearsal (planned, mended, validated, dropped) -> its definition found, trail: stopped
//!     -> old VM stopped, checkpoints removed -> its definition copied, trail: replaced -> old definition removed
//!     -> new VM realized, trail: made
//!     -> started if asked -> files of the old VM removed
//! ```
//! A new VM that cannot be made after the old one was removed brings the old one back.

use std::path::{Path, PathBuf};

use outrider_proto::ids::{DiskId, VmGuid};
use outrider_proto::manifest::Manifest;

use super::make::Restore;
use super::trail::{REPLACED, Replaced, Stopped};
use crate::hypervisor::{Defined, DiskAside, HypervisorError, NewVm, Power, SetAside};
use crate::job::JobError;

/// Files beside a disk that track its changes.
const TRACKING: [&str; 2] = ["rct", "mrt"];

impl Restore<'_> {
    /// Puts the new VM in the place of `old`.
    pub(super) async fn swap(&mut self, old: VmGuid, new: NewVm) -> Result<Defined, JobError> {
        let (hypervisor, lease) = (&self.context.hypervisor, &self.context.lease);
        if self.trail.replaced.is_none() {
            // Whatever the host has against the new VM is heard while the old one still runs.
            hypervisor.rehearse_vm(lease, &new).await?;
            hypervisor.config_of(old).await?;
            let ran = self.remember(old).await?;
            let mut lost = Vec::new();
            let aside = hypervisor.set_aside(lease, old, &mut lost).await;
            self.notes.append(&mut lost);
            let kept = match aside {
                Ok(aside) => self.keep_definition(old, aside, ran).await,
                Err(HypervisorError::Lease(lost)) => return Err(lost.into()),
                Err(e) => Err(e.into()),
            };
            let kept = match kept {
                Ok(replaced) => {
                    self.trail.replaced = Some(replaced);
                    self.trail.keep(&self.target.folder).await
                }
                Err(e) => Err(e),
            };
            if let Err(e) = kept {
                self.leave(old, ran).await;
                return Err(e);
            }
        }
        let Some(replaced) = self.trail.replaced.clone() else {
            return Err(JobError::Unrestorable("a swap without a VM to replace".into()));
        };
        let new = replaced.successor(new);
        match hypervisor.remove_vm(lease, old).await {
            Ok(()) => {}
            Err(HypervisorError::Lease(lost)) => return Err(lost.into()),
            Err(e) => {
                let there = hypervisor.inventory().await;
                if there.is_ok_and(|i| i.vms.iter().any(|vm| vm.guid == old && vm.realized)) {
                    self.leave(old, replaced.ran).await;
                }
                return Err(e.into());
            }
        }
        match hypervisor.define_vm(lease, &new).await {
            Ok(defined) => Ok(defined),
            Err(HypervisorError::Lease(lost)) => Err(lost.into()),
            Err(e) => Err(self.bring_back(&replaced, e).await),
        }
    }

    /// Whether the VM that is about to be turned off runs, or ran before an earlier attempt turned it off.
    async fn remember(&mut self, old: VmGuid) -> Result<bool, JobError> {
        if let Some(stopped) = self.trail.stopped.as_ref().filter(|stopped| stopped.vm == old) {
            return Ok(stopped.ran);
        }
        let ran = match self.context.hypervisor.vm(old).await {
            Ok(state) => state.vm.power == Power::Running,
            // Of some hypervisors a VM that is off has no state.
            Err(e) if e.is_absent() => false,
            Err(e) => return Err(e.into()),
        };
        self.trail.stopped = Some(Stopped { vm: old, ran });
        self.trail.keep(&self.target.folder).await?;
        Ok(ran)
    }

    /// The old VM is still there and stays: nothing of the new one has to.
    async fn leave(&mut self, old: VmGuid, ran: bool) {
        self.trail.replaced = None;
        if !ran {
            return;
        }
        match self.context.hypervisor.start_vm(&self.context.lease, old).await {
            Ok(()) => {
                self.trail.stopped = None;
                self.notes.push("the VM that was to be replaced runs again".into());
            }
            Err(e) => {
                self.notes.push(format!("the VM that was to be replaced is off; start it ({e})"));
            }
        }
    }

    /// Copies the definition of the VM that is about to go: removing the VM removes it.
    async fn keep_definition(
        &self,
        vm: VmGuid,
        aside: SetAside,
        ran: bool,
    ) -> Result<Replaced, JobError> {
        let hypervisor = &self.context.hypervisor;
        let config = &aside.config;
        let (place, files) = (self.target.folder.join(REPLACED), config.clone());
        let copies = super::blocking(move || copied(&files, &place)).await??;
        let definition = config.iter().zip(copies).find(|(_, copy)| hypervisor.is_definition(copy));
        // `FOLDER/Virtual Machines/GUID.vmcx`
        let folder = definition.as_ref().and_then(|(file, _)| file.parent()?.parent());
        Ok(Replaced {
            vm,
            name: aside.name,
            folder: folder.map(Path::to_owned).unwrap_or_default(),
            definition: definition.map(|(_, copy)| copy),
            restored: in_point(self.manifest, &aside.disks),
            disks: aside.disks.into_iter().map(|d| (d.slot, d.file)).collect(),
            group: aside.group,
            ran,
        })
    }

    /// The new VM could not be made and the old one is gone: makes the old one again from its own files.
    async fn bring_back(&mut self, replaced: &Replaced, why: HypervisorError) -> JobError {
        let Some(definition) = replaced.definition.clone() else {
            return JobError::Unrestorable(format!(
                "the restored VM could not be made ({why}), and VM {:?}, which it was to replace, is gone and there is no copy of \
                 its definition: make a VM with its disks, {}, or with the restored ones in {}",
                replaced.name,
                listed(&replaced.disks),
                self.target.folder.display()
            ));
        };
        tracing::warn!(vm = %replaced.vm, error = %why, "bringing the replaced VM back");
        let old = NewVm {
            definition,
            folder: replaced.folder.clone(),
            name: replaced.name.clone(),
            keep_guid: true,
            disks: replaced.disks.clone(),
            as_it_was: true,
            clustered: replaced.group.is_some(),
            group: replaced.group.clone(),
            ..NewVm::default()
        };
        let (hypervisor, lease) = (&self.context.hypervisor, &self.context.lease);
        match hypervisor.define_vm(lease, &old).await {
            Ok(_) => {
                self.notes.push(format!(
                    "VM {:?} was brought back as it was, without its checkpoints",
                    replaced.name
                ));
                self.leave(replaced.vm, replaced.ran).await;
                why.into()
            }
            Err(e) => JobError::Unrestorable(format!(
                "the restored VM could not be made ({why}), and VM {:?}, which it was to replace, could not be brought back \
                 ({e}); its disks are {}, its definition is in {}, the restored files are in {}",
                replaced.name,
                listed(&replaced.disks),
                self.target.folder.join(REPLACED).display(),
                self.target.folder.display()
            )),
        }
    }

    /// The restored VM is there: the files of the one that it replaced go, unless they are to be kept or are another VM's.
    pub(super) async fn remove_replaced(&mut self, made: VmGuid) {
        let Some(replaced) = self.trail.replaced.clone() else { return };
        let copy = self.target.folder.join(REPLACED);
        if self.work.keep_replaced {
            self.notes.push(format!(
                "the files of the VM that was replaced were kept: {}, definition in {}",
                listed(&replaced.disks),
                copy.display()
            ));
            return;
        }
        let used: Vec<PathBuf> = match self.context.hypervisor.inventory().await {
            Ok(inventory) => inventory
                .vms
                .iter()
                .flat_map(|vm| &vm.disks)
                .map(|disk| PathBuf::from(&disk.path))
                .collect(),
            Err(e) => {
                self.notes.push(format!(
                    "the files of the VM that was replaced were kept, for it could not be told whether another VM uses them \
                     ({e}): {}",
                    listed(&replaced.disks)
                ));
                return;
            }
        };
        let (mut gone, mut kept) = (Vec::new(), Vec::new());
        for disk in &replaced.disks {
            let (slot, file) = disk;
            if used.iter().any(|other| same_file(other, file)) {
                tracing::warn!(vm = %made, slot, file = %file.display(), "a file of the replaced VM is another VM's disk, too: it stays");
                continue;
            }
            if !replaced.restored.contains(file) {
                kept.push(disk.clone());
                continue;
            }
            gone.push(disk.clone());
        }
        let (files, of) = (gone.clone(), replaced.clone());
        match super::blocking(move || removed(&files, &of, &copy)).await {
            Ok(stay) => self.stays(stay),
            Err(e) => tracing::error!(error = %e, "files of the replaced VM may stay"),
        }
        self.notes
            .push(format!("the files of the VM that was replaced were removed: {}", listed(&gone)));
        if !kept.is_empty() {
            self.notes.push(format!(
                "the recovery point does not hold these disks of the VM that was replaced, so their files were kept: {}; attach \
                 them to the VM again, or remove them when nobody needs what is on them",
                listed(&kept)
            ));
        }
    }
}

/// Copies files into a folder, durably; gives the copies in the same order. Blocks.
fn copied(files: &[PathBuf], place: &Path) -> Result<Vec<PathBuf>, JobError> {
    let mut copies = Vec::new();
    for file in files {
        std::fs::create_dir_all(place).map_err(JobError::file("make the folder", place))?;
        let copy = place.join(file.file_name().unwrap_or_default());
        std::fs::copy(file, &copy).map_err(JobError::file("copy", file))?;
        // Windows syncs only what is open for writing.
        let opened = std::fs::OpenOptions::new().write(true).open(&copy);
        opened.and_then(|f| f.sync_all()).map_err(JobError::file("sync", &copy))?;
        copies.push(copy);
    }
    Ok(copies)
}

/// Removes disks of a replaced VM with what tracks their changes, the copy of its definition, and folders that are empty
/// then; gives what could not be removed. Blocks.
fn removed(disks: &[(String, PathBuf)], replaced: &Replaced, copy: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for (_, file) in disks {
        files.push(file.clone());
        for extension in TRACKING {
            // `os.vhdx.rct`
            let mut name = file.as_os_str().to_owned();
            name.push(".");
            name.push(extension);
            files.push(name.into());
        }
    }
    let mut stay: Vec<PathBuf> =
        files.into_iter().filter(|file| !super::remove_file(file)).collect();
    if let Err(e) = std::fs::remove_dir_all(copy)
        && e.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(folder = %copy.display(), error = %e, "the copy of a definition stays behind");
        stay.push(copy.to_owned());
    }
    let folders = replaced.disks.iter().filter_map(|(_, file)| file.parent());
    let mut folders: Vec<PathBuf> = folders.map(Path::to_owned).collect();
    folders.extend([
        replaced.folder.join(super::DISKS),
        replaced.folder.join(super::DEFINITION),
        replaced.folder.join("Snapshots"),
        replaced.folder.clone(),
    ]);
    for folder in folders.iter().filter(|f| f.starts_with(&replaced.folder)) {
        // Only empty ones go.
        let _ = std::fs::remove_dir(folder);
    }
    stay
}

/// The files of disks that a recovery point holds: by the disk's own id, since another disk may be where one of the point was.
/// A disk that was added after the point, or that no point has (a shared one), has no copy anywhere; nor may one have whose id
/// nobody tells.
fn in_point(manifest: &Manifest, disks: &[DiskAside]) -> Vec<PathBuf> {
    let held: Vec<DiskId> = manifest.disks.iter().map(|d| d.disk_id).collect();
    // A copy of a disk has its id, too: an exported one that was attached, for instance.
    let is_one = |id: DiskId| disks.iter().filter(|disk| disk.id == Some(id)).count() == 1;
    let is_held = |disk: &&DiskAside| disk.id.is_some_and(|id| held.contains(&id) && is_one(id));
    disks.iter().filter(is_held).map(|disk| disk.file.clone()).collect()
}

/// Whether two paths name one file to Windows, where neither case nor the kind of slash matters. Elsewhere that may call two
/// files one: then a file stays that could have gone.
fn same_file(a: &Path, b: &Path) -> bool {
    let plain = |path: &Path| path.to_string_lossy().replace('/', "\\").to_lowercase();
    plain(a) == plain(b)
}

pub(super) fn listed(disks: &[(String, PathBuf)]) -> String {
    let names: Vec<String> = disks.iter().map(|(_, file)| file.display().to_string()).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_definition_is_copied_whole_and_durably_on_every_system() {
        let dir = tempfile::tempdir().expect("a folder");
        let files = ["a.vmcx", "a.vmrs"].map(|name| dir.path().join(name));
        for file in &files {
            std::fs::write(file, file.display().to_string()).expect("written");
        }
        let copies = copied(&files, &dir.path().join("copies")).expect("copied and synced");
        for (file, copy) in files.iter().zip(&copies) {
            assert_eq!(std::fs::read(copy).expect("there"), std::fs::read(file).expect("there"));
            assert_eq!(copy.file_name(), file.file_name());
        }
    }

    #[test]
    fn only_what_the_point_holds_may_go() {
        let mut manifest = crate::restore::target::tests::manifest();
        let held = DiskId::random();
        manifest.disks = vec![crate::restore::files::tests::disk("0", &[1])];
        manifest.disks[0].disk_id = held;
        let disk = |file: &str, id| DiskAside { slot: "0".into(), file: file.into(), id };
        let disks = [
            disk("moved.vhdx", Some(held)),
            disk("in its slot.vhdx", Some(DiskId::random())),
            disk("untold.vhdx", None),
        ];
        assert_eq!(in_point(&manifest, &disks), [PathBuf::from("moved.vhdx")]);
        let twice = [disk("os.vhdx", Some(held)), disk("a copy of it.vhdx", Some(held))];
        assert_eq!(in_point(&manifest, &twice), [] as [PathBuf; 0]);
    }

    #[test]
    fn a_file_is_the_same_however_it_is_spelt() {
        let same = |a: &str, b: &str| same_file(Path::new(a), Path::new(b));
        assert!(same(r"C:\ClusterStorage\Volume1\Os.VHDX", r"c:\clusterstorage/volume1\os.vhdx"));
        assert!(!same(r"C:\ClusterStorage\Volume1\os.vhdx", r"C:\ClusterStorage\Volume2\os.vhdx"));
    }
}
