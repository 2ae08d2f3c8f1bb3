//! What the stages work on: chunks of a real disk, or of a made one.

use std::path::{Path, PathBuf};

use outrider_disk::vhdx::{CreateOptions, VhdxWriter};
use outrider_disk::{ReadDisk, open_disk};

use crate::report::Failure;

/// Chunks as the default dedup domain cuts them.
pub(super) const CHUNK: usize = 256 << 10;
/// Size of one read, as the agent's default.
const READ: u64 = 4 << 20;
/// More than this is not kept in memory; the whole pipeline still reads all of the disk.
const MOST: u64 = 512 << 20;

/// The disk's first allocated chunks, in memory.
#[derive(Debug)]
pub(super) struct Sample {
    /// Chunks, the last one perhaps shorter.
    pub(super) chunks: Vec<Vec<u8>>,
    /// Bytes of them.
    pub(super) bytes: u64,
    /// Allocated bytes of the whole disk.
    pub(super) allocated: u64,
}

impl Sample {
    /// Reads it.
    pub(super) fn read(path: &Path) -> Result<Self, Failure> {
        let disk = open_disk(path)?;
        let size = disk.info().size;
        let ranges = disk.allocated()?.align_out(CHUNK as u64, size);
        let allocated = ranges.total_len();
        let mut chunks = Vec::new();
        let mut bytes = 0;
        'all: for range in &ranges {
            for at in (range.start..range.end()).step_by(CHUNK) {
                let mut chunk = vec![0; (CHUNK as u64).min(range.end() - at) as usize];
                disk.read_at(at, &mut chunk)?;
                bytes += chunk.len() as u64;
                chunks.push(chunk);
                if bytes >= MOST {
                    break 'all;
                }
            }
        }
        if chunks.is_empty() {
            return Err(Failure::refused(format!(
                "{} holds no data to measure with",
                path.display()
            )));
        }
        Ok(Self { chunks, bytes, allocated })
    }
}

/// Reads all allocated bytes of a disk as the agent does, and gives their number.
pub(super) fn read_through(path: &Path) -> Result<u64, Failure> {
    let disk = open_disk(path)?;
    let mut buf = vec![0; READ as usize];
    let mut bytes = 0;
    for range in &disk.allocated()? {
        for at in (range.start..range.end()).step_by(READ as usize) {
            let part = &mut buf[..READ.min(range.end() - at) as usize];
            disk.read_at(at, part)?;
            bytes += part.len() as u64;
        }
    }
    Ok(bytes)
}

/// Makes a disk of a size: a quarter of it zeros, the rest half noise and half text, no two chunks alike.
pub(super) fn synthesize(folder: &Path, size: u64) -> Result<PathBuf, Failure> {
    let path = folder.join("synthetic.vhdx");
    let size = size.next_multiple_of(1 << 20).max(1 << 20);
    let options = CreateOptions { block_size: 2 << 20, ..CreateOptions::dynamic(size) };
    let mut writer = VhdxWriter::create(&path, &options)?;
    let mut buf = vec![0; CHUNK];
    for at in (0..size).step_by(CHUNK) {
        if at / CHUNK as u64 % 4 == 3 {
            continue;
        }
        fill(at, &mut buf);
        let len = (CHUNK as u64).min(size - at) as usize;
        writer.write_at(at, &buf[..len])?;
    }
    writer.close()?;
    Ok(path)
}

fn fill(at: u64, buf: &mut [u8]) {
    let mut state = at.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for (number, block) in buf.chunks_exact_mut(4096).enumerate() {
        let (noise, text) = block.split_at_mut(2048);
        for word in noise.chunks_exact_mut(8) {
            // xorshift64: fast, and nothing here must be unpredictable.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        let line = format!("line {number} of the chunk at {at}: the quick brown fox\n");
        for (to, from) in text.iter_mut().zip(line.bytes().cycle()) {
            *to = from;
        }
    }
}
