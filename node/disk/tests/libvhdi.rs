//! Checkpoint chains and disks of 4 KiB sectors, which qemu-img cannot read, judged by libvhdi.

use std::path::{Path, PathBuf};
use std::process::Command;

use outrider_disk::vhdx::{CreateOptions, VhdxWriter};
use outrider_disk::{DiskChain, RawDisk, compare};

const MIB: u64 = 1 << 20;

/// A disk mounted by vhdimount: a raw file for each file of the chain, the leaf's last.
struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    fn new(disk: &Path, at: &'a Path) -> Self {
        // It looks for parents by their names, in the current folder.
        let (folder, name) = (disk.parent().unwrap(), disk.file_name().unwrap());
        let run = Command::new("vhdimount").current_dir(folder).arg(name).arg(at).output();
        let out = run.expect("vhdimount is needed; install libvhdi-utils");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        Self(at)
    }

    fn layer(&self, number: usize) -> PathBuf {
        self.0.join(format!("vhdi{number}"))
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        Command::new("umount").arg(self.0).status().expect("umount is part of every system");
    }
}

#[test]
#[ignore = "needs root, FUSE and vhdimount (libvhdi-utils)"]
fn libvhdi_reads_our_chains_as_we_do() {
    let dir = tempfile::tempdir().unwrap();
    for sector in [512_u32, 4096] {
        let names = ["base.vhdx", "child.avhdx", "grandchild.avhdx"];
        let paths = names.map(|name| dir.path().join(format!("{sector}-{name}")));
        let block_size = MIB as u32;
        let options = CreateOptions {
            block_size,
            logical_sector: sector,
            ..CreateOptions::dynamic(12 * MIB)
        };
        let mut disk = VhdxWriter::create(&paths[0], &options).unwrap();
        for block in 0..12 {
            disk.write_at(block * MIB, &vec![block as u8 + 1; 300_000]).unwrap();
        }
        disk.close().unwrap();
        let mut disk = VhdxWriter::create_child(&paths[1], &paths[0], None).unwrap();
        disk.write_at(3 * 4096, &[0xaa; 40960]).unwrap();
        disk.write_at(5 * MIB, &vec![0xbb; 2 << 20]).unwrap();
        // No zero blocks: libvhdi shows the parent through them, contrary to the format.
        disk.close().unwrap();
        let mut disk = VhdxWriter::create_child(&paths[2], &paths[1], None).unwrap();
        disk.write_at(5 * 4096, &[0xcc; 4096]).unwrap();
        disk.close().unwrap();
        for (i, path) in paths.iter().enumerate() {
            let mount = dir.path().join(format!("{sector}-{i}"));
            std::fs::create_dir(&mount).unwrap();
            let mounted = Mounted::new(path, &mount);
            let theirs = RawDisk::open(mounted.layer(i + 1)).unwrap();
            let ours = DiskChain::open(path).unwrap();
            let differs = compare::first_difference(&ours, &theirs).unwrap();
            assert_eq!(differs, None, "{}", path.display());
        }
    }
}
