//! Page and swap files left out by policy (P8): their bytes are neither sent nor restored, everything else is exact, and
//! what is left out may change from point to point.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use outrider_disk::guest::{Limits, page_files};
use outrider_disk::vhdx::{CreateOptions, VhdxWriter};
use outrider_disk::{RangeSet, RawDisk, export, open_disk};
use outrider_lab::{CreateVm, DiskSource, GuestWrite};
use outrider_proto::rpc::{self, BackupKind};
use outrider_tests::fabric::MIB;
use outrider_tests::{Fabric, Plan, eventually};

const TOOLS: [&str; 5] = ["mkntfs", "ntfscp", "mke2fs", "sfdisk", "mkswap"];
/// Places of the volumes, (offset, length).
const NTFS: (u64, u64) = (MIB, 16 * MIB);
const ROOT: (u64, u64) = (17 * MIB, 16 * MIB);
const SWAP: (u64, u64) = (33 * MIB, 6 * MIB);
const SIZE: u64 = 40 * MIB;

fn have_tools() -> bool {
    let here = |tool: &&&str| {
        ["/usr/sbin", "/usr/bin", "/sbin"].iter().any(|d| Path::new(d).join(tool).exists())
    };
    let missing: Vec<_> = TOOLS.iter().filter(|t| !here(t)).collect();
    assert!(
        missing.is_empty() || std::env::var_os("OUTRIDER_CI").is_none(),
        "missing: {missing:?}"
    );
    if !missing.is_empty() {
        eprintln!("SKIPPED: needs {missing:?}");
    }
    missing.is_empty()
}

fn run(tool: &str, args: &[&str]) {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let out = Command::new(tool).args(args).env("PATH", path).output().expect("a program");
    assert!(out.status.success(), "{tool} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary folders have Unicode names")
}

/// Bytes that no compression shrinks.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut out: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| next()).collect();
    out.truncate(len);
    out
}

/// A guest's disk as a VHDX: NTFS with a page file, ext4 with a swap file, a swap partition, all full of noise.
fn guest_disk(dir: &Path, dirty: bool) -> PathBuf {
    let at = |name: &str| dir.join(name);
    let blank = |path: &Path, len: u64| {
        std::fs::File::create(path).and_then(|f| f.set_len(len)).expect("a new file");
    };
    blank(&at("raw.img"), SIZE);
    let script = at("script");
    std::fs::write(&script, "label: gpt\nsize=16MiB,type=EBD0A0A2-B9E5-4433-87C0-68B6B72699C7\nsize=16MiB\nsize=6MiB,type=swap\n")
        .expect("a new file");
    run("sh", &["-c", &format!("sfdisk -q {} < {}", text(&at("raw.img")), text(&script))]);
    blank(&at("ntfs"), NTFS.1);
    run("mkntfs", &["-F", "-q", text(&at("ntfs"))]);
    for (name, seed, len) in [("pagefile.sys", 1, 6_000_000), ("data.bin", 2, 3_000_000)] {
        std::fs::write(at("source"), noise(seed, len)).expect("a new file");
        run("ntfscp", &["-q", text(&at("ntfs")), text(&at("source")), name]);
    }
    let root = at("root");
    std::fs::create_dir_all(root.join("etc")).expect("a folder");
    std::fs::write(root.join("etc/fstab"), "/swap.img none swap sw 0 0\n").expect("a new file");
    std::fs::write(root.join("swap.img"), noise(3, 2 << 20)).expect("a new file");
    std::fs::write(root.join("other"), noise(4, 1 << 20)).expect("a new file");
    run("mkswap", &[text(&root.join("swap.img"))]);
    blank(&at("ext"), ROOT.1);
    run("mke2fs", &["-q", "-F", "-t", "ext4", "-b", "4096", "-d", text(&root), text(&at("ext"))]);
    std::fs::write(at("swap"), noise(5, SWAP.1 as usize)).expect("a new file");
    run("mkswap", &[text(&at("swap"))]);
    let raw = std::fs::File::options().write(true).open(at("raw.img")).expect("just made");
    for ((start, _), part) in [(NTFS, "ntfs"), (ROOT, "ext"), (SWAP, "swap")] {
        let mut bytes = std::fs::read(at(part)).expect("just made");
        if dirty && part == "ntfs" {
            mark_dirty(&mut bytes);
        }
        raw.write_all_at(&bytes, start).expect("writes");
    }
    let vhdx = dir.join("guest.vhdx");
    let mut disk = VhdxWriter::create(&vhdx, &CreateOptions::dynamic(SIZE)).expect("a new disk");
    let bytes = std::fs::read(at("raw.img")).expect("just made");
    for (i, piece) in bytes.chunks(1 << 20).enumerate() {
        if piece.iter().any(|b| *b != 0) {
            disk.write_at(i as u64 * MIB, piece).expect("within the disk");
        }
    }
    disk.close().expect("closes");
    vhdx
}

/// Sets the dirty flag in `$VOLUME_INFORMATION`: version 3.1, no flags.
fn mark_dirty(ntfs: &mut [u8]) {
    let places: Vec<usize> = (0..ntfs.len() - 12)
        .step_by(8)
        .filter(|at| ntfs[*at..*at + 12] == *b"\0\0\0\0\0\0\0\0\x03\x01\0\0")
        .collect();
    assert!(!places.is_empty(), "the volume information is somewhere");
    for at in places {
        ntfs[at + 10] = 1;
    }
}

/// What must be left out of a checkpoint's bytes.
fn left_out(truth: &Path) -> RangeSet {
    let raw = truth.with_extension("raw.img");
    std::fs::copy(truth, &raw).expect("a copy");
    let found =
        page_files::search(Arc::new(RawDisk::open(&raw).expect("a raw copy")), Limits::default());
    std::fs::remove_file(raw).expect("ours");
    found.ranges()
}

/// Exports a point and compares it with the checkpoint's bytes: zeros in `excluded`, exact elsewhere.
async fn assert_exact_but(fabric: &Fabric, vm: &str, point: &rpc::Point, excluded: &RangeSet) {
    let truth = truth(fabric, vm, point).await;
    assert_is(fabric, point, &truth, excluded);
}

fn assert_is(fabric: &Fabric, point: &rpc::Point, truth: &Path, excluded: &RangeSet) {
    let folder = fabric.dir().join(format!("export-{}", point.point_id));
    let to = folder.display().to_string();
    let args = ["export", "--json", "--point", &point.point_id, "--to", &to];
    let outcome = tokio::task::block_in_place(|| fabric.operator.cli(&args));
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let file = outcome.json()["files"][0].as_str().expect("a path").to_owned();
    let raw = folder.join("export.raw");
    export::to_raw(&open_disk(&file).expect("a disk"), &raw).expect("a raw copy");
    let mut expected = std::fs::read(truth).expect("the truth");
    for range in excluded {
        expected[range.start as usize..range.end() as usize].fill(0);
    }
    let found = std::fs::read(&raw).expect("a raw copy");
    assert_eq!(found.len(), expected.len());
    let differs = found.iter().zip(&expected).position(|(a, b)| a != b);
    assert_eq!(differs, None, "the first byte of {} that differs", point.point_id);
    let stats = point.stats.expect("figures");
    assert_eq!(stats.excluded_bytes, excluded.total_len(), "{:?}", point.reasons);
    std::fs::remove_dir_all(folder).expect("removed");
}

async fn truth(fabric: &Fabric, vm: &str, point: &rpc::Point) -> PathBuf {
    let checkpoint = point.checkpoint_id.parse().expect("a GUID");
    fabric.lab.truth_path(vm, checkpoint, 0).await.expect("recorded").expect("kept")
}

fn policy(skip_page_files: bool) -> rpc::Policy {
    rpc::Policy { skip_page_files, require_all_disks: true, ..Default::default() }
}

fn edit(fabric: &Fabric, switch: &str) {
    let outcome = tokio::task::block_in_place(|| {
        fabric.operator.cli(&["group", "edit", "g", switch, "--json"])
    });
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
}

/// A running VM with a copy of this disk, known to the coordinator. Nothing is written to it.
async fn make(fabric: &Fabric, vm: &str, disk: PathBuf) {
    let new = CreateVm::new(vm, "alpha", "Volume1", vec![DiskSource::CopyOf(disk)]);
    fabric.lab.create_vm(new).await.expect("the VM is made");
    eventually("the VM is known", async || {
        fabric.operator.vm(vm).await.map(|_| ()).map_err(|e| e.to_string())
    })
    .await;
}

/// The guest writes noise over whole ranges.
async fn guest_writes(fabric: &Fabric, vm: &str, ranges: &RangeSet, seed: u64) {
    for range in ranges {
        fabric
            .lab
            .guest_write(GuestWrite::at(vm, 0, range.start, range.len, seed))
            .await
            .expect("writes");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn page_files_are_left_out_and_everything_else_is_exact_point_after_point() {
    if !have_tools() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let fabric = Fabric::start(Plan::default()).await;
    let vm = "web";
    make(&fabric, vm, guest_disk(dir.path(), false)).await;
    fabric.operator.group("g", &[vm], policy(true)).await;

    let full = fabric.operator.backed_up(vm, BackupKind::Full).await;
    // The simulated cluster forgets the bytes of old checkpoints.
    let kept = dir.path().join("full");
    std::fs::copy(truth(&fabric, vm, &full).await, &kept).expect("a copy");
    let excluded = left_out(&kept);
    let swap = RangeSet::single(SWAP.0 + 4096, SWAP.1 - 4096);
    assert_eq!(excluded.intersect(&swap), swap, "the swap partition but its header");
    assert!(excluded.total_len() > 6_000_000 + (2 << 20) - 4096 + SWAP.1 - 4096 - 1, "all three");
    assert_exact_but(&fabric, vm, &full, &excluded).await;
    let sent = full.stats.expect("figures").sent_bytes;
    assert!(sent < 7 * MIB, "{sent} sent: the noise in page files is not");
    for word in ["pagefile.sys", "/swap.img", "swap partition 3"] {
        assert!(
            full.reasons.iter().any(|r| r.contains(word) && r.contains("left out")),
            "{:?}",
            full.reasons
        );
    }
    let listed = tokio::task::block_in_place(|| fabric.operator.cli(&["point", "list"]));
    assert!(listed.stdout.contains("left out"), "{listed:?}");

    // The guest goes on paging, and writes a little elsewhere.
    guest_writes(&fabric, vm, &excluded, 11).await;
    let elsewhere = RangeSet::single(39 * MIB + 12_345, 50_000);
    guest_writes(&fabric, vm, &elsewhere, 12).await;
    let second = fabric.operator.backed_up(vm, BackupKind::Incremental).await;
    assert_eq!(second.kind(), BackupKind::Incremental, "{second:?}");
    assert_exact_but(&fabric, vm, &second, &excluded).await;
    let sent = second.stats.expect("figures").sent_bytes;
    assert!(sent < MIB, "{sent} sent of what changed in page files");

    // Off: what was left out is in this point, although it did not change since the last one.
    edit(&fabric, "--skip-page-files=false");
    let third = fabric.operator.backed_up(vm, BackupKind::Incremental).await;
    assert_eq!(third.kind(), BackupKind::Incremental, "{third:?}");
    assert_exact_but(&fabric, vm, &third, &RangeSet::new()).await;
    fabric.assert_restores_exactly(&third, "beta").await;

    // On again; and then the swap header is gone, so that the partition is no swap any more.
    edit(&fabric, "--skip-page-files");
    let fourth = fabric.operator.backed_up(vm, BackupKind::Incremental).await;
    assert_eq!(fourth.kind(), BackupKind::Incremental, "{fourth:?}");
    assert_exact_but(&fabric, vm, &fourth, &excluded).await;
    guest_writes(&fabric, vm, &RangeSet::single(SWAP.0, 4096), 13).await;
    let fifth = fabric.operator.backed_up(vm, BackupKind::Incremental).await;
    assert_eq!(fifth.kind(), BackupKind::Incremental, "{fifth:?}");
    assert_exact_but(&fabric, vm, &fifth, &excluded.subtract(&swap)).await;
    // Older points stay what they are.
    assert_is(&fabric, &full, &kept, &excluded);
    fabric.assert_clean(vm).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dirty_file_system_keeps_its_page_file_and_says_why() {
    if !have_tools() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let fabric = Fabric::start(Plan::default()).await;
    let vm = "web";
    make(&fabric, vm, guest_disk(dir.path(), true)).await;
    fabric.operator.group("g", &[vm], policy(true)).await;
    let full = fabric.operator.backed_up(vm, BackupKind::Full).await;
    let excluded = left_out(&truth(&fabric, vm, &full).await);
    assert!(!excluded.overlaps(NTFS.0, NTFS.1), "nothing of the dirty volume");
    assert!(excluded.overlaps(SWAP.0, SWAP.1), "the other volumes are certain");
    assert_exact_but(&fabric, vm, &full, &excluded).await;
    let said = full
        .reasons
        .iter()
        .any(|r| r.contains("pagefile.sys") && r.contains("kept") && r.contains("dirty"));
    assert!(said, "{:?}", full.reasons);
    let shown =
        tokio::task::block_in_place(|| fabric.operator.cli(&["point", "show", &full.point_id]));
    assert!(shown.stdout.contains("dirty"), "{shown:?}");
}
