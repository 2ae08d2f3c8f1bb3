//! Content that is kept in the inode: the first 60 bytes where the block list would be, the rest as the extended
//! attribute `system.data`.

use super::super::GuestError;
use super::super::bytes::{slice, u8_at, u16_at, u32_at};
use super::inode::Inode;

const MAGIC: u32 = 0xea02_0000;
/// Name index of `system.`
const SYSTEM: u8 = 7;

pub(super) fn content(inode: &Inode) -> Result<Vec<u8>, GuestError> {
    let mut out = inode.block_area().to_vec();
    if let Some(rest) = system_data(inode.extra()) {
        out.extend_from_slice(rest);
    }
    if (out.len() as u64) < inode.size {
        return Err(GuestError::damaged(
            "a file kept in its inode",
            "it is longer than what is there",
        ));
    }
    out.truncate(inode.size as usize);
    Ok(out)
}

fn system_data(extra: &[u8]) -> Option<&[u8]> {
    if u32_at(extra, 0) != MAGIC {
        return None;
    }
    let entries = extra.get(4..)?;
    let mut at = 0;
    while u32_at(entries, at) != 0 {
        let len = usize::from(u8_at(entries, at));
        let name = slice(entries, at + 16, len)?;
        if u8_at(entries, at + 1) == SYSTEM && name == b"data" && u32_at(entries, at + 4) == 0 {
            return slice(
                entries,
                u16_at(entries, at + 2).into(),
                u32_at(entries, at + 8) as usize,
            );
        }
        at += (16 + len).next_multiple_of(4);
    }
    None
}
