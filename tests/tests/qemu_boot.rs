//! The boot check of a restore, as an operator asks for it, on real VMs: what was seen is named, and what was not seen is
//! never called booted.
#![cfg(target_os = "linux")]

use outrider_proto::rpc::BackupKind;
use outrider_qemulab::{Format, NewVm, Shape};
use outrider_tests::Plan;
use outrider_tests::fabric::MIB;
use outrider_tests::real::{RealFabric, installation};

fn small(name: &str, agent: bool) -> NewVm {
    NewVm {
        name: name.to_owned(),
        host: "alpha".to_owned(),
        disks: vec![(24 * MIB + 512, Format::Qcow2)],
        shape: Shape::Blockdev,
        agent,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_vm_is_called_booted_for_what_was_seen_and_one_that_does_not_boot_fails_the_check_only()
 {
    let Some(installation) = installation() else { return };
    let mut fabric = RealFabric::start(Plan::default(), &installation, "").await;
    fabric.vm_with(small("web", true)).await;
    let has_agent =
        fabric.cluster.vm("web").expect("it runs").guest.ready().await.expect("up").agent;
    let point = fabric.operator.backed_up("web", BackupKind::Full).await.point_id;
    let restore = |name: &str, more: &[&str]| {
        let all =
            ["restore", "--point", &point, "--to-host", "beta", "--name", name, "--wait", "--json"];
        fabric.operator.cli(&[&all[..], more].concat())
    };

    let text = restore("by-text", &["--boot-check", "2m", "--boot-text", "guest: ready"]);
    assert_eq!(text.code, Some(0), "{text:?}");
    let told = text.json()["jobs"][0]["warnings"].to_string();
    assert!(told.contains("has booted") && told.contains("guest: ready"), "{told}");
    if has_agent {
        let agent = restore("by-agent", &["--boot-check"]);
        assert_eq!(agent.code, Some(0), "{agent:?}");
        let told = agent.json()["jobs"][0]["warnings"].to_string();
        assert!(told.contains("has booted") && told.contains("guest agent answers"), "{told}");
    } else {
        println!("SKIPPED: no qemu-ga for the guest; `.ci/tools guest` gets it");
    }

    // The root file system of the next one is ruined: the kernel panics.
    let initramfs = fabric.dir().join("initramfs");
    std::fs::write(&initramfs, b"no archive").expect("written");
    let bad = restore("broken", &["--boot-check", "20s"]);
    assert_eq!(bad.code, Some(1), "{bad:?}");
    let job = &bad.json()["jobs"][0];
    assert_eq!(job["error_code"], "OUT-N-0025", "{job}");
    assert_eq!(job["state"], "completed, not booted", "the restore itself is fine: {job}");
    assert_eq!(job["data_safe"], true, "{job}");
    let why = job["reason"].as_str().expect("a reason");
    for part in
        ["VM \"broken\"", "not seen to boot", "no login prompt", "guest agent", "Kernel panic"]
    {
        assert!(why.contains(part), "{part}: {why}");
    }
    println!("{why}");
    let sockets = &fabric.cluster.places("beta").expect("a host").sockets;
    assert!(sockets.join("broken.json").exists(), "the VM stays, to be looked at");
    // In plain words, too.
    let plain = fabric.operator.cli(&[
        "restore",
        "--point",
        &point,
        "--to-host",
        "beta",
        "--name",
        "broken-too",
        "--wait",
        "--boot-check",
        "1s",
    ]);
    assert_eq!(plain.code, Some(1), "{plain:?}");
    assert!(plain.stderr.contains("completed, not booted"), "{plain:?}");
    assert!(plain.stderr.contains("OUT-N-0025"), "{plain:?}");
    let wrong = fabric.operator.cli(&["restore", "--point", &point, "--boot-text", "x"]);
    assert_eq!(wrong.code, Some(2), "--boot-text needs --boot-check: {wrong:?}");
}
