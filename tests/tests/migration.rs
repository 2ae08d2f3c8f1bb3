//! Promise 2 and 3: the new host goes on with the same checkpoint, and a stale agent neither commits nor touches anything.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use outrider_format::segment::SegmentKind;
use outrider_lab::{GateSpec, HoldSpec, MigrationKind, WaitFor, When};
use outrider_proto::rpc::{self, BackupKind};
use outrider_tests::fabric::MIB;
use outrider_tests::http::{get, metric};
use outrider_tests::sabotage;
use outrider_tests::wait::DEADLINE;
use outrider_tests::{Fabric, Plan, eventually};

/// Methods that change something on a host, those of our product's jobs.
const MUTATING: [&str; 9] = [
    "CreateSnapshot",
    "DestroySnapshot",
    "ConvertToReferencePoint",
    "DestroyReferencePoint",
    "ModifySystemSettings",
    "ImportSystemDefinition",
    "RealizePlannedSystem",
    "DestroySystem",
    "RequestStateChange",
];

/// Holds the reads of one host after so many bytes.
async fn gate(fabric: &Fabric, vm: &str, host: &str, budget: u64) -> u64 {
    let spec = GateSpec { vm: vm.to_owned(), host: Some(host.to_owned()), budget };
    fabric.lab.set_gate(spec).await.expect("a gate")
}

async fn blocked(fabric: &Fabric, gate: u64) {
    fabric.lab.wait(WaitFor::GateBlocked { gate }, DEADLINE).await.expect("the job reads");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_in_a_backup_neither_reads_nor_sends_again_what_is_stored() {
    let fabric = Fabric::start(Plan::default()).await;
    let vm = "traveller";
    // With small chunks a leaf page covers 8 MiB: sixteen are written, and four are in work at a time.
    fabric.vm(vm, "alpha", 256 * MIB).await;
    let policy = rpc::Policy { chunk_size: 64 << 10, ..Default::default() };
    fabric.operator.group("travellers", &[vm], policy).await;
    let written = 128 * MIB;
    let in_work = 4 * 8 * MIB;

    let gate = gate(&fabric, vm, "alpha", 100 * MIB).await;
    let job = fabric.operator.backup(vm, BackupKind::Full).await;
    blocked(&fabric, gate).await;
    quiet(&fabric).await;
    fabric.lab.migrate(vm, "beta", MigrationKind::Live).await.expect("moves");
    fabric.lab.release_gate(gate).await.expect("open");
    let job = fabric.operator.done(&job.job_id).await;

    let hosts: BTreeSet<&str> = job.attempts.iter().map(|a| a.host.as_str()).collect();
    assert_eq!(hosts, BTreeSet::from(["alpha", "beta"]), "one job, two hosts: {job:?}");
    let on = |host| fabric.bytes_read(vm, Some(host));
    let (alpha, beta) = (on("alpha").await, on("beta").await);
    assert!(beta > 0, "the new host read what was missing");
    // What was in hand when it moved is read again, nothing else.
    let bound = written + in_work + 4 * MIB;
    assert!(alpha + beta <= bound, "{alpha} + {beta} bytes read, allowed {bound}");
    let stats = job.stats.expect("figures");
    assert!(stats.adopted_pages >= 8, "leaf pages of the old host were adopted: {stats:?}");
    assert!(stats.resent_bytes <= MIB && stats.reread_bytes <= in_work, "{stats:?}");

    let points = fabric.operator.points(vm).await;
    assert_eq!(points.len(), 1, "one job, one point");
    assert_eq!(
        fabric.lab.truth_list(vm).await.expect("a list").len(),
        1,
        "one checkpoint was made"
    );
    fabric.assert_restores_exactly(&points[0], "alpha").await;
    fabric.assert_clean(vm).await;
    fabric.assert_next_incremental_is_exact(vm, 5).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stale_agent_that_wakes_up_neither_commits_nor_calls_the_hypervisor() {
    let mut fabric = Fabric::start(Plan { merge_wait: "2s", ..Plan::default() }).await;
    let vm = "contested";
    fabric.vm(vm, "alpha", 48 * MIB).await;
    fabric.operator.backed_up(vm, BackupKind::Full).await;
    fabric.write(vm, 8 * MIB, 3).await;

    let gate = gate(&fabric, vm, "alpha", 4 * MIB).await;
    let job = fabric.operator.backup(vm, BackupKind::Incremental).await;
    blocked(&fabric, gate).await;
    fabric.agent("alpha").pause();
    fabric.lab.migrate(vm, "beta", MigrationKind::Live).await.expect("moves");
    // The gate is open for whoever may read; the old agent sleeps and would go on exactly here.
    fabric.lab.release_gate(gate).await.expect("open");
    let job = fabric.operator.ended(&job.job_id).await;
    assert_eq!(job.host, "beta", "the new host finished: {job:?}");
    // Two results: a stopped process holds a file of the chain open, so the merge has to wait, and the job says so.
    assert!(job.data_safe && !job.host_clean, "{job:?}");
    assert!(!job.state.eq("completed") && !job.reason.is_empty(), "not green: {job:?}");
    let points = fabric.operator.points(vm).await;
    assert_eq!(points.len(), 2);

    let last = last_call(&fabric).await;
    let heard = host_heard(&fabric, "alpha").await;
    fabric.agent("alpha").resume();
    eventually("the old agent is back", async || {
        let now = host_heard(&fabric, "alpha").await;
        if now > heard { Ok(()) } else { Err("not heard of yet".to_owned()) }
    })
    .await;
    // Nobody acts, and the host becomes clean.
    fabric.assert_clean(vm).await;
    // Work that comes after its return: whatever it had queued is decided by then.
    fabric.assert_next_incremental_is_exact(vm, 4).await;

    assert_untouched(&fabric, "alpha", last).await;
    let points = fabric.operator.points(vm).await;
    assert_eq!(points.len(), 3, "the stale agent committed: {points:?}");
    fabric.assert_restores_exactly(&points[1], "alpha").await;
}

/// The answer to a call arrives at an agent that was stopped meanwhile: its next step would be another call.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_stopped_in_a_call_makes_no_other_one_when_it_wakes_up() {
    let mut fabric = Fabric::start(Plan::default()).await;
    let vm = "contested";
    fabric.vm(vm, "alpha", 24 * MIB).await;
    fabric.operator.backed_up(vm, BackupKind::Full).await;
    fabric.write(vm, 4 * MIB, 3).await;
    for method in ["CreateSnapshot", "ConvertToReferencePoint"] {
        let host = fabric.seen(vm).await.host;
        let other = fabric.other_host(&host);
        let spec = HoldSpec {
            method: method.to_owned(),
            vm: Some(vm.to_owned()),
            host: Some(host.clone()),
            when: When::After,
        };
        let hold = fabric.lab.hold(spec).await.expect("a hold");
        let job = fabric.operator.backup(vm, BackupKind::Incremental).await;
        fabric.lab.wait(WaitFor::MethodHeld { hold }, DEADLINE).await.expect("it is called");
        fabric.agent(&host).pause();
        let id = fabric.seen(vm).await.id.to_string();
        fabric.lab.wait(WaitFor::NoMerge { vm: id }, DEADLINE).await.expect("merges end");
        fabric.lab.migrate(vm, &other, MigrationKind::Live).await.expect("moves");
        fabric.lab.release(hold).await.expect("the answer is on its way");
        let job = fabric.operator.done(&job.job_id).await;
        assert_eq!(job.host, other, "the new host finished: {job:?}");

        let last = last_call(&fabric).await;
        let heard = host_heard(&fabric, &host).await;
        fabric.agent(&host).resume();
        eventually("the old agent is back", async || {
            let now = host_heard(&fabric, &host).await;
            if now > heard { Ok(()) } else { Err("not heard of yet".to_owned()) }
        })
        .await;
        fabric.assert_next_incremental_is_exact(vm, 9).await;
        assert_untouched(&fabric, &host, last).await;
    }
}

/// Nobody can tell the agent anything: it has to look at its own clock.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_slept_past_its_lease_stops_by_its_own_clock() {
    let mut fabric = Fabric::start(Plan::default()).await;
    let vm = "contested";
    fabric.vm(vm, "alpha", 24 * MIB).await;
    fabric.operator.backed_up(vm, BackupKind::Full).await;
    fabric.write(vm, 4 * MIB, 3).await;
    let spec = HoldSpec {
        method: "CreateSnapshot".to_owned(),
        vm: Some(vm.to_owned()),
        host: Some("alpha".to_owned()),
        when: When::After,
    };
    let hold = fabric.lab.hold(spec).await.expect("a hold");
    let job = fabric.operator.backup(vm, BackupKind::Incremental).await;
    fabric.lab.wait(WaitFor::MethodHeld { hold }, DEADLINE).await.expect("it is called");
    let metrics = fabric.agent("alpha").observability().await;
    fabric.coordinators[0].pause();
    fabric.agent("alpha").pause();
    fabric.lab.release(hold).await.expect("the answer is on its way");
    // Time itself is what has to pass here: more than the cutoff of the lease.
    tokio::time::sleep(Duration::from_millis(2 * fabric.plan.lease_ms[2])).await;
    let last = last_call(&fabric).await;
    fabric.agent("alpha").resume();
    eventually("the agent lets its lease go", async || {
        let text = tokio::task::block_in_place(|| get(metrics, "/metrics"));
        match metric(&text, "outrider_node_leases_lost_total") {
            Some(lost) if lost > 0.0 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert_untouched(&fabric, "alpha", last).await;
    fabric.coordinators[0].resume();
    fabric.operator.done(&job.job_id).await;
    fabric.assert_clean(vm).await;
    fabric.assert_next_incremental_is_exact(vm, 4).await;
}

/// The hypervisor refuses to name a checkpoint that is not there any more; that is no failure of the job.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_leaves_before_its_checkpoint_has_a_name_is_backed_up_where_it_goes() {
    let fabric = Fabric::start(Plan::default()).await;
    let vm = "hasty";
    fabric.vm(vm, "alpha", 24 * MIB).await;
    let spec = HoldSpec {
        method: "ModifySystemSettings".to_owned(),
        vm: None,
        host: Some("alpha".to_owned()),
        when: When::Before,
    };
    let hold = fabric.lab.hold(spec).await.expect("a hold");
    let job = fabric.operator.backup(vm, BackupKind::Full).await;
    fabric.lab.wait(WaitFor::MethodHeld { hold }, DEADLINE).await.expect("it is called");
    fabric.lab.migrate(vm, "beta", MigrationKind::Live).await.expect("moves");
    fabric.lab.release(hold).await.expect("the call goes on");
    let job = fabric.operator.done(&job.job_id).await;
    assert_eq!(job.host, "beta", "{job:?}");
    let point = fabric.operator.point(vm, &job.point_id).await;
    fabric.assert_restores_exactly(&point, "beta").await;
    fabric.assert_clean(vm).await;
}

/// Waits until what was read before the gate closed is stored and journalled: nothing new arrives for a while.
async fn quiet(fabric: &Fabric) {
    let folder = fabric.storage_dir(0);
    let arrived =
        || [SegmentKind::Data, SegmentKind::Journals].map(|kind| sabotage::count(&folder, kind));
    let (mut before, mut since) = (arrived(), Instant::now());
    eventually("nothing new arrives", async || {
        let now = arrived();
        if now != before {
            (before, since) = (now, Instant::now());
        }
        let enough = now[0] > 0 && since.elapsed() > Duration::from_secs(2);
        if enough { Ok(()) } else { Err(format!("{now:?} records")) }
    })
    .await;
}

async fn last_call(fabric: &Fabric) -> u64 {
    let calls = fabric.lab.call_log(None).await.expect("a log");
    calls.iter().map(|c| c.order).max().unwrap_or(0)
}

/// No mutating call on a host since then, on whatever object.
async fn assert_untouched(fabric: &Fabric, host: &str, last: u64) {
    let calls = fabric.lab.call_log(Some(host)).await.expect("a log");
    let touched: Vec<_> =
        calls.iter().filter(|c| c.order > last && MUTATING.contains(&c.method.as_str())).collect();
    assert!(touched.is_empty(), "the stale agent touched the hypervisor: {touched:?}");
}

async fn host_heard(fabric: &Fabric, host: &str) -> u64 {
    let hosts = fabric.operator.hosts().await.expect("a list");
    hosts.iter().find(|h| h.name == host).map_or(0, |h| h.last_heard_unix_ms)
}
