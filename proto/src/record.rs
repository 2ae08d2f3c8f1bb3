//! The sealed record: what a chunk, page, root record, journal entry or state copy is on the wire and in a segment.
//!
//! ```text
//! offset len
//!   0    4  magic "ORC1"
//!   4    1  format version (1)
//!   5    1  kind      1 data, 2 page, 3 root, 4 journal, 5 state
//!   6    1  cipher    1 AES-256-GCM
//!   7    1  codec     0 stored, 1 zstd
//!   8    4  key epoch
//!  12    4  plain length (before compression)
//!  16    4  clear length (bytes in clear at the front of the payload)
//!  20    4  payload length (clear + ciphertext + 16 byte tag)
//!  24   32  id
//!  56   16  dedup domain
//!  72   16  writer
//!  88   12  nonce
//! 100   32  BLAKE3 of the payload
//! 132    4  CRC-32C of bytes 0..132
//! 136       payload
//! ```
//! Bytes 0..88 and the clear bytes are the associated data of the AEAD. Layout epoch, storage node incarnation and ticket
//! of a write stand in front of the record: in the frame that carries it and in the segment that keeps it.

use bytes::Bytes;

use crate::ids::{ChunkId, DomainId, KeyEpoch, WriterId};
use crate::wire::{DecodeError, Put, Reader};

/// Bytes of the header.
pub const HEADER_LEN: usize = 136;
/// Bytes of the header that are associated data.
pub const AAD_LEN: usize = 88;
/// First bytes of every record.
pub const MAGIC: [u8; 4] = *b"ORC1";
/// Version written by this release.
pub const VERSION: u8 = 1;
/// Largest payload accepted: the largest chunk (4 MiB) with room for what does not shrink, or a page with clear ids.
pub const MAX_PAYLOAD: usize = 5 << 20;
/// Bytes of the AEAD tag.
pub const TAG_LEN: usize = 16;

/// What a record holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// A chunk of a virtual disk or of a configuration file.
    Data = 1,
    /// A page of a disk's chunk tree, or a manifest.
    Page = 2,
    /// A root record.
    Root = 3,
    /// An entry of a job's journal.
    Journal = 4,
    /// A copy of the coordinator's state.
    State = 5,
}

impl TryFrom<u8> for Kind {
    type Error = DecodeError;
    fn try_from(n: u8) -> Result<Self, DecodeError> {
        Ok(match n {
            1 => Self::Data,
            2 => Self::Page,
            3 => Self::Root,
            4 => Self::Journal,
            5 => Self::State,
            _ => {
                return Err(DecodeError::Value {
                    what: "record kind",
                    found: n.to_string(),
                    expected: "1 to 5",
                });
            }
        })
    }
}

/// How the plain bytes were compressed before sealing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// As they are: they did not shrink.
    Stored = 0,
    /// One zstd frame.
    Zstd = 1,
}

/// The cipher number of AES-256-GCM.
pub const CIPHER_AES_256_GCM: u8 = 1;

/// The fields of a record's header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// What the record holds.
    pub kind: Kind,
    /// Cipher number.
    pub cipher: u8,
    /// Compression.
    pub codec: Codec,
    /// Data key that sealed it.
    pub key_epoch: KeyEpoch,
    /// Bytes before compression.
    pub plain_len: u32,
    /// Bytes in clear at the front of the payload.
    pub clear_len: u32,
    /// Bytes of the payload.
    pub payload_len: u32,
    /// Identity.
    pub id: ChunkId,
    /// Dedup domain.
    pub domain: DomainId,
    /// Host that sealed it.
    pub writer: WriterId,
    /// AEAD nonce.
    pub nonce: [u8; 12],
    /// BLAKE3 of the payload.
    pub payload_hash: [u8; 32],
}

impl Header {
    /// Encodes the header, checksum included.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = Vec::with_capacity(HEADER_LEN);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[VERSION, self.kind as u8, self.cipher, self.codec as u8]);
        out.put_u32(self.key_epoch.0);
        out.put_u32(self.plain_len);
        out.put_u32(self.clear_len);
        out.put_u32(self.payload_len);
        out.extend_from_slice(&self.id.0);
        out.extend_from_slice(&self.domain.to_bytes());
        out.extend_from_slice(&self.writer.0);
        out.extend_from_slice(&self.nonce);
        out.extend_from_slice(&self.payload_hash);
        let crc = crc32c::crc32c(&out);
        out.put_u32(crc);
        let mut array = [0; HEADER_LEN];
        array.copy_from_slice(&out);
        array
    }

    /// Decodes and checks a header: magic, version, checksum, every field's range. Reads the first
    /// [`HEADER_LEN`] bytes of `bytes`, which may be longer.
    ///
    /// # Errors
    /// [`DecodeError`] naming the field.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let head = bytes.get(..HEADER_LEN).ok_or(DecodeError::Short {
            what: "record header",
            needed: HEADER_LEN,
            left: bytes.len(),
        })?;
        let mut r = Reader::new("record header", head);
        let magic = r.array::<4>()?;
        if magic != MAGIC {
            return Err(DecodeError::Value {
                what: "record magic",
                found: hex::encode(magic),
                expected: "\"ORC1\"",
            });
        }
        let version = r.u8()?;
        if version != VERSION {
            return Err(DecodeError::Value {
                what: "record version",
                found: version.to_string(),
                expected: "1 (a newer release wrote this: upgrade)",
            });
        }
        let crc = u32::from_le_bytes([head[132], head[133], head[134], head[135]]);
        if crc32c::crc32c(&head[..132]) != crc {
            return Err(DecodeError::Checksum { what: "record header" });
        }
        let kind = Kind::try_from(r.u8()?)?;
        let cipher = r.u8()?;
        if cipher != CIPHER_AES_256_GCM {
            return Err(DecodeError::Value {
                what: "record cipher",
                found: cipher.to_string(),
                expected: "1",
            });
        }
        let codec = match r.u8()? {
            0 => Codec::Stored,
            1 => Codec::Zstd,
            n => {
                return Err(DecodeError::Value {
                    what: "record codec",
                    found: n.to_string(),
                    expected: "0 or 1",
                });
            }
        };
        let header = Self {
            kind,
            cipher,
            codec,
            key_epoch: KeyEpoch(r.u32()?),
            plain_len: r.u32()?,
            clear_len: r.u32()?,
            payload_len: r.u32()?,
            id: ChunkId(r.array()?),
            domain: DomainId::from_bytes(r.array()?),
            writer: WriterId(r.array()?),
            nonce: r.array()?,
            payload_hash: r.array()?,
        };
        let payload = header.payload_len as usize;
        if payload > MAX_PAYLOAD
            || payload < header.clear_len as usize + TAG_LEN
            || header.plain_len as usize > MAX_PAYLOAD
        {
            return Err(DecodeError::Value {
                what: "record lengths",
                found: format!(
                    "plain {}, clear {}, payload {}",
                    header.plain_len, header.clear_len, header.payload_len
                ),
                expected: "clear + 16 <= payload <= 5 MiB",
            });
        }
        if header.id.is_hole() {
            return Err(DecodeError::Value {
                what: "record id",
                found: "all zeros".into(),
                expected: "a chunk id",
            });
        }
        Ok(header)
    }

    /// Bytes of the whole record.
    #[must_use]
    pub fn record_len(&self) -> usize {
        HEADER_LEN + self.payload_len as usize
    }
}

/// A whole record: checked header and all its bytes, header included. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    header: Header,
    bytes: Bytes,
}

impl Record {
    /// Takes a record apart and checks it end to end without any key: header checksum, lengths, payload hash.
    ///
    /// # Errors
    /// [`DecodeError`]; [`DecodeError::Checksum`] when the payload was changed.
    pub fn decode(bytes: Bytes) -> Result<Self, DecodeError> {
        let record = Self::decode_unverified(bytes)?;
        record.verify()?;
        Ok(record)
    }

    /// As [`Record::decode`], without hashing the payload: only for bytes that were just hashed or just sealed.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode_unverified(bytes: Bytes) -> Result<Self, DecodeError> {
        let header = Header::decode(&bytes)?;
        if bytes.len() != header.record_len() {
            return Err(DecodeError::Value {
                what: "record length",
                found: bytes.len().to_string(),
                expected: "header + payload length",
            });
        }
        Ok(Self { header, bytes })
    }

    /// Checks the payload against its hash.
    ///
    /// # Errors
    /// [`DecodeError::Checksum`].
    pub fn verify(&self) -> Result<(), DecodeError> {
        if *blake3::hash(self.payload()).as_bytes() == self.header.payload_hash {
            Ok(())
        } else {
            Err(DecodeError::Checksum { what: "record payload" })
        }
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }
    /// The id.
    #[must_use]
    pub fn id(&self) -> ChunkId {
        self.header.id
    }
    /// All bytes, header first.
    #[must_use]
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }
    /// Clear bytes, ciphertext and tag.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.bytes[HEADER_LEN..]
    }
    /// The bytes that need no key: links of a page, fields of a root record.
    #[must_use]
    pub fn clear(&self) -> &[u8] {
        &self.bytes[HEADER_LEN..HEADER_LEN + self.header.clear_len as usize]
    }
    /// The associated data's first part: header up to the nonce.
    #[must_use]
    pub fn aad_header(&self) -> &[u8] {
        &self.bytes[..AAD_LEN]
    }
    /// Ciphertext and tag.
    #[must_use]
    pub fn sealed(&self) -> &[u8] {
        &self.bytes[HEADER_LEN + self.header.clear_len as usize..]
    }
}
