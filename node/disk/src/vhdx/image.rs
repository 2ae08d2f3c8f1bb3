//! The bytes of a VHDX file as they are after its log was replayed.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::overlay::Overlay;
use crate::DiskError;
use crate::block_file::ByteSource;

/// A file under an overlay.
pub(crate) struct Image {
    pub(crate) path: PathBuf,
    pub(crate) source: Arc<dyn ByteSource>,
    /// Bytes that the file has.
    pub(crate) physical_len: u64,
    /// Bytes that it has after replay.
    pub(crate) len: u64,
    pub(crate) overlay: Overlay,
}

impl Image {
    pub(crate) fn new(path: PathBuf, source: Arc<dyn ByteSource>) -> Result<Self, DiskError> {
        let len = source.size().map_err(DiskError::io(&path, "get the length of"))?;
        Ok(Self { path, source, physical_len: len, len, overlay: Overlay::default() })
    }

    /// Fills `buf` from file offset `offset` on; `structure` is what is being read.
    pub(crate) fn read(
        &self,
        structure: &'static str,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), DiskError> {
        let needed = offset.saturating_add(buf.len() as u64);
        if needed > self.len {
            return Err(self.truncated(structure, needed));
        }
        let in_file = self.physical_len.saturating_sub(offset).min(buf.len() as u64) as usize;
        let (stored, beyond) = buf.split_at_mut(in_file);
        beyond.fill(0);
        if !stored.is_empty() {
            self.source.read_exact_at(offset, stored).map_err(|source| match source.kind() {
                // The file became shorter while it was open.
                io::ErrorKind::UnexpectedEof => self.truncated(structure, needed),
                _ => DiskError::Io { path: self.path.clone(), op: "read", source },
            })?;
        }
        self.overlay.apply(offset, buf);
        Ok(())
    }

    pub(crate) fn truncated(&self, structure: &'static str, needed: u64) -> DiskError {
        DiskError::Truncated { path: self.path.clone(), structure, needed, found: self.len }
    }
}
