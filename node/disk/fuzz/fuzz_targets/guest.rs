//! A guest's disk: partition tables, file systems, their files, page and swap files.
#![no_main]

use std::sync::Arc;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use outrider_disk::block_file::ByteSource;
use outrider_disk::guest::Limits;
use outrider_disk::inspect::{SparseFile, inspect_guest};

fuzz_target!(|input: &[u8]| {
    let file = SparseFile::decode(input);
    let size = file.size().expect("memory has a size");
    let limits = Limits { bytes: 4 << 20, time: Some(Duration::from_secs(20)) };
    for range in &inspect_guest(Arc::new(file), limits) {
        assert!(range.end() <= size, "{range} is outside of the disk");
    }
});
