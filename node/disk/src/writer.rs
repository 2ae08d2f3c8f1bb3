//! A new or existing disk open for writing, whatever its format.

use std::path::Path;

use uuid::Uuid;

use crate::layer::Layer;
use crate::vhd::{self, VhdWriter};
use crate::vhdx::{self, VhdxWriter};
use crate::{DiskError, DiskFormat, DiskInfo, DiskKind, RangeSet, ReadDisk};

/// What a new disk is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewDisk {
    /// VHDX or VHD.
    pub format: DiskFormat,
    /// Fixed or dynamic.
    pub kind: DiskKind,
    /// Guest-visible bytes.
    pub size: u64,
    /// Bytes of a block; what Windows takes for the format if not given.
    pub block_size: Option<u32>,
    /// 512 or 4096; a VHD has 512 only.
    pub logical_sector: u32,
    /// 512 or 4096; a VHD does not say.
    pub physical_sector: u32,
    /// VirtualDiskId, of a VHD its UUID; a new one if not given.
    pub disk_id: Option<Uuid>,
}

/// A disk open for writing by one owner. Dropping it without [`DiskWriter::close`] is a crash: what was
/// not flushed may be lost.
///
/// # Examples
/// ```
/// use outrider_disk::{DiskFormat, DiskKind, DiskWriter, NewDisk, ReadDisk, open_disk};
/// # fn main() -> Result<(), outrider_disk::DiskError> {
/// # let dir = tempfile::tempdir().unwrap();
/// # let path = dir.path().join("disk.vhd");
/// let new = NewDisk::of(DiskFormat::Vhd, DiskKind::Dynamic, 10 << 30);
/// let mut disk = DiskWriter::create(&path, &new)?;
/// disk.write_at(1 << 30, b"hello")?;
/// disk.close()?;
///
/// let disk = open_disk(&path)?;
/// let mut bytes = [0; 5];
/// disk.read_at(1 << 30, &mut bytes)?;
/// assert_eq!(&bytes, b"hello");
/// assert_eq!(disk.allocated()?.total_len(), 2 << 20); // one block
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "a writer that is not closed loses what was not flushed"]
pub enum DiskWriter {
    /// VHDX or AVHDX.
    Vhdx(VhdxWriter),
    /// VHD or AVHD.
    Vhd(VhdWriter),
}

impl NewDisk {
    /// A disk as Windows makes it unless asked for something else.
    pub fn of(format: DiskFormat, kind: DiskKind, size: u64) -> Self {
        let (block_size, disk_id) = (None, None);
        let physical_sector = if format == DiskFormat::Vhd { 512 } else { 4096 };
        Self { format, kind, size, block_size, logical_sector: 512, physical_sector, disk_id }
    }
}

impl DiskWriter {
    /// Makes a new disk of zeros and opens it. An existing file is refused.
    ///
    /// # Errors
    /// [`DiskError::InvalidOption`] or [`DiskError::Io`].
    pub fn create(path: impl AsRef<Path>, new: &NewDisk) -> Result<Self, DiskError> {
        let path = path.as_ref();
        match new.format {
            DiskFormat::Vhdx => {
                let default = vhdx::CreateOptions::dynamic(new.size);
                let options = vhdx::CreateOptions {
                    block_size: new.block_size.unwrap_or(default.block_size),
                    logical_sector: new.logical_sector,
                    physical_sector: new.physical_sector,
                    kind: new.kind,
                    disk_id: new.disk_id,
                    ..default
                };
                VhdxWriter::create(path, &options).map(Self::Vhdx)
            }
            DiskFormat::Vhd if new.logical_sector == 512 => {
                let default = vhd::CreateOptions::dynamic(new.size);
                let options = vhd::CreateOptions {
                    block_size: new.block_size.unwrap_or(default.block_size),
                    kind: new.kind,
                    id: new.disk_id,
                    ..default
                };
                VhdWriter::create(path, &options).map(Self::Vhd)
            }
            DiskFormat::Vhd => Err(DiskError::InvalidOption {
                path: path.to_owned(),
                option: "logical sector",
                value: new.logical_sector.to_string(),
                expected: "512 in a VHD (a VHDX can have 4096)",
            }),
            DiskFormat::Raw => Err(DiskError::InvalidOption {
                path: path.to_owned(),
                option: "format",
                value: "raw".into(),
                expected: "VHDX or VHD",
            }),
        }
    }

    /// Makes a differencing disk of the parent's format over `parent`, which from now on must not
    /// change, and opens it.
    ///
    /// # Errors
    /// What opening the parent's chain met, [`DiskError::InvalidOption`] or [`DiskError::Io`].
    pub fn create_child(
        child: impl AsRef<Path>,
        parent: impl AsRef<Path>,
        block_size: Option<u32>,
    ) -> Result<Self, DiskError> {
        match Layer::open(parent.as_ref())? {
            Layer::Vhdx(_) => VhdxWriter::create_child(child, parent, block_size).map(Self::Vhdx),
            Layer::Vhd(_) => VhdWriter::create_child(child, parent, block_size).map(Self::Vhd),
        }
    }

    /// Opens an existing disk with its parents. What a crash left half-done is finished or undone first.
    ///
    /// # Errors
    /// As [`DiskChain::open`](crate::DiskChain::open).
    pub fn open(path: impl AsRef<Path>) -> Result<Self, DiskError> {
        match Layer::open(path.as_ref())? {
            Layer::Vhdx(_) => VhdxWriter::open(path).map(Self::Vhdx),
            Layer::Vhd(_) => VhdWriter::open(path).map(Self::Vhd),
        }
    }

    /// Writes guest data. Any offset and length within the disk.
    ///
    /// # Errors
    /// [`DiskError::OutOfBounds`]; [`DiskError::Io`], after which the writer must be opened again.
    pub fn write_at(&mut self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        match self {
            Self::Vhdx(writer) => writer.write_at(offset, data),
            Self::Vhd(writer) => writer.write_at(offset, data),
        }
    }

    /// Makes a range zeros.
    ///
    /// # Errors
    /// As [`DiskWriter::write_at`].
    pub fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<(), DiskError> {
        match self {
            Self::Vhdx(writer) => writer.write_zeroes(offset, len),
            Self::Vhd(writer) => writer.write_zeroes(offset, len),
        }
    }

    /// Waits until everything written so far would survive a crash.
    ///
    /// # Errors
    /// [`DiskError::Io`], after which the writer must be opened again.
    pub fn flush(&mut self) -> Result<(), DiskError> {
        match self {
            Self::Vhdx(writer) => writer.flush(),
            Self::Vhd(writer) => writer.flush(),
        }
    }

    /// Flushes and marks the file as closed cleanly.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn close(self) -> Result<(), DiskError> {
        match self {
            Self::Vhdx(writer) => writer.close(),
            Self::Vhd(writer) => writer.close(),
        }
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        match self {
            Self::Vhdx(writer) => writer.path(),
            Self::Vhd(writer) => writer.path(),
        }
    }

    fn inner(&self) -> &dyn ReadDisk {
        match self {
            Self::Vhdx(writer) => writer,
            Self::Vhd(writer) => writer,
        }
    }
}

impl ReadDisk for DiskWriter {
    fn info(&self) -> &DiskInfo {
        self.inner().info()
    }

    /// What was written is read back at once, flushed or not.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.inner().read_at(offset, buf)
    }

    fn allocated(&self) -> Result<RangeSet, DiskError> {
        self.inner().allocated()
    }
}
