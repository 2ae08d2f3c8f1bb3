//! New VHD files.

use std::path::Path;
use std::time::SystemTime;

use uuid::Uuid;

use super::geometry::Chs;
use super::locator::LocatorEntry;
use super::{
    DEFAULT_BLOCK, DynamicHeader, Footer, MAX_SIZE, ParentPaths, SECTOR, VhdLayer, VhdWriter,
    footer, header, timestamp,
};
use crate::block_file::BlockFile;
use crate::layer::ReadLayer;
use crate::{DiskChain, DiskError, DiskKind, ReadDisk, parent_paths};

/// Room for a parent's path, so that another parent can be named later.
const LOCATOR_SPACE: u64 = 4096;

/// What a new disk is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateOptions {
    /// Size in bytes: a multiple of 512, up to 2040 GiB.
    pub size: u64,
    /// Dynamic or fixed; children are made with [`VhdWriter::create_child`].
    pub kind: DiskKind,
    /// Bytes of a block, 512 KiB or 2 MiB as Windows makes them; fixed disks have none.
    pub block_size: u32,
    /// The file's id; a new one if not given.
    pub id: Option<Uuid>,
}

impl CreateOptions {
    /// A dynamic disk in blocks of 2 MiB.
    pub fn dynamic(size: u64) -> Self {
        Self { size, kind: DiskKind::Dynamic, block_size: DEFAULT_BLOCK, id: None }
    }

    /// A fixed disk: the guest's bytes and a footer, still as a sparse file.
    pub fn fixed(size: u64) -> Self {
        Self { kind: DiskKind::Fixed, ..Self::dynamic(size) }
    }

    fn check(&self, path: &Path) -> Result<(), DiskError> {
        let refuse = |option, value: String, expected| {
            Err(DiskError::InvalidOption { path: path.to_owned(), option, value, expected })
        };
        if !matches!(self.block_size, 0x8_0000 | 0x20_0000) {
            return refuse("block size", self.block_size.to_string(), "512 KiB or 2 MiB in a VHD");
        }
        if self.size == 0 || self.size > MAX_SIZE || !self.size.is_multiple_of(SECTOR) {
            let expected =
                "a multiple of 512, more than zero and up to 2040 GiB (a VHDX can be larger)";
            return refuse("size", self.size.to_string(), expected);
        }
        if self.kind == DiskKind::Differencing {
            let expected = "dynamic or fixed (a child needs a parent)";
            return refuse("kind", "differencing".into(), expected);
        }
        Ok(())
    }

    fn footer(&self) -> Footer {
        Footer {
            header_offset: None,
            timestamp: timestamp(SystemTime::now()),
            // Who reads another name here may go by the geometry, which is smaller than the disk.
            creator: *b"win ",
            original_size: self.size,
            size: self.size,
            geometry: Chs::of(self.size),
            kind: self.kind,
            id: self.id.unwrap_or_else(Uuid::new_v4),
            saved_state: false,
        }
    }
}

/// The parent that a new child names.
pub(crate) struct Parent {
    pub(crate) id: Uuid,
    pub(crate) timestamp: u32,
    pub(crate) name: String,
    pub(crate) paths: ParentPaths,
}

impl Parent {
    /// `parent` as `child` names it, by their real places.
    pub(crate) fn of(child: &Path, parent: &Path) -> Result<Self, DiskError> {
        let refuse = || DiskError::InvalidOption {
            path: child.to_owned(),
            option: "parent",
            value: parent.display().to_string(),
            expected: "a path of Unicode names",
        };
        let folder = match child.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let folder = folder.canonicalize().map_err(DiskError::io(folder, "find the folder"))?;
        let real = parent.canonicalize().map_err(DiskError::io(parent, "find"))?;
        let from = folder.join(child.file_name().unwrap_or_default());
        let paths = ParentPaths {
            relative: parent_paths::relative(&from, &real).ok_or_else(refuse)?,
            absolute: Some(real.to_str().ok_or_else(refuse)?.to_owned()),
        };
        let modified = real.metadata().and_then(|metadata| metadata.modified());
        let modified = modified.map_err(DiskError::io(&real, "get the time of"))?;
        Ok(Self {
            id: VhdLayer::open(&real)?.footer().id,
            timestamp: timestamp(modified),
            name: real.file_name().and_then(|name| name.to_str()).ok_or_else(refuse)?.to_owned(),
            paths,
        })
    }
}

impl VhdWriter {
    /// Makes a new disk of zeros and opens it. An existing file is refused.
    ///
    /// # Errors
    /// [`DiskError::InvalidOption`] or [`DiskError::Io`].
    pub fn create(path: impl AsRef<Path>, options: &CreateOptions) -> Result<Self, DiskError> {
        let path = path.as_ref();
        options.check(path)?;
        write_new(path, options.footer(), options.block_size, None)?;
        Self::open(path)
    }

    /// Makes a differencing disk over `parent`, which from now on must not change, and opens it. The
    /// child has the parent's size; blocks are 2 MiB unless asked otherwise.
    ///
    /// # Errors
    /// What opening the parent's chain met, [`DiskError::InvalidOption`] or [`DiskError::Io`].
    pub fn create_child(
        child: impl AsRef<Path>,
        parent: impl AsRef<Path>,
        block_size: Option<u32>,
    ) -> Result<Self, DiskError> {
        let (child, parent) = (child.as_ref(), parent.as_ref());
        let size = DiskChain::open(parent)?.info().size;
        let block_size = block_size.unwrap_or(DEFAULT_BLOCK);
        let options = CreateOptions { block_size, ..CreateOptions::dynamic(size) };
        options.check(child)?;
        let footer = Footer { kind: DiskKind::Differencing, ..options.footer() };
        write_new(child, footer, block_size, Some(Parent::of(child, parent)?))?;
        Self::open(child)
    }
}

/// Writes all structures of a disk of zeros. What was begun is removed if it cannot be finished.
fn write_new(
    path: &Path,
    footer: Footer,
    block_size: u32,
    parent: Option<Parent>,
) -> Result<(), DiskError> {
    let file = BlockFile::create_new(path)?;
    let written = match footer.kind {
        DiskKind::Fixed => write_fixed(&file, &footer),
        DiskKind::Dynamic | DiskKind::Differencing => {
            write_dynamic(&file, footer, block_size, parent)
        }
    };
    written.inspect_err(|_| {
        // The error that matters is the one that stopped the writing.
        std::fs::remove_file(path).ok();
    })
}

fn write_fixed(file: &BlockFile, footer: &Footer) -> Result<(), DiskError> {
    file.write_all_at(footer.size, &footer.encode())?;
    file.sync()
}

fn write_dynamic(
    file: &BlockFile,
    mut footer: Footer,
    block_size: u32,
    parent: Option<Parent>,
) -> Result<(), DiskError> {
    let header_at = footer::LEN as u64;
    let mut at = header_at + header::LEN as u64;
    let mut locators = Vec::new();
    for (code, text) in parent.iter().flat_map(|parent| parent.paths.texts()) {
        let space = (text.len() as u64).next_multiple_of(SECTOR).max(LOCATOR_SPACE);
        locators.push(LocatorEntry {
            code,
            space: space as u32,
            length: text.len() as u32,
            offset: at,
        });
        file.write_all_at(at, &text)?;
        at += space;
    }
    // At most 4 million: 2040 GiB in blocks of 512 KiB.
    let entries = footer.size.div_ceil(u64::from(block_size)) as u32;
    let header = DynamicHeader {
        table_offset: at,
        entries,
        block_size,
        parent_id: parent.as_ref().map(|parent| parent.id).unwrap_or_default(),
        parent_timestamp: parent.as_ref().map(|parent| parent.timestamp).unwrap_or_default(),
        parent_name: parent.map(|parent| parent.name).unwrap_or_default(),
        locators,
    };
    let table = vec![0xff; (u64::from(entries) * 4).next_multiple_of(SECTOR) as usize];
    file.write_all_at(at, &table)?;
    at += table.len() as u64;
    footer.header_offset = Some(header_at);
    file.write_all_at(header_at, &header.encode())?;
    file.write_all_at(at, &footer.encode())?;
    file.write_all_at(0, &footer.encode())?;
    file.sync()
}

/// Makes `parent` the parent of the differencing disk `child`, from now on and as it is now. The caller
/// vouches that the child's view of the disk stays right, as it does after the old parent was merged
/// into the new one.
///
/// # Durability
/// The header that this replaces has no second copy: a power failure in the moment in which its two
/// sectors are written leaves a child that has to be made again. Nothing but the parent is changed.
///
/// # Errors
/// [`DiskError::ParentMismatch`] if the sizes differ; [`DiskError::Unsupported`] if the file has no room
/// for the parent's path; what opening the files met.
pub fn set_parent(child: impl AsRef<Path>, parent: impl AsRef<Path>) -> Result<(), DiskError> {
    let (child, parent) = (child.as_ref(), parent.as_ref());
    VhdWriter::open_alone(child)?.name_parent(&VhdLayer::open(parent)?, child, parent)
}

impl VhdWriter {
    fn name_parent(self, new: &VhdLayer, child: &Path, parent: &Path) -> Result<(), DiskError> {
        use crate::error::FormatError;
        let layer = &self.layer;
        let unsupported = |what: &'static str, detail: String| {
            Err(FormatError::unsupported(what, detail).in_file(child))
        };
        let (Some(blocks), Some(header_at), DiskKind::Differencing) =
            (&layer.blocks, layer.footer.header_offset, layer.footer.kind)
        else {
            let detail = "is not differencing, so it has no parent to change";
            return unsupported("kind", detail.into());
        };
        let (expected, found) = (layer.info().size, new.info().size);
        if expected != found {
            return Err(DiskError::ParentMismatch {
                child: child.to_owned(),
                parent: parent.to_owned(),
                what: "size",
                expected: expected.to_string().into(),
                found: found.to_string().into(),
            });
        }
        let named = Parent::of(child, parent)?;
        let mut header = blocks.header.clone();
        let mut locators = Vec::new();
        for (code, text) in named.paths.texts() {
            let room = header
                .locators
                .iter()
                .find(|entry| entry.code == code && u64::from(entry.space) >= text.len() as u64);
            let Some(room) = room else {
                let detail =
                    format!("has no room for the path of the parent, {} bytes", text.len());
                return unsupported("parent locator", detail);
            };
            locators.push(LocatorEntry { length: text.len() as u32, ..*room });
            self.file.write_all_at(room.offset, &text)?;
        }
        header.locators = locators;
        (header.parent_id, header.parent_timestamp) = (named.id, named.timestamp);
        header.parent_name = named.name;
        self.file.sync()?;
        self.file.write_all_at(header_at, &header.encode())?;
        self.file.sync()
    }
}
