//! The bytes of a VM: open leaf files while it runs, and the change tracking of each disk.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use outrider_disk::{DiskChain, DiskFormat, DiskInfo, DiskKind, DiskWriter, NewDisk, ReadDisk};
use uuid::Uuid;

use crate::control::DiskSource;
use crate::error::LabError;
use crate::model::{Disk, guid};
use crate::rct::Tracker;
use crate::shape::Device;

/// Block size of disks made by the lab when none is asked for.
const DEFAULT_BLOCK: u32 = 2 << 20;

/// Open leaves and change tracking, by disk slot.
#[derive(Default)]
pub(crate) struct VmIo {
    writers: BTreeMap<Uuid, DiskWriter>,
    trackers: BTreeMap<Uuid, Tracker>,
    /// DataWriteGuid of each leaf that nobody has open, as it was left.
    left: BTreeMap<Uuid, Uuid>,
}

/// Locks a VM's bytes; only on threads that may block.
pub(crate) fn locked(io: &Mutex<VmIo>) -> MutexGuard<'_, VmIo> {
    io.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VmIo {
    /// Opens every leaf, as the worker process of a starting VM does.
    pub(crate) fn open_all(&mut self, disks: &[Disk]) -> Result<(), LabError> {
        for disk in disks {
            if let Some(leaf) = disk.leaf() {
                self.open(disk.id, leaf)?;
            }
        }
        Ok(())
    }

    /// Closes every leaf.
    pub(crate) fn close_all(&mut self) -> Result<(), LabError> {
        let open: Vec<Uuid> = self.writers.keys().copied().collect();
        open.into_iter().try_for_each(|disk| self.close(disk).map(drop))
    }

    /// Looks at the leaf of a disk that is not open. Tracking ends when somebody else has written to it (a restore in
    /// place): a real file would have lost its tracking ids with its content.
    pub(crate) fn inspect(&mut self, disk: Uuid, leaf: &Path) -> Result<DiskInfo, LabError> {
        let info = info(leaf)?;
        if !self.writers.contains_key(&disk) {
            let before = self.left.insert(disk, info.data_write_guid);
            if before.is_some_and(|guid| guid != info.data_write_guid) {
                self.forget(disk);
            }
        }
        Ok(info)
    }

    /// The worker process died: files stay as they are on the medium, logs unreplayed.
    pub(crate) fn crash(&mut self) {
        self.writers.clear();
        self.left.clear();
    }

    /// Closes one leaf; whether it was open.
    pub(crate) fn close(&mut self, disk: Uuid) -> Result<bool, LabError> {
        match self.writers.remove(&disk) {
            Some(writer) => {
                let path = writer.path().to_owned();
                writer.close()?;
                self.left.insert(disk, info(&path)?.data_write_guid);
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// The lab itself has changed a leaf that is not open.
    pub(crate) fn changed(&mut self, disk: Uuid) {
        self.left.remove(&disk);
    }

    /// Goes on writing to another leaf.
    pub(crate) fn open(&mut self, disk: Uuid, leaf: &Path) -> Result<(), LabError> {
        self.writers.insert(disk, DiskWriter::open(leaf)?);
        Ok(())
    }

    /// A guest's write.
    pub(crate) fn write(&mut self, disk: Uuid, offset: u64, data: &[u8]) -> Result<(), LabError> {
        let Some(writer) = self.writers.get_mut(&disk) else {
            return Err(LabError::refused(disk, 32775, "the VM does not run"));
        };
        // Tracked first: what may have been written must not be missing from a change list.
        self.trackers.entry(disk).or_default().wrote(offset, data.len() as u64);
        writer.write_at(offset, data)?;
        Ok(())
    }

    /// A write that change tracking does not see.
    pub(crate) fn write_unseen(
        &mut self,
        disk: Uuid,
        offset: u64,
        data: &[u8],
    ) -> Result<(), LabError> {
        match self.writers.get_mut(&disk) {
            Some(writer) => Ok(writer.write_at(offset, data)?),
            None => Err(LabError::refused(disk, 32775, "the disk is not open")),
        }
    }

    pub(crate) fn mark(&mut self, disk: Uuid) -> String {
        self.trackers.entry(disk).or_default().mark(&guid(disk))
    }

    pub(crate) fn tracker(&self, disk: Uuid) -> Option<&Tracker> {
        self.trackers.get(&disk)
    }

    pub(crate) fn coarsen(&mut self, granularity: u64) {
        self.trackers.values_mut().for_each(|t| t.coarsen(granularity));
    }

    pub(crate) fn forget(&mut self, disk: Uuid) {
        if let Some(tracker) = self.trackers.get_mut(&disk) {
            tracker.forget_all();
        }
    }

    pub(crate) fn forget_all(&mut self) {
        self.trackers.values_mut().for_each(Tracker::forget_all);
    }

    /// Drops marks that neither a checkpoint nor a reference point refers to.
    pub(crate) fn keep_marks(&mut self, wanted: &[(Uuid, String)]) {
        for (disk, tracker) in &mut self.trackers {
            let of_disk: Vec<String> =
                wanted.iter().filter(|(d, _)| d == disk).map(|(_, m)| m.clone()).collect();
            tracker.keep_only(&of_disk);
        }
    }
}

/// Facts of a disk file and its parents.
pub(crate) fn info(path: &Path) -> Result<DiskInfo, LabError> {
    Ok(DiskChain::open(path)?.info().clone())
}

/// Makes the disk of a new VM in `folder`; gives its file, or nothing for a pass-through disk.
pub(crate) fn provide(
    source: &DiskSource,
    folder: &Path,
    stem: &str,
) -> Result<Option<std::path::PathBuf>, LabError> {
    let path = folder.join(format!("{stem}.vhdx"));
    match source {
        DiskSource::CopyOf(from) => {
            // Opened first: a file that is no disk is refused with the reader's own words.
            let path = match info(from)?.format {
                DiskFormat::Vhd => path.with_extension("vhd"),
                DiskFormat::Vhdx | DiskFormat::Raw => path,
            };
            std::fs::copy(from, &path).map_err(LabError::io("copy the disk", from))?;
            Ok(Some(path))
        }
        DiskSource::InPlace(path) => {
            info(path)?;
            Ok(Some(path.clone()))
        }
        DiskSource::Empty { size, block_size } => {
            let block_size = if *block_size == 0 { DEFAULT_BLOCK } else { *block_size };
            let new = NewDisk {
                block_size: Some(block_size),
                ..NewDisk::of(DiskFormat::Vhdx, DiskKind::Dynamic, *size)
            };
            DiskWriter::create(&path, &new)?.close()?;
            Ok(Some(path))
        }
        DiskSource::PassThrough
        | DiskSource::FibreChannel
        | DiskSource::Shared { .. }
        | DiskSource::PersistentMemory { .. }
        | DiskSource::VhdSet { .. } => Ok(None),
    }
}

/// What a disk is that no checkpoint holds, with the file that its settings name (nothing reads it).
pub(crate) fn device(source: &DiskSource, folder: &Path, stem: &str) -> Option<Device> {
    let file = |extension: &str| folder.join(format!("{stem}.{extension}"));
    match source {
        DiskSource::FibreChannel => Some(Device::FibreChannel),
        DiskSource::Shared { .. } => Some(Device::Shared(file("vhdx"))),
        DiskSource::PersistentMemory { .. } => Some(Device::PersistentMemory(file("vhdpmem"))),
        DiskSource::VhdSet { .. } => Some(Device::VhdSet(file("vhds"))),
        _ => None,
    }
}

/// Makes a disk bigger in place: a new file of the new size takes the old one's content, identity and name.
pub(crate) fn grow(path: &Path, size: u64) -> Result<(), LabError> {
    const STEP: u64 = 1 << 20;
    let extension = path.extension().unwrap_or_default().to_string_lossy();
    let new = path.with_extension(format!("growing.{extension}"));
    {
        let old = DiskChain::open(path)?;
        let info = old.info();
        if size <= info.size {
            return Err(LabError::refused(path.display(), 32773, "a disk only grows"));
        }
        let bigger = NewDisk {
            format: info.format,
            kind: DiskKind::Dynamic,
            size,
            block_size: Some(info.block_size),
            logical_sector: info.logical_sector,
            physical_sector: info.physical_sector,
            disk_id: Some(info.disk_id),
        };
        let mut writer = DiskWriter::create(&new, &bigger)?;
        let mut buf = vec![0; STEP as usize];
        for range in &old.allocated()? {
            for at in (range.start..range.end()).step_by(STEP as usize) {
                let part = &mut buf[..STEP.min(range.end() - at) as usize];
                old.read_at(at, part)?;
                writer.write_at(at, part)?;
            }
        }
        writer.close()?;
    }
    std::fs::rename(&new, path).map_err(LabError::io("replace", path))
}
