//! What a volume holds, told by signatures.

use std::fmt;

use super::bytes::{slice, u8_at, u16_at, u32_at};
use super::partition::PartitionType;
use super::swap::{SwapArea, SwapContent};
use super::window::Window;
use super::{GuestError, swap};

/// A file system that we read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileSystemKind {
    /// NTFS.
    Ntfs,
    /// FAT with 12-bit entries.
    Fat12,
    /// FAT with 16-bit entries.
    Fat16,
    /// FAT with 32-bit entries.
    Fat32,
    /// ext2.
    Ext2,
    /// ext3.
    Ext3,
    /// ext4.
    Ext4,
}

impl fmt::Display for FileSystemKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ntfs => "NTFS",
            Self::Fat12 => "FAT12",
            Self::Fat16 => "FAT16",
            Self::Fat32 => "FAT32",
            Self::Ext2 => "ext2",
            Self::Ext3 => "ext3",
            Self::Ext4 => "ext4",
        })
    }
}

/// What a volume holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// A file system of this family; its own structures decide the rest.
    FileSystem(Family),
    /// A Linux swap area.
    Swap(SwapArea),
    /// A Linux swap area that holds something else than swapped pages.
    SwapInUse {
        /// What.
        what: &'static str,
    },
    /// Something that we know and do not read.
    NotReadable {
        /// What it is.
        what: &'static str,
        /// Why it is not read.
        reason: &'static str,
    },
    /// Zeros where signatures would be.
    Empty,
    /// Nothing that we know.
    Unknown,
}

/// A family of file systems.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// NTFS.
    Ntfs,
    /// FAT12, FAT16, FAT32.
    Fat,
    /// ext2, ext3, ext4.
    Ext,
}

const ENCRYPTED: &str = "its content is encrypted and the key is in the guest";
const NO_READER: &str = "there is no reader for it";
const MANY_DISKS: &str =
    "its volumes may lie on several disks and are described elsewhere than in the partition table";

/// Looks at a volume. `kind` is what the partition table says of it.
pub(crate) fn recognise(
    volume: &Window,
    kind: Option<PartitionType>,
) -> Result<Content, GuestError> {
    let known = |what, reason| Ok(Content::NotReadable { what, reason });
    if kind.is_some_and(PartitionType::is_dynamic_disk) {
        return known("a dynamic disk of Windows (LDM)", MANY_DISKS);
    }
    if kind.is_some_and(PartitionType::is_storage_spaces) {
        return known("Storage Spaces", MANY_DISKS);
    }
    let head = volume.bytes(0, volume.len().min(HEAD) as usize)?;
    for (at, magic, what, reason) in SIGNATURES {
        if slice(&head, at, magic.len()) == Some(magic) {
            return known(what, reason);
        }
    }
    // The label of a physical volume is in one of the first four sectors.
    if (0..4).any(|s| slice(&head, s * 512, 8) == Some(b"LABELONE")) {
        return known("an LVM physical volume", MANY_DISKS);
    }
    match swap::recognise(&head, volume.len()) {
        Some(SwapContent::Pages(area)) => return Ok(Content::Swap(area)),
        Some(SwapContent::Other(what)) => return Ok(Content::SwapInUse { what }),
        None => {}
    }
    if slice(&head, 3, 8) == Some(b"NTFS    ") && u16_at(&head, 510) == 0xaa55 {
        return Ok(Content::FileSystem(Family::Ntfs));
    }
    if u16_at(&head, 1024 + 0x38) == 0xef53 {
        return Ok(Content::FileSystem(Family::Ext));
    }
    if is_fat(&head) {
        return Ok(Content::FileSystem(Family::Fat));
    }
    if head.iter().all(|b| *b == 0) {
        return Ok(Content::Empty);
    }
    Ok(Content::Unknown)
}

/// Bytes looked at: up to behind the superblock of btrfs.
const HEAD: u64 = 0x10000 + 512;

type Signature = (usize, &'static [u8], &'static str, &'static str);

const SIGNATURES: [Signature; 15] = [
    (3, b"-FVE-FS-", "a BitLocker volume", ENCRYPTED),
    (0, b"LUKS\xba\xbe", "a LUKS volume", ENCRYPTED),
    (3, b"ReFS\0\0\0\0", "ReFS", NO_READER),
    (3, b"EXFAT   ", "exFAT", NO_READER),
    (0, b"XFSB", "XFS", NO_READER),
    (0x10040, b"_BHRfS_M", "btrfs", NO_READER),
    (32, b"NXSB", "APFS", NO_READER),
    (1024, b"H+\0\x04", "HFS+", NO_READER),
    (1024, b"\x10\x20\xf5\xf2", "F2FS", NO_READER),
    (32769, b"CD001", "ISO 9660", NO_READER),
    (0, b"hsqs", "squashfs", NO_READER),
    (0, b"bcachefs", "bcachefs", NO_READER),
    (4096, b"\xfc\x4e\x2b\xa9", "a member of a Linux RAID", MANY_DISKS),
    (0, b"\xfc\x4e\x2b\xa9", "a member of a Linux RAID", MANY_DISKS),
    (0, b"SPACEDB ", "Storage Spaces", MANY_DISKS),
];

/// A FAT has no certain signature: everything that its boot sector must say has to be sane.
fn is_fat(sector: &[u8]) -> bool {
    let bytes = u16_at(sector, 11);
    let per_cluster = u8_at(sector, 13);
    let size16 = u16_at(sector, 22);
    let size32 = u32_at(sector, 36);
    matches!(u8_at(sector, 0), 0xeb | 0xe9)
        && u16_at(sector, 510) == 0xaa55
        && matches!(bytes, 512 | 1024 | 2048 | 4096)
        && per_cluster.is_power_of_two()
        && u16_at(sector, 14) > 0
        && matches!(u8_at(sector, 16), 1 | 2)
        && (u8_at(sector, 21) == 0xf0 || u8_at(sector, 21) >= 0xf8)
        && (u16_at(sector, 19) != 0 || u32_at(sector, 32) != 0)
        && (size16 != 0 || size32 != 0)
}
