//! Promise 4 and 5 at every arrow of the hand-over: an agent is killed there, with and without a migration before it comes
//! back, and with each fate of a checkpoint in a migration. Whatever happened, the job ends with both results good, its
//! point and the next incremental restore to the exact bytes, and the hosts are clean.

use outrider_lab::{
    CheckpointOnMigration, ControlError, GateSpec, HoldSpec, MigrationKind, WaitFor, When,
};
use outrider_proto::rpc::BackupKind;
use outrider_tests::fabric::MIB;
use outrider_tests::wait::DEADLINE;
use outrider_tests::{Fabric, Plan, eventually};

const VM: &str = "ledger";

/// Where an agent dies: right after the arrow's left side, before anything of its right side.
#[derive(Debug, Clone, Copy)]
enum Arrow {
    /// The duty is recorded, the checkpoint does not exist.
    Duty,
    /// The checkpoint exists, nobody knows it.
    Create,
    /// Half of the changes are read.
    Read,
    /// The point is committed, the checkpoint is not converted.
    Commit,
    /// Converted, not bound.
    Convert,
    /// Bound, the older reference point still exists.
    Bind,
    /// The older reference point is destroyed, nobody knows it.
    Destroy,
}

const ARROWS: [Arrow; 7] = [
    Arrow::Duty,
    Arrow::Create,
    Arrow::Read,
    Arrow::Commit,
    Arrow::Convert,
    Arrow::Bind,
    Arrow::Destroy,
];

/// What stands still, to be released later.
enum Held {
    Call(u64),
    Reads(u64),
}

impl Arrow {
    /// Makes the job of `VM` on `host` stand still at this arrow.
    async fn arm(self, fabric: &Fabric, host: &str) -> Held {
        let (method, when) = match self {
            Self::Duty => ("CreateSnapshot", When::Before),
            Self::Create => ("CreateSnapshot", When::After),
            Self::Read => {
                // Some of what changed and not all of it: a case writes 6 MiB before.
                let spec =
                    GateSpec { vm: VM.to_owned(), host: Some(host.to_owned()), budget: 3 * MIB };
                return Held::Reads(fabric.lab.set_gate(spec).await.expect("a gate"));
            }
            Self::Commit => ("ConvertToReferencePoint", When::Before),
            Self::Convert => ("ConvertToReferencePoint", When::After),
            Self::Bind => ("DestroyReferencePoint", When::Before),
            Self::Destroy => ("DestroyReferencePoint", When::After),
        };
        let spec = HoldSpec {
            method: method.to_owned(),
            vm: Some(VM.to_owned()),
            host: Some(host.to_owned()),
            when,
        };
        Held::Call(fabric.lab.hold(spec).await.expect("a hold"))
    }
}

impl Held {
    async fn reached(&self, fabric: &Fabric) {
        let condition = match *self {
            Self::Call(hold) => WaitFor::MethodHeld { hold },
            Self::Reads(gate) => WaitFor::GateBlocked { gate },
        };
        fabric.lab.wait(condition, DEADLINE).await.expect("the job gets there");
    }

    async fn release(self, fabric: &Fabric) {
        // A hold before a call is gone with its caller, which the lab tells by refusing: both are fine.
        let _ = match self {
            Self::Call(hold) => fabric.lab.release(hold).await,
            Self::Reads(gate) => fabric.lab.release_gate(gate).await,
        };
    }
}

/// Whether the VM moves between the agent's death and its return.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meanwhile {
    Nothing,
    Migration(CheckpointOnMigration),
}

async fn killed_at_each_arrow(meanwhile: Meanwhile) {
    let mut fabric = Fabric::start(Plan::default()).await;
    if let Meanwhile::Migration(switch) = meanwhile {
        fabric.lab.set_checkpoint_on_migration(switch).await.expect("set");
    }
    fabric.vm(VM, "alpha", 32 * MIB).await;
    let first = fabric.operator.backed_up(VM, BackupKind::Full).await;
    fabric.assert_restores_exactly(&first, "alpha").await;
    fabric.assert_clean(VM).await;

    for (case, arrow) in (1..).zip(ARROWS) {
        eprintln!("killed at {arrow:?}, meanwhile {meanwhile:?}");
        let host = fabric.seen(VM).await.host;
        let other = fabric.other_host(&host);
        fabric.write(VM, 6 * MIB, case * 10).await;
        let points = fabric.operator.points(VM).await.len();

        let held = arrow.arm(&fabric, &host).await;
        let job = fabric.operator.backup(VM, BackupKind::Incremental).await;
        held.reached(&fabric).await;
        fabric.agent(&host).kill();
        held.release(&fabric).await;
        nobody_connected(&fabric, &host).await;

        let refused = match meanwhile {
            Meanwhile::Nothing => false,
            Meanwhile::Migration(switch) => refuses_to_move(&fabric, &other, switch).await,
        };
        fabric.agent(&host).restart();
        fabric.agent(&host).ready().await;

        let job = fabric.operator.done(&job.job_id).await;
        assert!(job.attempts.len() > 1, "one job, a further attempt: {job:?}");
        let point = fabric.operator.point(VM, &job.point_id).await;
        assert_eq!(fabric.operator.points(VM).await.len(), points + 1, "one job, one point");
        fabric.assert_restores_exactly(&point, &fabric.seen(VM).await.host).await;
        fabric.assert_clean(VM).await;
        if refused {
            // The host is clean, so nothing blocks the move any more.
            fabric.lab.migrate(VM, &other, MigrationKind::Live).await.expect("moves");
        }
        fabric.assert_next_incremental_is_exact(VM, case * 10 + 1).await;
    }
}

/// Moves the VM; gives whether the cluster refused because of a checkpoint, which only the blocking fate may cause.
async fn refuses_to_move(fabric: &Fabric, target: &str, switch: CheckpointOnMigration) -> bool {
    let has_checkpoint = fabric.seen(VM).await.recovery_checkpoints().count() > 0;
    let id = fabric.seen(VM).await.id.to_string();
    fabric.lab.wait(WaitFor::NoMerge { vm: id }, DEADLINE).await.expect("merges end");
    let moved = fabric.lab.migrate(VM, target, MigrationKind::Live).await;
    if has_checkpoint && switch == CheckpointOnMigration::Blocks {
        assert!(matches!(moved, Err(ControlError::Refused { code: 5960, .. })), "{moved:?}");
        return true;
    }
    moved.expect("the VM moves");
    false
}

/// Waits until the cluster has noticed that the agent's process is gone.
async fn nobody_connected(fabric: &Fabric, host: &str) {
    eventually("the dead agent's connections are gone", async || {
        let state = fabric.lab.state().await.map_err(|e| e.to_string())?;
        let host = state.hosts.into_iter().find(|h| h.name == host).ok_or("no such host")?;
        if host.connections == 0 { Ok(()) } else { Err(format!("{} left", host.connections)) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_each_arrow_the_same_host_finishes_and_cleans() {
    killed_at_each_arrow(Meanwhile::Nothing).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_each_arrow_the_new_host_finishes_with_the_checkpoint_that_travelled() {
    killed_at_each_arrow(Meanwhile::Migration(CheckpointOnMigration::Travels)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_each_arrow_the_new_host_finishes_though_the_checkpoint_was_lost() {
    killed_at_each_arrow(Meanwhile::Migration(CheckpointOnMigration::Lost)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_each_arrow_a_checkpoint_that_blocks_moves_is_removed() {
    killed_at_each_arrow(Meanwhile::Migration(CheckpointOnMigration::Blocks)).await;
}

/// The job that converted never comes back: it is cancelled. Whoever cleans up next finds the reference point that nobody
/// reported.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reference_point_that_nobody_reported_is_removed_by_a_later_cleanup() {
    let mut fabric = Fabric::start(Plan::default()).await;
    fabric.vm(VM, "alpha", 24 * MIB).await;
    fabric.operator.backed_up(VM, BackupKind::Full).await;
    fabric.assert_clean(VM).await;
    fabric.write(VM, MIB, 91).await;

    let held = Arrow::Convert.arm(&fabric, "alpha").await;
    let job = fabric.operator.backup(VM, BackupKind::Incremental).await;
    held.reached(&fabric).await;
    fabric.agent("alpha").kill();
    held.release(&fabric).await;
    nobody_connected(&fabric, "alpha").await;
    let seen = fabric.seen(VM).await;
    assert_eq!(seen.reference_points.len(), 2, "the bound one and one that nobody knows: {seen:?}");
    let outcome = tokio::task::block_in_place(|| {
        fabric.operator.cli(&["job", "cancel", "--json", &job.job_id])
    });
    assert_eq!(outcome.code, Some(0), "{outcome:?}");

    fabric.agent("alpha").restart();
    fabric.agent("alpha").ready().await;
    eventually("the cleanup removes it", async || {
        let left = fabric.seen(VM).await.reference_points.len();
        if left == 1 { Ok(()) } else { Err(format!("{left} reference points")) }
    })
    .await;
    fabric.assert_clean(VM).await;
    fabric.assert_next_incremental_is_exact(VM, 92).await;
}
