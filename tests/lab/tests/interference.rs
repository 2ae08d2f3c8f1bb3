//! Gates, holds, open readers, crashes: what a test does to hold a job in the middle.

mod support;

use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;

use outrider_lab::{
    CheckpointOnMigration, GateSpec, GuestWrite, HoldSpec, MigrationKind, WaitFor, When,
};
use outrider_wmi::files::{HostFile, HostFiles};
use outrider_wmi::lab::LabFiles;
use outrider_wmi::{NS_VIRTUALIZATION, Wmi, WmiError};
use support::{Lab, MIB, SNAPSHOT_SERVICE, code, snapshot_args, vm_path};

async fn blocking<R: Send + 'static>(work: impl FnOnce() -> R + Send + 'static) -> R {
    tokio::task::spawn_blocking(work).await.expect("no panic")
}

async fn open(files: &LabFiles, path: &std::path::Path) -> std::io::Result<Arc<dyn HostFile>> {
    let (files, path): (LabFiles, PathBuf) = (files.clone(), path.to_owned());
    blocking(move || files.open_read(&path)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gate_blocks_at_the_exact_byte_and_counts_every_host() {
    let lab = Lab::start(CheckpointOnMigration::Travels).await;
    let vm = lab.vm("vm", 64 * MIB).await;
    lab.control.guest_write(GuestWrite::scattered("vm", 8 * MIB, 1)).await.expect("written");
    let agent = lab.agent("alpha").await;
    let made = agent.checkpoint(&vm).await;
    let path = agent.frozen(&made).await.remove(0);
    let spec = GateSpec { vm: "vm".into(), host: Some("alpha".into()), budget: 1_000_000 };
    let gate = lab.control.set_gate(spec).await.expect("set");
    let file = open(&agent.files, &path).await.expect("opens");
    let length = file.len().expect("a length");
    let reader = tokio::task::spawn_blocking(move || {
        let mut all = vec![0; usize::try_from(length).expect("small")];
        let mut done = 0;
        while done < all.len() {
            let end = (done + 300_000).min(all.len());
            done += file.read_at(&mut all[done..end], done as u64).expect("reads");
        }
        all
    });
    lab.wait(WaitFor::GateBlocked { gate }).await;
    let read = |host: &'static str| {
        let control = &lab.control;
        async move {
            let files = control.bytes_read(Some("vm"), Some(host)).await.expect("counts");
            files.iter().map(|f| f.bytes).sum::<u64>()
        }
    };
    assert_eq!(read("alpha").await, 1_000_000);
    // Another host is not concerned.
    let beta = lab.agent("beta").await;
    let other = open(&beta.files, &path).await.expect("opens");
    let first = blocking(move || {
        let mut buf = [0; 8];
        other.read_at(&mut buf, 0).map(|_| buf)
    });
    assert_eq!(&first.await.expect("reads"), b"vhdxfile");
    assert_eq!(read("beta").await, 8);
    lab.control.release_gate(gate).await.expect("released");
    let all = reader.await.expect("no panic");
    assert_eq!(all, std::fs::read(&path).expect("reads"));
    assert_eq!(read("alpha").await, length);
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_waits_for_open_readers() {
    let lab = Lab::start(CheckpointOnMigration::Travels).await;
    let vm = lab.vm("vm", 16 * MIB).await;
    let agent = lab.agent("alpha").await;
    let made = agent.checkpoint(&vm).await;
    let path = agent.frozen(&made).await.remove(0);
    let leaf = lab.state(&vm).await.disks[0].chain[1].clone();
    let refused = open(&agent.files, &leaf).await.err().expect("the live leaf is not to be read");
    assert_eq!(refused.kind(), ErrorKind::ResourceBusy);
    let file = open(&agent.files, &path).await.expect("opens");
    agent.convert(&made).await;
    lab.wait(WaitFor::MergeWaitsForReaders { vm: "vm".into() }).await;
    let state = lab.state(&vm).await;
    assert!(state.merge_waits.expect("a reason").contains("0x80070020"));
    assert_eq!(state.disks[0].chain.len(), 2);
    blocking(move || drop(file)).await;
    lab.no_merge(&vm).await;
    assert_eq!(lab.state(&vm).await.disks[0].chain.len(), 1);
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_method_has_no_effect_before_and_all_of_it_after() {
    let lab = Lab::start(CheckpointOnMigration::Travels).await;
    let vm = lab.vm("vm", 16 * MIB).await;
    let spec = |when| HoldSpec {
        method: "CreateSnapshot".into(),
        vm: Some("vm".into()),
        host: Some("alpha".into()),
        when,
    };
    let count = || async { lab.state(&vm).await.recovery_checkpoints().count() };

    let hold = lab.control.hold(spec(When::Before)).await.expect("set");
    let (agent, asked) = (lab.agent("alpha").await, vm.clone());
    let call = tokio::spawn(async move {
        agent.call(SNAPSHOT_SERVICE, "CreateSnapshot", snapshot_args(&asked)).await
    });
    lab.wait(WaitFor::MethodHeld { hold }).await;
    assert_eq!(count().await, 0);
    // The agent dies while its call is held: the call never happens.
    call.abort();
    assert!(call.await.expect_err("aborted").is_cancelled());
    let released = tokio::time::timeout(support::DEADLINE, async {
        while lab.control.wait(WaitFor::MethodHeld { hold }, support::DEADLINE).await.is_ok() {
            tokio::task::yield_now().await;
        }
    });
    released.await.expect("the hold goes with the caller");
    assert_eq!(count().await, 0);

    let hold = lab.control.hold(spec(When::After)).await.expect("set");
    let (agent, asked) = (lab.agent("alpha").await, vm.clone());
    let call = tokio::spawn(async move {
        agent.call(SNAPSHOT_SERVICE, "CreateSnapshot", snapshot_args(&asked)).await
    });
    lab.wait(WaitFor::MethodHeld { hold }).await;
    assert_eq!(count().await, 1);
    assert!(!call.is_finished());
    lab.control.release(hold).await.expect("released");
    assert_eq!(code(&call.await.expect("no panic")), 4096);
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crashed_host_answers_nobody_and_its_readers_fail() {
    let lab = Lab::start(CheckpointOnMigration::Travels).await;
    let vm = lab.vm("vm", 16 * MIB).await;
    let agent = lab.agent("alpha").await;
    let made = agent.checkpoint(&vm).await;
    let path = agent.frozen(&made).await.remove(0);
    let spec = GateSpec { vm: "vm".into(), host: None, budget: 0 };
    let gate = lab.control.set_gate(spec).await.expect("set");
    let file = open(&agent.files, &path).await.expect("opens");
    let reader = tokio::task::spawn_blocking(move || file.read_at(&mut [0; 8], 0));
    lab.wait(WaitFor::GateBlocked { gate }).await;
    lab.control.crash_host("alpha").await.expect("crashed");
    assert!(reader.await.expect("no panic").is_err());
    let down = agent.wmi.get(NS_VIRTUALIZATION, &vm_path(&vm)).await;
    assert!(matches!(down, Err(WmiError::Unreachable { .. })), "{down:?}");
    let state = lab.state(&vm).await;
    assert_ne!(state.host, "alpha");
    assert_eq!((state.owner.as_deref(), state.enabled_state), (Some(state.host.as_str()), 2));
    assert_eq!(state.checkpoints.len(), 1, "the checkpoint lies on the CSV");
    lab.control.start_host("alpha").await.expect("started");
    let gone = agent.wmi.get(NS_VIRTUALIZATION, &vm_path(&vm)).await;
    assert!(matches!(gone, Err(WmiError::NotFound { .. })), "{gone:?}");
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_old_hosts_reader_goes_on_after_a_migration_and_holds_up_the_new_hosts_merge() {
    let lab = Lab::start(CheckpointOnMigration::Travels).await;
    let vm = lab.vm("vm", 16 * MIB).await;
    let alpha = lab.agent("alpha").await;
    let made = alpha.checkpoint(&vm).await;
    let path = alpha.frozen(&made).await.remove(0);
    let file = open(&alpha.files, &path).await.expect("opens");
    lab.control.migrate("vm", "beta", MigrationKind::Live).await.expect("moved");
    let held = file.clone();
    let read = blocking(move || held.read_at(&mut [0; 4096], 0)).await;
    assert_eq!(read.expect("the files lie on the CSV"), 4096);
    let beta = lab.agent("beta").await;
    beta.convert(&made).await;
    lab.wait(WaitFor::MergeWaitsForReaders { vm: "vm".into() }).await;
    blocking(move || drop(file)).await;
    lab.no_merge(&vm).await;
    let calls = lab.control.call_log(None).await.expect("a log");
    let seen: Vec<(&str, &str)> =
        calls.iter().map(|c| (c.host.as_str(), c.method.as_str())).collect();
    assert_eq!(seen, [("alpha", "CreateSnapshot"), ("beta", "ConvertToReferencePoint")]);
    lab.stop().await;
}
