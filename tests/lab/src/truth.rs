//! The exact bytes of every disk at every recovery checkpoint, to judge restores by.

use std::io::Write;
use std::path::{Path, PathBuf};

use outrider_disk::{DiskChain, DiskError, RawDisk, ReadDisk, compare, export};
use uuid::Uuid;

use crate::cluster::Cluster;
use crate::control::{Comparison, TruthRecord};
use crate::error::LabError;
use crate::model::{FrozenDisk, guid};

/// Piece that one hash of a pruned copy stands for.
const PIECE: u64 = 256 << 10;

fn raw_path(dir: &Path, vm: Uuid, checkpoint: Uuid, place: usize) -> PathBuf {
    dir.join(guid(vm)).join(guid(checkpoint)).join(format!("disk{place}.raw"))
}

fn hashes_path(raw: &Path) -> PathBuf {
    raw.with_extension("b3")
}

/// Copies what the checkpoint froze. The frozen files cannot change meanwhile.
pub(crate) fn record(
    cluster: &Cluster,
    vm: Uuid,
    checkpoint: Uuid,
    frozen: &[FrozenDisk],
) -> Result<(), LabError> {
    let places: Vec<Option<PathBuf>> = cluster.read(|s| {
        let vm = s.vm(vm)?;
        let path_of = |id| frozen.iter().find(|f| f.disk == id).map(|f| f.path.clone());
        Ok::<_, LabError>(vm.disks.iter().map(|d| path_of(d.id)).collect())
    })?;
    let mut disks = Vec::new();
    for (place, path) in places.iter().enumerate() {
        let Some(path) = path else {
            disks.push(None);
            continue;
        };
        let raw = raw_path(&cluster.config.truth.dir, vm, checkpoint, place);
        let folder = raw.parent().unwrap_or(&raw);
        std::fs::create_dir_all(folder).map_err(LabError::io("make the folder", folder))?;
        export::to_raw(&DiskChain::open(path)?, &raw)?;
        disks.push(Some(raw));
    }
    let old = cluster.change(|s| {
        let order = s.next();
        s.truth.push(TruthRecord { vm, checkpoint, order, disks });
        let of_vm = s.truth.iter().filter(|t| t.vm == vm && t.disks.iter().any(Option::is_some));
        let excess = of_vm.count().saturating_sub(cluster.config.truth.keep);
        s.truth
            .iter_mut()
            .filter(|t| t.vm == vm && t.disks.iter().any(Option::is_some))
            .take(excess)
            .flat_map(|t| t.disks.iter_mut().filter_map(Option::take))
            .collect::<Vec<_>>()
    });
    old.iter().try_for_each(|raw| prune(raw))
}

/// Replaces a raw copy by the hashes of its pieces.
fn prune(raw: &Path) -> Result<(), LabError> {
    let disk = RawDisk::open(raw)?;
    let size = disk.info().size;
    let path = hashes_path(raw);
    let mut out = size.to_le_bytes().to_vec();
    for_pieces(&disk, |_, hash| {
        out.extend_from_slice(hash.as_bytes());
        true
    })?;
    let mut file = std::fs::File::create(&path).map_err(LabError::io("create", &path))?;
    file.write_all(&out).map_err(LabError::io("write", &path))?;
    drop(disk);
    std::fs::remove_file(raw).map_err(LabError::io("remove", raw))
}

/// Hashes a disk piece by piece until told to stop.
fn for_pieces(
    disk: &dyn ReadDisk,
    mut each: impl FnMut(u64, blake3::Hash) -> bool,
) -> Result<(), LabError> {
    let size = disk.info().size;
    let mut buf = vec![0; PIECE as usize];
    for offset in (0..size).step_by(PIECE as usize) {
        let part = &mut buf[..PIECE.min(size - offset) as usize];
        disk.read_at(offset, part)?;
        if !each(offset, blake3::hash(part)) {
            break;
        }
    }
    Ok(())
}

/// Compares a disk (read with its parents) with what the checkpoint froze.
pub(crate) fn compare_with(
    cluster: &Cluster,
    disk_path: &Path,
    checkpoint: Uuid,
    place: usize,
) -> Result<Comparison, LabError> {
    let vm = cluster.read(|s| {
        let found = s.truth.iter().find(|t| t.checkpoint == checkpoint).map(|t| t.vm);
        found.ok_or_else(|| LabError::unknown("recorded checkpoint", checkpoint))
    })?;
    let raw = raw_path(&cluster.config.truth.dir, vm, checkpoint, place);
    let disk = DiskChain::open(disk_path)?;
    if raw.exists() {
        let truth = RawDisk::open(&raw)?;
        return match compare::first_difference(&truth, &disk) {
            Ok(None) => Ok(Comparison::Identical),
            Ok(Some(offset)) => Ok(Comparison::DiffersAt { offset }),
            Err(DiskError::SizesDiffer { .. }) => Ok(sizes(truth.info().size, &disk)),
            Err(e) => Err(e.into()),
        };
    }
    let path = hashes_path(&raw);
    let kept = std::fs::read(&path).map_err(LabError::io("read", &path))?;
    let (head, hashes) = kept
        .split_first_chunk::<8>()
        .ok_or_else(|| LabError::unknown("hash list", path.display()))?;
    let size = u64::from_le_bytes(*head);
    if size != disk.info().size {
        return Ok(sizes(size, &disk));
    }
    let mut expected = hashes.chunks_exact(blake3::OUT_LEN);
    let mut result = Comparison::Identical;
    for_pieces(&disk, |offset, hash| {
        let same = expected.next() == Some(hash.as_bytes().as_slice());
        if !same {
            result = Comparison::DiffersAt { offset };
        }
        same
    })?;
    Ok(result)
}

fn sizes(expected: u64, disk: &DiskChain) -> Comparison {
    Comparison::SizeDiffers { expected, found: disk.info().size }
}
