//! Our VHDX files judged by qemu-img, and qemu-img's files read and written by us.

use outrider_disk::vhdx::{CrashPoint, CreateOptions, VhdxLayer, VhdxWriter};
use outrider_disk::{
    DiskChain, DiskKind, RawDisk, ReadDisk, ReadLayer, compare, export, open_disk,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const MIB: u64 = 1 << 20;

#[path = "judges/tools.rs"]
mod tools;
use tools::{name, qemu_is_there, run as qemu};

/// The disk as a byte array: what every write must add up to.
struct Model(Vec<u8>);

impl Model {
    fn of(disk: &VhdxWriter) -> Self {
        Self(vec![0; disk.info().size as usize])
    }

    fn write(&mut self, disk: &mut VhdxWriter, offset: u64, data: &[u8]) {
        disk.write_at(offset, data).expect("within the disk");
        self.0[offset as usize..][..data.len()].copy_from_slice(data);
    }

    fn scribble(&mut self, disk: &mut VhdxWriter, rng: &mut StdRng, writes: usize) {
        let size = self.0.len() as u64;
        for _ in 0..writes {
            let len = rng.random_range(1..=(3 * MIB).min(size));
            let offset = rng.random_range(0..=size - len);
            let (offset, len) = match rng.random_bool(0.5) {
                true => (offset / 4096 * 4096, len.next_multiple_of(4096)),
                false => (offset, len),
            };
            let mut data = vec![0; len.min(size - offset) as usize];
            rng.fill(&mut data[..]);
            self.write(disk, offset, &data);
        }
    }
}

fn options(kind: DiskKind, size: u64, block_mib: u32, sector: u32) -> CreateOptions {
    let block_size = block_mib << 20;
    CreateOptions { kind, block_size, logical_sector: sector, ..CreateOptions::dynamic(size) }
}

#[test]
fn qemu_reads_exactly_what_we_wrote() {
    if !qemu_is_there() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // Sizes that are no multiple of the block included; at 4 GiB chunks end inside the disk.
    let cases = [
        (DiskKind::Dynamic, 40 * MIB + 512, 1, 512),
        (DiskKind::Dynamic, 70 * MIB + 4096, 32, 512),
        (DiskKind::Dynamic, 33 * MIB, 2, 512),
        (DiskKind::Dynamic, 20 * MIB, 256, 512),
        (DiskKind::Fixed, 37 * MIB + 1536, 1, 512),
        (DiskKind::Fixed, 50 * MIB, 32, 512),
    ];
    for (i, (kind, size, block_mib, sector)) in cases.into_iter().enumerate() {
        let (vhdx, raw) =
            (dir.path().join(format!("{i}.vhdx")), dir.path().join(format!("{i}.raw")));
        let mut disk = VhdxWriter::create(&vhdx, &options(kind, size, block_mib, sector)).unwrap();
        let mut model = Model::of(&disk);
        model.scribble(&mut disk, &mut StdRng::seed_from_u64(i as u64), 12);
        disk.close().unwrap();
        qemu("qemu-img", &["check", name(&vhdx)]);
        qemu("qemu-img", &["convert", "-O", "raw", name(&vhdx), name(&raw)]);
        assert!(std::fs::read(&raw).unwrap() == model.0, "case {i}: qemu reads other bytes");

        let (ours, theirs) = (open_disk(&vhdx).unwrap(), RawDisk::open(&raw).unwrap());
        assert_eq!(compare::first_difference(&ours, &theirs).unwrap(), None, "case {i}");
        let exported = dir.path().join(format!("{i}.export.raw"));
        export::to_raw(&ours, &exported).unwrap();
        assert!(std::fs::read(&exported).unwrap() == model.0, "case {i}: the export differs");
    }
}

#[test]
fn disks_of_many_chunks_put_every_block_where_qemu_looks_for_it() {
    if !qemu_is_there() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vhdx = dir.path().join("wide.vhdx");
    // 4096 blocks of 1 MiB share a chunk, so this disk has three.
    let size = 9 * 1024 * MIB;
    let mut disk = VhdxWriter::create(&vhdx, &options(DiskKind::Dynamic, size, 1, 512)).unwrap();
    for block in [0, 4095, 4096, 4097, 8191, 8192, 9215] {
        disk.write_at(block * MIB + 4096, &[block as u8 | 1; 512]).unwrap();
    }
    disk.close().unwrap();
    for block in [0_u64, 4095, 4096, 4097, 8191, 8192, 9215] {
        let read = format!("read -P {} {} 512", block as u8 | 1, block * MIB + 4096);
        let said = qemu("qemu-io", &["-r", "-f", "vhdx", "-c", &read, name(&vhdx)]);
        assert!(!said.contains("verification failed"), "block {block}: {said}");
    }
    assert_eq!(DiskChain::open(&vhdx).unwrap().allocated().unwrap().total_len(), 7 * MIB);
}

#[test]
fn we_read_exactly_what_qemu_wrote() {
    if !qemu_is_there() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cases = [("dynamic", "1M"), ("dynamic", "8M"), ("dynamic", "256M"), ("fixed", "2M")];
    for (i, (subformat, block)) in cases.into_iter().enumerate() {
        let (vhdx, raw) =
            (dir.path().join(format!("{i}.vhdx")), dir.path().join(format!("{i}.raw")));
        let create = format!("subformat={subformat},block_size={block}");
        qemu("qemu-img", &["create", "-f", "vhdx", "-o", &create, name(&vhdx), "45M"]);
        qemu("qemu-img", &["create", "-f", "raw", name(&raw), "45M"]);
        for (format, path) in [("vhdx", &vhdx), ("raw", &raw)] {
            let mut args = vec!["-f", format];
            for command in ["write -P 7 0 64k", "write -P 9 3M 2M", "write -P 11 44M 1M"] {
                args.extend(["-c", command]);
            }
            args.push(name(path));
            qemu("qemu-io", &args);
        }
        VhdxLayer::open(&vhdx).unwrap().check().unwrap();
        let (ours, theirs) = (open_disk(&vhdx).unwrap(), RawDisk::open(&raw).unwrap());
        assert_eq!(compare::first_difference(&ours, &theirs).unwrap(), None, "case {i}");
    }
}

#[test]
fn qemu_reads_its_own_disk_after_we_wrote_to_it() {
    if !qemu_is_there() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (i, subformat) in ["dynamic", "fixed"].into_iter().enumerate() {
        let (vhdx, raw) =
            (dir.path().join(format!("{i}.vhdx")), dir.path().join(format!("{i}.raw")));
        let create = format!("subformat={subformat},block_size=1M");
        qemu("qemu-img", &["create", "-f", "vhdx", "-o", &create, name(&vhdx), "30M"]);
        qemu("qemu-io", &["-f", "vhdx", "-c", "write -P 7 5M 3M", name(&vhdx)]);
        let mut disk = VhdxWriter::open(&vhdx).unwrap();
        let mut model = Model::of(&disk);
        model.0[5 << 20..8 << 20].fill(7);
        model.scribble(&mut disk, &mut StdRng::seed_from_u64(99), 10);
        disk.close().unwrap();
        qemu("qemu-img", &["convert", "-O", "raw", name(&vhdx), name(&raw)]);
        assert!(std::fs::read(&raw).unwrap() == model.0, "{subformat}: qemu reads other bytes");
    }
}

#[test]
fn qemu_replays_the_log_that_a_crash_of_ours_left() {
    if !qemu_is_there() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (vhdx, raw) = (dir.path().join("dirty.vhdx"), dir.path().join("dirty.raw"));
    let mut disk =
        VhdxWriter::create(&vhdx, &options(DiskKind::Dynamic, 30 * MIB, 1, 512)).unwrap();
    let mut model = Model::of(&disk);
    model.scribble(&mut disk, &mut StdRng::seed_from_u64(5), 4);
    disk.flush().unwrap();
    model.scribble(&mut disk, &mut StdRng::seed_from_u64(6), 4);
    disk.crash(CrashPoint::AfterLog).unwrap();
    assert!(DiskChain::open(&vhdx).unwrap().layers().all(ReadLayer::is_dirty));
    qemu("qemu-img", &["check", "-r", "all", name(&vhdx)]);
    qemu("qemu-img", &["convert", "-O", "raw", name(&vhdx), name(&raw)]);
    assert!(std::fs::read(&raw).unwrap() == model.0, "qemu replays something else");
}
