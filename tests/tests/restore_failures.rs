//! What a restore that fails leaves, and what it says of it: files that a VM may have are never removed, a VM that was
//! stopped to be replaced runs again, and a host on which something stays is not called clean.

use std::path::{Path, PathBuf};

use outrider_lab::{Comparison, DiskSource, Fault, FaultKind, HoldSpec, WaitFor, When};
use outrider_proto::rpc::{self, BackupKind};
use outrider_tests::fabric::MIB;
use outrider_tests::restores::{copy_to, in_place, restored};
use outrider_tests::wait::DEADLINE;
use outrider_tests::{Fabric, Plan};

const VM: &str = "ledger";

/// Disk files below a folder.
fn disks_in(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .flat_map(|entry| match entry.path() {
            folder if folder.is_dir() => disks_in(&folder),
            file => vec![file],
        })
        .filter(|file| file.extension().is_some_and(|e| e == "vhdx" || e == "avhdx"))
        .collect()
}

async fn out_of_order(fabric: &Fabric, method: &str) -> u64 {
    let kind = FaultKind::JobFails {
        method: method.to_owned(),
        code: 32768,
        description: format!("{method} is out of order"),
    };
    fabric.lab.set_fault(Fault::new(kind)).await.expect("in force")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_was_made_although_nobody_said_so_keeps_its_files() {
    let fabric = Fabric::start(Plan::default()).await;
    fabric.vm(VM, "alpha", 16 * MIB).await;
    let point = fabric.operator.backed_up(VM, BackupKind::Full).await;

    // The job that made it is forgotten at once.
    let vanishes = FaultKind::JobVanishes { method: "RealizePlannedSystem".into() };
    fabric.lab.set_fault(Fault::new(vanishes).times(1)).await.expect("in force");
    let job = restored(&fabric, copy_to(&point, "beta", "unseen")).await;
    assert!(job.state.starts_with("completed") && job.host_clean, "{job:?}");
    let made = fabric.seen("unseen").await;
    fabric.assert_disks_are(&made, &point).await;

    // Nobody answers from the moment that it was made.
    let spec = HoldSpec {
        method: "RealizePlannedSystem".into(),
        vm: None,
        host: Some("beta".into()),
        when: When::After,
    };
    let hold = fabric.lab.hold(spec).await.expect("a hold");
    let job = fabric.operator.restore(copy_to(&point, "beta", "silent")).await.expect("starts");
    fabric.lab.wait(WaitFor::MethodHeld { hold }, DEADLINE).await.expect("it is made");
    // As long as the attempt looks for it, and not as long as all attempts last.
    let away = Fault::new(FaultKind::WmiAway).on_host("beta").times(5);
    fabric.lab.set_fault(away).await.expect("in force");
    fabric.lab.release(hold).await.expect("released");
    let job = fabric.operator.ended(&job.job_id).await;
    assert!(job.state.starts_with("completed") && job.host_clean, "{job:?}");
    let made = fabric.seen("silent").await;
    fabric.assert_disks_are(&made, &point).await;
    assert_eq!(made.enabled_state, 2, "{made:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_planned_vm_that_cannot_be_removed_is_told_with_its_files() {
    let fabric = Fabric::start(Plan::default()).await;
    fabric.vm(VM, "alpha", 16 * MIB).await;
    let point = fabric.operator.backed_up(VM, BackupKind::Full).await;
    let before = disks_in(fabric.dir());
    for method in ["ModifySystemSettings", "DestroySystem"] {
        out_of_order(&fabric, method).await;
    }
    let job = restored(&fabric, copy_to(&point, "beta", "stuck")).await;
    assert!(job.state == "failed" && !job.host_clean, "something stays: {job:?}");
    let told = job.warnings.join("\n");
    let planned = fabric.lab.state().await.expect("the lab").planned;
    assert_eq!(planned.len(), 1, "a VM in the making: {planned:?}");
    let kept: Vec<PathBuf> =
        disks_in(fabric.dir()).into_iter().filter(|f| !before.contains(f)).collect();
    let folder = kept.first().and_then(|f| f.parent()?.parent()).expect("its files are there");
    assert!(told.contains(&*folder.display().to_string()), "{}: {told}", folder.display());
    fabric.lab.clear_faults().await.expect("cleared");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_could_not_be_set_aside_runs_again_and_what_it_lost_is_told() {
    let fabric = Fabric::start(Plan { merge_wait: "2s", ..Plan::default() }).await;
    fabric.vm(VM, "alpha", 16 * MIB).await;
    let point = fabric.operator.backed_up(VM, BackupKind::Full).await;
    fabric.lab.user_checkpoint(VM, "before the upgrade").await.expect("made");
    fabric.write(VM, MIB, 91).await;
    let stuck = fabric.lab.set_fault(Fault::new(FaultKind::StuckMerge).on_vm(VM)).await;
    let stuck = stuck.expect("in force");
    let job = restored(&fabric, in_place(&point)).await;
    let told = job.warnings.join("\n");
    assert!(job.reason.contains("merge"), "{job:?}");
    assert!(told.contains("before the upgrade"), "the lost checkpoint is told: {told}");
    assert!(told.contains("runs again"), "{told}");
    let old = fabric.seen(VM).await;
    assert_eq!((old.owner.as_deref(), old.enabled_state), (Some("alpha"), 2), "{old:?}");
    fabric.lab.clear_fault(stuck).await.expect("cleared");

    // It cannot even be started again: that is told.
    fabric.lab.wait(WaitFor::NoMerge { vm: VM.into() }, DEADLINE).await.expect("merged");
    fabric.lab.user_checkpoint(VM, "later").await.expect("made");
    for method in ["DestroySnapshot", "BringOnline"] {
        let kind = match method {
            "BringOnline" => FaultKind::MethodReturns { method: method.into(), code: 5018 },
            _ => FaultKind::JobFails {
                method: method.into(),
                code: 32768,
                description: "out of order".into(),
            },
        };
        fabric.lab.set_fault(Fault::new(kind)).await.expect("in force");
    }
    let job = restored(&fabric, in_place(&point)).await;
    assert!(job.warnings.join("\n").contains("is off; start it"), "{job:?}");
    assert_eq!(fabric.seen(VM).await.enabled_state, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_definition_a_point_says_so_and_no_vm_is_replaced() {
    let fabric = Fabric::start(Plan::default()).await;
    let vm = fabric.vm(VM, "alpha", 16 * MIB).await;
    let point = fabric.operator.backed_up(VM, BackupKind::Full).await;

    // Its own definition is not there: nobody could bring it back.
    let definition = vm.folders[0]
        .join("Virtual Machines")
        .join(format!("{}.vmcx", vm.id.hyphenated().to_string().to_uppercase()));
    std::fs::remove_file(&definition).expect("it was there");
    let job = restored(&fabric, in_place(&point)).await;
    assert!(job.reason.contains(".vmcx") && job.host_clean, "{job:?}");
    let old = fabric.seen(VM).await;
    assert_eq!((old.owner.as_deref(), old.enabled_state), (Some("alpha"), 2), "{old:?}");
    let calls = fabric.lab.call_log(Some("alpha")).await.expect("a log");
    assert!(calls.iter().all(|c| c.method != "TakeOffline"), "it was not touched");

    // A checkpoint without one.
    let spec = HoldSpec {
        method: "CreateSnapshot".into(),
        vm: Some(VM.into()),
        host: None,
        when: When::After,
    };
    let hold = fabric.lab.hold(spec).await.expect("a hold");
    let job = fabric.operator.backup(VM, BackupKind::Full).await;
    fabric.lab.wait(WaitFor::MethodHeld { hold }, DEADLINE).await.expect("a checkpoint");
    let folder = vm.folders[0].join("Snapshots");
    for file in std::fs::read_dir(&folder).expect("the checkpoint's files").flatten() {
        if file.path().extension().is_some_and(|e| e == "vmcx") {
            std::fs::remove_file(file.path()).expect("removed");
        }
    }
    fabric.lab.release(hold).await.expect("released");
    let job = fabric.operator.done(&job.job_id).await;
    assert!(job.warnings.join("\n").contains("restores as disks alone"), "{job:?}");
}

/// A shared disk and a pass-through one are in the definition and not in the point.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disks_of_the_definition_that_the_point_does_not_hold_are_left_out_and_told() {
    let fabric = Fabric::start(Plan::default()).await;
    let disks = vec![
        DiskSource::Shared { size: MIB },
        DiskSource::Empty { size: 16 * MIB, block_size: 0 },
        DiskSource::PassThrough,
    ];
    fabric.vm_with(VM, "alpha", disks).await;
    // It may leave out what cannot be captured.
    fabric.operator.group("others", &[VM], rpc::Policy::default()).await;
    fabric.write(VM, 2 * MIB, 95).await;
    fabric.lab.user_checkpoint(VM, "first").await.expect("made");
    let point = fabric.operator.backed_up(VM, BackupKind::Full).await;
    for with_checkpoints in [false, true] {
        let name = format!("copy {with_checkpoints}");
        let request = rpc::RestoreRequest { with_checkpoints, ..copy_to(&point, "beta", &name) };
        let job = restored(&fabric, request).await;
        assert!(job.state.starts_with("completed") && job.host_clean, "{job:?}");
        let told = job.warnings.join("\n");
        let left_out = told.lines().filter(|l| l.contains("it was taken out of the VM")).count();
        assert_eq!(left_out, 2, "{told}");
        let copy = fabric.seen(&name).await;
        assert_eq!((copy.disks.len(), copy.enabled_state), (1, 2), "{copy:?}");
        // It was the second one.
        let (file, checkpoint) = (copy.disks[0].chain.last(), point.checkpoint_id.parse());
        let (file, checkpoint) = (file.expect("a file"), checkpoint.expect("a GUID"));
        let compared = fabric.lab.compare_disk(file, checkpoint, 1).await.expect("comparable");
        assert_eq!(compared, Comparison::Identical, "{copy:?}");
    }
}
