//! QEMU processes: what a running one was started with, and starting one that outlives the agent.
//!
//! Where systemd runs, a VM is a unit of its own, started by systemd itself: the agent's unit may be stopped, killed or
//! upgraded, and what holds the agent back (no new privileges, no writable code, killed first when memory is short) does not
//! hold a VM back. Elsewhere it is a process group of its own.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use outrider_process::tasks::TaskSpawner;
use uuid::Uuid;

use super::definition::Definition;
use super::error::QemuError;

/// How often the process is asked whether it still lives while its monitor is waited for.
const LOOK: Duration = Duration::from_millis(50);
/// How long a QEMU may take to open its monitor.
const START: Duration = Duration::from_secs(60);

/// What a process was started with: its arguments and its folder. Empty where the system does not tell.
pub(super) fn started_with(pid: Option<i32>) -> (Vec<String>, PathBuf) {
    let Some(pid) = pid else { return (Vec::new(), PathBuf::from("/")) };
    let folder = PathBuf::from(format!("/proc/{pid}"));
    let line = std::fs::read(folder.join("cmdline")).unwrap_or_default();
    let argv = line.split(|b| *b == 0).map(|a| String::from_utf8_lossy(a).into_owned());
    let mut argv: Vec<String> = argv.collect();
    // The line ends with a zero.
    argv.pop();
    let cwd = std::fs::read_link(folder.join("cwd")).unwrap_or_else(|_| "/".into());
    (argv, cwd)
}

/// Starts a VM as a process group of its own, and waits until its monitor answers. What it gives becomes true when the process
/// has ended. (The monitor is not to be connected to for that: QEMU accepts one client, and the next one waits.)
pub(super) async fn start(
    definition: &Definition,
    tasks: &TaskSpawner,
) -> Result<Arc<AtomicBool>, QemuError> {
    let log = definition.qmp.with_extension("log");
    let failed = |reason: String| QemuError::NotStarted {
        vm: definition.name.clone(),
        reason,
        log: log.clone(),
    };
    let mut started = Started::new(definition, &log).map_err(|e| failed(e.to_string()))?;
    let began = tokio::time::Instant::now();
    loop {
        if let Ok(Some(status)) = started.child.try_wait() {
            return Err(failed(format!("QEMU ended at once ({status}): {}", last_line(&log))));
        }
        if tokio::net::UnixStream::connect(&definition.qmp).await.is_ok() {
            break;
        }
        if began.elapsed() > START {
            let reason =
                format!("its monitor {} did not come within {START:?}", definition.qmp.display());
            started.end();
            return Err(failed(reason));
        }
        tokio::time::sleep(LOOK).await;
    }
    // Waited for, so that it leaves no zombie; it is not ended with us.
    let name = definition.name.clone();
    let stop = tasks.token();
    let ended = Arc::new(AtomicBool::new(false));
    let tells = ended.clone();
    tasks.spawn(&format!("process {name}"), async move {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
            }
            match started.child.try_wait() {
                Ok(None) => continue,
                Ok(Some(status)) => {
                    tracing::info!(vm = name, %status, "a VM that a restore had started has ended");
                }
                Err(_) => {}
            }
            tells.store(true, Ordering::Release);
            return;
        }
    });
    Ok(ended)
}

/// A VM that is starting.
struct Started {
    /// QEMU itself, or what waits for its unit.
    child: Child,
    unit: Option<String>,
}

impl Started {
    fn new(definition: &Definition, log: &Path) -> std::io::Result<Self> {
        let output = std::fs::File::create(log)?;
        let unit = systemd_starts().then(|| unit_of(definition.uuid, Uuid::new_v4()));
        let folder =
            if definition.cwd.is_dir() { definition.cwd.as_path() } else { Path::new("/") };
        let mut command = match &unit {
            Some(unit) => {
                let mut command = Command::new("systemd-run");
                command.args(as_unit(definition, unit, folder, log));
                command
            }
            None => {
                let (program, arguments) =
                    definition.argv.split_first().ok_or(std::io::ErrorKind::InvalidInput)?;
                let mut command = Command::new(program);
                command.args(arguments).current_dir(folder);
                command
            }
        };
        // What the agent was told by its environment, secrets included, is not a VM's.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("OUTRIDER_") {
                command.env_remove(name);
            }
        }
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output).process_group(0);
        Ok(Self { child: command.spawn()?, unit })
    }

    /// Kills a VM that did not come up.
    fn end(&mut self) {
        if let Some(unit) = &self.unit {
            let kill = ["kill", "--signal=KILL", unit];
            if let Err(e) = Command::new("systemctl").args(kill).stdin(Stdio::null()).status() {
                tracing::warn!(unit, error = %e, "a VM that did not start may go on");
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether systemd can start processes for us: it is this machine's, and we are root to it.
fn systemd_starts() -> bool {
    let in_path = |program: &str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
    };
    // The sign that sd_booted(3) names.
    Path::new("/run/systemd/system").is_dir()
        && rustix::process::geteuid().is_root()
        && in_path("systemd-run")
}

/// A unit's name: one VM may be started again before systemd has forgotten its last start.
fn unit_of(vm: Uuid, start: Uuid) -> String {
    let start = start.simple().to_string();
    format!("outrider-vm-{vm}-{}.service", &start[..8])
}

/// Arguments of `systemd-run`, which waits until the VM ends and ends as it did.
fn as_unit(definition: &Definition, unit: &str, folder: &Path, log: &Path) -> Vec<String> {
    let options = [
        "--quiet".to_owned(),
        "--wait".to_owned(),
        "--collect".to_owned(),
        "--slice=machine.slice".to_owned(),
        format!("--unit={unit}"),
        format!("--description=VM {} (restored by Outrider)", definition.name),
        format!("--property=WorkingDirectory={}", folder.display()),
        format!("--property=StandardOutput=append:{}", log.display()),
        format!("--property=StandardError=append:{}", log.display()),
        "--property=UMask=0077".to_owned(),
        "--".to_owned(),
    ];
    // A dollar sign would begin a variable.
    let line = definition.argv.iter().map(|argument| argument.replace('$', "$$"));
    options.into_iter().chain(line).collect()
}

pub(super) fn last_line(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let last = text.lines().rev().find(|l| !l.trim().is_empty());
    last.unwrap_or("it said nothing").chars().take(400).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_of_its_own_starts_exactly_the_command_line() {
        let text = serde_json::json!({
            "format": "outrider-qemu-vm/1", "name": "web", "uuid": Uuid::nil(), "cwd": "/", "qmp": "/s/web.qmp",
            "qga": "/s/web.qga", "disks": [], "argv": ["/usr/bin/qemu-system-x86_64", "-name", "$web,a=b c"],
        });
        let definition = Definition::parse(text.to_string().as_bytes()).expect("a definition");
        let unit = unit_of(definition.uuid, Uuid::max());
        assert_eq!(unit, "outrider-vm-00000000-0000-0000-0000-000000000000-ffffffff.service");
        let line = as_unit(&definition, &unit, Path::new("/srv/a b"), Path::new("/s/web.log"));
        let (options, command) =
            line.split_at(line.iter().position(|a| a == "--").expect("an end of the options"));
        assert_eq!(command[1..], ["/usr/bin/qemu-system-x86_64", "-name", "$$web,a=b c"]);
        for wanted in [
            "--wait",
            "--slice=machine.slice",
            "--property=WorkingDirectory=/srv/a b",
            "--property=StandardError=append:/s/web.log",
        ] {
            assert!(options.iter().any(|o| o == wanted), "{wanted}: {options:?}");
        }
        assert!(!options.iter().any(|o| o == "--scope"), "a scope inherits all from the agent");
    }
}
