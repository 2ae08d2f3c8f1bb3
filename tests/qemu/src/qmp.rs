//! The cluster manager's monitor of a VM: commands one after another, events kept.

use std::path::Path;
use std::time::Duration;

use rustix::process::Pid;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use crate::error::Error;
use crate::wait::until;

/// QEMU answers within this, or something is wrong with it.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connected monitor.
#[derive(Debug)]
pub struct Qmp {
    vm: String,
    pid: Option<Pid>,
    lines: tokio::io::Lines<BufReader<OwnedReadHalf>>,
    write: OwnedWriteHalf,
    /// Names of all events so far.
    pub events: Vec<String>,
}

impl Qmp {
    /// Connects as soon as the socket is there.
    ///
    /// # Errors
    /// [`Error::Late`] when it does not come, [`Error::Gone`] when QEMU hangs up.
    pub async fn connect(vm: &str, socket: &Path) -> Result<Self, Error> {
        let stream = until(&format!("{vm}'s monitor {}", socket.display()), PATIENCE, async || {
            Ok(UnixStream::connect(socket).await.map_err(|e| e.to_string()))
        })
        .await?;
        let pid = stream.peer_cred().ok().and_then(|c| c.pid()).and_then(Pid::from_raw);
        let (read, write) = stream.into_split();
        let lines = BufReader::new(read).lines();
        let mut qmp = Self { vm: vm.to_owned(), pid, lines, write, events: Vec::new() };
        qmp.message().await?;
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// The process at the other end.
    #[must_use]
    pub fn pid(&self) -> Option<Pid> {
        self.pid
    }

    fn gone(&self, reason: impl ToString) -> Error {
        Error::Gone { vm: self.vm.clone(), reason: reason.to_string() }
    }

    async fn message(&mut self) -> Result<Value, Error> {
        let line = tokio::time::timeout(PATIENCE, self.lines.next_line()).await;
        match line {
            Err(_) => Err(self.gone(format!("no answer within {PATIENCE:?}"))),
            Ok(Err(error)) => Err(self.gone(error)),
            Ok(Ok(None)) => Err(self.gone("it hung up")),
            Ok(Ok(Some(text))) => serde_json::from_str(&text).map_err(|e| self.gone(e)),
        }
    }

    /// Runs one command and gives what it returns.
    ///
    /// # Errors
    /// [`Error::Refused`] with QEMU's words, [`Error::Gone`].
    pub async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Error> {
        let text = json!({ "execute": command, "arguments": arguments }).to_string();
        self.write.write_all(text.as_bytes()).await.map_err(|e| self.gone(e))?;
        loop {
            let mut message = self.message().await?;
            if let Some(event) = message["event"].as_str() {
                self.events.push(event.to_owned());
            } else if message.get("error").is_some() {
                let reason = message["error"]["desc"].as_str().unwrap_or("no reason").to_owned();
                return Err(Error::Refused {
                    vm: self.vm.clone(),
                    command: command.to_owned(),
                    reason,
                });
            } else if message.get("return").is_some() {
                return Ok(message["return"].take());
            }
        }
    }

    /// The VM's run state: "running", "paused", "inmigrate", "postmigrate"...
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub async fn status(&mut self) -> Result<String, Error> {
        let status = self.execute("query-status", json!({})).await?;
        Ok(status["status"].as_str().unwrap_or_default().to_owned())
    }

    /// Waits for a run state.
    ///
    /// # Errors
    /// [`Error::Late`], [`Error::Gone`].
    pub async fn reaches(&mut self, status: &str, patience: Duration) -> Result<(), Error> {
        let what = format!("{} {status}", self.vm);
        until(&what, patience, async || {
            let now = self.status().await?;
            Ok(if now == status { Ok(()) } else { Err(now) })
        })
        .await
    }

    /// Everything in QEMU that a backup could have left: exports, jobs, bitmaps, and nodes that the VM was not started
    /// with. One line each, sorted; `disks` are the node names that belong to the VM.
    ///
    /// # Errors
    /// [`Error::Gone`], [`Error::Refused`].
    pub async fn leftovers(&mut self, disks: &[String]) -> Result<Vec<String>, Error> {
        let mut found = Vec::new();
        let list = |value: Value| value.as_array().cloned().unwrap_or_default();
        for export in list(self.execute("query-block-exports", json!({})).await?) {
            found.push(format!("export {}", export["id"]));
        }
        for job in list(self.execute("query-jobs", json!({})).await?) {
            found.push(format!("job {}", job["id"]));
        }
        for node in list(self.execute("query-named-block-nodes", json!({"flat": true})).await?) {
            let name = node["node-name"].as_str().unwrap_or_default();
            let known = disks.iter().any(|d| d == name) || name.starts_with("#block");
            if !known {
                found.push(format!("node {name} ({})", node["drv"].as_str().unwrap_or_default()));
            }
            for bitmap in list(node["dirty-bitmaps"].clone()) {
                let mark = if bitmap["inconsistent"] == true { " inconsistent" } else { "" };
                let name = bitmap["name"].as_str().unwrap_or_default();
                found.push(format!("bitmap {name} on {}{mark}", node["node-name"]));
            }
        }
        found.sort_unstable();
        Ok(found)
    }
}
