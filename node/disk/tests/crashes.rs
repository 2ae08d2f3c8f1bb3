//! What is left after a writer died at any moment.

use std::path::Path;

use outrider_disk::vhdx::{CrashPoint, CreateOptions, VhdxLayer, VhdxWriter};
use outrider_disk::{DiskChain, ReadDisk, ReadLayer};

const MIB: u64 = 1 << 20;

fn create(path: &Path) -> VhdxWriter {
    let options = CreateOptions { block_size: MIB as u32, ..CreateOptions::dynamic(600 * MIB) };
    VhdxWriter::create(path, &options).expect("a new disk")
}

fn byte(disk: &dyn ReadDisk, offset: u64) -> u8 {
    let mut byte = [0];
    disk.read_at(offset, &mut byte).expect("within the disk");
    byte[0]
}

/// 1 is flushed in block 0, 2 is not in block 1; then the writer dies. Gives what a reader and the next
/// writer see of block 1.
fn crash(at: Option<CrashPoint>) -> (u8, u8) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhdx");
    let mut disk = create(&path);
    disk.write_at(0, &[1; 512]).unwrap();
    disk.flush().unwrap();
    disk.write_at(MIB, &[2; 512]).unwrap();
    match at {
        Some(at) => disk.crash(at).unwrap(),
        None => drop(disk),
    }
    let before = std::fs::read(&path).unwrap();
    let reader = DiskChain::open(&path).unwrap();
    assert!(reader.layers().all(ReadLayer::is_dirty));
    assert_eq!(byte(&reader, 0), 1, "what was flushed is there");
    let seen = byte(&reader, MIB);
    assert!(std::fs::read(&path).unwrap() == before, "reading never changes a source");

    let mut writer = VhdxWriter::open(&path).unwrap();
    assert!(!VhdxLayer::open(&path).unwrap().is_dirty(), "the log is back in its places");
    assert_eq!(byte(&writer, 0), 1);
    let kept = byte(&writer, MIB);
    writer.write_at(2 * MIB, &[3; 512]).unwrap();
    writer.close().unwrap();
    let again = DiskChain::open(&path).unwrap();
    assert_eq!([byte(&again, 0), byte(&again, MIB), byte(&again, 2 * MIB)], [1, kept, 3]);
    (seen, kept)
}

#[test]
fn what_reached_the_log_survives() {
    assert_eq!(crash(Some(CrashPoint::AfterLog)), (2, 2));
    assert_eq!(crash(Some(CrashPoint::HalfApplied)), (2, 2));
}

#[test]
fn what_did_not_reach_the_log_is_cleanly_absent() {
    assert_eq!(crash(Some(CrashPoint::BeforeLog)), (0, 0));
    assert_eq!(crash(Some(CrashPoint::LogTorn)), (0, 0));
    assert_eq!(crash(None), (0, 0));
}

#[test]
fn a_child_that_crashed_shows_its_parent_where_it_lost_a_write() {
    let dir = tempfile::tempdir().unwrap();
    let (base, child) = (dir.path().join("base.vhdx"), dir.path().join("child.avhdx"));
    let mut disk = create(&base);
    disk.write_at(0, &[1; 4096]).unwrap();
    disk.close().unwrap();
    for (at, expected) in [(CrashPoint::BeforeLog, 1), (CrashPoint::HalfApplied, 7)] {
        let mut disk = VhdxWriter::create_child(&child, &base, None).unwrap();
        disk.write_at(512, &[7; 512]).unwrap();
        disk.crash(at).unwrap();
        let chain = DiskChain::open(&child).unwrap();
        assert_eq!([byte(&chain, 0), byte(&chain, 512), byte(&chain, 1024)], [1, expected, 1]);
        std::fs::remove_file(&child).unwrap();
    }
}

#[test]
fn the_log_goes_round_its_end_many_times() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhdx");
    let mut disk = create(&path);
    for block in 0..599 {
        disk.write_at(block * MIB, &[block as u8 | 1; 512]).unwrap();
        disk.flush().unwrap();
    }
    disk.write_at(599 * MIB, &[77; 512]).unwrap();
    disk.crash(CrashPoint::AfterLog).unwrap();
    let disk = DiskChain::open(&path).unwrap();
    assert!((0..599).all(|block| byte(&disk, block * MIB) == block as u8 | 1));
    assert_eq!(byte(&disk, 599 * MIB), 77);
}

#[test]
fn identifiers_change_only_when_something_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhdx");
    create(&path).close().unwrap();
    let guids = || {
        let layer = VhdxLayer::open(&path).unwrap();
        (layer.header().file_write_guid, layer.header().data_write_guid)
    };
    let new = guids();
    VhdxWriter::open(&path).unwrap().close().unwrap();
    assert_eq!(guids(), new);
    let mut disk = VhdxWriter::open(&path).unwrap();
    disk.write_at(0, &[1]).unwrap();
    let said = disk.info().data_write_guid;
    disk.write_at(1, &[1]).unwrap();
    disk.close().unwrap();
    assert_ne!(guids().0, new.0);
    assert_ne!(guids().1, new.1);
    assert_eq!(guids().1, said, "one change for each opening");
}

#[test]
fn more_changes_than_a_log_entry_holds_are_committed_on_the_way() {
    let dir = tempfile::tempdir().unwrap();
    let (base, child) = (dir.path().join("base.vhdx"), dir.path().join("child.avhdx"));
    create(&base).close().unwrap();
    // Blocks of 1 MiB have 256 bytes of bits: every 16th is in another sector of the bitmap.
    let mut disk = VhdxWriter::create_child(&child, &base, Some(MIB as u32)).unwrap();
    let blocks: Vec<u64> = (0..600).step_by(2).collect();
    for block in &blocks {
        disk.write_at(block * MIB + 512, &[*block as u8 | 1; 512]).unwrap();
    }
    assert!(blocks.iter().all(|block| byte(&disk, block * MIB + 512) == *block as u8 | 1));
    disk.close().unwrap();
    let disk = DiskChain::open(&child).unwrap();
    assert!(blocks.iter().all(|block| byte(&disk, block * MIB + 512) == *block as u8 | 1));
    assert_eq!(disk.allocated().unwrap().total_len(), 512 * blocks.len() as u64);
}
