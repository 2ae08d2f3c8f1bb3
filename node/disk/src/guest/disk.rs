//! A guest's disk: its volumes, and the file systems on them.

use std::sync::Arc;

use super::partition::{self, Partition, PartitionType, TableKind};
use super::recognise::{self, Content, Family};
use super::window::{Limits, Window};
use super::{FileSystem, GuestError, ext, fat, ntfs};
use crate::{ByteRange, ReadDisk};

/// A volume of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// The partition's number; 1 for a disk without a table.
    pub number: u32,
    /// Where it is on the disk, bytes.
    pub range: ByteRange,
    /// What the partition table says of its use.
    pub partition: Option<PartitionType>,
    /// The partition's name (GPT).
    pub name: String,
    /// What it holds.
    pub content: Content,
}

impl Volume {
    /// What it holds, in words, and why it is not read, if so.
    #[must_use]
    pub fn describe(&self) -> String {
        match &self.content {
            Content::FileSystem(Family::Ntfs) => "NTFS".into(),
            Content::FileSystem(Family::Fat) => "FAT".into(),
            Content::FileSystem(Family::Ext) => "ext2/3/4".into(),
            Content::Swap(_) => "Linux swap".into(),
            Content::SwapInUse { what } => format!("not readable: {what}"),
            Content::NotReadable { what, reason } => format!("not readable: {what}: {reason}"),
            Content::Empty => "empty".into(),
            Content::Unknown => "not readable: no file system that is known here".into(),
        }
    }
}

/// A disk seen from its guest.
pub struct GuestDisk {
    window: Window,
    /// Kind of the partition table.
    pub table: TableKind,
    /// Its volumes.
    pub volumes: Vec<Volume>,
    /// What is wrong with the table, as sentences.
    pub doubts: Vec<String>,
}

impl GuestDisk {
    /// Reads the partition table and looks at each volume. Blocks.
    ///
    /// # Errors
    /// [`GuestError`].
    pub fn open(disk: Arc<dyn ReadDisk>, limits: Limits) -> Result<Self, GuestError> {
        let window = Window::new(disk, limits);
        let mut table = partition::read(&window)?;
        if table.kind == TableKind::None {
            let whole = Partition {
                number: 1,
                range: ByteRange::new(0, window.len()),
                kind: PartitionType::Mbr(0),
                name: String::new(),
            };
            table.partitions.push(whole);
        }
        let mut volumes = Vec::with_capacity(table.partitions.len());
        for p in table.partitions {
            let partition = (table.kind != TableKind::None).then_some(p.kind);
            let content = recognise::recognise(&window.part(p.range), partition)?;
            volumes.push(Volume {
                number: p.number,
                range: p.range,
                partition,
                name: p.name,
                content,
            });
        }
        if table.kind == TableKind::None {
            volumes.retain(|v| !matches!(v.content, Content::Empty | Content::Unknown));
        }
        Ok(Self { window, table: table.kind, volumes, doubts: table.doubts })
    }

    /// A volume by its number.
    ///
    /// # Errors
    /// [`GuestError::NoVolume`] naming those that exist.
    pub fn volume(&self, number: u32) -> Result<&Volume, GuestError> {
        self.volumes.iter().find(|v| v.number == number).ok_or_else(|| GuestError::NoVolume {
            volume: number,
            known: self.volumes.iter().map(|v| v.number).collect(),
        })
    }

    /// The file system of a volume.
    ///
    /// # Errors
    /// [`GuestError::NotReadable`] with the reason, or what opening it met.
    pub fn file_system(&self, volume: &Volume) -> Result<Box<dyn FileSystem>, GuestError> {
        let window = self.window.part(volume.range);
        Ok(match volume.content {
            Content::FileSystem(Family::Ntfs) => Box::new(ntfs::Ntfs::open(window)?),
            Content::FileSystem(Family::Fat) => Box::new(fat::Fat::open(window)?),
            Content::FileSystem(Family::Ext) => Box::new(ext::Ext::open(window)?),
            _ => {
                let description = volume.describe();
                let reason = description.strip_prefix("not readable: ").unwrap_or(&description);
                return Err(GuestError::NotReadable {
                    volume: volume.number,
                    reason: format!("it holds {reason}"),
                });
            }
        })
    }
}
