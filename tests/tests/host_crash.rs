//! What a host crash does to change tracking: doubt that nothing but reading everything ends (promise 4).

use outrider_lab::{CreateVm, DiskSource, GuestWrite, WaitFor};
use outrider_proto::rpc::{self, BackupKind};
use outrider_tests::fabric::MIB;
use outrider_tests::wait::{DEADLINE, eventually};
use outrider_tests::{Fabric, Plan};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn doubt_after_a_crash_ends_only_when_everything_was_read() {
    let mut fabric = Fabric::start(Plan::default()).await;
    let vm = "books";
    fabric.vm(vm, "alpha", 16 * MIB).await;
    fabric.operator.backed_up(vm, BackupKind::Full).await;
    fabric.agent("alpha").kill();
    fabric.lab.crash_host("alpha").await.expect("crashed");
    eventually("it runs on beta", async || {
        let vm = fabric.operator.vm(vm).await.map_err(|e| e.to_string())?;
        if vm.host == "beta" { Ok(()) } else { Err(format!("it is on {:?}", vm.host)) }
    })
    .await;
    for seed in [71, 72] {
        fabric.write(vm, MIB, seed).await;
        let point = fabric.operator.backed_up(vm, BackupKind::Incremental).await;
        assert_eq!(point.kind(), BackupKind::Incremental, "{point:?}");
        assert!(point.tracking_unproven, "what the first may lack, the second may: {point:?}");
    }

    let at_once =
        rpc::Policy { check_within_ms: Some(0), require_all_disks: true, ..Default::default() };
    fabric.operator.group("books", &[vm], at_once).await;
    fabric.write(vm, MIB, 73).await;
    let check = fabric.operator.backed_up(vm, BackupKind::Incremental).await;
    assert_eq!(check.kind(), BackupKind::ConsistencyCheck, "{check:?}");
    assert!(check.reasons.iter().any(|r| r.contains("host crashed")), "{check:?}");
    assert!(!check.tracking_unproven, "everything was read: {check:?}");
    fabric.assert_restores_exactly(&check, "beta").await;

    fabric.write(vm, MIB, 74).await;
    let after = fabric.operator.backed_up(vm, BackupKind::Incremental).await;
    assert_eq!((after.kind(), after.tracking_unproven), (BackupKind::Incremental, false));
    fabric.assert_restores_exactly(&after, "beta").await;
    fabric.assert_clean(vm).await;
}

/// Nobody is left to call the host down, and its VM stays where it was: only the host itself can tell.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_crashed_and_came_back_unnoticed_leaves_tracking_unproven() {
    let mut fabric = Fabric::start(Plan::default()).await;
    let vm = "alone";
    let disks = vec![DiskSource::Empty { size: 16 * MIB, block_size: 1 << 20 }];
    let new = CreateVm { clustered: false, ..CreateVm::new(vm, "alpha", "Volume1", disks) };
    fabric.lab.create_vm(new).await.expect("the VM is made");
    fabric.lab.guest_write(GuestWrite::at(vm, 0, 0, 8 * MIB, 1)).await.expect("written");
    eventually("the VM is known", async || {
        fabric.operator.vm(vm).await.map(|_| ()).map_err(|e| e.to_string())
    })
    .await;
    fabric.operator.backed_up(vm, BackupKind::Full).await;

    // The agent alone: nothing happened to the host.
    fabric.agent("alpha").restart();
    fabric.agent("alpha").ready().await;
    fabric.write(vm, MIB, 80).await;
    let quiet = fabric.operator.backed_up(vm, BackupKind::Incremental).await;
    assert!(!quiet.tracking_unproven, "{quiet:?}");

    let others: Vec<String> = fabric.plan.hosts.iter().filter(|h| *h != "alpha").cloned().collect();
    for host in &others {
        fabric.agent(host).kill();
    }
    fabric.agent("alpha").kill();
    fabric.write(vm, MIB, 81).await;
    fabric.lab.crash_host("alpha").await.expect("crashed");
    fabric.lab.start_host("alpha").await.expect("started");
    fabric.lab.start_vm(vm).await.expect("the VM runs again");
    fabric.agent("alpha").restart();
    fabric.agent("alpha").ready().await;
    let after = fabric.operator.backed_up(vm, BackupKind::Incremental).await;
    assert_eq!(after.kind(), BackupKind::Incremental, "the coarse map is used: {after:?}");
    assert!(after.tracking_unproven, "and said to be in doubt: {after:?}");
    fabric.assert_restores_exactly(&after, "alpha").await;
    fabric.lab.wait(WaitFor::NoMerge { vm: vm.to_owned() }, DEADLINE).await.expect("merged");
}
