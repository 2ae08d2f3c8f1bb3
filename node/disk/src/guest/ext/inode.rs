//! Inodes.

use super::super::bytes::{slice, u16_at, u32_at};
use super::super::{FileKind, GuestError, GuestTime};
use super::Ext;
use super::superblock::checksum;

mod flag {
    pub(super) const ENCRYPTED: u32 = 0x800;
    pub(super) const EXTENTS: u32 = 0x8_0000;
    pub(super) const INLINE: u32 = 0x1000_0000;
}

/// A file's inode.
#[derive(Debug, Clone)]
pub(super) struct Inode {
    pub(super) number: u64,
    pub(super) mode: u16,
    pub(super) size: u64,
    pub(super) links: u16,
    pub(super) flags: u32,
    pub(super) generation: u32,
    bytes: Vec<u8>,
}

impl Ext {
    pub(super) fn inode(&self, number: u64) -> Result<Inode, GuestError> {
        let bad = |detail: String| GuestError::damaged("an inode", detail);
        let s = &self.superblock;
        if number == 0 || number > s.inodes.into() {
            return Err(bad(format!("inode {number} of {} does not exist", s.inodes)));
        }
        let (group, index) = (
            (number - 1) / u64::from(s.inodes_per_group),
            (number - 1) % u64::from(s.inodes_per_group),
        );
        let (offset, len) = s.descriptor_of(group);
        let descriptor = self.window.bytes(offset, len)?;
        let high = if len >= 64 { u64::from(u32_at(&descriptor, 0x28)) << 32 } else { 0 };
        let table = high | u64::from(u32_at(&descriptor, 8));
        if table == 0 || table >= s.blocks {
            return Err(bad(format!("the inode table of group {group} is at block {table}")));
        }
        let size = u64::from(s.inode_size);
        let bytes = self.window.bytes(table * s.block + index * size, size as usize)?;
        let inode = Inode {
            number,
            mode: u16_at(&bytes, 0),
            size: u64::from(u32_at(&bytes, 4)) | u64::from(u32_at(&bytes, 0x6c)) << 32,
            links: u16_at(&bytes, 0x1a),
            flags: u32_at(&bytes, 0x20),
            generation: u32_at(&bytes, 0x64),
            bytes,
        };
        if let Some(seed) = s.seed {
            inode
                .check(seed)
                .map_err(|()| bad(format!("the checksum of inode {number} is wrong")))?;
        }
        if inode.links == 0 || inode.mode == 0 {
            return Err(bad(format!("inode {number} is not in use")));
        }
        Ok(inode)
    }
}

impl Inode {
    pub(super) fn file_kind(&self) -> FileKind {
        match self.mode & 0xf000 {
            0x8000 => FileKind::File,
            0x4000 => FileKind::Directory,
            0xa000 => FileKind::Symlink,
            _ => FileKind::Other,
        }
    }

    pub(super) fn is_encrypted(&self) -> bool {
        self.flags & flag::ENCRYPTED != 0
    }

    pub(super) fn has_extents(&self) -> bool {
        self.flags & flag::EXTENTS != 0
    }

    pub(super) fn is_inline(&self) -> bool {
        self.flags & flag::INLINE != 0
    }

    pub(super) fn is_fast_symlink(&self) -> bool {
        !self.is_inline() && !self.has_extents() && self.size < 60
    }

    /// The 60 bytes of block list, extents, short link or inline content.
    pub(super) fn block_area(&self) -> &[u8] {
        slice(&self.bytes, 0x28, 60).unwrap_or(&[0; 60])
    }

    /// Bytes behind the fixed fields: extended attributes.
    pub(super) fn extra(&self) -> &[u8] {
        if self.bytes.len() <= 128 {
            return &[];
        }
        self.bytes.get(128 + usize::from(u16_at(&self.bytes, 0x80))..).unwrap_or_default()
    }

    pub(super) fn owner(&self) -> (u32, u32) {
        let id = |low: usize, high: usize| {
            u32::from(u16_at(&self.bytes, low)) | u32::from(u16_at(&self.bytes, high)) << 16
        };
        (id(2, 0x78), id(0x18, 0x7a))
    }

    /// A time with its extension: two more bits of seconds, 30 bits of nanoseconds.
    pub(super) fn time(&self, at: usize, extra: usize) -> Option<GuestTime> {
        let seconds = i64::from(u32_at(&self.bytes, at) as i32);
        let more = if self.has(extra) { u32_at(&self.bytes, extra) } else { 0 };
        Some(GuestTime::utc(seconds + (i64::from(more & 3) << 32), more >> 2))
    }

    pub(super) fn created(&self) -> Option<GuestTime> {
        if self.has(0x94) { self.time(0x90, 0x94) } else { None }
    }

    /// Whether the inode is long enough for the field of four bytes at `at`.
    fn has(&self, at: usize) -> bool {
        self.bytes.len() > 128 && at + 4 <= 128 + usize::from(u16_at(&self.bytes, 0x80))
    }

    pub(super) fn seed(&self, seed: u32) -> u32 {
        let seed = checksum(seed, &(self.number as u32).to_le_bytes());
        checksum(seed, &self.generation.to_le_bytes())
    }

    fn check(&self, seed: u32) -> Result<(), ()> {
        let high = self.has(0x80) && u16_at(&self.bytes, 0x80) >= 4;
        let mut bytes = self.bytes.clone();
        bytes[0x7c..0x7e].fill(0);
        let mut expected = u32::from(u16_at(&self.bytes, 0x7c));
        if high {
            bytes[0x82..0x84].fill(0);
            expected |= u32::from(u16_at(&self.bytes, 0x82)) << 16;
        }
        let mut found = checksum(self.seed(seed), &bytes);
        if !high {
            found &= 0xffff;
        }
        (found == expected).then_some(()).ok_or(())
    }
}
