//! The two headers: which of them counts, and the identity of the file's content.

use uuid::Uuid;

use super::{Fields, checksum};
use super::{MAX_FILE, MIB};
use crate::error::FormatError;
use crate::fields::put;

/// Bytes of a header that are used and covered by its checksum.
pub(crate) const HEADER_LEN: usize = 4096;

/// Where the two headers are.
pub(crate) const HEADER_OFFSETS: [u64; 2] = [64 << 10, 128 << 10];

const NAME: &str = "header";

/// One header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The header with the higher number counts.
    pub sequence: u64,
    /// Changes with the first modification of the file after each opening.
    pub file_write_guid: Uuid,
    /// Changes with the first modification of guest-visible bytes after each opening.
    pub data_write_guid: Uuid,
    /// Not nil while the log may hold updates that are not in their places.
    pub log_guid: Uuid,
    /// Bytes of the log.
    pub log_length: u32,
    /// File offset of the log.
    pub log_offset: u64,
}

impl Header {
    /// Reads one header from its 4 KiB.
    ///
    /// # Errors
    /// A wrong signature, checksum or version, or a log that is not aligned.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let fields = Fields::new(bytes, NAME, HEADER_LEN)?;
        if &fields.array::<4>(0) != b"head" {
            return Err(FormatError::corrupt(NAME, "does not start with \"head\""));
        }
        let (found, expected) = (fields.u32(4), checksum(&bytes[..HEADER_LEN]));
        if found != expected {
            let detail = format!("has checksum {found:#x} where its bytes give {expected:#x}");
            return Err(FormatError::corrupt(NAME, detail));
        }
        let version = fields.u16(66);
        if version != 1 {
            return Err(FormatError::unsupported(NAME, format!("has version {version}, not 1")));
        }
        let header = Self {
            sequence: fields.u64(8),
            file_write_guid: fields.guid(16),
            data_write_guid: fields.guid(32),
            log_guid: fields.guid(48),
            log_length: fields.u32(68),
            log_offset: fields.u64(72),
        };
        let log_version = fields.u16(64);
        if log_version != 0 && !header.log_guid.is_nil() {
            let detail = format!("asks for a log of version {log_version}, not 0");
            return Err(FormatError::unsupported(NAME, detail));
        }
        let aligned = header.log_offset <= MAX_FILE
            && header.log_offset.is_multiple_of(MIB)
            && u64::from(header.log_length).is_multiple_of(MIB);
        if !aligned || (header.log_length > 0 && header.log_offset < MIB) {
            let detail = format!(
                "puts the log at {} with {} bytes; both must be multiples of 1 MiB and past the header area",
                header.log_offset, header.log_length
            );
            return Err(FormatError::corrupt(NAME, detail));
        }
        Ok(header)
    }

    /// The header's 4 KiB.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; HEADER_LEN];
        put(&mut out, 0, b"head");
        put(&mut out, 8, &self.sequence.to_le_bytes());
        put(&mut out, 16, &self.file_write_guid.to_bytes_le());
        put(&mut out, 32, &self.data_write_guid.to_bytes_le());
        put(&mut out, 48, &self.log_guid.to_bytes_le());
        put(&mut out, 66, &1_u16.to_le_bytes());
        put(&mut out, 68, &self.log_length.to_le_bytes());
        put(&mut out, 72, &self.log_offset.to_le_bytes());
        let crc = checksum(&out);
        put(&mut out, 4, &crc.to_le_bytes());
        out
    }

    /// The header that counts, and whether it is the first or the second. One damaged copy is normal
    /// after a crash. Equal sequence numbers are accepted only from identical headers (Disk2VHD).
    ///
    /// # Errors
    /// Both copies are bad, or they contradict each other.
    pub fn choose(first: &[u8], second: &[u8]) -> Result<(Self, usize), FormatError> {
        match (Self::parse(first), Self::parse(second)) {
            (Ok(a), Ok(b)) if a == b => Ok((a, 0)),
            (Ok(a), Ok(b)) if a.sequence == b.sequence => {
                let detail = format!("copies differ but share sequence number {}", a.sequence);
                Err(FormatError::corrupt(NAME, detail))
            }
            (Ok(a), Ok(b)) => Ok(if a.sequence > b.sequence { (a, 0) } else { (b, 1) }),
            (Ok(a), Err(_)) => Ok((a, 0)),
            (Err(_), Ok(b)) => Ok((b, 1)),
            (Err(error), Err(_)) => Err(error),
        }
    }
}
