//! Page and swap files: found with certainty, or kept with the reason.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use outrider_disk::guest::page_files::{Search, search};
use outrider_disk::guest::{Limits, path};
use outrider_disk::{RangeSet, RawDisk};

use super::images::{blank, content, have, noise, open, run, run_with, text};

const MIB: u64 = 1 << 20;
const TOOLS: [&str; 6] = ["mkntfs", "ntfscp", "ntfscat", "mke2fs", "sfdisk", "mkswap"];

/// A disk with an NTFS volume, a Linux root and a swap partition.
struct World {
    dir: tempfile::TempDir,
    image: PathBuf,
}

const NTFS: (u64, u64) = (MIB, 24 * MIB);
const ROOT: (u64, u64) = (25 * MIB, 24 * MIB);
const SWAP: (u64, u64) = (49 * MIB, 8 * MIB);

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let image = dir.path().join("disk.img");
        blank(&image, 64);
        let script = "label: gpt\nsize=24MiB,type=EBD0A0A2-B9E5-4433-87C0-68B6B72699C7\nsize=24MiB\nsize=8MiB,type=swap\n";
        run_with("sfdisk", &["-q", text(&image)], script);
        let world = Self { dir, image };
        let ntfs = world.dir.path().join("ntfs");
        blank(&ntfs, 24);
        run("mkntfs", &["-F", "-q", text(&ntfs)]);
        for (name, seed, len) in
            [("pagefile.sys", 1, 5_000_000), ("data", 2, 2_000_000), ("SwapFile.sys", 3, 1_000_000)]
        {
            let source = world.dir.path().join("source");
            std::fs::write(&source, noise(seed, len)).expect("a new file");
            run("ntfscp", &["-q", text(&ntfs), text(&source), name]);
        }
        world.put(NTFS, &ntfs);
        let root = world.dir.path().join("root");
        std::fs::create_dir_all(root.join("etc")).expect("a folder");
        std::fs::write(
            root.join("etc/fstab"),
            "UUID=1 / ext4 defaults 0 1\n/swap.img none swap sw 0 0\n/absent none swap\n",
        )
        .expect("a new file");
        let swap_file = root.join("swap.img");
        std::fs::write(&swap_file, noise(4, 3 << 20)).expect("a new file");
        run("mkswap", &[text(&swap_file)]);
        std::fs::write(root.join("other"), noise(5, 100_000)).expect("a new file");
        let ext = world.dir.path().join("ext");
        blank(&ext, 24);
        run("mke2fs", &["-q", "-F", "-t", "ext4", "-b", "4096", "-d", text(&root), text(&ext)]);
        world.put(ROOT, &ext);
        let swap = world.dir.path().join("swap");
        std::fs::write(&swap, noise(6, SWAP.1 as usize)).expect("a new file");
        run("mkswap", &[text(&swap)]);
        world.put(SWAP, &swap);
        world
    }

    fn put(&self, (start, len): (u64, u64), from: &Path) {
        let bytes = std::fs::read(from).expect("just made");
        assert_eq!(bytes.len() as u64, len);
        self.write(start, &bytes);
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        let file = std::fs::File::options().write(true).open(&self.image).expect("the image");
        file.write_all_at(bytes, offset).expect("writes");
    }

    fn search(&self) -> Search {
        search(Arc::new(RawDisk::open(&self.image).expect("the image")), Limits::default())
    }

    fn names(&self) -> Vec<String> {
        self.search().found.iter().map(|f| f.what.clone()).collect()
    }
}

#[test]
fn page_files_swap_files_and_swap_partitions_are_found_to_the_byte() {
    if !have(&TOOLS) {
        return;
    }
    let world = World::new();
    let found = world.search();
    assert!(!found.hibernated);
    let names: Vec<&str> = found.found.iter().map(|f| f.what.as_str()).collect();
    assert_eq!(
        names,
        [
            "SwapFile.sys on volume 1",
            "pagefile.sys on volume 1",
            "swap file /swap.img on volume 2",
            "swap partition 3"
        ]
    );
    assert_eq!(found.kept.len(), 1, "{:?}", found.kept);
    assert!(found.kept[0].contains("/absent"), "{:?}", found.kept);
    assert_eq!(found.found[3].ranges, RangeSet::single(SWAP.0 + 4096, SWAP.1 - 4096));

    // Zeroed, everything else is as it was, by the tools' own account.
    let before = std::fs::read(&world.image).expect("the image");
    for range in &found.ranges() {
        world.write(range.start, &vec![0; range.len as usize]);
    }
    let after = std::fs::read(&world.image).expect("the image");
    let part = |bytes: &[u8], (start, len): (u64, u64)| {
        bytes[start as usize..(start + len) as usize].to_vec()
    };
    let ntfs = world.dir.path().join("ntfs-after");
    std::fs::write(&ntfs, part(&after, NTFS)).expect("a new file");
    let fs = open(&ntfs);
    let get = |name: &str| {
        content(&*fs, path::find(&*fs, name.as_bytes()).expect("there")).expect("reads")
    };
    assert!(
        get("pagefile.sys").iter().all(|b| *b == 0) && get("swapfile.sys").iter().all(|b| *b == 0)
    );
    assert!(get("data") == noise(2, 2_000_000));
    run("ntfscat", &[text(&ntfs), "data"]);
    let ext = world.dir.path().join("ext-after");
    std::fs::write(&ext, part(&after, ROOT)).expect("a new file");
    run("e2fsck", &["-f", "-n", text(&ext)]);
    let fs = open(&ext);
    let get = |name: &str| {
        content(&*fs, path::find(&*fs, name.as_bytes()).expect("there")).expect("reads")
    };
    let swap = get("/swap.img");
    assert!(swap[4096..].iter().all(|b| *b == 0) && swap[..4096].iter().any(|b| *b != 0));
    assert!(get("/other") == noise(5, 100_000));
    let header = |bytes: &[u8]| bytes[SWAP.0 as usize..SWAP.0 as usize + 4096].to_vec();
    assert!(header(&before) == header(&after), "the guest finds its swap by the UUID");
    assert!(world.search() == found, "the search finds the same in what is restored");
}

#[test]
fn a_dirty_or_used_ntfs_keeps_its_page_files() {
    if !have(&TOOLS) {
        return;
    }
    let world = World::new();
    // The flags of $VOLUME_INFORMATION: 12 bytes, version 3.1, found by their surroundings.
    let bytes = std::fs::read(&world.image).expect("the image");
    let record = bytes
        .windows(12)
        .enumerate()
        .skip(NTFS.0 as usize)
        .take(NTFS.1 as usize)
        .filter(|(at, w)| w == b"\0\0\0\0\0\0\0\0\x03\x01\0\0" && at % 8 == 0)
        .map(|(at, _)| at as u64)
        .collect::<Vec<_>>();
    assert!(!record.is_empty(), "the volume information is somewhere");
    for at in &record {
        world.write(at + 10, &[1]);
    }
    let found = world.search();
    assert!(found.found.iter().all(|f| f.volume != 1), "{:?}", found.found);
    assert_eq!(found.kept.iter().filter(|k| k.contains("dirty")).count(), 2, "{:?}", found.kept);
    assert!(found.found.iter().any(|f| f.volume == 3), "other volumes do not matter");
    for at in &record {
        world.write(at + 10, &[0]);
    }
    assert_eq!(world.names().len(), 4);

    // A log that a client has open.
    let log = log_file(&bytes[NTFS.0 as usize..]);
    world.write(NTFS.0 + log, &restart_page(0));
    world.write(NTFS.0 + log + 4096, &restart_page(0));
    let found = world.search();
    assert_eq!(found.kept.iter().filter(|k| k.contains("$LogFile")).count(), 2, "{:?}", found.kept);
    world.write(NTFS.0 + log, &restart_page(0xffff));
    world.write(NTFS.0 + log + 4096, &restart_page(0xffff));
    assert_eq!(world.names().len(), 4, "closed in order");
    world.write(NTFS.0 + log, &[0x55; 8192]);
    assert!(world.search().kept.iter().any(|k| k.contains("cannot be understood")));
}

/// Where `$LogFile` is: `mkntfs` fills it with ones.
fn log_file(ntfs: &[u8]) -> u64 {
    let at = ntfs.chunks(4096).position(|c| c.iter().all(|b| *b == 0xff));
    at.expect("a log") as u64 * 4096
}

/// A restart page of LFS 1.1 whose list of clients in use begins with `client`.
fn restart_page(client: u16) -> Vec<u8> {
    let mut page = vec![0; 4096];
    page[..4].copy_from_slice(b"RSTR");
    page[4..6].copy_from_slice(&30_u16.to_le_bytes());
    page[6..8].copy_from_slice(&9_u16.to_le_bytes());
    page[16..20].copy_from_slice(&4096_u32.to_le_bytes());
    page[20..24].copy_from_slice(&4096_u32.to_le_bytes());
    page[24..26].copy_from_slice(&48_u16.to_le_bytes());
    page[28..30].copy_from_slice(&1_u16.to_le_bytes());
    page[48..56].copy_from_slice(&77_u64.to_le_bytes());
    page[48 + 12..48 + 14].copy_from_slice(&client.to_le_bytes());
    page[30..32].copy_from_slice(&1_u16.to_le_bytes());
    for sector in page.chunks_exact_mut(512) {
        sector[510..].copy_from_slice(&1_u16.to_le_bytes());
    }
    page
}

#[test]
fn a_hibernated_guest_keeps_everything() {
    if !have(&TOOLS) {
        return;
    }
    let world = World::new();
    world.write(SWAP.0 + 4086, b"S1SUSPEND\0");
    let found = world.search();
    assert!(found.hibernated && found.found.is_empty(), "{found:?}");

    let world = World::new();
    let ntfs = world.dir.path().join("ntfs");
    let source = world.dir.path().join("source");
    std::fs::write(&source, vec![0; 300_000]).expect("a new file");
    run("ntfscp", &["-q", text(&ntfs), text(&source), "hiberfil.sys"]);
    world.put(NTFS, &ntfs);
    let fs = open(&ntfs);
    let file = path::find(&*fs, b"hiberfil.sys").expect("is there");
    let place = NTFS.0 + fs.extents(file).expect("plain")[0].disk.start;
    for (magic, hibernated) in
        [("HIBR", true), ("hibr", true), ("RSTR", true), ("WAKE", false), ("\0\0\0\0", false)]
    {
        world.write(place, magic.as_bytes());
        let found = world.search();
        assert_eq!(found.hibernated, hibernated, "{magic:?}");
        assert_eq!(found.found.len(), if hibernated { 0 } else { 4 }, "{magic:?}: {found:?}");
    }
}

#[test]
fn what_only_looks_like_swap_is_kept() {
    if !have(&TOOLS) {
        return;
    }
    let world = World::new();
    run(
        "sfdisk",
        &["-q", "--part-type", text(&world.image), "3", "0FC63DAF-8483-4772-8E79-3D69D8477DE4"],
    );
    let found = world.search();
    assert!(found.found.iter().all(|f| f.volume != 3));
    assert!(found.kept.iter().any(|k| k.contains("volume 3")), "{:?}", found.kept);

    // The type alone is not enough either.
    let world = World::new();
    world.write(SWAP.0 + 4086, &[0; 10]);
    assert!(world.search().found.iter().all(|f| f.volume != 3));

    // Nor is a journal that has to be replayed.
    let world = World::new();
    let ext = world.dir.path().join("ext");
    run("debugfs", &["-w", "-R", "feature needs_recovery", text(&ext)]);
    world.put(ROOT, &ext);
    let found = world.search();
    assert!(found.found.iter().all(|f| f.volume != 2));
    assert!(found.kept.iter().any(|k| k.contains("journal")), "{:?}", found.kept);
}
