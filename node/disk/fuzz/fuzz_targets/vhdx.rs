//! One VHDX file: opened, its log replayed, its tables checked, its map listed, some of it read.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use outrider_disk::DiskFormat;
use outrider_disk::inspect::{SparseFile, inspect_chain, inspect_file, reseal};

fuzz_target!(|input: &[u8]| {
    let mut file = SparseFile::decode(input);
    reseal(&mut file, DiskFormat::Vhdx);
    let file = Arc::new(file);
    inspect_file(file.clone(), DiskFormat::Vhdx).ok();
    inspect_chain(&[file], DiskFormat::Vhdx).ok();
});
