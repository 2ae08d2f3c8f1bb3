//! Backup jobs of the node agent against the simulated cluster, with storage and coordinator in memory: what a job leaves
//! at the hypervisor, and whether its points are exact, when it is interrupted at any arrow.

mod lab_world;

use std::sync::Arc;
use std::time::Duration;

use lab_world::{DEADLINE, Job, MIB, World, times};
use outrider_disk::{DiskFormat, DiskKind, DiskWriter, NewDisk, ReadDisk, open_disk};
use outrider_lab::{
    CheckpointOnMigration, CreateVm, DiskSource, Fault, FaultKind, GateSpec, GuestWrite, HoldSpec,
    MigrationKind, WaitFor, When,
};
use outrider_node::config::Limits;
use outrider_node::fakes::sealer;
use outrider_node::hypervisor::{Change, CheckpointRequest, Hypervisor, Inventory};
use outrider_node::job::{self, JobContext, Progress};
use outrider_node::lease::Lease;
use outrider_node::metrics::NodeMetrics;
use outrider_node::pipeline::Pool;
use outrider_node::source::Sources;
use outrider_process::clock::{Clock, SystemClock};
use outrider_proto::ids::{JobId, LeaseEpoch, VmGuid};
use outrider_proto::rpc::{self, BackupKind, Consistency, JobLease, job_lease::Work};
use tokio::sync::watch;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_then_two_incrementals_restore_to_the_exact_bytes_and_leave_one_reference_point() {
    let world = World::small().await;
    let first = world.back_up("alpha", BackupKind::Incremental).await;
    assert_eq!(world.commit(first).kind(), BackupKind::Full, "there was no base");
    assert_eq!(world.commit(first).achieved(), Consistency::Application);
    world.assert_clean().await;
    let mut jobs = vec![first];
    for seed in [2, 3] {
        world.write(MIB, seed).await;
        let job = world.back_up("alpha", BackupKind::Incremental).await;
        let commit = world.commit(job);
        assert_eq!(commit.kind(), BackupKind::Incremental, "{:?}", commit.reasons);
        let stats = commit.stats.expect("figures");
        assert!(stats.read_bytes < 24 * MIB, "{stats:?}");
        world.assert_clean().await;
        jobs.push(job);
    }
    for job in jobs {
        world.judge(job).await;
    }
}

/// Disks of the older format have no change tracking: each backup reads all of them, and a restore makes them again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vhd_disks_are_backed_up_in_full_beside_tracked_ones_and_restored_as_vhds() {
    let given = tempfile::tempdir().expect("a temporary folder");
    let mut disks = vec![DiskSource::Empty { size: 5 * MIB, block_size: 1 << 20 }];
    for kind in [DiskKind::Dynamic, DiskKind::Fixed] {
        let path = given.path().join(format!("{kind}.vhd"));
        let new = NewDisk::of(DiskFormat::Vhd, kind, 7 * MIB + 512);
        DiskWriter::create(&path, &new).expect("made").close().expect("closed");
        disks.push(DiskSource::CopyOf(path));
    }
    let world = World::new(CheckpointOnMigration::Travels, disks).await;
    world.write(6 * MIB, 1).await;
    let first = world.back_up("alpha", BackupKind::Incremental).await;
    world.assert_clean().await;
    world.write(MIB, 2).await;
    let second = world.back_up("alpha", BackupKind::Incremental).await;
    let commit = world.commit(second);
    let reasons = commit.reasons.join("; ");
    assert!(reasons.contains("no change tracking"), "{reasons}");
    world.assert_clean().await;
    for job in [first, second] {
        let kept = world.judge(job).await;
        let facts: Vec<(DiskFormat, DiskKind)> = kept
            .iter()
            .map(|file| open_disk(file).expect("opens"))
            .map(|disk| (disk.info().format, disk.info().kind))
            .collect();
        let expected = [
            (DiskFormat::Vhdx, DiskKind::Dynamic),
            (DiskFormat::Vhd, DiskKind::Dynamic),
            (DiskFormat::Vhd, DiskKind::Fixed),
        ];
        assert_eq!(facts, expected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_any_call_of_the_hypervisor_the_next_attempt_finishes_clean_and_exact() {
    let calls = [
        ("CreateSnapshot", When::Before),
        ("CreateSnapshot", When::After),
        ("ModifySystemSettings", When::Before),
        ("ModifySystemSettings", When::After),
        ("ConvertToReferencePoint", When::Before),
        ("ConvertToReferencePoint", When::After),
        ("DestroyReferencePoint", When::Before),
        ("DestroyReferencePoint", When::After),
    ];
    for (method, when) in calls {
        let world = World::small().await;
        world.back_up("alpha", BackupKind::Incremental).await;
        world.write(MIB, 2).await;
        let spec = HoldSpec { method: method.into(), vm: None, host: None, when };
        let hold = world.lab.hold(spec).await.expect("held");
        let job = Job::new(BackupKind::Incremental);
        let attempt = world.attempt(job, "alpha", 1).await;
        world.lab.wait(WaitFor::MethodHeld { hold }, DEADLINE).await.expect("it gets there");
        attempt.kill().await;
        // A call that was held before its effect is gone with its caller.
        let _ = world.lab.release(hold).await;
        let good = world.attempt(job, "alpha", 2).await.end().await;
        assert!(
            good,
            "{method} {when:?}: {:?}",
            world.coordinator.with(|d| d.finished.last().cloned())
        );
        world.judge(job).await;
        world.assert_clean().await;
        world.write(MIB, 3).await;
        let next = world.back_up("alpha", BackupKind::Incremental).await;
        world.judge(next).await;
        world.assert_clean().await;
    }
}

/// J12: another product's checkpoint that comes first is waited for, and never removed, however long it lasts. Its duty is over
/// meanwhile: an open one says that a checkpoint without a name may be ours.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_products_checkpoint_that_comes_first_is_never_taken_for_ours() {
    let world = World::small().await;
    let spec = HoldSpec {
        method: "CreateSnapshot".into(),
        vm: Some(world.name()),
        host: Some("alpha".into()),
        when: When::Before,
    };
    let hold = world.lab.hold(spec).await.expect("a hold");
    let job = Job::new(BackupKind::Full);
    let mut times = times();
    times.busy_patience = Duration::from_secs(2);
    let attempt = world.attempt_with(job, "alpha", 1, lab_world::work(), times).await;
    world.lab.wait(WaitFor::MethodHeld { hold }, DEADLINE).await.expect("ours is asked for");
    let clock = Arc::new(SystemClock::new());
    let hour = Duration::from_secs(3600);
    let lease = Lease::granted(JobId::random(), LeaseEpoch(1), hour, false, clock.clone());
    lease.renew(clock.monotonic());
    let other = world.hypervisor("alpha").await;
    let request = CheckpointRequest { quiesce: false, truncate_logs: false };
    let theirs = other
        .create_checkpoint(&lease, world.key().guid, "Another product", request)
        .await
        .expect("theirs is made first");
    world.lab.release(hold).await.expect("ours is refused now");
    assert!(!attempt.end().await, "no point can be made");
    let end = world.coordinator.with(|d| d.finished.last().cloned()).expect("it ended");
    assert!(end.message.contains("Another product") && end.retry, "{end:?}");
    let vm = world.lab.vm(&world.name()).await.expect("it is there");
    let names: Vec<_> = vm.checkpoints.iter().map(|c| c.id).collect();
    assert_eq!(names, [theirs.id.0], "theirs stays");
    let open = world
        .coordinator
        .with(|d| d.duties.iter().filter(|duty| duty.state() != rpc::DutyState::Done).count());
    assert_eq!(open, 0, "nothing of ours is there to be cleaned up");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_migration_in_the_middle_the_new_host_reads_only_what_is_missing() {
    for switch in [CheckpointOnMigration::Travels, CheckpointOnMigration::Lost] {
        let disk = DiskSource::Empty { size: 96 * MIB, block_size: 1 << 20 };
        let world = World::new(switch, vec![disk]).await;
        let vm = world.name();
        world.lab.guest_write(GuestWrite::at(&vm, 0, 0, 64 * MIB, 5)).await.expect("written");
        let spec = GateSpec { vm: vm.clone(), host: Some("alpha".into()), budget: 48 * MIB };
        let gate = world.lab.set_gate(spec).await.expect("a gate");
        let job = Job::new(BackupKind::Full);
        let attempt = world.attempt(job, "alpha", 1).await;
        world.lab.wait(WaitFor::GateBlocked { gate }, DEADLINE).await.expect("it reads that far");
        world.until_settled().await;
        world.lab.migrate(&vm, "beta", MigrationKind::Live).await.expect("it moves");
        // Ended first: what it sent after the gate opened would be in no barrier.
        attempt.task.abort();
        world.lab.release_gate(gate).await.expect("released");
        attempt.kill().await;
        let good = world.attempt(job, "beta", 2).await.end().await;
        assert!(good, "{switch:?}: {:?}", world.coordinator.with(|d| d.finished.last().cloned()));
        let stats = world.commit(job).stats.expect("figures");
        assert!(stats.resent_bytes <= lab_world::IN_HAND, "{switch:?}: {stats:?}");
        if switch == CheckpointOnMigration::Lost {
            assert_eq!(stats.reread_bytes, 0, "another checkpoint is no second reading: {stats:?}");
        } else {
            // The leaf page in hand when it moved; the old host had read 48 MiB at most.
            let read = stats.read_bytes + 48 * MIB;
            assert!(stats.reread_bytes < 32 * MIB, "{stats:?}");
            assert!(stats.reread_bytes + 64 * MIB <= read, "more than was read: {stats:?}");
            assert!(stats.reread_bytes > 0, "what storage had of that leaf counts: {stats:?}");
            assert!(stats.adopted_pages > 0, "{stats:?}");
            assert!(stats.read_bytes < 64 * MIB, "{stats:?}");
        }
        world.judge(job).await;
        world.assert_clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lacking_receipts_are_cured_and_the_commit_is_made() {
    let world = World::small().await;
    world.coordinator.with(|d| d.lacking.push_back((0..16).collect()));
    world.store.lose_at_next_barrier(7);
    let job = world.back_up("alpha", BackupKind::Full).await;
    world.judge(job).await;
    world.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rejected_tracking_ids_mean_reading_in_full() {
    for as_job in [true, false] {
        let world = World::small().await;
        world.back_up("alpha", BackupKind::Incremental).await;
        world.write(MIB, 2).await;
        world.lab.set_fault(Fault::new(FaultKind::RejectIds { as_job })).await.expect("in force");
        let job = world.back_up("alpha", BackupKind::Incremental).await;
        let commit = world.commit(job);
        assert_eq!(commit.kind(), BackupKind::Full);
        assert!(commit.reasons.iter().any(|r| r.contains("read in full")), "{:?}", commit.reasons);
        world.judge(job).await;
        world.assert_clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_cannot_come_to_rest_gives_a_crash_consistent_point_that_says_so() {
    let world = World::small().await;
    let failing = FaultKind::JobFails {
        method: "CreateSnapshot".into(),
        code: 32768,
        description: "a VSS writer failed".into(),
    };
    // Its writers may fail once for reasons that pass.
    world.lab.set_fault(Fault::new(failing.clone()).times(1)).await.expect("in force");
    let job = world.back_up("alpha", BackupKind::Full).await;
    assert_eq!(world.commit(job).achieved(), Consistency::Application);
    world.lab.set_fault(Fault::new(failing).times(2)).await.expect("in force");
    let job = world.back_up("alpha", BackupKind::Full).await;
    let commit = world.commit(job);
    assert_eq!(commit.achieved(), Consistency::Crash);
    assert!(commit.reasons.iter().any(|r| r.contains("VSS writer")), "{:?}", commit.reasons);
    world.judge(job).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_null_reference_point_is_found_by_difference() {
    let world = World::small().await;
    let fault = FaultKind::NullResult { method: "ConvertToReferencePoint".into() };
    world.lab.set_fault(Fault::new(fault)).await.expect("in force");
    world.back_up("alpha", BackupKind::Full).await;
    world.assert_clean().await;
    assert!(world.coordinator.with(|d| d.binding.is_some()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_under_another_name_defines_and_starts_a_vm_with_the_exact_disks() {
    let world = World::small().await;
    let job = world.back_up("alpha", BackupKind::Full).await;
    let commit = world.commit(job);
    let mut restoring = Job::new(BackupKind::Full);
    restoring.point = job.point;
    let hypervisor = world.hypervisor("beta").await;
    let clock = Arc::new(SystemClock::new());
    let lease = Lease::granted(
        restoring.id,
        LeaseEpoch(1),
        Duration::from_secs(3600),
        false,
        clock.clone(),
    );
    lease.renew(clock.monotonic());
    let sources = Sources::new(hypervisor.clone(), times().volume_patience);
    let context = JobContext {
        hypervisor: hypervisor.clone(),
        coordinator: Arc::new(world.coordinator.clone()),
        store: Arc::new(world.store.clone()),
        sealer: sealer(),
        lease,
        sources,
        pool: Pool::new(2, 8 << 20),
        limits: Limits::default(),
        times: times(),
        clock,
        host: "beta".into(),
        scratch: world.folder.path().to_owned(),
        progress: watch::Sender::new(Progress::default()),
        metrics: NodeMetrics::default(),
        commands: Arc::default(),
        told: job::Told::default(),
    };
    let message = JobLease {
        job_id: restoring.id.to_string(),
        lease_epoch: 1,
        vm: Some((&world.key()).into()),
        work: Some(Work::Restore(rpc::RestoreWork {
            point_id: commit.point_id.clone(),
            manifest_id: commit.manifest_id.clone(),
            target_name: "restored".into(),
            power_on: true,
            highly_available: true,
            ..rpc::RestoreWork::default()
        })),
        ..JobLease::default()
    };
    assert!(
        job::run(context, message).await,
        "{:?}",
        world.coordinator.with(|d| d.finished.last().cloned())
    );
    let Inventory { vms, .. } = hypervisor.inventory().await.expect("listed");
    let made = vms.iter().find(|vm| vm.name == "restored").expect("it is there");
    assert_ne!(made.guid, VmGuid(world.vm.id));
    assert_eq!(made.cluster_owner.as_deref(), Some("beta"));
    assert_eq!(made.power, outrider_node::hypervisor::Power::Running);
    let checkpoint = commit.checkpoint_id.parse().expect("a GUID");
    for (index, disk) in made.disks.iter().enumerate() {
        let compared = world
            .lab
            .compare_disk(std::path::Path::new(&disk.path), checkpoint, index)
            .await
            .expect("comparable");
        assert!(compared == outrider_lab::Comparison::Identical, "disk {index}: {compared:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_is_made_is_seen_with_its_cluster_owner() {
    let world = World::small().await;
    let hypervisor = world.hypervisor("beta").await;
    let mut changes = hypervisor.watch().await.expect("subscribed");
    let disk = DiskSource::Empty { size: MIB, block_size: 0 };
    let made = CreateVm::new("new", "beta", "Volume1", vec![disk]);
    let made = world.lab.create_vm(made).await.expect("made");
    let guid = VmGuid(made.id);
    let (mut seen, mut owner) = (false, false);
    let both = async {
        while let Some(change) = changes.recv().await {
            match change {
                Change::Seen(vm) if vm.guid == guid => seen = vm.realized && vm.disks.len() == 1,
                Change::Owner(vm, host) if vm == guid => owner = host == "beta",
                _ => {}
            }
            if seen && owner {
                return;
            }
        }
    };
    let heard = tokio::time::timeout(DEADLINE, both).await;
    assert!(heard.is_ok() && seen && owner, "seen {seen}, owner {owner}");
}
