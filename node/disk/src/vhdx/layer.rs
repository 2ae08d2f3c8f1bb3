//! One VHDX or AVHDX file, read-only.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::bat::{self, Bat, Geometry, Payload};
use super::header::{HEADER_LEN, HEADER_OFFSETS};
use super::image::Image;
use super::metadata::{self, MetadataTable};
use super::region::{self, TABLE_OFFSETS};
use super::{Header, MAX_FILE, MIB, Metadata, ParentLocator, Region, RegionTable, log};
use crate::block_file::{BlockFile, ByteSource};
use crate::disk::check_bounds;
use crate::error::FormatError;
use crate::layer::{LayerMap, MapBuilder, Presence, ReadLayer, Run, RunSink, joined};
use crate::places::Places;
use crate::{DiskError, DiskFormat, DiskInfo, bits, detect};

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

    /// Where the parent is; only differencing layers have one.
    pub fn parent(&self) -> Option<&ParentLocator> {
        self.metadata.parent.as_ref()
    }

    /// The header that counts.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The runs of a whole block of which the bits are given, from its chunk's bitmap.
    fn partial_runs(
        &self,
        (start, end): (u64, u64),
        (bytes, first): (&[u8], u64),
        at: u64,
        push: &mut RunSink<'_>,
    ) -> Result<(), DiskError> {
        let sector = self.geometry.sector;
        let block_start = start / self.geometry.block_size * self.geometry.block_size;
        let from = (start - block_start) / sector;
        let to = (end - block_start).div_ceil(sector);
        bits::runs(bytes, (from - first) as usize, (to - from) as usize, |bit, count, here| {
            let sectors = block_start + (first + bit as u64) * sector;
            let a = sectors.max(start);
            let b = (sectors + count as u64 * sector).min(end);
            let presence = match here {
                true => Presence::Here { file_offset: at + (a - block_start) },
                false => Presence::Parent,
            };
            push(Run { offset: a, len: b - a, presence })
        })
    }

    /// Calls `found` with every block's number and entry, without keeping the table.
    fn for_entries(
        &self,
        mut found: impl FnMut(u64, u64) -> Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        let blocks = self.info.size.div_ceil(self.geometry.block_size);
        let mut buf = vec![0; bat::SCAN as usize * 8];
        // The entries of a chunk are followed by that of its bitmap.
        let (mut block, mut until_bitmap, mut index) = (0, self.geometry.ratio, 0);
        while block < blocks {
            let read = self.bat.scan(&self.image, index, &mut buf)?;
            for bytes in read.chunks_exact(8) {
                index += 1;
                if until_bitmap == 0 {
                    until_bitmap = self.geometry.ratio;
                    continue;
                }
                until_bitmap -= 1;
                if block < blocks {
                    found(block, u64::from_le_bytes(bytes.try_into().expect("eight bytes")))?;
                }
                block += 1;
            }
        }
        Ok(())
    }

    /// The runs of `start..end`, which lie in one block.
    fn block_runs(
        &self,
        block: u64,
        start: u64,
        end: u64,
        push: &mut RunSink<'_>,
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
                let first = (start - block_start) / self.geometry.sector / 8;
                let last = (end - block_start).div_ceil(self.geometry.sector).div_ceil(8);
                let mut bytes = vec![0; (last - first) as usize];
                self.image.read("sector bitmap", self.bits_at(block)? + first, &mut bytes)?;
                self.partial_runs((start, end), (&bytes, first * 8), at, push)
            }
        }
    }

    /// What the BAT says about a block, checked against the file.
    pub(crate) fn payload(&self, block: u64) -> Result<Payload, DiskError> {
        self.payload_of(block, self.bat.get(&self.image, self.geometry.payload_index(block))?)
    }

    /// What an entry of the BAT says about a block, checked against the file.
    #[inline]
    fn payload_of(&self, block: u64, entry: u64) -> Result<Payload, DiskError> {
        let payload = Payload::decode(entry).map_err(|e| e.in_file(&self.image.path))?;
        if let Payload::Full(at) | Payload::Partial(at) = payload {
            let len = self.geometry.visible(block);
            let needed = at.saturating_add(len);
            if needed > self.image.len {
                return Err(self.image.truncated("payload block", needed));
            }
            self.refuse_tables(at, len)?;
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

impl ReadLayer for VhdxLayer {
    fn path(&self) -> &Path {
        &self.image.path
    }

    fn info(&self) -> &DiskInfo {
        &self.info
    }

    fn runs(&self, offset: u64, len: u64, found: &mut RunSink<'_>) -> Result<(), DiskError> {
        let asked = usize::try_from(len).unwrap_or(usize::MAX);
        check_bounds(&self.image.path, self.info.size, offset, asked)?;
        let end = offset + len;
        joined(found, |push| {
            let mut at = offset;
            while at < end {
                let block = at / self.geometry.block_size;
                let block_end = ((block + 1) * self.geometry.block_size).min(end);
                self.block_runs(block, at, block_end, push)?;
                at = block_end;
            }
            Ok(())
        })
    }

    fn read_stored(&self, file_offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.image.read("payload block", file_offset, buf)
    }

    fn map(&self) -> Result<LayerMap, DiskError> {
        let mut map = MapBuilder::new(self.info.size);
        // The bitmap block in hand, which all blocks of a chunk share.
        let mut bitmap = vec![0; MIB as usize];
        let mut in_hand = None;
        self.for_entries(|block, entry| {
            if entry & 7 == 0 {
                return Ok(());
            }
            let start = block * self.geometry.block_size;
            let len = self.geometry.visible(block);
            match self.payload_of(block, entry)? {
                Payload::NotPresent => {}
                Payload::Zero => map.zeroed(start, len),
                Payload::Full(_) => map.present(start, len),
                Payload::Partial(at) => {
                    let chunk = block / self.geometry.ratio;
                    if in_hand != Some(chunk) {
                        let from = self.bits_at(block)? - self.geometry.bitmap_offset(block);
                        self.image.read("sector bitmap", from, &mut bitmap)?;
                        in_hand = Some(chunk);
                    }
                    let from = self.geometry.bitmap_offset(block) as usize;
                    let bits = &bitmap[from..from + self.geometry.bitmap_len() as usize];
                    self.partial_runs((start, start + len), (bits, 0), at, &mut |run| {
                        map.run(run);
                        Ok(())
                    })?;
                }
            }
            Ok(())
        })?;
        Ok(map.finish())
    }

    fn check(&self) -> Result<(), DiskError> {
        let mut places = Places::new(MIB);
        let mut take = |at, len| match places.take(at, len) {
            true => Ok(()),
            false => Err(self.corrupt(&format!("puts two blocks into one place, at {at}"))),
        };
        let mut chunk = None;
        self.for_entries(|block, entry| {
            if let Payload::Full(at) | Payload::Partial(at) = self.payload_of(block, entry)? {
                take(at, self.geometry.visible(block))?;
            }
            let of_block = Some(block / self.geometry.ratio);
            if self.metadata.parent.is_some() && chunk != of_block {
                chunk = of_block;
                if let Some(at) = self.bitmap_block(block)? {
                    take(at, MIB)?;
                }
            }
            Ok(())
        })
    }

    fn is_dirty(&self) -> bool {
        !self.header.log_guid.is_nil()
    }

    fn parent_candidates(&self) -> Option<Vec<PathBuf>> {
        self.parent().map(|locator| locator.candidates(&self.image.path))
    }

    fn notes(&self) -> Vec<String> {
        let dirty = "the file was not closed cleanly; its log was replayed in memory";
        self.is_dirty().then(|| dirty.to_owned()).into_iter().collect()
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
