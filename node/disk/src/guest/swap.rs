//! The header of a Linux swap area: one page at its start, with a signature in the page's last ten bytes.

use uuid::Uuid;

use super::bytes::{array, slice, u32_at};

/// Page sizes that Linux has.
const PAGES: [usize; 4] = [4096, 8192, 16384, 65536];

/// A swap area by its header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SwapArea {
    /// Size of a page, bytes.
    pub page: u32,
    /// Bytes of the area, header included. It may be smaller than the partition or file.
    pub len: u64,
    /// UUID.
    pub id: Uuid,
}

/// What something with a swap signature is.
pub(crate) enum SwapContent {
    /// Swapped pages, which are worth nothing after a restart.
    Pages(SwapArea),
    /// Something that must be kept, or a header that is not understood.
    Other(&'static str),
}

/// Looks at the first page (64 KiB, or what there is) of an area of `len` bytes.
pub(crate) fn recognise(head: &[u8], len: u64) -> Option<SwapContent> {
    for page in PAGES {
        let Some(signature) = slice(head, page - 10, 10) else { continue };
        if signature == b"SWAPSPACE2" {
            return Some(match area(head, page, len) {
                Some(area) => SwapContent::Pages(area),
                None => SwapContent::Other("a swap area whose header is not understood"),
            });
        }
        let hibernated: [&[u8]; 6] = [
            b"S1SUSPEND",
            b"S2SUSPEND",
            b"ULSUSPEND",
            b"LINHIB0001",
            b"TOI\0",
            b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c",
        ];
        if hibernated.iter().any(|s| signature.starts_with(s)) {
            return Some(SwapContent::Other("a hibernation image in a swap area"));
        }
        if signature == b"SWAP-SPACE" {
            return Some(SwapContent::Other("a swap area of the first, abandoned format"));
        }
    }
    None
}

fn area(head: &[u8], page: usize, len: u64) -> Option<SwapArea> {
    let (version, last) = (u32_at(head, 1024), u32_at(head, 1028));
    let used = (u64::from(last) + 1) * page as u64;
    // An area made on a machine of the other byte order has another version.
    (version == 1 && last > 0 && used <= len).then(|| SwapArea {
        page: page as u32,
        len: used,
        id: Uuid::from_bytes(array(head, 1036)),
    })
}
