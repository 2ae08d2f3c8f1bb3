//! ext2, ext3 and ext4, read-only.
//!
//! | file | idea |
//! | --- | --- |
//! | `superblock` | sizes, features, state |
//! | `inode` | the facts of a file, checked by its checksum |
//! | `blocks` | which blocks a file has: extents or the older block lists |
//! | `inline` | small content kept in the inode |
//! | `directory` | names |
//!
//! Source: "ext4 Data Structures and Algorithms" of the Linux kernel's documentation. The journal is not replayed.

mod blocks;
mod directory;
mod inline;
mod inode;
mod superblock;

use inode::Inode;
use superblock::Superblock;

use super::file_system::{FileSystemFacts, fill};
use super::window::Window;
use super::{Entry, Extent, FileId, FileKind, FileSystem, GuestError, Name, Stat};
use crate::ByteRange;

/// Longest target of a symbolic link: PATH_MAX.
const MAX_TARGET: u64 = 4096;

/// An ext2, ext3 or ext4 volume.
pub struct Ext {
    window: Window,
    superblock: Superblock,
    facts: FileSystemFacts,
}

/// A run of blocks of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    /// First block in the file.
    logical: u64,
    count: u64,
    /// First block on the volume.
    physical: u64,
    /// Allocated, but never written: reads as zeros.
    unwritten: bool,
}

impl Ext {
    pub(crate) fn open(window: Window) -> Result<Self, GuestError> {
        let superblock = Superblock::read(&window)?;
        let facts = FileSystemFacts {
            kind: superblock.kind(),
            label: Name::from_bytes(superblock.label.clone()),
            size: superblock.blocks * superblock.block,
            cluster: superblock.block as u32,
            id: superblock.id.to_string(),
        };
        Ok(Self { window, superblock, facts })
    }

    fn block(&self, number: u64) -> Result<Vec<u8>, GuestError> {
        if number >= self.superblock.blocks {
            return Err(GuestError::damaged(
                "the ext file system",
                format!("it refers to block {number} of {}", self.superblock.blocks),
            ));
        }
        let size = self.superblock.block;
        self.window.bytes(number * size, size as usize)
    }

    /// Content of anything that has some; `structure`: of the file system itself.
    fn content(
        &self,
        inode: &Inode,
        offset: u64,
        buf: &mut [u8],
        structure: bool,
    ) -> Result<(), GuestError> {
        if inode.is_inline() {
            let all = inline::content(inode)?;
            let from = (offset as usize).min(all.len());
            let len = buf.len().min(all.len() - from);
            buf[..len].copy_from_slice(&all[from..from + len]);
            buf[len..].fill(0);
            return Ok(());
        }
        let size = self.superblock.block;
        let pieces: Vec<(u64, u64, Option<u64>)> = self
            .runs(inode)?
            .iter()
            .map(|r| {
                let place = (!r.unwritten).then_some(r.physical * size);
                (r.logical * size, r.count * size, place)
            })
            .collect();
        fill(offset, buf, &pieces, |place, part| {
            if structure { self.window.read(place, part) } else { self.window.content(place, part) }
        })
    }

    fn target(&self, inode: &Inode) -> Result<Option<Name>, GuestError> {
        if inode.file_kind() != FileKind::Symlink || inode.is_encrypted() {
            return Ok(None);
        }
        if inode.size > MAX_TARGET {
            return Err(GuestError::damaged(
                "a symbolic link",
                "its target is longer than a path may be",
            ));
        }
        let len = inode.size as usize;
        // Short targets are where the block list would be.
        if inode.is_fast_symlink() {
            return Ok(Some(Name::from_bytes(&inode.block_area()[..len.min(60)])));
        }
        let mut target = vec![0; len];
        self.content(inode, 0, &mut target, true)?;
        Ok(Some(Name::from_bytes(target)))
    }
}

impl FileSystem for Ext {
    fn facts(&self) -> &FileSystemFacts {
        &self.facts
    }

    fn root(&self) -> FileId {
        FileId(2)
    }

    fn case_sensitive(&self) -> bool {
        true
    }

    fn doubt(&self) -> Result<Option<String>, GuestError> {
        Ok(self.superblock.doubt().map(str::to_owned))
    }

    fn list(
        &self,
        directory: FileId,
        each: &mut dyn FnMut(Entry) -> Result<(), GuestError>,
    ) -> Result<(), GuestError> {
        let inode = self.inode(directory.0)?;
        self.entries(&inode, each)
    }

    fn stat(&self, file: FileId) -> Result<Stat, GuestError> {
        let inode = self.inode(file.0)?;
        Ok(Stat {
            kind: inode.file_kind(),
            size: if inode.file_kind() == FileKind::File { inode.size } else { 0 },
            modified: inode.time(0x10, 0x88),
            created: inode.created(),
            accessed: inode.time(0x08, 0x8c),
            mode: Some(inode.mode & 0o7777),
            owner: Some(inode.owner()),
            attributes: None,
            links: inode.links.into(),
            target: self.target(&inode)?,
            streams: Vec::new(),
            unreadable: inode
                .is_encrypted()
                .then(|| "it is encrypted (fscrypt) and the key is in the guest".to_owned()),
        })
    }

    fn read(&self, file: FileId, offset: u64, buf: &mut [u8]) -> Result<usize, GuestError> {
        let inode = self.inode(file.0)?;
        if inode.is_encrypted() {
            return Err(GuestError::unsupported(
                "the content of this file",
                "it is encrypted (fscrypt) and the key is in the guest",
            ));
        }
        let len = inode.size.saturating_sub(offset).min(buf.len() as u64) as usize;
        if inode.file_kind() != FileKind::File || len == 0 {
            return Ok(0);
        }
        self.content(&inode, offset, &mut buf[..len], false)?;
        Ok(len)
    }

    fn extents(&self, file: FileId) -> Result<Vec<Extent>, GuestError> {
        let no = |reason| Err(GuestError::NoExtents { reason });
        let inode = self.inode(file.0)?;
        if inode.file_kind() != FileKind::File {
            return no("is not a regular file's");
        }
        if inode.is_encrypted() {
            return no("is encrypted (fscrypt)");
        }
        if inode.is_inline() {
            return no("is kept in the inode");
        }
        if inode.size == 0 {
            return no("is empty");
        }
        let size = self.superblock.block;
        let runs = self.runs(&inode)?;
        let mut next = 0;
        for run in &runs {
            if run.logical != next {
                return no("is sparse");
            }
            next = run.logical + run.count;
        }
        if next * size < inode.size {
            return no("is sparse");
        }
        Ok(runs
            .iter()
            .map(|r| Extent {
                file_offset: r.logical * size,
                disk: ByteRange::new(self.window.on_disk(r.physical * size), r.count * size),
            })
            .collect())
    }
}
