//! The metadata region: size, sectors, block size, identity and parent of the disk.

use std::collections::HashMap;

use uuid::{Uuid, uuid};

use super::Fields;
use super::image::Image;
use super::{MAX_SIZE, MIB, ParentLocator, Region};
use crate::error::FormatError;
use crate::fields::put;
use crate::{DiskError, DiskKind};

/// Bytes of the table at the region's start; the items follow.
pub(crate) const TABLE_LEN: usize = 64 << 10;

/// Most bytes an item may have.
const MAX_ITEM: u32 = 1 << 20;
const MAX_ENTRIES: usize = 2047;
const NAME: &str = "metadata";

const FILE_PARAMETERS: Uuid = uuid!("caa16737-fa36-4d43-b3b6-33f0aa44e76b");
const VIRTUAL_DISK_SIZE: Uuid = uuid!("2fa54224-cd1b-4876-b211-5dbed83bf4b8");
const VIRTUAL_DISK_ID: Uuid = uuid!("beca12ab-b2e6-4523-93ef-c309e000c746");
const LOGICAL_SECTOR_SIZE: Uuid = uuid!("8141bf1d-a96f-4709-ba47-f233a8faab5f");
const PHYSICAL_SECTOR_SIZE: Uuid = uuid!("cda348c7-445d-4471-9cc9-e9885251c556");
const PARENT_LOCATOR: Uuid = uuid!("a8d35f2d-b30b-454d-abf7-d3d84834ab0c");

/// What the metadata region says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metadata {
    /// Size that the guest sees, in bytes.
    pub size: u64,
    /// Bytes of a payload block: a power of two from 1 to 256 MiB.
    pub block_size: u32,
    /// Logical sector size in bytes: 512 or 4096.
    pub logical_sector: u32,
    /// Physical sector size in bytes: 512 or 4096.
    pub physical_sector: u32,
    /// VirtualDiskId (page 83).
    pub disk_id: Uuid,
    /// Fixed disks keep their blocks allocated.
    pub kind: DiskKind,
    /// Where the parent is; present exactly in differencing disks.
    pub parent: Option<ParentLocator>,
}

/// The table: where each item is, relative to the region.
pub(crate) struct MetadataTable {
    items: HashMap<Uuid, Item>,
}

#[derive(Clone, Copy)]
struct Item {
    entry: usize,
    offset: u32,
    length: u32,
}

/// The items' bytes.
struct Items {
    parameters: Vec<u8>,
    size: Vec<u8>,
    id: Vec<u8>,
    logical: Vec<u8>,
    physical: Vec<u8>,
    locator: Option<Vec<u8>>,
}

/// Where a parent locator goes.
pub(crate) struct LocatorPlace {
    /// Offset of its entry in the table.
    pub(crate) entry: usize,
    /// Offset of its bytes in the region.
    pub(crate) offset: u32,
}

impl MetadataTable {
    /// Reads the table from the region's first 64 KiB.
    pub(crate) fn parse(bytes: &[u8], region_len: u32) -> Result<Self, FormatError> {
        let fields = Fields::new(bytes, NAME, TABLE_LEN)?;
        if &fields.array::<8>(0) != b"metadata" {
            return Err(FormatError::corrupt(NAME, "does not start with \"metadata\""));
        }
        let count = usize::from(fields.u16(10));
        if count > MAX_ENTRIES {
            let detail = format!("has {count} items; at most {MAX_ENTRIES} are allowed");
            return Err(FormatError::corrupt(NAME, detail));
        }
        let known = [
            FILE_PARAMETERS,
            VIRTUAL_DISK_SIZE,
            VIRTUAL_DISK_ID,
            LOGICAL_SECTOR_SIZE,
            PHYSICAL_SECTOR_SIZE,
            PARENT_LOCATOR,
        ];
        let mut items = HashMap::new();
        for entry in (0..count).map(|i| 32 + i * 32) {
            let id = fields.guid(entry);
            let item =
                Item { entry, offset: fields.u32(entry + 16), length: fields.u32(entry + 20) };
            let flags = fields.u32(entry + 24);
            // Bit 0 marks a user's own items, which share the id space with nothing of ours.
            if flags & 1 == 1 || !known.contains(&id) {
                if flags & 4 != 0 {
                    let detail = format!("requires the unknown item {id}");
                    return Err(FormatError::unsupported(NAME, detail));
                }
                continue;
            }
            let end = u64::from(item.offset) + u64::from(item.length);
            let inside = item.offset as usize >= TABLE_LEN && end <= u64::from(region_len);
            if !inside || item.length == 0 || item.length > MAX_ITEM {
                let detail = format!(
                    "has item {id} at {} with {} bytes, outside of its region of {region_len} bytes",
                    item.offset, item.length
                );
                return Err(FormatError::corrupt(NAME, detail));
            }
            if items.insert(id, item).is_some() {
                return Err(FormatError::corrupt(NAME, format!("has item {id} twice")));
            }
        }
        Ok(Self { items })
    }

    /// Where a parent locator of `len` bytes can go: where it is if it fits there, else behind all items.
    pub(crate) fn place_locator(&self, region_len: u32, len: u64) -> Option<LocatorPlace> {
        let item = self.items.get(&PARENT_LOCATOR)?;
        let fits = |from: u64, to: u64| from + len <= to && len <= u64::from(MAX_ITEM);
        let next = self.items.values().map(|i| i.offset).filter(|o| *o > item.offset).min();
        if fits(item.offset.into(), next.unwrap_or(region_len).into()) {
            return Some(LocatorPlace { entry: item.entry, offset: item.offset });
        }
        let behind =
            self.items.values().map(|i| u64::from(i.offset) + u64::from(i.length)).max()?;
        let offset = u32::try_from(behind).ok().filter(|_| fits(behind, region_len.into()))?;
        Some(LocatorPlace { entry: item.entry, offset })
    }

    /// An item's bytes, none if the table does not have it.
    fn item(&self, id: Uuid, image: &Image, region: Region) -> Result<Option<Vec<u8>>, DiskError> {
        let Some(item) = self.items.get(&id) else { return Ok(None) };
        let mut bytes = vec![0; item.length as usize];
        image.read(NAME, region.offset + u64::from(item.offset), &mut bytes)?;
        Ok(Some(bytes))
    }
}

impl Metadata {
    /// Reads the items that `table` names.
    pub(crate) fn read(
        table: &MetadataTable,
        image: &Image,
        region: Region,
    ) -> Result<Self, DiskError> {
        let required = |id, what| {
            let lacks =
                || FormatError::corrupt(NAME, format!("lacks the {what}")).in_file(&image.path);
            table.item(id, image, region)?.ok_or_else(lacks)
        };
        let items = Items {
            parameters: required(FILE_PARAMETERS, "file parameters")?,
            size: required(VIRTUAL_DISK_SIZE, "disk size")?,
            id: required(VIRTUAL_DISK_ID, "disk id")?,
            logical: required(LOGICAL_SECTOR_SIZE, "logical sector size")?,
            physical: required(PHYSICAL_SECTOR_SIZE, "physical sector size")?,
            locator: table.item(PARENT_LOCATOR, image, region)?,
        };
        Self::parse(&items).map_err(|e| e.in_file(&image.path))
    }

    /// Checks the items' contents against the format's limits.
    fn parse(items: &Items) -> Result<Self, FormatError> {
        let parameters = Fields::new(&items.parameters, "file parameters", 8)?;
        let (block_size, flags) = (parameters.u32(0), parameters.u32(4));
        let in_range = (MIB..=256 * MIB).contains(&u64::from(block_size));
        if !block_size.is_power_of_two() || !in_range {
            let detail = format!(
                "has block size {block_size}; a power of two from 1 to 256 MiB is expected"
            );
            return Err(FormatError::corrupt(NAME, detail));
        }
        let logical_sector = sector(&items.logical, "logical sector size")?;
        let physical_sector = sector(&items.physical, "physical sector size")?;
        let size = Fields::new(&items.size, "disk size", 8)?.u64(0);
        if size > MAX_SIZE || !size.is_multiple_of(u64::from(logical_sector)) {
            let detail = format!(
                "has disk size {size}; a multiple of {logical_sector} up to 64 TiB is expected"
            );
            return Err(FormatError::corrupt(NAME, detail));
        }
        let parent = match (flags & 2 != 0, &items.locator) {
            (false, _) => None,
            (true, Some(bytes)) => Some(ParentLocator::parse(bytes)?),
            (true, None) => {
                return Err(FormatError::corrupt(
                    NAME,
                    "says that the disk has a parent, not which",
                ));
            }
        };
        let kind = match (&parent, flags & 1 != 0) {
            (Some(_), _) => DiskKind::Differencing,
            (None, true) => DiskKind::Fixed,
            (None, false) => DiskKind::Dynamic,
        };
        let disk_id = Fields::new(&items.id, "disk id", 16)?.guid(0);
        Ok(Self { size, block_size, logical_sector, physical_sector, disk_id, kind, parent })
    }

    /// Table and items as they are at the start of the region.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let flags = match self.kind {
            DiskKind::Fixed => 1_u32,
            DiskKind::Dynamic => 0,
            DiskKind::Differencing => 2,
        };
        let parameters = [self.block_size.to_le_bytes(), flags.to_le_bytes()].concat();
        // Item flags: 2 = about the virtual disk, 4 = must be understood.
        let mut items = vec![
            (FILE_PARAMETERS, 4_u32, parameters),
            (VIRTUAL_DISK_SIZE, 6, self.size.to_le_bytes().to_vec()),
            (VIRTUAL_DISK_ID, 6, self.disk_id.to_bytes_le().to_vec()),
            (LOGICAL_SECTOR_SIZE, 6, self.logical_sector.to_le_bytes().to_vec()),
            (PHYSICAL_SECTOR_SIZE, 6, self.physical_sector.to_le_bytes().to_vec()),
        ];
        // The locator is last so that it has room to grow.
        items.extend(self.parent.as_ref().map(|p| (PARENT_LOCATOR, 4, p.encode())));
        let mut out = vec![0; TABLE_LEN];
        put(&mut out, 0, b"metadata");
        put(&mut out, 10, &(items.len() as u16).to_le_bytes());
        for (i, (id, flags, bytes)) in items.iter().enumerate() {
            let (at, offset) = (32 + i * 32, out.len() as u32);
            put(&mut out, at, &id.to_bytes_le());
            put(&mut out, at + 16, &offset.to_le_bytes());
            put(&mut out, at + 20, &(bytes.len() as u32).to_le_bytes());
            put(&mut out, at + 24, &flags.to_le_bytes());
            out.extend_from_slice(bytes);
        }
        out
    }
}

fn sector(bytes: &[u8], what: &'static str) -> Result<u32, FormatError> {
    match Fields::new(bytes, what, 4)?.u32(0) {
        size @ (512 | 4096) => Ok(size),
        other => Err(FormatError::corrupt(what, format!("is {other}; 512 or 4096 is expected"))),
    }
}
