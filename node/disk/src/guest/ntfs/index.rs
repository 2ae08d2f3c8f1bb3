//! Directories: the index `$I30` of file names, a tree whose nodes are looked at one after the other, since their order
//! does not matter here and a tree that loops cannot be met that way.

use super::super::bytes::{slice, u8_at, u16_at, u32_at, u64_at};
use super::super::{GuestError, Name};
use super::Ntfs;
use super::file::File;
use super::record::{Body, fix_up, kind};

/// `$I30`
const NAME: [u16; 4] = [b'$' as u16, b'I' as u16, b'3' as u16, b'0' as u16];
/// Bits that a bitmap of index nodes may have: 2^24 nodes of 4 KiB are 64 GiB of names.
const MAX_BITMAP: u64 = 2 << 20;

/// A file name as a directory keeps it.
pub(super) struct IndexName {
    /// Record and, in the upper 16 bits, its use.
    pub(super) id: u64,
    pub(super) name: Name,
    pub(super) attributes: u32,
    pub(super) reparse_tag: u32,
    /// A short name that exists beside a long one.
    pub(super) dos_only: bool,
}

impl Ntfs {
    pub(super) fn index(
        &self,
        file: &File,
        each: &mut dyn FnMut(IndexName) -> Result<(), GuestError>,
    ) -> Result<(), GuestError> {
        let bad = |detail: &str| GuestError::damaged("a directory", detail);
        let root = match file.attribute(kind::INDEX_ROOT, &NAME).map(|a| &a.body) {
            Some(Body::Resident(root)) => root,
            _ => return Err(bad("it has no index of names")),
        };
        let node = root.get(16..).ok_or_else(|| bad("its index is cut off"))?;
        entries(node, each)?;
        let Some(allocation) = file.attribute(kind::INDEX_ALLOCATION, &NAME) else {
            return Ok(());
        };
        let Body::NonResident(body) = &allocation.body else {
            return Err(bad("its index nodes are resident"));
        };
        let size = u64::from(u32_at(root, 8));
        if !(512..=65536).contains(&size) || size % 512 != 0 {
            return Err(bad("its index nodes have an impossible size"));
        }
        let bitmap =
            file.attribute(kind::BITMAP, &NAME).ok_or_else(|| bad("its index has no bitmap"))?;
        let bitmap = self.value(bitmap, MAX_BITMAP)?;
        let runs = self.runs(body)?;
        for number in 0..body.size / size {
            let Some(byte) = bitmap.get((number / 8) as usize) else { break };
            if byte >> (number % 8) & 1 == 0 {
                continue;
            }
            let mut node = vec![0; size as usize];
            self.plain(&runs, body, number * size, &mut node, true)?;
            if !node.starts_with(b"INDX") {
                return Err(bad("a node of its index does not begin with INDX"));
            }
            fix_up(&mut node).map_err(|e| bad(&format!("a node of its index {e}")))?;
            entries(&node[24..], each)?;
        }
        Ok(())
    }
}

/// The entries of a node, which begins with the index header.
fn entries(
    node: &[u8],
    each: &mut dyn FnMut(IndexName) -> Result<(), GuestError>,
) -> Result<(), GuestError> {
    const LAST: u16 = 2;
    let bad = |detail: &str| GuestError::damaged("a directory", detail);
    let (mut at, end) = (u32_at(node, 0) as usize, u32_at(node, 4) as usize);
    if end > node.len() {
        return Err(bad("a node of its index is cut off"));
    }
    loop {
        let len = usize::from(u16_at(node, at + 8));
        let entry = slice(&node[..end], at, len)
            .filter(|_| len >= 16 && len % 8 == 0)
            .ok_or_else(|| bad("an entry of its index is cut off"))?;
        if u16_at(entry, 12) & LAST != 0 {
            return Ok(());
        }
        let key = slice(entry, 16, u16_at(entry, 10).into())
            .ok_or_else(|| bad("a name of its index is cut off"))?;
        let name = slice(key, 66, usize::from(u8_at(key, 64)) * 2)
            .ok_or_else(|| bad("a name of its index is cut off"))?;
        each(IndexName {
            id: u64_at(entry, 0),
            name: Name::from_utf16le(name),
            attributes: u32_at(key, 56),
            reparse_tag: u32_at(key, 60),
            dos_only: u8_at(key, 65) == 2,
        })?;
        at += len;
    }
}
