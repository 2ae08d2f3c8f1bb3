//! Where a restored VM goes, and what is in its way. Decided before anything is written.

use std::path::{Path, PathBuf};

use outrider_proto::ids::VmGuid;
use outrider_proto::manifest::{DiskManifest, Manifest};
use outrider_proto::rpc::RestoreWork;

use crate::hypervisor::{Inventory, VmSeen};
use crate::job::JobError;

/// A place for a VM.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) name: String,
    pub(super) folder: PathBuf,
    /// The VM whose place is taken.
    pub(super) replaces: Option<VmGuid>,
}

/// Chooses the place, or says why there is none.
pub(super) fn choose(
    manifest: &Manifest,
    work: &RestoreWork,
    inventory: &Inventory,
    roots: &[(PathBuf, u64)],
) -> Result<Target, JobError> {
    let name = if work.target_name.is_empty() {
        manifest.vm_name.clone()
    } else {
        work.target_name.clone()
    };
    let same_guid = |vm: &&VmSeen| work.keep_guid && vm.guid == manifest.vm.guid;
    let in_the_way = inventory.vms.iter().find(|vm| same_guid(vm) || vm.name == name);
    if let Some(existing) = in_the_way
        && !work.overwrite
    {
        return Err(JobError::TargetTaken(format!(
            "VM {:?} ({}) exists on this host; restore under another name and a new GUID, or with --overwrite",
            existing.name, existing.guid
        )));
    }
    if let Some(existing) = in_the_way
        && let Some(disk) =
            existing.disks.iter().find(|d| d.path.to_ascii_lowercase().ends_with(".avhdx"))
    {
        return Err(JobError::TargetTaken(format!(
            "VM {:?} has checkpoints (its disk {} is on {}); remove them before it is overwritten",
            existing.name, disk.slot, disk.path
        )));
    }
    let original = inventory.vms.iter().find(|vm| vm.guid == manifest.vm.guid);
    let folder = if work.target_folder.is_empty() {
        free_folder(&root_for(original, roots)?, &name)
    } else {
        let folder = PathBuf::from(&work.target_folder);
        if has_content(&folder) {
            return Err(JobError::TargetTaken(format!(
                "the folder {} is not empty; name an empty or a new one",
                folder.display()
            )));
        }
        folder
    };
    Ok(Target { name, folder, replaces: in_the_way.map(|vm| vm.guid) })
}

/// The volume that the original lies on, else the one with the most free space.
fn root_for(original: Option<&VmSeen>, roots: &[(PathBuf, u64)]) -> Result<PathBuf, JobError> {
    let of_original = original.and_then(|vm| vm.disks.first()).and_then(|disk| {
        roots.iter().map(|(root, _)| root).find(|root| Path::new(&disk.path).starts_with(root))
    });
    let widest = || roots.iter().max_by_key(|(_, free)| *free).map(|(root, _)| root);
    of_original.or_else(widest).cloned().ok_or_else(|| {
        JobError::TargetTaken(
            "this host has no shared volume to restore to; name a folder with --folder".into(),
        )
    })
}

/// A folder of the VM's name that does not exist yet.
fn free_folder(root: &Path, name: &str) -> PathBuf {
    let safe: String = name
        .chars()
        .map(|c| if c.is_control() || "/\\:*?\"<>|".contains(c) { '_' } else { c })
        .collect();
    let safe = safe.trim_matches(['.', ' ']);
    let safe = if safe.is_empty() { "restored" } else { safe };
    let first = root.join(safe);
    if !first.exists() {
        return first;
    }
    let numbered = (2_u32..).map(|n| root.join(format!("{safe} ({n})")));
    numbered.into_iter().find(|f| !f.exists()).unwrap_or(first)
}

fn has_content(folder: &Path) -> bool {
    std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some())
}

impl Target {
    /// A file name for a disk, unique within the VM.
    pub(super) fn disk_name(&self, disk: &DiskManifest, index: usize, extension: &str) -> String {
        let name = super::safe_name(&disk.file_name, "disk");
        let stem = Path::new(&name)
            .file_stem()
            .map(|s| s.to_string_lossy().into_owned())
            .unwrap_or_default();
        match index {
            0 => format!("{stem}.{extension}"),
            _ => format!("{stem}-{index}.{extension}"),
        }
    }

    /// After a failure: removes the folder, which nobody else had before.
    pub(super) fn remove_what_was_made(&self) {
        if let Err(e) = std::fs::remove_dir_all(&self.folder)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(folder = %self.folder.display(), error = %e, "files of a failed restore stay behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consistency::tests::state;
    use crate::hypervisor::Power;
    use outrider_proto::ids::{CheckpointId, JobId, PointId, VmIncarnation, VmKey, VmRole};
    use outrider_proto::manifest::{Machine, Tree};

    fn manifest(vm: &VmSeen) -> Manifest {
        Manifest {
            point: PointId::random(),
            job: JobId::random(),
            vm: VmKey { realm: "c".into(), guid: vm.guid, role: VmRole::Primary },
            vm_name: vm.name.clone(),
            incarnation: VmIncarnation(1),
            checkpoint: CheckpointId::random(),
            taken_unix_ms: 0,
            chunk_size: 256 << 10,
            consistency: "CRASH".into(),
            reasons: vec![],
            tracking_unproven: false,
            config: vec![],
            disks: vec![],
            machine: Machine::default(),
            tree: Tree::default(),
        }
    }

    #[test]
    fn an_existing_vm_is_only_replaced_when_that_was_asked_for() {
        let vm = state(Power::Running, true).vm;
        let manifest = manifest(&vm);
        let inventory = Inventory { vms: vec![vm.clone()], ..Inventory::default() };
        let dir = tempfile::tempdir().expect("a directory");
        let roots = [(dir.path().to_owned(), 1)];
        let mut work = RestoreWork { keep_guid: true, ..RestoreWork::default() };
        let refused = choose(&manifest, &work, &inventory, &roots).expect_err("it exists");
        assert!(refused.to_string().contains("--overwrite"), "{refused}");
        work.overwrite = true;
        assert_eq!(
            choose(&manifest, &work, &inventory, &roots).expect("a place").replaces,
            Some(vm.guid)
        );
        let other = RestoreWork { target_name: "위성/2".into(), ..RestoreWork::default() };
        let target = choose(&manifest, &other, &inventory, &roots).expect("a place");
        assert_eq!((target.replaces, target.folder), (None, dir.path().join("위성_2")));
    }
}
