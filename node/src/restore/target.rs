//! Where a restored VM goes, and what is in its way. Decided before anything is written.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use outrider_proto::ids::{JobId, VmGuid};
use outrider_proto::manifest::{DiskManifest, Manifest};
use outrider_proto::rpc::RestoreWork;

use super::files;
use super::trail::Trail;
use crate::hypervisor::{Inventory, ReplicaRole, VmSeen};
use crate::job::JobError;

/// Numbered folders that are searched for what an earlier attempt left, and the last one that is taken.
const LOOKED_AT: usize = 1000;
/// Missing ones among them after which the search ends.
const FEW: usize = 32;

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
    /// The folder is this job's: it made it, in this attempt or an earlier one. Nothing in another one is written or removed.
    pub(super) claimed: bool,
}

/// Chooses the place, or says why there is none. Blocks.
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
    let candidates: Vec<PathBuf> = match work.target_folder.as_str() {
        "" => roots.iter().flat_map(|(root, _)| begun_in(root, &name)).collect(),
        named => vec![named.into()],
    };
    let mut begun = None;
    for folder in candidates {
        if let Some(trail) = Trail::find(&folder, job)? {
            begun = Some((folder, trail));
            break;
        }
    }
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
        let replaces = match (&trail.replaced, trail.made) {
            (Some(replaced), _) => Some(replaced.vm),
            // It is there itself.
            (None, Some(_)) => None,
            (None, None) => in_the_way(manifest, work, inventory, &name)?,
        };
        let trail = Some(trail);
        return Ok(Target { name, folder, replaces, trail, unfinished, claimed: true });
    }
    let replaces = in_the_way(manifest, work, inventory, &name)?;
    let folder = if work.target_folder.is_empty() {
        free_folder(&root_for(original, roots)?, &name)?
    } else {
        let folder = PathBuf::from(&work.target_folder);
        if has_content(&folder)? {
            return Err(not_empty(&folder));
        }
        folder
    };
    Ok(Target { name, folder, replaces, trail: None, unfinished, claimed: false })
}

fn not_empty(folder: &Path) -> JobError {
    let folder = folder.display();
    JobError::TargetTaken(format!("the folder {folder} is not empty; name an empty or a new one"))
}

/// The VM whose place is to be taken.
fn in_the_way(
    manifest: &Manifest,
    work: &RestoreWork,
    inventory: &Inventory,
    name: &str,
) -> Result<Option<VmGuid>, JobError> {
    // With its GUID a VM takes its own place only, whatever another one is called.
    let itself = inventory.vms.iter().find(|vm| work.keep_guid && vm.guid == manifest.vm.guid);
    let namesake = inventory.vms.iter().find(|vm| vm.name == name);
    if let (true, None, Some(other)) = (work.keep_guid, itself, namesake) {
        return Err(JobError::TargetTaken(format!(
            "VM {:?} ({}) on this host has the name of the one that is to be restored ({}) and is another VM, which is not \
             replaced: restore under another name, or without --keep-guid",
            other.name, other.guid, manifest.vm.guid
        )));
    }
    let alike = inventory.vms.iter().filter(|vm| vm.name == name);
    let alike: Vec<String> = alike.map(|vm| vm.guid.to_string()).collect();
    if itself.is_none() && work.overwrite && alike.len() > 1 {
        return Err(JobError::TargetTaken(format!(
            "several VMs on this host are called {name:?} ({}): rename all but the one that is to be replaced, or restore in the \
             place of the original with --keep-guid",
            alike.join(", ")
        )));
    }
    match itself.or(namesake) {
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

/// A folder of the VM's name that does not exist yet. A volume that does not answer is no sign of that: the folder of the
/// original may lie there.
fn free_folder(root: &Path, name: &str) -> Result<PathBuf, JobError> {
    // To Windows a path below a volume that is away does not exist.
    std::fs::metadata(root).map_err(JobError::file("look into", root))?;
    for folder in folders(root, name).take(LOOKED_AT) {
        match folder.symlink_metadata() {
            Ok(_) => {}
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(folder),
            Err(e) => return Err(JobError::file("look for a free folder at", &folder)(e)),
        }
    }
    Err(JobError::TargetTaken(format!("no folder is free below {}", root.display())))
}

/// The folders of the VM's name up to the first one that is not there: an earlier attempt took that one or one before it,
/// unless somebody removed folders since, which is what the rest of the first few is for.
fn begun_in(root: &Path, name: &str) -> Vec<PathBuf> {
    let mut missing = 0;
    let near = |folder: &PathBuf| {
        missing += usize::from(matches!(folder.try_exists(), Ok(false)));
        missing <= FEW
    };
    folders(root, name).take(LOOKED_AT).take_while(near).collect()
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

fn has_content(folder: &Path) -> Result<bool, JobError> {
    match std::fs::read_dir(folder) {
        Ok(mut entries) => Ok(entries.next().is_some()),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(JobError::file("look into", folder)(e)),
    }
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

    /// Makes the folder, unless an earlier attempt did. One that somebody else made since it was chosen is left alone.
    ///
    /// # Errors
    /// [`JobError`]: the folder is not this job's.
    pub(super) async fn claim(&mut self, chosen_by_operator: bool) -> Result<(), JobError> {
        if !self.claimed {
            let folder = self.folder.clone();
            super::blocking(move || make(&folder, chosen_by_operator)).await??;
            self.claimed = true;
        }
        Ok(())
    }

    /// After a failure: removes the folder, if it is this job's; gives it when it could not be removed.
    pub(super) async fn remove_what_was_made(&self) -> Vec<PathBuf> {
        if !self.claimed {
            return Vec::new();
        }
        let folder = self.folder.clone();
        let removed = super::blocking(move || match std::fs::remove_dir_all(&folder) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        });
        let failed = match removed.await {
            Ok(Ok(())) => return Vec::new(),
            Ok(Err(e)) => e.to_string(),
            Err(e) => e.to_string(),
        };
        tracing::warn!(folder = %self.folder.display(), error = failed, "files of a failed restore stay behind");
        vec![self.folder.clone()]
    }
}

/// Makes a folder that is not there, or is empty and was named by the operator. Blocks.
fn make(folder: &Path, chosen_by_operator: bool) -> Result<(), JobError> {
    let parent = folder.parent().unwrap_or(folder);
    std::fs::create_dir_all(parent).map_err(JobError::file("make the folder", parent))?;
    match std::fs::create_dir(folder) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {
            if !chosen_by_operator || has_content(folder)? {
                return Err(not_empty(folder));
            }
            Ok(())
        }
        Err(e) => Err(JobError::file("make the folder", folder)(e)),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::consistency::tests::state;
    use crate::hypervisor::facts::Format;
    use crate::hypervisor::{DiskSeen, Power};
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

    #[tokio::test]
    async fn an_existing_vm_is_only_replaced_when_that_was_asked_for() {
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
        // Its own place, not that of a namesake, even if that is listed first or is the only one.
        let namesake = VmSeen { guid: VmGuid::random(), ..vm.clone() };
        let both = Inventory { vms: vec![namesake.clone(), vm.clone()], ..Inventory::default() };
        let place = choose(&manifest, &work, &both, &roots, JobId::random());
        assert_eq!(place.expect("a place").replaces, Some(vm.guid));
        let alone = Inventory { vms: vec![namesake.clone()], ..Inventory::default() };
        let refused = choose(&manifest, &work, &alone, &roots, JobId::random());
        assert!(refused.expect_err("another VM").to_string().contains("is another VM"));
        let by_name = RestoreWork { keep_guid: false, ..work.clone() };
        let place = choose(&manifest, &by_name, &alone, &roots, JobId::random());
        assert_eq!(place.expect("asked for by name").replaces, Some(namesake.guid));
        let refused = choose(&manifest, &by_name, &both, &roots, JobId::random());
        assert!(refused.expect_err("which one?").to_string().contains("several VMs"));
        // Another attempt of the same job goes on where the first one stood.
        let job = JobId::random();
        let begun = choose(&manifest, &work, &inventory, &roots, job).expect("a place");
        std::fs::create_dir(&begun.folder).expect("made");
        Trail::new(job, manifest.point).save(&begun.folder).expect("written");
        let again = choose(&manifest, &work, &inventory, &roots, job).expect("a place");
        assert_eq!((again.folder, again.trail.is_some()), (begun.folder.clone(), true));
        // What it made is not in its own way.
        let disk = DiskSeen {
            disk_id: None,
            size: 1,
            slot: "0".into(),
            path: begun.folder.join("os.vhdx").display().to_string(),
            format: Format::Vhdx,
            uncapturable: None,
        };
        let own = VmSeen { guid: VmGuid::random(), disks: vec![disk], ..vm.clone() };
        let made = Inventory { vms: vec![own.clone()], ..Inventory::default() };
        let plain = RestoreWork::default();
        let again = choose(&manifest, &plain, &made, &roots, job).expect("its own VM");
        assert_eq!(again.trail.and_then(|t| t.made), Some(own.guid));
        assert_eq!((again.replaces, again.unfinished), (None, true));
        let other_job = choose(&manifest, &work, &inventory, &roots, JobId::random());
        assert_ne!(other_job.expect("a place").folder, begun.folder);
        // Overwriting what replication writes would make a mix of both.
        let replica = VmSeen { replica: ReplicaRole::Replica, ..vm.clone() };
        let there = Inventory { vms: vec![replica], ..Inventory::default() };
        let refused =
            choose(&manifest, &work, &there, &roots, JobId::random()).expect_err("a replica");
        assert!(refused.to_string().contains("Remove-VMReplication"), "{refused}");
        // A folder that appeared after it was chosen is somebody else's, and stays when the job fails.
        let mut late =
            choose(&manifest, &work, &inventory, &roots, JobId::random()).expect("a place");
        std::fs::create_dir(&late.folder).expect("made by somebody else");
        let refused = late.claim(false).await.expect_err("it is not ours");
        assert!(refused.to_string().contains("not empty"), "{refused}");
        late.remove_what_was_made().await;
        assert!(late.folder.exists());
        late.claim(true).await.expect("an empty one that an operator names");
        late.remove_what_was_made().await;
        assert!(!late.folder.exists());
        // A volume that does not answer has no free folders: here, a file where a folder should be.
        let file = dir.path().join("no volume");
        std::fs::write(&file, b"").expect("written");
        let silent = [(file.join("below"), 1)];
        choose(&manifest, &work, &Inventory::default(), &silent, JobId::random())
            .expect_err("nothing is known of what is there");
        let other = RestoreWork { target_name: "위성/2".into(), ..RestoreWork::default() };
        let target =
            choose(&manifest, &other, &inventory, &roots, JobId::random()).expect("a place");
        assert_eq!((target.replaces, target.folder), (None, dir.path().join("위성_2")));
    }
}
