//! New VHDX files.

use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::bat::{Geometry, Payload};
use super::header::HEADER_OFFSETS;
use super::region::TABLE_OFFSETS;
use super::{
    Header, MAX_SIZE, MIB, Metadata, ParentLocator, Region, RegionTable, SIGNATURE, VhdxWriter,
};
use crate::block_file::BlockFile;
use crate::{DiskChain, DiskError, DiskKind, ReadDisk};

const LOG: Region = Region { offset: MIB, length: 1 << 20 };
const METADATA: Region = Region { offset: 2 * MIB, length: 1 << 20 };
const BAT_OFFSET: u64 = 3 * MIB;

/// Block size of differencing disks as Hyper-V makes them.
const CHILD_BLOCK: u32 = 2 << 20;

/// What a new disk is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateOptions {
    /// Size in bytes: a multiple of the logical sector, up to 64 TiB.
    pub size: u64,
    /// Bytes of a block: a power of two from 1 to 256 MiB.
    pub block_size: u32,
    /// 512 or 4096.
    pub logical_sector: u32,
    /// 512 or 4096.
    pub physical_sector: u32,
    /// Dynamic or fixed; children are made with [`VhdxWriter::create_child`].
    pub kind: DiskKind,
    /// VirtualDiskId; a new one if not given.
    pub disk_id: Option<Uuid>,
}

impl CreateOptions {
    /// A dynamic disk as Hyper-V makes it by default: 32 MiB blocks, sectors of 512 on 4096 bytes.
    pub fn dynamic(size: u64) -> Self {
        Self {
            size,
            block_size: 32 << 20,
            logical_sector: 512,
            physical_sector: 4096,
            kind: DiskKind::Dynamic,
            disk_id: None,
        }
    }

    /// A fixed disk: every block has its place from the start, still as a sparse file.
    pub fn fixed(size: u64) -> Self {
        Self { kind: DiskKind::Fixed, ..Self::dynamic(size) }
    }

    fn check(&self, path: &Path) -> Result<(), DiskError> {
        let refuse = |option, value: String, expected| {
            Err(DiskError::InvalidOption { path: path.to_owned(), option, value, expected })
        };
        for (option, value) in
            [("logical sector", self.logical_sector), ("physical sector", self.physical_sector)]
        {
            if !matches!(value, 512 | 4096) {
                return refuse(option, value.to_string(), "512 or 4096");
            }
        }
        let block = u64::from(self.block_size);
        if !block.is_power_of_two() || !(MIB..=256 * MIB).contains(&block) {
            return refuse("block size", block.to_string(), "a power of two from 1 to 256 MiB");
        }
        let aligned = self.size.is_multiple_of(u64::from(self.logical_sector));
        if self.size == 0 || self.size > MAX_SIZE || !aligned {
            let expected = "a multiple of the logical sector, more than zero and up to 64 TiB";
            return refuse("size", self.size.to_string(), expected);
        }
        if self.kind == DiskKind::Differencing {
            return refuse(
                "kind",
                "differencing".into(),
                "dynamic or fixed (a child needs a parent)",
            );
        }
        Ok(())
    }
}

impl VhdxWriter {
    /// Makes a new disk of zeros and opens it. An existing file is refused.
    ///
    /// # Errors
    /// [`DiskError::InvalidOption`] or [`DiskError::Io`].
    pub fn create(path: impl AsRef<Path>, options: &CreateOptions) -> Result<Self, DiskError> {
        let path = path.as_ref();
        options.check(path)?;
        let metadata = Metadata {
            size: options.size,
            block_size: options.block_size,
            logical_sector: options.logical_sector,
            physical_sector: options.physical_sector,
            disk_id: options.disk_id.unwrap_or_else(Uuid::new_v4),
            kind: options.kind,
            parent: None,
        };
        write_new(path, &metadata)?;
        Self::open(path)
    }

    /// Makes a differencing disk over `parent`, which from now on must not change, and opens it. The
    /// child has the parent's size, sectors and VirtualDiskId; blocks are 2 MiB unless asked otherwise.
    ///
    /// # Errors
    /// What opening the parent's chain met, [`DiskError::InvalidOption`] or [`DiskError::Io`].
    pub fn create_child(
        child: impl AsRef<Path>,
        parent: impl AsRef<Path>,
        block_size: Option<u32>,
    ) -> Result<Self, DiskError> {
        let (child, parent) = (child.as_ref(), parent.as_ref());
        let chain = DiskChain::open(parent)?;
        let info = chain.info();
        let options = CreateOptions {
            size: info.size,
            block_size: block_size.unwrap_or(CHILD_BLOCK),
            logical_sector: info.logical_sector,
            physical_sector: info.physical_sector,
            kind: DiskKind::Dynamic,
            disk_id: Some(info.disk_id),
        };
        options.check(child)?;
        let metadata = Metadata {
            size: info.size,
            block_size: options.block_size,
            logical_sector: info.logical_sector,
            physical_sector: info.physical_sector,
            disk_id: info.disk_id,
            kind: DiskKind::Differencing,
            parent: Some(locator_for(child, parent, info.data_write_guid)?),
        };
        write_new(child, &metadata)?;
        Self::open(child)
    }
}

/// A locator that names `parent` from `child`, by their real places.
pub(crate) fn locator_for(
    child: &Path,
    parent: &Path,
    linkage: Uuid,
) -> Result<ParentLocator, DiskError> {
    let folder = match child.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let folder = folder.canonicalize().map_err(DiskError::io(folder, "find the folder"))?;
    let parent = parent.canonicalize().map_err(DiskError::io(parent, "find"))?;
    let child_name = child.file_name().unwrap_or_default();
    ParentLocator::naming(&folder.join(child_name), &parent, linkage).ok_or_else(|| {
        DiskError::InvalidOption {
            path: child.to_owned(),
            option: "parent",
            value: parent.display().to_string(),
            expected: "a path of Unicode names",
        }
    })
}

/// Writes all structures of a disk of zeros. What was begun is removed if it cannot be finished.
fn write_new(path: &Path, metadata: &Metadata) -> Result<(), DiskError> {
    let file = Arc::new(BlockFile::create_new(path)?);
    write_structures(&file, metadata).inspect_err(|_| {
        // The error that matters is the one that stopped the writing.
        std::fs::remove_file(path).ok();
    })
}

fn write_structures(file: &BlockFile, metadata: &Metadata) -> Result<(), DiskError> {
    let geometry = Geometry::of(metadata);
    let bat_len = geometry.table_len().max(1).next_multiple_of(MIB);
    // At most 512 MiB + 1 MiB: 64 TiB in blocks of 1 MiB.
    let bat = Region { offset: BAT_OFFSET, length: bat_len as u32 };
    let payload_start = bat.end();
    let blocks = match metadata.kind {
        DiskKind::Fixed => geometry.size.div_ceil(geometry.block_size),
        DiskKind::Dynamic | DiskKind::Differencing => 0,
    };
    file.set_len(payload_start + blocks * geometry.block_size)?;

    let mut identifier = SIGNATURE.to_vec();
    identifier.extend("Outrider".encode_utf16().flat_map(u16::to_le_bytes));
    file.write_all_at(0, &identifier)?;
    let regions = RegionTable { bat, metadata: METADATA }.encode();
    for at in TABLE_OFFSETS {
        file.write_all_at(at, &regions)?;
    }
    file.write_all_at(METADATA.offset, &metadata.encode())?;
    write_fixed_bat(file, &geometry, bat, blocks, payload_start)?;
    let mut header = Header {
        sequence: 0,
        file_write_guid: Uuid::new_v4(),
        data_write_guid: Uuid::new_v4(),
        log_guid: Uuid::nil(),
        log_length: LOG.length,
        log_offset: LOG.offset,
    };
    for at in HEADER_OFFSETS {
        header.sequence += 1;
        file.write_all_at(at, &header.encode())?;
    }
    file.sync()
}

/// Enters `blocks` payload blocks, one after the other in the file.
fn write_fixed_bat(
    file: &BlockFile,
    geometry: &Geometry,
    bat: Region,
    blocks: u64,
    payload_start: u64,
) -> Result<(), DiskError> {
    // One chunk of entries at a time; each ends with the slot of its unused bitmap.
    for first in (0..blocks).step_by(geometry.ratio as usize) {
        let last = (first + geometry.ratio).min(blocks);
        let entries: Vec<u8> = (first..last)
            .map(|block| Payload::Full(payload_start + block * geometry.block_size).encode())
            .flat_map(u64::to_le_bytes)
            .collect();
        file.write_all_at(bat.offset + geometry.payload_index(first) * 8, &entries)?;
    }
    Ok(())
}
