//! A VHD opened for writing.
//!
//! A VHD has no log. What makes a crash harmless is the order: data goes to its place at once, the table
//! and the sector bitmaps follow at [`VhdWriter::flush`], after the data is on the medium. One sector of
//! them is written at a time, and each alone is right: a bit says that a sector is there, an entry that
//! a block is. While a file grows, the footer at its end may be missing; its copy at the start is not.

use std::path::Path;
use std::sync::Arc;

use super::image::Sector;
use super::layer::{BITMAP, Blocks};
use super::{SECTOR, VhdLayer, footer, header, table};
use crate::block_file::BlockFile;
use crate::chain::open_parents;
use crate::disk::check_bounds;
use crate::error::FormatError;
use crate::layer::{Layer, ReadLayer, read_through, visible};
use crate::{DiskError, DiskInfo, DiskKind, RangeSet, ReadDisk, bits};

/// Table sectors that wait for a flush at most: 512 KiB.
const MAX_PENDING: usize = 1024;

/// Blocks begin where their data is aligned to this, as Windows 8 and later do.
const ALIGNMENT: u64 = 4096;

/// Zeros written at a time.
const STEP: u64 = 1 << 20;

/// A VHD or AVHD open for writing by one owner. Dropping it without [`VhdWriter::close`] is a crash: what
/// was not flushed may be lost.
#[derive(Debug)]
#[must_use = "a writer that is not closed loses what was not flushed"]
pub struct VhdWriter {
    pub(crate) file: Arc<BlockFile>,
    /// The file as this writer sees it; its image holds the sectors not yet written.
    pub(crate) layer: VhdLayer,
    parents: Vec<Layer>,
    /// Where the footer is and the next block may be.
    end: u64,
    /// A write or flush failed: what is on the medium is not known.
    failed: bool,
}

impl VhdWriter {
    /// Opens an existing disk with its parents. A footer that a crash has left out is written again.
    ///
    /// # Errors
    /// As [`VhdLayer::open`] and [`DiskChain::open`](crate::DiskChain::open).
    pub fn open(path: impl AsRef<Path>) -> Result<Self, DiskError> {
        let mut writer = Self::open_alone(path.as_ref())?;
        writer.parents = open_parents(&writer.layer)?;
        Ok(writer)
    }

    /// Opens a file without its parents: enough to change what the file says about them.
    pub(crate) fn open_alone(path: &Path) -> Result<Self, DiskError> {
        let file = Arc::new(BlockFile::open_writable(path)?);
        let layer = VhdLayer::from_source(path.to_owned(), Arc::clone(&file) as _)?;
        let end = layer.footer_at.unwrap_or(layer.image.len);
        let mut writer = Self { file, layer, parents: Vec::new(), end, failed: false };
        writer.recover()?;
        Ok(writer)
    }

    /// Writes guest data. Any offset and length within the disk; parts of sectors are read first.
    ///
    /// # Errors
    /// [`DiskError::OutOfBounds`]; [`DiskError::Io`], after which the writer must be opened again.
    pub fn write_at(&mut self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        check_bounds(self.layer.path(), self.layer.info().size, offset, data.len())?;
        self.fail_on_error(|writer| writer.write(offset, data))
    }

    /// Makes a range zeros. A VHD cannot give a block up, so zeros are written where there may be
    /// anything else.
    ///
    /// # Errors
    /// As [`VhdWriter::write_at`].
    pub fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<(), DiskError> {
        let size = self.layer.info().size;
        check_bounds(self.layer.path(), size, offset, usize::try_from(len).unwrap_or(usize::MAX))?;
        self.fail_on_error(|writer| {
            let zeros = vec![0; len.min(STEP) as usize];
            let mut at = offset;
            while at < offset + len {
                let stop = (at / STEP + 1) * STEP;
                let part = (stop.min(offset + len) - at).min(STEP);
                if !writer.is_zero(at, part)? {
                    writer.write(at, &zeros[..part as usize])?;
                }
                at += part;
            }
            Ok(())
        })
    }

    /// Waits until everything written so far would survive a crash.
    ///
    /// # Errors
    /// [`DiskError::Io`], after which the writer must be opened again.
    pub fn flush(&mut self) -> Result<(), DiskError> {
        self.fail_on_error(Self::commit)
    }

    /// Flushes and closes the file.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn close(mut self) -> Result<(), DiskError> {
        self.flush()
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        self.layer.path()
    }

    /// Writes the footer where it belongs if it is not there.
    fn recover(&mut self) -> Result<(), DiskError> {
        let Some(blocks) = &self.layer.blocks else { return Ok(()) };
        let whole = self.end.is_multiple_of(SECTOR) && self.end + SECTOR <= self.layer.image.len;
        if self.layer.footer_at.is_some() && whole {
            return Ok(());
        }
        tracing::info!(path = %self.layer.path().display(), "writing the footer of a disk that was not closed");
        let header = &blocks.header;
        let header_at = self.layer.footer.header_offset.unwrap_or_default();
        let mut end = (header.table_offset + u64::from(header.entries) * 4)
            .max(header_at + header::LEN as u64);
        for locator in &header.locators {
            end = end.max(locator.offset.saturating_add(locator.length.into()));
        }
        self.layer.for_blocks(blocks, |_, at| {
            end = end.max(at + blocks.bitmap_len + blocks.size);
            Ok(())
        })?;
        // Whatever the header says, the file does not shrink.
        end = end.max(self.layer.image.len.saturating_sub(SECTOR)).next_multiple_of(SECTOR);
        self.put_footer(end)?;
        let encoded = self.layer.footer.encode();
        self.file.sync()?;
        self.file.write_all_at(0, &encoded)?;
        self.file.sync()
    }

    fn put_footer(&mut self, at: u64) -> Result<(), DiskError> {
        self.file.write_all_at(at, &self.layer.footer.encode())?;
        let len = at + footer::LEN as u64;
        if len < self.layer.image.len {
            self.file.set_len(len)?;
        }
        self.layer.image.len = len;
        self.layer.footer_at = Some(at);
        self.end = at;
        Ok(())
    }

    fn is_zero(&self, offset: u64, len: u64) -> Result<bool, DiskError> {
        let mut zero = self.layer.footer.kind != DiskKind::Fixed;
        self.layer.runs(offset, len, &mut |run| {
            zero &= run.presence == crate::layer::Presence::Zero;
            Ok(())
        })?;
        Ok(zero)
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        if self.layer.blocks.is_none() {
            return self.file.write_all_at(offset, data);
        }
        let end = offset + data.len() as u64;
        let (first, last) = (offset.next_multiple_of(SECTOR), end / SECTOR * SECTOR);
        if first > last {
            return self.write_part_of_sector(offset, data);
        }
        let (head, rest) = data.split_at((first - offset) as usize);
        let (mut whole, tail) = rest.split_at((last - first) as usize);
        self.write_part_of_sector(offset, head)?;
        self.write_part_of_sector(last, tail)?;
        let mut at = first;
        while !whole.is_empty() {
            let size = self.blocks().size;
            let (block, room) = (at / size, size - at % size);
            let (part, rest) = whole.split_at(room.min(whole.len() as u64) as usize);
            self.write_in_block(block, at - block * size, part)?;
            at += part.len() as u64;
            whole = rest;
        }
        Ok(())
    }

    fn write_part_of_sector(&mut self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        if data.is_empty() {
            return Ok(());
        }
        let start = offset / SECTOR * SECTOR;
        let mut bytes = [0; SECTOR as usize];
        read_through(&self.layer, &self.parents, start, &mut bytes)?;
        let at = (offset - start) as usize;
        bytes[at..at + data.len()].copy_from_slice(data);
        let size = self.blocks().size;
        self.write_in_block(start / size, start % size, &bytes)
    }

    /// Writes whole sectors that lie in one block.
    fn write_in_block(&mut self, block: u64, in_block: u64, data: &[u8]) -> Result<(), DiskError> {
        let bitmap_len = self.blocks().bitmap_len;
        let at = match self.layer.block_at(self.blocks(), block)? {
            Some(at) => at,
            None => self.allocate(block)?,
        };
        self.file.write_all_at(at + bitmap_len + in_block, data)?;
        let (first, count) = (in_block / SECTOR, data.len() as u64 / SECTOR);
        let from = first / 8;
        let mut bitmap = vec![0; ((first + count).div_ceil(8) - from) as usize];
        self.layer.image.read(BITMAP, at + from, &mut bitmap)?;
        let before = bitmap.clone();
        bits::set_msb(&mut bitmap, (first - from * 8) as usize, count as usize);
        if bitmap != before {
            self.update(at + from, &bitmap)?;
        }
        if self.layer.image.pending.len() > MAX_PENDING {
            self.commit()?;
        }
        Ok(())
    }

    /// Takes bytes at the file's end for a block, and moves the footer behind them.
    fn allocate(&mut self, block: u64) -> Result<u64, DiskError> {
        let blocks = self.blocks();
        let (bitmap_len, size, entry_at) =
            (blocks.bitmap_len, blocks.size, blocks.table.entry_offset(block));
        let old_footer = self.end;
        let at = (old_footer + bitmap_len).next_multiple_of(ALIGNMENT) - bitmap_len;
        let Some(entry) = u32::try_from(at / SECTOR).ok().filter(|e| *e != table::ABSENT) else {
            let detail = "has no numbers for blocks beyond 2 TiB of the file";
            return Err(FormatError::unsupported(table::NAME, detail).in_file(self.layer.path()));
        };
        self.put_footer(at + bitmap_len + size)?;
        // A block is zeros, also where the footer was.
        self.file.write_all_at(old_footer, &[0; footer::LEN])?;
        if self.layer.footer.kind != DiskKind::Differencing {
            // Without a parent all is there: zeros.
            self.update(at, &vec![0xff; (size / SECTOR).div_ceil(8) as usize])?;
        }
        self.update(entry_at, &entry.to_be_bytes())?;
        if let Some(blocks) = &mut self.layer.blocks {
            blocks.table.set(block, entry);
        }
        Ok(at)
    }

    /// Changes bytes of a table; they reach the file at the next commit.
    fn update(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let (mut at, mut rest) = (offset, bytes);
        while !rest.is_empty() {
            let start = at / SECTOR * SECTOR;
            let mut sector: Sector = [0; SECTOR as usize];
            self.layer.image.read(table::NAME, start, &mut sector)?;
            let from = (at - start) as usize;
            let (part, next) = rest.split_at(rest.len().min(sector.len() - from));
            sector[from..from + part.len()].copy_from_slice(part);
            self.layer.image.pending.insert(start, sector);
            at += part.len() as u64;
            rest = next;
        }
        Ok(())
    }

    fn commit(&mut self) -> Result<(), DiskError> {
        // Data and footer first: no table may ever name bytes that are not there.
        self.file.sync()?;
        if self.layer.image.pending.is_empty() {
            return Ok(());
        }
        for (at, sector) in &self.layer.image.pending {
            self.file.write_all_at(*at, sector)?;
        }
        self.file.sync()?;
        self.layer.image.pending.clear();
        Ok(())
    }

    fn blocks(&self) -> &Blocks {
        self.layer.blocks.as_ref().expect("only disks with blocks come here")
    }

    /// Runs an operation; one that fails half-way ends the writer.
    fn fail_on_error<T>(
        &mut self,
        operation: impl FnOnce(&mut Self) -> Result<T, DiskError>,
    ) -> Result<T, DiskError> {
        if self.failed {
            return Err(DiskError::WriterFailed { path: self.layer.path().to_owned() });
        }
        let result = operation(self);
        self.failed = result.is_err();
        result
    }
}

impl ReadDisk for VhdWriter {
    fn info(&self) -> &DiskInfo {
        self.layer.info()
    }

    /// What was written is read back at once, flushed or not.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        check_bounds(self.layer.path(), self.layer.info().size, offset, buf.len())?;
        read_through(&self.layer, &self.parents, offset, buf)
    }

    fn allocated(&self) -> Result<RangeSet, DiskError> {
        visible(&self.layer, &self.parents)
    }
}
