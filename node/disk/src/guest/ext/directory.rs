//! Directories: lists of entries in blocks. The nodes of hashed directories look like blocks with one unused entry, so
//! all blocks are read in order.

use super::super::bytes::{slice, u8_at, u16_at, u32_at};
use super::super::{Entry, FileId, FileKind, GuestError, Name};
use super::inode::Inode;
use super::{Ext, inline};

impl Ext {
    pub(super) fn entries(
        &self,
        inode: &Inode,
        each: &mut dyn FnMut(Entry) -> Result<(), GuestError>,
    ) -> Result<(), GuestError> {
        if inode.file_kind() != FileKind::Directory {
            return Err(GuestError::damaged(
                "a directory",
                format!("inode {} is not one of a directory", inode.number),
            ));
        }
        if inode.is_encrypted() {
            return Err(GuestError::unsupported(
                "the directory",
                "its names are encrypted (fscrypt) and the key is in the guest",
            ));
        }
        if inode.is_inline() {
            // The number of the parent comes first, and each of the two parts is a list of its own.
            let all = inline::content(inode)?;
            let (first, second) = all.split_at(all.len().min(60));
            self.parse(first.get(4..).unwrap_or_default(), each)?;
            return self.parse(second, each);
        }
        let size = self.superblock.block;
        let mut block = vec![0; size as usize];
        for run in self.runs(inode)? {
            for i in 0..run.count {
                if (run.logical + i) * size >= inode.size {
                    return Ok(());
                }
                if !run.unwritten {
                    self.window.read((run.physical + i) * size, &mut block)?;
                    self.parse(&block, each)?;
                }
            }
        }
        Ok(())
    }

    fn parse(
        &self,
        block: &[u8],
        each: &mut dyn FnMut(Entry) -> Result<(), GuestError>,
    ) -> Result<(), GuestError> {
        let bad = |detail: &str| GuestError::damaged("a directory", detail);
        let mut at = 0;
        while at + 8 <= block.len() {
            let len = match u16_at(block, at + 4) {
                // A block of 64 KiB does not fit the field.
                0 | 0xffff if block.len() == 65536 => block.len() - at,
                0 if block[at..].iter().all(|b| *b == 0) => return Ok(()),
                len => len.into(),
            };
            let entry = slice(block, at, len)
                .filter(|_| len >= 8 && len % 4 == 0)
                .ok_or_else(|| bad("an entry is cut off"))?;
            at += len;
            let number = u32_at(entry, 0);
            if number == 0 {
                continue;
            }
            let name =
                slice(entry, 8, u8_at(entry, 6).into()).ok_or_else(|| bad("a name is cut off"))?;
            if name == b"." || name == b".." {
                continue;
            }
            if name.is_empty() || name.contains(&b'/') || name.contains(&0) {
                return Err(bad("a name is impossible"));
            }
            let kind = match u8_at(entry, 7) {
                1 => FileKind::File,
                2 => FileKind::Directory,
                7 => FileKind::Symlink,
                // Directories without file types.
                0 => self.inode(number.into())?.file_kind(),
                _ => FileKind::Other,
            };
            each(Entry { name: Name::from_bytes(name), id: FileId(number.into()), kind })?;
        }
        Ok(())
    }
}
