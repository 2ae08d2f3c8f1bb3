//! A VM is followed, and its backup goes on, whatever becomes of the events that tell of its moves (F1; facts 1, 4 and 5).

use std::collections::BTreeSet;

use outrider_lab::{Fault, FaultKind, GateSpec, HostShape, MigrationKind, WaitFor};
use outrider_proto::rpc::{self, BackupKind};
use outrider_tests::fabric::MIB;
use outrider_tests::wait::DEADLINE;
use outrider_tests::{Fabric, Plan, eventually};

const VM: &str = "traveller";

/// A backup that stands still in the middle of its reading.
async fn half_way(fabric: &Fabric, kind: BackupKind) -> (rpc::Job, u64) {
    let host = fabric.seen(VM).await.host;
    let spec = GateSpec { vm: VM.into(), host: Some(host), budget: 4 * MIB };
    let gate = fabric.lab.set_gate(spec).await.expect("a gate");
    let job = fabric.operator.backup(VM, kind).await;
    fabric.lab.wait(WaitFor::GateBlocked { gate }, DEADLINE).await.expect("the job reads");
    (job, gate)
}

async fn moves(fabric: &Fabric) {
    let to = fabric.other_host(&fabric.seen(VM).await.host);
    fabric.lab.migrate(VM, &to, MigrationKind::Live).await.expect("it moves");
}

/// The same job has ended well, on both hosts.
async fn followed(fabric: &Fabric, job: &rpc::Job, gate: u64) {
    fabric.lab.release_gate(gate).await.expect("open");
    let job = fabric.operator.done(&job.job_id).await;
    let hosts: BTreeSet<&str> = job.attempts.iter().map(|a| a.host.as_str()).collect();
    assert_eq!(hosts, BTreeSet::from(["alpha", "beta"]), "one job, two hosts: {job:?}");
    let placed = fabric.operator.vm(VM).await.expect("known");
    assert_eq!(placed.host, fabric.seen(VM).await.host);
    fabric.assert_clean(VM).await;
}

async fn fault(fabric: &Fabric, kind: FaultKind) -> u64 {
    fabric.lab.set_fault(Fault::new(kind)).await.expect("in force")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_is_followed_in_mid_backup_whatever_becomes_of_events() {
    let fabric = Fabric::start(Plan { inventory_interval: "2s", ..Plan::default() }).await;
    fabric.vm(VM, "alpha", 48 * MIB).await;

    // Events come before what they tell of can be read, in both namespaces; the old host still shows the VM.
    let (job, gate) = half_way(&fabric, BackupKind::Full).await;
    let late = fault(&fabric, FaultKind::LateReads).await;
    let later = fault(&fabric, FaultKind::LateClusterReads).await;
    moves(&fabric).await;
    fabric.lab.clear_fault(late).await.expect("readable");
    fabric.lab.clear_fault(later).await.expect("readable");
    followed(&fabric, &job, gate).await;

    // One of the two providers' events does not come before the job has moved.
    for cluster in [true, false] {
        fabric.write(VM, 12 * MIB, 2 + u64::from(cluster)).await;
        let (job, gate) = half_way(&fabric, BackupKind::Incremental).await;
        let held = fault(&fabric, FaultKind::HoldEvents { cluster }).await;
        moves(&fabric).await;
        followed(&fabric, &job, gate).await;
        fabric.lab.clear_fault(held).await.expect("delivered");
    }

    // No event comes at all, and nobody says so.
    fabric.write(VM, 12 * MIB, 4).await;
    let (job, gate) = half_way(&fabric, BackupKind::Incremental).await;
    fault(&fabric, FaultKind::DropEvents).await;
    moves(&fabric).await;
    followed(&fabric, &job, gate).await;
    fabric.lab.clear_faults().await.expect("cleared");

    // WMI restarts on both hosts while the VM moves.
    fabric.write(VM, 12 * MIB, 5).await;
    let (job, gate) = half_way(&fabric, BackupKind::Incremental).await;
    let away = fault(&fabric, FaultKind::WmiAway).await;
    for host in ["alpha", "beta"] {
        fabric.lab.restart_wmi(host).await.expect("restarted");
    }
    moves(&fabric).await;
    fabric.lab.clear_fault(away).await.expect("back");
    followed(&fabric, &job, gate).await;

    let points = fabric.operator.points(VM).await;
    assert_eq!(points.len(), 5, "one point a job: {points:?}");
    for point in [&points[0], &points[4]] {
        fabric.assert_restores_exactly(point, "alpha").await;
    }
    fabric.assert_next_incremental_is_exact(VM, 6).await;
}

/// A host that is cut off from its cluster is not dead: its VMs stay where they are, it is given no checkpoint to make, and it
/// takes nothing back when others have its VMs by then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_isolated_host_keeps_its_vms_and_makes_no_checkpoint() {
    let fabric = Fabric::start(Plan { inventory_interval: "1s", ..Plan::default() }).await;
    fabric.vm(VM, "alpha", 16 * MIB).await;
    fabric.operator.backed_up(VM, BackupKind::Full).await;
    let shape = |status| HostShape { status: Some(status), ..HostShape::default() };
    fabric.lab.shape_host("alpha", shape(1)).await.expect("isolated");
    let job = fabric.operator.backup(VM, BackupKind::Incremental).await;
    eventually("the job waits for the host", async || {
        let job = fabric.operator.job(&job.job_id).await.map_err(|e| e.to_string())?;
        match job.phase.as_str() {
            "waiting for the VM" => Ok(()),
            other => Err(other.to_owned()),
        }
    })
    .await;
    let hosts = fabric.operator.hosts().await.expect("a list");
    assert!(hosts.iter().all(|h| h.state == "up"), "isolated is not down: {hosts:?}");
    assert_eq!(fabric.operator.vm(VM).await.expect("known").host, "alpha");
    fabric.lab.shape_host("alpha", shape(0)).await.expect("back");
    let job = fabric.operator.done(&job.job_id).await;
    assert_eq!(job.attempts.len(), 1, "{job:?}");
    fabric.assert_clean(VM).await;
    fabric.assert_next_incremental_is_exact(VM, 3).await;
}
