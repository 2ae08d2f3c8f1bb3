//! The agent as a service of Windows (O6, O8, O9): installed by one line, steered, upgraded and removed, as a Windows
//! program. Wine's service manager runs it; coordinators and the simulated cluster are processes of this machine.
//!
//! `.ci/windows` builds the program and names it in `OUTRIDER_WINDOWS_EXE`; without it nothing is proven here.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use outrider_tests::install::InstallLine;
use outrider_tests::operator::Outcome;
use outrider_tests::{Fabric, Plan, eventually};

/// A Windows machine of its own: the prefix is copied, so that no test meets another one's services.
struct Machine {
    prefix: PathBuf,
    program: PathBuf,
}

impl Machine {
    fn new(dir: &Path, program: PathBuf) -> Self {
        let tools = std::env::var_os("OUTRIDER_TOOLS").map(PathBuf::from).unwrap_or_else(|| {
            let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
            let home = || PathBuf::from(std::env::var_os("HOME").expect("a home"));
            cache.unwrap_or_else(|| home().join(".cache")).join("outrider-tools")
        });
        let prefix = dir.join("windows");
        let copied = Command::new("cp")
            .args([OsStr::new("-a"), OsStr::new("--reflink=auto")])
            .args([tools.join("wine-prefix").as_os_str(), prefix.as_os_str()])
            .status();
        assert!(copied.expect("cp runs").success(), "the prefix of .ci/tools windows is copied");
        Self { prefix, program }
    }

    fn wine(&self, program: &Path, args: &[&str]) -> Output {
        Command::new("/usr/lib/wine/wine64")
            .arg(program)
            .args(args)
            .env("WINEPREFIX", &self.prefix)
            .env("WINEDEBUG", "-all")
            .env("WINEDLLOVERRIDES", "mscoree=;mshtml=")
            .stdin(Stdio::null())
            .output()
            .expect("Wine runs")
    }

    fn node(&self, args: &[&str]) -> Outcome {
        let output = self.wine(&self.program, &[&["node"], args, &["--json"]].concat());
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Outcome {
            code: output.status.code(),
            stdout: text(&output.stdout),
            stderr: text(&output.stderr),
        }
    }

    fn c(&self, path: &str) -> PathBuf {
        self.prefix.join("drive_c").join(path)
    }
}

impl Drop for Machine {
    /// Ends the Windows machine: all its processes are children of this prefix's own server.
    fn drop(&mut self) {
        let _ = Command::new("/usr/lib/wine/wineserver64")
            .args(["-k", "-w"])
            .env("WINEPREFIX", &self.prefix)
            .status();
        if std::thread::panicking() {
            let log = self.c("ProgramData/Outrider/Node/node.log");
            eprintln!(
                "---- {}\n{}",
                log.display(),
                std::fs::read_to_string(&log).unwrap_or_default()
            );
        }
    }
}

/// A path of this machine as Windows programs see it.
fn windows_path(path: &Path) -> String {
    format!("Z:{}", path.display().to_string().replace('/', "\\"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_agent_lives_and_leaves_as_a_service_of_windows() {
    let Some(program) = std::env::var_os("OUTRIDER_WINDOWS_EXE").map(PathBuf::from) else {
        eprintln!("SKIPPED: OUTRIDER_WINDOWS_EXE names no program; .ci/windows builds one");
        return;
    };
    let plan = Plan { unmanned: vec!["gamma".to_owned()], ..Plan::default() };
    let mut fabric = Fabric::start(plan).await;
    let machine = Machine::new(fabric.dir(), program);
    let line = InstallLine::of(&mut fabric, "gamma").await.quiet().seen_as(windows_path);

    let outcome = machine.node(&["status"]);
    assert_eq!(outcome.code, Some(3), "nothing is installed: {outcome:?}");
    let outcome = machine.node(&line.arguments());
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(outcome.json()["connected"], true, "{outcome:?}");
    fabric.plan.hosts.push("gamma".to_owned());
    fabric.settled().await;
    assert!(machine.c("Program Files/Outrider/outrider.exe").is_file());
    let key = machine.c("ProgramData/Outrider/Node/identity/key.pem");
    let made_key = std::fs::read(&key).expect("a key");

    let outcome = machine.node(&["status"]);
    assert_eq!(
        (outcome.code, &outcome.json()["service"]),
        (Some(0), &"running".into()),
        "{outcome:?}"
    );

    // Again: everything is there, the service goes on.
    let outcome = machine.node(&line.again());
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(outcome.json()["changed"].as_array().map(Vec::len), Some(0), "{outcome:?}");

    // Stopped in order: the agent says so itself, and the coordinators hear no more of it.
    let outcome = machine.node(&["stop"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(outcome.json()["service"], "stopped", "{outcome:?}");
    let log = std::fs::read_to_string(machine.c("ProgramData/Outrider/Node/node.log"));
    let log = log.expect("a log");
    assert!(log.contains("event_id=100") && log.contains("event_id=101"), "{log}");
    eventually("the host is silent", async || {
        let hosts = fabric.operator.hosts().await.map_err(|e| e.to_string())?;
        let state = hosts.into_iter().find(|h| h.name == "gamma").map(|h| h.state);
        if state.as_deref() == Some("silent") { Ok(()) } else { Err(format!("{state:?}")) }
    })
    .await;
    let outcome = machine.node(&["start"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    fabric.settled().await;

    // An upgrade: another program is there; identity and configuration stay.
    let installed = machine.c("Program Files/Outrider/outrider.exe");
    let outcome = machine.node(&["stop"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    std::fs::write(&installed, b"an older release").expect("written");
    let outcome = machine.node(&line.again());
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_ne!(std::fs::read(&installed).expect("there"), b"an older release");
    assert_eq!(std::fs::read(&key).expect("there"), made_key);
    fabric.settled().await;

    let outcome = machine.node(&["uninstall"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(!machine.c("Program Files/Outrider").exists(), "{outcome:?}");
    assert!(!machine.c("ProgramData/Outrider").exists(), "{outcome:?}");
    let outcome = machine.node(&["status"]);
    assert_eq!(outcome.code, Some(3), "no service is left: {outcome:?}");
}
