//! The bytes of a VHD file under the table sectors that a writer has not written yet.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::SECTOR;
use crate::DiskError;
use crate::block_file::ByteSource;

pub(crate) type Sector = [u8; SECTOR as usize];

/// A file and what is to be written into it.
pub(crate) struct Image {
    pub(crate) path: PathBuf,
    pub(crate) source: Arc<dyn ByteSource>,
    pub(crate) len: u64,
    /// Sectors by file offset; none in a reader.
    pub(crate) pending: BTreeMap<u64, Sector>,
}

impl Image {
    pub(crate) fn new(path: PathBuf, source: Arc<dyn ByteSource>) -> Result<Self, DiskError> {
        let len = source.size().map_err(DiskError::io(&path, "get the length of"))?;
        Ok(Self { path, source, len, pending: BTreeMap::new() })
    }

    /// Fills `buf` from file offset `offset` on; `structure` is what is being read.
    pub(crate) fn read(
        &self,
        structure: &'static str,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), DiskError> {
        let end = offset.saturating_add(buf.len() as u64);
        if end > self.len {
            return Err(self.truncated(structure, end));
        }
        self.source.read_exact_at(offset, buf).map_err(|source| match source.kind() {
            // The file became shorter while it was open.
            io::ErrorKind::UnexpectedEof => self.truncated(structure, end),
            _ => DiskError::Io { path: self.path.clone(), op: "read", source },
        })?;
        for (&at, sector) in self.pending.range(offset.saturating_sub(SECTOR - 1)..end) {
            let (a, b) = (at.max(offset), (at + SECTOR).min(end));
            buf[(a - offset) as usize..(b - offset) as usize]
                .copy_from_slice(&sector[(a - at) as usize..(b - at) as usize]);
        }
        Ok(())
    }

    pub(crate) fn truncated(&self, structure: &'static str, needed: u64) -> DiskError {
        DiskError::Truncated { path: self.path.clone(), structure, needed, found: self.len }
    }
}
