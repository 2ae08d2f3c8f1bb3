//! Mutated disks by the thousand, the same ones every time: what the fuzz targets do, without a special compiler.
//! No input may panic, hang, or make a reader take memory that the file does not account for.

use std::path::Path;
use std::sync::Arc;

use outrider_disk::block_file::ByteSource;
use outrider_disk::inspect::{SparseFile, inspect_chain, inspect_file, inspect_log, reseal};
use outrider_disk::vhdx::{CrashPoint, CreateOptions, VhdxWriter};
use outrider_disk::{DiskFormat, DiskKind, DiskWriter, NewDisk};
use peak_alloc::PeakAlloc;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Rounds for each seed; `OUTRIDER_MUTATIONS` asks for more.
const ROUNDS: u64 = 1500;

/// Most that looking into one file may take: the tables of a file of a few megabytes are smaller by far, and a log is
/// read whole.
const MEMORY_MIB: f32 = 96.0;

const MIB: u64 = 1 << 20;

struct Seed {
    name: &'static str,
    format: DiskFormat,
    file: SparseFile,
}

fn read(path: &Path) -> SparseFile {
    SparseFile::of(&std::fs::read(path).expect("just written"))
}

/// A disk with data, a child of it with a partial block, a fixed one and, of VHDX, one with a log to replay.
fn seeds(format: DiskFormat) -> Vec<Seed> {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let extension = if format == DiskFormat::Vhd { "vhd" } else { "vhdx" };
    let path = |name: &str| dir.path().join(format!("{name}.{extension}"));
    let small = if format == DiskFormat::Vhd { 512 << 10 } else { 1 << 20 };
    let mut seeds = Vec::new();
    for kind in [DiskKind::Dynamic, DiskKind::Fixed] {
        let new = NewDisk { block_size: Some(small), ..NewDisk::of(format, kind, 3 * MIB) };
        let file = path(&kind.to_string());
        let mut disk = DiskWriter::create(&file, &new).expect("a new disk");
        disk.write_at(4096, &[5; 3000]).expect("within the disk");
        disk.close().expect("a sound disk");
        seeds.push(Seed { name: "whole", format, file: read(&file) });
    }
    let child = path("child");
    let mut disk = DiskWriter::create_child(&child, path("dynamic"), Some(small)).expect("a child");
    disk.write_at(8192, &[6; 512]).expect("within the disk");
    disk.close().expect("a sound disk");
    seeds.push(Seed { name: "child", format, file: read(&child) });
    if format == DiskFormat::Vhdx {
        let file = path("dirty");
        let options = CreateOptions { block_size: small, ..CreateOptions::dynamic(3 * MIB) };
        let mut disk = VhdxWriter::create(&file, &options).expect("a new disk");
        disk.write_at(0, &[7; 512]).expect("within the disk");
        disk.crash(CrashPoint::AfterLog).expect("a sound disk");
        seeds.push(Seed { name: "dirty", format, file: read(&file) });
    }
    seeds
}

/// Writes the seeds as inputs of the fuzz targets into the folder that `OUTRIDER_FUZZ_SEEDS` names.
#[test]
fn seeds_of_the_fuzz_targets_are_written_on_demand() {
    let Some(folder) = std::env::var_os("OUTRIDER_FUZZ_SEEDS") else { return };
    let put = |target: &str, name: String, bytes: Vec<u8>| {
        let folder = Path::new(&folder).join(target);
        std::fs::create_dir_all(&folder).expect("the folder can be made");
        std::fs::write(folder.join(name + ".seed"), bytes).expect("the folder can be written");
    };
    for format in [DiskFormat::Vhdx, DiskFormat::Vhd] {
        let target = format.to_string().to_lowercase();
        let seeds = seeds(format);
        for (number, seed) in seeds.iter().enumerate() {
            put(&target, format!("{}-{number}", seed.name), seed.file.encode());
            if seed.name == "dirty" {
                let mut log = vec![0; MIB as usize];
                seed.file.read_exact_at(MIB, &mut log).expect("it has a log");
                put("log", "dirty".into(), SparseFile::of(&log).encode());
            }
        }
        let (child, parent) = (seeds[2].file.encode(), seeds[0].file.encode());
        let head = [u8::from(format == DiskFormat::Vhd)];
        let len = u32::try_from(child.len()).expect("a small seed").to_le_bytes();
        put("chain", target, [&head[..], &len, &child, &parent].concat());
    }
}

/// Numbers that have broken parsers before.
const ODD: [u64; 14] = [
    0,
    1,
    2,
    3,
    7,
    0xff,
    0xffff,
    1 << 20,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 63,
    u64::MAX - 7,
    u64::MAX,
];

fn mutate(seed: &Seed, rng: &mut StdRng) -> SparseFile {
    let mut encoded = seed.file.encode();
    for _ in 0..rng.random_range(1..6) {
        let at = rng.random_range(0..encoded.len());
        let number = ODD.choose(rng).copied().unwrap_or_default();
        let width = [1, 2, 4, 8].choose(rng).copied().unwrap_or(1);
        let bytes = match rng.random_range(0..4) {
            0 => vec![rng.random()],
            1 => number.to_le_bytes()[..width].to_vec(),
            2 => number.to_be_bytes()[8 - width..].to_vec(),
            // A part of the file somewhere else.
            _ => {
                let from = rng.random_range(0..encoded.len());
                encoded[from..(from + width * 4).min(encoded.len())].to_vec()
            }
        };
        let end = (at + bytes.len()).min(encoded.len());
        encoded[at..end].copy_from_slice(&bytes[..end - at]);
    }
    let mut file = SparseFile::decode(&encoded);
    if rng.random_bool(0.8) {
        reseal(&mut file, seed.format);
    }
    file
}

fn rounds() -> u64 {
    std::env::var("OUTRIDER_MUTATIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(ROUNDS)
}

/// Looks into a file and says how the memory that it took is out of proportion.
fn look(what: &str, round: u64, work: impl FnOnce() -> bool) -> bool {
    MEMORY.reset_peak_usage();
    let before = MEMORY.current_usage_as_mb();
    let sound = work();
    let used = MEMORY.peak_usage_as_mb() - before;
    assert!(used < MEMORY_MIB, "{what}, round {round}: took {used} MiB");
    sound
}

/// One test, since the peak of memory is the process's.
#[test]
fn no_mutated_disk_panics_hangs_or_takes_memory_without_bound() {
    for format in [DiskFormat::Vhdx, DiskFormat::Vhd] {
        let seeds = seeds(format);
        for (number, seed) in seeds.iter().enumerate() {
            let (mut sound, what) = (0, format!("{format} {} {number}", seed.name));
            let whole = inspect_file(Arc::new(seed.file.clone()), format);
            whole.unwrap_or_else(|e| panic!("{what} is sound as it is: {e}"));
            for round in 0..rounds() {
                let mut rng = StdRng::seed_from_u64(round << 8 | number as u64);
                let file: Arc<dyn ByteSource> = Arc::new(mutate(seed, &mut rng));
                sound += u64::from(look(&what, round, || {
                    let map = inspect_file(file.clone(), format).is_ok();
                    // Over another seed, which may be its parent, or over itself.
                    let below = seeds.choose(&mut rng).map_or(&seed.file, |seed| &seed.file);
                    let chain: [Arc<dyn ByteSource>; 3] =
                        [file.clone(), Arc::new(below.clone()), file];
                    inspect_chain(&chain, format).ok();
                    map
                }));
            }
            // Some get through and some do not: the mutations reach both.
            assert!(sound > 0 && sound < rounds(), "{what}: {sound} of {} are sound", rounds());
        }
        if let Some(dirty) = seeds.iter().find(|seed| seed.name == "dirty") {
            mutate_logs(dirty);
        }
    }
}

fn mutate_logs(dirty: &Seed) {
    let mut replayed = 0;
    for round in 0..rounds() {
        let file = mutate(dirty, &mut StdRng::seed_from_u64(round));
        let mut log = vec![0; MIB as usize];
        if file.read_exact_at(MIB, &mut log).is_ok() {
            replayed += u64::from(look("log", round, || inspect_log(&log).is_ok()));
        }
    }
    assert!(replayed > 0, "some logs are replayed");
}
