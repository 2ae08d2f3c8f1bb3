//! A recovery point into disks, and disks into a VM.
//!
//! | file | idea |
//! | --- | --- |
//! | `disk` | a tree of chunks into a sparse disk file, every chunk checked against its id |
//! | `plan` | what speaks against it on this host, before anything is written (pure) |
//! | `target` | where a restored VM goes, and what is in its way |
//! | `make` | the steps of a restore |
//! | `boot` | seeing whether it boots |
//! | `swap` | taking the place of a VM, so that there is always one |
//! | `trail` | how far it is, for whoever continues after a crash |

mod boot;
mod disk;
mod make;
mod plan;
mod swap;
mod target;
mod trail;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use outrider_proto::ids::{ChunkId, VmGuid, VmKey, VmRole};
use outrider_proto::manifest::{ConfigFile, DiskManifest, Manifest};
use outrider_proto::model::parse;
use outrider_proto::rpc;
use outrider_proto::seal::Sealer;

pub use disk::{NewDisk, RestoreError, image_extension, new_image};

use crate::hypervisor::Inventory;
use crate::job::{JobContext, JobError, Outcome};
use crate::pipeline::Pool;
use crate::store::JobStore;

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
    let mut warnings = Vec::new();
    let result = restore_vm(context, message, &vm, work, &mut warnings).await;
    let restored = |guid| Some(VmKey { realm: vm.realm.clone(), guid, role: VmRole::Primary });
    match result {
        Ok(guid) => Outcome {
            data_safe: true,
            host_clean: true,
            restored_vm: restored(guid),
            warnings,
            error: None,
        },
        Err(Failure { error, made }) => Outcome {
            // A VM that is there and could not be started is no restore that is done; one that was started and does not
            // boot is: its bytes are those of the point.
            data_safe: matches!(error, JobError::NotBooted(_)),
            host_clean: true,
            restored_vm: made.and_then(restored),
            warnings,
            error: Some(error),
        },
    }
}

/// Why a restore ended, and the VM that there is nevertheless.
struct Failure {
    error: JobError,
    made: Option<VmGuid>,
}

impl<E: Into<JobError>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { error: error.into(), made: None }
    }
}

async fn restore_vm(
    context: &JobContext,
    message: &rpc::JobLease,
    vm: &VmKey,
    work: &rpc::RestoreWork,
    warnings: &mut Vec<String>,
) -> Result<VmGuid, Failure> {
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
        ))
        .into());
    }
    context.phase("planning");
    let facts = context.hypervisor.host_facts().await?;
    warnings.extend(plan::check(&manifest, work, &facts, &context.host)?);
    boot::refuse_in_vain(context.hypervisor.as_ref(), work)?;
    let inventory = context.hypervisor.inventory().await?;
    if work.keep_guid {
        not_elsewhere(context, &manifest, &inventory).await?;
    }
    let roots = context.hypervisor.storage_roots().await?;
    let target = target::choose(&manifest, work, &inventory, &roots, context.lease.job())?;
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
    let mut restore = make::Restore::new(context, &reader, &manifest, target, work);
    let made = restore.run().await;
    warnings.append(&mut restore.notes);
    match made {
        Ok(vm) => Ok(vm),
        Err(error) => {
            restore.clean_up(&error).await;
            Err(Failure { error, made: restore.trail.made })
        }
    }
}

/// A GUID is kept only if no VM of it runs on another host: two of them would be one to everybody who looks.
async fn not_elsewhere(
    context: &JobContext,
    manifest: &Manifest,
    inventory: &Inventory,
) -> Result<(), JobError> {
    let guid = manifest.vm.guid;
    let here = inventory.vms.iter().any(|vm| vm.guid == guid && vm.realized);
    match context.hypervisor.owner_of(guid).await? {
        Some(owner) if !here && !owner.eq_ignore_ascii_case(&context.host) => {
            Err(JobError::TargetTaken(format!(
                "VM {:?} ({guid}) runs on host {owner}: restore it there, or with a new GUID here",
                manifest.vm_name
            )))
        }
        _ => Ok(()),
    }
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
