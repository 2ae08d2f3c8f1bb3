//! Full, incremental, incremental: exact bytes for each, and only changes are read (J14). What voids the base is noticed.

use std::path::Path;

use outrider_lab::{DiskSource, Fault, FaultKind, GateSpec, WaitFor};
use outrider_proto::rpc::{self, BackupKind};
use outrider_tests::fabric::MIB;
use outrider_tests::wait::DEADLINE;
use outrider_tests::{Fabric, Plan};

const CHUNK: usize = 256 << 10;

/// Chunks in which two raw files of one size differ, in bytes.
fn changed_chunks(before: &Path, after: &Path) -> u64 {
    let [before, after] = [before, after].map(|p| std::fs::read(p).expect("a raw copy"));
    assert_eq!(before.len(), after.len());
    let differ = before.chunks(CHUNK).zip(after.chunks(CHUNK)).filter(|(a, b)| a != b).count();
    (differ * CHUNK) as u64
}

/// The checkpoints' exact bytes of all disks, compared chunk by chunk.
async fn changed_between(fabric: &Fabric, vm: &str, a: &rpc::Point, b: &rpc::Point) -> u64 {
    let mut changed = 0;
    for place in 0..b.disks.len() {
        let mut raw = Vec::new();
        for point in [a, b] {
            let checkpoint = point.checkpoint_id.parse().expect("a GUID");
            let path = fabric.lab.truth_path(vm, checkpoint, place).await.expect("recorded");
            raw.push(path.expect("kept"));
        }
        changed += changed_chunks(&raw[0], &raw[1]);
    }
    changed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_and_incrementals_restore_exactly_and_read_only_changes() {
    let fabric = Fabric::start(Plan::default()).await;
    let vm = "books";
    // A size that is no multiple of the chunk, and blocks that are larger than leaf pages.
    let disks = vec![
        DiskSource::Empty { size: 48 * MIB, block_size: 1 << 20 },
        DiskSource::Empty { size: 20 * MIB + 3 * 512, block_size: 32 << 20 },
    ];
    let made = fabric.vm_with(vm, "alpha", disks).await;
    let size: u64 = made.disks.iter().map(|d| d.size).sum();

    let full = fabric.operator.backed_up(vm, BackupKind::Full).await;
    assert_eq!(full.kind(), BackupKind::Full);
    fabric.assert_restores_exactly(&full, "alpha").await;
    fabric.assert_clean(vm).await;

    let mut before = full.clone();
    for seed in [21, 22] {
        let read_before = fabric.bytes_read(vm, None).await;
        fabric.write(vm, MIB, seed).await;
        let point = fabric.operator.backed_up(vm, BackupKind::Incremental).await;
        assert_eq!(point.kind(), BackupKind::Incremental, "no fall-back: {point:?}");
        let read = fabric.bytes_read(vm, None).await - read_before;
        let changed = changed_between(&fabric, vm, &before, &point).await;
        // The random sample of what tracking calls unchanged is 0.5%, of a small disk one run of 16 chunks; and there are
        // headers, tables and the definition of the VM.
        let samples: u64 = made.disks.iter().map(|d| (d.size / 200).max(16 * CHUNK as u64)).sum();
        let bound = changed + samples + 2 * MIB;
        assert!(read <= bound, "read {read} of {changed} changed bytes, allowed {bound}");
        assert!(read < size / 2, "the test would notice a full read: {read} of {size}");
        let stats = point.stats.expect("figures");
        assert!(
            stats.sent_bytes <= changed * 12 / 10 + MIB / 4,
            "{stats:?} for {changed} changed bytes"
        );
        fabric.assert_restores_exactly(&point, "beta").await;
        fabric.assert_clean(vm).await;
        before = point;
    }
    // Older points stay what they are.
    fabric.assert_restores_exactly(&full, "beta").await;
    fabric.assert_exports_exactly(&full).await;
    fabric.assert_exports_exactly(&before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_after_a_restore_in_place_is_exact() {
    let fabric = Fabric::start(Plan::default()).await;
    let vm = "books";
    fabric.vm(vm, "alpha", 24 * MIB).await;
    let full = fabric.operator.backed_up(vm, BackupKind::Full).await;
    fabric.assert_next_incremental_is_exact(vm, 31).await;
    let incarnation = fabric.operator.vm(vm).await.expect("known").incarnation;

    let request = rpc::RestoreRequest {
        point_id: full.point_id.clone(),
        overwrite: true,
        keep_guid: true,
        highly_available: true,
        ..Default::default()
    };
    let job = fabric.operator.restore(request).await.expect("the restore starts");
    let job = fabric.operator.ended(&job.job_id).await;
    assert!(job.state.starts_with("completed") && job.error_code.is_empty(), "{job:?}");
    let restored = fabric.seen(vm).await;
    fabric.assert_disks_are(&restored, &full).await;

    let id = restored.id.to_string();
    if restored.enabled_state != 2 {
        fabric.lab.start_vm(&id).await.expect("starts");
    }
    fabric.write(vm, MIB, 32).await;
    let after = fabric.operator.backed_up(vm, BackupKind::Incremental).await;
    assert!(after.incarnation > incarnation, "the incarnation grew: {after:?}");
    assert_ne!(after.kind(), BackupKind::Incremental, "the base is void: {after:?}");
    fabric.assert_restores_exactly(&after, "beta").await;
    fabric.assert_clean(vm).await;
    fabric.assert_next_incremental_is_exact(vm, 33).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_after_an_applied_checkpoint_is_exact() {
    let fabric = Fabric::start(Plan::default()).await;
    let vm = "books";
    let id = fabric.vm(vm, "alpha", 24 * MIB).await.id.to_string();
    fabric.operator.backed_up(vm, BackupKind::Full).await;

    let checkpoint = fabric.lab.user_checkpoint(&id, "before the upgrade").await.expect("made");
    fabric.write(vm, MIB, 41).await;
    let with_checkpoint = fabric.operator.backed_up(vm, BackupKind::Incremental).await;
    fabric.assert_restores_exactly(&with_checkpoint, "beta").await;

    fabric.lab.apply_checkpoint(&id, checkpoint).await.expect("applied");
    fabric.write(vm, MIB, 42).await;
    let after = fabric.operator.backed_up(vm, BackupKind::Incremental).await;
    fabric.assert_restores_exactly(&after, "beta").await;

    fabric.lab.delete_checkpoint(&id, checkpoint).await.expect("deleted");
    fabric.lab.wait(WaitFor::NoMerge { vm: id }, DEADLINE).await.expect("merged");
    fabric.write(vm, MIB, 43).await;
    let last = fabric.operator.backed_up(vm, BackupKind::Incremental).await;
    fabric.assert_restores_exactly(&last, "beta").await;
    fabric.assert_clean(vm).await;
}

/// The host dies in the middle of a backup, agent and all; the VM comes up on the other one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_host_crash_the_next_point_is_exact_and_called_unproven() {
    let mut fabric = Fabric::start(Plan::default()).await;
    let vm = "books";
    fabric.vm(vm, "alpha", 24 * MIB).await;
    fabric.operator.backed_up(vm, BackupKind::Full).await;
    fabric.write(vm, 4 * MIB, 51).await;

    let spec = GateSpec { vm: vm.to_owned(), host: None, budget: 2 * MIB };
    let gate = fabric.lab.set_gate(spec).await.expect("a gate");
    let job = fabric.operator.backup(vm, BackupKind::Incremental).await;
    fabric.lab.wait(WaitFor::GateBlocked { gate }, DEADLINE).await.expect("it reads");
    fabric.agent("alpha").kill();
    fabric.lab.crash_host("alpha").await.expect("crashed");
    fabric.lab.release_gate(gate).await.expect("open");
    let job = fabric.operator.done(&job.job_id).await;
    assert_eq!(job.host, "beta", "{job:?}");
    let interrupted = fabric.operator.point(vm, &job.point_id).await;
    fabric.assert_restores_exactly(&interrupted, "beta").await;

    fabric.write(vm, MIB, 52).await;
    let after = fabric.operator.backed_up(vm, BackupKind::Incremental).await;
    fabric.assert_restores_exactly(&after, "beta").await;
    assert!(
        interrupted.tracking_unproven || after.tracking_unproven,
        "one of the two started from before the crash: {interrupted:?} {after:?}"
    );
    fabric.assert_clean(vm).await;

    fabric.lab.start_host("alpha").await.expect("started");
    fabric.agent("alpha").restart();
    fabric.agent("alpha").ready().await;
    fabric.settled().await;
    fabric.assert_next_incremental_is_exact(vm, 53).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_merge_that_is_stuck_makes_the_job_say_two_results_and_is_cleaned_up_later() {
    let fabric = Fabric::start(Plan { merge_wait: "1s", ..Plan::default() }).await;
    let vm = "books";
    fabric.vm(vm, "alpha", 24 * MIB).await;
    let fault = fabric.lab.set_fault(Fault::new(FaultKind::StuckMerge).on_vm(vm)).await;
    let fault = fault.expect("in force");
    let job = fabric.operator.backup(vm, BackupKind::Full).await;
    let job = fabric.operator.ended(&job.job_id).await;
    assert!(job.data_safe && !job.host_clean, "two results: {job:?}");
    assert_ne!(job.state, "completed", "not green: {job:?}");
    let status = fabric.operator.status().await.expect("a status");
    assert!(status.open_duties > 0, "the duty stays: {status:?}");
    let point = fabric.operator.point(vm, &job.point_id).await;
    fabric.assert_restores_exactly(&point, "beta").await;

    fabric.lab.clear_fault(fault).await.expect("cleared");
    fabric.assert_clean(vm).await;
    fabric.assert_next_incremental_is_exact(vm, 61).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn storage_nodes_keep_nothing_that_can_be_read() {
    let mut fabric = Fabric::start(Plan::default()).await;
    let vm = "payroll of 서울";
    fabric.vm(vm, "alpha", 16 * MIB).await;
    let point = fabric.operator.backed_up(vm, BackupKind::Full).await;
    let checkpoint = point.checkpoint_id.parse().expect("a GUID");
    let truth = fabric.lab.truth_path(vm, checkpoint, 0).await.expect("recorded").expect("kept");
    let truth = std::fs::read(truth).expect("a raw copy");
    // A piece of what the guest wrote, and the VM's name.
    let piece = truth.chunks(64).find(|c| c.iter().all(|b| *b != 0)).expect("the guest wrote");
    let secrets: [&[u8]; 2] = [piece, vm.as_bytes()];

    for process in &mut fabric.storage {
        process.kill();
    }
    let mut bytes = 0;
    let mut folders = vec![fabric.storage_dir(0)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a folder").map(|e| e.expect("an entry")) {
            if entry.path().is_dir() {
                folders.push(entry.path());
                continue;
            }
            let kept = std::fs::read(entry.path()).expect("a file");
            bytes += kept.len();
            for secret in secrets {
                let found = kept.windows(secret.len()).position(|w| w == secret);
                assert_eq!(found, None, "{} shows guest bytes", entry.path().display());
            }
        }
    }
    assert!(bytes > 4 << 20, "the node kept the backup: {bytes} bytes");
    let found = truth.windows(piece.len()).any(|w| w == piece);
    assert!(found, "the search finds what is there");
    let log = fabric.storage[0].logged();
    assert!(!log.contains(vm), "nor does its log: {log}");
}
