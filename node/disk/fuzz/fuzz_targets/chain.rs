//! A child and its parent, of either format: linked, mapped and read as one disk. The first byte says the format, the
//! next four how long the child is.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use outrider_disk::DiskFormat;
use outrider_disk::block_file::ByteSource;
use outrider_disk::inspect::{SparseFile, inspect_chain, reseal};

fuzz_target!(|input: &[u8]| {
    let Some((&[format, a, b, c, d], rest)) = input.split_first_chunk::<5>() else { return };
    let format = if format & 1 == 0 { DiskFormat::Vhdx } else { DiskFormat::Vhd };
    let child = (u32::from_le_bytes([a, b, c, d]) as usize).min(rest.len());
    let (child, parent) = rest.split_at(child);
    let files = [child, parent].map(|part| {
        let mut file = SparseFile::decode(part);
        reseal(&mut file, format);
        Arc::new(file) as Arc<dyn ByteSource>
    });
    inspect_chain(&files, format).ok();
});
