//! Commands around backups (C5): permitted by the host, named by the group, told with the job.
#![cfg(unix)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use outrider_lab::{GateSpec, MigrationKind, WaitFor};
use outrider_proto::rpc::{BackupKind, Policy};
use outrider_tests::fabric::MIB;
use outrider_tests::wait::DEADLINE;
use outrider_tests::{Fabric, Plan, eventually};

fn script(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("set");
    path.to_str().expect("Unicode").to_owned()
}

/// Scripts that note what they were told, one line each.
fn plan(dir: &Path) -> Plan {
    let told = dir.join("told");
    let note = script(
        dir,
        "note",
        &format!(
            "echo \"$OUTRIDER_WHEN $OUTRIDER_HOST $OUTRIDER_VM $OUTRIDER_KIND $OUTRIDER_OUTCOME\" >> {}; echo noted \"$1\"",
            told.display()
        ),
    );
    let fail = script(dir, "fail", "echo the application said no; exit 4");
    let node_settings = format!(
        "[commands.note]\nprogram = \"{note}\"\narguments = [\"all\"]\n[commands.fail]\nprogram = \"{fail}\"\n"
    );
    Plan { node_settings, ..Plan::default() }
}

fn told(dir: &Path) -> Vec<String> {
    let text = fs::read_to_string(dir.join("told")).unwrap_or_default();
    text.lines().map(|line| line.trim().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_names_commands_that_its_hosts_permit_and_nothing_else_runs() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path();
    let fabric = Fabric::start(plan(dir)).await;
    fabric.vm("web", "alpha", 8 * MIB).await;
    let policy =
        Policy { before_command: "note".into(), after_command: "note".into(), ..Policy::default() };
    fabric.operator.group("nightly", &["web"], policy).await;
    let job = fabric.operator.backup("web", BackupKind::Full).await;
    let job = fabric.operator.done(&job.job_id).await;
    assert_eq!(told(dir), ["before alpha web full", "after alpha web full good"]);
    let ran: Vec<_> = job.commands.iter().map(|c| (c.when.as_str(), c.good)).collect();
    assert_eq!(ran, [("before", true), ("after", true)], "{job:?}");
    assert_eq!((job.state.as_str(), job.commands[0].output.as_str()), ("completed", "noted all"));

    // A failing one is a warning, or the end of the run, as the group wants; after runs all the same.
    let edit = |args: &[&str]| {
        let outcome =
            fabric.operator.cli(&[&["group", "edit", "nightly", "--json"], args].concat());
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
    };
    edit(&["--before", "fail"]);
    let job = fabric.operator.backup("web", BackupKind::Incremental).await;
    let job = fabric.operator.done(&job.job_id).await;
    let warned = job.warnings.iter().any(|w| w.contains("exit code 4") && w.contains("said no"));
    assert!(warned && job.state == "completed with warnings", "{job:?}");
    edit(&["--before-must-succeed"]);
    let job = fabric.operator.backup("web", BackupKind::Incremental).await;
    let outcome = fabric.operator.cli(&["job", "list", "--json"]);
    assert!(outcome.stdout.contains("\"commands\""), "{outcome:?}");
    let job = fabric.operator.ended(&job.job_id).await;
    assert_eq!((job.state.as_str(), job.error_code.as_str()), ("failed", "OUT-N-0032"), "{job:?}");
    assert!(job.host_clean && job.reason.contains("the application said no"), "{job:?}");
    assert_eq!(told(dir).last().map(String::as_str), Some("after alpha web incremental failed"));
    assert_eq!(fabric.seen("web").await.checkpoints.len(), 0);

    // What the host does not permit does not run, whatever the coordinators say.
    edit(&["--before", "/bin/touch", "--after", ""]);
    let job = fabric.operator.backup("web", BackupKind::Incremental).await;
    let job = fabric.operator.ended(&job.job_id).await;
    assert!(job.reason.contains("permits no command of this name"), "{job:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_move_the_host_that_ends_the_job_runs_the_command_after() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path();
    let fabric = Fabric::start(plan(dir)).await;
    fabric.vm("web", "alpha", 16 * MIB).await;
    let policy =
        Policy { before_command: "note".into(), after_command: "note".into(), ..Policy::default() };
    fabric.operator.group("nightly", &["web"], policy).await;
    let budget = GateSpec { vm: "web".into(), host: Some("alpha".into()), budget: 4 * MIB };
    let gate = fabric.lab.set_gate(budget).await.expect("set");
    let job = fabric.operator.backup("web", BackupKind::Full).await;
    fabric.lab.wait(WaitFor::GateBlocked { gate }, DEADLINE).await.expect("it reads");
    fabric.lab.migrate("web", "beta", MigrationKind::Live).await.expect("moved");
    fabric.lab.release_gate(gate).await.expect("released");
    let ended = fabric.operator.done(&job.job_id).await;
    assert_eq!(ended.host, "beta", "{ended:?}");
    assert_eq!(told(dir), ["before alpha web full", "after beta web full good"]);

    // One that is cancelled in mid-air.
    let budget = GateSpec { vm: "web".into(), host: Some("beta".into()), budget: 4 * MIB };
    let gate = fabric.lab.set_gate(budget).await.expect("set");
    let job = fabric.operator.backup("web", BackupKind::Full).await;
    fabric.lab.wait(WaitFor::GateBlocked { gate }, DEADLINE).await.expect("it reads");
    let outcome = fabric.operator.cli(&["job", "cancel", &job.job_id, "--json"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    fabric.lab.release_gate(gate).await.expect("released");
    eventually("the host runs it for the cancelled job", async || {
        match told(dir).last().map(String::as_str) {
            Some("after beta web full cancelled") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
}
