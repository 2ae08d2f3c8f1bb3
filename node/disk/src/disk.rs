//! What a backup needs of any virtual disk.

use std::sync::Arc;

use uuid::Uuid;

use crate::{DiskError, RangeSet};

/// How a disk's blocks are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DiskKind {
    /// All blocks have their place from the start.
    Fixed,
    /// Blocks are added as the guest writes.
    Dynamic,
    /// Only what differs from a parent disk is stored.
    Differencing,
}

/// The container's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DiskFormat {
    /// VHDX or AVHDX.
    Vhdx,
    /// VHD or AVHD, the format before VHDX.
    Vhd,
    /// The guest's bytes and nothing else.
    Raw,
}

impl std::fmt::Display for DiskFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Vhdx => "VHDX",
            Self::Vhd => "VHD",
            Self::Raw => "raw",
        })
    }
}

impl std::fmt::Display for DiskKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Fixed => "fixed",
            Self::Dynamic => "dynamic",
            Self::Differencing => "differencing",
        })
    }
}

/// The facts of a virtual disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskInfo {
    /// Size that the guest sees, in bytes.
    pub size: u64,
    /// Logical sector size in bytes: 512 or 4096.
    pub logical_sector: u32,
    /// Physical sector size in bytes: 512 or 4096.
    pub physical_sector: u32,
    /// Allocation unit of the container in bytes (for raw images one that suits large reads).
    pub block_size: u32,
    /// How blocks are stored; for a chain, the leaf's kind.
    pub kind: DiskKind,
    /// The container's format.
    pub format: DiskFormat,
    /// VirtualDiskId (SCSI page 83): one for a disk and all its checkpoints. Of a VHD, which has no such
    /// id, the UUID of the file, and for a chain the base's. Nil for raw images.
    pub disk_id: Uuid,
    /// Changes whenever the guest-visible bytes may have changed; nil for VHD and raw images, which
    /// do not tell.
    pub data_write_guid: Uuid,
}

impl DiskInfo {
    /// Of plain bytes that are a disk, `size` of them.
    #[must_use]
    pub fn raw(size: u64) -> Self {
        Self {
            size,
            logical_sector: 512,
            physical_sector: 4096,
            block_size: 1 << 20,
            kind: DiskKind::Fixed,
            format: DiskFormat::Raw,
            disk_id: Uuid::nil(),
            data_write_guid: Uuid::nil(),
        }
    }
}

/// A virtual disk that can be read from many threads at once.
pub trait ReadDisk: Send + Sync {
    /// The disk's facts.
    fn info(&self) -> &DiskInfo;

    /// Fills `buf` with the guest's bytes from `offset` on. Any offset and length within the disk.
    ///
    /// # Errors
    /// [`DiskError::OutOfBounds`] if the range passes the end of the disk; otherwise what reading met.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError>;

    /// How long a reader that can wait without holding a thread should wait before it reads so many bytes. Asking counts as
    /// reading for the source's bound, so whoever asks reads then; who reads without asking is held back by the read itself.
    fn wait_before(&self, _bytes: u64) -> std::time::Duration {
        std::time::Duration::ZERO
    }

    /// The guest-visible ranges that may hold anything but zeros, over the whole chain.
    ///
    /// # Errors
    /// What reading the allocation tables met.
    fn allocated(&self) -> Result<RangeSet, DiskError>;
}

impl<D: ReadDisk + ?Sized> ReadDisk for Arc<D> {
    fn info(&self) -> &DiskInfo {
        (**self).info()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        (**self).read_at(offset, buf)
    }

    fn wait_before(&self, bytes: u64) -> std::time::Duration {
        (**self).wait_before(bytes)
    }

    fn allocated(&self) -> Result<RangeSet, DiskError> {
        (**self).allocated()
    }
}

impl<D: ReadDisk + ?Sized> ReadDisk for Box<D> {
    fn info(&self) -> &DiskInfo {
        (**self).info()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        (**self).read_at(offset, buf)
    }

    fn allocated(&self) -> Result<RangeSet, DiskError> {
        (**self).allocated()
    }
}

/// Refuses a range that is not within `size`.
pub(crate) fn check_bounds(
    path: &std::path::Path,
    size: u64,
    offset: u64,
    len: usize,
) -> Result<(), DiskError> {
    let len = len as u64;
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(DiskError::OutOfBounds { path: path.to_owned(), offset, len, size }),
    }
}
