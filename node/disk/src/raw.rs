//! Raw images: the guest's bytes and nothing else.

use std::path::Path;

use uuid::Uuid;

use crate::block_file::{BlockFile, ByteSource};
use crate::disk::check_bounds;
use crate::{DiskError, DiskFormat, DiskInfo, DiskKind, RangeSet, ReadDisk};

/// A plain file read as a disk. Its holes, where the file system knows them, are not allocated.
#[derive(Debug)]
pub struct RawDisk {
    file: BlockFile,
    info: DiskInfo,
}

impl RawDisk {
    /// Opens `path` read-only. The size is the file's length at this moment.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, DiskError> {
        let file = BlockFile::open(path.as_ref())?;
        let size = file.size().map_err(DiskError::io(path.as_ref(), "get the length of"))?;
        let info = DiskInfo {
            size,
            logical_sector: 512,
            physical_sector: 4096,
            block_size: 1 << 20,
            kind: DiskKind::Fixed,
            format: DiskFormat::Raw,
            disk_id: Uuid::nil(),
            data_write_guid: Uuid::nil(),
        };
        Ok(Self { file, info })
    }
}

impl ReadDisk for RawDisk {
    fn info(&self) -> &DiskInfo {
        &self.info
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        check_bounds(self.file.path(), self.info.size, offset, buf.len())?;
        self.file.read_exact_at(offset, buf).map_err(DiskError::io(self.file.path(), "read"))
    }

    fn allocated(&self) -> Result<RangeSet, DiskError> {
        let failed = DiskError::io(self.file.path(), "list the data ranges of");
        let known = self.file.data_ranges().map_err(failed)?;
        let mut set = known.unwrap_or_else(|| RangeSet::single(0, self.info.size));
        set.clamp(self.info.size);
        Ok(set)
    }
}
