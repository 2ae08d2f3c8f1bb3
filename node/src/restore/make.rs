//! The steps of a restore: files, planned VM, real VM; each leaves a trail that the next attempt finds.
//!
//! Before the VM is real, a failure removes all that was written. A VM that is real stays, whatever fails after it.

use std::path::PathBuf;

use outrider_proto::ids::{CheckpointId, VmGuid};
use outrider_proto::manifest::{ConfigFile, DiskManifest, Manifest};
use outrider_proto::rpc::RestoreWork;

use super::files::{self, DiskFile};
use super::target::Target;
use super::trail::Trail;
use super::{CHECKPOINTS, DEFINITION, DISKS, Reader, disk, safe_name};
use crate::hypervisor::{Defined, Networks, NewVm, RestoredCheckpoint};
use crate::job::{JobContext, JobError};

/// A restore under way.
pub(super) struct Restore<'a> {
    pub(super) context: &'a JobContext,
    pub(super) reader: &'a Reader,
    pub(super) manifest: &'a Manifest,
    pub(super) target: Target,
    pub(super) work: &'a RestoreWork,
    pub(super) trail: Trail,
    /// Whether its checkpoints come back, too.
    with_tree: bool,
    files: Vec<DiskFile>,
    /// The report: what was mended, lost, removed.
    pub(super) notes: Vec<String>,
    /// Nothing of this restore stays on the host but the VM that it made.
    pub(super) clean: bool,
}

impl<'a> Restore<'a> {
    pub(super) fn new(
        context: &'a JobContext,
        reader: &'a Reader,
        manifest: &'a Manifest,
        target: Target,
        work: &'a RestoreWork,
    ) -> Self {
        let fresh = || Trail::new(context.lease.job(), manifest.point);
        let trail = target.trail.clone().unwrap_or_else(fresh);
        let with_tree = work.with_checkpoints && !manifest.tree.checkpoints.is_empty();
        let extension = |disk: &DiskManifest| context.hypervisor.disk_extension(disk);
        let files = match with_tree {
            true => files::with_checkpoints(manifest, extension),
            false => files::flat(manifest, extension),
        };
        let notes = Vec::new();
        let clean = true;
        Self { context, reader, manifest, target, work, trail, with_tree, files, notes, clean }
    }

    pub(super) async fn run(&mut self) -> Result<VmGuid, JobError> {
        let vm = match self.trail.made {
            // An earlier attempt got that far.
            Some(made) => {
                if self.target.unfinished {
                    self.finish(made).await?;
                }
                made
            }
            None => self.make().await?,
        };
        if let Some(check) = super::boot::asked(self.work) {
            self.boot(vm, &check).await?;
        } else if self.work.power_on {
            self.context.phase("starting the VM");
            self.context.hypervisor.start_vm(&self.context.lease, vm).await?;
        }
        self.remove_replaced(vm).await;
        Trail::remove(&self.target.folder).await;
        Ok(vm)
    }

    /// The earlier attempt died right after the VM became real.
    async fn finish(&mut self, vm: VmGuid) -> Result<(), JobError> {
        let (context, lease) = (self.context, &self.context.lease);
        lease.wait_to_mutate().await?;
        let mut new = self.new_vm(PathBuf::new());
        if let Some(replaced) = &self.trail.replaced {
            new = replaced.successor(new);
        }
        self.notes.extend(context.hypervisor.finish_vm(lease, vm, &new).await?);
        self.trail.keep(&self.target.folder).await
    }

    async fn make(&mut self) -> Result<VmGuid, JobError> {
        let definition = self.write().await?;
        let (context, lease) = (self.context, &self.context.lease);
        context.phase("defining the VM");
        lease.wait_to_mutate().await?;
        context.hypervisor.forget_planned(lease, &self.target.folder).await?;
        let new = self.new_vm(definition);
        let Defined { vm, mended } = match self.target.replaces {
            Some(old) => self.swap(old, new).await?,
            None => context.hypervisor.define_vm(lease, &new).await?,
        };
        self.notes.extend(mended);
        self.trail.made = Some(vm);
        self.trail.keep(&self.target.folder).await?;
        Ok(vm)
    }

    /// Writes disks and configuration; gives the definition file. What an earlier attempt finished is not written again.
    async fn write(&mut self) -> Result<PathBuf, JobError> {
        let context = self.context;
        self.target.claim(!self.work.target_folder.is_empty()).await?;
        let folders = [DISKS, DEFINITION, CHECKPOINTS];
        let folders = folders.iter().take(if self.with_tree { 3 } else { 2 });
        let folders: Vec<PathBuf> = folders.map(|dir| self.target.folder.join(dir)).collect();
        let make = move || {
            let made = |dir: &PathBuf| {
                std::fs::create_dir_all(dir).map_err(JobError::file("make the folder", dir))
            };
            folders.iter().try_for_each(made)
        };
        super::blocking(make).await??;
        self.trail.keep(&self.target.folder).await?;
        context.phase("writing the configuration");
        let definition = self.write_config(&self.manifest.config, DEFINITION).await?;
        if self.with_tree {
            for checkpoint in &self.manifest.tree.checkpoints {
                self.write_config(&checkpoint.config, CHECKPOINTS).await?;
            }
        }
        let definition = definition.ok_or_else(|| {
            JobError::Unrestorable(format!(
                "recovery point {} holds no VM definition of this hypervisor; restore its disks alone",
                self.manifest.point
            ))
        })?;
        // Hours may be between this and the VM.
        context.hypervisor.precheck_vm(&self.new_vm(definition.clone())).await?;
        context.phase("writing disks");
        let paths = files::paths(&self.files, &self.target.folder);
        for (file, path) in self.files.iter().zip(&paths) {
            context.lease.check()?;
            let (written, there) = (self.trail.disks.contains(&file.name), path.clone());
            let skip = move || {
                let whole = written && there.is_file();
                if !whole {
                    // Half of it, perhaps.
                    super::remove_file(&there);
                }
                whole
            };
            if super::blocking(skip).await? {
                tracing::info!(file = file.name, "an earlier attempt wrote this disk");
                continue;
            }
            let below = file.over.and_then(|over| Some((&self.files[over], paths.get(over)?)));
            let create = {
                let (hypervisor, path, like) =
                    (context.hypervisor.clone(), path.clone(), file.disk.clone());
                let keep_disk_id = self.work.keep_guid;
                let parent = below.map(|(_, parent)| parent.clone());
                move || match parent {
                    Some(parent) => hypervisor.create_child(&path, &parent),
                    None => hypervisor.create_disk(&path, &like, keep_disk_id),
                }
            };
            let below = below.and_then(|(below, _)| below.disk.layers.last()).map(|l| l.root);
            let chunk_size = self.manifest.chunk_size;
            let written =
                disk::write(self.reader, &file.disk, below, chunk_size, path, create).await?;
            context.metrics.restored_bytes.inc_by(written);
            self.trail.disks.push(file.name.clone());
            self.trail.keep(&self.target.folder).await?;
        }
        Ok(definition)
    }

    /// Writes configuration files into a folder of the VM; gives the definition among them.
    async fn write_config(
        &self,
        config: &[ConfigFile],
        folder: &str,
    ) -> Result<Option<PathBuf>, JobError> {
        let mut definition = None;
        for file in config {
            let name = safe_name(&file.name, "configuration");
            let path = self.target.folder.join(folder).join(name);
            let chunk_size = self.manifest.chunk_size;
            super::write_config_file(self.reader, file, chunk_size, &path).await?;
            if self.context.hypervisor.is_definition(&path) {
                definition = Some(path);
            }
        }
        Ok(definition)
    }

    /// Disk files by slot: of the VM, or of one of its checkpoints.
    fn disks_of(&self, checkpoint: Option<CheckpointId>) -> Vec<(String, PathBuf)> {
        let paths = files::paths(&self.files, &self.target.folder);
        let of_it = self.files.iter().zip(paths).filter(|(f, _)| f.checkpoint == checkpoint);
        of_it.map(|(f, path)| (f.slot.clone(), path)).collect()
    }

    fn new_vm(&self, definition: PathBuf) -> NewVm {
        let checkpoints = self.manifest.tree.checkpoints.iter().filter(|_| self.with_tree);
        NewVm {
            definition,
            folder: self.target.folder.clone(),
            name: self.target.name.clone(),
            keep_guid: self.work.keep_guid,
            replaces: self.target.replaces,
            disks: self.disks_of(None),
            as_it_was: false,
            clustered: self.work.highly_available,
            group: self.manifest.machine.group.clone(),
            networks: Networks {
                choices: self
                    .work
                    .switches
                    .iter()
                    .map(|s| (s.from.clone(), s.to.clone()))
                    .collect(),
                disconnect: self.work.disconnect,
            },
            discard_saved_state: self.work.discard_saved_state,
            checkpoints: self.with_tree.then(|| self.target.folder.join(CHECKPOINTS)),
            restored_checkpoints: checkpoints
                .map(|c| RestoredCheckpoint {
                    id: c.id.0,
                    name: c.name.clone(),
                    disks: self.disks_of(Some(c.id)),
                })
                .collect(),
        }
    }

    /// After a failure: nothing of ours stays but a VM that is real, or the files of one that could not be brought back.
    /// Files that a VM may have are never removed.
    pub(super) async fn clean_up(&mut self, error: &JobError) {
        if error.is_superseded() {
            // Somebody else works on it, with this trail.
            return;
        }
        if self.trail.made.is_none() {
            let (hypervisor, lease) = (&self.context.hypervisor, &self.context.lease);
            let folder = self.target.folder.clone();
            // First those in the making: one that is real meanwhile is seen as that.
            let looked = match hypervisor.forget_planned(lease, &folder).await {
                Ok(()) => hypervisor.made_in(&folder).await,
                Err(e) => Err(e),
            };
            match looked {
                Ok(Some(vm)) => self.made_after_all(vm).await,
                Ok(None) if self.trail.replaced.is_none() => {
                    let stay = self.target.remove_what_was_made().await;
                    self.stays(stay);
                    return;
                }
                Ok(None) => {
                    self.clean = false;
                    self.notes.push(format!(
                        "the restored files in {} were kept, for the VM that was to be replaced is off or gone",
                        folder.display()
                    ));
                    return;
                }
                Err(e) => {
                    self.clean = false;
                    self.notes.push(format!(
                        "the files in {} were kept, for a VM may have been made of them ({e}): look in Hyper-V Manager whether VM \
                         {:?} is there; if it is, keep or remove it there, if not, remove the folder",
                        folder.display(),
                        self.target.name
                    ));
                    return;
                }
            }
        }
        if !error.retry() {
            Trail::remove(&self.target.folder).await;
        }
    }

    /// What failed went on: the VM is real. The next attempt finishes it, or an administrator does.
    async fn made_after_all(&mut self, vm: VmGuid) {
        self.clean = false;
        self.trail.made = Some(vm);
        self.notes.push(format!(
            "VM {:?} ({vm}) is there all the same, with its files in {}: its rights, saved state and cluster role may lack; start it \
             and see, or remove it and then the folder",
            self.target.name,
            self.target.folder.display()
        ));
    }

    /// Notes files that could not be removed.
    pub(super) fn stays(&mut self, files: Vec<PathBuf>) {
        if files.is_empty() {
            return;
        }
        self.clean = false;
        let files: Vec<String> = files.iter().map(|f| f.display().to_string()).collect();
        self.notes.push(format!(
            "these could not be removed and stay behind: {}; remove them when their volume allows it",
            files.join(", ")
        ));
    }
}
