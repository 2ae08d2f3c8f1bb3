//! Where a restored VM goes, and what is in its way. Decided before anything is written.

use std::path::{Path, PathBuf};

use outrider_proto::ids::{JobId, VmGuid};
use outrider_proto::manifest::{DiskManifest, Manifest};
use outrider_proto::rpc::RestoreWork;

use super::files;
use super::trail::Trail;
use crate::hypervisor::{Inventory, ReplicaRole, VmSeen};
use crate::job::JobError;

/// Numbered folders that are searched for what an earlier attempt left.
const LOOKED_AT: usize = 32;

/// A place for a VM.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) name: String,
    pub(super) folder: PathBuf,
    /// The VM whose place is taken.
    pub(super) replaces: Option<VmGuid>,
    /// What an earlier attempt of this job left in the folder.
    pub(super) trail: Option<Trail>,
    /// The VM is real, but what follows may not be done.
    pub(super) unfinished: bool,
}

/// Chooses the place, or says why there is none.
pub(super) fn choose(
    manifest: &Manifest,
    work: &RestoreWork,
    inventory: &Inventory,
    roots: &[(PathBuf, u64)],
    job: JobId,
) -> Result<Target, JobError> {
    let name = if work.target_name.is_empty() {
        manifest.vm_name.clone()
    } else {
        work.target_name.clone()
    };
    let original = inventory.vms.iter().find(|vm| vm.guid == manifest.vm.guid);
    let begun = if work.target_folder.is_empty() {
        let candidates = roots.iter().flat_map(|(root, _)| folders(root, &name).take(LOOKED_AT));
        candidates.into_iter().find_map(|f| Trail::find(&f, job).map(|trail| (f, trail)))
    } else {
        let folder = PathBuf::from(&work.target_folder);
        Trail::find(&folder, job).map(|trail| (folder, trail))
    };
    let mut unfinished = false;
    if let Some((folder, mut trail)) = begun {
        let ours = |vm: &&VmSeen| {
            !vm.disks.is_empty() && vm.disks.iter().all(|d| Path::new(&d.path).starts_with(&folder))
        };
        if trail.made.is_none()
            && let Some(made) = inventory.vms.iter().find(ours)
        {
            // It became real, and the attempt died before it could write that down.
            trail.made = Some(made.guid);
            unfinished = true;
        }
        let replaces = match &trail.replaced {
            Some(replaced) => Some(replaced.vm),
            None => in_the_way(manifest, work, inventory, &name)?,
        };
        return Ok(Target { name, folder, replaces, trail: Some(trail), unfinished });
    }
    let replaces = in_the_way(manifest, work, inventory, &name)?;
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
    Ok(Target { name, folder, replaces, trail: None, unfinished })
}

/// The VM whose place is to be taken.
fn in_the_way(
    manifest: &Manifest,
    work: &RestoreWork,
    inventory: &Inventory,
    name: &str,
) -> Result<Option<VmGuid>, JobError> {
    let same_guid = |vm: &&VmSeen| work.keep_guid && vm.guid == manifest.vm.guid;
    let in_the_way = inventory.vms.iter().find(|vm| same_guid(vm) || vm.name == name);
    match in_the_way {
        Some(existing) if !work.overwrite => Err(JobError::TargetTaken(format!(
            "VM {:?} ({}) exists on this host; restore under another name and a new GUID, or with --overwrite",
            existing.name, existing.guid
        ))),
        Some(existing) if existing.replica != ReplicaRole::None => {
            Err(JobError::TargetTaken(format!(
                "VM {:?} ({}) is the receiving side of a replication on this host, which nothing else may write to: restore \
                 under another name and a new GUID, or end the replication first (Remove-VMReplication)",
                existing.name, existing.guid
            )))
        }
        found => Ok(found.map(|vm| vm.guid)),
    }
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
    folders(root, name).find(|f| !f.exists()).unwrap_or_else(|| root.to_owned())
}

/// Folders of the VM's name: as it is, then numbered.
fn folders(root: &Path, name: &str) -> impl Iterator<Item = PathBuf> + use<> {
    let safe: String = name
        .chars()
        .map(|c| if c.is_control() || "/\\:*?\"<>|".contains(c) { '_' } else { c })
        .collect();
    let safe = safe.trim_matches(['.', ' ']);
    let safe = if safe.is_empty() { "restored" } else { safe }.to_owned();
    let root = root.to_owned();
    (1_u32..).map(move |n| match n {
        1 => root.join(&safe),
        n => root.join(format!("{safe} ({n})")),
    })
}

fn has_content(folder: &Path) -> bool {
    std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some())
}

impl Target {
    /// The files that Hyper-V itself has to handle afterwards. The definition is named by a GUID.
    pub(super) fn files(
        &self,
        manifest: &Manifest,
        work: &RestoreWork,
        extension: impl Fn(&DiskManifest) -> &'static str,
    ) -> Vec<PathBuf> {
        let disks = match work.with_checkpoints && !manifest.tree.checkpoints.is_empty() {
            true => files::with_checkpoints(manifest, extension),
            false => files::flat(manifest, extension),
        };
        let definition = format!("{}.vmcx", manifest.vm.guid);
        let mut all = files::paths(&disks, &self.folder);
        all.push(self.folder.join(super::DEFINITION).join(definition));
        all
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
pub(super) mod tests {
    use super::*;
    use crate::consistency::tests::state;
    use crate::hypervisor::Power;
    use outrider_proto::ids::{CheckpointId, JobId, PointId, VmIncarnation, VmKey, VmRole};
    use outrider_proto::manifest::{Machine, Tree};

    /// Of a VM without disks.
    pub(in crate::restore) fn manifest() -> Manifest {
        of(&state(Power::Running, true).vm)
    }

    fn of(vm: &VmSeen) -> Manifest {
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
        let manifest = of(&vm);
        let inventory = Inventory { vms: vec![vm.clone()], ..Inventory::default() };
        let dir = tempfile::tempdir().expect("a directory");
        let roots = [(dir.path().to_owned(), 1)];
        let mut work = RestoreWork { keep_guid: true, ..RestoreWork::default() };
        let refused =
            choose(&manifest, &work, &inventory, &roots, JobId::random()).expect_err("it exists");
        assert!(refused.to_string().contains("--overwrite"), "{refused}");
        work.overwrite = true;
        assert_eq!(
            choose(&manifest, &work, &inventory, &roots, JobId::random())
                .expect("a place")
                .replaces,
            Some(vm.guid)
        );
        // Another attempt of the same job goes on where the first one stood.
        let job = JobId::random();
        let begun = choose(&manifest, &work, &inventory, &roots, job).expect("a place");
        std::fs::create_dir(&begun.folder).expect("made");
        Trail::new(job, manifest.point).save(&begun.folder).expect("written");
        let again = choose(&manifest, &work, &inventory, &roots, job).expect("a place");
        assert_eq!((again.folder, again.trail.is_some()), (begun.folder.clone(), true));
        let other_job = choose(&manifest, &work, &inventory, &roots, JobId::random());
        assert_ne!(other_job.expect("a place").folder, begun.folder);
        // Overwriting what replication writes would make a mix of both.
        let replica = VmSeen { replica: ReplicaRole::Replica, ..vm.clone() };
        let there = Inventory { vms: vec![replica], ..Inventory::default() };
        let refused =
            choose(&manifest, &work, &there, &roots, JobId::random()).expect_err("a replica");
        assert!(refused.to_string().contains("Remove-VMReplication"), "{refused}");
        let other = RestoreWork { target_name: "위성/2".into(), ..RestoreWork::default() };
        let target =
            choose(&manifest, &other, &inventory, &roots, JobId::random()).expect("a place");
        assert_eq!((target.replaces, target.folder), (None, dir.path().join("위성_2")));
    }
}
