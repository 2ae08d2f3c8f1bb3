//! Reparse points: links, and files whose content is elsewhere.

use super::super::Name;
use super::super::bytes::{slice, u16_at, u32_at};
use super::file::File;
use super::record::kind;

const SYMLINK: u32 = 0xa000_000c;
const MOUNT_POINT: u32 = 0xa000_0003;
/// WSL.
const LX_SYMLINK: u32 = 0xa000_001d;

/// FILE_ATTRIBUTE_REPARSE_POINT.
const REPARSE_POINT: u32 = 0x400;

/// Whether a directory entry is a link.
pub(super) fn is_link(attributes: u32, tag: u32) -> bool {
    attributes & REPARSE_POINT != 0 && matches!(tag, SYMLINK | MOUNT_POINT | LX_SYMLINK)
}

/// Where a link leads.
pub(super) fn link(file: &File) -> Option<Name> {
    let value = file.resident(kind::REPARSE_POINT)?;
    let data = value.get(8..)?;
    let utf16 = |header: usize| {
        // Substitute name, print name: offset and length of each; the second is for people.
        let pick = |at: usize| {
            let bytes =
                slice(data, header + usize::from(u16_at(data, at)), u16_at(data, at + 2).into())?;
            (!bytes.is_empty()).then(|| Name::from_utf16le(bytes))
        };
        pick(4).or_else(|| pick(0))
    };
    match u32_at(value, 0) {
        SYMLINK => utf16(12),
        MOUNT_POINT => utf16(8),
        LX_SYMLINK => Some(Name::from_bytes(data.get(4..)?)),
        _ => None,
    }
}

/// Why the unnamed stream is not what the guest would read, if so.
pub(super) fn why_unreadable(file: &File) -> Option<String> {
    let value = file.resident(kind::REPARSE_POINT)?;
    let what = match u32_at(value, 0) {
        SYMLINK | MOUNT_POINT | LX_SYMLINK => return None,
        // AF_UNIX sockets, WSL devices and pipes.
        0x8000_0023..=0x8000_0026 => return None,
        0x8000_0013 => "it is kept by the data deduplication of Windows Server".to_owned(),
        0x8000_0017 => "it is compressed by the Windows Overlay Filter".to_owned(),
        tag if tag & 0xffff_0fff == 0x9000_001a => "it may be in a cloud (cloud files)".to_owned(),
        tag => format!("it is kept by the owner of reparse tag {tag:#010x}"),
    };
    Some(what)
}
