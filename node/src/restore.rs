//! A recovery point into disks, and disks into a VM.
//!
//! | file | idea |
//! | --- | --- |
//! | `disk` | a tree of chunks into a sparse disk file, every chunk checked against its id |
//! | `files` | which disk files there will be, and which are children of which (pure) |
//! | `plan` | what speaks against it on this host, before anything is written (pure) |
//! | `target` | where a restored VM goes, and what is in its way |
//! | `make` | the steps of a restore |
//! | `boot` | seeing whether it boots |
//! | `swap` | taking the place of a VM, so that there is always one |
//! | `trail` | how far it is, for whoever continues after a crash |

mod boot;
mod disk;
mod files;
mod make;
mod plan;
mod swap;
mod target;
mod trail;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use outrider_disk::DiskError;
use outrider_proto::ids::{CheckpointId, ChunkId, VmGuid, VmKey, VmRole};
use outrider_proto::manifest::{ConfigFile, DiskManifest, Manifest};
use outrider_proto::model::parse;
use outrider_proto::rpc;
use outrider_proto::seal::Sealer;

pub use disk::{NewDisk, RestoreError, image_extension, new_child, new_image};

use crate::hypervisor::Inventory;
use crate::job::{JobContext, JobError, Outcome};
use crate::pipeline::{Pool, PoolError};
use crate::precheck;
use crate::store::JobStore;

/// Folders of a restored VM.
const DISKS: &str = "Virtual Hard Disks";
const DEFINITION: &str = "Virtual Machines";
const CHECKPOINTS: &str = "Snapshots";

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
    let mut names: Vec<String> = Vec::new();
    for (index, disk) in manifest.disks.iter().enumerate() {
        let name = safe_name(&disk.file_name, &format!("disk{index}"));
        let name = files::unlike(&names, named_as(&name, image_extension(disk)));
        if let Err(e) = export_disk(reader, disk, manifest.chunk_size, &dir.join(&name)).await {
            remove_files(names.iter().map(|name| dir.join(name)).collect()).await;
            return Err(e);
        }
        names.push(name);
    }
    Ok(names.iter().map(|name| dir.join(name)).collect())
}

/// A disk file of [`export_tree`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TreeFile {
    /// The file.
    pub path: PathBuf,
    /// The checkpoint whose frozen disk it is; none: the disk at the point itself.
    pub checkpoint: Option<CheckpointId>,
    /// Slot of the disk.
    pub slot: String,
}

/// As [`export_disks`], with a differencing disk for each checkpoint over the one that it follows; parents first. They go
/// into the folder `Virtual Hard Disks` of `dir`.
///
/// # Errors
/// [`RestoreError`].
pub async fn export_tree(
    reader: &Reader,
    manifest: &Manifest,
    dir: &Path,
) -> Result<Vec<TreeFile>, RestoreError> {
    let files = files::with_checkpoints(manifest, image_extension);
    let paths = files::paths(&files, dir);
    let made = |source| DiskError::Io { path: dir.to_owned(), op: "make the folder", source };
    std::fs::create_dir_all(dir.join(DISKS)).map_err(made)?;
    for (at, (file, path)) in files.iter().zip(&paths).enumerate() {
        let parent = file.over.map(|over| paths[over].clone());
        let below = file.over.and_then(|over| files[over].disk.layers.last()).map(|l| l.root);
        let create = {
            let (path, like) = (path.clone(), file.disk.clone());
            move || match parent {
                Some(parent) => new_child(&path, &parent),
                None => new_image(&path, &like, true),
            }
        };
        let written =
            disk::write(reader, &file.disk, below, manifest.chunk_size, path, create).await;
        if let Err(e) = written {
            remove_files(paths[..at].to_vec()).await;
            return Err(e);
        }
    }
    let of = |(file, path): (&files::DiskFile, PathBuf)| TreeFile {
        path,
        checkpoint: file.checkpoint,
        slot: file.slot.clone(),
    };
    Ok(files.iter().zip(paths).map(of).collect())
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
    let create = move || new_image(&file, &like, true);
    disk::write(reader, disk, None, chunk_size, path, create).await
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

/// Whether the file is gone. Blocks.
fn remove_file(path: &Path) -> bool {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), error = %e, "a file of a failed restore stays behind");
            false
        }
        _ => true,
    }
}

/// Removes each of the files, whatever becomes of the others.
async fn remove_files(files: Vec<PathBuf>) {
    let remove = move || {
        for file in &files {
            remove_file(file);
        }
    };
    if let Err(e) = blocking(remove).await {
        tracing::error!(error = %e, "files of a failed export may stay behind");
    }
}

/// Works on files elsewhere: a volume that is paused stops them, and must not stop the runtime.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, PoolError> {
    let span = tracing::Span::current();
    tokio::task::spawn_blocking(move || span.in_scope(work)).await.map_err(|_| PoolError)
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
        Ok((guid, clean)) => Outcome {
            data_safe: true,
            host_clean: clean,
            restored_vm: restored(guid),
            warnings,
            error: None,
        },
        Err(Failure { error, made, clean }) => Outcome {
            // A VM that is there and could not be started is no restore that is done; one that was started and does not
            // boot is: its bytes are those of the point.
            data_safe: matches!(error, JobError::NotBooted(_)),
            host_clean: clean,
            restored_vm: made.and_then(restored),
            warnings,
            error: Some(error),
        },
    }
}

/// Why a restore failed, and the VM that there is nevertheless.
struct Failure {
    error: JobError,
    made: Option<VmGuid>,
    /// Nothing of the restore stays on the host but that VM.
    clean: bool,
}

impl<E: Into<JobError>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { error: error.into(), made: None, clean: true }
    }
}

async fn restore_vm(
    context: &JobContext,
    message: &rpc::JobLease,
    vm: &VmKey,
    work: &rpc::RestoreWork,
    warnings: &mut Vec<String>,
) -> Result<(VmGuid, bool), Failure> {
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
    let manifest = match work.checkpoint.as_str() {
        "" => manifest,
        wanted => manifest.at(wanted).map_err(|e| JobError::Unfit(e.to_string()))?,
    };
    context.phase("planning");
    let facts = context.hypervisor.host_facts().await?;
    warnings.extend(plan::check(&manifest, work, &facts, &context.host)?);
    boot::refuse_in_vain(context.hypervisor.as_ref(), work)?;
    let hyperv = context.hypervisor.kind() == "hyperv";
    let speaks_against = |path: &Path| hyperv.then(|| precheck::target_path(path)).flatten();
    if let Some(why) = speaks_against(Path::new(&work.target_folder)) {
        return Err(JobError::Unfit(why).into());
    }
    let inventory = context.hypervisor.inventory().await?;
    if work.keep_guid {
        not_elsewhere(context, &manifest, &inventory).await?;
    }
    let roots = context.hypervisor.storage_roots().await?;
    let target = {
        let (manifest, work, job) = (manifest.clone(), work.clone(), context.lease.job());
        let choose = move || target::choose(&manifest, &work, &inventory, &roots, job);
        blocking(choose).await??
    };
    let files = target.files(&manifest, work, |disk| context.hypervisor.disk_extension(disk));
    if let Some(why) = files.iter().find_map(|file| speaks_against(file)) {
        return Err(JobError::Unfit(why).into());
    }
    warnings.extend(hyperv.then(|| precheck::target_remark(&target.folder)).flatten());
    if work.keep_guid || target.replaces == Some(manifest.vm.guid) {
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
    if let Err(error) = &made {
        restore.clean_up(error).await;
    }
    warnings.append(&mut restore.notes);
    let (clean, vm) = (restore.clean, restore.trail.made);
    made.map(|vm| (vm, clean)).map_err(|error| Failure { error, made: vm, clean })
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

/// Writes a configuration file, chunk by chunk: with a saved state it is as large as the VM's memory.
async fn write_config_file(
    reader: &Reader,
    file: &ConfigFile,
    chunk_size: u32,
    path: &Path,
) -> Result<(), JobError> {
    let failed = || RestoreError::Configuration { name: file.name.clone() };
    if file.chunks.len() as u64 != file.size.div_ceil(chunk_size.into()) {
        return Err(failed().into());
    }
    let (at, size) = (path.to_owned(), file.size);
    let create = move || {
        let target = std::fs::File::create(&at).map_err(JobError::file("create", &at))?;
        target.set_len(size).map_err(JobError::file("write", &at))?;
        Ok::<_, JobError>(Arc::new(target))
    };
    let target = blocking(create).await??;
    for (at, id) in (0_u64..).zip(&file.chunks) {
        let offset = at * u64::from(chunk_size);
        // A hole is zeros, as the file is already.
        if id.is_hole() {
            continue;
        }
        let bytes = disk::open_chunk(reader, *id).await?;
        if bytes.len() as u64 != (file.size - offset).min(chunk_size.into()) {
            return Err(failed().into());
        }
        let target = target.clone();
        let write = move || {
            use std::io::{Seek, SeekFrom, Write};
            let mut target = &*target;
            target.seek(SeekFrom::Start(offset))?;
            target.write_all(&bytes)
        };
        reader.pool.run(write).await?.map_err(JobError::file("write", path))?;
    }
    // The VM is made from it, and may be all there is by then.
    reader.pool.run(move || target.sync_all()).await?.map_err(JobError::file("sync", path))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_that_cannot_be_removed_keeps_no_other_one() {
        let dir = tempfile::tempdir().expect("a folder");
        let [stays, goes] = ["stays.vhdx", "goes.vhdx"].map(|name| dir.path().join(name));
        std::fs::create_dir(&stays).expect("a folder is no file");
        std::fs::write(&goes, b"half").expect("written");
        remove_files(vec![stays.clone(), goes.clone()]).await;
        assert!(stays.exists() && !goes.exists());
    }
}
