//! The log of a VHDX alone: its active sequence is looked for and replayed.
#![no_main]

use libfuzzer_sys::fuzz_target;
use outrider_disk::DiskFormat;
use outrider_disk::block_file::ByteSource;
use outrider_disk::inspect::{SparseFile, inspect_log, reseal};

/// Longest log: more would only be slower.
const MAX: u64 = 1 << 20;

fuzz_target!(|input: &[u8]| {
    let mut file = SparseFile::decode(input);
    reseal(&mut file, DiskFormat::Vhdx);
    let mut log = vec![0; file.len().min(MAX) as usize];
    if file.read_exact_at(0, &mut log).is_ok() {
        inspect_log(&log).ok();
    }
});
