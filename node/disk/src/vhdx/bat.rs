//! The block allocation table: where each payload block and each sector bitmap is.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::image::Image;
use super::{MIB, Metadata, Region};
use crate::error::FormatError;
use crate::{DiskError, DiskKind};

const NAME: &str = "block allocation table";

/// Entries that are read, and kept, together: 64 KiB.
const PAGE: u64 = 8192;

/// Pages that are kept: 16 MiB, enough for 64 TiB in the default blocks of 32 MiB. Entries of others are
/// read each time they are needed.
const MAX_KEPT: usize = 256;

/// Entries that are read together when all are looked at: 1 MiB.
pub(crate) const SCAN: u64 = 128 << 10;

/// How payload blocks and sector bitmaps are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) size: u64,
    pub(crate) block_size: u64,
    pub(crate) sector: u64,
    /// Payload blocks that share one sector bitmap block (a chunk).
    pub(crate) ratio: u64,
    /// Entries that the table must have.
    pub(crate) entries: u64,
}

impl Geometry {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        let block_size = u64::from(metadata.block_size);
        let sector = u64::from(metadata.logical_sector);
        let ratio = (sector << 23) / block_size;
        let payload = metadata.size.div_ceil(block_size);
        let entries = match metadata.kind {
            DiskKind::Differencing => payload.div_ceil(ratio) * (ratio + 1),
            DiskKind::Fixed | DiskKind::Dynamic => payload + payload.saturating_sub(1) / ratio,
        };
        Self { size: metadata.size, block_size, sector, ratio, entries }
    }

    /// Bytes that the table's region must have.
    pub(crate) fn table_len(&self) -> u64 {
        self.entries * 8
    }

    /// Index of a payload block's entry. Every chunk's entries are followed by its bitmap's, in every kind.
    pub(crate) fn payload_index(&self, block: u64) -> u64 {
        block + block / self.ratio
    }

    /// Index of the entry of the bitmap block that covers a payload block.
    pub(crate) fn bitmap_index(&self, block: u64) -> u64 {
        let chunk = block / self.ratio;
        (chunk + 1) * self.ratio + chunk
    }

    /// Where a payload block's bits start in its bitmap block, in bytes.
    pub(crate) fn bitmap_offset(&self, block: u64) -> u64 {
        (block % self.ratio) * self.bitmap_len()
    }

    /// Bytes of one payload block's bits.
    pub(crate) fn bitmap_len(&self) -> u64 {
        self.block_size / self.sector / 8
    }

    /// Guest-visible bytes of a block; less than a block only for the last one.
    pub(crate) fn visible(&self, block: u64) -> u64 {
        self.size.saturating_sub(block * self.block_size).min(self.block_size)
    }
}

/// What an entry says about a payload block. Offsets are in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Payload {
    /// The parent's bytes; zeros without a parent.
    NotPresent,
    /// Zeros, whatever the parent has: undefined, zero and unmapped blocks.
    Zero,
    /// All here.
    Full(u64),
    /// The sector bitmap says which sectors are here.
    Partial(u64),
}

impl Payload {
    pub(crate) fn decode(entry: u64) -> Result<Self, FormatError> {
        let offset = (entry >> 20) << 20;
        let payload = match entry & 7 {
            0 => Self::NotPresent,
            // 1 undefined, 2 zero, 3 unmapped; 5 was unmapped in version 1.00 of the format.
            1 | 2 | 3 | 5 => Self::Zero,
            6 => Self::Full(offset),
            7 => Self::Partial(offset),
            state => {
                return Err(FormatError::corrupt(NAME, format!("has an entry with state {state}")));
            }
        };
        if matches!(payload, Self::Full(o) | Self::Partial(o) if o < MIB) {
            return Err(FormatError::corrupt(NAME, "puts a block into the header area"));
        }
        Ok(payload)
    }

    pub(crate) fn encode(self) -> u64 {
        match self {
            Self::NotPresent => 0,
            Self::Zero => 2,
            Self::Full(offset) => offset | 6,
            Self::Partial(offset) => offset | 7,
        }
    }
}

/// The table's entries, read from the file when first asked for: a 64 TiB disk of 1 MiB blocks has 64
/// million, of which a read needs a few.
pub(crate) struct Bat {
    region: Region,
    entries: u64,
    pages: Vec<OnceLock<Box<[u64]>>>,
    kept: AtomicUsize,
}

impl Bat {
    /// # Errors
    /// The region is too small for the disk, or passes the end of the file.
    pub(crate) fn new(
        region: Region,
        geometry: &Geometry,
        file_len: u64,
    ) -> Result<Self, FormatError> {
        if geometry.table_len() > u64::from(region.length) {
            let detail = format!(
                "has a region of {} bytes where a disk of this size needs {}",
                region.length,
                geometry.table_len()
            );
            return Err(FormatError::corrupt(NAME, detail));
        }
        let needed = region.offset + geometry.table_len();
        if needed > file_len {
            return Err(FormatError::Truncated { structure: NAME, needed, found: file_len });
        }
        let pages = geometry.entries.div_ceil(PAGE) as usize;
        let pages = std::iter::repeat_with(OnceLock::new).take(pages).collect();
        Ok(Self { region, entries: geometry.entries, pages, kept: AtomicUsize::new(0) })
    }

    /// The entry at `index`, which the geometry gave.
    pub(crate) fn get(&self, image: &Image, index: u64) -> Result<u64, DiskError> {
        let page = index / PAGE;
        let cell = &self.pages[page as usize];
        if let Some(entries) = cell.get() {
            return Ok(entries[(index % PAGE) as usize]);
        }
        if self.kept.load(Ordering::Relaxed) >= MAX_KEPT {
            let mut bytes = [0; 8];
            image.read(NAME, self.entry_offset(index), &mut bytes)?;
            return Ok(u64::from_le_bytes(bytes));
        }
        let read = self.read_page(image, page)?;
        self.kept.fetch_add(1, Ordering::Relaxed);
        Ok(cell.get_or_init(|| read)[(index % PAGE) as usize])
    }

    /// Reads entries from `first` on into `buf`, as many as fit and exist, and keeps none.
    pub(crate) fn scan<'b>(
        &self,
        image: &Image,
        first: u64,
        buf: &'b mut [u8],
    ) -> Result<&'b [u8], DiskError> {
        let count = (buf.len() as u64 / 8).min(self.entries.saturating_sub(first));
        let buf = &mut buf[..count as usize * 8];
        image.read(NAME, self.entry_offset(first), buf)?;
        Ok(buf)
    }

    /// Changes the entry in memory, where it is kept; the caller changes it in the file.
    pub(crate) fn set(&mut self, index: u64, entry: u64) {
        if let Some(entries) = self.pages[(index / PAGE) as usize].get_mut() {
            entries[(index % PAGE) as usize] = entry;
        }
    }

    /// Where an entry is in the file.
    pub(crate) fn entry_offset(&self, index: u64) -> u64 {
        self.region.offset + index * 8
    }

    fn read_page(&self, image: &Image, page: u64) -> Result<Box<[u64]>, DiskError> {
        let first = page * PAGE;
        let count = PAGE.min(self.entries - first) as usize;
        let mut bytes = vec![0; count * 8];
        image.read(NAME, self.entry_offset(first), &mut bytes)?;
        let decode = |c: &[u8]| u64::from_le_bytes(c.try_into().expect("chunks of eight bytes"));
        Ok(bytes.chunks_exact(8).map(decode).collect())
    }
}
