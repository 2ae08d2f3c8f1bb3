//! Thousands of damaged images: nothing panics, nothing runs away, whatever is read is within bounds.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use outrider_disk::guest::Limits;
use outrider_disk::inspect::{SparseFile, inspect_guest};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::images::{blank, have, noise, run, text};

/// Images to be damaged; small, with something of everything.
fn samples(dir: &Path) -> Vec<(&'static str, Vec<u8>)> {
    let source = dir.join("source");
    std::fs::write(&source, noise(1, 150_000)).expect("a new file");
    let root = dir.join("root");
    std::fs::create_dir_all(root.join("etc")).expect("a folder");
    std::fs::write(root.join("etc/fstab"), "/swap none swap\n").expect("a new file");
    std::fs::write(root.join("swap"), noise(2, 60_000)).expect("a new file");
    for i in 0..40 {
        std::fs::write(root.join(format!("name {i}")), vec![i; 3000]).expect("a new file");
    }
    run("mkswap", &[text(&root.join("swap"))]);
    let mut out = Vec::new();
    let ntfs = dir.join("ntfs");
    blank(&ntfs, 3);
    run("mkntfs", &["-F", "-q", "-C", text(&ntfs)]);
    for name in ["pagefile.sys", "hiberfil.sys", "a", "b", "c"] {
        run("ntfscp", &["-q", text(&ntfs), text(&source), name]);
    }
    out.push(("ntfs", std::fs::read(&ntfs).expect("just made")));
    for (name, features) in [
        ("ext", "inline_data,metadata_csum"),
        ("ext lists", "^extent,^metadata_csum,^64bit"),
        ("ext extents", "^metadata_csum,^64bit"),
    ] {
        let ext = dir.join("ext");
        let _ = std::fs::remove_file(&ext);
        blank(&ext, 2);
        run(
            "mke2fs",
            &[
                "-q",
                "-F",
                "-t",
                "ext4",
                "-b",
                "1024",
                "-O",
                features,
                "-d",
                text(&root),
                text(&ext),
            ],
        );
        out.push((name, std::fs::read(&ext).expect("just made")));
    }
    let fat = dir.join("fat");
    blank(&fat, 2);
    run("mkfs.fat", &["-F", "12", text(&fat)]);
    run("mcopy", &["-i", text(&fat), text(&source), "::/a long name"]);
    out.push(("fat", std::fs::read(&fat).expect("just made")));
    out
}

fn explore(bytes: Vec<u8>) {
    let limits = Limits { bytes: 8 << 20, time: Some(Duration::from_secs(60)) };
    let size = bytes.len() as u64;
    for range in &inspect_guest(Arc::new(bytes), limits) {
        assert!(range.end() <= size, "{range} is outside of the disk");
    }
}

/// Writes the samples as inputs of the fuzz target into the folder that `OUTRIDER_FUZZ_SEEDS` names.
#[test]
fn seeds_of_the_fuzz_target_are_written_on_demand() {
    let Some(folder) = std::env::var_os("OUTRIDER_FUZZ_SEEDS") else { return };
    let folder = Path::new(&folder).join("guest");
    std::fs::create_dir_all(&folder).expect("the folder can be made");
    let dir = tempfile::tempdir().expect("a temporary folder");
    for (name, sample) in samples(dir.path()) {
        let path = folder.join(format!("{}.seed", name.replace(' ', "-")));
        let seed = SparseFile::of(&without_contents(sample)).encode();
        std::fs::write(path, seed).expect("it can be written");
    }
}

/// A small seed needs structures, which are full of zeros, and a little of everything else.
fn without_contents(mut sample: Vec<u8>) -> Vec<u8> {
    let is_content = |page: &[u8]| page.iter().filter(|byte| **byte != 0).count() > 300;
    let contents = sample.chunks_mut(512).filter(|page| is_content(page));
    contents.skip(32).for_each(|page| page.fill(0));
    sample
}

#[test]
fn no_damage_makes_a_reader_of_guest_file_systems_panic_or_run_away() {
    if !have(&["mkntfs", "ntfscp", "mke2fs", "mkfs.fat", "mcopy", "mkswap"]) {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    for (name, sample) in samples(dir.path()) {
        // Bytes that are something: damage in zeros and noise mostly changes nothing.
        let used: Vec<usize> = sample
            .chunks(512)
            .enumerate()
            .filter(|(_, c)| {
                c.iter().any(|b| *b != 0) && c.iter().filter(|b| **b == 0).count() > 64
            })
            .map(|(i, _)| i)
            .collect();
        let rounds = std::env::var("OUTRIDER_DAMAGE_ROUNDS").ok().and_then(|n| n.parse().ok());
        for seed in 0..rounds.unwrap_or(700_u64) {
            let mut random = StdRng::seed_from_u64(seed);
            let mut bytes = sample.clone();
            for _ in 0..random.random_range(1..=6) {
                // The first sectors hold what everything else depends on.
                let sector = if random.random_bool(0.3) {
                    random.random_range(0..8)
                } else {
                    used[random.random_range(0..used.len())]
                };
                let at = sector * 512 + random.random_range(0..512);
                let len = *[1, 1, 2, 4, 8].get(random.random_range(0..5)).expect("five");
                for byte in bytes.iter_mut().skip(at).take(len) {
                    *byte = match random.random_range(0..5) {
                        0 => 0,
                        1 => 0xff,
                        2 => byte.wrapping_add(1),
                        3 => *byte ^ (1 << random.random_range(0..8)),
                        _ => random.random(),
                    };
                }
            }
            if random.random_bool(0.05) {
                bytes.truncate(random.random_range(0..bytes.len()));
            }
            let explored = std::panic::catch_unwind(|| explore(bytes));
            assert!(explored.is_ok(), "{name}, seed {seed}");
        }
    }
}
