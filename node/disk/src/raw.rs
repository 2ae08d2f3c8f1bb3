//! Raw images: the guest's bytes and nothing else.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::block_file::{BlockFile, ByteSource};
use crate::disk::check_bounds;
use crate::{DiskError, DiskInfo, RangeSet, ReadDisk};

/// Plain bytes read as a disk. Its holes, where the file system knows them, are not allocated.
pub struct RawDisk {
    path: PathBuf,
    source: Arc<dyn ByteSource>,
    info: DiskInfo,
}

impl std::fmt::Debug for RawDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RawDisk").field("path", &self.path).field("info", &self.info).finish()
    }
}

impl RawDisk {
    /// Opens `path` read-only. The size is the file's length at this moment.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, DiskError> {
        let file = BlockFile::open(path.as_ref())?;
        Self::from_source(path.as_ref().to_owned(), Arc::new(file))
    }

    /// Reads a disk from any bytes; `path` names it in errors.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn from_source(path: PathBuf, source: Arc<dyn ByteSource>) -> Result<Self, DiskError> {
        let size = source.size().map_err(DiskError::io(&path, "get the length of"))?;
        let info = DiskInfo::raw(size);
        Ok(Self { path, source, info })
    }
}

impl ReadDisk for RawDisk {
    fn info(&self) -> &DiskInfo {
        &self.info
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        check_bounds(&self.path, self.info.size, offset, buf.len())?;
        self.source.read_exact_at(offset, buf).map_err(DiskError::io(&self.path, "read"))
    }

    fn allocated(&self) -> Result<RangeSet, DiskError> {
        let failed = DiskError::io(&self.path, "list the data ranges of");
        let known = self.source.data_ranges().map_err(failed)?;
        let mut set = known.unwrap_or_else(|| RangeSet::single(0, self.info.size));
        set.clamp(self.info.size);
        Ok(set)
    }
}
