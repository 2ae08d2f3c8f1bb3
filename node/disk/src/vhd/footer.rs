//! The footer: what a VHD is. A dynamic disk has a copy of it at its start.

use std::path::Path;

use uuid::Uuid;

use super::geometry::Chs;
use super::{Fields, SECTOR, checksum};
use crate::block_file::ByteSource;
use crate::error::FormatError;
use crate::fields::put;
use crate::{DiskError, DiskKind};

/// Bytes of a footer.
pub(crate) const LEN: usize = 512;

/// Bytes of the footer that Virtual PC wrote before 2004.
const OLD_LEN: usize = 511;

const COOKIE: &[u8; 8] = b"conectix";
const NAME: &str = "footer";
const CHECKSUM_AT: usize = 64;

/// What the footer says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Footer {
    /// Where the dynamic header is; `None` in fixed disks.
    pub header_offset: Option<u64>,
    /// When the file was made, seconds since 2000-01-01 UTC.
    pub timestamp: u32,
    /// Four letters of the program that made the file.
    pub creator: [u8; 4],
    /// Guest-visible bytes when the disk was made.
    pub original_size: u64,
    /// Guest-visible bytes: what Hyper-V goes by. The geometry may say less.
    pub size: u64,
    /// Cylinders, heads and sectors, by which Virtual PC went.
    pub geometry: Chs,
    /// Fixed, dynamic or differencing.
    pub kind: DiskKind,
    /// The file's own id; children name their parent by it.
    pub id: Uuid,
    /// Whether a VM was saved while it used the disk.
    pub saved_state: bool,
}

impl Footer {
    /// Reads a footer of 512 or, as old programs wrote it, 511 bytes.
    ///
    /// # Errors
    /// A wrong cookie, checksum, version or kind.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let fields = Fields::new(bytes, NAME, OLD_LEN)?;
        if &fields.array::<8>(0) != COOKIE {
            return Err(FormatError::corrupt(NAME, "does not start with \"conectix\""));
        }
        let (found, expected) = (fields.u32(CHECKSUM_AT), checksum(bytes, CHECKSUM_AT));
        if found != expected {
            let detail = format!("has checksum {found:#x} where its bytes give {expected:#x}");
            return Err(FormatError::corrupt(NAME, detail));
        }
        let version = fields.u32(12);
        if version >> 16 != 1 {
            let detail = format!("has version {}.{}, not 1.0", version >> 16, version & 0xffff);
            return Err(FormatError::unsupported(NAME, detail));
        }
        let kind = match fields.u32(60) {
            2 => DiskKind::Fixed,
            3 => DiskKind::Dynamic,
            4 => DiskKind::Differencing,
            other => {
                let detail = format!(
                    "says that the disk is of type {other}; 2 fixed, 3 dynamic and 4 differencing are known"
                );
                return Err(FormatError::unsupported(NAME, detail));
            }
        };
        let size = fields.u64(48);
        if size == 0 || !size.is_multiple_of(SECTOR) || size > i64::MAX as u64 {
            let detail = format!("has disk size {size}; a multiple of 512 is expected");
            return Err(FormatError::corrupt(NAME, detail));
        }
        Ok(Self {
            header_offset: (kind != DiskKind::Fixed).then(|| fields.u64(16)),
            timestamp: fields.u32(24),
            creator: fields.array(28),
            original_size: fields.u64(40),
            size,
            geometry: Chs {
                cylinders: fields.u16(56),
                heads: fields.u8(58),
                sectors: fields.u8(59),
            },
            kind,
            id: fields.guid(68),
            saved_state: fields.u8(84) != 0,
        })
    }

    /// The footer's 512 bytes.
    pub(crate) fn encode(&self) -> [u8; LEN] {
        let mut out = [0; LEN];
        put(&mut out, 0, COOKIE);
        // Bit 1 of the features is always set.
        put(&mut out, 8, &2_u32.to_be_bytes());
        put(&mut out, 12, &0x0001_0000_u32.to_be_bytes());
        put(&mut out, 16, &self.header_offset.unwrap_or(u64::MAX).to_be_bytes());
        put(&mut out, 24, &self.timestamp.to_be_bytes());
        put(&mut out, 28, &self.creator);
        put(&mut out, 32, &0x000a_0000_u32.to_be_bytes());
        put(&mut out, 36, b"Wi2k");
        put(&mut out, 40, &self.original_size.to_be_bytes());
        put(&mut out, 48, &self.size.to_be_bytes());
        put(&mut out, 56, &self.geometry.cylinders.to_be_bytes());
        put(&mut out, 58, &[self.geometry.heads, self.geometry.sectors]);
        let kind = match self.kind {
            DiskKind::Fixed => 2_u32,
            DiskKind::Dynamic => 3,
            DiskKind::Differencing => 4,
        };
        put(&mut out, 60, &kind.to_be_bytes());
        put(&mut out, 68, self.id.as_bytes());
        put(&mut out, 84, &[u8::from(self.saved_state)]);
        let sum = checksum(&out, CHECKSUM_AT);
        put(&mut out, CHECKSUM_AT, &sum.to_be_bytes());
        out
    }
}

/// A footer and where it was found.
#[derive(Debug, Clone)]
pub(crate) struct Placed {
    pub(crate) footer: Footer,
    /// File offset of the footer at the end; `None` if only the copy at the start is good.
    pub(crate) at_end: Option<u64>,
    /// What is odd about it.
    pub(crate) note: Option<String>,
}

impl Placed {
    pub(crate) fn is_fixed(&self) -> bool {
        self.footer.kind == DiskKind::Fixed
    }
}

/// The footer that counts. A dynamic disk that lost the one at the end, in a crash while it grew, has
/// the copy at its start; a fixed one has none, its start being the guest's.
pub(crate) fn find(
    path: &Path,
    source: &dyn ByteSource,
    len: u64,
) -> Result<Option<Placed>, DiskError> {
    let read = |offset: u64, size: usize| -> Result<Vec<u8>, DiskError> {
        let mut bytes = vec![0; size];
        source.read_exact_at(offset, &mut bytes).map_err(DiskError::io(path, "read"))?;
        Ok(bytes)
    };
    if len < OLD_LEN as u64 {
        return Ok(None);
    }
    let mut end = None;
    for size in [LEN, OLD_LEN] {
        if let Some(at) = len.checked_sub(size as u64)
            && let Ok(footer) = Footer::parse(&read(at, size)?)
        {
            end = Some((footer, at));
            break;
        }
    }
    // Only what is no fixed disk can have a copy; a fixed one's first sector may look like one.
    let start = (len >= LEN as u64).then(|| read(0, LEN)).transpose()?;
    let start = start.and_then(|b| Footer::parse(&b).ok()).filter(|f| f.kind != DiskKind::Fixed);
    Ok(match (end, start) {
        (Some((footer, at)), start) if footer.kind == DiskKind::Fixed && at >= footer.size => {
            // A dynamic disk that crashed while it grew ends with a guest's bytes, which may look like
            // this; then its start is no guest's.
            let both = start.is_some_and(|s| s.id == footer.id);
            (!both).then_some(Placed { footer, at_end: Some(at), note: None })
        }
        (Some((footer, at)), Some(copy)) if footer.id == copy.id => {
            Some(Placed { footer, at_end: Some(at), note: None })
        }
        (_, Some(footer)) => {
            let note = "the footer at the end is missing or damaged, as after a crash while the disk grew; its copy \
                        at the start was used"
                .to_owned();
            Some(Placed { footer, at_end: None, note: Some(note) })
        }
        (Some((footer, at)), None) if footer.kind != DiskKind::Fixed => {
            let note =
                "the copy of the footer at the start is damaged; the one at the end was used"
                    .to_owned();
            Some(Placed { footer, at_end: Some(at), note: Some(note) })
        }
        (Some((footer, at)), None) => {
            // Too short for its disk: found, so that the reader can say so.
            Some(Placed { footer, at_end: Some(at), note: None })
        }
        (None, None) => None,
    })
}
