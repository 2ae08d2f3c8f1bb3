//! Differencing disks against a model in memory: reading, allocation, merging, linkage.

use std::path::{Path, PathBuf};

use outrider_disk::vhdx::{CreateOptions, VhdxLayer, VhdxWriter, set_parent};
use outrider_disk::{
    DiskChain, DiskError, DiskKind, RangeSet, ReadDisk, ReadLayer, compare,
    merge::merge_child_into_parent,
};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

fn base_options(size: u64, sector: u32) -> CreateOptions {
    let block_size = MIB as u32;
    CreateOptions { block_size, logical_sector: sector, ..CreateOptions::dynamic(size) }
}

fn whole(disk: &dyn ReadDisk) -> Vec<u8> {
    let mut bytes = vec![0; disk.info().size as usize];
    disk.read_at(0, &mut bytes).expect("within the disk");
    bytes
}

/// Everything that is not zero must be allocated.
fn assert_map_covers(disk: &dyn ReadDisk, bytes: &[u8]) {
    let allocated = disk.allocated().expect("a sound disk");
    let everything = RangeSet::single(0, bytes.len() as u64);
    for hole in &everything.subtract(&allocated) {
        let part = &bytes[hole.start as usize..hole.end() as usize];
        assert!(part.iter().all(|b| *b == 0), "{hole} is not zeros but not allocated");
    }
}

/// One thing that a guest or an administrator does.
#[derive(Debug, Clone)]
enum Step {
    Write { at: u64, len: u64, fill: u8 },
    Zero { at: u64, len: u64 },
    Flush,
    Reopen,
    Checkpoint { block_mib: u32 },
    EndCheckpoint,
}

fn steps(size: u64) -> impl Strategy<Value = Vec<Step>> {
    let range = (0..size, 1..=3 * MIB, any::<bool>()).prop_map(move |(at, len, aligned)| {
        let at = if aligned { at / 4096 * 4096 } else { at };
        let len = if aligned { len.next_multiple_of(4096) } else { len };
        (at, len.min(size - at))
    });
    let small = (0..size / 512, 1..9_u64)
        .prop_map(move |(sector, count)| (sector * 512, (count * 512).min(size - sector * 512)));
    let step = prop_oneof![
        4 => (range.clone(), 1..=255_u8).prop_map(|((at, len), fill)| Step::Write { at, len, fill }),
        4 => (small, 1..=255_u8).prop_map(|((at, len), fill)| Step::Write { at, len, fill }),
        2 => range.prop_map(|(at, len)| Step::Zero { at, len }),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
        2 => prop_oneof![Just(1), Just(2), Just(8)].prop_map(|block_mib| Step::Checkpoint { block_mib }),
        1 => Just(Step::EndCheckpoint),
    ];
    prop::collection::vec(step, 1..30)
}

/// The files of a running disk and, for each frozen one, the bytes that it must keep showing.
struct Machine {
    dir: PathBuf,
    frozen: Vec<(PathBuf, Vec<u8>)>,
    leaf: PathBuf,
    disk: VhdxWriter,
    bytes: Vec<u8>,
    made: usize,
}

impl Machine {
    fn new(dir: &Path, size: u64, sector: u32) -> Self {
        let leaf = dir.join("base.vhdx");
        let disk = VhdxWriter::create(&leaf, &base_options(size, sector)).expect("a new disk");
        let bytes = vec![0; size as usize];
        Self { dir: dir.to_owned(), frozen: Vec::new(), leaf, disk, bytes, made: 0 }
    }

    fn run(mut self, step: &Step) -> Self {
        match *step {
            Step::Write { at, len, fill } => {
                let data: Vec<u8> = (0..len).map(|i| fill.wrapping_add((i / 512) as u8)).collect();
                self.disk.write_at(at, &data).expect("within the disk");
                self.bytes[at as usize..][..data.len()].copy_from_slice(&data);
            }
            Step::Zero { at, len } => {
                self.disk.write_zeroes(at, len).expect("within the disk");
                self.bytes[at as usize..(at + len) as usize].fill(0);
            }
            Step::Flush => self.disk.flush().expect("a sound disk"),
            Step::Reopen => {
                self.disk.close().expect("a sound disk");
                self.disk = VhdxWriter::open(&self.leaf).expect("a closed disk");
            }
            Step::Checkpoint { block_mib } => {
                self.disk.close().expect("a sound disk");
                self.made += 1;
                let child = self.dir.join(format!("checkpoint-{}.avhdx", self.made));
                self.disk = VhdxWriter::create_child(&child, &self.leaf, Some(block_mib << 20))
                    .expect("a parent at rest");
                self.frozen.push((std::mem::replace(&mut self.leaf, child), self.bytes.clone()));
            }
            Step::EndCheckpoint => {
                if let Some((parent, _)) = self.frozen.pop() {
                    self.disk.close().expect("a sound disk");
                    merge_child_into_parent(&self.leaf, &parent).expect("child and parent at rest");
                    std::fs::remove_file(&self.leaf).expect("the child is ours");
                    self.disk = VhdxWriter::open(&parent).expect("a merged disk");
                    self.leaf = parent;
                }
            }
        }
        self
    }

    fn check(self) {
        assert!(whole(&self.disk) == self.bytes, "the open disk reads other bytes");
        assert_map_covers(&self.disk, &self.bytes);
        self.disk.close().expect("a sound disk");
        for (path, bytes) in self.frozen.iter().chain([&(self.leaf, self.bytes)]) {
            let chain = DiskChain::open(path).expect("a closed chain");
            chain.layers().try_for_each(ReadLayer::check).expect("every block has its own place");
            assert!(whole(&chain) == *bytes, "{} reads other bytes", path.display());
            assert_map_covers(&chain, bytes);
            // Outside of what its upper files decide, a disk is what the files below them show.
            let files = chain.files();
            for (count, below) in files.iter().enumerate().skip(1) {
                let below = whole(&DiskChain::open(below).expect("a closed chain"));
                let decided = chain.decided(count).expect("sound tables");
                for rest in &RangeSet::single(0, bytes.len() as u64).subtract(&decided) {
                    let (from, to) = (rest.start as usize, rest.end() as usize);
                    assert!(
                        bytes[from..to] == below[from..to],
                        "{rest} differs {count} files below"
                    );
                }
            }
            let all = chain.decided(files.len()).expect("sound tables");
            assert_eq!(all.total_len(), bytes.len() as u64);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_chain_reads_as_the_guest_wrote_it(steps in steps(11 * MIB + 512)) {
        let dir = tempfile::tempdir().unwrap();
        steps.iter().fold(Machine::new(dir.path(), 11 * MIB + 512, 512), Machine::run).check();
    }

    #[test]
    fn a_chain_of_4_kib_sectors_reads_as_the_guest_wrote_it(steps in steps(9 * MIB + 4096)) {
        let dir = tempfile::tempdir().unwrap();
        steps.iter().fold(Machine::new(dir.path(), 9 * MIB + 4096, 4096), Machine::run).check();
    }
}

/// base <- middle <- leaf, each with a byte of its own.
fn three(dir: &Path) -> [PathBuf; 3] {
    let paths = ["base.vhdx", "middle.avhdx", "leaf.avhdx"].map(|name| dir.join(name));
    let mut base = VhdxWriter::create(&paths[0], &base_options(8 * MIB, 512)).unwrap();
    base.write_at(0, &[1; 4096]).unwrap();
    base.close().unwrap();
    for (i, pair) in paths.windows(2).enumerate() {
        let mut child = VhdxWriter::create_child(&pair[1], &pair[0], None).unwrap();
        child.write_at((i as u64 + 1) * MIB, &[i as u8 + 2; 4096]).unwrap();
        child.close().unwrap();
    }
    paths
}

#[test]
fn a_chain_lists_its_files_from_leaf_to_base() {
    let dir = tempfile::tempdir().unwrap();
    let paths = three(dir.path());
    let chain = DiskChain::open(&paths[2]).unwrap();
    let real = |p: &PathBuf| p.canonicalize().unwrap();
    let found: Vec<_> = chain.files().iter().map(real).collect();
    assert_eq!(found, paths.iter().rev().map(real).collect::<Vec<_>>());
    assert_eq!(chain.info().kind, DiskKind::Differencing);
    let base = VhdxLayer::open(&paths[0]).unwrap();
    assert_eq!(chain.info().disk_id, base.info().disk_id);
}

#[test]
fn a_chain_stays_readable_when_its_folder_is_moved() {
    let dir = tempfile::tempdir().unwrap();
    let old = dir.path().join("old");
    std::fs::create_dir(&old).unwrap();
    let before = whole(&DiskChain::open(&three(&old)[2]).unwrap());
    let new = dir.path().join("new");
    std::fs::rename(&old, &new).unwrap();
    assert!(whole(&DiskChain::open(new.join("leaf.avhdx")).unwrap()) == before);
}

#[test]
fn a_parent_in_another_folder_is_found_by_its_relative_path() {
    let dir = tempfile::tempdir().unwrap();
    let (disks, checkpoints) = (dir.path().join("disks"), dir.path().join("checkpoints/vm"));
    std::fs::create_dir_all(&disks).unwrap();
    std::fs::create_dir_all(&checkpoints).unwrap();
    let (base, child) = (disks.join("Ω disk.vhdx"), checkpoints.join("child.avhdx"));
    VhdxWriter::create(&base, &base_options(4 * MIB, 512)).unwrap().close().unwrap();
    VhdxWriter::create_child(&child, &base, None).unwrap().close().unwrap();
    let layer = VhdxLayer::open(&child).unwrap();
    let locator = layer.parent().expect("a child names its parent");
    assert_eq!(locator.get("relative_path"), Some(r"..\..\disks\Ω disk.vhdx"));
    assert_eq!(DiskChain::open(&child).unwrap().files().len(), 2);
}

#[test]
fn a_missing_parent_is_reported_with_every_place_that_was_tried() {
    let dir = tempfile::tempdir().unwrap();
    let paths = three(dir.path());
    std::fs::remove_file(&paths[1]).unwrap();
    match DiskChain::open(&paths[2]) {
        Err(DiskError::ParentMissing { child, tried }) => {
            assert_eq!(child, paths[2]);
            assert_eq!(tried.len(), 2, "the relative and the absolute place: {tried:?}");
            assert!(tried.iter().all(|p| p.ends_with("middle.avhdx")));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_child_of_a_changed_parent_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let paths = three(dir.path());
    let mut base = VhdxWriter::open(&paths[0]).unwrap();
    base.write_at(0, &[9; 512]).unwrap();
    base.close().unwrap();
    match DiskChain::open(&paths[2]) {
        Err(DiskError::ParentMismatch { child, parent, what, .. }) => {
            assert!(child.ends_with("middle.avhdx") && parent.ends_with("base.vhdx"));
            assert_eq!(what, "DataWriteGuid");
        }
        other => panic!("{other:?}"),
    }
    let merged = merge_child_into_parent(&paths[1], &paths[0]);
    assert!(matches!(merged, Err(DiskError::ParentMismatch { .. })), "{merged:?}");
}

#[test]
fn opening_a_parent_without_writing_keeps_its_children() {
    let dir = tempfile::tempdir().unwrap();
    let paths = three(dir.path());
    VhdxWriter::open(&paths[0]).unwrap().close().unwrap();
    DiskChain::open(&paths[2]).expect("nothing was written");
}

#[test]
fn a_disk_in_the_parents_place_with_another_id_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let paths = three(dir.path());
    std::fs::rename(&paths[0], dir.path().join("kept.vhdx")).unwrap();
    VhdxWriter::create(&paths[0], &base_options(8 * MIB, 512)).unwrap().close().unwrap();
    let opened = DiskChain::open(&paths[2]);
    assert!(matches!(opened, Err(DiskError::ParentMismatch { .. })), "{opened:?}");
    let moved = set_parent(&paths[1], &paths[0]);
    let expected = matches!(&moved, Err(DiskError::ParentMismatch { what: "VirtualDiskId", .. }));
    assert!(expected, "{moved:?}");
}

#[test]
fn a_circular_chain_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let paths = three(dir.path());
    set_parent(&paths[1], &paths[2]).unwrap();
    let opened = DiskChain::open(&paths[2]);
    assert!(matches!(opened, Err(DiskError::ChainCycle { .. })), "{opened:?}");
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
    assert!(whole(&chain) == before);
}

#[test]
fn a_merge_can_be_repeated_and_the_child_read_in_between() {
    let dir = tempfile::tempdir().unwrap();
    let paths = three(dir.path());
    let before = whole(&DiskChain::open(&paths[1]).unwrap());
    let first = merge_child_into_parent(&paths[1], &paths[0]).unwrap();
    assert!(whole(&DiskChain::open(&paths[1]).unwrap()) == before);
    assert_eq!(merge_child_into_parent(&paths[1], &paths[0]).unwrap(), first);
    let (base, child) = (DiskChain::open(&paths[0]).unwrap(), DiskChain::open(&paths[1]).unwrap());
    assert_eq!(compare::first_difference(&base, &child).unwrap(), None);
}

#[test]
fn a_child_stores_only_the_sectors_that_were_written() {
    let dir = tempfile::tempdir().unwrap();
    let paths = three(dir.path());
    let map = VhdxLayer::open(&paths[2]).unwrap().map().unwrap();
    assert_eq!(map.present, RangeSet::single(2 * MIB, 4096));
    let allocated = DiskChain::open(&paths[2]).unwrap().allocated().unwrap();
    // The base's block of 1 MiB, and the sectors of the two children.
    assert_eq!(allocated.total_len(), MIB + 4096 + 4096);
}

#[test]
fn a_block_that_a_child_made_zeros_is_no_longer_allocated() {
    let dir = tempfile::tempdir().unwrap();
    let paths = three(dir.path());
    let mut leaf = VhdxWriter::open(&paths[2]).unwrap();
    leaf.write_zeroes(0, 2 * MIB).unwrap();
    leaf.close().unwrap();
    let allocated = DiskChain::open(&paths[2]).unwrap().allocated().unwrap();
    assert_eq!(allocated, RangeSet::single(2 * MIB, 4096));
}

#[test]
fn a_block_that_a_checkpoint_made_zeros_hides_the_base_below_later_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let [base, middle, leaf] = three(dir.path());
    std::fs::remove_file(&leaf).unwrap();
    let mut disk = VhdxWriter::open(&middle).unwrap();
    disk.write_zeroes(0, 2 * MIB).unwrap();
    disk.close().unwrap();
    VhdxWriter::create_child(&leaf, &middle, None).unwrap().close().unwrap();
    let chain = DiskChain::open(&leaf).unwrap();
    assert!(chain.allocated().unwrap().is_empty());
    assert!(whole(&chain).iter().all(|b| *b == 0));
    assert_eq!(DiskChain::open(&base).unwrap().allocated().unwrap().total_len(), MIB);
}
