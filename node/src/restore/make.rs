//! The steps of a restore: files, planned VM, real VM; each leaves a trail that the next attempt finds.
//!
//! Before the VM is real, a failure removes all that was written. A VM that is real stays, whatever fails after it.

use std::path::PathBuf;

use outrider_proto::ids::VmGuid;
use outrider_proto::manifest::{DiskManifest, Manifest};
use outrider_proto::rpc::RestoreWork;

use super::target::Target;
use super::trail::Trail;
use super::{DEFINITION, DISKS, Reader, config_bytes, disk, safe_name};
use crate::hypervisor::{Defined, Networks, NewVm};
use crate::job::{JobContext, JobError};

/// A restore under way.
pub(super) struct Restore<'a> {
    pub(super) context: &'a JobContext,
    pub(super) reader: &'a Reader,
    pub(super) manifest: &'a Manifest,
    pub(super) target: Target,
    pub(super) work: &'a RestoreWork,
    pub(super) trail: Trail,
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
        Self { context, reader, manifest, target, work, trail, notes: Vec::new() }
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
        for dir in [DISKS, DEFINITION] {
            let dir = self.target.folder.join(dir);
            std::fs::create_dir_all(&dir).map_err(JobError::file("make the folder", &dir))?;
        }
        self.trail.save(&self.target.folder)?;
        context.phase("writing disks");
        for (index, disk) in self.manifest.disks.iter().enumerate() {
            context.lease.check()?;
            let path = self.disk_path(index, disk);
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if self.trail.disks.contains(&name) && path.is_file() {
                tracing::info!(file = name, "an earlier attempt wrote this disk");
                continue;
            }
            // Half of it, perhaps.
            super::remove_file(&path);
            let create = {
                let (hypervisor, file, like) =
                    (context.hypervisor.clone(), path.clone(), disk.clone());
                let keep_disk_id = self.work.keep_guid;
                move || hypervisor.create_disk(&file, &like, keep_disk_id)
            };
            let written =
                disk::write(self.reader, disk, self.manifest.chunk_size, &path, create).await?;
            context.metrics.restored_bytes.inc_by(written);
            self.trail.disks.push(name);
            self.trail.save(&self.target.folder)?;
        }
        context.phase("writing the configuration");
        let mut definition = None;
        for file in &self.manifest.config {
            let name = safe_name(&file.name, "configuration");
            let path = self.target.folder.join(DEFINITION).join(name);
            let bytes = config_bytes(self.reader, file).await?;
            std::fs::write(&path, bytes).map_err(JobError::file("write", &path))?;
            if context.hypervisor.is_definition(&path) {
                definition = Some(path);
            }
        }
        definition.ok_or_else(|| {
            JobError::Unrestorable(format!(
                "recovery point {} holds no VM definition of this hypervisor; restore its disks alone",
                self.manifest.point
            ))
        })
    }

    fn disk_path(&self, index: usize, disk: &DiskManifest) -> PathBuf {
        let extension = self.context.hypervisor.disk_extension(disk);
        self.target.folder.join(DISKS).join(self.target.disk_name(disk, index, extension))
    }

    fn new_vm(&self, definition: PathBuf) -> NewVm {
        let disks = self.manifest.disks.iter().enumerate();
        NewVm {
            definition,
            folder: self.target.folder.clone(),
            name: self.target.name.clone(),
            keep_guid: self.work.keep_guid,
            disks: disks.map(|(i, disk)| (disk.slot.clone(), self.disk_path(i, disk))).collect(),
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
            checkpoints: None,
            checkpoint_disks: Vec::new(),
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
