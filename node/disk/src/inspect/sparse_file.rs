//! A file of which only some parts are kept: what fuzzing mutates, and what seeds are stored as.

use std::io;

use crate::block_file::ByteSource;

/// Longest file that an encoding can ask for: whoever fuzzes wants many short runs.
const MAX_LEN: u64 = 1 << 30;

/// Page in which a file is looked through for parts that are not zeros.
const PAGE: usize = 512;

/// A file that is zeros but for some parts. Later parts lie over earlier ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SparseFile {
    len: u64,
    parts: Vec<(u64, Vec<u8>)>,
}

impl SparseFile {
    /// The parts of a whole file that are not zeros.
    pub fn of(bytes: &[u8]) -> Self {
        let mut parts: Vec<(u64, Vec<u8>)> = Vec::new();
        for (number, page) in bytes.chunks(PAGE).enumerate() {
            let kept = page.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
            if kept > 0 {
                parts.push(((number * PAGE) as u64, page[..kept].to_vec()));
            }
        }
        Self { len: bytes.len() as u64, parts }
    }

    /// Reads an encoding: the length (8 bytes, little-endian), then parts of offset (8 bytes), length
    /// (2 bytes) and bytes. Every input is a file: what is missing is left out.
    pub fn decode(mut input: &[u8]) -> Self {
        let mut take = |count: usize| {
            let (taken, rest) = input.split_at(count.min(input.len()));
            input = rest;
            taken
        };
        let number = |bytes: &[u8]| {
            bytes.iter().rev().fold(0_u64, |number, byte| (number << 8) | u64::from(*byte))
        };
        let len = number(take(8)) % MAX_LEN;
        let mut parts = Vec::new();
        loop {
            let head = take(10);
            if head.len() < 10 {
                return Self { len, parts };
            }
            let (offset, count) = head.split_at(8);
            parts.push((number(offset), take(number(count) as usize).to_vec()));
        }
    }

    /// The encoding that [`SparseFile::decode`] reads.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.len.to_le_bytes().to_vec();
        for (offset, bytes) in &self.parts {
            // Parts are pages, or came from an encoding.
            let count = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
            out.extend_from_slice(&offset.to_le_bytes());
            out.extend_from_slice(&count.to_le_bytes());
            out.extend_from_slice(&bytes[..usize::from(count)]);
        }
        out
    }

    /// Puts bytes over what is there.
    pub fn put(&mut self, offset: u64, bytes: &[u8]) {
        self.parts.push((offset, bytes.to_vec()));
    }

    /// Length of the file.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the file has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Up to `count` bytes from `offset` on, fewer at the end.
    pub(crate) fn get(&self, offset: u64, count: usize) -> Vec<u8> {
        let count = self.len.saturating_sub(offset).min(count as u64) as usize;
        let mut bytes = vec![0; count];
        self.fill(offset, &mut bytes);
        bytes
    }

    /// Offsets of the parts.
    pub(crate) fn offsets(&self) -> Vec<u64> {
        self.parts.iter().map(|(offset, _)| *offset).collect()
    }

    fn fill(&self, offset: u64, buf: &mut [u8]) {
        buf.fill(0);
        let end = offset.saturating_add(buf.len() as u64);
        for (at, bytes) in &self.parts {
            let (from, to) = ((*at).max(offset), at.saturating_add(bytes.len() as u64).min(end));
            if from < to {
                buf[(from - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&bytes[(from - at) as usize..(to - at) as usize]);
            }
        }
    }
}

impl ByteSource for SparseFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.len)
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if offset.saturating_add(buf.len() as u64) > self.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.fill(offset, buf);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_survives_its_encoding() {
        let mut bytes = vec![0; 5000];
        bytes[1000..1100].fill(7);
        bytes[4999] = 1;
        let file = SparseFile::of(&bytes);
        let again = SparseFile::decode(&file.encode());
        assert_eq!(again, file);
        assert_eq!(again.get(0, 9999), bytes);
        assert!(again.read_exact_at(4999, &mut [0; 2]).is_err());
    }
}
