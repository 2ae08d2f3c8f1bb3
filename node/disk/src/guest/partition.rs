//! Partition tables: which ranges of a disk are volumes.

mod gpt;
mod mbr;

use uuid::Uuid;

use super::GuestError;
use super::window::Window;
use crate::ByteRange;

/// What kind of table a disk has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableKind {
    /// Master boot record.
    Mbr,
    /// GUID partition table.
    Gpt,
    /// None: the disk may be one file system.
    None,
}

/// What the table says about the use of a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PartitionType {
    /// System id of an MBR.
    Mbr(u8),
    /// Type GUID of a GPT.
    Gpt(Uuid),
}

/// One partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// Its number: as in the table, logical partitions of an MBR from 5 on.
    pub number: u32,
    /// Where it is, bytes.
    pub range: ByteRange,
    /// Its type.
    pub kind: PartitionType,
    /// Its name (GPT).
    pub name: String,
}

/// A disk's partitions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Which kind.
    pub kind: TableKind,
    /// In the order of their numbers.
    pub partitions: Vec<Partition>,
    /// What is wrong with the table though it can be used, as sentences.
    pub doubts: Vec<String>,
}

/// Reads the table of a disk.
///
/// # Errors
/// [`GuestError`] for a table that is there and cannot be used.
pub(crate) fn read(disk: &Window) -> Result<Table, GuestError> {
    let none = Table { kind: TableKind::None, partitions: Vec::new(), doubts: Vec::new() };
    if disk.len() < 512 {
        return Ok(none);
    }
    let sector = disk.bytes(0, 512)?;
    match mbr::entries(&sector, disk) {
        mbr::Found::Protective => gpt::read(disk),
        mbr::Found::Entries(primary) => mbr::read(disk, primary),
        mbr::Found::Nothing => Ok(none),
    }
}

/// What a type means, in words.
#[must_use]
pub fn type_name(kind: PartitionType) -> String {
    match kind {
        PartitionType::Mbr(id) => match mbr::type_name(id) {
            Some(name) => name.to_owned(),
            None => format!("type {id:#04x}"),
        },
        PartitionType::Gpt(id) => match gpt::type_name(id) {
            Some(name) => name.to_owned(),
            None => format!("type {id}"),
        },
    }
}

impl PartitionType {
    /// Linux swap.
    #[must_use]
    pub fn is_linux_swap(self) -> bool {
        match self {
            Self::Mbr(id) => id == 0x82,
            Self::Gpt(id) => id == gpt::LINUX_SWAP,
        }
    }

    /// A part of Windows' dynamic disks, whose volumes the table does not describe.
    #[must_use]
    pub fn is_dynamic_disk(self) -> bool {
        match self {
            Self::Mbr(id) => id == 0x42,
            Self::Gpt(id) => id == gpt::LDM_METADATA || id == gpt::LDM_DATA,
        }
    }

    /// Space that Windows keeps for itself.
    #[must_use]
    pub fn is_reserved(self) -> bool {
        self == Self::Gpt(gpt::MICROSOFT_RESERVED)
    }

    /// Storage Spaces.
    #[must_use]
    pub fn is_storage_spaces(self) -> bool {
        self == Self::Gpt(gpt::STORAGE_SPACES)
    }
}
