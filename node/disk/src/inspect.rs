//! Everything that a reader does with a file, on bytes in memory: the entry point of fuzzing.

use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::block_file::ByteSource;
use crate::layer::{Layer, LayerMap, ReadLayer};
use crate::{DiskChain, DiskError, DiskFormat, ReadDisk};

/// Bytes read from each end of the disk and of its first ranges.
const SAMPLE: u64 = 64 << 10;

/// Opens one file from memory, checks all of it, lists what it stores and reads some of it.
///
/// # Errors
/// Whatever is wrong with the bytes; never a panic.
pub fn inspect_bytes(bytes: Vec<u8>, format: DiskFormat) -> Result<LayerMap, DiskError> {
    let name = if format == DiskFormat::Vhd { "memory.vhd" } else { "memory.vhdx" };
    let layer = Layer::from_source(name.into(), Arc::new(bytes))?;
    let _notes = layer.notes();
    layer.check()?;
    layer.map()
}

/// Opens a chain whose files are in memory, the leaf first, and reads some of what it shows. Whatever
/// names a parent has in a child, the next file is it.
///
/// # Errors
/// Whatever is wrong with the bytes; never a panic.
pub fn inspect_chain(files: Vec<Vec<u8>>, format: DiskFormat) -> Result<(), DiskError> {
    let extension = if format == DiskFormat::Vhd { "vhd" } else { "vhdx" };
    let files: Vec<Arc<Vec<u8>>> = files.into_iter().map(Arc::new).collect();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let leaf = format!("memory.{extension}");
    let chain = DiskChain::open_with(&leaf, &|_: &Path| {
        let number = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let file = files.get(number).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::clone(file) as Arc<dyn ByteSource>)
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
