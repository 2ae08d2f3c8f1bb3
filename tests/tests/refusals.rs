//! Bad input through the command line: a clear sentence, a non-zero exit, nothing lost, nothing left behind.

use std::path::Path;
use std::time::{Duration, SystemTime};

use outrider_disk::vhdx::{CreateOptions, VhdxWriter};
use outrider_lab::{CreateVm, DiskSource};
use outrider_process::identity::Role;
use outrider_process::identity::ca::FabricCa;
use outrider_process::secret::kek::KeyEncryptionKey;
use outrider_proto::error_code;
use outrider_proto::rpc::BackupKind;
use outrider_tests::fabric::{DAY, MIB};
use outrider_tests::operator::{Outcome, run};
use outrider_tests::process::Process;
use outrider_tests::{Fabric, Plan, eventually};

/// A refusal is told for people on standard error and for scripts as JSON, names the object, and is no success.
fn assert_told(outcome: &Outcome, code: Option<&str>, words: &[&str]) {
    assert!(outcome.code.is_some_and(|c| c != 0), "{outcome:?}");
    assert!(!outcome.stderr.contains("panicked"), "{outcome:?}");
    for word in words {
        assert!(outcome.stderr.contains(word), "{word:?} is not told: {outcome:?}");
    }
    if let Some(code) = code {
        assert!(outcome.stderr.contains(code), "{outcome:?}");
        assert!(outcome.stderr.contains("hint:"), "what to do is told: {outcome:?}");
    }
    let json = outcome.json();
    assert_eq!(json["ok"], false, "{json}");
    assert!(json["error"]["message"].as_str().is_some_and(|m| !m.is_empty()), "{json}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_operator_gets_wrong_is_told_and_changes_nothing() {
    let mut fabric = Fabric::start(Plan::default()).await;
    fabric.vm("one", "alpha", 8 * MIB).await;
    fabric.operator.backed_up("one", BackupKind::Full).await;
    let jobs =
        |fabric: &Fabric| fabric.operator.cli(&["job", "list", "--json"]).json()["jobs"].clone();
    let before = jobs(&fabric);

    // An unknown VM, group, point, host.
    let outcome = fabric.operator.cli(&["backup", "run", "--json", "--vm", "nobody-서울"]);
    assert_told(&outcome, Some(error_code::UNKNOWN_VM.code), &["nobody-서울"]);
    assert_eq!(outcome.code, Some(3), "refused on purpose");
    let outcome = fabric.operator.cli(&["backup", "run", "--json", "--group", "nobody"]);
    assert_told(&outcome, Some(error_code::UNKNOWN_GROUP.code), &["nobody"]);
    let outcome = fabric.operator.cli(&["restore", "--json", "--vm", "nobody"]);
    assert_told(&outcome, Some(error_code::UNKNOWN_VM.code), &["nobody"]);
    let args = ["restore", "--json", "--vm", "one", "--to-host", "omega", "--name", "copy"];
    assert_told(&fabric.operator.cli(&args), Some(error_code::UNKNOWN_HOST.code), &["omega"]);

    // Two VMs of one name.
    for seed in [100, 101] {
        let disk = DiskSource::Empty { size: 8 * MIB, block_size: 0 };
        let twin = CreateVm { seed, ..CreateVm::new("twin", "beta", "Volume1", vec![disk]) };
        fabric.lab.create_vm(twin).await.expect("made");
    }
    eventually("both twins are known", async || {
        let vms = fabric.operator.cli(&["vm", "list", "--json"]).json();
        let twins =
            vms["vms"].as_array().map_or(0, |v| v.iter().filter(|v| v["name"] == "twin").count());
        if twins == 2 { Ok(()) } else { Err(vms.to_string()) }
    })
    .await;
    let outcome = fabric.operator.cli(&["backup", "run", "--json", "--vm", "twin"]);
    assert_told(&outcome, Some(error_code::AMBIGUOUS_NAME.code), &["twin"]);

    // Certificates: expired, and of another fabric.
    let hour = Duration::from_secs(3600);
    let now = SystemTime::now();
    let expired = fabric.dir().join("expired");
    let issued = fabric.ca.issue_between(Role::Operator, "op", now - 48 * hour, now - 24 * hour);
    issued.expect("issued").save(&expired).expect("saved");
    let outcome = fabric.operator.cli_as(&expired, &["status", "--json", "--patience", "3s"]);
    assert_told(&outcome, None, &["expired"]);
    let stranger = fabric.dir().join("stranger");
    let other = FabricCa::create(&uuid::Uuid::new_v4().to_string()).expect("another fabric");
    other.issue(Role::Operator, "op", DAY).expect("issued").save(&stranger).expect("saved");
    let outcome = fabric.operator.cli_as(&stranger, &["status", "--json", "--patience", "3s"]);
    assert_told(&outcome, None, &["certificate"]);
    // The right authority and the wrong role.
    let identity = fabric.identity(Role::Node, "alpha");
    let outcome = fabric.operator.cli_as(&identity, &["status", "--json", "--patience", "3s"]);
    assert_told(&outcome, Some(error_code::DENIED.code), &["operator"]);

    assert_eq!(jobs(&fabric), before, "no job was made, none was lost");

    // The wrong key-encryption key, and the right one again.
    let kek = fabric.dir().join("kek");
    let right = std::fs::read(&kek).expect("the key");
    fabric.coordinators[0].stop().await;
    outrider_process::fs::write_private(&kek, KeyEncryptionKey::generate().to_text().expose())
        .expect("written");
    fabric.coordinators[0].restart();
    let ended = eventually("the wrong key is refused", async || {
        fabric.coordinators[0].exited().ok_or_else(|| "it still runs".to_owned())
    })
    .await;
    let why = fabric.coordinators[0].logged();
    assert!(!ended.success() && !why.contains("panicked"), "{ended}: {why}");
    assert!(why.contains("key-encryption key") && why.contains("recovery kit"), "{why}");
    outrider_process::fs::write_private(&kek, &right).expect("written");
    fabric.coordinators[0].restart();
    fabric.coordinators[0].ready().await;
    assert_eq!(fabric.operator.points("one").await.len(), 1, "nothing was lost");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_in_use_is_told_with_the_setting_to_change() {
    let fabric = Fabric::start(Plan::default()).await;
    let config = |name: &str| std::fs::read_to_string(fabric.dir().join(name)).expect("a file");
    // A second coordinator on the first one's port.
    let data = fabric.dir().join("elsewhere");
    let taken = config("coordinator-c1.toml").replace(
        &fabric.dir().join("coordinator-c1").display().to_string(),
        &data.display().to_string(),
    );
    let mut second = Process::start("coordinator", "second", fabric.dir(), &taken);
    let why = second.try_ready().await.expect_err("the port is taken");
    assert!(why.contains("already in use") && why.contains("listen"), "{why}");
    assert!(why.contains(&fabric.addresses[0]) && !why.contains("panicked"), "{why}");
    // The same for the plain HTTP port of a storage node.
    let http = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let http = http.local_addr().map(|a| (a, http)).expect("bound");
    let data = fabric.dir().join("elsewhere-too");
    let taken = config("storage-s1.toml")
        .replace(&fabric.storage_dir(0).display().to_string(), &data.display().to_string())
        .replace("observability = \"127.0.0.1:0\"", &format!("observability = \"{}\"", http.0));
    let mut second = Process::start("storage", "second", fabric.dir(), &taken);
    let why = second.try_ready().await.expect_err("the port is taken");
    assert!(why.contains("already in use") && why.contains("observability"), "{why}");
    fabric.settled().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_storage_node_fails_the_job_with_its_reason_and_leaves_the_host_clean() {
    let plan = Plan { min_free: "1024 TiB", storage_patience: "1s", ..Plan::default() };
    let fabric = Fabric::start(plan).await;
    fabric.vm("one", "alpha", 8 * MIB).await;
    let job = fabric.operator.backup("one", BackupKind::Full).await;
    let job = fabric.operator.ended(&job.job_id).await;
    assert!(!job.data_safe && job.host_clean && job.state == "failed", "{job:?}");
    assert_eq!(job.error_code, error_code::STORAGE_FULL.code, "{job:?}");
    assert!(job.reason.contains("s1 is full: add storage"), "{job:?}");
    let seen = fabric.seen("one").await;
    assert_eq!(seen.recovery_checkpoints().count(), 0, "{seen:?}");
    assert!(fabric.operator.points("one").await.is_empty());
    let args = ["backup", "run", "--json", "--wait", "--vm", "one"];
    let outcome = tokio::task::block_in_place(|| fabric.operator.cli(&args));
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
}

#[test]
fn two_processes_on_one_data_folder_are_refused() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let fabric = Fabric::start(Plan::default()).await;
        let same = std::fs::read_to_string(fabric.dir().join("storage-s1.toml")).expect("a file");
        let mut second = Process::start("storage", "second", fabric.dir(), &same);
        let why = second.try_ready().await.expect_err("the folder is in use");
        let folder = fabric.storage_dir(0).display().to_string();
        assert!(why.contains(&folder) && !why.contains("panicked"), "{why}");
        fabric.settled().await;
    });
}

/// A VHDX with something in it.
fn disk(path: &Path) {
    let options = CreateOptions { block_size: 1 << 20, ..CreateOptions::dynamic(8 * MIB) };
    let mut disk = VhdxWriter::create(path, &options).expect("created");
    disk.write_at(0, &vec![7; 8 << 20]).expect("written");
    disk.close().expect("closed");
}

#[test]
fn files_that_are_no_good_disks_are_told_and_nothing_is_left_behind() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = |name: &str| dir.path().join(name);
    std::fs::write(file("text.vhdx"), "this is a letter, not a disk\n".repeat(9000))
        .expect("written");
    std::fs::write(file("empty.vhdx"), "").expect("written");
    disk(&file("whole.vhdx"));
    let whole = std::fs::read(file("whole.vhdx")).expect("a disk");
    std::fs::write(file("truncated.vhdx"), &whole[..whole.len() / 2]).expect("written");
    disk(&file("parent.vhdx"));
    let child = VhdxWriter::create_child(file("child.avhdx"), file("parent.vhdx"), None);
    child.expect("created").close().expect("closed");
    std::fs::remove_file(file("parent.vhdx")).expect("removed");

    let broken = error_code::DISK_BROKEN.code;
    let cases = [
        ("text.vhdx", broken),
        ("empty.vhdx", broken),
        ("truncated.vhdx", broken),
        ("child.avhdx", error_code::PARENT_MISSING.code),
    ];
    for (name, code) in cases {
        let path = file(name).display().to_string();
        let outcome = run(&["disk", "info", "--json", &path], &[]);
        assert_told(&outcome, Some(code), &[name]);

        let temp = file("temp");
        std::fs::create_dir(&temp).expect("made");
        let outcome = run(&["demo", "--json", "--disk", &path], &[("TMPDIR", temp.as_os_str())]);
        assert!(outcome.code.is_some_and(|c| c != 0), "{outcome:?}");
        assert_eq!(outcome.json()["ok"], false, "{outcome:?}");
        assert!(
            outcome.stderr.contains(name) && !outcome.stderr.contains("panicked"),
            "{outcome:?}"
        );
        let left: Vec<_> = std::fs::read_dir(&temp).expect("a folder").collect();
        assert!(left.is_empty(), "left behind: {left:?}");
        std::fs::remove_dir(&temp).expect("empty");
    }
    let outcome = run(&["disk", "info", "--json", &file("no.vhdx").display().to_string()], &[]);
    assert_told(&outcome, None, &["no.vhdx"]);
    assert_eq!(
        std::fs::read(file("whole.vhdx")).expect("a disk"),
        whole,
        "sources are never written"
    );
}
