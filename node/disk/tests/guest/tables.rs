//! Partition tables as `sfdisk` writes them.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use outrider_disk::guest::partition::TableKind;
use outrider_disk::guest::{Content, GuestDisk, GuestError, Limits};
use outrider_disk::{RawDisk, ReadDisk};

use super::images::{MemoryDisk, blank, have, run, run_with, text};

fn disk(image: &Path) -> Result<GuestDisk, GuestError> {
    GuestDisk::open(Arc::new(RawDisk::open(image).expect("just made")), Limits::default())
}

/// (number, start, length) as the tool tells, in bytes.
fn judged(image: &Path) -> Vec<(u32, u64, u64)> {
    let out = run("sfdisk", &["--dump", text(image)]);
    let sector = 512;
    let field = |line: &str, name: &str| -> u64 {
        let rest = line.split(name).nth(1).expect("sfdisk tells it");
        let rest = rest.trim_start_matches([' ', '=']);
        rest.split([',', ' ']).next().and_then(|n| n.parse().ok()).expect("a number")
    };
    out.lines()
        .filter(|l| {
            l.contains("start=") && !l.contains("type=5,") && !l.trim_end().ends_with("type=5")
        })
        .map(|l| {
            let name = l.split(' ').next().expect("a name");
            let number = name.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
            (
                number.parse().expect("a number"),
                field(l, "start") * sector,
                field(l, "size") * sector,
            )
        })
        .collect()
}

fn ours(disk: &GuestDisk) -> Vec<(u32, u64, u64)> {
    disk.volumes.iter().map(|v| (v.number, v.range.start, v.range.len)).collect()
}

#[test]
fn primary_and_logical_partitions_are_those_of_sfdisk() {
    if !have(&["sfdisk"]) {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let image = dir.path().join("disk.img");
    blank(&image, 64);
    let script = "label: dos\nsize=4MiB,type=83\nsize=5MiB,type=7\nsize=6MiB,type=82\ntype=5\nsize=3MiB,type=83\n\
                  size=7MiB,type=c\ntype=8e\n";
    run_with("sfdisk", &["-q", text(&image)], script);
    let found = disk(&image).expect("readable");
    assert_eq!(found.table, TableKind::Mbr);
    assert_eq!(found.doubts, [""; 0]);
    assert_eq!(ours(&found), judged(&image));
    assert_eq!(found.volumes.len(), 6);
}

#[test]
fn both_copies_of_a_gpt_are_read() {
    if !have(&["sfdisk", "sgdisk"]) {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let image = dir.path().join("disk.img");
    blank(&image, 64);
    let script = "label: gpt\nsize=4MiB,type=uefi\nsize=5MiB\nsize=6MiB,type=swap\n";
    run_with("sfdisk", &["-q", text(&image)], script);
    run("sgdisk", &["-c", "1:부팅 백업", text(&image)]);
    let found = disk(&image).expect("readable");
    assert_eq!((found.table, found.doubts.len()), (TableKind::Gpt, 0));
    assert_eq!(ours(&found), judged(&image));
    assert_eq!(found.volumes[0].name, "부팅 백업");
    assert!(found.volumes[2].partition.expect("a table").is_linux_swap());

    let file = std::fs::File::options().write(true).open(&image).expect("the image");
    file.write_all_at(b"X", 512 + 60).expect("writes");
    let second = disk(&image).expect("the copy at the end is sound");
    assert_eq!(ours(&second), ours(&found));
    assert_eq!(second.doubts.len(), 1, "{:?}", second.doubts);

    let end = (64 << 20) - 512;
    file.write_all_at(b"X", end + 60).expect("writes");
    let refused = disk(&image).err().expect("no copy is sound").to_string();
    assert!(refused.contains("GPT"), "{refused}");
}

#[test]
fn a_gpt_of_4096_byte_sectors_is_read_whatever_the_disk_says() {
    // Put together by hand: the tools take the sector size from a device.
    let sector = 4096_u64;
    let (sectors, entry) = (4096_u64, |first: u64, last: u64| {
        let mut e = vec![0; 128];
        e[..16].copy_from_slice(&uuid::uuid!("0fc63daf-8483-4772-8e79-3d69d8477de4").to_bytes_le());
        e[16..32].fill(9);
        e[32..40].copy_from_slice(&first.to_le_bytes());
        e[40..48].copy_from_slice(&last.to_le_bytes());
        e
    });
    let mut entries = [entry(8, 99), entry(100, 1999)].concat();
    entries.resize(128 * 128, 0);
    let header = |own: u64, other: u64, table: u64| {
        let mut h = vec![0; 92];
        h[..8].copy_from_slice(b"EFI PART");
        h[8..12].copy_from_slice(&[0, 0, 1, 0]);
        h[12..16].copy_from_slice(&92_u32.to_le_bytes());
        for (at, value) in [(24, own), (32, other), (40, 6), (48, sectors - 6), (72, table)] {
            h[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        h[80..84].copy_from_slice(&128_u32.to_le_bytes());
        h[84..88].copy_from_slice(&128_u32.to_le_bytes());
        h[88..92].copy_from_slice(&crc32fast::hash(&entries).to_le_bytes());
        let sum = crc32fast::hash(&h);
        h[16..20].copy_from_slice(&sum.to_le_bytes());
        h
    };
    let mut bytes = vec![0; (sectors * sector) as usize];
    let mut put = |at: u64, what: &[u8]| bytes[at as usize..][..what.len()].copy_from_slice(what);
    put(446, &[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0xff, 0xf, 0, 0]);
    put(510, &[0x55, 0xaa]);
    put(sector, &header(1, sectors - 1, 2));
    put(2 * sector, &entries);
    put((sectors - 5) * sector, &entries);
    put((sectors - 1) * sector, &header(sectors - 1, 1, sectors - 5));
    for logical in [512, 4096] {
        let mut disk = MemoryDisk::new(bytes.clone());
        disk.info.logical_sector = logical;
        assert_eq!(disk.info().size, sectors * sector);
        let found = GuestDisk::open(Arc::new(disk), Limits::default()).expect("readable");
        assert_eq!(found.doubts, [""; 0]);
        assert_eq!(ours(&found), [(1, 8 * sector, 92 * sector), (2, 100 * sector, 1900 * sector)]);
    }
}

#[test]
fn what_is_not_read_is_named() {
    let image = |at: usize, magic: &[u8]| {
        let mut bytes = vec![0; 1 << 20];
        bytes[at..at + magic.len()].copy_from_slice(magic);
        GuestDisk::open(Arc::new(MemoryDisk::new(bytes)), Limits::default()).expect("readable")
    };
    let cases: [(usize, &[u8], &str); 8] = [
        (3, b"-FVE-FS-", "BitLocker"),
        (0, b"LUKS\xba\xbe\0\x02", "LUKS"),
        (512, b"LABELONE", "LVM"),
        (3, b"ReFS\0\0\0\0", "ReFS"),
        (0, b"XFSB", "XFS"),
        (0x10040, b"_BHRfS_M", "btrfs"),
        (3, b"EXFAT   ", "exFAT"),
        (4086, b"S1SUSPEND", "hibernation"),
    ];
    for (at, magic, word) in cases {
        let disk = image(at, magic);
        let volume = disk.volumes.first().expect("it is recognised").clone();
        assert!(volume.describe().starts_with("not readable: "), "{}", volume.describe());
        let refused = disk.file_system(&volume).err().expect("not read").to_string();
        assert!(refused.contains(word), "{refused}");
    }
    let nothing = image(0, b"whatever");
    assert!(nothing.volumes.is_empty());
    let refused = nothing.volume(1).expect_err("there is none").to_string();
    assert!(refused.contains("no volume"), "{refused}");
}

#[test]
fn dynamic_disks_are_named_and_not_read() {
    if !have(&["sfdisk"]) {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let image = dir.path().join("disk.img");
    blank(&image, 16);
    run_with("sfdisk", &["-q", text(&image)], "label: dos\ntype=42\n");
    let found = disk(&image).expect("readable");
    assert!(matches!(found.volumes[0].content, Content::NotReadable { .. }));
    assert!(found.volumes[0].describe().contains("LDM"), "{}", found.volumes[0].describe());
}

#[test]
fn real_tools_make_what_is_recognised_and_not_read() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let tools: [(&str, &[&str], &str); 3] = [
        ("mkfs.xfs", &["-q"], "XFS"),
        ("mkfs.btrfs", &["-q"], "btrfs"),
        ("mkfs.exfat", &[], "exFAT"),
    ];
    for (tool, args, word) in tools {
        if !have(&[tool]) {
            continue;
        }
        let image = dir.path().join(tool);
        blank(&image, 320);
        run(tool, &[args, &[text(&image)][..]].concat());
        let found = disk(&image).expect("readable");
        let text = found.volumes[0].describe();
        assert!(text.starts_with("not readable: ") && text.contains(word), "{tool}: {text}");
    }
}
