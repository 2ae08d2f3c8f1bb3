//! A recovery point into disks, and disks into a VM.
//!
//! | file | idea |
//! | --- | --- |
//! | `disk` | a tree of chunks into a sparse disk file, every chunk checked against its id |
//! | `target` | where a restored VM goes, and what is in its way |

mod disk;
mod target;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use outrider_proto::ids::{ChunkId, VmGuid, VmKey, VmRole};
use outrider_proto::manifest::{ConfigFile, DiskManifest, Manifest};
use outrider_proto::model::parse;
use outrider_proto::rpc;
use outrider_proto::seal::Sealer;

pub use disk::{NewDisk, RestoreError, image_extension, new_image};

use crate::hypervisor::NewVm;
use crate::job::{JobContext, JobError, Outcome};
use crate::pipeline::Pool;
use crate::store::JobStore;
use target::Target;

/// Folders of a restored VM.
const DISKS: &str = "Virtual Hard Disks";
const DEFINITION: &str = "Virtual Machines";

/// Where chunks come from and what works on them.
#[derive(Clone)]
pub struct Reader {
    /// Storage, under a ticket that allows reading data.
    pub store: Arc<dyn JobStore>,
    /// The domain's keys.
    pub sealer: Sealer,
    /// Worker threads and bytes in flight.
    pub pool: Pool,
}

/// Reads a manifest.
///
/// # Errors
/// [`RestoreError`].
pub async fn fetch_manifest(reader: &Reader, id: ChunkId) -> Result<Manifest, RestoreError> {
    let record =
        reader.store.get(&[id]).await?.pop().ok_or(crate::store::StoreError::Missing { id })?;
    Ok(Manifest::open(&reader.sealer, &record)?)
}

/// Writes the disks of a recovery point into a folder, VHDs as VHDs and all others as VHDX files, in manifest order.
/// Existing files are refused; what was written is removed when it fails.
///
/// # Errors
/// [`RestoreError`].
pub async fn export_disks(
    reader: &Reader,
    manifest: &Manifest,
    dir: &Path,
) -> Result<Vec<PathBuf>, RestoreError> {
    let mut written = Vec::new();
    for (index, disk) in manifest.disks.iter().enumerate() {
        let name = safe_name(&disk.file_name, &format!("disk{index}"));
        let path = dir.join(named_as(&name, image_extension(disk)));
        match export_disk(reader, disk, manifest.chunk_size, &path).await {
            Ok(_) => written.push(path),
            Err(e) => {
                for path in &written {
                    remove_file(path);
                }
                return Err(e);
            }
        }
    }
    Ok(written)
}

/// Writes one disk of a recovery point as a new file of the original's format, block size and sectors; gives the bytes
/// written. A half-written file is removed.
///
/// # Errors
/// [`RestoreError`].
pub async fn export_disk(
    reader: &Reader,
    disk: &DiskManifest,
    chunk_size: u32,
    path: &Path,
) -> Result<u64, RestoreError> {
    let (file, like) = (path.to_owned(), disk.clone());
    disk::write(reader, disk, chunk_size, path, move || new_image(&file, &like, true)).await
}

/// The file name without any folder that a manifest might hold.
fn safe_name(name: &str, otherwise: &str) -> String {
    let name = name.rsplit(['/', '\\']).next().unwrap_or_default();
    if name.is_empty() || name.starts_with('.') { otherwise.to_owned() } else { name.to_owned() }
}

/// A disk's file name with the extension of what it becomes, whatever image it came from.
fn named_as(name: &str, extension: &str) -> String {
    let images = ["vhdx", "avhdx", "vhd", "avhd", "raw", "img", "qcow2"];
    let stem = name
        .rsplit_once('.')
        .filter(|(_, old)| images.iter().any(|image| old.eq_ignore_ascii_case(image)))
        .map_or(name, |(stem, _)| stem);
    format!("{stem}.{extension}")
}

fn remove_file(path: &Path) {
    if let Err(e) = std::fs::remove_file(path)
        && e.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), error = %e, "a file of a failed restore stays behind");
    }
}

pub(crate) async fn run(
    context: &JobContext,
    message: &rpc::JobLease,
    vm: VmKey,
    work: &rpc::RestoreWork,
) -> Outcome {
    match restore_vm(context, message, &vm, work).await {
        Ok(guid) => Outcome {
            data_safe: true,
            host_clean: true,
            restored_vm: Some(VmKey { realm: vm.realm, guid, role: VmRole::Primary }),
            ..Outcome::default()
        },
        Err(e) => {
            Outcome { data_safe: false, host_clean: true, error: Some(e), ..Outcome::default() }
        }
    }
}

async fn restore_vm(
    context: &JobContext,
    message: &rpc::JobLease,
    vm: &VmKey,
    work: &rpc::RestoreWork,
) -> Result<VmGuid, JobError> {
    let reader = Reader {
        store: context.store.clone(),
        sealer: context.sealer.clone(),
        pool: context.pool.clone(),
    };
    context.phase("reading the manifest");
    let manifest_id: ChunkId = parse("RestoreWork", "manifest_id", &work.manifest_id)?;
    let manifest = fetch_manifest(&reader, manifest_id).await?;
    if manifest.point.to_string() != work.point_id {
        return Err(JobError::Unrestorable(format!(
            "manifest {} describes recovery point {}, not {}",
            manifest_id.short(),
            manifest.point,
            work.point_id
        )));
    }
    let inventory = context.hypervisor.inventory().await?;
    let roots = context.hypervisor.storage_roots().await?;
    let target = target::choose(&manifest, work, &inventory, &roots)?;
    if target.replaces.is_some() || work.keep_guid {
        // Whatever tracks changes of these disks knows nothing of what is written now.
        context
            .coordinator
            .raise_incarnation(rpc::RaiseIncarnationRequest {
                job_id: context.lease.job().to_string(),
                lease_epoch: context.lease.epoch().0,
                vm: message.vm.clone(),
                why: format!("restore of recovery point {} for VM {}", manifest.point, vm),
            })
            .await?;
    }
    let made = write_and_define(context, &reader, &manifest, &target, work).await;
    if made.is_err() {
        target.remove_what_was_made();
    }
    made
}

async fn write_and_define(
    context: &JobContext,
    reader: &Reader,
    manifest: &Manifest,
    target: &Target,
    work: &rpc::RestoreWork,
) -> Result<VmGuid, JobError> {
    let (disks_dir, definition_dir) = (target.folder.join(DISKS), target.folder.join(DEFINITION));
    for dir in [&disks_dir, &definition_dir] {
        std::fs::create_dir_all(dir).map_err(JobError::file("make the folder", dir))?;
    }
    context.phase("writing disks");
    let mut disks = Vec::with_capacity(manifest.disks.len());
    for (index, disk) in manifest.disks.iter().enumerate() {
        context.lease.check()?;
        let extension = context.hypervisor.disk_extension(disk);
        let path = disks_dir.join(target.disk_name(disk, index, extension));
        let create = {
            let (hypervisor, file, like) = (context.hypervisor.clone(), path.clone(), disk.clone());
            let keep_disk_id = work.keep_guid;
            move || hypervisor.create_disk(&file, &like, keep_disk_id)
        };
        let written = disk::write(reader, disk, manifest.chunk_size, &path, create).await?;
        context.metrics.restored_bytes.inc_by(written);
        disks.push((disk.slot.clone(), path));
    }
    context.phase("writing the configuration");
    let mut definition = None;
    for file in &manifest.config {
        let path = definition_dir.join(safe_name(&file.name, "configuration"));
        let bytes = config_bytes(reader, file).await?;
        std::fs::write(&path, bytes).map_err(JobError::file("write", &path))?;
        if context.hypervisor.is_definition(&path) {
            definition = Some(path);
        }
    }
    let definition = definition.ok_or_else(|| {
        JobError::Unrestorable(format!(
            "recovery point {} holds no VM definition of this hypervisor; restore its disks alone",
            manifest.point
        ))
    })?;
    context.phase("defining the VM");
    context.lease.wait_to_mutate().await?;
    if let Some(existing) = target.replaces {
        context.hypervisor.stop_vm(&context.lease, existing).await?;
        context.hypervisor.remove_vm(&context.lease, existing).await?;
    }
    let new = NewVm {
        definition,
        folder: target.folder.clone(),
        name: target.name.clone(),
        keep_guid: work.keep_guid,
        disks,
        clustered: work.highly_available,
        ..NewVm::default()
    };
    let guid = context.hypervisor.define_vm(&context.lease, &new).await?.vm;
    if work.power_on {
        context.phase("starting the VM");
        context.hypervisor.start_vm(&context.lease, guid).await?;
    }
    Ok(guid)
}

async fn config_bytes(reader: &Reader, file: &ConfigFile) -> Result<Vec<u8>, RestoreError> {
    let mut bytes = Vec::new();
    for id in &file.chunks {
        if id.is_hole() {
            return Err(RestoreError::Configuration { name: file.name.clone() });
        }
        bytes.extend_from_slice(&disk::open_chunk(reader, *id).await?);
    }
    if bytes.len() as u64 == file.size {
        Ok(bytes)
    } else {
        Err(RestoreError::Configuration { name: file.name.clone() })
    }
}
