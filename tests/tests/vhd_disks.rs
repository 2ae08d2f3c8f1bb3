//! A VM whose disks are VHDs comes back with VHDs: as a VM of another name on another host, and in place.

use std::path::PathBuf;

use outrider_disk::{DiskFormat, DiskKind, DiskWriter, NewDisk, ReadDisk, open_disk};
use outrider_lab::{DiskSource, VmState};
use outrider_proto::rpc::{self, BackupKind};
use outrider_tests::fabric::MIB;
use outrider_tests::restores::{copy_to, in_place, restored};
use outrider_tests::{Fabric, Plan};

const VM: &str = "legacy";

const KINDS: [DiskKind; 2] = [DiskKind::Dynamic, DiskKind::Fixed];

fn files(vm: &VmState) -> Vec<PathBuf> {
    vm.disks.iter().filter_map(|disk| disk.chain.last().cloned()).collect()
}

/// What a file's name and its bytes say.
fn shapes(vm: &VmState) -> Vec<(String, DiskFormat, DiskKind)> {
    let shape = |file: &PathBuf| {
        let extension = file.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        let info = open_disk(file).expect("a sound disk").info().clone();
        (extension, info.format, info.kind)
    };
    files(vm).iter().map(shape).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_with_vhds_is_defined_from_its_restored_vhds_and_restored_in_place() {
    let given = tempfile::tempdir().expect("a temporary folder");
    let disks = KINDS.map(|kind| {
        let path = given.path().join(format!("{kind}.vhd"));
        // A size that no geometry of cylinders, heads and sectors has.
        let new = NewDisk::of(DiskFormat::Vhd, kind, 9 * MIB + 512);
        DiskWriter::create(&path, &new).expect("made").close().expect("closed");
        DiskSource::CopyOf(path)
    });
    let fabric = Fabric::start(Plan::default()).await;
    fabric.vm_with(VM, "alpha", disks.to_vec()).await;
    let point = fabric.operator.backed_up(VM, BackupKind::Full).await;
    let expected = KINDS.map(|kind| ("vhd".to_owned(), DiskFormat::Vhd, kind));

    let job = restored(&fabric, copy_to(&point, "beta", "legacy-copy")).await;
    assert!(job.state.starts_with("completed") && job.error_code.is_empty(), "{job:?}");
    let vm = fabric.seen("legacy-copy").await;
    assert_eq!(vm.enabled_state, 2, "it runs: {vm:?}");
    assert_eq!(shapes(&vm), expected);
    fabric.assert_disks_are(&vm, &point).await;

    let before = fabric.seen(VM).await;
    fabric.write(VM, MIB, 7).await;
    let request = rpc::RestoreRequest { power_on: true, ..in_place(&point) };
    let job = restored(&fabric, request).await;
    assert!(job.state.starts_with("completed") && job.error_code.is_empty(), "{job:?}");
    let after = fabric.seen(VM).await;
    assert_eq!((after.id, after.enabled_state), (before.id, 2), "{after:?}");
    assert_eq!(shapes(&after), expected);
    fabric.assert_disks_are(&after, &point).await;
    for file in files(&before) {
        assert!(!file.exists(), "{} of the VM that was replaced is gone", file.display());
    }

    // What came back is a VM like any other: it is backed up, and that point is exact, too.
    fabric.write(VM, MIB, 8).await;
    let again = fabric.operator.backed_up(VM, BackupKind::Incremental).await;
    fabric.assert_exports_exactly(&again).await;
}
