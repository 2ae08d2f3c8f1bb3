//! Sealing and opening: identity, compression and encryption of records.
//!
//! - id: BLAKE3 keyed with the domain's id key, over kind and plaintext (for pages: over kind and the clear bytes and the plaintext).
//! - key: per record, BLAKE3 keyed with the data key of the epoch over a label and the id. Random 96-bit nonces are safe
//!   under it: a record is sealed anew only when two hosts meet the same chunk at the same time.
//! - AEAD: AES-256-GCM over the compressed bytes; the header up to the nonce and the clear bytes are associated data.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::ids::{ChunkId, DomainId, KeyEpoch, WriterId};
use crate::record::{
    AAD_LEN, CIPHER_AES_256_GCM, Codec, HEADER_LEN, Header, Kind, MAX_PAYLOAD, Record, TAG_LEN,
};

/// zstd level of chunks: compression is the slowest stage, and level 1 the knee of its curve (docs/decisions).
pub const ZSTD_LEVEL: i32 = 1;
/// Below this length a sample says nothing: just compress.
const SAMPLE_FROM: usize = 16 << 10;

/// A 32 byte key that is wiped when dropped and cannot be printed.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Key32(pub [u8; 32]);

impl std::fmt::Debug for Key32 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key32(..)")
    }
}

/// The keys of a dedup domain: one id key for ever, one data key an epoch.
#[derive(Debug, Clone)]
pub struct DomainKeys {
    /// The domain.
    pub domain: DomainId,
    /// Key of ids.
    pub id_key: Key32,
    /// Keys of contents by epoch; old epochs stay readable.
    pub data_keys: BTreeMap<KeyEpoch, Key32>,
    /// Epoch that new records are sealed under.
    pub current: KeyEpoch,
}

/// Why a record could not be sealed or opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The domain has no data key of this epoch.
    #[error("record {id:?} was sealed under key epoch {epoch}, which this job was not given")]
    NoKey {
        /// Record.
        id: ChunkId,
        /// Epoch asked for.
        epoch: KeyEpoch,
    },
    /// The record belongs to another domain.
    #[error("record {id:?} belongs to dedup domain {found}, not to {expected}")]
    Domain {
        /// Record.
        id: ChunkId,
        /// Domain in its header.
        found: DomainId,
        /// Domain of the keys.
        expected: DomainId,
    },
    /// The tag does not match: wrong key or changed bytes.
    #[error(
        "record {id:?} does not open with the domain's key: wrong key, or its bytes were changed"
    )]
    Forged {
        /// Record.
        id: ChunkId,
    },
    /// It opened, but its content is not what its id names.
    #[error("record {id:?} holds other bytes than its id names")]
    WrongContent {
        /// Record.
        id: ChunkId,
    },
    /// It opened, but does not decompress to the length in its header.
    #[error("record {id:?} does not decompress to the {plain_len} bytes its header names")]
    Codec {
        /// Record.
        id: ChunkId,
        /// Length in the header.
        plain_len: u32,
    },
    /// Too long to be a record.
    #[error("{len} bytes are too long for one record (largest {MAX_PAYLOAD})")]
    TooLong {
        /// Length.
        len: usize,
    },
    /// The operating system gave no random bytes.
    #[error("the operating system gave no random bytes")]
    NoRandom,
}

/// Seals and opens the records of one domain for one writer. Cheap to clone; safe to share between threads.
#[derive(Debug, Clone)]
pub struct Sealer {
    keys: Arc<DomainKeys>,
    writer: WriterId,
}

thread_local! {
    static COMPRESSOR: RefCell<Option<zstd::bulk::Compressor<'static>>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

impl Sealer {
    /// A sealer with `keys` that signs as `writer`.
    #[must_use]
    pub fn new(keys: Arc<DomainKeys>, writer: WriterId) -> Self {
        Self { keys, writer }
    }

    /// The domain.
    #[must_use]
    pub fn domain(&self) -> DomainId {
        self.keys.domain
    }

    /// Identity of a data chunk with this plaintext.
    #[must_use]
    pub fn chunk_id(&self, plain: &[u8]) -> ChunkId {
        self.id_of(Kind::Data, &[], plain)
    }

    /// Identity of a record of `kind` with these clear and plain bytes.
    #[must_use]
    pub fn id_of(&self, kind: Kind, clear: &[u8], plain: &[u8]) -> ChunkId {
        if kind == Kind::Data {
            return ChunkId(*blake3::keyed_hash(&self.keys.id_key.0, plain).as_bytes());
        }
        let mut hasher = blake3::Hasher::new_keyed(&self.keys.id_key.0);
        hasher.update(b"outrider record id\0");
        hasher.update(&[kind as u8]);
        hasher.update(&(clear.len() as u64).to_le_bytes());
        hasher.update(clear);
        hasher.update(plain);
        ChunkId(*hasher.finalize().as_bytes())
    }

    /// Compresses `plain` if that is worth it and seals it under `id`, which must be [`Sealer::id_of`] the same bytes.
    ///
    /// # Errors
    /// [`SealError::NoKey`], [`SealError::TooLong`], [`SealError::NoRandom`].
    pub fn seal(
        &self,
        kind: Kind,
        id: ChunkId,
        clear: &[u8],
        plain: &[u8],
    ) -> Result<Record, SealError> {
        let mut nonce = [0u8; 12];
        SystemRandom::new().fill(&mut nonce).map_err(|_| SealError::NoRandom)?;
        self.seal_with_nonce(kind, id, clear, plain, nonce)
    }

    /// Apart from [`Sealer::seal`] only so that golden records can be made again.
    pub(crate) fn seal_with_nonce(
        &self,
        kind: Kind,
        id: ChunkId,
        clear: &[u8],
        plain: &[u8],
        nonce: [u8; 12],
    ) -> Result<Record, SealError> {
        let bound = HEADER_LEN + clear.len() + plain.len().max(64) + TAG_LEN;
        if bound > MAX_PAYLOAD + HEADER_LEN {
            return Err(SealError::TooLong { len: plain.len() });
        }
        let start = HEADER_LEN + clear.len();
        let mut out = vec![0u8; bound];
        out[HEADER_LEN..start].copy_from_slice(clear);
        let body = &mut out[start..bound - TAG_LEN];
        let (codec, body_len) = match compress_into(plain, body) {
            Some(len) => (Codec::Zstd, len),
            None => {
                body[..plain.len()].copy_from_slice(plain);
                (Codec::Stored, plain.len())
            }
        };
        let mut header = Header {
            kind,
            cipher: CIPHER_AES_256_GCM,
            codec,
            key_epoch: self.keys.current,
            plain_len: length(plain.len())?,
            clear_len: length(clear.len())?,
            payload_len: length(clear.len() + body_len + TAG_LEN)?,
            id,
            domain: self.keys.domain,
            writer: self.writer,
            nonce,
            payload_hash: [0; 32],
        };
        let aad = associated(&header.encode()[..AAD_LEN], clear);
        let key = self.record_key(id, self.keys.current)?;
        let tag = key
            .seal_in_place_separate_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(&aad),
                &mut out[start..start + body_len],
            )
            .map_err(|_| SealError::TooLong { len: plain.len() })?;
        out[start + body_len..start + body_len + TAG_LEN].copy_from_slice(tag.as_ref());
        out.truncate(start + body_len + TAG_LEN);
        header.payload_hash = *blake3::hash(&out[HEADER_LEN..]).as_bytes();
        out[..HEADER_LEN].copy_from_slice(&header.encode());
        Record::decode_unverified(Bytes::from(out))
            .map_err(|_| SealError::TooLong { len: plain.len() })
    }

    /// Opens a record: authenticates, decompresses, and checks that the content is what the id names.
    ///
    /// # Errors
    /// [`SealError`]; none is cured by asking the same replica again, another replica may have a good copy.
    pub fn open(&self, record: &Record) -> Result<Vec<u8>, SealError> {
        let header = record.header();
        let id = header.id;
        if header.domain != self.keys.domain {
            return Err(SealError::Domain { id, found: header.domain, expected: self.keys.domain });
        }
        let key = self.record_key(id, header.key_epoch)?;
        let aad = associated(record.aad_header(), record.clear());
        let mut body = record.sealed().to_vec();
        let opened = key
            .open_in_place(Nonce::assume_unique_for_key(header.nonce), Aad::from(&aad), &mut body)
            .map_err(|_| SealError::Forged { id })?
            .len();
        body.truncate(opened);
        let plain = match header.codec {
            Codec::Stored => body,
            Codec::Zstd => decompress(&body, header.plain_len as usize)
                .ok_or(SealError::Codec { id, plain_len: header.plain_len })?,
        };
        if plain.len() != header.plain_len as usize {
            return Err(SealError::Codec { id, plain_len: header.plain_len });
        }
        if matches!(header.kind, Kind::Data | Kind::Page)
            && self.id_of(header.kind, record.clear(), &plain) != id
        {
            return Err(SealError::WrongContent { id });
        }
        Ok(plain)
    }

    fn record_key(&self, id: ChunkId, epoch: KeyEpoch) -> Result<LessSafeKey, SealError> {
        let data_key = self.keys.data_keys.get(&epoch).ok_or(SealError::NoKey { id, epoch })?;
        let mut hasher = blake3::Hasher::new_keyed(&data_key.0);
        hasher.update(b"outrider record key\0");
        hasher.update(&id.0);
        let unbound = UnboundKey::new(&AES_256_GCM, hasher.finalize().as_bytes())
            .map_err(|_| SealError::NoKey { id, epoch })?;
        Ok(LessSafeKey::new(unbound))
    }
}

fn length(len: usize) -> Result<u32, SealError> {
    u32::try_from(len).map_err(|_| SealError::TooLong { len })
}

fn associated(header: &[u8], clear: &[u8]) -> Vec<u8> {
    let mut aad = Vec::with_capacity(header.len() + clear.len());
    aad.extend_from_slice(header);
    aad.extend_from_slice(clear);
    aad
}

/// Compresses into `out`; `None` when it would not shrink by at least 1/32 (or a sample says so).
#[must_use]
pub fn compress_into(plain: &[u8], out: &mut [u8]) -> Option<usize> {
    if plain.is_empty() || looks_random(plain) {
        return None;
    }
    let worth = plain.len() - plain.len() / 32;
    let limit = worth.min(out.len());
    COMPRESSOR.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = zstd::bulk::Compressor::new(ZSTD_LEVEL).ok();
        }
        // Too small a buffer is how zstd says that the result would not be smaller.
        slot.as_mut()?.compress_to_buffer(plain, &mut out[..limit]).ok()
    })
}

fn decompress(body: &[u8], plain_len: usize) -> Option<Vec<u8>> {
    DECOMPRESSOR.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = zstd::bulk::Decompressor::new().ok();
        }
        // `plain_len` was checked against MAX_PAYLOAD when the header was decoded.
        slot.as_mut()?.decompress(body, plain_len).ok()
    })
}

/// Whether bytes look like ciphertext or compressed data: order-0 entropy of samples spread over the chunk, near eight
/// bits a byte. A wrong "no" costs time only, a wrong "yes" some space.
fn looks_random(plain: &[u8]) -> bool {
    if plain.len() < SAMPLE_FROM {
        return false;
    }
    const PIECE: usize = 1024;
    const PIECES: usize = 8;
    let mut counts = [0u32; 256];
    let step = (plain.len() - PIECE) / (PIECES - 1);
    for i in 0..PIECES {
        for &b in &plain[i * step..i * step + PIECE] {
            counts[usize::from(b)] += 1;
        }
    }
    // Chi-square against a uniform distribution: about 255 for random bytes, thousands for anything zstd can use.
    let expected = (PIECE * PIECES) as f64 / 256.0;
    let chi: f64 = counts.iter().map(|&c| (f64::from(c) - expected).powi(2) / expected).sum();
    chi < 400.0
}

/// Whether a chunk is all zeros. Runs at memory speed: the compiler turns the blocks into vector code.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    let mut blocks = bytes.chunks_exact(128);
    for block in &mut blocks {
        if block.iter().fold(0u8, |acc, &b| acc | b) != 0 {
            return false;
        }
    }
    blocks.remainder().iter().all(|&b| b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealer() -> Sealer {
        let keys = DomainKeys {
            domain: DomainId::from_bytes([9; 16]),
            id_key: Key32([1; 32]),
            data_keys: BTreeMap::from([(KeyEpoch(1), Key32([2; 32]))]),
            current: KeyEpoch(1),
        };
        Sealer::new(Arc::new(keys), WriterId([3; 16]))
    }

    fn noise(len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        blake3::Hasher::new().update(b"noise").finalize_xof().fill(&mut out);
        out
    }

    #[test]
    fn what_was_sealed_opens_to_the_same_bytes() {
        let s = sealer();
        for plain in [b"hello".repeat(9000), noise(70_000), vec![], vec![5; 1]] {
            let id = s.chunk_id(&plain);
            let record = s.seal(Kind::Data, id, b"", &plain).expect("seals");
            let record = Record::decode(record.bytes().clone()).expect("verifies");
            assert_eq!(s.open(&record).expect("opens"), plain);
        }
    }

    #[test]
    fn any_flipped_bit_is_noticed() {
        let s = sealer();
        let plain = b"some words that compress ".repeat(50);
        let record = s
            .seal(Kind::Page, s.id_of(Kind::Page, b"links", &plain), b"links", &plain)
            .expect("seals");
        for at in 0..record.bytes().len() {
            let mut bytes = record.bytes().to_vec();
            bytes[at] ^= 0x10;
            assert!(Record::decode(Bytes::from(bytes)).is_err(), "flip at {at} went unnoticed");
        }
    }

    #[test]
    fn a_record_under_another_id_is_refused_even_with_a_good_checksum() {
        let s = sealer();
        let id = s.chunk_id(b"other bytes");
        let record = s.seal(Kind::Data, id, b"", b"these bytes").expect("seals");
        assert_eq!(s.open(&record), Err(SealError::WrongContent { id }));
    }

    #[test]
    fn noise_is_stored_and_text_is_compressed() {
        let s = sealer();
        let n = noise(256 << 10);
        let r = s.seal(Kind::Data, s.chunk_id(&n), b"", &n).expect("seals");
        assert_eq!(r.header().codec, Codec::Stored);
        let t = b"abcdefgh12345678".repeat(16 << 10);
        let r = s.seal(Kind::Data, s.chunk_id(&t), b"", &t).expect("seals");
        assert_eq!(r.header().codec, Codec::Zstd);
        assert!(r.bytes().len() < t.len() / 10);
    }

    #[test]
    fn zeros_are_told_from_almost_zeros() {
        for len in [0, 1, 127, 128, 129, 4096] {
            let mut v = vec![0; len];
            assert!(is_zero(&v));
            if let Some(last) = v.last_mut() {
                *last = 1;
                assert!(!is_zero(&v));
            }
        }
    }
}
