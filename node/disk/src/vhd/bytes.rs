//! Big-endian fields at fixed offsets of a structure whose length was checked before.

use crate::error::FormatError;

/// A structure's bytes. Reading past the end gives zeros, so no parser can panic; each parser first
/// asks for the length that it needs with [`BigEndian::new`].
#[derive(Clone, Copy)]
pub(crate) struct BigEndian<'a>(&'a [u8]);

impl<'a> BigEndian<'a> {
    pub(crate) fn new(
        bytes: &'a [u8],
        structure: &'static str,
        needed: usize,
    ) -> Result<Self, FormatError> {
        if bytes.len() < needed {
            let (needed, found) = (needed as u64, bytes.len() as u64);
            return Err(FormatError::Truncated { structure, needed, found });
        }
        Ok(Self(bytes))
    }

    pub(crate) fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        at.checked_add(N)
            .and_then(|end| self.0.get(at..end))
            .and_then(|bytes| bytes.try_into().ok())
            .unwrap_or([0; N])
    }

    pub(crate) fn u8(&self, at: usize) -> u8 {
        u8::from_be_bytes(self.array(at))
    }

    pub(crate) fn u16(&self, at: usize) -> u16 {
        u16::from_be_bytes(self.array(at))
    }

    pub(crate) fn u32(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.array(at))
    }

    pub(crate) fn u64(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.array(at))
    }
}

/// Writes `bytes` into `out` at `at`; the structures that we write have fixed sizes.
pub(crate) fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}
