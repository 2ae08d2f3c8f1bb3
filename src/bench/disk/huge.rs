//! A VHDX of 64 TiB whose blocks are stored: more than most file systems take as one file, so its table is computed as
//! it is read. Everything else is a real file made by our own writer.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use outrider_disk::block_file::{BlockFile, ByteSource};
use outrider_disk::vhdx::{CreateOptions, Region, RegionTable, VhdxWriter};

use crate::output::bytes;
use crate::report::Failure;

const SIZE: u64 = 64 << 40;
const REGION_TABLE: (u64, usize) = (192 << 10, 64 << 10);

/// Which blocks are stored.
#[derive(Debug, Clone, Copy)]
pub(super) struct Huge {
    block_size: u32,
    /// Every so many blocks one is stored.
    every: u64,
}

impl Huge {
    pub(super) fn full(block_size: u32) -> Self {
        Self { block_size, every: 1 }
    }

    pub(super) fn every_second(block_size: u32) -> Self {
        Self { block_size, every: 2 }
    }

    /// The file, of which a part lies in `dir`.
    pub(super) fn source(&self, dir: &Path) -> Result<Arc<dyn ByteSource>, Failure> {
        let path = dir.join("huge.vhdx");
        if path.exists() {
            std::fs::remove_file(&path)?;
        }
        let options = CreateOptions { block_size: self.block_size, ..CreateOptions::dynamic(SIZE) };
        VhdxWriter::create(&path, &options)?.close()?;
        let file = BlockFile::open(&path)?;
        let (at, len) = REGION_TABLE;
        let mut table = vec![0; len];
        file.read_exact_at(at, &mut table)?;
        let table = RegionTable::parse(&table)?.bat;
        let block_size = u64::from(self.block_size);
        Ok(Arc::new(Source {
            first: file.size()?.next_multiple_of(1 << 20),
            file,
            table,
            block_size,
            every: self.every,
            ratio: (512 << 23) / block_size,
        }))
    }
}

impl fmt::Display for Huge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let which = if self.every == 1 { "all" } else { "every second" };
        write!(f, "{which} of its blocks of {} stored", bytes(self.block_size.into()))
    }
}

struct Source {
    file: BlockFile,
    table: Region,
    /// File offset of the first block; the others follow.
    first: u64,
    block_size: u64,
    every: u64,
    /// Blocks between two entries that are no block's.
    ratio: u64,
}

impl Source {
    fn entry(&self, index: u64) -> u64 {
        let (chunk, place) = (index / (self.ratio + 1), index % (self.ratio + 1));
        let block = chunk * self.ratio + place;
        let stored = place < self.ratio
            && block < SIZE / self.block_size
            && block.is_multiple_of(self.every);
        if stored { (self.first + block / self.every * self.block_size) | 6 } else { 0 }
    }
}

impl ByteSource for Source {
    fn size(&self) -> io::Result<u64> {
        Ok(self.first + SIZE / self.every)
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = self.table.offset + u64::from(self.table.length);
        if offset < self.table.offset || offset >= end {
            return self.file.read_exact_at(offset, buf);
        }
        let first = (offset - self.table.offset) / 8;
        for (index, entry) in (first..).zip(buf.chunks_exact_mut(8)) {
            entry.copy_from_slice(&self.entry(index).to_le_bytes());
        }
        Ok(())
    }
}
