//! The superblock, 1024 bytes into the volume.

use uuid::Uuid;

use super::super::bytes::{array, slice, u16_at, u32_at};
use super::super::window::Window;
use super::super::{FileSystemKind, GuestError};

/// Features that change how a reader must work.
pub(super) mod incompat {
    pub(in super::super) const RECOVER: u32 = 0x4;
    pub(in super::super) const META_BG: u32 = 0x10;
    pub(in super::super) const EXTENTS: u32 = 0x40;
    pub(in super::super) const BIT64: u32 = 0x80;
    pub(in super::super) const CSUM_SEED: u32 = 0x2000;
    /// FILETYPE, EXTENTS, MMP, FLEX_BG, EA_INODE, LARGEDIR, INLINE_DATA, ENCRYPT, CASEFOLD, and those above.
    pub(in super::super) const KNOWN: u32 = 0x2
        | RECOVER
        | META_BG
        | EXTENTS
        | BIT64
        | 0x100
        | 0x200
        | 0x400
        | CSUM_SEED
        | 0x4000
        | 0x8000
        | 0x10000
        | 0x20000;
}
const HAS_JOURNAL: u32 = 0x4;
const METADATA_CSUM: u32 = 0x400;

/// What the superblock says.
#[derive(Debug, Clone)]
pub(super) struct Superblock {
    /// Bytes of a block.
    pub(super) block: u64,
    pub(super) blocks: u64,
    pub(super) inodes: u32,
    pub(super) inodes_per_group: u32,
    pub(super) inode_size: u16,
    pub(super) label: Vec<u8>,
    pub(super) id: Uuid,
    /// Start of all checksums of structures; `None`: they have none.
    pub(super) seed: Option<u32>,
    compat: u32,
    incompat: u32,
    state: u16,
    errors: u32,
    first_data_block: u64,
    blocks_per_group: u64,
    first_meta_bg: u64,
    descriptor: u64,
}

/// CRC-32C as ext4 has it: neither inverted before nor after.
pub(super) fn checksum(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}

impl Superblock {
    pub(super) fn read(window: &Window) -> Result<Self, GuestError> {
        let bad =
            |detail: String| GuestError::damaged("the superblock of the ext file system", detail);
        let bytes = window.bytes(1024, 1024)?;
        let incompat = u32_at(&bytes, 0x60);
        let unknown = incompat & !incompat::KNOWN;
        if unknown != 0 {
            return Err(GuestError::unsupported(
                "the ext file system",
                format!("it uses features ({unknown:#x}) that this release does not know"),
            ));
        }
        let id = Uuid::from_bytes(array(&bytes, 0x68));
        let summed = u32_at(&bytes, 0x64) & METADATA_CSUM != 0;
        if summed && checksum(!0, &bytes[..1020]) != u32_at(&bytes, 1020) {
            return Err(bad("its checksum is wrong".into()));
        }
        let seed = summed.then(|| {
            if incompat & incompat::CSUM_SEED != 0 {
                u32_at(&bytes, 0x270)
            } else {
                checksum(!0, id.as_bytes())
            }
        });
        let log = u32_at(&bytes, 0x18);
        if log > 6 {
            return Err(bad(format!("it claims blocks of 2^{log} KiB")));
        }
        let block = 1024_u64 << log;
        let wide = incompat & incompat::BIT64 != 0;
        let high = if wide { u64::from(u32_at(&bytes, 0x150)) << 32 } else { 0 };
        let blocks = high | u64::from(u32_at(&bytes, 4));
        if blocks.checked_mul(block).is_none_or(|size| size > window.len()) {
            return Err(bad(format!(
                "it claims {blocks} blocks of {block} bytes, more than its partition has"
            )));
        }
        let inode_size = if u32_at(&bytes, 0x4c) == 0 { 128 } else { u16_at(&bytes, 0x58) };
        let (per_group, blocks_per_group) = (u32_at(&bytes, 0x28), u64::from(u32_at(&bytes, 0x20)));
        let descriptor = if wide { u64::from(u16_at(&bytes, 0xfe)) } else { 32 };
        let sane = (128..=4096).contains(&inode_size)
            && inode_size.is_power_of_two()
            && u64::from(inode_size) <= block
            && per_group > 0
            && blocks_per_group > 0
            && (32..=1024).contains(&descriptor)
            && descriptor.is_power_of_two();
        if !sane {
            return Err(bad("its sizes are impossible".into()));
        }
        let label = slice(&bytes, 0x78, 16).unwrap_or_default();
        Ok(Self {
            block,
            blocks,
            inodes: u32_at(&bytes, 0),
            inodes_per_group: per_group,
            inode_size,
            label: label.split(|b| *b == 0).next().unwrap_or_default().to_vec(),
            id,
            seed,
            compat: u32_at(&bytes, 0x5c),
            incompat,
            state: u16_at(&bytes, 0x3a),
            errors: u32_at(&bytes, 0x194),
            first_data_block: u32_at(&bytes, 0x14).into(),
            blocks_per_group,
            first_meta_bg: u32_at(&bytes, 0x104).into(),
            descriptor,
        })
    }

    pub(super) fn kind(&self) -> FileSystemKind {
        if self.incompat & (incompat::EXTENTS | incompat::BIT64 | 0x200) != 0 {
            FileSystemKind::Ext4
        } else if self.compat & HAS_JOURNAL != 0 {
            FileSystemKind::Ext3
        } else {
            FileSystemKind::Ext2
        }
    }

    pub(super) fn doubt(&self) -> Option<&'static str> {
        const VALID: u16 = 1;
        const ERROR: u16 = 2;
        const ORPHANS: u16 = 4;
        if self.incompat & incompat::RECOVER != 0 {
            Some(
                "its journal has to be replayed: the guest has it in use, or did not unmount it in order",
            )
        } else if self.state & ERROR != 0 || self.errors != 0 {
            Some("the guest found errors in it")
        } else if self.state & VALID == 0 || self.state & ORPHANS != 0 {
            Some("the guest has it in use, or did not unmount it in order")
        } else {
            None
        }
    }

    /// Bytes of a group descriptor that hold the block of its inode table: (offset on the volume, length).
    pub(super) fn descriptor_of(&self, group: u64) -> (u64, usize) {
        let per_block = self.block / self.descriptor;
        let (block, within) = (group / per_block, group % per_block * self.descriptor);
        let place = if self.incompat & incompat::META_BG == 0 || block < self.first_meta_bg {
            self.first_data_block + 1 + block
        } else {
            // A meta group keeps its own descriptors, at the start of its first group.
            let first_group = block * per_block;
            let start = self
                .first_data_block
                .saturating_add(first_group.saturating_mul(self.blocks_per_group));
            start + u64::from(self.has_backup(first_group))
        };
        (place.saturating_mul(self.block).saturating_add(within), self.descriptor as usize)
    }

    /// Whether a group begins with a copy of the superblock. Meta groups are only met beyond the first.
    fn has_backup(&self, group: u64) -> bool {
        let power_of = |base: u64| {
            let mut n = group;
            while n > 1 && n.is_multiple_of(base) {
                n /= base;
            }
            n == 1
        };
        group == 0 || power_of(3) || power_of(5) || power_of(7)
    }
}
