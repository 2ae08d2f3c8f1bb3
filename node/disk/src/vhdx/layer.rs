//! One VHDX or AVHDX file, read-only: what it stores itself and what it leaves to its parent.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::bat::{Bat, Geometry, Payload};
use super::header::{HEADER_LEN, HEADER_OFFSETS};
use super::image::Image;
use super::metadata::{self, MetadataTable};
use super::region::{self, TABLE_OFFSETS};
use super::{Header, MAX_FILE, MIB, Metadata, ParentLocator, Region, RegionTable, bitmap, log};
use crate::block_file::{BlockFile, ByteSource};
use crate::disk::check_bounds;
use crate::error::FormatError;
use crate::{ByteRange, DiskError, DiskFormat, DiskInfo, RangeSet, detect};

/// Where the bytes of a range are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// In this file, from this file offset on.
    Here {
        /// File offset of the range's first byte.
        file_offset: u64,
    },
    /// Zeros, whatever the parent has.
    Zero,
    /// The parent's bytes; zeros without a parent.
    Parent,
}

/// A guest-visible range whose bytes are all in one kind of place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First byte, as the guest counts.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
    /// Where they are.
    pub presence: Presence,
}

/// What one layer decides about the guest-visible disk; the rest is its parent's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayerMap {
    /// Stored in this file.
    pub present: RangeSet,
    /// Zeros that hide the parent.
    pub zeroed: RangeSet,
}

/// One file of a chain, opened read-only. A log that was not written back is replayed in memory.
pub struct VhdxLayer {
    pub(crate) image: Image,
    pub(crate) header: Header,
    /// Which of the two headers counts.
    pub(crate) header_slot: usize,
    pub(crate) regions: RegionTable,
    pub(crate) metadata: Metadata,
    pub(crate) geometry: Geometry,
    pub(crate) bat: Bat,
    pub(crate) info: DiskInfo,
}

impl std::fmt::Debug for VhdxLayer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VhdxLayer")
            .field("path", &self.image.path)
            .field("info", &self.info)
            .finish()
    }
}

impl VhdxLayer {
    /// Opens a file read-only.
    ///
    /// # Errors
    /// [`DiskError::NotAVirtualDisk`], [`DiskError::Truncated`], [`DiskError::Corrupt`],
    /// [`DiskError::Unsupported`] or [`DiskError::Io`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, DiskError> {
        let file = BlockFile::open(path.as_ref())?;
        Self::from_source(path.as_ref().to_owned(), Arc::new(file))
    }

    /// Reads a layer from any bytes; `path` names it in errors and finds its parent.
    ///
    /// # Errors
    /// As [`VhdxLayer::open`].
    pub fn from_source(path: PathBuf, source: Arc<dyn ByteSource>) -> Result<Self, DiskError> {
        let mut image = Image::new(path, source)?;
        detect::require_vhdx(&image.path, &*image.source, image.len)?;
        let (header, header_slot) = read_header(&image)?;
        if !header.log_guid.is_nil() {
            replay_log(&mut image, &header)?;
        }
        let regions = read_regions(&image, &header)?;
        let metadata = read_metadata(&image, &regions)?;
        let geometry = Geometry::of(&metadata);
        let bat =
            Bat::new(regions.bat, &geometry, image.len).map_err(|e| e.in_file(&image.path))?;
        let info = DiskInfo {
            size: metadata.size,
            logical_sector: metadata.logical_sector,
            physical_sector: metadata.physical_sector,
            block_size: metadata.block_size,
            kind: metadata.kind,
            format: DiskFormat::Vhdx,
            disk_id: metadata.disk_id,
            data_write_guid: header.data_write_guid,
        };
        Ok(Self { image, header, header_slot, regions, metadata, geometry, bat, info })
    }

    /// The path that the layer was opened by.
    pub fn path(&self) -> &Path {
        &self.image.path
    }

    /// The facts of this layer.
    pub fn info(&self) -> &DiskInfo {
        &self.info
    }

    /// Where the parent is; only differencing layers have one.
    pub fn parent(&self) -> Option<&ParentLocator> {
        self.metadata.parent.as_ref()
    }

    /// The header that counts.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Whether the file was not closed cleanly, so that its log had to be replayed.
    pub fn is_dirty(&self) -> bool {
        !self.header.log_guid.is_nil()
    }

    /// Looks at every block's and bitmap's place: within the file, and no two in one place. Opening a
    /// file checks only what it reads; a restore or an import checks everything.
    ///
    /// # Errors
    /// [`DiskError::Corrupt`] or [`DiskError::Truncated`] for the first bad place.
    pub fn check(&self) -> Result<(), DiskError> {
        let mut places = Vec::new();
        let mut chunk = None;
        for block in 0..self.info.size.div_ceil(self.geometry.block_size) {
            let payload = self.payload(block)?;
            if let Payload::Full(at) | Payload::Partial(at) = payload {
                places.push(ByteRange::new(at, self.geometry.visible(block)));
            }
            let is_new =
                chunk.replace(block / self.geometry.ratio) != Some(block / self.geometry.ratio);
            if is_new && self.metadata.parent.is_some() {
                let bitmap = self.bitmap_block(block)?;
                places.extend(bitmap.map(|at| ByteRange::new(at, MIB)));
            }
        }
        places.sort_unstable();
        match places.windows(2).find(|pair| pair[0].end() > pair[1].start) {
            Some(pair) => {
                Err(self.corrupt(&format!("puts two blocks into one place, at {}", pair[1].start)))
            }
            None => Ok(()),
        }
    }

    /// What this layer stores and hides.
    ///
    /// # Errors
    /// What reading the tables met.
    pub fn map(&self) -> Result<LayerMap, DiskError> {
        let mut map = LayerMap::default();
        self.runs(0, self.info.size, &mut |run| {
            match run.presence {
                Presence::Here { .. } => map.present.insert(run.offset, run.len),
                Presence::Zero => map.zeroed.insert(run.offset, run.len),
                Presence::Parent => {}
            }
            Ok(())
        })?;
        Ok(map)
    }

    /// Calls `found` for the runs of a range within the disk, in ascending order. Neighbours that are
    /// neighbours in the file, too, come as one run, so sequential reads stay large.
    ///
    /// # Errors
    /// [`DiskError::OutOfBounds`], what reading the tables met, or what `found` returned.
    pub fn runs(
        &self,
        offset: u64,
        len: u64,
        found: &mut dyn FnMut(Run) -> Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        let asked = usize::try_from(len).unwrap_or(usize::MAX);
        check_bounds(&self.image.path, self.info.size, offset, asked)?;
        let mut last: Option<Run> = None;
        let mut push = |run: Run| match &mut last {
            Some(previous) if continues(previous, &run) => {
                previous.len += run.len;
                Ok(())
            }
            _ => last.replace(run).map_or(Ok(()), &mut *found),
        };
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let block = at / self.geometry.block_size;
            let block_end = ((block + 1) * self.geometry.block_size).min(end);
            self.block_runs(block, at, block_end, &mut push)?;
            at = block_end;
        }
        last.map_or(Ok(()), found)
    }

    /// The runs of `start..end`, which lie in one block.
    fn block_runs(
        &self,
        block: u64,
        start: u64,
        end: u64,
        push: &mut dyn FnMut(Run) -> Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        let run = |presence| Run { offset: start, len: end - start, presence };
        let block_start = block * self.geometry.block_size;
        match self.payload(block)? {
            Payload::NotPresent => push(run(Presence::Parent)),
            Payload::Zero => push(run(Presence::Zero)),
            Payload::Full(at) => {
                push(run(Presence::Here { file_offset: at + (start - block_start) }))
            }
            Payload::Partial(at) => {
                let sector = self.geometry.sector;
                let first = (start - block_start) / sector;
                let last = (end - block_start).div_ceil(sector);
                let mut bits = vec![0; (last.div_ceil(8) - first / 8) as usize];
                self.image.read("sector bitmap", self.bits_at(block)? + first / 8, &mut bits)?;
                let skipped = first / 8 * 8;
                let (from, count) = ((first - skipped) as usize, (last - first) as usize);
                bitmap::runs(&bits, from, count, |bit, count, here| {
                    let sectors = block_start + (skipped + bit as u64) * sector;
                    let a = sectors.max(start);
                    let b = (sectors + count as u64 * sector).min(end);
                    let presence = match here {
                        true => Presence::Here { file_offset: at + (a - block_start) },
                        false => Presence::Parent,
                    };
                    push(Run { offset: a, len: b - a, presence })
                })
            }
        }
    }

    /// Fills `buf` with bytes that a run said to be [`Presence::Here`].
    pub(crate) fn read_stored(&self, file_offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.image.read("payload block", file_offset, buf)
    }

    /// What the BAT says about a block, checked against the file.
    pub(crate) fn payload(&self, block: u64) -> Result<Payload, DiskError> {
        let entry = self.bat.get(&self.image, self.geometry.payload_index(block))?;
        let payload = Payload::decode(entry).map_err(|e| e.in_file(&self.image.path))?;
        if let Payload::Full(at) | Payload::Partial(at) = payload {
            let needed = at.saturating_add(self.geometry.visible(block));
            if needed > self.image.len {
                return Err(self.image.truncated("payload block", needed));
            }
            self.refuse_tables(at, self.geometry.visible(block))?;
            if matches!(payload, Payload::Partial(_)) && self.metadata.parent.is_none() {
                return Err(
                    self.corrupt("has a partially present block but the disk has no parent")
                );
            }
        }
        Ok(payload)
    }

    /// File offset of a block's bits.
    pub(crate) fn bits_at(&self, block: u64) -> Result<u64, DiskError> {
        match self.bitmap_block(block)? {
            Some(at) => Ok(at + self.geometry.bitmap_offset(block)),
            None => Err(self.corrupt("has a partially present block without a sector bitmap")),
        }
    }

    /// File offset of the bitmap block that covers a payload block, if there is one.
    pub(crate) fn bitmap_block(&self, block: u64) -> Result<Option<u64>, DiskError> {
        let entry = self.bat.get(&self.image, self.geometry.bitmap_index(block))?;
        let at = (entry >> 20) << 20;
        match entry & 7 {
            0 => Ok(None),
            6 if at < MIB => Err(self.corrupt("puts a sector bitmap into the header area")),
            6 if at.saturating_add(MIB) > self.image.len => {
                Err(self.image.truncated("sector bitmap", at.saturating_add(MIB)))
            }
            6 => self.refuse_tables(at, MIB).map(|()| Some(at)),
            state => Err(self.corrupt(&format!("has a sector bitmap with state {state}"))),
        }
    }

    /// Refuses a block that lies over the log or a table.
    fn refuse_tables(&self, at: u64, len: u64) -> Result<(), DiskError> {
        let Header { log_offset: offset, log_length: length, .. } = self.header;
        let tables = [self.regions.bat, self.regions.metadata, Region { offset, length }];
        match tables.iter().any(|table| table.overlaps(at, len)) {
            true => Err(self.corrupt(&format!("puts a block at {at}, over the log or a table"))),
            false => Ok(()),
        }
    }

    fn corrupt(&self, detail: &str) -> DiskError {
        FormatError::corrupt("block allocation table", detail).in_file(&self.image.path)
    }
}

fn continues(previous: &Run, next: &Run) -> bool {
    match (previous.presence, next.presence) {
        (Presence::Here { file_offset: a }, Presence::Here { file_offset: b }) => {
            a + previous.len == b
        }
        (a, b) => a == b,
    }
}

fn read_header(image: &Image) -> Result<(Header, usize), DiskError> {
    let mut copies = [vec![0; HEADER_LEN], vec![0; HEADER_LEN]];
    for (copy, at) in copies.iter_mut().zip(HEADER_OFFSETS) {
        image.read("header", at, copy)?;
    }
    Header::choose(&copies[0], &copies[1]).map_err(|e| e.in_file(&image.path))
}

fn read_regions(image: &Image, header: &Header) -> Result<RegionTable, DiskError> {
    let mut copies = [vec![0; region::TABLE_LEN], vec![0; region::TABLE_LEN]];
    for (copy, at) in copies.iter_mut().zip(TABLE_OFFSETS) {
        image.read("region table", at, copy)?;
    }
    let regions = RegionTable::choose(&copies[0], &copies[1])
        .and_then(|r| r.check_log(header.log_offset, header.log_length).map(|()| r));
    regions.map_err(|e| e.in_file(&image.path))
}

fn read_metadata(image: &Image, regions: &RegionTable) -> Result<Metadata, DiskError> {
    let table = read_metadata_table(image, regions)?;
    Metadata::read(&table, image, regions.metadata)
}

pub(crate) fn read_metadata_table(
    image: &Image,
    regions: &RegionTable,
) -> Result<MetadataTable, DiskError> {
    let mut table = vec![0; metadata::TABLE_LEN];
    image.read("metadata", regions.metadata.offset, &mut table)?;
    MetadataTable::parse(&table, regions.metadata.length).map_err(|e| e.in_file(&image.path))
}

/// Puts the log's updates over the image.
fn replay_log(image: &mut Image, header: &Header) -> Result<(), DiskError> {
    let fail = |error: FormatError| error.in_file(&image.path);
    if header.log_length == 0 {
        return Err(fail(FormatError::corrupt("log", "is marked as in use but has no bytes")));
    }
    if header.log_length > log::MAX_LOG {
        let detail = format!(
            "has {} bytes; up to {} are read (Hyper-V makes 1 MiB)",
            header.log_length,
            log::MAX_LOG
        );
        return Err(fail(FormatError::unsupported("log", detail)));
    }
    let needed = header.log_offset.saturating_add(u64::from(header.log_length));
    if needed > image.len {
        return Err(image.truncated("log", needed));
    }
    let mut bytes = vec![0; header.log_length as usize];
    image.read("log", header.log_offset, &mut bytes)?;
    let replay = log::replay(&bytes, header.log_guid).map_err(fail)?;
    if replay.flushed_len > image.physical_len {
        return Err(image.truncated("log", replay.flushed_len));
    }
    if replay.last_len > MAX_FILE {
        let detail = format!("makes the file {} bytes long, which no file can be", replay.last_len);
        return Err(fail(FormatError::corrupt("log", detail)));
    }
    let len = replay.last_len.checked_next_multiple_of(MIB).unwrap_or(u64::MAX).max(image.len);
    if let Some((_, end, _)) = replay.updates.iter().last()
        && end > len
    {
        let detail = format!("updates bytes up to {end} in a file that it makes {len} bytes long");
        return Err(fail(FormatError::corrupt("log", detail)));
    }
    image.len = len;
    image.overlay = replay.updates;
    Ok(())
}

/// Fills `buf` with the guest's bytes from `offset` on, from `top` where it has them and from its
/// parents, nearest first, where it has not. The range was checked against the size, which is the same
/// in all layers.
pub(crate) fn read_through(
    top: &VhdxLayer,
    parents: &[VhdxLayer],
    offset: u64,
    buf: &mut [u8],
) -> Result<(), DiskError> {
    top.runs(offset, buf.len() as u64, &mut |run| {
        let from = (run.offset - offset) as usize;
        let part = &mut buf[from..from + run.len as usize];
        match (run.presence, parents.split_first()) {
            (Presence::Here { file_offset }, _) => top.read_stored(file_offset, part),
            (Presence::Parent, Some((parent, rest))) => {
                read_through(parent, rest, run.offset, part)
            }
            (Presence::Zero, _) | (Presence::Parent, None) => {
                part.fill(0);
                Ok(())
            }
        }
    })
}

/// What of a chain may be anything but zeros: each layer's own bytes, and of its parents' what it
/// neither stores nor hides.
pub(crate) fn visible(top: &VhdxLayer, parents: &[VhdxLayer]) -> Result<RangeSet, DiskError> {
    let LayerMap { mut present, zeroed } = top.map()?;
    let mut decided = present.union(&zeroed);
    for parent in parents {
        let map = parent.map()?;
        present = present.union(&map.present.subtract(&decided));
        decided = decided.union(&map.present).union(&map.zeroed);
    }
    Ok(present)
}
