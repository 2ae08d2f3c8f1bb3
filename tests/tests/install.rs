//! Installing an agent on a Linux machine (O6, O9): into an image below another root folder, so that no test touches the
//! machine it runs on. Windows has its own, under Wine.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use outrider_process::identity::{Identity, Role};
use outrider_proto::rpc::BackupKind;
use outrider_tests::fabric::MIB;
use outrider_tests::install::InstallLine;
use outrider_tests::operator::{Outcome, run};
use outrider_tests::process::Process;
use outrider_tests::{Fabric, Plan, eventually};

const PROGRAM: &str = "usr/local/lib/outrider-node/outrider";
const CONFIG: &str = "etc/outrider/node.toml";
const STATE: &str = "var/lib/outrider-node";
const UNIT: &str = "etc/systemd/system/outrider-node.service";
const LINK: &str = "etc/systemd/system/multi-user.target.wants/outrider-node.service";

fn outrider(root: &Path, args: &[&str]) -> Outcome {
    let root = root.to_str().expect("Unicode");
    run(&[&["node"], args, &["--root", root, "--json"]].concat(), &[])
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).permissions().mode()
        & 0o777
}

/// Everything below a folder.
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_line_installs_a_host_that_takes_backups_and_uninstalling_leaves_nothing() {
    let plan = Plan { unmanned: vec!["gamma".to_owned()], ..Plan::default() };
    let mut fabric = Fabric::start(plan).await;
    let line = InstallLine::of(&mut fabric, "gamma").await.quiet();
    let root = fabric.dir().join("image");
    fs::create_dir(&root).expect("made");

    // Without a token there is no identity, and nothing that a service could fail with.
    let outcome = outrider(&root, &["install", "--name", "gamma"]);
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.stderr.contains("--join"), "{outcome:?}");
    assert!(!root.join(UNIT).exists());

    let outcome = outrider(&root, &line.arguments());
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.stderr.is_empty(), "quiet is quiet: {outcome:?}");
    assert_eq!(mode(&root.join(PROGRAM)), 0o755);
    assert_eq!(mode(&root.join(STATE)), 0o700);
    assert_eq!(mode(&root.join(CONFIG)), 0o600);
    assert_eq!(mode(&root.join(STATE).join("identity/key.pem")), 0o600);
    let unit = fs::read_to_string(root.join(UNIT)).expect("a unit");
    assert!(unit.contains("ExecStart=\"/usr/local/lib/outrider-node/outrider\" node"), "{unit}");
    assert!(fs::read_link(root.join(LINK)).expect("enabled").ends_with("outrider-node.service"));
    let identity = Identity::load(&root.join(STATE).join("identity")).expect("an identity");
    assert_eq!((identity.peer().role, identity.peer().name.as_str()), (Role::Node, "gamma"));

    // Again: nothing changes, and no token is needed.
    let outcome = outrider(&root, &line.again());
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(outcome.json()["changed"].as_array().map(Vec::len), Some(0), "{outcome:?}");
    assert_eq!(outcome.json()["name"], "gamma");

    // The image is put into service: the same files, seen from here.
    let text = fs::read_to_string(root.join(CONFIG)).expect("a configuration");
    let here = root.join(STATE);
    let text = text.replace("/var/lib/outrider-node", here.to_str().expect("Unicode"));
    let mut agent = Process::start("node", "gamma", fabric.dir(), &text);
    agent.ready().await;
    fabric.plan.hosts.push("gamma".to_owned());
    fabric.settled().await;
    fabric.vm("one", "gamma", 8 * MIB).await;
    fabric.operator.backed_up("one", BackupKind::Full).await;
    eventually("the agent says that it is connected", async || {
        let outcome = outrider(&root, &["status"]);
        let json = outcome.json();
        if json["connected"] == true && outcome.code == Some(0) {
            Ok(())
        } else {
            Err(json.to_string())
        }
    })
    .await;
    agent.stop().await;
    let outcome = outrider(&root, &["status"]);
    assert_eq!(outcome.code, Some(1), "an agent that has ended is not connected: {outcome:?}");

    // An upgrade keeps the identity and the operator's configuration.
    let key = fs::read(root.join(STATE).join("identity/key.pem")).expect("a key");
    fs::write(root.join(PROGRAM), b"an older release").expect("written");
    let edited = fs::read_to_string(root.join(CONFIG)).expect("there") + "\n# mine\n";
    fs::write(root.join(CONFIG), &edited).expect("written");
    let outcome = outrider(&root, &line.again());
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_ne!(fs::read(root.join(PROGRAM)).expect("there"), b"an older release");
    assert_eq!(fs::read_to_string(root.join(CONFIG)).expect("there"), edited);
    assert_eq!(fs::read(root.join(STATE).join("identity/key.pem")).expect("there"), key);

    let outcome = outrider(&root, &["uninstall", "--keep-identity"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let mut left: Vec<_> =
        files(&root).iter().map(|p| p.file_name().map(ToOwned::to_owned)).collect();
    left.sort();
    let kept = ["ca.pem", "cert.pem", "key.pem", "node.toml", "sign.pk8"];
    assert_eq!(left, kept.map(|name| Some(name.into())), "only what was to be kept");
    let outcome = outrider(&root, &line.again());
    assert_eq!(outcome.json()["name"], "gamma", "{outcome:?}");
    let outcome = outrider(&root, &["uninstall"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(files(&root), Vec::<PathBuf>::new());
    let outcome = outrider(&root, &["status"]);
    assert_eq!(outcome.code, Some(3), "{outcome:?}");
}
