//! A frozen disk that is open only while it is read: a VM may have fifty checkpoints of many disks, each with all files
//! below it.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use outrider_disk::{DiskError, DiskInfo, RangeSet, ReadDisk};
use outrider_proto::journal::FileStamp;

use crate::source::{SourceDisk, Sources};

/// A disk as a checkpoint froze it. Opened again, it must be what it was: a file that was written to meanwhile is an error.
pub(super) struct LayerDisk {
    sources: Sources,
    leaf: PathBuf,
    info: DiskInfo,
    stamps: Vec<FileStamp>,
    open: Mutex<Option<Arc<SourceDisk>>>,
}

impl LayerDisk {
    /// The disk that `opened` is; it is closed.
    pub(super) fn of(sources: Sources, leaf: PathBuf, opened: &SourceDisk) -> Self {
        let (info, stamps) = (opened.info().clone(), opened.stamps());
        Self { sources, leaf, info, stamps, open: Mutex::new(None) }
    }

    pub(super) fn leaf(&self) -> &std::path::Path {
        &self.leaf
    }

    /// What its files told when it was first opened, leaf first.
    pub(super) fn stamps(&self) -> &[FileStamp] {
        &self.stamps
    }

    /// Closes it until it is read again.
    pub(super) fn close(&self) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// The ranges that its first `count` files decide. Blocks.
    pub(super) fn decided(&self, count: usize) -> Result<RangeSet, DiskError> {
        self.opened()?.decided(count)
    }

    /// Opens it anew and sees whether its files are as they were. Blocks.
    pub(super) fn is_unchanged(&self) -> Result<bool, DiskError> {
        Ok(self.sources.open(&self.leaf)?.stamps() == self.stamps)
    }

    fn opened(&self) -> Result<Arc<SourceDisk>, DiskError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(disk) = &*open {
            return Ok(disk.clone());
        }
        let disk = Arc::new(self.sources.open(&self.leaf)?);
        if disk.stamps() != self.stamps || disk.info() != &self.info {
            return Err(DiskError::Io {
                path: self.leaf.clone(),
                op: "read",
                source: io::Error::other("a file of the frozen chain was written to meanwhile"),
            });
        }
        *open = Some(disk.clone());
        Ok(disk)
    }
}

impl ReadDisk for LayerDisk {
    fn info(&self) -> &DiskInfo {
        &self.info
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.opened()?.read_at(offset, buf)
    }
    fn allocated(&self) -> Result<RangeSet, DiskError> {
        self.opened()?.allocated()
    }
}
