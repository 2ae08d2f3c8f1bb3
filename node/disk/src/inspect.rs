//! Everything that a reader does with a file, on bytes in memory: the entry points of fuzzing.

mod guest;
mod reseal;
mod sparse_file;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

pub use guest::inspect_guest;
pub use reseal::reseal;
pub use sparse_file::SparseFile;

use crate::block_file::ByteSource;
use crate::error::FormatError;
use crate::layer::{Layer, LayerMap, ReadLayer};
use crate::vhdx::replay_bytes;
use crate::{DiskChain, DiskError, DiskFormat, ReadDisk};

/// Bytes read from each end of the disk and of its first ranges.
const SAMPLE: u64 = 64 << 10;

fn extension(format: DiskFormat) -> &'static str {
    if format == DiskFormat::Vhd { "vhd" } else { "vhdx" }
}

/// Opens one file from memory, checks all of it and lists what it stores.
///
/// # Errors
/// Whatever is wrong with the bytes; never a panic.
pub fn inspect_file(
    source: Arc<dyn ByteSource>,
    format: DiskFormat,
) -> Result<LayerMap, DiskError> {
    let layer = Layer::from_source(format!("memory.{}", extension(format)).into(), source)?;
    let _notes = layer.notes();
    let checked = layer.check();
    // The map must hold also for a file that is not sound.
    let map = layer.map();
    checked.and(map)
}

/// Opens a chain whose files are in memory, the leaf first, and reads some of what it shows. Whatever
/// names a parent has in a child, the next file is it.
///
/// # Errors
/// Whatever is wrong with the bytes; never a panic.
pub fn inspect_chain(files: &[Arc<dyn ByteSource>], format: DiskFormat) -> Result<(), DiskError> {
    let next = AtomicUsize::new(0);
    let leaf = format!("memory.{}", extension(format));
    let chain = DiskChain::open_with(&leaf, &|_: &Path| {
        let file = files.get(next.fetch_add(1, Ordering::Relaxed));
        Ok(Arc::clone(file.ok_or(io::ErrorKind::NotFound)?))
    })?;
    let size = chain.info().size;
    let mut buf = vec![0; SAMPLE as usize];
    let ranges = chain.allocated()?;
    let starts = ranges.iter().take(4).map(|range| range.start);
    for start in [0, size.saturating_sub(SAMPLE)].into_iter().chain(starts) {
        let len = SAMPLE.min(size.saturating_sub(start)) as usize;
        chain.read_at(start, &mut buf[..len])?;
    }
    Ok(())
}

/// Looks for the active sequence in the bytes of a VHDX log and replays it; gives the number of places
/// that it changes. The log's GUID is that of its first entry.
///
/// # Errors
/// No valid sequence.
pub fn inspect_log(log: &[u8]) -> Result<usize, FormatError> {
    replay_bytes(log)
}
