//! Fields at fixed offsets of a structure whose length was checked before.

use std::marker::PhantomData;

use uuid::Uuid;

use crate::error::FormatError;

/// The order of a number's bytes: one for a format.
pub(crate) trait Order: Copy {
    fn u16(bytes: [u8; 2]) -> u16;
    fn u32(bytes: [u8; 4]) -> u32;
    fn u64(bytes: [u8; 8]) -> u64;
    fn guid(bytes: [u8; 16]) -> Uuid;
}

/// That of VHDX.
#[derive(Clone, Copy)]
pub(crate) struct Little;

/// That of VHD.
#[derive(Clone, Copy)]
pub(crate) struct Big;

impl Order for Little {
    fn u16(bytes: [u8; 2]) -> u16 {
        u16::from_le_bytes(bytes)
    }
    fn u32(bytes: [u8; 4]) -> u32 {
        u32::from_le_bytes(bytes)
    }
    fn u64(bytes: [u8; 8]) -> u64 {
        u64::from_le_bytes(bytes)
    }
    fn guid(bytes: [u8; 16]) -> Uuid {
        Uuid::from_bytes_le(bytes)
    }
}

impl Order for Big {
    fn u16(bytes: [u8; 2]) -> u16 {
        u16::from_be_bytes(bytes)
    }
    fn u32(bytes: [u8; 4]) -> u32 {
        u32::from_be_bytes(bytes)
    }
    fn u64(bytes: [u8; 8]) -> u64 {
        u64::from_be_bytes(bytes)
    }
    fn guid(bytes: [u8; 16]) -> Uuid {
        Uuid::from_bytes(bytes)
    }
}

/// A structure's bytes. Reading past the end gives zeros, so no parser can panic; each parser first
/// asks for the length that it needs with [`Fields::new`].
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a, O>(&'a [u8], PhantomData<O>);

impl<'a, O: Order> Fields<'a, O> {
    pub(crate) fn new(
        bytes: &'a [u8],
        structure: &'static str,
        needed: usize,
    ) -> Result<Self, FormatError> {
        if bytes.len() < needed {
            let (needed, found) = (needed as u64, bytes.len() as u64);
            return Err(FormatError::Truncated { structure, needed, found });
        }
        Ok(Self(bytes, PhantomData))
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
        O::u16(self.array(at))
    }

    pub(crate) fn u32(&self, at: usize) -> u32 {
        O::u32(self.array(at))
    }

    pub(crate) fn u64(&self, at: usize) -> u64 {
        O::u64(self.array(at))
    }

    pub(crate) fn guid(&self, at: usize) -> Uuid {
        O::guid(self.array(at))
    }
}

/// Writes `bytes` into `out` at `at`; the structures that we write have fixed sizes.
pub(crate) fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}
