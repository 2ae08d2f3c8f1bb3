//! Random disks of every format, kind, block and sector size: written by us and read by others, and
//! the other way round.

use std::path::{Path, PathBuf};

use outrider_disk::{
    DiskChain, DiskFormat, DiskKind, DiskWriter, NewDisk, RawDisk, ReadDisk, ReadLayer, compare,
    open_disk,
};
use proptest::prelude::*;

#[path = "judges/tools.rs"]
mod tools;
use tools::{libvhdi_is_there, name, qemu_is_there, read_with_libvhdi, read_with_qemu, run};

const MIB: u64 = 1 << 20;

/// One write: where, how much, with what, as parts of 65536 of the disk and of 3 MiB.
type Write = (u16, u16, u8);

fn writes() -> impl Strategy<Value = Vec<Write>> {
    prop::collection::vec((any::<u16>(), any::<u16>(), 1..=255_u8), 1..10)
}

fn new_disks() -> impl Strategy<Value = NewDisk> {
    let kinds = prop_oneof![2 => Just(DiskKind::Dynamic), 1 => Just(DiskKind::Fixed)];
    let vhdx = (kinds.clone(), 0..=8_u32, any::<bool>(), 1..12_000_u64).prop_map(
        |(kind, block, large_sectors, units)| NewDisk {
            block_size: Some((1 << 20) << block),
            logical_sector: if large_sectors { 4096 } else { 512 },
            ..NewDisk::of(DiskFormat::Vhdx, kind, units * 4096)
        },
    );
    let vhd = (kinds, any::<bool>(), 1..90_000_u64).prop_map(|(kind, small, sectors)| NewDisk {
        block_size: Some(if small { 512 << 10 } else { 2 << 20 }),
        ..NewDisk::of(DiskFormat::Vhd, kind, sectors * 512)
    });
    prop_oneof![vhdx, vhd]
}

/// Writes whole multiples of `unit` to the disk and to the bytes that it must become.
fn scribble(disk: &mut DiskWriter, bytes: &mut [u8], unit: u64, writes: &[Write]) {
    let size = bytes.len() as u64;
    for (at, len, fill) in writes {
        let offset = size * u64::from(*at) / 65536 / unit * unit;
        let len = (3 * MIB * u64::from(*len) / 65536 + 1).next_multiple_of(unit);
        let len = len.min(size - offset);
        let data: Vec<u8> = (0..len).map(|i| fill.wrapping_add((i / 512) as u8)).collect();
        disk.write_at(offset, &data).expect("within the disk");
        bytes[offset as usize..][..data.len()].copy_from_slice(&data);
    }
}

fn extension(format: DiskFormat) -> &'static str {
    if format == DiskFormat::Vhd { "vhd" } else { "vhdx" }
}

fn same(raw: &Path, bytes: &[u8], who: &str, new: &NewDisk) {
    let read = std::fs::read(raw).expect("just written");
    assert!(read.len() == bytes.len() && read == bytes, "{who} reads other bytes of {new:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn others_read_exactly_what_we_wrote(new in new_disks(), writes in writes()) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(format!("disk.{}", extension(new.format)));
        let mut disk = DiskWriter::create(&path, &new).unwrap();
        let mut bytes = vec![0; new.size as usize];
        scribble(&mut disk, &mut bytes, 1, &writes);
        disk.close().unwrap();
        if qemu_is_there() && new.logical_sector == 512 {
            let raw = dir.path().join("qemu.raw");
            let format = if new.format == DiskFormat::Vhd { "vpc" } else { "vhdx" };
            if format == "vhdx" {
                run("qemu-img", &["check", "-f", format, name(&path)]);
            }
            read_with_qemu(format, &path, &raw);
            same(&raw, &bytes, "qemu-img", &new);
        }
        if libvhdi_is_there() {
            let raw = dir.path().join("libvhdi.raw");
            read_with_libvhdi(&[path], &raw);
            same(&raw, &bytes, "libvhdi", &new);
        }
    }

    #[test]
    fn libvhdi_reads_our_checkpoint_chains(new in new_disks(), rounds in prop::collection::vec(writes(), 2..4)) {
        if !libvhdi_is_there() {
            return Ok(());
        }
        let dir = tempfile::tempdir().unwrap();
        // Two errors of libvhdi are avoided: through blocks of zeros of a VHDX it shows the parent, so nothing is
        // zeroed; in a VHD it takes what follows a set bit in a byte for set, too, so bytes of bits are set whole.
        let unit = if new.format == DiskFormat::Vhd { 4096 } else { 1 };
        let new = NewDisk { size: new.size.next_multiple_of(4096), ..new };
        let mut bytes = vec![0; new.size as usize];
        let mut chain: Vec<PathBuf> = Vec::new();
        for (i, writes) in rounds.iter().enumerate() {
            let path = dir.path().join(format!("{i}.{}", extension(new.format)));
            let mut disk = match chain.first() {
                None => DiskWriter::create(&path, &new).unwrap(),
                Some(parent) => DiskWriter::create_child(&path, parent, None).unwrap(),
            };
            scribble(&mut disk, &mut bytes, unit, writes);
            disk.close().unwrap();
            chain.insert(0, path);
        }
        let raw = dir.path().join("libvhdi.raw");
        read_with_libvhdi(&chain, &raw);
        same(&raw, &bytes, "libvhdi", &new);
        let ours = open_disk(&chain[0]).unwrap();
        let theirs = RawDisk::open(&raw).unwrap();
        prop_assert_eq!(compare::first_difference(&ours, &theirs).unwrap(), None);
    }

    #[test]
    fn we_read_exactly_what_qemu_wrote(
        vhd in any::<bool>(),
        fixed in any::<bool>(),
        block in 0..=8_u32,
        mib in 1..40_u64,
        writes in writes(),
    ) {
        if !qemu_is_there() {
            return Ok(());
        }
        let dir = tempfile::tempdir().unwrap();
        let subformat = if fixed { "fixed" } else { "dynamic" };
        let (format, options, path) = if vhd {
            ("vpc", format!("subformat={subformat},force_size=on"), dir.path().join("disk.vhd"))
        } else {
            let block = (1_u64 << 20) << block;
            ("vhdx", format!("subformat={subformat},block_size={block}"), dir.path().join("disk.vhdx"))
        };
        let size = mib * MIB;
        run("qemu-img", &["create", "-q", "-f", format, "-o", &options, name(&path), &size.to_string()]);
        let mut bytes = vec![0; size as usize];
        let mut args = ["-f", format].map(str::to_owned).to_vec();
        for (at, len, fill) in &writes {
            let offset = size * u64::from(*at) / 65536 / 512 * 512;
            let len = (3 * MIB * u64::from(*len) / 65536 + 1).next_multiple_of(512).min(size - offset);
            args.extend(["-c".into(), format!("write -q -P {fill} {offset} {len}")]);
            bytes[offset as usize..(offset + len) as usize].fill(*fill);
        }
        args.push(name(&path).to_owned());
        run("qemu-io", &args.iter().map(String::as_str).collect::<Vec<_>>());
        let chain = DiskChain::open(&path).unwrap();
        chain.layers().try_for_each(ReadLayer::check).unwrap();
        let mut read = vec![0; size as usize];
        chain.read_at(0, &mut read).unwrap();
        prop_assert!(read == bytes, "{} {} reads other bytes", format, options);

        // And we go on writing where QEMU stopped.
        let mut disk = DiskWriter::open(&path).unwrap();
        scribble(&mut disk, &mut bytes, 1, &writes);
        disk.close().unwrap();
        let raw = dir.path().join("again.raw");
        read_with_qemu(format, &path, &raw);
        prop_assert!(std::fs::read(&raw).unwrap() == bytes, "{} {}: qemu-img reads other bytes", format, options);
    }
}
