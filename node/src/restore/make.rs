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
        Self { context, reader, manifest, target, work, trail, with_tree, files, notes }
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
        Trail::remove(&self.target.folder);
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
        self.trail.save(&self.target.folder)
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
        self.trail.save(&self.target.folder)?;
        Ok(vm)
    }

    /// Writes disks and configuration; gives the definition file. What an earlier attempt finished is not written again.
    async fn write(&mut self) -> Result<PathBuf, JobError> {
        let context = self.context;
        self.target.claim(!self.work.target_folder.is_empty())?;
        let folders = [DISKS, DEFINITION, CHECKPOINTS];
        for dir in folders.iter().take(if self.with_tree { 3 } else { 2 }) {
            let dir = self.target.folder.join(dir);
            std::fs::create_dir_all(&dir).map_err(JobError::file("make the folder", &dir))?;
        }
        self.trail.save(&self.target.folder)?;
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
            if self.trail.disks.contains(&file.name) && path.is_file() {
                tracing::info!(file = file.name, "an earlier attempt wrote this disk");
                continue;
            }
            // Half of it, perhaps.
            super::remove_file(path);
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
            self.trail.save(&self.target.folder)?;
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
    pub(super) async fn clean_up(&self, error: &JobError) {
        if error.is_superseded() {
            // Somebody else works on it, with this trail.
            return;
        }
        if self.trail.made.is_some() {
            if !error.retry() {
                Trail::remove(&self.target.folder);
            }
            return;
        }
        if self.trail.replaced.is_some() {
            return;
        }
        let (hypervisor, lease) = (&self.context.hypervisor, &self.context.lease);
        if let Err(e) = hypervisor.forget_planned(lease, &self.target.folder).await {
            tracing::warn!(error = %e, "a VM in the making may stay behind");
        }
        self.target.remove_what_was_made();
    }
}
