//! The block allocation table: where each block is.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::image::Image;
use super::{DynamicHeader, SECTOR};
use crate::DiskError;
use crate::error::FormatError;

pub(crate) const NAME: &str = "block allocation table";

/// Entries that are read, and kept, together: 64 KiB.
const PAGE: u64 = 16384;

/// Pages that are kept: 16 MiB, enough for 8 TiB in blocks of 2 MiB. Others are read each time.
const MAX_KEPT: usize = 256;

/// An entry without a block.
pub(crate) const ABSENT: u32 = u32::MAX;

/// The table's entries, read from the file when first asked for.
pub(crate) struct Table {
    offset: u64,
    blocks: u64,
    pages: Vec<OnceLock<Box<[u32]>>>,
    kept: AtomicUsize,
}

impl Table {
    /// # Errors
    /// The header has too few entries for the disk, or the table passes the end of the file.
    pub(crate) fn new(
        header: &DynamicHeader,
        size: u64,
        file_len: u64,
    ) -> Result<Self, FormatError> {
        let blocks = size.div_ceil(u64::from(header.block_size));
        if blocks > u64::from(header.entries) {
            let detail = format!(
                "has {} entries where a disk of {size} bytes in blocks of {} needs {blocks}",
                header.entries, header.block_size
            );
            return Err(FormatError::corrupt(NAME, detail));
        }
        let offset = header.table_offset;
        if !offset.is_multiple_of(SECTOR) || offset < SECTOR {
            let detail =
                format!("is at {offset}; a multiple of 512 behind the footer's copy is expected");
            return Err(FormatError::corrupt(NAME, detail));
        }
        let needed = offset.saturating_add(blocks * 4);
        if needed > file_len {
            return Err(FormatError::Truncated { structure: NAME, needed, found: file_len });
        }
        let pages = std::iter::repeat_with(OnceLock::new).take(blocks.div_ceil(PAGE) as usize);
        Ok(Self { offset, blocks, pages: pages.collect(), kept: AtomicUsize::new(0) })
    }

    /// Blocks that the disk has.
    pub(crate) fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The file offset behind the table.
    pub(crate) fn end(&self) -> u64 {
        self.offset + self.blocks * 4
    }

    /// Where an entry is in the file.
    pub(crate) fn entry_offset(&self, block: u64) -> u64 {
        self.offset + block * 4
    }

    /// The entry of a block of the disk: a sector of the file, or [`ABSENT`].
    pub(crate) fn get(&self, image: &Image, block: u64) -> Result<u32, DiskError> {
        let cell = &self.pages[(block / PAGE) as usize];
        if let Some(entries) = cell.get() {
            return Ok(entries[(block % PAGE) as usize]);
        }
        if self.kept.load(Ordering::Relaxed) >= MAX_KEPT {
            let mut bytes = [0; 4];
            image.read(NAME, self.entry_offset(block), &mut bytes)?;
            return Ok(u32::from_be_bytes(bytes));
        }
        let page = self.read(image, block / PAGE * PAGE, PAGE)?;
        self.kept.fetch_add(1, Ordering::Relaxed);
        Ok(cell.get_or_init(|| page.into())[(block % PAGE) as usize])
    }

    /// Changes the entry in memory; the caller changes it in the file.
    pub(crate) fn set(&mut self, block: u64, entry: u32) {
        if let Some(entries) = self.pages[(block / PAGE) as usize].get_mut() {
            entries[(block % PAGE) as usize] = entry;
        }
    }

    /// The entries of up to `count` blocks from `first` on, read and not kept.
    pub(crate) fn read(
        &self,
        image: &Image,
        first: u64,
        count: u64,
    ) -> Result<Vec<u32>, DiskError> {
        let count = count.min(self.blocks.saturating_sub(first)) as usize;
        let mut bytes = vec![0; count * 4];
        image.read(NAME, self.entry_offset(first), &mut bytes)?;
        let decode = |c: &[u8]| u32::from_be_bytes(c.try_into().expect("chunks of four bytes"));
        Ok(bytes.chunks_exact(4).map(decode).collect())
    }
}
