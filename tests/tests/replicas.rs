//! Both sides of a Hyper-V replication in one fabric (P9; rules F13 and F14): two VMs of one GUID, each with a history of its
//! own, also when a planned failover swaps their roles.

use outrider_lab::{Comparison, CreateVm, DiskSource, Relation, VmShape, WaitFor};
use outrider_proto::rpc::{self, BackupKind};
use outrider_tests::fabric::MIB;
use outrider_tests::far::Far;
use outrider_tests::wait::DEADLINE;
use outrider_tests::{Fabric, Plan, eventually};

const VM: &str = "ledger";
const REPLICA: &str = "ledger@replica";
const HOST: &str = "gamma";
/// ReplicationMode and ReplicationState.
const PRIMARY: u16 = 1;
const RECEIVES: u16 = 2;
const REPLICATING: u16 = 3;
const RESYNCHRONIZING: u16 = 10;

fn relation(mode: u16, state: u16) -> VmShape {
    let replication = Some(vec![Relation { mode, state, health: 1 }]);
    VmShape { replication, ..VmShape::default() }
}

/// A replica on the far host, with content, known to the coordinator.
async fn replica(fabric: &Fabric, far: &Far, name: &str, size: u64) {
    let disks = vec![DiskSource::Empty { size, block_size: 1 << 20 }];
    let new = CreateVm { start: false, ..CreateVm::new(name, HOST, "Volume1", disks) };
    far.lab.create_vm(new).await.expect("made");
    far.lab.shape_vm(name, relation(RECEIVES, REPLICATING)).await.expect("a replica");
    far.lab.apply_log(name, size / 2, 1).await.expect("replicated");
    at(fabric, &format!("{name}@replica"), HOST).await;
}

async fn at(fabric: &Fabric, vm: &str, host: &str) {
    eventually(&format!("{vm} is on {host}"), async || {
        let vm = fabric.operator.vm(vm).await.map_err(|e| e.to_string())?;
        if vm.host == host && vm.state != "gone" { Ok(()) } else { Err(format!("{vm:?}")) }
    })
    .await;
}

/// Restores a point of the far cluster there and compares it with its checkpoint.
async fn restores_exactly(fabric: &Fabric, far: &Far, point: &rpc::Point) {
    let name = format!("restored {}", point.point_id);
    let request = rpc::RestoreRequest {
        point_id: point.point_id.clone(),
        to_host: HOST.to_owned(),
        new_name: name.clone(),
        ..Default::default()
    };
    let job = fabric.operator.restore(request).await.expect("the restore starts");
    let job = fabric.operator.ended(&job.job_id).await;
    assert!(job.state.starts_with("completed") && job.error_code.is_empty(), "{job:?}");
    let restored = far.lab.vm(&name).await.expect("there");
    let checkpoint = point.checkpoint_id.parse().expect("a GUID");
    let file = restored.disks[0].chain.last().expect("a file");
    let compared = far.lab.compare_disk(file, checkpoint, 0).await.expect("compared");
    assert_eq!(compared, Comparison::Identical, "{}", point.point_id);
    far.lab.delete_vm(&restored.id.to_string()).await.expect("deleted");
}

async fn assert_far_clean(far: &Far) {
    far.lab.wait(WaitFor::NoMerge { vm: VM.into() }, DEADLINE).await.expect("merged");
    let vm = far.lab.vm(VM).await.expect("there");
    assert!(vm.checkpoints.is_empty() && vm.reference_points.is_empty(), "{vm:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_sides_of_a_replication_are_protected_apart_and_a_failover_mixes_nothing() {
    let fabric = Fabric::start(Plan::default()).await;
    let far = fabric.second_cluster("far", HOST).await;
    let made = fabric.vm(VM, "alpha", 24 * MIB).await;
    fabric.lab.shape_vm(VM, relation(PRIMARY, REPLICATING)).await.expect("replicates");
    replica(&fabric, &far, VM, 24 * MIB).await;
    assert_eq!(far.lab.vm(VM).await.expect("there").id, made.id, "one GUID on both sides");

    // The name means the VM itself; its replica is named as one.
    let first = fabric.operator.backed_up(VM, BackupKind::Full).await;
    let job = fabric.operator.backup(REPLICA, BackupKind::Incremental).await;
    let job = fabric.operator.done(&job.job_id).await;
    assert_eq!(job.host, HOST, "{job:?}");
    let copy = fabric.operator.point(REPLICA, &job.point_id).await;
    assert_eq!(copy.consistency, i32::from(rpc::Consistency::Crash), "{copy:?}");
    restores_exactly(&fabric, &far, &copy).await;
    assert_far_clean(&far).await;
    fabric.assert_clean(VM).await;

    // While it is being resynchronised the replica is refused with that reason; the run goes on afterwards, and reads what
    // replication wrote behind change tracking.
    far.lab.shape_vm(VM, relation(RECEIVES, RESYNCHRONIZING)).await.expect("shaped");
    let job = fabric.operator.backup(REPLICA, BackupKind::Incremental).await;
    eventually("the run waits", async || {
        let job = fabric.operator.job(&job.job_id).await.map_err(|e| e.to_string())?;
        if job.phase == "waiting for the VM" { Ok(()) } else { Err(job.phase) }
    })
    .await;
    far.lab.apply_log(VM, 6 * MIB, 2).await.expect("replicated");
    far.lab.shape_vm(VM, relation(RECEIVES, REPLICATING)).await.expect("shaped");
    let job = fabric.operator.done(&job.job_id).await;
    let copy = fabric.operator.point(REPLICA, &job.point_id).await;
    restores_exactly(&fabric, &far, &copy).await;
    assert_eq!(fabric.operator.points(REPLICA).await.len(), 2);
    assert_eq!(fabric.operator.points(VM).await.len(), 1, "two histories");

    // A planned failover: the far VM is the VM now, and the one here its replica.
    fabric.lab.stop_vm(VM).await.expect("off");
    fabric.lab.shape_vm(VM, relation(RECEIVES, REPLICATING)).await.expect("shaped");
    far.lab.shape_vm(VM, relation(PRIMARY, REPLICATING)).await.expect("shaped");
    far.lab.start_vm(VM).await.expect("runs");
    at(&fabric, &format!("far/{}", made.id), HOST).await;
    at(&fabric, &format!("cluster/{}/replica", made.id), "alpha").await;
    let there = format!("far/{}", made.id);
    let job = fabric.operator.backup(VM, BackupKind::Incremental).await;
    let job = fabric.operator.done(&job.job_id).await;
    assert_eq!(job.host, HOST, "the name means the VM that lives: {job:?}");
    let point = fabric.operator.point(&there, &job.point_id).await;
    restores_exactly(&fabric, &far, &point).await;
    let here = format!("cluster/{}/replica", made.id);
    let job = fabric.operator.backup(&here, BackupKind::Incremental).await;
    let job = fabric.operator.done(&job.job_id).await;
    assert_eq!(job.host, "alpha");
    let point = fabric.operator.point(&here, &job.point_id).await;
    fabric.assert_restores_exactly(&point, "beta").await;

    // And back: what replication wrote meanwhile is in no change tracking, so that the old base is not gone on from.
    fabric.lab.apply_log(VM, 4 * MIB, 3).await.expect("replicated");
    far.lab.stop_vm(VM).await.expect("off");
    far.lab.shape_vm(VM, relation(RECEIVES, REPLICATING)).await.expect("shaped");
    fabric.lab.shape_vm(VM, relation(PRIMARY, REPLICATING)).await.expect("shaped");
    fabric.lab.start_vm(VM).await.expect("runs");
    let home = format!("cluster/{}", made.id);
    at(&fabric, &home, "alpha").await;
    at(&fabric, &format!("far/{}/replica", made.id), HOST).await;
    let job = fabric.operator.backup(&home, BackupKind::Incremental).await;
    let job = fabric.operator.done(&job.job_id).await;
    let point = fabric.operator.point(&home, &job.point_id).await;
    assert_ne!(point.kind, i32::from(BackupKind::Incremental), "{point:?}");
    fabric.assert_restores_exactly(&point, "beta").await;
    fabric.assert_restores_exactly(&first, "beta").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_is_only_a_replica_is_told_as_one() {
    let fabric = Fabric::start(Plan::default()).await;
    let far = fabric.second_cluster("far", HOST).await;
    replica(&fabric, &far, VM, 8 * MIB).await;
    let told = tokio::task::block_in_place(|| fabric.operator.cli(&["backup", "run", "--vm", VM]));
    assert_ne!(told.code, Some(0));
    assert!(told.stderr.contains("receiving side") && told.stderr.contains(REPLICA), "{told:?}");
    let listed = tokio::task::block_in_place(|| fabric.operator.cli(&["vm", "list"]));
    assert!(listed.stdout.contains("replica"), "{listed:?}");
    let args = ["group", "create", "copies", "--vm", VM];
    let refused = tokio::task::block_in_place(|| fabric.operator.cli(&args));
    assert!(refused.stderr.contains(REPLICA), "{refused:?}");
    let args = ["group", "create", "copies", "--vm", REPLICA];
    let made = tokio::task::block_in_place(|| fabric.operator.cli(&args));
    assert_eq!(made.code, Some(0), "{made:?}");
}
