//! A disk of which some ranges read as zeros.

use std::sync::Arc;

use crate::{ByteRange, DiskError, DiskInfo, RangeSet, ReadDisk};

/// A disk without some of its bytes: they read as zeros, are not allocated, and are not read from the disk below.
pub struct MaskedDisk {
    disk: Arc<dyn ReadDisk>,
    masked: RangeSet,
}

impl MaskedDisk {
    /// `disk` with zeros in `masked`; what of that lies behind its end means nothing.
    #[must_use]
    pub fn new(disk: Arc<dyn ReadDisk>, mut masked: RangeSet) -> Self {
        masked.clamp(disk.info().size);
        Self { disk, masked }
    }

    /// The ranges that read as zeros.
    #[must_use]
    pub fn masked(&self) -> &RangeSet {
        &self.masked
    }
}

impl ReadDisk for MaskedDisk {
    fn info(&self) -> &DiskInfo {
        self.disk.info()
    }

    fn wait_before(&self, bytes: u64) -> std::time::Duration {
        self.disk.wait_before(bytes)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let wanted = RangeSet::single(offset, buf.len() as u64);
        if self.masked.intersect(&wanted).is_empty() {
            return self.disk.read_at(offset, buf);
        }
        buf.fill(0);
        for ByteRange { start, len } in &wanted.subtract(&self.masked) {
            let at = (start - offset) as usize;
            self.disk.read_at(start, &mut buf[at..at + len as usize])?;
        }
        Ok(())
    }

    fn allocated(&self) -> Result<RangeSet, DiskError> {
        Ok(self.disk.allocated()?.subtract(&self.masked))
    }
}
