//! Following on hosts that are really apart: each in a network namespace with an address of its own, joined by a switch, so
//! that a host can be cut off while its VM and its agent run on. Where namespaces are not permitted the rest is done on
//! loopback, and said so.
#![cfg(target_os = "linux")]

use std::collections::BTreeSet;

use outrider_proto::rpc::BackupKind;
use outrider_qemulab::Shape;
use outrider_qemulab::migrate::Abandoned;
use outrider_tests::fabric::MIB;
use outrider_tests::real::{RealFabric, installation};
use outrider_tests::{Plan, eventually};

/// A backup lasts some seconds, so that things can happen in its middle.
const SLOW: &str = "max_read_rate = \"4 MiB\"";

async fn host_is(fabric: &RealFabric, host: &str, state: &str) {
    eventually(&format!("{host} is {state}"), async || {
        let hosts = fabric.operator.hosts().await.map_err(|e| e.to_string())?;
        let now = hosts.iter().find(|h| h.name == host).map(|h| h.state.clone());
        if now.as_deref() == Some(state) { Ok(()) } else { Err(format!("{now:?}")) }
    })
    .await;
}

/// The restored guest has everything that was on disk at `least`.
async fn assert_has_everything(
    fabric: &mut RealFabric,
    id: &str,
    vm: &str,
    host: &str,
    least: u64,
) {
    let point = fabric.operator.point(vm, id).await;
    let (states, verdict) = fabric.boots(&point, host).await;
    assert!(states.iter().all(|s| s == "clean" || s == "replay"), "{states:?}");
    assert!(verdict.committed >= least, "{least} were on disk before the checkpoint: {verdict:?}");
    assert!((verdict.bad, verdict.errors) == (0, 0) && verdict.blocks > 0, "{verdict:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_is_cut_off_after_a_migration_in_a_backup_neither_stops_the_job_nor_commits()
{
    let Some(installation) = installation() else { return };
    let mut fabric = RealFabric::start_apart(Plan::default(), &installation, SLOW).await;
    fabric.vm("traveller", "alpha", Shape::Blockdev).await;
    let guest = &mut fabric.cluster.vm("traveller").expect("it runs").guest;
    guest.write(1, 16 * MIB).await.expect("it writes");
    guest.write_at(2, MIB / 4).await.expect("it writes");
    let before = guest.commits_beyond(guest.last_committed()).await.expect("it commits");

    let job = fabric.in_the_middle("traveller", BackupKind::Full).await;
    let moved = fabric.cluster.migrate("traveller", "beta").await.expect("it moves");
    let apart = fabric.cluster.network().is_some();
    if let Some(network) = fabric.cluster.network() {
        // At once: whatever the source's agent had still to say is not heard.
        network.cut("alpha", true).expect("cut");
    }
    let job = fabric.operator.done(&job.job_id).await;
    let hosts: BTreeSet<&str> = job.attempts.iter().map(|a| a.host.as_str()).collect();
    assert_eq!(hosts, BTreeSet::from(["alpha", "beta"]), "one job, two hosts: {job:?}");
    assert_eq!(fabric.operator.points("traveller").await.len(), 1, "one job, one point");
    println!("moved in {:?}, cut off: {apart}; {:?}", moved.took, job.stats);
    if let Some(network) = fabric.cluster.network() {
        network.cut("alpha", false).expect("joined");
    }
    host_is(&fabric, "alpha", "up").await;
    assert_has_everything(&mut fabric, &job.point_id, "traveller", "alpha", before).await;
    assert_eq!(fabric.operator.points("traveller").await.len(), 1, "nobody else committed");
    fabric.assert_clean("traveller").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_is_cut_off_in_a_backup_and_joined_again_finishes_it() {
    let Some(installation) = installation() else { return };
    let mut fabric = RealFabric::start_apart(Plan::default(), &installation, SLOW).await;
    fabric.vm("islander", "alpha", Shape::Blockdev).await;
    let guest = &mut fabric.cluster.vm("islander").expect("it runs").guest;
    guest.write(1, 16 * MIB).await.expect("it writes");
    let before = guest.last_committed();
    let job = fabric.in_the_middle("islander", BackupKind::Full).await;
    if let Some(network) = fabric.cluster.network() {
        network.cut("alpha", true).expect("cut");
    }
    if fabric.cluster.network().is_some() {
        eventually("its lease ends, and nobody has a point", async || {
            let now = fabric.operator.job(&job.job_id).await.map_err(|e| e.to_string())?;
            let over = now.attempts.iter().any(|a| a.ended_unix_ms != 0);
            if over && now.ended_unix_ms == 0 { Ok(()) } else { Err(format!("{now:?}")) }
        })
        .await;
        assert!(fabric.operator.points("islander").await.is_empty());
        // The guest does not care.
        let guest = &mut fabric.cluster.vm("islander").expect("it runs").guest;
        guest.write(2, MIB).await.expect("it writes");
    }
    if let Some(network) = fabric.cluster.network() {
        network.cut("alpha", false).expect("joined");
    }
    let job = fabric.operator.done(&job.job_id).await;
    assert_has_everything(&mut fabric, &job.point_id, "islander", "beta", before).await;
    fabric.assert_clean("islander").await;
    let (next, truth) = fabric.backed_up_at_rest("islander", BackupKind::Incremental).await;
    assert_eq!(next.kind(), BackupKind::Incremental, "no fall-back: {next:?}");
    fabric.assert_restores_exactly(&next, &truth, "beta").await;
}

/// The VM's QEMU holds nothing of a checkpoint any more: it has given way to a migration.
async fn gave_way(fabric: &mut RealFabric, vm: &str) {
    eventually("the checkpoint gives way", async || {
        let left = fabric.cluster.leftovers(vm, "").await.map_err(|e| e.to_string())?;
        let gone = left.iter().all(|line| line.starts_with("bitmap"));
        if gone { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
}

/// Nothing of ours is in the process that a migration did not reach, and it does not run. (A bitmap may have arrived; it
/// ends with the process.)
fn assert_abandoned(target: &Abandoned) {
    assert_eq!(target.state, "inmigrate", "one running copy: {target:?}");
    assert!(target.left.iter().all(|line| line.starts_with("bitmap")), "{target:?}");
}

/// The job is over on `host`, its point good; the next backup is exact, and so is one after a migration that succeeds.
async fn assert_all_is_well(fabric: &mut RealFabric, vm: &str, job: &str, before: u64) {
    let job = fabric.operator.done(job).await;
    assert_eq!(job.host, "alpha", "{job:?}");
    println!("{:?} {:?}", job.attempts, job.stats);
    fabric.cluster.vm(vm).expect("it runs").guest.stop().await.expect("it stops");
    assert_eq!(fabric.operator.points(vm).await.len(), 1, "one job, one point");
    assert_has_everything(fabric, &job.point_id, vm, "beta", before).await;
    fabric.assert_clean(vm).await;
    let guest = &mut fabric.cluster.vm(vm).expect("it runs").guest;
    guest.write(3, MIB).await.expect("it writes");
    let (next, truth) = fabric.backed_up_at_rest(vm, BackupKind::Incremental).await;
    println!("the next one: {:?} {:?}", next.kind(), next.reasons);
    fabric.assert_restores_exactly(&next, &truth, "beta").await;

    fabric.cluster.migrate(vm, "beta").await.expect("it moves");
    fabric.known(vm, "beta").await;
    let guest = &mut fabric.cluster.vm(vm).expect("it runs").guest;
    guest.write(4, MIB).await.expect("it writes");
    let (next, truth) = fabric.backed_up_at_rest(vm, BackupKind::Incremental).await;
    assert_eq!(next.kind(), BackupKind::Incremental, "no fall-back: {next:?}");
    fabric.assert_restores_exactly(&next, &truth, "alpha").await;
    fabric.assert_clean(vm).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_breaks_in_a_migration_in_a_backup_costs_neither_the_vm_nor_the_point() {
    let Some(installation) = installation() else { return };
    let mut fabric = RealFabric::start_apart(Plan::default(), &installation, SLOW).await;
    if fabric.cluster.network().is_none() {
        println!("SKIPPED: there is no link to break");
        return;
    }
    fabric.vm("castaway", "alpha", Shape::Blockdev).await;
    let guest = &mut fabric.cluster.vm("castaway").expect("it runs").guest;
    guest.write(1, 16 * MIB).await.expect("it writes");
    guest.write_at(2, MIB / 4).await.expect("it writes");
    let before = guest.commits_beyond(guest.last_committed()).await.expect("it commits");

    let job = fabric.in_the_middle("castaway", BackupKind::Full).await;
    let migration = fabric.cluster.begin_migration("castaway", "beta").await.expect("it begins");
    gave_way(&mut fabric, "castaway").await;
    let network = fabric.cluster.network().expect("a network");
    network.part(&["alpha", "beta"], true).expect("parted");
    // Neither QEMU hears of it: the migration hangs, and the guest goes on.
    let status = fabric.cluster.hurry(&migration).await.expect("asked");
    let guest = &fabric.cluster.vm("castaway").expect("it runs").guest;
    guest.commits_beyond(guest.last_committed()).await.expect("it goes on");
    assert_eq!(status, "active");
    let now = fabric.operator.job(&job.job_id).await.expect("known");
    assert_eq!((now.ended_unix_ms, now.point_id.as_str()), (0, ""), "it waits: {now:?}");

    let target = fabric.cluster.cancel(migration).await.expect("it is cancelled");
    assert_abandoned(&target);
    let network = fabric.cluster.network().expect("a network");
    network.part(&["alpha", "beta"], false).expect("joined");
    assert_all_is_well(&mut fabric, "castaway", &job.job_id, before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_whose_last_bytes_were_lost_in_a_migration_in_a_backup_goes_on_at_the_source() {
    let Some(installation) = installation() else { return };
    let mut fabric = RealFabric::start_apart(Plan::default(), &installation, SLOW).await;
    if fabric.cluster.network().is_none() {
        println!("SKIPPED: there is no link to break");
        return;
    }
    fabric.vm("limbo", "alpha", Shape::Blockdev).await;
    let guest = &mut fabric.cluster.vm("limbo").expect("it runs").guest;
    guest.write(1, 16 * MIB).await.expect("it writes");
    guest.write_at(2, MIB / 4).await.expect("it writes");
    let before = guest.commits_beyond(guest.last_committed()).await.expect("it commits");

    let job = fabric.in_the_middle("limbo", BackupKind::Full).await;
    let migration = fabric.cluster.begin_to_the_brink("limbo", "beta").await.expect("it begins");
    gave_way(&mut fabric, "limbo").await;
    let network = fabric.cluster.network().expect("a network");
    network.part(&["alpha", "beta"], true).expect("parted");
    // The source has left; nobody has the VM, and nobody may say so of a host.
    let target = fabric.cluster.hand_over(migration).await.expect("it is handed over");
    assert_abandoned(&target);
    let network = fabric.cluster.network().expect("a network");
    network.part(&["alpha", "beta"], false).expect("joined");
    fabric.cluster.resume("limbo").await.expect("it goes on");
    let guest = &fabric.cluster.vm("limbo").expect("it runs").guest;
    guest.commits_beyond(before).await.expect("it goes on");
    assert_all_is_well(&mut fabric, "limbo", &job.job_id, before).await;
}
