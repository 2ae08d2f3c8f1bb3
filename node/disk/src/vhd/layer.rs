//! One VHD or AVHD file, read-only: what it stores itself and what it leaves to its parent.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use uuid::Uuid;

use super::footer::{self, Placed};
use super::header;
use super::image::Image;
use super::table::{self, ABSENT, Table};
use super::{DEFAULT_BLOCK, DynamicHeader, Footer, ParentPaths, SECTOR, timestamp};
use crate::block_file::{BlockFile, ByteSource};
use crate::disk::check_bounds;
use crate::error::FormatError;
use crate::layer::{LayerMap, MapBuilder, Presence, ReadLayer, Run, RunSink, joined};
use crate::places::Places;
use crate::{DiskError, DiskFormat, DiskInfo, DiskKind, RangeSet, bits, detect};

const HEADER: &str = "dynamic header";
pub(crate) const BLOCK: &str = "block";
pub(crate) const BITMAP: &str = "sector bitmap";

/// Entries of the table that are looked at together when all are.
const STEP: u64 = 64 << 10;

/// Times of files are kept in steps of up to two seconds.
const CLOCK_STEP: u32 = 2;

/// One file of a chain, opened read-only.
pub struct VhdLayer {
    pub(crate) image: Image,
    pub(crate) footer: Footer,
    /// File offset of the footer at the end; `None` if it is missing.
    pub(crate) footer_at: Option<u64>,
    note: Option<String>,
    /// `None` in fixed disks.
    pub(crate) blocks: Option<Blocks>,
    info: DiskInfo,
}

/// What a disk that is not fixed has besides its footer.
pub(crate) struct Blocks {
    pub(crate) header: DynamicHeader,
    pub(crate) table: Table,
    pub(crate) parents: ParentPaths,
    /// Bytes of a block.
    pub(crate) size: u64,
    /// Bytes of the sector bitmap before each block.
    pub(crate) bitmap_len: u64,
}

impl std::fmt::Debug for VhdLayer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VhdLayer")
            .field("path", &self.image.path)
            .field("info", &self.info)
            .finish()
    }
}

impl VhdLayer {
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
    /// As [`VhdLayer::open`].
    pub fn from_source(path: PathBuf, source: Arc<dyn ByteSource>) -> Result<Self, DiskError> {
        let image = Image::new(path, source)?;
        let Some(placed) = footer::find(&image.path, &*image.source, image.len)? else {
            let found = detect::describe(&*image.source, image.len);
            return Err(DiskError::NotAVirtualDisk { path: image.path, found });
        };
        let Placed { footer, at_end, note } = placed;
        let blocks = match footer.header_offset {
            Some(at) => Some(Blocks::read(&image, at, &footer)?),
            None if footer.size > at_end.unwrap_or(image.len) => {
                return Err(image.truncated("fixed disk", footer.size));
            }
            None => None,
        };
        let info = DiskInfo {
            size: footer.size,
            logical_sector: SECTOR as u32,
            physical_sector: SECTOR as u32,
            block_size: blocks.as_ref().map_or(DEFAULT_BLOCK, |b| b.header.block_size),
            kind: footer.kind,
            format: DiskFormat::Vhd,
            disk_id: footer.id,
            data_write_guid: Uuid::nil(),
        };
        Ok(Self { image, footer, footer_at: at_end, note, blocks, info })
    }

    /// The footer that counts.
    pub fn footer(&self) -> &Footer {
        &self.footer
    }

    /// The dynamic header; fixed disks have none.
    pub fn header(&self) -> Option<&DynamicHeader> {
        self.blocks.as_ref().map(|blocks| &blocks.header)
    }

    /// Where the file says that its parent is; only differencing disks have one.
    pub fn parent(&self) -> Option<&ParentPaths> {
        match self.footer.kind {
            DiskKind::Differencing => self.blocks.as_ref().map(|blocks| &blocks.parents),
            DiskKind::Fixed | DiskKind::Dynamic => None,
        }
    }

    /// Refuses a parent that this disk was not made from. The parent's time of modification, which the
    /// file has, too, is told in [`ReadLayer::notes`] only: copying a file changes it.
    pub(crate) fn check_parent(&self, parent: &Self) -> Result<(), DiskError> {
        let expected = self.blocks.as_ref().map(|blocks| blocks.header.parent_id);
        let found = parent.footer.id;
        if expected == Some(found) {
            return Ok(());
        }
        Err(DiskError::ParentMismatch {
            child: self.image.path.clone(),
            parent: parent.image.path.clone(),
            what: "UUID",
            expected: expected.unwrap_or_default().to_string().into(),
            found: found.to_string().into(),
        })
    }

    /// Whether the parent's file was modified after this disk was made over it, as its times say.
    pub(crate) fn parent_time_note(&self, parent: &Path) -> Option<String> {
        let expected = self.blocks.as_ref()?.header.parent_timestamp;
        let modified: SystemTime = parent.metadata().ok()?.modified().ok()?;
        let found = timestamp(modified);
        (expected.abs_diff(found) > CLOCK_STEP && expected != 0).then(|| {
            format!(
                "the parent {} has another time of modification than when this disk was made from it; that is so \
                 after copying the file, and also if somebody wrote to it, which makes the chain's data wrong",
                parent.display()
            )
        })
    }

    /// The file offset of a block, its bitmap first; `None` if it is not stored here.
    pub(crate) fn block_at(&self, blocks: &Blocks, block: u64) -> Result<Option<u64>, DiskError> {
        blocks.place(&self.image, blocks.table.get(&self.image, block)?, self.footer.size, block)
    }

    /// The runs of `start..end`, which lie in one block.
    fn block_runs(
        &self,
        blocks: &Blocks,
        block: u64,
        (start, end): (u64, u64),
        push: &mut RunSink<'_>,
    ) -> Result<(), DiskError> {
        let absent = self.absent();
        let Some(at) = self.block_at(blocks, block)? else {
            return push(Run { offset: start, len: end - start, presence: absent });
        };
        let block_start = block * blocks.size;
        let first = (start - block_start) / SECTOR;
        let last = (end - block_start).div_ceil(SECTOR);
        let mut bitmap = vec![0; (last.div_ceil(8) - first / 8) as usize];
        self.image.read(BITMAP, at + first / 8, &mut bitmap)?;
        let skipped = first / 8 * 8;
        let data = at + blocks.bitmap_len;
        bits::msb_runs(
            &mut bitmap,
            (first - skipped) as usize,
            (last - first) as usize,
            |bit, count, here| {
                let sectors = block_start + (skipped + bit as u64) * SECTOR;
                let from = sectors.max(start);
                let to = (sectors + count as u64 * SECTOR).min(end);
                let presence = match here {
                    true => Presence::Here { file_offset: data + (from - block_start) },
                    false => absent,
                };
                push(Run { offset: from, len: to - from, presence })
            },
        )
    }

    /// What is not stored here.
    fn absent(&self) -> Presence {
        match self.footer.kind {
            DiskKind::Differencing => Presence::Parent,
            DiskKind::Fixed | DiskKind::Dynamic => Presence::Zero,
        }
    }

    /// Calls `found` with the block and its place for every block that is stored, without keeping the table.
    pub(crate) fn for_blocks(
        &self,
        blocks: &Blocks,
        mut found: impl FnMut(u64, u64) -> Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        for first in (0..blocks.table.blocks()).step_by(STEP as usize) {
            let entries = blocks.table.read(&self.image, first, STEP)?;
            for (i, entry) in entries.iter().enumerate().filter(|(_, entry)| **entry != ABSENT) {
                let block = first + i as u64;
                if let Some(at) = blocks.place(&self.image, *entry, self.footer.size, block)? {
                    found(block, at)?;
                }
            }
        }
        Ok(())
    }
}

impl Blocks {
    fn read(image: &Image, header_at: u64, footer: &Footer) -> Result<Self, DiskError> {
        let mut bytes = vec![0; header::LEN];
        image.read(HEADER, header_at, &mut bytes)?;
        let fail = |error: FormatError| error.in_file(&image.path);
        let header = DynamicHeader::parse(&bytes).map_err(fail)?;
        let table = Table::new(&header, footer.size, image.len).map_err(fail)?;
        let mut parents = ParentPaths::default();
        if footer.kind == DiskKind::Differencing {
            for entry in &header.locators {
                let Some((offset, len)) = entry.text_range() else { continue };
                let mut text = vec![0; len];
                image.read("parent locator", offset, &mut text)?;
                parents.set(entry.code, &text);
            }
        }
        let size = u64::from(header.block_size);
        let bitmap_len = (size / SECTOR).div_ceil(8).next_multiple_of(SECTOR);
        Ok(Self { header, table, parents, size, bitmap_len })
    }

    /// Guest-visible bytes of a block; less than a block only for the last one.
    pub(crate) fn visible(&self, disk_size: u64, block: u64) -> u64 {
        disk_size.saturating_sub(block * self.size).min(self.size)
    }

    /// Where an entry puts a block, checked against the file.
    fn place(
        &self,
        image: &Image,
        entry: u32,
        disk_size: u64,
        block: u64,
    ) -> Result<Option<u64>, DiskError> {
        if entry == ABSENT {
            return Ok(None);
        }
        let at = u64::from(entry) * SECTOR;
        let needed = at + self.bitmap_len + self.visible(disk_size, block);
        if needed > image.len {
            return Err(image.truncated(BLOCK, needed));
        }
        let (table_at, table_end) = (self.header.table_offset, self.table.end());
        if at < SECTOR || (at < table_end && needed > table_at) {
            let detail = format!("puts block {block} at {at}, over the header or the table");
            return Err(FormatError::corrupt(table::NAME, detail).in_file(&image.path));
        }
        Ok(Some(at))
    }
}

impl ReadLayer for VhdLayer {
    fn path(&self) -> &Path {
        &self.image.path
    }

    fn info(&self) -> &DiskInfo {
        &self.info
    }

    fn runs(&self, offset: u64, len: u64, found: &mut RunSink<'_>) -> Result<(), DiskError> {
        let asked = usize::try_from(len).unwrap_or(usize::MAX);
        check_bounds(&self.image.path, self.info.size, offset, asked)?;
        let Some(blocks) = &self.blocks else {
            let presence = Presence::Here { file_offset: offset };
            return if len > 0 { found(Run { offset, len, presence }) } else { Ok(()) };
        };
        let end = offset + len;
        joined(found, |push| {
            let mut at = offset;
            while at < end {
                let block = at / blocks.size;
                let block_end = ((block + 1) * blocks.size).min(end);
                self.block_runs(blocks, block, (at, block_end), push)?;
                at = block_end;
            }
            Ok(())
        })
    }

    fn read_stored(&self, file_offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.image.read(BLOCK, file_offset, buf)
    }

    fn map(&self) -> Result<LayerMap, DiskError> {
        let Some(blocks) = &self.blocks else {
            let holes = |op| DiskError::io(&self.image.path, op);
            let mut present = match self.image.source.data_ranges() {
                Ok(Some(ranges)) => ranges,
                Ok(None) => RangeSet::single(0, self.info.size),
                Err(error) => return Err(holes("list the data ranges of")(error)),
            };
            present.clamp(self.info.size);
            return Ok(LayerMap { present, ..LayerMap::default() });
        };
        let mut map = MapBuilder::new(self.info.size);
        self.for_blocks(blocks, |block, _| {
            let start = block * blocks.size;
            let end = start + blocks.visible(self.footer.size, block);
            self.block_runs(blocks, block, (start, end), &mut |run| {
                // Without a parent there is nothing to hide.
                if matches!(run.presence, Presence::Here { .. }) {
                    map.run(run);
                }
                Ok(())
            })
        })?;
        Ok(map.finish())
    }

    fn check(&self) -> Result<(), DiskError> {
        let Some(blocks) = &self.blocks else { return Ok(()) };
        let mut places = Places::new(SECTOR);
        self.for_blocks(blocks, |block, at| {
            if places.take(at, blocks.bitmap_len + blocks.visible(self.footer.size, block)) {
                return Ok(());
            }
            let detail = format!("puts two blocks into one place, block {block} at {at}");
            Err(FormatError::corrupt(table::NAME, detail).in_file(&self.image.path))
        })
    }

    fn is_dirty(&self) -> bool {
        self.footer_at.is_none()
    }

    fn parent_candidates(&self) -> Option<Vec<PathBuf>> {
        let blocks = self.blocks.as_ref()?;
        let paths = self.parent()?;
        Some(paths.candidates(&self.image.path, &blocks.header.parent_name))
    }

    fn notes(&self) -> Vec<String> {
        let mut notes: Vec<String> = self.note.iter().cloned().collect();
        let by_chs = self.footer.geometry.bytes();
        if matches!(&self.footer.creator, b"vpc " | b"qemu") && by_chs != self.footer.size {
            notes.push(format!(
                "the geometry, by which the program that made the disk goes, says {by_chs} bytes; Hyper-V goes by the \
                 size, as we do"
            ));
        }
        if self.footer.saved_state {
            notes.push("a VM was saved while it used this disk".to_owned());
        }
        notes
    }
}
