//! QEMU processes: what a running one was started with, and starting one that outlives the agent.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use outrider_process::tasks::TaskSpawner;

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
    let mut child = spawn(definition, &log).map_err(|e| failed(e.to_string()))?;
    let began = tokio::time::Instant::now();
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Err(failed(format!("QEMU ended at once ({status}): {}", last_line(&log))));
        }
        if tokio::net::UnixStream::connect(&definition.qmp).await.is_ok() {
            break;
        }
        if began.elapsed() > START {
            let reason =
                format!("its monitor {} did not come within {START:?}", definition.qmp.display());
            let _ = child.kill();
            let _ = child.wait();
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
            match child.try_wait() {
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

fn spawn(definition: &Definition, log: &Path) -> std::io::Result<Child> {
    let output = std::fs::File::create(log)?;
    let folder = if definition.cwd.is_dir() { definition.cwd.as_path() } else { Path::new("/") };
    let (program, arguments) =
        definition.argv.split_first().ok_or(std::io::ErrorKind::InvalidInput)?;
    Command::new(program)
        .args(arguments)
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .process_group(0)
        .spawn()
}

pub(super) fn last_line(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let last = text.lines().rev().find(|l| !l.trim().is_empty());
    last.unwrap_or("it said nothing").chars().take(400).collect()
}
