//! A VHDX opened for writing.
//!
//! Payload bytes go to their place at once. What the tables need (BAT entries, sector bitmaps) is
//! collected in memory and goes through the file's log at [`VhdxWriter::flush`], at
//! [`VhdxWriter::close`], or when it fills one log entry: so after a crash the disk has everything up
//! to the last flush, like a physical disk with a write cache, and is consistent.

use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::bat::Payload;
use super::log::{LogCursor, MAX_UPDATES};
use super::overlay::Sector;
use super::{LOG_SECTOR, MIB, VhdxLayer};
use crate::block_file::BlockFile;
use crate::chain::open_parents;
use crate::disk::check_bounds;
use crate::layer::{Layer, ReadLayer, read_through, visible};
use crate::{DiskError, DiskInfo, DiskKind, RangeSet, ReadDisk, bits};

/// Sectors of tables that one write to one block can touch: the bits of a block of 256 MiB (16, and
/// one if they were not aligned) and two BAT entries.
const UPDATES_PER_BLOCK: usize = 19;

/// A VHDX or AVHDX open for writing by one owner. Dropping it without [`VhdxWriter::close`] is a crash:
/// what was not flushed may be lost, and the file stays marked as in use until its log is replayed.
#[derive(Debug)]
#[must_use = "a writer that is not closed leaves the file marked as in use"]
pub struct VhdxWriter {
    pub(crate) file: Arc<BlockFile>,
    /// The file as this writer sees it; its overlay holds the updates not yet committed.
    pub(crate) layer: VhdxLayer,
    parents: Vec<Layer>,
    /// Where the next log entry goes; set by the first modification.
    pub(crate) log: Option<LogCursor>,
    /// The DataWriteGuid that the first write of guest data sets; nil once it did.
    pub(crate) next_data_guid: Uuid,
    /// A write or flush failed: what is on the medium is not known.
    pub(crate) failed: bool,
}

impl VhdxWriter {
    /// Opens an existing disk with its parents. A log left by a crash is first replayed in place.
    ///
    /// # Errors
    /// As [`VhdxLayer::open`] and [`DiskChain::open`](crate::DiskChain::open).
    pub fn open(path: impl AsRef<Path>) -> Result<Self, DiskError> {
        let mut writer = Self::open_alone(path.as_ref())?;
        writer.parents = open_parents(&writer.layer)?;
        Ok(writer)
    }

    /// Opens a file without its parents: enough to change what the file says about them.
    pub(crate) fn open_alone(path: &Path) -> Result<Self, DiskError> {
        let file = Arc::new(BlockFile::open_writable(path)?);
        let layer = VhdxLayer::from_source(path.to_owned(), Arc::clone(&file) as _)?;
        let mut writer = Self {
            file,
            layer,
            parents: Vec::new(),
            log: None,
            next_data_guid: Uuid::new_v4(),
            failed: false,
        };
        writer.recover()?;
        Ok(writer)
    }

    /// Writes guest data. Any offset and length within the disk; parts of sectors are read first.
    ///
    /// # Errors
    /// [`DiskError::OutOfBounds`]; [`DiskError::Io`], after which the writer must be opened again.
    pub fn write_at(&mut self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        check_bounds(self.layer.path(), self.layer.info.size, offset, data.len())?;
        if data.is_empty() {
            return Ok(());
        }
        self.begin(true)?;
        self.fail_on_error(|writer| writer.write_sectors(offset, data))
    }

    /// Makes a range zeros. Whole blocks give up their place in the file; on a fixed disk, and for
    /// parts of blocks, zeros are written where there may be anything else. A place that was given up is not
    /// used again; converting the disk makes the file smaller.
    ///
    /// # Errors
    /// As [`VhdxWriter::write_at`].
    pub fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<(), DiskError> {
        let size = self.layer.info.size;
        check_bounds(self.layer.path(), size, offset, usize::try_from(len).unwrap_or(usize::MAX))?;
        if len == 0 {
            return Ok(());
        }
        self.begin(true)?;
        self.fail_on_error(|writer| writer.zero_blocks(offset, offset + len))
    }

    /// Waits until everything written so far would survive a crash.
    ///
    /// # Errors
    /// [`DiskError::Io`], after which the writer must be opened again.
    pub fn flush(&mut self) -> Result<(), DiskError> {
        self.fail_on_error(|writer| writer.commit(None))
    }

    /// Flushes and marks the file as closed cleanly.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn close(mut self) -> Result<(), DiskError> {
        self.fail_on_error(|writer| {
            writer.commit(None)?;
            writer.end()
        })
    }

    /// Decides the DataWriteGuid that the first write of guest data will set.
    pub(crate) fn set_next_data_guid(&mut self, guid: Uuid) {
        self.next_data_guid = guid;
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        self.layer.path()
    }

    fn write_sectors(&mut self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        let sector = self.layer.geometry.sector;
        let end = offset + data.len() as u64;
        let (first_whole, last_whole) = (offset.next_multiple_of(sector), end / sector * sector);
        if first_whole > last_whole {
            return self.write_part_of_sector(offset, data);
        }
        let (head, rest) = data.split_at((first_whole - offset) as usize);
        let (whole, tail) = rest.split_at((last_whole - first_whole) as usize);
        self.write_part_of_sector(offset, head)?;
        self.write_part_of_sector(last_whole, tail)?;
        let (mut at, mut whole) = (first_whole, whole);
        while !whole.is_empty() {
            let block = at / self.layer.geometry.block_size;
            let room = (block + 1) * self.layer.geometry.block_size - at;
            let (part, rest) = whole.split_at(room.min(whole.len() as u64) as usize);
            self.write_in_block(block, at, part)?;
            at += part.len() as u64;
            whole = rest;
        }
        Ok(())
    }

    fn write_part_of_sector(&mut self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        if data.is_empty() {
            return Ok(());
        }
        let sector = self.layer.geometry.sector;
        let start = offset / sector * sector;
        let mut bytes = vec![0; sector as usize];
        read_through(&self.layer, &self.parents, start, &mut bytes)?;
        let at = (offset - start) as usize;
        bytes[at..at + data.len()].copy_from_slice(data);
        self.write_in_block(start / self.layer.geometry.block_size, start, &bytes)
    }

    /// Writes whole sectors that lie in one block.
    fn write_in_block(&mut self, block: u64, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.make_room(UPDATES_PER_BLOCK)?;
        let geometry = self.layer.geometry;
        let in_block = offset - block * geometry.block_size;
        let whole = data.len() as u64 == geometry.visible(block);
        let payload = self.layer.payload(block)?;
        match payload {
            Payload::Full(at) => self.file.write_all_at(at + in_block, data),
            Payload::Partial(at) => {
                self.file.write_all_at(at + in_block, data)?;
                if whole {
                    return self.set_payload(block, Payload::Full(at));
                }
                let bits_at = self.layer.bits_at(block)?;
                self.set_bits(bits_at, in_block, data.len() as u64)
            }
            Payload::NotPresent | Payload::Zero => {
                let at = self.allocate(geometry.block_size)?;
                self.file.write_all_at(at + in_block, data)?;
                let rest_is_parents = payload == Payload::NotPresent
                    && self.layer.metadata.kind == DiskKind::Differencing;
                if whole || !rest_is_parents {
                    return self.set_payload(block, Payload::Full(at));
                }
                let bits_at = self.bitmap_for(block)? + geometry.bitmap_offset(block);
                self.update(bits_at, &vec![0; geometry.bitmap_len() as usize])?;
                self.set_bits(bits_at, in_block, data.len() as u64)?;
                self.set_payload(block, Payload::Partial(at))
            }
        }
    }

    fn zero_blocks(&mut self, start: u64, end: u64) -> Result<(), DiskError> {
        let geometry = self.layer.geometry;
        let kind = self.layer.metadata.kind;
        let mut at = start;
        while at < end {
            let block = at / geometry.block_size;
            let stop = ((block + 1) * geometry.block_size).min(end);
            let payload = self.layer.payload(block)?;
            let is_zero = payload == Payload::Zero
                || (payload == Payload::NotPresent && kind != DiskKind::Differencing);
            let whole = stop - at == geometry.visible(block);
            if !is_zero && whole && kind != DiskKind::Fixed {
                self.make_room(UPDATES_PER_BLOCK)?;
                self.set_payload(block, Payload::Zero)?;
            } else if !is_zero {
                self.write_zero_bytes(at, stop)?;
            }
            at = stop;
        }
        Ok(())
    }

    fn write_zero_bytes(&mut self, start: u64, end: u64) -> Result<(), DiskError> {
        let zeros = vec![0; (end - start).min(MIB) as usize];
        let mut at = start;
        while at < end {
            let len = (end - at).min(MIB) as usize;
            self.write_sectors(at, &zeros[..len])?;
            at += len as u64;
        }
        Ok(())
    }

    /// Takes new bytes at the file's end; they are zeros and, where possible, a hole.
    fn allocate(&mut self, len: u64) -> Result<u64, DiskError> {
        let image = &mut self.layer.image;
        let at = image.len.next_multiple_of(MIB);
        self.file.set_len(at + len)?;
        image.len = at + len;
        image.physical_len = image.len;
        Ok(at)
    }

    fn set_payload(&mut self, block: u64, payload: Payload) -> Result<(), DiskError> {
        self.set_entry(self.layer.geometry.payload_index(block), payload.encode())
    }

    fn set_entry(&mut self, index: u64, entry: u64) -> Result<(), DiskError> {
        self.update(self.layer.bat.entry_offset(index), &entry.to_le_bytes())?;
        self.layer.bat.set(index, entry);
        Ok(())
    }

    /// The bitmap block that covers a payload block, made if there is none.
    fn bitmap_for(&mut self, block: u64) -> Result<u64, DiskError> {
        if let Some(at) = self.layer.bitmap_block(block)? {
            return Ok(at);
        }
        let at = self.allocate(MIB)?;
        self.set_entry(self.layer.geometry.bitmap_index(block), Payload::Full(at).encode())?;
        Ok(at)
    }

    /// Marks sectors of a block as present, given where its bits are. Bits that are set cost nothing.
    fn set_bits(&mut self, bits_at: u64, in_block: u64, len: u64) -> Result<(), DiskError> {
        let sector = self.layer.geometry.sector;
        let (first, count) = (in_block / sector, (len / sector) as usize);
        let from = first / 8;
        let mut bitmap = vec![0; ((first + count as u64).div_ceil(8) - from) as usize];
        self.layer.image.read("sector bitmap", bits_at + from, &mut bitmap)?;
        let before = bitmap.clone();
        bits::set(&mut bitmap, (first - from * 8) as usize, count);
        if bitmap == before { Ok(()) } else { self.update(bits_at + from, &bitmap) }
    }

    /// Changes bytes of a table; they reach the file through the log.
    pub(crate) fn update(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let unit = LOG_SECTOR as u64;
        let (mut at, mut rest) = (offset, bytes);
        while !rest.is_empty() {
            let start = at / unit * unit;
            let mut sector: Sector = Box::new([0; LOG_SECTOR]);
            self.layer.image.read("table", start, &mut sector[..])?;
            let from = (at - start) as usize;
            let (part, next) = rest.split_at(rest.len().min(LOG_SECTOR - from));
            sector[from..from + part.len()].copy_from_slice(part);
            self.layer.image.overlay.put_sector(start, sector);
            at += part.len() as u64;
            rest = next;
        }
        Ok(())
    }

    /// Commits now if `updates` more would not fit into one log entry, which keeps each change whole.
    fn make_room(&mut self, updates: usize) -> Result<(), DiskError> {
        if self.layer.image.overlay.len() + updates > MAX_UPDATES {
            self.commit(None)?;
        }
        Ok(())
    }

    /// Runs an operation; one that fails half-way ends the writer.
    pub(crate) fn fail_on_error<T>(
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

impl ReadDisk for VhdxWriter {
    fn info(&self) -> &DiskInfo {
        &self.layer.info
    }

    /// What was written is read back at once, flushed or not.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        check_bounds(self.layer.path(), self.layer.info.size, offset, buf.len())?;
        read_through(&self.layer, &self.parents, offset, buf)
    }

    fn allocated(&self) -> Result<RangeSet, DiskError> {
        visible(&self.layer, &self.parents)
    }
}
