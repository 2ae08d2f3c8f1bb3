//! Damaged, cut off and foreign files are refused with the right error, and never panic.

use std::path::Path;

use outrider_disk::inspect::inspect_file;
use outrider_disk::vhdx::{CrashPoint, CreateOptions, Header, VhdxLayer, VhdxWriter};
use outrider_disk::{DiskError, DiskFormat, LayerMap, ReadDisk, ReadLayer, open_disk};
use proptest::prelude::*;

#[path = "bytes/vhdx.rs"]
mod bytes;

use bytes::reseal;

const MIB: u64 = 1 << 20;

fn small(path: &Path) -> VhdxWriter {
    let options = CreateOptions { block_size: MIB as u32, ..CreateOptions::dynamic(3 * MIB) };
    let mut disk = VhdxWriter::create(path, &options).expect("a new disk");
    disk.write_at(4096, &[5; 4096]).expect("within the disk");
    disk
}

/// The bytes of a clean disk, of one whose log must be replayed, and of a child.
fn samples() -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let [clean, dirty, child] =
        ["clean.vhdx", "dirty.vhdx", "child.avhdx"].map(|n| dir.path().join(n));
    small(&clean).close().expect("a sound disk");
    small(&dirty).crash(CrashPoint::AfterLog).expect("a sound disk");
    let mut disk = VhdxWriter::create_child(&child, &clean, None).expect("a parent at rest");
    disk.write_at(512, &[6; 512]).expect("within the disk");
    disk.close().expect("a sound disk");
    [clean, dirty, child].map(|path| std::fs::read(path).expect("just written")).into()
}

fn inspect_bytes(bytes: Vec<u8>) -> Result<LayerMap, DiskError> {
    inspect_file(std::sync::Arc::new(bytes), DiskFormat::Vhdx)
}

/// Parts of the file whose bytes mean something.
fn interesting() -> impl Strategy<Value = usize> {
    let k = 1 << 10;
    let m = 1 << 20;
    prop_oneof![
        0..16_usize,
        64 * k..64 * k + 80_usize,
        128 * k..128 * k + 80_usize,
        192 * k..192 * k + 96_usize,
        256 * k..256 * k + 96_usize,
        m..m + 3 * 4096_usize,
        2 * m..2 * m + 256_usize,
        2 * m + 64 * k..2 * m + 64 * k + 512_usize,
        3 * m..3 * m + 64_usize,
        4 * m..7 * m,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn no_damage_makes_a_reader_panic(
        changes in prop::collection::vec((interesting(), any::<u8>()), 1..8),
        cut in prop::option::weighted(0.2, 0..8_usize << 20),
        sealed in any::<bool>(),
    ) {
        static SAMPLES: std::sync::LazyLock<Vec<Vec<u8>>> = std::sync::LazyLock::new(samples);
        for sample in SAMPLES.iter() {
            let mut bytes = sample.clone();
            for (at, value) in &changes {
                if let Some(byte) = bytes.get_mut(*at) {
                    *byte = *value;
                }
            }
            if sealed {
                reseal(&mut bytes);
            }
            bytes.truncate(cut.unwrap_or(bytes.len()));
            // Either answer is right; a panic or an endless loop is not.
            inspect_bytes(bytes).ok();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn no_damage_makes_a_writer_panic(
        changes in prop::collection::vec((interesting(), any::<u8>()), 1..5),
        at in 0..2 * MIB,
    ) {
        static SAMPLES: std::sync::LazyLock<Vec<Vec<u8>>> = std::sync::LazyLock::new(samples);
        let dir = tempfile::tempdir().unwrap();
        let [clean, dirty, child] = ["clean.vhdx", "dirty.vhdx", "child.avhdx"].map(|n| dir.path().join(n));
        std::fs::write(&clean, &SAMPLES[0]).unwrap();
        for (path, sample) in [(&dirty, &SAMPLES[1]), (&child, &SAMPLES[2])] {
            let mut bytes = sample.clone();
            for (at, value) in &changes {
                if let Some(byte) = bytes.get_mut(*at) {
                    *byte = *value;
                }
            }
            reseal(&mut bytes);
            std::fs::write(path, bytes).unwrap();
            // Errors are right answers here.
            if let Ok(mut disk) = VhdxWriter::open(path) {
                let len = (disk.info().size - at.min(disk.info().size)).min(MIB) as usize;
                disk.write_at(at, &vec![8; len]).and_then(|()| disk.close()).ok();
            }
        }
    }
}

#[test]
fn blocks_over_tables_or_each_other_are_corrupt() {
    // The first block at the log, the metadata and the BAT; then two blocks at one place.
    for place in [1_u64, 2, 3] {
        let entry = (place << 20 | 6).to_le_bytes();
        let error = inspect(|bytes| bytes[3 << 20..(3 << 20) + 8].copy_from_slice(&entry));
        assert!(error.to_string().contains("over the log or a table"), "{error}");
    }
    let error = inspect(|bytes| bytes.copy_within(3 << 20..(3 << 20) + 8, (3 << 20) + 8));
    assert!(error.to_string().contains("two blocks into one place"), "{error}");
}

fn inspect(change: impl FnOnce(&mut Vec<u8>)) -> DiskError {
    let mut bytes = samples().swap_remove(0);
    change(&mut bytes);
    inspect_bytes(bytes).expect_err("the damage is real")
}

#[test]
fn one_bad_header_or_region_table_is_survived() {
    for at in [64 << 10, 128 << 10, 192 << 10, 256 << 10] {
        let mut bytes = samples().swap_remove(0);
        bytes[at + 20] ^= 1;
        let map = inspect_bytes(bytes).expect("the other copy is good");
        assert_eq!(map.present.total_len(), MIB);
    }
}

#[test]
fn two_bad_copies_are_corrupt() {
    for (a, b) in [(64 << 10, 128 << 10), (192 << 10, 256 << 10)] {
        let error = inspect(|bytes| {
            bytes[a + 20] ^= 1;
            bytes[b + 20] ^= 1;
        });
        assert!(matches!(error, DiskError::Corrupt { .. }), "{error}");
        assert!(error.to_string().contains("checksum"), "{error}");
    }
}

#[test]
fn headers_that_contradict_each_other_are_corrupt_and_identical_ones_are_not() {
    let mut bytes = samples().swap_remove(0);
    let first: Vec<u8> = bytes[64 << 10..(64 << 10) + 4096].to_vec();
    bytes[128 << 10..(128 << 10) + 4096].copy_from_slice(&first);
    inspect_bytes(bytes.clone()).expect("Disk2VHD writes such files");
    bytes[(128 << 10) + 20] ^= 1;
    reseal(&mut bytes);
    let error = inspect_bytes(bytes).expect_err("same number, other content");
    assert!(matches!(error, DiskError::Corrupt { structure: "header", .. }), "{error}");
}

#[test]
fn the_header_with_the_higher_number_counts_wherever_it_is() {
    let mut bytes = samples().swap_remove(0);
    let (first, second) = (64 << 10, 128 << 10);
    for newer in [first, second] {
        bytes.copy_within(first..first + 4096, second);
        bytes[newer + 8..newer + 16].copy_from_slice(&1000_u64.to_le_bytes());
        bytes[newer + 32] ^= 1;
        reseal(&mut bytes);
        let [a, b] = [first, second].map(|at| bytes[at..at + 4096].to_vec());
        let (header, slot) = Header::choose(&a, &b).expect("both are sound");
        assert_eq!((header.sequence, slot), (1000, usize::from(newer == second)));
        let expected = if newer == first { a } else { b };
        assert_eq!(header.data_write_guid.to_bytes_le(), expected[32..48]);
        bytes = samples().swap_remove(0);
    }
}

#[test]
fn a_file_that_ends_too_early_is_truncated_not_corrupt() {
    let len = samples()[0].len();
    for keep in [100, 70 << 10, 1 << 20, 2 << 20, (3 << 20) + 4, len - (1 << 20), len - (1 << 19)] {
        let error = inspect(|bytes| bytes.truncate(keep));
        assert!(matches!(error, DiskError::Truncated { .. }), "{keep} bytes: {error}");
    }
}

#[test]
fn a_block_in_the_header_area_is_corrupt() {
    let error =
        inspect(|bytes| bytes[3 << 20..(3 << 20) + 8].copy_from_slice(&6_u64.to_le_bytes()));
    assert!(matches!(error, DiskError::Corrupt { .. }), "{error}");
}

#[test]
fn a_log_in_use_without_a_valid_entry_is_corrupt() {
    let mut bytes = samples().swap_remove(1);
    bytes[1 << 20..2 << 20].fill(0);
    let error = inspect_bytes(bytes).expect_err("nothing can be replayed");
    assert!(matches!(error, DiskError::Corrupt { structure: "log", .. }), "{error}");
}

#[test]
fn every_block_state_reads_as_the_format_says() {
    // State of block 0, which has no bytes elsewhere: zeros for all that are not stored.
    for state in [0_u64, 1, 2, 3, 5] {
        let mut bytes = samples().swap_remove(0);
        bytes[3 << 20..(3 << 20) + 8].copy_from_slice(&state.to_le_bytes());
        let map = inspect_bytes(bytes).expect("an allowed state");
        assert!(map.present.is_empty(), "state {state}");
        assert_eq!(map.zeroed.is_empty(), state == 0, "state {state}");
    }
    for state in [4_u64, 7 | 4 << 20] {
        let error =
            inspect(|bytes| bytes[3 << 20..(3 << 20) + 8].copy_from_slice(&state.to_le_bytes()));
        assert!(matches!(error, DiskError::Corrupt { .. }), "state {state}: {error}");
    }
}

#[test]
fn a_foreign_file_is_named_for_what_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let samples: [(&str, Vec<u8>, &str); 5] = [
        ("a.vhdx", Vec::new(), "an empty file"),
        ("b.vhdx", b"QFI\xfb and more".to_vec(), "qcow2"),
        ("c.vhdx", vec![0; 4096], "starts with zeros"),
        ("d.vhd", [vec![0; 1024], b"conectix".to_vec(), vec![0; 504]].concat(), "footer"),
        ("e.txt", b"hello".to_vec(), "starts with"),
    ];
    for (name, bytes, expected) in samples {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let error = open_disk(&path).err().expect("not a disk");
        assert!(matches!(error, DiskError::NotAVirtualDisk { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains(expected) && text.contains(name), "{text}");
    }
}

#[test]
fn a_raw_image_is_raw_whatever_its_guest_wrote_into_its_first_sector() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest.raw");
    std::fs::write(&path, &samples()[0]).unwrap();
    let disk = open_disk(&path).unwrap();
    let mut start = [0; 8];
    disk.read_at(0, &mut start).unwrap();
    assert_eq!(&start, b"vhdxfile");
}

#[test]
fn a_range_outside_the_disk_is_refused_and_the_writer_lives_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhdx");
    let mut disk = small(&path);
    for (offset, len) in [(3 * MIB, 1), (3 * MIB - 1, 2), (u64::MAX, 1)] {
        let written = disk.write_at(offset, &vec![0; len]);
        assert!(matches!(written, Err(DiskError::OutOfBounds { .. })), "{written:?}");
        let read = disk.read_at(offset, &mut vec![0; len]);
        assert!(matches!(read, Err(DiskError::OutOfBounds { .. })), "{read:?}");
    }
    disk.write_at(3 * MIB - 1, &[9]).unwrap();
    disk.close().unwrap();
}

#[test]
fn impossible_disks_are_refused_before_a_file_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhdx");
    let good = CreateOptions::dynamic(3 * MIB);
    for bad in [
        CreateOptions { size: 0, ..good.clone() },
        CreateOptions { size: 1000, ..good.clone() },
        CreateOptions { size: (64 << 40) + 512, ..good.clone() },
        CreateOptions { block_size: 3 << 20, ..good.clone() },
        CreateOptions { block_size: 512 << 20, ..good.clone() },
        CreateOptions { logical_sector: 1024, ..good.clone() },
    ] {
        let made = VhdxWriter::create(&path, &bad);
        assert!(matches!(made, Err(DiskError::InvalidOption { .. })), "{bad:?}: {made:?}");
        assert!(!path.exists());
    }
}

#[test]
fn the_largest_disk_opens_without_reading_its_whole_table() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("huge.vhdx");
    let options = CreateOptions { block_size: MIB as u32, ..CreateOptions::dynamic(64 << 40) };
    let mut disk = VhdxWriter::create(&path, &options).unwrap();
    disk.write_at((64 << 40) - 512, &[3; 512]).unwrap();
    disk.close().unwrap();
    let disk = VhdxLayer::open(&path).unwrap();
    assert_eq!(disk.info().size, 64 << 40);
    let chain = open_disk(&path).unwrap();
    let mut end = [0; 512];
    chain.read_at((64 << 40) - 512, &mut end).unwrap();
    assert_eq!(end, [3; 512]);
}
