//! Pages: the inner nodes and leaves of a disk's chunk tree, and the links of a manifest.
//!
//! A page's clear bytes are its *links*, so that storage nodes can walk a tree without any key; its sealed part is empty
//! and only authenticates them. A disk of `n` chunks has `ceil(n / 128)` leaf pages, and as many inner levels as it takes to
//! reach one page. A subtree of zeros is the hole id; nothing is stored for it.
//!
//! ```text
//! links:  0 1 version (1) · 1 1 node: 1 page, 3 manifest · 2 1 level (page: 1 leaf, 2.. inner; manifest: 0) · 3 1 zero
//!         4 4 count · then, page: count x 32 byte id (children of level - 1; level 0 is data)
//!                       manifest: count x (1 byte level of the child, 32 byte id)
//! ```

use crate::ids::ChunkId;
use crate::wire::{DecodeError, Put, Reader};

/// Children of a page.
pub const FANOUT: usize = 128;
/// Version of the links.
pub const LINKS_VERSION: u8 = 1;
/// Most links of a manifest: configuration chunks and one tree a layer of each disk.
pub const MAX_MANIFEST_LINKS: usize = 65_536;
/// Deepest tree: 128^6 chunks of 64 KiB are far beyond 64 TiB.
pub const MAX_LEVEL: u8 = 6;

const NODE_PAGE: u8 = 1;
const NODE_MANIFEST: u8 = 3;

/// A child of a page or manifest: its level (0 = data chunk) and id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// 0: a data chunk; 1: a leaf page; 2..: an inner page.
    pub level: u8,
    /// Id; [`ChunkId::HOLE`] for zeros.
    pub id: ChunkId,
}

/// The clear bytes of a page or manifest record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Links {
    /// A page: up to 128 children of `level - 1`.
    Page {
        /// 1 for a leaf page.
        level: u8,
        /// Children in order; positions past the end of the disk are absent.
        children: Vec<ChunkId>,
    },
    /// A manifest: children of any level.
    Manifest(Vec<Link>),
}

impl Links {
    /// Encodes the links.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Page { level, children } => {
                out.extend_from_slice(&[LINKS_VERSION, NODE_PAGE, *level, 0]);
                out.put_u32(children.len() as u32);
                for id in children {
                    out.extend_from_slice(&id.0);
                }
            }
            Self::Manifest(links) => {
                out.extend_from_slice(&[LINKS_VERSION, NODE_MANIFEST, 0, 0]);
                out.put_u32(links.len() as u32);
                for link in links {
                    out.push(link.level);
                    out.extend_from_slice(&link.id.0);
                }
            }
        }
        out
    }

    /// Decodes the clear bytes of a record of kind page.
    ///
    /// # Errors
    /// [`DecodeError`] naming the field.
    pub fn decode(clear: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new("links", clear);
        let version = r.u8()?;
        if version != LINKS_VERSION {
            return Err(value("links version", version, "1"));
        }
        let node = r.u8()?;
        let level = r.u8()?;
        let _zero = r.u8()?;
        let links = match node {
            NODE_PAGE => {
                let count = r.count(ChunkId::LEN)?;
                if count > FANOUT {
                    return Err(value("page child count", count, "at most 128"));
                }
                if level == 0 || level > MAX_LEVEL {
                    return Err(value("page level", level, "1 to 6"));
                }
                let children =
                    (0..count).map(|_| Ok(ChunkId(r.array()?))).collect::<Result<_, _>>()?;
                Self::Page { level, children }
            }
            NODE_MANIFEST => {
                let count = r.count(1 + ChunkId::LEN)?;
                if count > MAX_MANIFEST_LINKS {
                    return Err(value("manifest link count", count, "at most 65536"));
                }
                let links = (0..count)
                    .map(|_| Ok(Link { level: r.u8()?, id: ChunkId(r.array()?) }))
                    .collect::<Result<Vec<_>, DecodeError>>()?;
                if let Some(bad) = links.iter().find(|l| l.level > MAX_LEVEL) {
                    return Err(value("manifest link level", bad.level, "0 to 6"));
                }
                Self::Manifest(links)
            }
            n => return Err(value("links node", n, "1 or 3")),
        };
        r.finish()?;
        Ok(links)
    }

    /// All children that are not holes.
    pub fn children(&self) -> impl Iterator<Item = Link> + '_ {
        let (page, manifest): (&[ChunkId], &[Link]) = match self {
            Self::Page { children, .. } => (children, &[]),
            Self::Manifest(links) => (&[], links),
        };
        let below = match self {
            Self::Page { level, .. } => level - 1,
            Self::Manifest(_) => 0,
        };
        page.iter()
            .map(move |&id| Link { level: below, id })
            .chain(manifest.iter().copied())
            .filter(|l| !l.id.is_hole())
    }
}

fn value(what: &'static str, found: impl ToString, expected: &'static str) -> DecodeError {
    DecodeError::Value { what, found: found.to_string(), expected }
}

/// Number of chunks of a disk.
#[must_use]
pub const fn chunks_of(disk_bytes: u64, chunk_size: u32) -> u64 {
    disk_bytes.div_ceil(chunk_size as u64)
}

/// Number of leaf pages of a disk; at least one, so that an empty disk has a tree too.
#[must_use]
pub const fn leaves_of(disk_bytes: u64, chunk_size: u32) -> u64 {
    let n = chunks_of(disk_bytes, chunk_size).div_ceil(FANOUT as u64);
    if n == 0 { 1 } else { n }
}

/// Level of the tree's root page: 1 when one leaf page holds the whole disk.
#[must_use]
pub const fn root_level(disk_bytes: u64, chunk_size: u32) -> u8 {
    let mut pages = leaves_of(disk_bytes, chunk_size);
    let mut level = 1;
    while pages > 1 {
        pages = pages.div_ceil(FANOUT as u64);
        level += 1;
    }
    level
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn tree_shapes_are_as_documented() {
        let chunk = 256 << 10;
        assert_eq!((leaves_of(0, chunk), root_level(0, chunk)), (1, 1));
        assert_eq!((leaves_of(1, chunk), root_level(1, chunk)), (1, 1));
        assert_eq!(leaves_of(128 * (256 << 10) + 1, chunk), 2);
        assert_eq!(root_level(128 * (256 << 10) + 1, chunk), 2);
        assert!(root_level(64 << 40, 64 << 10) <= MAX_LEVEL);
    }

    proptest! {
        #[test]
        fn links_round_trip(level in 1u8..=6, ids in prop::collection::vec(any::<[u8; 32]>(), 0..=128)) {
            let page = Links::Page { level, children: ids.iter().map(|i| ChunkId(*i)).collect() };
            prop_assert_eq!(Links::decode(&page.encode()).unwrap(), page);
            let manifest = Links::Manifest(ids.iter().map(|i| Link { level, id: ChunkId(*i) }).collect());
            prop_assert_eq!(Links::decode(&manifest.encode()).unwrap(), manifest);
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Links::decode(&bytes);
        }
    }
}
