//! The header of a segment file, and the file's name.
//!
//! ```text
//! 0 4 magic "OSEG" · 4 2 version (1) · 6 2 kind · 8 16 fabric · 24 16 node (BLAKE3 of its name, cut)
//! 40 8 segment number · 48 8 incarnation that created it · 56 4 zero · 60 4 CRC-32C of bytes 0..60
//! ```

use std::path::{Path, PathBuf};

use outrider_proto::ids::{FabricId, NodeIncarnation};
use outrider_proto::record;
use outrider_proto::wire::{DecodeError, Put, Reader};

/// Bytes of the header; the first record follows.
pub const HEADER_LEN: u64 = 64;
/// First bytes of every segment file.
pub const MAGIC: [u8; 4] = *b"OSEG";
/// Version written by this release.
pub const VERSION: u16 = 1;
/// Everything in a segment begins at a multiple of this.
pub const ALIGNMENT: u64 = 8;

/// Number of a segment within its store; grows, is never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct SegmentNumber(pub u64);

impl std::fmt::Display for SegmentNumber {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:012}", self.0)
    }
}

/// What a segment holds. Kinds are kept apart, since they live for different times and are read by different walks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u16)]
pub enum SegmentKind {
    /// Data chunks.
    Data = 1,
    /// Pages and manifests.
    Pages = 2,
    /// Root records and copies of the coordinators' state.
    Roots = 3,
    /// Journal entries.
    Journals = 4,
}

impl SegmentKind {
    /// All kinds.
    pub const ALL: [Self; 4] = [Self::Data, Self::Pages, Self::Roots, Self::Journals];

    /// The kind of segment that keeps records of a kind.
    #[must_use]
    pub fn of(kind: record::Kind) -> Self {
        match kind {
            record::Kind::Data => Self::Data,
            record::Kind::Page => Self::Pages,
            record::Kind::Root | record::Kind::State => Self::Roots,
            record::Kind::Journal => Self::Journals,
        }
    }
}

impl TryFrom<u16> for SegmentKind {
    type Error = DecodeError;
    fn try_from(n: u16) -> Result<Self, DecodeError> {
        Self::ALL.into_iter().find(|k| *k as u16 == n).ok_or_else(|| DecodeError::Value {
            what: "segment kind",
            found: n.to_string(),
            expected: "1 to 4",
        })
    }
}

/// The fields of a segment's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Kind.
    pub kind: SegmentKind,
    /// Fabric.
    pub fabric: FabricId,
    /// Node, see [`node_hash`].
    pub node: [u8; 16],
    /// Number.
    pub number: SegmentNumber,
    /// The node's incarnation that created the file.
    pub created: NodeIncarnation,
}

/// How a segment names its node: a file that was carried to another node's folder is noticed.
#[must_use]
pub fn node_hash(name: &str) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new_derive_key("outrider 2026 segment node");
    hasher.update(name.as_bytes());
    let mut hash = [0; 16];
    hash.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    hash
}

impl SegmentHeader {
    /// Encodes the header.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_LEN as usize);
        out.extend_from_slice(&MAGIC);
        out.put_u16(VERSION);
        out.put_u16(self.kind as u16);
        out.extend_from_slice(&self.fabric.to_bytes());
        out.extend_from_slice(&self.node);
        out.put_u64(self.number.0);
        out.put_u64(self.created.0);
        out.put_u32(0);
        let crc = crc32c::crc32c(&out);
        out.put_u32(crc);
        out
    }

    /// Decodes and checks a header.
    ///
    /// # Errors
    /// [`DecodeError`] naming the field.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let bytes = bytes.get(..HEADER_LEN as usize).ok_or(DecodeError::Short {
            what: "segment header",
            needed: HEADER_LEN as usize,
            left: bytes.len(),
        })?;
        let mut r = Reader::new("segment header", bytes);
        let magic = r.array::<4>()?;
        if magic != MAGIC {
            return Err(DecodeError::Value {
                what: "segment magic",
                found: format!("{magic:02x?}"),
                expected: "\"OSEG\"",
            });
        }
        let version = r.u16()?;
        if version != VERSION {
            return Err(DecodeError::Value {
                what: "segment version",
                found: version.to_string(),
                expected: "1 (a newer release wrote this: upgrade)",
            });
        }
        let crc = u32::from_le_bytes([bytes[60], bytes[61], bytes[62], bytes[63]]);
        if crc32c::crc32c(&bytes[..60]) != crc {
            return Err(DecodeError::Checksum { what: "segment header" });
        }
        Ok(Self {
            kind: SegmentKind::try_from(r.u16()?)?,
            fabric: FabricId::from_bytes(r.array()?),
            node: r.array()?,
            number: SegmentNumber(r.u64()?),
            created: NodeIncarnation(r.u64()?),
        })
    }
}

/// Extension of a segment that still grows.
pub const OPEN: &str = "open";
/// Extension of a sealed segment.
pub const SEALED: &str = "seg";

/// Path of a segment in its folder.
#[must_use]
pub fn path(dir: &Path, number: SegmentNumber, sealed: bool) -> PathBuf {
    dir.join(format!("{number}.{}", if sealed { SEALED } else { OPEN }))
}

/// Number and state by a file's name; `None` for other files.
#[must_use]
pub fn parse_name(path: &Path) -> Option<(SegmentNumber, bool)> {
    let sealed = match path.extension()?.to_str()? {
        SEALED => true,
        OPEN => false,
        _ => return None,
    };
    let stem = path.file_stem()?.to_str()?;
    (stem.len() == 12).then(|| stem.parse().ok()).flatten().map(|n| (SegmentNumber(n), sealed))
}
