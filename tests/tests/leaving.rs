//! What backups left on hosts is found, and a host that leaves the fabric keeps nothing of ours (J13, O9).

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use outrider_lab::MigrationKind;
use outrider_node::config::JobTimes;
use outrider_node::hypervisor::hyperv::HyperV;
use outrider_node::hypervisor::{Checkpoint, CheckpointRequest, Hypervisor};
use outrider_node::lease::Lease;
use outrider_process::clock::{Clock, SystemClock};
use outrider_proto::ids::{JobId, LeaseEpoch, VmGuid};
use outrider_proto::rpc::BackupKind;
use outrider_tests::fabric::MIB;
use outrider_tests::install::InstallLine;
use outrider_tests::operator::{Outcome, run};
use outrider_tests::process::Process;
use outrider_tests::{Fabric, Plan, eventually};
use outrider_wmi::lab::{LabFiles, LabWmi};
use serde_json::Value;

const STATE: &str = "var/lib/outrider-node";
const CONFIG: &str = "etc/outrider/node.toml";

/// Somebody else at the hypervisor of a host.
struct Stranger {
    hypervisor: HyperV,
    lease: Lease,
}

impl Stranger {
    async fn on(fabric: &mut Fabric, host: &str) -> Self {
        let lab = fabric.lab_process.ready().await.addresses["lab"];
        let wmi = LabWmi::connect(lab, host).await.expect("the host answers");
        let files = Arc::new(LabFiles::new(lab, host));
        let clock = Arc::new(SystemClock::new());
        let hour = Duration::from_secs(3600);
        let lease = Lease::granted(JobId::random(), LeaseEpoch(1), hour, false, clock.clone());
        lease.renew(clock.monotonic());
        Self { hypervisor: HyperV::new(Arc::new(wmi), files, JobTimes::default()), lease }
    }

    async fn checkpoint(&self, vm: VmGuid, name: &str) -> Checkpoint {
        let request = CheckpointRequest { quiesce: false, truncate_logs: false };
        let made = self.hypervisor.create_checkpoint(&self.lease, vm, name, request).await;
        made.expect("a checkpoint")
    }
}

fn orphans(outcome: &Outcome) -> Vec<(String, String, String)> {
    let text = |v: &Value| v.as_str().expect("a text").to_owned();
    let json = outcome.json();
    let list = json["orphans"].as_array().expect("a list");
    let mut told: Vec<_> = list
        .iter()
        .map(|o| {
            assert!(!text(&o["next"]).is_empty() && !text(&o["why"]).is_empty(), "{o}");
            (text(&o["vm_name"]), text(&o["what"]), text(&o["owner"]))
        })
        .collect();
    told.sort();
    told
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_duty_explains_is_listed_with_its_owner_and_nothing_is_touched() {
    let mut fabric = Fabric::start(Plan::default()).await;
    fabric.vm("web", "alpha", 8 * MIB).await;
    let db = VmGuid(fabric.vm("db", "beta", 8 * MIB).await.id);
    let old = VmGuid(fabric.vm("old", "beta", 8 * MIB).await.id);
    fabric.operator.backed_up("web", BackupKind::Full).await;
    // The bound reference point is explained.
    let outcome = fabric.operator.cli(&["host", "orphans", "--json"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(orphans(&outcome), vec![], "{outcome:?}");
    let explained =
        outcome.json()["hosts"].as_array().expect("hosts").iter().find_map(|h| {
            (h["host"] == "alpha").then(|| h["explained"].as_u64().expect("a number"))
        });
    assert_eq!(explained, Some(1), "{outcome:?}");

    fabric.lab.user_checkpoint("web", "before the patch").await.expect("made");
    let stranger = Stranger::on(&mut fabric, "beta").await;
    let first = stranger.checkpoint(db, "Another product").await;
    stranger.hypervisor.convert(&stranger.lease, db, &first).await.expect("converted");
    stranger.checkpoint(db, "Another product 2").await;
    stranger.checkpoint(old, "Outrider of a job that nobody knows").await;
    let before = fabric.lab.state().await.expect("a state");
    let outcome = fabric.operator.cli(&["host", "orphans", "--json"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let expected = [
        ("db", "checkpoint", "another product"),
        ("db", "reference point", "unknown"),
        ("old", "checkpoint", "ours"),
        ("web", "checkpoint", "user"),
    ];
    let expected: Vec<_> =
        expected.iter().map(|(a, b, c)| ((*a).into(), (*b).into(), (*c).into())).collect();
    assert_eq!(orphans(&outcome), expected, "{outcome:?}");
    let json = outcome.json();
    let user = json["orphans"].as_array().expect("a list").iter().find(|o| o["owner"] == "user");
    let user = user.expect("told");
    assert_eq!(user["name"], "before the patch");
    assert!(user["created_unix_ms"].as_u64().expect("a time") > 0, "{user}");
    let chain = user["chain"].as_array().expect("a chain");
    assert_eq!(chain.len(), 2, "{chain:?}");
    assert!(chain[0].as_str().expect("a file").ends_with(".avhdx"), "{chain:?}");
    let after = fabric.lab.state().await.expect("a state");
    let counted = |state: &outrider_lab::LabState| -> Vec<(String, usize, usize)> {
        let of = |vm: &outrider_lab::VmState| {
            (vm.name.clone(), vm.checkpoints.len(), vm.reference_points.len())
        };
        state.vms.iter().map(of).collect()
    };
    assert_eq!(counted(&before), counted(&after), "looking changed something");

    // The table for people names the chain and what to do.
    let outcome = fabric.operator.cli(&["host", "orphans", "alpha"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    for word in ["before the patch", "chain", ".avhdx", "next", "user"] {
        assert!(outcome.stdout.contains(word), "{word:?} in {outcome:?}");
    }
    assert!(!outcome.stdout.contains("Another product"), "another host's: {outcome:?}");
    // A host that does not answer is told, and the exit code says that the list is not whole.
    fabric.agent("beta").kill();
    eventually("its silence is told", async || {
        let outcome = fabric.operator.cli(&["host", "orphans", "--json"]);
        let told = outcome.stdout.contains("its agent is not connected");
        if told && outcome.code == Some(1) { Ok(()) } else { Err(format!("{outcome:?}")) }
    })
    .await;
    // What is ours and has no duty goes with the next job of its VM, as the list says.
    fabric.agent("beta").restart();
    fabric.agent("beta").ready().await;
    fabric.settled().await;
    fabric.operator.backed_up("old", BackupKind::Full).await;
    assert_eq!(fabric.seen("old").await.checkpoints.len(), 0);
}

fn node(root: &Path, args: &[&str]) -> Outcome {
    let root = root.to_str().expect("Unicode");
    run(&[&["node"], args, &["--root", root, "--json"]].concat(), &[])
}

fn files(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("readable") {
            let path = entry.expect("an entry").path();
            if path.is_dir() && !path.is_symlink() { folders.push(path) } else { found.push(path) }
        }
    }
    found
}

/// Joins as `gamma`, and runs the agent from the image.
async fn joined(fabric: &mut Fabric, root: &Path) -> Process {
    let line = InstallLine::of(fabric, "gamma").await;
    let outcome = node(root, &line.arguments());
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    // The image is put into service: the same files, seen from here.
    let text = fs::read_to_string(root.join(CONFIG)).expect("a configuration");
    let here = root.join(STATE);
    let text = text.replace("/var/lib/outrider-node", here.to_str().expect("Unicode"));
    let mut agent = Process::start("node", "gamma", fabric.dir(), &text);
    agent.ready().await;
    if !fabric.plan.hosts.iter().any(|h| h == "gamma") {
        fabric.plan.hosts.push("gamma".to_owned());
    }
    fabric.settled().await;
    agent
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_is_removed_clean_leaves_nothing_and_its_name_is_free() {
    let plan = Plan { unmanned: vec!["gamma".to_owned()], ..Plan::default() };
    let mut fabric = Fabric::start(plan).await;
    let root = fabric.dir().join("image");
    fs::create_dir(&root).expect("made");
    let mut agent = joined(&mut fabric, &root).await;
    let one = VmGuid(fabric.vm("one", "gamma", 8 * MIB).await.id);
    fabric.vm("two", "gamma", 8 * MIB).await;
    fabric.operator.backed_up("one", BackupKind::Full).await;
    fabric.operator.backed_up("two", BackupKind::Full).await;
    // Moved away before: its base travels, and stays.
    fabric.lab.migrate("two", "alpha", MigrationKind::Live).await.expect("moved");
    eventually("it is followed", async || {
        let vm = fabric.operator.vm("two").await.map_err(|e| e.to_string())?;
        if vm.host == "alpha" { Ok(()) } else { Err(vm.host) }
    })
    .await;

    // Without coordinators nothing is removed.
    fabric.coordinators[0].kill();
    let outcome = node(&root, &["uninstall", "--clean"]);
    assert_eq!(outcome.code, Some(3), "{outcome:?}");
    assert!(outcome.stderr.contains("coordinators cannot be asked"), "{outcome:?}");
    assert!(root.join(CONFIG).exists());
    fabric.coordinators[0].restart();
    fabric.coordinators[0].ready().await;
    fabric.settled().await;

    // A checkpoint of ours that nobody knows of, besides the bound reference point.
    let stranger = Stranger::on(&mut fabric, "gamma").await;
    stranger.checkpoint(one, "Outrider of a job that nobody knows").await;
    let outcome = node(&root, &["uninstall", "--clean", "--wait", "2m"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let json = outcome.json();
    assert_eq!((&json["clean"], &json["vms_without_base"]), (&true.into(), &1.into()), "{json}");
    assert_eq!(files(&root), Vec::<PathBuf>::new());
    assert!(!root.join(STATE).exists());
    let seen = fabric.seen("one").await;
    assert_eq!((seen.checkpoints.len(), seen.reference_points.len()), (0, 0), "{seen:?}");
    assert_eq!(fabric.seen("two").await.reference_points.len(), 1, "its base moved with it");
    let hosts = fabric.operator.hosts().await.expect("a list");
    assert!(hosts.iter().all(|h| h.name != "gamma"), "{hosts:?}");
    assert_eq!(fabric.operator.vm("one").await.expect("known").host, "");
    agent.stop().await;
    assert!(!root.join(STATE).exists(), "the agent that ended made it again");

    // Its VM goes on elsewhere: everything is read, and why is said; the other one goes on from its base.
    fabric.plan.hosts.retain(|h| h != "gamma");
    fabric.lab.migrate("one", "beta", MigrationKind::Live).await.expect("moved");
    eventually("it is followed", async || {
        let vm = fabric.operator.vm("one").await.map_err(|e| e.to_string())?;
        if vm.host == "beta" { Ok(()) } else { Err(vm.host) }
    })
    .await;
    let point = fabric.operator.backed_up("one", BackupKind::Incremental).await;
    assert_eq!(point.kind(), BackupKind::Full, "{point:?}");
    let told = point.reasons.iter().any(|r| r.contains("gamma left the fabric"));
    assert!(told, "{:?}", point.reasons);
    let point = fabric.operator.backed_up("two", BackupKind::Incremental).await;
    assert_eq!(point.kind(), BackupKind::Incremental, "{point:?}");

    // The same name joins again, with a new key; and what cannot be cleaned is told when somebody insists.
    let mut agent = joined(&mut fabric, &root).await;
    fabric.lab.migrate("one", "gamma", MigrationKind::Live).await.expect("moved");
    eventually("it is followed", async || {
        let vm = fabric.operator.vm("one").await.map_err(|e| e.to_string())?;
        if vm.host == "gamma" { Ok(()) } else { Err(vm.host) }
    })
    .await;
    fabric.coordinators[0].kill();
    let outcome = node(&root, &["uninstall", "--clean", "--force"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let json = outcome.json();
    assert_eq!(json["clean"], false, "{json}");
    let left = json["left"].to_string();
    assert!(
        left.contains("1 reference point(s) of VM") && left.contains("host forget gamma"),
        "{left}"
    );
    assert_eq!(files(&root), Vec::<PathBuf>::new());
    agent.stop().await;
    fabric.coordinators[0].restart();
    fabric.coordinators[0].ready().await;
    fabric.plan.hosts.retain(|h| h != "gamma");
    eventually("the coordinators are back", async || {
        fabric.operator.hosts().await.map(|_| ()).map_err(|e| e.to_string())
    })
    .await;
    let outcome = fabric.operator.cli(&["host", "forget", "gamma", "--json"]);
    assert_eq!(outcome.code, Some(1), "it is not leaving: {outcome:?}");
    assert!(outcome.stderr.contains("not leaving"), "{outcome:?}");
    let outcome = fabric.operator.cli(&["host", "forget", "gamma", "--force", "--json"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let hosts = fabric.operator.hosts().await.expect("a list");
    assert!(hosts.iter().all(|h| h.name != "gamma"), "{hosts:?}");
}
