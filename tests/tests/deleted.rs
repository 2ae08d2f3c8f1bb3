//! A VM that is deleted in the middle of its backup: nobody waits for it for ever, nothing is forgotten (promise 5, F15).

use std::time::Duration;

use outrider_lab::{HoldSpec, WaitFor, When};
use outrider_proto::rpc::{self, BackupKind};
use outrider_tests::fabric::MIB;
use outrider_tests::wait::DEADLINE;
use outrider_tests::{Fabric, Plan, eventually};

/// Between the two looks that prove an absence, here.
const ABSENT_AFTER: Duration = Duration::from_millis(600);

fn plan() -> Plan {
    let settings = format!(
        "traces = {{ every = \"100ms\", absent_after = \"{}ms\" }}\n",
        ABSENT_AFTER.as_millis()
    );
    Plan { coordinator_settings: settings, vm_wait: "1s", ..Plan::default() }
}

/// Deletes a VM whose backup has just made its checkpoint; gives the job. (Files that are open already can be read to their end, and
/// then there may be a point.)
async fn deleted_in_mid_backup(fabric: &Fabric, vm: &str) -> String {
    fabric.write(vm, 8 * MIB, 3).await;
    let made = HoldSpec {
        method: "CreateSnapshot".into(),
        vm: Some(vm.to_owned()),
        host: None,
        when: When::After,
    };
    let hold = fabric.lab.hold(made).await.expect("a hold");
    let job = fabric.operator.backup(vm, BackupKind::Incremental).await;
    fabric.lab.wait(WaitFor::MethodHeld { hold }, DEADLINE).await.expect("it is made");
    fabric.lab.delete_vm(vm).await.expect("deleted");
    fabric.lab.release(hold).await.expect("released");
    eventually("the VM is called gone", async || {
        let state = fabric.operator.vm(vm).await.map_err(|e| e.to_string())?.state;
        if state == "gone" { Ok(()) } else { Err(state) }
    })
    .await;
    job.job_id
}

async fn open_duties(fabric: &Fabric, wanted: u32) {
    eventually(&format!("{wanted} duties are open"), async || {
        let status = fabric.operator.status().await.map_err(|e| e.to_string())?;
        let found = status.open_duties;
        if found == wanted { Ok(()) } else { Err(format!("{found}; {:?}", status.alarms)) }
    })
    .await;
}

/// Alarms and orphans that name the VM.
async fn told(fabric: &Fabric, vm: &str) -> (usize, usize) {
    let status = fabric.operator.status().await.expect("a status");
    let quoted = format!("{vm:?}");
    let alarms = status.alarms.iter().filter(|a| a.contains(&quoted) && a.contains("deleted"));
    let outcome =
        tokio::task::block_in_place(|| fabric.operator.cli(&["host", "orphans", "--json"]));
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let json = outcome.json();
    let orphans = json["orphans"].as_array().expect("a list").iter();
    let orphans = orphans.filter(|o| o["what"] == "deleted VM" && o["vm_name"] == vm);
    let orphans = orphans.inspect(|o| assert_eq!(o["owner"], "ours", "{o}"));
    (alarms.count(), orphans.count())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_deleted_in_mid_backup_leaves_no_open_duty_and_is_owed_all_when_it_comes_back() {
    let mut fabric = Fabric::start(plan()).await;
    for vm in ["doomed", "dropped"] {
        fabric.vm(vm, "alpha", 24 * MIB).await;
    }
    let point = fabric.operator.backed_up("doomed", BackupKind::Full).await;
    // Of a host that says nothing nobody knows whether the VM is there.
    fabric.agent("beta").kill();
    let job = deleted_in_mid_backup(&fabric, "doomed").await;
    eventually("its host has given it up", async || {
        let state = fabric.operator.job(&job).await.map_err(|e| e.to_string())?.state;
        if state == "pending" { Ok(()) } else { Err(state) }
    })
    .await;
    // Time itself is what has to pass here: many looks at the other host, all without the VM.
    tokio::time::sleep(4 * ABSENT_AFTER).await;
    assert_eq!(fabric.operator.status().await.expect("a status").open_duties, 1);
    let waiting = fabric.operator.job(&job).await.expect("known");
    assert_eq!(waiting.ended_unix_ms, 0, "it is not given up on silence: {waiting:?}");

    fabric.agent("beta").restart();
    fabric.agent("beta").ready().await;
    open_duties(&fabric, 0).await;
    let ended = fabric.operator.ended(&job).await;
    assert!(!ended.data_safe && !ended.host_clean, "not green: {ended:?}");
    assert!(ended.state == "failed" && ended.reason.contains("doomed"), "{ended:?}");
    assert_eq!(told(&fabric, "doomed").await, (1, 1));
    let points = fabric.operator.points("doomed").await;
    assert_eq!(points.len(), 1, "history stays: {points:?}");

    // It comes back under its GUID: what was owed is owed again, and nothing is taken for its base.
    let request = rpc::RestoreRequest {
        point_id: point.point_id.clone(),
        to_host: "beta".to_owned(),
        keep_guid: true,
        ..Default::default()
    };
    let restored = fabric.operator.restore(request).await.expect("the restore starts");
    let restored = fabric.operator.ended(&restored.job_id).await;
    assert!(restored.state.starts_with("completed"), "{restored:?}");
    eventually("it is followed again", async || {
        let vm = fabric.operator.vm("doomed").await.map_err(|e| e.to_string())?;
        if vm.host == "beta" && vm.state != "gone" { Ok(()) } else { Err(format!("{vm:?}")) }
    })
    .await;
    assert_eq!(told(&fabric, "doomed").await, (0, 0), "it is not deleted");
    open_duties(&fabric, 0).await;
    let jobs = fabric.operator.jobs("doomed").await;
    assert!(jobs.iter().any(|j| j.kind == "cleanup" && j.host_clean), "fulfilled: {jobs:?}");
    let next = fabric.operator.backed_up("doomed", BackupKind::Incremental).await;
    assert_eq!(next.kind(), BackupKind::Full, "its base is given up: {next:?}");
    fabric.assert_restores_exactly(&next, "alpha").await;
    fabric.assert_clean("doomed").await;

    // One that does not come back is looked after by an operator.
    fabric.operator.backed_up("dropped", BackupKind::Full).await;
    deleted_in_mid_backup(&fabric, "dropped").await;
    open_duties(&fabric, 0).await;
    assert_eq!(told(&fabric, "dropped").await, (1, 1));
    let outcome =
        tokio::task::block_in_place(|| fabric.operator.cli(&["vm", "settle", "dropped", "--json"]));
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(told(&fabric, "dropped").await, (0, 0));
}
