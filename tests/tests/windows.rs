//! The agent as a Windows program (under Wine, or on Windows itself), against coordinators, storage nodes and the simulated
//! cluster of this machine. `.ci/windows` builds it and names it; without that there is nothing to test.

use outrider_lab::DiskSource;
use outrider_process::identity::Role;
use outrider_proto::rpc::BackupKind;
use outrider_tests::binary::Program;
use outrider_tests::fabric::{DAY, MIB, identity_dir};
use outrider_tests::process::Process;
use outrider_tests::{Fabric, Plan, eventually, http};

/// The program, or the reason why the test is not run.
fn windows_program(test: &str) -> Option<Program> {
    let program = Program::windows();
    if program.is_none() {
        eprintln!("SKIPPED {test}: OUTRIDER_WINDOWS_EXE names no agent (run .ci/windows)");
    }
    program
}

/// Patient leases: Wine starts slowly, and many calls take longer in it.
fn plan() -> Plan {
    Plan { lease_ms: [8000, 1000, 5000], ..Plan::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_windows_agent_backs_up_and_restores_a_vm_and_hands_over_to_a_linux_one() {
    if windows_program("backup and restore").is_none() {
        return;
    }
    let fabric = Fabric::start(Plan { windows_hosts: vec!["alpha".into()], ..plan() }).await;
    let vm = "장부 books";
    let disks = vec![
        DiskSource::Empty { size: 24 * MIB, block_size: 1 << 20 },
        DiskSource::Empty { size: 10 * MIB + 3 * 512, block_size: 32 << 20 },
    ];
    fabric.vm_with(vm, "alpha", disks).await;

    // Windows reads, Windows writes; and Linux writes what Windows read.
    let full = fabric.operator.backed_up(vm, BackupKind::Full).await;
    assert_eq!(full.kind(), BackupKind::Full);
    fabric.assert_restores_exactly(&full, "alpha").await;
    fabric.assert_restores_exactly(&full, "beta").await;
    fabric.assert_clean(vm).await;

    // A base that the Windows agent has bound is one that it finds again.
    fabric.assert_next_incremental_is_exact(vm, 21).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_windows_without_hyperv_the_agent_joins_and_says_what_is_missing() {
    let Some(program) = windows_program("no Hyper-V") else { return };
    let fabric = Fabric::start(Plan { hosts: vec!["alpha".into()], ..plan() }).await;
    let dir = fabric.dir().to_owned();
    let identity = identity_dir(&dir, Role::Node, "omega");
    fabric.ca.issue(Role::Node, "omega", DAY).expect("issued").save(&identity).expect("saved");
    let config = format!(
        "name = \"omega\"\nfabric = {:?}\nrealm = \"omega\"\nidentity_dir = {:?}\ncoordinators = {:?}\n\
         scratch_dir = {:?}\nhypervisor = \"hyperv\"\nobservability = \"127.0.0.1:0\"\n",
        fabric.ca.fabric(),
        identity,
        fabric.addresses,
        dir.join("node-omega"),
    );
    let mut agent = Process::start_with(program, "node", "omega", &dir, &config);
    agent.ready().await;
    eventually("the fabric knows the host", async || {
        let hosts = fabric.operator.hosts().await.map_err(|e| e.to_string())?;
        let omega = hosts.iter().find(|h| h.name == "omega").ok_or("no such host")?;
        if omega.state == "up" { Ok(()) } else { Err(format!("{omega:?}")) }
    })
    .await;
    // It does not end: the role may be installed later. It tells everybody who asks.
    let address = agent.observability().await;
    eventually("it says what is missing", async || {
        let (status, body) = tokio::task::block_in_place(|| http::ask(address, "/readyz"));
        if status == 503 && body.contains("install the Hyper-V role") {
            Ok(())
        } else {
            Err(format!("{status}: {body}"))
        }
    })
    .await;
    assert!(agent.logged().contains("install the Hyper-V role"), "{}", agent.logged());
    assert!(agent.exited().is_none(), "{}", agent.logged());
}
