//! VHD files against a model in memory, and the traps of the format.

use std::path::{Path, PathBuf};

use outrider_disk::merge::{merge_child_into_parent, set_parent};
use outrider_disk::vhd::{CreateOptions, VhdLayer, VhdWriter};
use outrider_disk::{
    DiskChain, DiskError, DiskFormat, DiskKind, DiskWriter, NewDisk, RangeSet, ReadDisk, ReadLayer,
    compare, open_disk,
};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 9 * MIB + 512;

fn whole(disk: &dyn ReadDisk) -> Vec<u8> {
    let mut bytes = vec![0; disk.info().size as usize];
    disk.read_at(0, &mut bytes).expect("within the disk");
    bytes
}

#[derive(Debug, Clone)]
enum Step {
    Write { at: u64, len: u64, fill: u8 },
    Zero { at: u64, len: u64 },
    Flush,
    Reopen,
    Checkpoint,
    EndCheckpoint,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = (0..SIZE, 1..=3 * MIB).prop_map(|(at, len)| (at, len.min(SIZE - at)));
    let small = (0..SIZE / 512, 1..9_u64)
        .prop_map(|(sector, count)| (sector * 512, (count * 512).min(SIZE - sector * 512)));
    let step = prop_oneof![
        4 => (range.clone(), 1..=255_u8).prop_map(|((at, len), fill)| Step::Write { at, len, fill }),
        6 => (small, 1..=255_u8).prop_map(|((at, len), fill)| Step::Write { at, len, fill }),
        2 => range.prop_map(|(at, len)| Step::Zero { at, len }),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
        2 => Just(Step::Checkpoint),
        1 => Just(Step::EndCheckpoint),
    ];
    prop::collection::vec(step, 1..25)
}

/// Plays steps on a disk of a kind and checks every file that they leave.
fn play(kind: DiskKind, block_size: u32, steps: &[Step]) {
    let dir = tempfile::tempdir().unwrap();
    let mut leaf = dir.path().join("base.vhd");
    let block_size = Some(block_size);
    let new = NewDisk { block_size, ..NewDisk::of(DiskFormat::Vhd, kind, SIZE) };
    let mut disk = DiskWriter::create(&leaf, &new).expect("a new disk");
    let mut bytes = vec![0; SIZE as usize];
    let mut frozen: Vec<(PathBuf, Vec<u8>)> = Vec::new();
    for (i, step) in steps.iter().enumerate() {
        match *step {
            Step::Write { at, len, fill } => {
                let data: Vec<u8> = (0..len).map(|i| fill.wrapping_add((i / 512) as u8)).collect();
                disk.write_at(at, &data).expect("within the disk");
                bytes[at as usize..][..data.len()].copy_from_slice(&data);
            }
            Step::Zero { at, len } => {
                disk.write_zeroes(at, len).expect("within the disk");
                bytes[at as usize..(at + len) as usize].fill(0);
            }
            Step::Flush => disk.flush().expect("a sound disk"),
            Step::Reopen => {
                disk.close().expect("a sound disk");
                disk = DiskWriter::open(&leaf).expect("a closed disk");
            }
            Step::Checkpoint => {
                disk.close().expect("a sound disk");
                let child = dir.path().join(format!("checkpoint-{i}.avhd"));
                disk = DiskWriter::create_child(&child, &leaf, block_size).expect("a parent");
                frozen.push((std::mem::replace(&mut leaf, child), bytes.clone()));
            }
            Step::EndCheckpoint => {
                if let Some((parent, _)) = frozen.pop() {
                    disk.close().expect("a sound disk");
                    merge_child_into_parent(&leaf, &parent).expect("child and parent at rest");
                    std::fs::remove_file(&leaf).expect("the child is ours");
                    disk = DiskWriter::open(&parent).expect("a merged disk");
                    leaf = parent;
                }
            }
        }
    }
    assert!(whole(&disk) == bytes, "the open disk reads other bytes");
    disk.close().expect("a sound disk");
    frozen.push((leaf, bytes));
    for (path, bytes) in &frozen {
        let chain = DiskChain::open(path).expect("a closed chain");
        assert!(!chain.is_dirty() && chain.info().format == DiskFormat::Vhd);
        chain.layers().try_for_each(ReadLayer::check).expect("every block has its own place");
        assert!(whole(&chain) == *bytes, "{} reads other bytes", path.display());
        let everything = RangeSet::single(0, SIZE);
        for hole in &everything.subtract(&chain.allocated().expect("a sound disk")) {
            let part = &bytes[hole.start as usize..hole.end() as usize];
            assert!(part.iter().all(|b| *b == 0), "{hole} is not zeros but not allocated");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn a_dynamic_vhd_and_its_checkpoints_read_as_the_guest_wrote_them(steps in steps()) {
        play(DiskKind::Dynamic, 2 << 20, &steps);
    }

    #[test]
    fn so_do_those_of_small_blocks(steps in steps()) {
        play(DiskKind::Dynamic, 512 << 10, &steps);
    }

    #[test]
    fn a_fixed_vhd_and_its_checkpoints_read_as_the_guest_wrote_them(steps in steps()) {
        play(DiskKind::Fixed, 2 << 20, &steps);
    }
}

fn dynamic(path: &Path) -> VhdWriter {
    VhdWriter::create(path, &CreateOptions::dynamic(SIZE)).expect("a new disk")
}

/// base <- middle <- leaf, each with a byte of its own.
fn three(dir: &Path) -> [PathBuf; 3] {
    let paths = ["base.vhd", "middle.avhd", "leaf.avhd"].map(|name| dir.join(name));
    let mut base = dynamic(&paths[0]);
    base.write_at(0, &[1; 4096]).unwrap();
    base.close().unwrap();
    for (i, pair) in paths.windows(2).enumerate() {
        let mut child = VhdWriter::create_child(&pair[1], &pair[0], None).unwrap();
        child.write_at((i as u64 + 1) * MIB, &[i as u8 + 2; 4096]).unwrap();
        child.close().unwrap();
    }
    paths
}

#[test]
fn a_chain_is_found_after_its_folder_moved_and_after_it_was_copied_into_one_folder() {
    let dir = tempfile::tempdir().unwrap();
    let (disks, checkpoints) = (dir.path().join("disks"), dir.path().join("checkpoints/vm"));
    std::fs::create_dir_all(&disks).unwrap();
    std::fs::create_dir_all(&checkpoints).unwrap();
    let (base, child) = (disks.join("Ω disk.vhd"), checkpoints.join("child.avhd"));
    dynamic(&base).close().unwrap();
    let mut disk = VhdWriter::create_child(&child, &base, None).unwrap();
    disk.write_at(3 * MIB, &[5; 512]).unwrap();
    disk.close().unwrap();
    let layer = VhdLayer::open(&child).unwrap();
    let paths = layer.parent().expect("a child names its parent");
    assert_eq!(paths.relative.as_deref(), Some(r"..\..\disks\Ω disk.vhd"));
    assert_eq!(paths.absolute.as_deref(), base.canonicalize().unwrap().to_str());
    assert_eq!(layer.header().unwrap().parent_name, "Ω disk.vhd");
    let before = whole(&DiskChain::open(&child).unwrap());
    let flat = tempfile::tempdir().unwrap();
    std::fs::rename(&base, flat.path().join("Ω disk.vhd")).unwrap();
    let moved = flat.path().join("child.avhd");
    std::fs::rename(&child, &moved).unwrap();
    assert!(whole(&DiskChain::open(&moved).unwrap()) == before);
}

#[test]
fn a_chain_has_the_id_of_its_base_and_children_know_their_parents_by_it() {
    let dir = tempfile::tempdir().unwrap();
    let paths = three(dir.path());
    let base = VhdLayer::open(&paths[0]).unwrap();
    let chain = DiskChain::open(&paths[2]).unwrap();
    assert_eq!(chain.info().disk_id, base.footer().id);
    assert!(!chain.info().disk_id.is_nil() && chain.info().data_write_guid.is_nil());
    std::fs::remove_file(&paths[0]).unwrap();
    match DiskChain::open(&paths[2]) {
        Err(DiskError::ParentMissing { child, tried }) => {
            assert!(child.ends_with("middle.avhd") && tried.len() == 2, "{tried:?}");
        }
        other => panic!("{other:?}"),
    }
    dynamic(&paths[0]).close().unwrap();
    match DiskChain::open(&paths[2]) {
        Err(DiskError::ParentMismatch { what: "UUID", .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_parent_of_another_time_is_told_and_read() {
    let dir = tempfile::tempdir().unwrap();
    let paths = three(dir.path());
    assert!(DiskChain::open(&paths[2]).unwrap().notes().is_empty());
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(3600);
    let base = std::fs::File::options().write(true).open(&paths[0]).unwrap();
    base.set_modified(later).unwrap();
    let notes = DiskChain::open(&paths[2]).unwrap().notes();
    assert!(notes.len() == 1 && notes[0].contains("base.vhd"), "{notes:?}");
}

#[test]
fn a_grandchild_is_moved_to_the_base_after_the_middle_was_merged() {
    let dir = tempfile::tempdir().unwrap();
    let paths = three(dir.path());
    let before = whole(&DiskChain::open(&paths[2]).unwrap());
    let changed = merge_child_into_parent(&paths[1], &paths[0]).unwrap();
    assert_eq!(changed, RangeSet::single(MIB, 4096));
    set_parent(&paths[2], &paths[0]).unwrap();
    std::fs::remove_file(&paths[1]).unwrap();
    let chain = DiskChain::open(&paths[2]).unwrap();
    assert_eq!(chain.files().len(), 2);
    assert!(whole(&chain) == before && chain.notes().is_empty(), "{:?}", chain.notes());
}

#[test]
fn a_chain_of_two_formats_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (vhd, vhdx, child) =
        (dir.path().join("a.vhd"), dir.path().join("b.vhdx"), dir.path().join("c.vhd"));
    dynamic(&vhd).close().unwrap();
    let new = NewDisk::of(DiskFormat::Vhdx, DiskKind::Dynamic, SIZE);
    DiskWriter::create(&vhdx, &new).unwrap().close().unwrap();
    VhdWriter::create_child(&child, &vhd, None).unwrap().close().unwrap();
    std::fs::copy(&vhdx, &vhd).unwrap();
    let error = DiskChain::open(&child).expect_err("a VHDX under the parent's name").to_string();
    assert!(error.contains("rename it to .vhdx"), "{error}");
    let made = VhdWriter::create_child(dir.path().join("d.vhd"), &vhdx, None);
    let error = made.expect_err("the parent is a VHDX").to_string();
    assert!(error.contains("b.vhdx"), "{error}");
}

/// The bytes of a dynamic disk with a block, a fixed one and a child.
fn samples() -> [Vec<u8>; 3] {
    let dir = tempfile::tempdir().unwrap();
    let paths = ["dynamic.vhd", "fixed.vhd", "child.avhd"].map(|n| dir.path().join(n));
    let mut disk = dynamic(&paths[0]);
    disk.write_at(4096, &[5; 8192]).unwrap();
    disk.close().unwrap();
    let mut disk = VhdWriter::create(&paths[1], &CreateOptions::fixed(MIB)).unwrap();
    disk.write_at(4096, &[5; 8192]).unwrap();
    disk.close().unwrap();
    let mut disk = VhdWriter::create_child(&paths[2], &paths[0], None).unwrap();
    disk.write_at(4096, &[6; 512]).unwrap();
    disk.close().unwrap();
    paths.map(|path| std::fs::read(path).unwrap())
}

fn open(bytes: &[u8]) -> Result<VhdLayer, DiskError> {
    VhdLayer::from_source("memory.vhd".into(), std::sync::Arc::new(bytes.to_vec()))
}

fn map_of(bytes: &[u8]) -> RangeSet {
    open(bytes).expect("a sound disk").map().expect("a sound disk").present
}

#[test]
fn a_footer_torn_off_a_dynamic_disk_is_taken_from_its_copy_and_written_again() {
    let [disk, ..] = samples();
    let expected = map_of(&disk);
    let len = disk.len();
    let damaged = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = disk.clone();
        change(&mut bytes);
        bytes
    };
    for (torn, dirty) in [
        (damaged(&|bytes| bytes.truncate(len - 512)), true),
        (damaged(&|bytes| bytes.truncate(len - 100)), true),
        (damaged(&|bytes| bytes[len - 300] ^= 1), true),
        (damaged(&|bytes| bytes[100] ^= 1), false),
    ] {
        let layer = open(&torn).expect("one footer is good");
        assert_eq!(layer.is_dirty(), dirty);
        assert_eq!(layer.notes().len(), 1, "{:?}", layer.notes());
        assert_eq!(map_of(&torn), expected);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("torn.vhd");
        std::fs::write(&path, &torn).unwrap();
        let mut writer = VhdWriter::open(&path).unwrap();
        writer.write_at(6 * MIB, &[9; 512]).unwrap();
        writer.close().unwrap();
        let layer = VhdLayer::open(&path).unwrap();
        assert!(!layer.is_dirty());
        layer.check().unwrap();
        let chain = DiskChain::open(&path).unwrap();
        let mut byte = [0];
        for (at, expected) in [(4096, 5), (6 * MIB, 9)] {
            chain.read_at(at, &mut byte).unwrap();
            assert_eq!(byte[0], expected);
        }
    }
    let both = damaged(&|bytes| {
        bytes[len - 300] ^= 1;
        bytes[100] ^= 1;
    });
    assert!(matches!(open(&both), Err(DiskError::NotAVirtualDisk { .. })));
}

#[test]
fn a_writer_that_dies_leaves_what_was_flushed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhd");
    let mut disk = dynamic(&path);
    disk.write_at(0, &[1; 512]).unwrap();
    disk.flush().unwrap();
    disk.write_at(4 * MIB, &[2; 512]).unwrap();
    drop(disk);
    let chain = DiskChain::open(&path).unwrap();
    chain.layers().try_for_each(ReadLayer::check).unwrap();
    let mut byte = [0];
    for (at, expected) in [(0, 1), (4 * MIB, 0)] {
        chain.read_at(at, &mut byte).unwrap();
        assert_eq!(byte[0], expected);
    }
    let mut disk = VhdWriter::open(&path).unwrap();
    disk.write_at(4 * MIB, &[3; 512]).unwrap();
    disk.close().unwrap();
    assert_eq!(DiskChain::open(&path).unwrap().allocated().unwrap().total_len(), 4 * MIB);
}

#[test]
fn a_footer_of_511_bytes_is_read() {
    let [dynamic, fixed, _] = samples();
    for bytes in [dynamic, fixed] {
        let old = &bytes[..bytes.len() - 1];
        let layer = open(old).expect("old programs wrote such files");
        assert!(!layer.is_dirty() && layer.notes().is_empty());
    }
}

#[test]
fn the_size_is_the_current_size_and_not_the_geometry() {
    let [_, mut fixed, _] = samples();
    let at = fixed.len() - 512;
    // A program that goes by the geometry, and one that grew the disk.
    fixed[at + 28..at + 32].copy_from_slice(b"vpc ");
    fixed[at + 40..at + 48].copy_from_slice(&1000_u64.to_be_bytes());
    reseal(&mut fixed[at..], 64);
    let layer = open(&fixed).unwrap();
    assert_eq!(layer.info().size, MIB);
    assert!(layer.notes()[0].contains("geometry"), "{:?}", layer.notes());
}

fn reseal(structure: &mut [u8], at: usize) {
    structure[at..at + 4].fill(0);
    let sum: u32 = structure.iter().map(|b| u32::from(*b)).sum();
    structure[at..at + 4].copy_from_slice(&(!sum).to_be_bytes());
}

#[test]
fn a_guest_cannot_make_its_fixed_disk_another_disk() {
    let [_, fixed, child] = samples();
    let dir = tempfile::tempdir().unwrap();
    // The first sectors of a fixed disk are the guest's: a footer and header of a child, or a VHDX.
    let vhdx = dir.path().join("x.vhdx");
    let new = NewDisk::of(DiskFormat::Vhdx, DiskKind::Dynamic, MIB);
    DiskWriter::create(&vhdx, &new).unwrap().close().unwrap();
    for evil in [&child[..8192], &std::fs::read(&vhdx).unwrap()[..512 << 10]] {
        let mut bytes = fixed.clone();
        bytes[..evil.len()].copy_from_slice(evil);
        let path = dir.path().join("guest.vhd");
        std::fs::write(&path, &bytes).unwrap();
        let disk = open_disk(&path).unwrap();
        assert_eq!((disk.info().kind, disk.info().format), (DiskKind::Fixed, DiskFormat::Vhd));
        assert!(whole(&disk)[..evil.len()] == *evil);
    }
    let unnamed = dir.path().join("guest.disk");
    std::fs::rename(dir.path().join("guest.vhd"), &unnamed).unwrap();
    let error = open_disk(&unnamed).err().expect("it could be both").to_string();
    assert!(error.contains("a VHDX or a fixed VHD"), "{error}");
}

#[test]
fn a_sector_without_its_bit_is_zeros_in_a_dynamic_disk() {
    let [mut disk, ..] = samples();
    let layer = open(&disk).unwrap();
    let mut at = None;
    layer
        .runs(4096, 512, &mut |run| {
            at = Some(run.presence);
            Ok(())
        })
        .unwrap();
    let Some(outrider_disk::Presence::Here { file_offset }) = at else { panic!("{at:?}") };
    let bitmap = file_offset as usize - 4096 - 512;
    assert_eq!(disk[bitmap + 1], 0xff);
    // The most significant bit comes first: sector 8 is the first of the second byte.
    disk[bitmap + 1] = 0x7f;
    let layer = open(&disk).unwrap();
    let mut hole = RangeSet::new();
    layer
        .runs(0, MIB, &mut |run| {
            if run.presence == outrider_disk::Presence::Zero {
                hole.insert(run.offset, run.len);
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(hole, RangeSet::single(4096, 512));
}

#[test]
fn damage_is_named_for_what_it_is() {
    let [disk, fixed, _] = samples();
    // Where the table is, and a table entry beyond the end, over the table, and twice.
    let table = 1536;
    let entry = |n: usize, sector: u32| {
        let mut bytes = disk.clone();
        bytes[table + n * 4..table + n * 4 + 4].copy_from_slice(&sector.to_be_bytes());
        bytes
    };
    let first = u32::from_be_bytes(disk[table..table + 4].try_into().unwrap());
    let error = open(&entry(1, 1 << 24)).unwrap().map().unwrap_err();
    assert!(matches!(error, DiskError::Truncated { .. }), "{error}");
    let error = open(&entry(1, 2)).unwrap().map().unwrap_err().to_string();
    assert!(error.contains("over the header or the table"), "{error}");
    let error = open(&entry(1, first)).unwrap().check().unwrap_err().to_string();
    assert!(error.contains("two blocks into one place"), "{error}");
    let mut bytes = disk.clone();
    bytes[512 + 32..512 + 36].copy_from_slice(&3_000_000_u32.to_be_bytes());
    reseal(&mut bytes[512..1536], 36);
    let error = open(&bytes).unwrap_err().to_string();
    assert!(error.contains("block size 3000000"), "{error}");
    let mut bytes = disk.clone();
    bytes[600] ^= 1;
    let error = open(&bytes).unwrap_err().to_string();
    assert!(error.contains("dynamic header") && error.contains("checksum"), "{error}");
    // A fixed disk that lost its middle still has its footer.
    let cut = [&fixed[..1000], &fixed[fixed.len() - 512..]].concat();
    assert!(matches!(open(&cut), Err(DiskError::Truncated { .. })));
}

#[test]
fn what_a_vhd_cannot_be_is_refused_before_a_file_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhd");
    let good = NewDisk::of(DiskFormat::Vhd, DiskKind::Dynamic, SIZE);
    for bad in [
        NewDisk { size: 0, ..good.clone() },
        NewDisk { size: 1000, ..good.clone() },
        NewDisk { size: (2040 << 30) + 512, ..good.clone() },
        NewDisk { block_size: Some(1 << 20), ..good.clone() },
        NewDisk { logical_sector: 4096, ..good.clone() },
        NewDisk { kind: DiskKind::Differencing, ..good.clone() },
    ] {
        let made = DiskWriter::create(&path, &bad);
        assert!(matches!(made, Err(DiskError::InvalidOption { .. })), "{bad:?}: {made:?}");
        assert!(!path.exists());
    }
    let largest = NewDisk { size: 2040 << 30, block_size: Some(512 << 10), ..good };
    let mut disk = DiskWriter::create(&path, &largest).unwrap();
    disk.write_at((2040 << 30) - 512, &[3; 512]).unwrap();
    disk.close().unwrap();
    let disk = open_disk(&path).unwrap();
    assert_eq!(disk.allocated().unwrap(), RangeSet::single((2040 << 30) - (512 << 10), 512 << 10));
}

#[test]
fn a_vhd_set_is_refused_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shared.vhds");
    std::fs::write(&path, samples()[0].clone()).unwrap();
    let error = open_disk(&path).err().expect("a VHD set").to_string();
    assert!(error.contains("VHD set") && error.contains("inside the guests"), "{error}");
}

#[test]
fn copies_compare_equal_across_formats() {
    let dir = tempfile::tempdir().unwrap();
    let (vhd, vhdx) = (dir.path().join("a.vhd"), dir.path().join("a.vhdx"));
    for (path, format) in [(&vhd, DiskFormat::Vhd), (&vhdx, DiskFormat::Vhdx)] {
        let mut disk =
            DiskWriter::create(path, &NewDisk::of(format, DiskKind::Dynamic, SIZE)).unwrap();
        disk.write_at(5 * MIB - 100, &[7; 300]).unwrap();
        disk.close().unwrap();
    }
    let (a, b) = (open_disk(&vhd).unwrap(), open_disk(&vhdx).unwrap());
    assert_eq!(compare::first_difference(&a, &b).unwrap(), None);
}
