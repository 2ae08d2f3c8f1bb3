//! Promises 1 to 5 on machines that really run: QEMU, a Linux guest with a journal of its own writes, live migration.
//!
//! A restore is judged three times: by `qemu-img compare` with the bytes of the checkpoint (where the guest was at
//! rest), by `e2fsck`, and by the restored guest itself, which boots and replays its journal.
#![cfg(target_os = "linux")]

use std::collections::BTreeSet;

use outrider_proto::rpc::{self, BackupKind};
use outrider_qemulab::{Format, NewVm, Shape};
use outrider_tests::Plan;
use outrider_tests::fabric::MIB;
use outrider_tests::real::{RealFabric, installation};
use serde_json::json;

/// A backup lasts some seconds, so that things can happen in its middle.
const SLOW: &str = "max_read_rate = \"4 MiB\"";

/// Starts a fabric, or leaves the test where there is no QEMU; `apart`: hosts in network namespaces where that is permitted.
macro_rules! fabric {
    (apart $more:expr) => {
        fabric!(start_apart, $more)
    };
    ($more:expr) => {
        fabric!(start, $more)
    };
    ($start:ident, $more:expr) => {
        match installation() {
            Some(installation) => RealFabric::$start(Plan::default(), &installation, $more).await,
            None => return,
        }
    };
}

fn hosts(job: &rpc::Job) -> BTreeSet<&str> {
    job.attempts.iter().map(|a| a.host.as_str()).collect()
}

/// An incremental sends what the guest wrote, the file system's own books, and not much more.
fn assert_in_proportion(point: &rpc::Point, written: u64) {
    let stats = point.stats.expect("figures");
    println!("{written} bytes written by the guest: {stats:?}");
    assert!(stats.sent_bytes <= 2 * written + 2 * MIB, "{written} written by the guest: {stats:?}");
}

/// Frozen file systems, whatever else the guest did for it.
fn is_quiesced(point: &rpc::Point) -> bool {
    matches!(point.consistency(), rpc::Consistency::FileSystem | rpc::Consistency::Application)
}

/// The restored guest has everything that was on disk at `least`, and its disks are sound.
async fn assert_has_everything(
    fabric: &mut RealFabric,
    point: &rpc::Point,
    host: &str,
    least: u64,
) {
    let (states, verdict) = fabric.boots(point, host).await;
    assert!(states.iter().all(|s| s == "clean" || s == "replay"), "{states:?}");
    assert!(verdict.committed >= least, "{least} were on disk before the checkpoint: {verdict:?}");
    assert_eq!((verdict.bad, verdict.errors), (0, 0), "{verdict:?}");
    assert!(verdict.blocks > 0, "{verdict:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_and_incrementals_of_real_vms_restore_exactly_and_boot() {
    let mut fabric = fabric!("");
    for (vm, shape) in [("web", Shape::Blockdev), ("db", Shape::Json)] {
        fabric.vm(vm, "alpha", shape).await;
        let guest = &mut fabric.cluster.vm(vm).expect("it runs").guest;
        guest.write(1, 6 * MIB).await.expect("it writes");
        let (full, first) = fabric.backed_up_at_rest(vm, BackupKind::Full).await;
        fabric.assert_restores_exactly(&full, &first, "beta").await;
        fabric.assert_clean(vm).await;

        let guest = &mut fabric.cluster.vm(vm).expect("it runs").guest;
        let written = guest.write(2, MIB).await.expect("it writes");
        let (second, truth) = fabric.backed_up_at_rest(vm, BackupKind::Incremental).await;
        assert_eq!(second.kind(), BackupKind::Incremental, "no fall-back: {second:?}");
        assert_in_proportion(&second, written);
        fabric.assert_restores_exactly(&second, &truth, "beta").await;
        fabric.assert_restores_exactly(&full, &first, "alpha").await;
        let committed = fabric.cluster.vm(vm).expect("it runs").guest.last_committed();
        assert_has_everything(&mut fabric, &second, "beta", committed).await;
        fabric.assert_clean(vm).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_in_a_backup_is_one_job_on_two_hosts() {
    let mut fabric = fabric!(apart SLOW);
    fabric.vm("traveller", "alpha", Shape::Blockdev).await;
    let guest = &mut fabric.cluster.vm("traveller").expect("it runs").guest;
    guest.write(1, 16 * MIB).await.expect("it writes");
    guest.write_at(2, MIB / 4).await.expect("it writes");
    let before = guest.commits_beyond(guest.last_committed()).await.expect("it commits");
    let at_first = guest.total_bytes();

    let job = fabric.in_the_middle("traveller", BackupKind::Full).await;
    let moved = fabric.cluster.migrate("traveller", "beta").await.expect("it moves");
    let guest = &fabric.cluster.vm("traveller").expect("it runs").guest;
    guest.commits_beyond(before).await.expect("the guest goes on, whatever the backup does");
    let job = fabric.operator.done(&job.job_id).await;
    assert_eq!(hosts(&job), BTreeSet::from(["alpha", "beta"]), "one job, two hosts: {job:?}");
    assert_eq!(fabric.operator.points("traveller").await.len(), 1, "one job, one point");
    println!("moved in {:?} ({:?} still); {:?}", moved.took, moved.downtime, job.stats);

    let guest = &mut fabric.cluster.vm("traveller").expect("it runs").guest;
    let stopped = guest.stop().await.expect("it stops");
    assert!(stopped > before);
    let point = fabric.operator.point("traveller", &job.point_id).await;
    assert_has_everything(&mut fabric, &point, "alpha", before).await;
    fabric.assert_clean("traveller").await;

    // Tracking travels: back to the first host between two backups, and the next one reads only changes.
    fabric.cluster.migrate("traveller", "alpha").await.expect("it moves");
    fabric.known("traveller", "alpha").await;
    let guest = &mut fabric.cluster.vm("traveller").expect("it runs").guest;
    guest.write(3, MIB).await.expect("it writes");
    let (next, truth) = fabric.backed_up_at_rest("traveller", BackupKind::Incremental).await;
    assert_eq!(next.kind(), BackupKind::Incremental, "no fall-back: {next:?}");
    // Its guest wrote on while the first job ran.
    let total = fabric.cluster.vm("traveller").expect("it runs").guest.total_bytes();
    assert_in_proportion(&next, total - at_first);
    fabric.assert_restores_exactly(&next, &truth, "beta").await;
    fabric.assert_clean("traveller").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_that_fails_in_a_backup_leaves_the_job_where_the_vm_is() {
    let mut fabric = fabric!(SLOW);
    fabric.vm("stayer", "alpha", Shape::Drive).await;
    let guest = &mut fabric.cluster.vm("stayer").expect("it runs").guest;
    guest.write(1, 16 * MIB).await.expect("it writes");
    let before = guest.last_committed();

    let job = fabric.in_the_middle("stayer", BackupKind::Full).await;
    let migration = fabric.cluster.begin_migration("stayer", "beta").await.expect("it begins");
    let reason = fabric.cluster.fail(migration).await.expect("it returns");
    println!("the migration failed: {reason}");
    let job = fabric.operator.done(&job.job_id).await;
    assert_eq!(job.host, "alpha", "{job:?}");
    let point = fabric.operator.point("stayer", &job.point_id).await;
    assert_has_everything(&mut fabric, &point, "beta", before).await;
    fabric.assert_clean("stayer").await;
    let guest = &mut fabric.cluster.vm("stayer").expect("it runs").guest;
    guest.write(2, MIB).await.expect("it writes");
    let (next, truth) = fabric.backed_up_at_rest("stayer", BackupKind::Incremental).await;
    assert_eq!(next.kind(), BackupKind::Incremental, "no fall-back: {next:?}");
    fabric.assert_restores_exactly(&next, &truth, "beta").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_dies_in_a_backup_costs_no_point_and_no_byte() {
    let mut fabric = fabric!(apart SLOW);
    fabric.vm("survivor", "alpha", Shape::Blockdev).await;
    let guest = &mut fabric.cluster.vm("survivor").expect("it runs").guest;
    guest.write(1, 8 * MIB).await.expect("it writes");
    let (first, truth) = fabric.backed_up_at_rest("survivor", BackupKind::Full).await;
    let guest = &mut fabric.cluster.vm("survivor").expect("it runs").guest;
    guest.write(2, 8 * MIB).await.expect("it writes");
    guest.write_at(3, MIB / 4).await.expect("it writes");
    let job = fabric.in_the_middle("survivor", BackupKind::Incremental).await;

    // Agent and VMs at once, as when the power goes; then somebody starts the VM on another host.
    let committed = fabric.cluster.vm("survivor").expect("it runs").guest.last_committed();
    fabric.agent("alpha").kill();
    let machine = fabric.cluster.kill_host("alpha").expect("killed").remove(0);
    let vm = fabric.cluster.start(machine, "beta").await.expect("it boots");
    let verdict = vm.guest.verified().await.expect("it checks its journal");
    assert!(verdict.committed >= committed && verdict.bad == 0, "{verdict:?}");
    fabric.known("survivor", "beta").await;
    let ended = fabric.operator.ended(&job.job_id).await;
    println!("the job in which the host died: {} {}", ended.state, ended.reason);
    fabric.assert_restores_exactly(&first, &truth, "beta").await;

    // Change tracking did not survive: whatever the next point says, it says why, and it is exact.
    let point = match ended.point_id.is_empty() {
        true => fabric.operator.backed_up("survivor", BackupKind::Incremental).await,
        false => fabric.operator.point("survivor", &ended.point_id).await,
    };
    assert!(!point.reasons.is_empty(), "it says why it could not go by its base: {point:?}");
    assert_has_everything(&mut fabric, &point, "beta", committed).await;
    fabric.assert_clean("survivor").await;
    fabric.agent("alpha").restart();
    fabric.agent("alpha").ready().await;
    let guest = &mut fabric.cluster.vm("survivor").expect("it runs").guest;
    guest.write(4, MIB).await.expect("it writes");
    let (next, truth) = fabric.backed_up_at_rest("survivor", BackupKind::Incremental).await;
    assert_eq!(next.kind(), BackupKind::Incremental, "tracking works again: {next:?}");
    fabric.assert_restores_exactly(&next, &truth, "alpha").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_and_a_shutdown_in_a_backup_are_survived() {
    let mut fabric = fabric!(SLOW);
    fabric.vm("restless", "alpha", Shape::Blockdev).await;
    let guest = &mut fabric.cluster.vm("restless").expect("it runs").guest;
    guest.write(1, 16 * MIB).await.expect("it writes");
    let before = guest.last_committed();

    let job = fabric.in_the_middle("restless", BackupKind::Full).await;
    fabric.cluster.reset("restless").await.expect("it comes up again");
    let job = fabric.operator.done(&job.job_id).await;
    let point = fabric.operator.point("restless", &job.point_id).await;
    assert_has_everything(&mut fabric, &point, "beta", before).await;
    fabric.assert_clean("restless").await;

    let job = fabric.in_the_middle("restless", BackupKind::Full).await;
    let machine = fabric.cluster.shut_down("restless").await.expect("it turns itself off");
    fabric.cluster.start(machine, "alpha").await.expect("it boots");
    let ended = fabric.operator.ended(&job.job_id).await;
    println!("the job in which the VM was shut down: {} {}", ended.state, ended.reason);
    assert!(!ended.point_id.is_empty() || !ended.reason.is_empty(), "{ended:?}");
    let (point, truth) = fabric.backed_up_at_rest("restless", BackupKind::Incremental).await;
    fabric.assert_restores_exactly(&point, &truth, "beta").await;
    fabric.assert_clean("restless").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_is_thawed_though_its_agent_hangs_and_frozen_points_need_no_replay() {
    let mut fabric = fabric!("guest_agent = \"2s\", freeze = \"5s\"");
    let disks = vec![(48 * MIB + 1536, Format::Qcow2), (33 * MIB + 512, Format::Raw)];
    let (name, host) = ("frozen".to_owned(), "alpha".to_owned());
    fabric.vm_with(NewVm { name, host, disks, shape: Shape::Blockdev, agent: true }).await;
    let vm = fabric.cluster.vm("frozen").expect("it runs");
    if !vm.guest.ready().await.expect("it is up").agent {
        println!("SKIPPED: no qemu-ga for the guest; `.ci/tools guest` gets it");
        return;
    }
    vm.guest.write(1, 2 * MIB).await.expect("it writes");
    vm.guest.write_at(2, MIB / 2).await.expect("it writes");
    let before = vm.guest.commits_beyond(0).await.expect("it commits");
    let point = fabric.operator.backed_up("frozen", BackupKind::Full).await;
    let guest = &fabric.cluster.vm("frozen").expect("it runs").guest;
    guest.commits_beyond(guest.last_committed()).await.expect("it was thawed");
    assert!(is_quiesced(&point), "{point:?}");
    let (states, verdict) = fabric.boots(&point, "beta").await;
    // Frozen file systems have written out their journals: nothing to replay, though the guest was writing.
    assert_eq!(states, ["clean", "clean"]);
    assert!(verdict.committed >= before && verdict.bad == 0, "{verdict:?}");

    let guest = &mut fabric.cluster.vm("frozen").expect("it runs").guest;
    guest.hang_agent(true).await.expect("it hangs");
    let job = fabric.operator.backup("frozen", BackupKind::Incremental).await;
    let job = fabric.operator.ended(&job.job_id).await;
    println!("with a hung guest agent: {} {} {:?}", job.state, job.reason, job.warnings);
    let guest = &mut fabric.cluster.vm("frozen").expect("it runs").guest;
    guest.commits_beyond(guest.last_committed()).await.expect("it is not frozen");
    // What it was asked while it hung must not freeze it when it wakes up, not for long.
    guest.hang_agent(false).await.expect("it goes on");
    let point = fabric.operator.backed_up("frozen", BackupKind::Incremental).await;
    let guest = &fabric.cluster.vm("frozen").expect("it runs").guest;
    guest.commits_beyond(guest.last_committed()).await.expect("it is not frozen");
    assert!(is_quiesced(&point), "it works again: {point:?}");
    fabric.assert_clean("frozen").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_bitmap_is_noticed_and_the_next_point_is_exact_and_says_why() {
    let mut fabric = fabric!("");
    fabric.vm("amnesiac", "alpha", Shape::Json).await;
    let guest = &mut fabric.cluster.vm("amnesiac").expect("it runs").guest;
    guest.write(1, 4 * MIB).await.expect("it writes");
    fabric.backed_up_at_rest("amnesiac", BackupKind::Full).await;
    let left = fabric.cluster.leftovers("amnesiac", "").await.expect("asked");
    let vm = fabric.cluster.vm("amnesiac").expect("it runs");
    // "bitmap NAME on "NODE"": somebody removes it, and the guest goes on writing.
    let words: Vec<&str> = left[0].split(' ').collect();
    let bitmap = json!({ "node": words[3].trim_matches('"'), "name": words[1] });
    vm.qmp.execute("block-dirty-bitmap-remove", bitmap).await.expect("removed");
    vm.guest.write(2, MIB).await.expect("it writes");
    let (point, truth) = fabric.backed_up_at_rest("amnesiac", BackupKind::Incremental).await;
    assert!(!point.reasons.is_empty(), "it says why: {point:?}");
    println!("{:?} {:?}", point.kind(), point.reasons);
    fabric.assert_restores_exactly(&point, &truth, "beta").await;
    fabric.assert_clean("amnesiac").await;
}
