//! What a restore plans, mends, keeps and leaves (R1, R4, R5, P12): judged by the simulated cluster, which refuses what a
//! host would refuse.

use std::path::PathBuf;

use outrider_lab::{
    DiskSource, Fault, FaultKind, HoldSpec, HostSetup, NicSetup, VmSetup, VmState, WaitFor, When,
};
use outrider_proto::rpc::{self, BackupKind};
use outrider_tests::fabric::MIB;
use outrider_tests::restores::{copy_to, group, in_place, planned, report, restored};
use outrider_tests::wait::DEADLINE;
use outrider_tests::{Fabric, Plan, eventually};

const VM: &str = "ledger";

/// Everything below the volumes that a restore could have written.
fn files_of_restores(fabric: &Fabric) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![fabric.dir().join("Volume1"), fabric.dir().join("Volume2")];
    while let Some(folder) = folders.pop() {
        let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        for entry in entries {
            if entry.path().is_dir() {
                folders.push(entry.path());
            } else {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    found
}

async fn setup(fabric: &Fabric, setup: VmSetup) {
    fabric.lab.set_up_vm(VM, setup).await.expect("set up");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_on_another_host_is_mended_and_each_mended_thing_is_told() {
    let fabric = Fabric::start(Plan::default()).await;
    fabric.vm(VM, "alpha", 16 * MIB).await;
    // Both hosts have "External", under another GUID each; "Lab" is alpha's alone, "Test" beta's.
    let switches = |names: &[&str]| HostSetup {
        switches: Some(names.iter().map(|n| (*n).to_owned()).collect()),
        ..HostSetup::default()
    };
    fabric.lab.set_up_host("alpha", switches(&["External", "Lab"])).await.expect("set up");
    fabric.lab.set_up_host("beta", switches(&["External", "Test"])).await.expect("set up");
    let image = fabric.dir().join("setup.iso");
    std::fs::write(&image, b"an image").expect("written");
    let elsewhere = fabric.dir().join("fast volume");
    std::fs::create_dir_all(&elsewhere).expect("made");
    setup(
        &fabric,
        VmSetup {
            nics: vec![NicSetup::on("External"), NicSetup::on("Lab")],
            image: Some(image.clone()),
            snapshot_root: Some(elsewhere.clone()),
            swap_root: Some(elsewhere.clone()),
            ..VmSetup::default()
        },
    )
    .await;
    let point = fabric.operator.backed_up(VM, BackupKind::Full).await;
    std::fs::remove_file(&image).expect("removed");
    std::fs::remove_dir_all(&elsewhere).expect("removed");

    let told = report(&fabric, copy_to(&point, "beta", "copy")).await;
    let copy = fabric.seen("copy").await;
    fabric.assert_disks_are(&copy, &point).await;
    assert_eq!((copy.host.as_str(), copy.enabled_state, copy.rights), ("beta", 2, true));
    let connected: Vec<_> = copy.nics.iter().map(|(_, switch)| switch.as_deref()).collect();
    assert_eq!(connected, [Some("External"), None], "by name, else not at all: {copy:?}");
    assert_eq!(copy.images, Vec::<PathBuf>::new(), "the missing image is ejected");
    assert!(copy.folders.iter().all(|f| f.exists()), "folders that exist: {copy:?}");
    for thing in [
        "\"External\"",
        "\"Lab\", which this host does not have",
        "ejected",
        "checkpoint folder",
        "Smart Paging",
    ] {
        assert!(told.contains(thing), "{thing} is told: {told}");
    }

    // As the operator chooses.
    let switches = vec![rpc::SwitchChoice { from: "Lab".into(), to: "Test".into() }];
    let chosen = rpc::RestoreRequest { switches, ..copy_to(&point, "beta", "chosen") };
    report(&fabric, chosen).await;
    let chosen = fabric.seen("chosen").await;
    assert_eq!(chosen.nics[1].1.as_deref(), Some("Test"), "{chosen:?}");
    let off = rpc::RestoreRequest { disconnect: true, ..copy_to(&point, "beta", "off") };
    assert!(report(&fabric, off).await.contains("as asked"));
    assert!(fabric.seen("off").await.nics.iter().all(|(_, switch)| switch.is_none()));
    let switches = vec![rpc::SwitchChoice { from: "Lab".into(), to: "Nowhere".into() }];
    let before = files_of_restores(&fabric);
    let wrong = rpc::RestoreRequest { switches, ..copy_to(&point, "beta", "wrong") };
    let job = restored(&fabric, wrong).await;
    assert_eq!(job.error_code, "OUT-N-0008", "{job:?}");
    assert!(job.reason.contains("External, Test"), "it names what there is: {job:?}");
    assert_eq!(files_of_restores(&fabric), before, "refused before anything was written");
    assert_eq!(planned(&fabric).await, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_host_cannot_run_is_refused_before_anything_is_written() {
    let fabric = Fabric::start(Plan::default()).await;
    fabric.vm(VM, "alpha", 16 * MIB).await;
    let old = HostSetup {
        versions: Some(["8.0", "9.0"].map(str::to_owned).to_vec()),
        ..HostSetup::default()
    };
    fabric.lab.set_up_host("beta", old).await.expect("set up");
    let running = fabric.operator.backed_up(VM, BackupKind::Full).await;
    let before = files_of_restores(&fabric);
    let job = restored(&fabric, copy_to(&running, "beta", "too new")).await;
    assert_eq!(job.error_code, "OUT-N-0008", "{job:?}");
    assert!(job.reason.contains("10.0") && job.reason.contains("8.0 to 9.0"), "both: {job:?}");
    assert_eq!(files_of_restores(&fabric), before, "nothing was written");
    fabric
        .lab
        .set_up_host(
            "beta",
            HostSetup {
                versions: Some(["8.0", "9.0", "10.0"].map(str::to_owned).to_vec()),
                ..HostSetup::default()
            },
        )
        .await
        .expect("set up");

    // J9: file servers by name, paths that Windows' tools can handle; in place, the VM stays as it is.
    let deep = fabric.dir().join("Volume1").join("d".repeat(200));
    let incarnation = async || fabric.operator.vm(VM).await.expect("known").incarnation;
    let first = incarnation().await;
    let folders = [
        (r"\\10.0.0.7\vms\web".to_owned(), "by address"),
        (deep.display().to_string(), "shorter folder"),
    ];
    for (folder, says) in folders {
        let request = rpc::RestoreRequest { target_folder: folder, ..in_place(&running) };
        let job = restored(&fabric, request).await;
        assert_eq!(job.error_code, "OUT-N-0008", "{job:?}");
        assert!(job.reason.contains(says), "{says}: {job:?}");
        assert_eq!(files_of_restores(&fabric), before, "nothing was written");
        assert_eq!(incarnation().await, first, "nothing was done to the VM");
        assert_eq!(fabric.seen(VM).await.enabled_state, 2, "it runs");
    }

    // A saved state is of its host's processor.
    fabric.lab.save_vm(VM).await.expect("saved");
    let saved = fabric.operator.backed_up(VM, BackupKind::Full).await;
    let before = files_of_restores(&fabric);
    let job = restored(&fabric, copy_to(&saved, "beta", "saved")).await;
    assert_eq!(job.error_code, "OUT-N-0008", "{job:?}");
    assert!(job.reason.contains("--discard-saved-state"), "{job:?}");
    assert_eq!(files_of_restores(&fabric), before, "nothing was written");
    let discard =
        rpc::RestoreRequest { discard_saved_state: true, ..copy_to(&saved, "beta", "saved") };
    let told = report(&fabric, discard).await;
    assert!(told.contains("saved state was discarded"), "{told}");
    let state = fabric.seen("saved").await;
    assert_eq!(state.enabled_state, 2, "it starts: {state:?}");
    fabric.assert_disks_are(&state, &saved).await;
    assert_eq!(planned(&fabric).await, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_boot_check_tells_what_was_seen_and_one_that_hyperv_cannot_make_is_refused_first() {
    let fabric = Fabric::start(Plan::default()).await;
    fabric.vm(VM, "alpha", 16 * MIB).await;
    let point = fabric.operator.backed_up(VM, BackupKind::Full).await;
    let check = |text: &str| {
        Some(rpc::BootCheck { patience_ms: 60_000, text: text.to_owned(), screen: false })
    };
    let before = files_of_restores(&fabric);
    let text = rpc::RestoreRequest { boot_check: check("up"), ..copy_to(&point, "beta", "first") };
    let job = restored(&fabric, text).await;
    assert_eq!(job.error_code, "OUT-N-0008", "{job:?}");
    assert!(job.reason.contains("--boot-text"), "{job:?}");
    assert_eq!(files_of_restores(&fabric), before, "nothing was written");
    let request = rpc::RestoreRequest {
        boot_check: check(""),
        power_on: false,
        ..copy_to(&point, "beta", "second")
    };
    let told = report(&fabric, request).await;
    assert!(told.contains("VM \"second\" has booted") && told.contains("heartbeat"), "{told}");
    assert_eq!(fabric.seen("second").await.enabled_state, 2, "it was started for the check");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_virtual_tpm_is_warned_about_at_its_backup_and_where_its_certificates_are_missing() {
    let fabric = Fabric::start(Plan::default()).await;
    fabric.vm(VM, "alpha", 16 * MIB).await;
    setup(&fabric, VmSetup { tpm: true, ..VmSetup::default() }).await;
    let job = fabric.operator.backup(VM, BackupKind::Full).await;
    let job = fabric.operator.done(&job.job_id).await;
    let told = job.warnings.join("\n");
    assert!(told.contains("UntrustedGuardian on host alpha"), "still to be exported: {told}");
    let point = fabric.operator.point(VM, &job.point_id).await;

    // Without the certificates the VM is restored and cannot start; both is said.
    let job = restored(&fabric, copy_to(&point, "beta", "locked")).await;
    let told = job.warnings.join("\n");
    assert!(told.contains("UntrustedGuardian") && told.contains("beta cannot open"), "{told}");
    assert!(job.reason.contains("could not be unwrapped"), "the start's own words: {job:?}");
    assert!(job.state == "failed" && job.restored_vm.is_some(), "not running is not done: {job:?}");
    let locked = fabric.seen("locked").await;
    assert_eq!(locked.enabled_state, 3, "there, and off: {locked:?}");
    fabric.assert_disks_are(&locked, &point).await;

    // With them it starts without a word.
    let import = HostSetup { guardians_of: vec!["alpha".into()], ..HostSetup::default() };
    fabric.lab.set_up_host("beta", import).await.expect("imported");
    let told = report(&fabric, copy_to(&point, "beta", "open")).await;
    assert!(!told.contains("cannot open"), "{told}");
    assert_eq!(fabric.seen("open").await.enabled_state, 2);
    assert_eq!(planned(&fabric).await, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_place_the_vm_stays_clustered_with_its_groups_settings_and_old_files_go() {
    let fabric = Fabric::start(Plan::default()).await;
    fabric.vm(VM, "alpha", 16 * MIB).await;
    setup(&fabric, VmSetup { group: Some(group()), ..VmSetup::default() }).await;
    let point = fabric.operator.backed_up(VM, BackupKind::Full).await;
    fabric.write(VM, MIB, 71).await;
    let id = fabric.seen(VM).await.id.to_string();
    fabric.lab.user_checkpoint(&id, "before the upgrade").await.expect("made");
    fabric.write(VM, MIB, 72).await;
    let before = fabric.seen(VM).await;
    let old: Vec<PathBuf> = before.disks.iter().flat_map(|d| d.chain.clone()).collect();
    // The cluster is busy first: waited for.
    let busy = FaultKind::MethodReturns { method: "TakeOffline".into(), code: 5908 };
    fabric.lab.set_fault(Fault::new(busy).times(2)).await.expect("in force");

    let told = report(&fabric, rpc::RestoreRequest { power_on: true, ..in_place(&point) }).await;
    let after = fabric.seen(VM).await;
    assert_eq!((after.id, after.enabled_state), (before.id, 2), "{after:?}");
    fabric.assert_disks_are(&after, &point).await;
    assert_eq!(after.owner.as_deref(), Some("alpha"), "it stays highly available: {after:?}");
    assert_eq!(after.group, Some(group()), "with the settings of its group");
    assert_eq!(after.cluster_failures, 0, "no stop that the cluster took for a failure");
    assert!(told.contains("before the upgrade"), "the lost checkpoint is told: {told}");
    for file in old {
        assert!(!file.exists(), "{} of the VM that was replaced is gone", file.display());
    }
    let trails = files_of_restores(&fabric);
    assert!(!trails.iter().any(|f| f.ends_with("outrider-restore.json")), "{trails:?}");
    assert_eq!(planned(&fabric).await, []);

    // Kept if asked.
    let files: Vec<PathBuf> = after.disks.iter().flat_map(|d| d.chain.clone()).collect();
    report(&fabric, rpc::RestoreRequest { keep_replaced: true, ..in_place(&point) }).await;
    assert!(files.iter().all(|f| f.exists()), "kept: {files:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_place_a_disk_that_the_point_does_not_hold_stays_and_is_told() {
    let fabric = Fabric::start(Plan::default()).await;
    fabric.vm(VM, "alpha", 16 * MIB).await;
    let point = fabric.operator.backed_up(VM, BackupKind::Full).await;
    let held: Vec<PathBuf> =
        fabric.seen(VM).await.disks.iter().flat_map(|d| d.chain.clone()).collect();
    let added = DiskSource::Empty { size: MIB, block_size: 0 };
    fabric.lab.add_disk(VM, added).await.expect("added");
    let all = fabric.seen(VM).await.disks;
    let mut others = all.iter().flat_map(|d| d.chain.clone()).filter(|file| !held.contains(file));
    let (other, None) = (others.next().expect("the added disk"), others.next()) else {
        panic!("one disk was added: {all:?}");
    };

    let told = report(&fabric, in_place(&point)).await;
    fabric.assert_disks_are(&fabric.seen(VM).await, &point).await;
    assert!(held.iter().all(|file| !file.exists()), "what was restored is gone: {held:?}");
    assert!(other.exists(), "{} has no copy anywhere", other.display());
    let kept = told.lines().find(|line| line.contains("does not hold")).unwrap_or_default();
    assert!(kept.contains(&*other.display().to_string()), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failure_at_any_step_leaves_no_vm_in_the_making_and_no_file() {
    let fabric = Fabric::start(Plan::default()).await;
    fabric.vm(VM, "alpha", 16 * MIB).await;
    setup(&fabric, VmSetup { nics: vec![NicSetup::on("External")], ..VmSetup::default() }).await;
    let point = fabric.operator.backed_up(VM, BackupKind::Full).await;
    let before = files_of_restores(&fabric);
    let vms = fabric.lab.state().await.expect("the lab").vms.len();
    for method in [
        "ImportSystemDefinition",
        "ModifyResourceSettings",
        "ModifySystemSettings",
        "ValidatePlannedSystem",
        "RealizePlannedSystem",
    ] {
        let kind = FaultKind::JobFails {
            method: method.to_owned(),
            code: 32768,
            description: format!("{method} is out of order"),
        };
        let fault = fabric.lab.set_fault(Fault::new(kind)).await.expect("in force");
        let job = restored(&fabric, copy_to(&point, "beta", "never")).await;
        assert!(job.reason.contains("out of order"), "{method}: {job:?}");
        assert_eq!(planned(&fabric).await, [], "{method} leaves no VM in the making");
        assert_eq!(files_of_restores(&fabric), before, "{method} leaves no file");
        if method == "RealizePlannedSystem" {
            // In place there would be no way back either, as long as it is out of order.
            fabric.lab.clear_fault(fault).await.expect("cleared");
            continue;
        }
        // In place the old VM is untouched: the rehearsal heard of it.
        let job = restored(&fabric, in_place(&point)).await;
        assert!(!job.error_code.is_empty(), "{method}: {job:?}");
        let old = fabric.seen(VM).await;
        assert_eq!((old.owner.as_deref(), old.enabled_state), (Some("alpha"), 2), "{method}");
        assert_eq!(files_of_restores(&fabric), before, "{method} in place leaves no file");
        fabric.lab.clear_fault(fault).await.expect("cleared");
    }
    // After the rehearsal, with the old VM gone already: the old one comes back.
    for (method, at) in [("RealizePlannedSystem", 1), ("ImportSystemDefinition", 2)] {
        let spec = HoldSpec {
            method: "DestroySystem".into(),
            vm: Some(VM.into()),
            host: None,
            when: When::Before,
        };
        let hold = fabric.lab.hold(spec).await.expect("a hold");
        let job = fabric.operator.restore(in_place(&point)).await.expect("starts");
        fabric.lab.wait(WaitFor::MethodHeld { hold }, DEADLINE).await.expect("the old VM goes");
        let kind = FaultKind::JobFails {
            method: method.to_owned(),
            code: 32768,
            description: "out of order".into(),
        };
        fabric.lab.set_fault(Fault::new(kind).times(1)).await.expect("in force");
        fabric.lab.release(hold).await.expect("released");
        let job = fabric.operator.ended(&job.job_id).await;
        assert!(job.reason.contains("out of order"), "{at}: {job:?}");
        assert!(job.warnings.join("\n").contains("brought back"), "{job:?}");
        let old = fabric.seen(VM).await;
        assert_eq!((old.owner.as_deref(), old.enabled_state), (Some("alpha"), 2), "{old:?}");
        assert_eq!(files_of_restores(&fabric), before, "no file of the restore stays");
    }
    assert_eq!(planned(&fabric).await, []);
    assert_eq!(fabric.lab.state().await.expect("the lab").vms.len(), vms);
}

/// The agent dies in the middle of a restore in place: at no moment is there neither the old VM nor a way to one, and the
/// next attempt finishes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_killed_at_any_step_of_a_restore_in_place_finishes_it_afterwards() {
    let mut fabric = Fabric::start(Plan::default()).await;
    fabric.vm(VM, "alpha", 16 * MIB).await;
    setup(&fabric, VmSetup { group: Some(group()), ..VmSetup::default() }).await;
    let point = fabric.operator.backed_up(VM, BackupKind::Full).await;
    let arrows = [
        ("ImportSystemDefinition", When::After),
        ("TakeOffline", When::After),
        ("DestroyGroup", When::Before),
        ("DestroySystem", When::Before),
        ("DestroySystem", When::After),
        ("RealizePlannedSystem", When::Before),
        ("RealizePlannedSystem", When::After),
        ("AddVirtualMachine", When::After),
    ];
    for (seed, (method, when)) in (80..).zip(arrows) {
        eprintln!("killed at {method} {when:?}");
        fabric.write(VM, MIB, seed).await;
        // DestroySystem is called for the rehearsal's planned VM, too: only the VM's own call is meant.
        let vm = (method == "DestroySystem").then(|| VM.to_owned());
        let spec = HoldSpec { method: method.into(), vm, host: Some("alpha".into()), when };
        let hold = fabric.lab.hold(spec).await.expect("a hold");
        let request = rpc::RestoreRequest { power_on: true, ..in_place(&point) };
        let job = fabric.operator.restore(request).await.expect("starts");
        fabric.lab.wait(WaitFor::MethodHeld { hold }, DEADLINE).await.expect("it gets there");
        fabric.agent("alpha").kill();
        let _ = fabric.lab.release(hold).await;
        eventually("nobody speaks for alpha", async || {
            let state = fabric.lab.state().await.map_err(|e| e.to_string())?;
            let left = state.hosts.iter().find(|h| h.name == "alpha").map_or(0, |h| h.connections);
            if left == 0 { Ok(()) } else { Err(format!("{left} connections")) }
        })
        .await;
        let there = fabric.lab.vm(VM).await.is_ok();
        let files = files_of_restores(&fabric);
        let disks = files.iter().filter(|f| f.extension().is_some_and(|e| e == "vhdx")).count();
        assert!(there || disks >= 2, "the VM, or the files of both: {files:?}");

        fabric.agent("alpha").restart();
        fabric.agent("alpha").ready().await;
        let job = fabric.operator.ended(&job.job_id).await;
        assert!(job.state.starts_with("completed") && job.error_code.is_empty(), "{job:?}");
        let after: VmState = fabric.seen(VM).await;
        fabric.assert_disks_are(&after, &point).await;
        assert_eq!((after.owner.as_deref(), after.enabled_state), (Some("alpha"), 2), "{after:?}");
        assert_eq!(after.group, Some(group()), "killed at {method} {when:?}");
        assert_eq!(planned(&fabric).await, [], "killed at {method} {when:?}");
        let files = files_of_restores(&fabric);
        let disks: Vec<_> =
            files.iter().filter(|f| f.extension().is_some_and(|e| e == "vhdx")).collect();
        assert_eq!(disks.len(), 1, "one VM, one disk, killed at {method} {when:?}: {files:?}");
        assert!(!files.iter().any(|f| f.ends_with("outrider-restore.json")), "{files:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guid_is_not_kept_while_its_vm_runs_on_another_host() {
    let fabric = Fabric::start(Plan::default()).await;
    fabric.vm_with(VM, "alpha", vec![DiskSource::Empty { size: 16 * MIB, block_size: 0 }]).await;
    let point = fabric.operator.backed_up(VM, BackupKind::Full).await;
    let before = files_of_restores(&fabric);
    let request = rpc::RestoreRequest {
        point_id: point.point_id.clone(),
        to_host: "beta".into(),
        new_name: "twin".into(),
        keep_guid: true,
        ..Default::default()
    };
    let job = restored(&fabric, request).await;
    assert_eq!(job.error_code, "OUT-N-0005", "{job:?}");
    assert!(job.reason.contains("alpha"), "it says where: {job:?}");
    assert_eq!(files_of_restores(&fabric), before, "nothing was written");
}
