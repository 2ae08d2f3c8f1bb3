//! The NBD server inside a QEMU. There is one for each QEMU; we make its socket and pass it in, so that QEMU needs no right to
//! make files, and know the server again by it.

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use serde_json::{Value, json};

use super::error::QemuError;
use super::machine::Machine;
use super::qmp::QmpError;

/// Name under which the listening socket is passed.
const PASSED: &str = "outrider-nbd";

/// Where the server of this QEMU listens: beside the monitor, with a short name (a socket's path is bounded).
pub(super) fn socket(machine: &Machine) -> PathBuf {
    let digits = machine.vm.0.simple().to_string();
    machine.qmp.socket().with_file_name(format!("{}.nbd", &digits[..16]))
}

/// Starts the server unless it runs.
pub(super) async fn ensure(machine: &Machine) -> Result<(), QemuError> {
    let path = socket(machine);
    // The file is there while the server is, and after a QEMU that was killed.
    if path.exists() && UnixStream::connect(&path).is_ok() {
        return Ok(());
    }
    let failed = |reason: std::io::Error| QemuError::File {
        doing: "listen at",
        path: path.clone(),
        reason: reason.to_string(),
    };
    remove(&path);
    let listener = UnixListener::bind(&path).map_err(failed)?;
    machine.qmp.execute_with("getfd", json!({ "fdname": PASSED }), OwnedFd::from(listener)).await?;
    let address = json!({ "addr": { "type": "fd", "data": { "str": PASSED } } });
    match machine.qmp.execute("nbd-server-start", address).await {
        Ok(_) => Ok(()),
        Err(e) => {
            remove(&path);
            if let Err(e) = machine.qmp.execute("closefd", json!({ "fdname": PASSED })).await {
                tracing::debug!(vm = machine.name, error = %e, "the passed socket is closed already");
            }
            match e {
                QmpError::Refused { desc, .. } if desc.contains("already running") => {
                    Err(QemuError::ServerTaken { vm: machine.name.clone() })
                }
                e => Err(e.into()),
            }
        }
    }
}

/// Stops the server if it is ours and serves nothing any more.
pub(super) async fn stop_if_idle(machine: &Machine) -> Result<(), QmpError> {
    let path = socket(machine);
    if !path.exists() {
        return Ok(());
    }
    let exports = machine.qmp.execute("query-block-exports", Value::Null).await?;
    if export_ids(&exports).is_empty() {
        match machine.qmp.execute("nbd-server-stop", Value::Null).await {
            Ok(_) => {}
            Err(e) if e.is_refusal() => tracing::debug!(error = %e, "no NBD server to stop"),
            Err(e) => return Err(e),
        }
        remove(&path);
    }
    Ok(())
}

fn remove(path: &std::path::Path) {
    if let Err(e) = std::fs::remove_file(path)
        && e.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), error = %e, "a socket of ours stays behind");
    }
}

/// The ids of an answer to `query-block-exports`.
pub(super) fn export_ids(exports: &Value) -> Vec<String> {
    let all = exports.as_array().into_iter().flatten();
    all.filter_map(|e| e["id"].as_str().map(str::to_owned)).collect()
}
