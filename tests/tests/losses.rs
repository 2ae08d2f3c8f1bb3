//! Promise 1 under losses: storage nodes, the leader and bytes on disk go; what was reported complete stays restorable.

use outrider_format::segment::SegmentKind;
use outrider_lab::{GateSpec, WaitFor};
use outrider_proto::rpc::{self, BackupKind};
use outrider_tests::fabric::MIB;
use outrider_tests::sabotage;
use outrider_tests::wait::DEADLINE;
use outrider_tests::{Fabric, Plan, eventually};

const VM: &str = "archive";

async fn gate(fabric: &Fabric, budget: u64) -> u64 {
    let spec = GateSpec { vm: VM.to_owned(), host: None, budget };
    fabric.lab.set_gate(spec).await.expect("a gate")
}

async fn blocked(fabric: &Fabric, gate: u64) {
    fabric.lab.wait(WaitFor::GateBlocked { gate }, DEADLINE).await.expect("the job reads");
}

async fn who_leads(fabric: &Fabric) -> u64 {
    eventually("somebody leads", async || {
        let status = fabric.operator.status().await.map_err(|e| e.to_string())?;
        Ok(status.leader_id)
    })
    .await
}

/// With leases that outlive a stopped coordinator.
fn patient() -> Plan {
    Plan { lease_ms: [60_000, 1000, 40_000], ..Plan::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storage_node_that_loses_power_between_put_and_commit_costs_no_byte() {
    // No barrier before the end: what is put is not durable yet.
    let mut fabric = Fabric::start(Plan { barrier_interval: "60s", ..patient() }).await;
    fabric.vm(VM, "alpha", 64 * MIB).await;

    // In the middle of the puts.
    let at = gate(&fabric, 20 * MIB).await;
    let job = fabric.operator.backup(VM, BackupKind::Full).await;
    blocked(&fabric, at).await;
    let folder = fabric.storage_dir(0);
    eventually("chunks reached the storage node", async || {
        let chunks = sabotage::count(&folder, SegmentKind::Data);
        if chunks > 0 { Ok(()) } else { Err("none yet".to_owned()) }
    })
    .await;
    fabric.storage[0].kill();
    let lost = sabotage::power_cut(&folder);
    assert!(lost > 0, "the power cut took something away");
    fabric.storage[0].restart();
    fabric.storage[0].ready().await;
    fabric.lab.release_gate(at).await.expect("open");
    let job = fabric.operator.done(&job.job_id).await;
    let full = fabric.operator.point(VM, &job.point_id).await;
    fabric.assert_restores_exactly(&full, "alpha").await;

    // After the last put: the root record is written and the coordinator, stopped, has not heard of a commit.
    fabric.write(VM, 8 * MIB, 7).await;
    let at = gate(&fabric, 2 * MIB).await;
    let job = fabric.operator.backup(VM, BackupKind::Incremental).await;
    blocked(&fabric, at).await;
    let roots = sabotage::count(&folder, SegmentKind::Roots);
    fabric.coordinators[0].pause();
    fabric.lab.release_gate(at).await.expect("open");
    eventually("the root record is written", async || {
        let now = sabotage::count(&folder, SegmentKind::Roots);
        if now > roots { Ok(()) } else { Err(format!("{now} roots")) }
    })
    .await;
    fabric.storage[0].kill();
    sabotage::power_cut(&folder);
    fabric.coordinators[0].resume();
    fabric.storage[0].restart();
    fabric.storage[0].ready().await;
    let job = fabric.operator.done(&job.job_id).await;
    let point = fabric.operator.point(VM, &job.point_id).await;
    fabric.assert_restores_exactly(&point, "beta").await;
    fabric.assert_restores_exactly(&full, "beta").await;
    fabric.assert_clean(VM).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_go_on_when_the_leader_is_killed() {
    let mut fabric =
        Fabric::start(Plan { coordinators: 3, lease_ms: [6000, 500, 4000], ..Plan::default() })
            .await;
    fabric.vm(VM, "alpha", 64 * MIB).await;

    let at = gate(&fabric, 12 * MIB).await;
    let job = fabric.operator.backup(VM, BackupKind::Full).await;
    blocked(&fabric, at).await;
    let leader = who_leads(&fabric).await;
    let place = usize::try_from(leader).expect("small") - 1;
    fabric.coordinators[place].kill();
    eventually("another member leads", async || {
        let now = fabric.operator.status().await.map_err(|e| e.to_string())?;
        if now.leader_id != leader { Ok(()) } else { Err(format!("{now:?}")) }
    })
    .await;
    fabric.lab.release_gate(at).await.expect("open");
    let job = fabric.operator.done(&job.job_id).await;
    let hosts: Vec<_> = job.attempts.iter().map(|a| a.host.as_str()).collect();
    assert_eq!(hosts, ["alpha"], "the running job was not disturbed: {job:?}");
    let full = fabric.operator.point(VM, &job.point_id).await;
    fabric.assert_restores_exactly(&full, "beta").await;

    // Two of three members work on; the third catches up and may lead again.
    fabric.assert_next_incremental_is_exact(VM, 8).await;
    fabric.coordinators[place].restart();
    fabric.coordinators[place].ready().await;
    let leader = who_leads(&fabric).await;
    let place = usize::try_from(leader).expect("small") - 1;
    fabric.coordinators[place].kill();
    fabric.assert_next_incremental_is_exact(VM, 9).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_storage_nodes_and_rotten_copies_do_not_touch_a_restore() {
    let plan =
        Plan { storage: 3, replicas: 3, min_durable: 2, storage_patience: "4s", ..Plan::default() };
    let mut fabric = Fabric::start(plan).await;
    fabric.vm(VM, "alpha", 32 * MIB).await;
    let full = fabric.operator.backed_up(VM, BackupKind::Full).await;

    // One node is gone for good: restores and backups go on with the others.
    fabric.storage[0].kill();
    fabric.assert_restores_exactly(&full, "beta").await;
    let second = fabric.assert_next_incremental_is_exact(VM, 11).await;

    // All chunks of another rot: every copy that it would give is bad.
    fabric.storage[1].kill();
    let ruined = sabotage::ruin_data(&fabric.storage_dir(1));
    assert!(ruined > 0, "the node kept copies");
    fabric.storage[1].restart();
    fabric.storage[1].ready().await;
    fabric.assert_restores_exactly(&second, "alpha").await;
    fabric.assert_restores_exactly(&full, "alpha").await;

    // With nothing but bad copies a restore fails and says so; it never gives wrong bytes, and leaves nothing behind.
    fabric.storage[2].kill();
    let vms = fabric.lab.state().await.expect("the lab").vms.len();
    let request = rpc::RestoreRequest {
        point_id: full.point_id.clone(),
        to_host: "alpha".to_owned(),
        new_name: "from rot".to_owned(),
        ..Default::default()
    };
    let job = fabric.operator.restore(request).await.expect("the restore starts");
    let job = fabric.operator.ended(&job.job_id).await;
    assert!(
        !job.error_code.is_empty() && !job.reason.is_empty(),
        "it fails with a reason: {job:?}"
    );
    let state = fabric.lab.state().await.expect("the lab");
    assert_eq!(state.vms.len(), vms, "no VM is left behind: {state:?}");

    fabric.storage[2].restart();
    fabric.storage[2].ready().await;
    fabric.assert_restores_exactly(&full, "alpha").await;
}

/// The others fill it anew, and then it counts: with one other it is a majority, whoever that is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_that_lost_its_disk_is_filled_anew_and_counts_again() {
    let mut fabric = Fabric::start(Plan { coordinators: 3, ..patient() }).await;
    fabric.vm(VM, "alpha", 8 * MIB).await;
    let first = fabric.operator.backed_up(VM, BackupKind::Full).await;
    let leader = usize::try_from(who_leads(&fabric).await - 1).expect("one of three");
    let (lost, other) = ((leader + 1) % 3, (leader + 2) % 3);
    fabric.coordinators[lost].kill();
    let data = fabric.dir().join(format!("coordinator-c{}", lost + 1));
    assert!(data.join("db").is_dir(), "what it loses");
    std::fs::remove_dir_all(&data).expect("removed");
    fabric.coordinators[lost].restart();
    fabric.coordinators[lost].ready().await;

    // The leader needs it for everything that it confirms.
    fabric.coordinators[other].kill();
    let second = fabric.operator.backed_up(VM, BackupKind::Incremental).await;
    // And the third one cannot lead without it, nor it without the third one's word of what is newer there.
    fabric.coordinators[leader].kill();
    fabric.coordinators[other].restart();
    fabric.coordinators[other].ready().await;
    for point in [&first, &second] {
        fabric.operator.point(VM, &point.point_id).await;
    }
    fabric.assert_restores_exactly(&second, "alpha").await;
}
