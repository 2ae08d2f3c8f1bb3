//! Seeing whether a VM boots: by its guest agent, by a serial console that QEMU keeps, by its screen where that was asked for.

use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use outrider_proto::ids::VmGuid;
use serde_json::json;
use tokio::time::Instant;

use super::Qemu;
use super::console::{Console, Transcript, consoles};
use super::error::QemuError;
use super::guest::GuestAgent;
use super::machine::Machine;
use super::process;
use super::screen::{self, Settling};
use crate::hypervisor::{BootCheck, Booting, HypervisorError, Sign};
use crate::lease::Lease;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(250);
/// Most bytes of a console that one look reads; the rest is read by the next ones.
const MOST: u64 = 1 << 20;

/// A console that is read on from where it was.
struct Reading {
    console: Console,
    offset: u64,
    said: Transcript,
}

impl Reading {
    /// From the end of what is there; of a file that QEMU is about to empty, from its beginning.
    fn begin(console: Console, starts: bool) -> Self {
        let offset = match &console {
            Console::File { appends: false, .. } if starts => 0,
            Console::File { path, .. } => std::fs::metadata(path).map_or(0, |m| m.len()),
            Console::Ring { .. } => 0,
        };
        Self { console, offset, said: Transcript::default() }
    }

    async fn read(&mut self, machine: &Machine, wanted: Option<&str>) {
        let read = match &self.console {
            Console::File { path, .. } => part(path, self.offset).unwrap_or_default(),
            Console::Ring { chardev } => {
                let arguments = json!({ "device": chardev, "size": 65536, "format": "utf8" });
                let read = machine.qmp.execute("ringbuf-read", arguments).await;
                read.ok()
                    .and_then(|r| r.as_str().map(|s| s.as_bytes().to_vec()))
                    .unwrap_or_default()
            }
        };
        self.offset += read.len() as u64;
        self.said.take(&read, wanted);
    }
}

fn part(path: &Path, offset: u64) -> std::io::Result<Vec<u8>> {
    let mut file = std::fs::File::open(path)?;
    file.seek(SeekFrom::Start(offset))?;
    let mut bytes = Vec::new();
    file.take(MOST).read_to_end(&mut bytes)?;
    Ok(bytes)
}

impl Qemu {
    /// Starts a VM and watches it.
    pub(super) async fn boot(
        &self,
        lease: &Lease,
        vm: VmGuid,
        check: &BootCheck,
    ) -> Result<Booting, HypervisorError> {
        let began = Instant::now();
        let starts = self.fleet.find(vm).is_none();
        // Before it starts: what an earlier VM of this name said is no sign.
        let kept = match (starts, self.definition(vm)) {
            (true, Some((_, defined))) => consoles(&defined.argv, &defined.cwd),
            _ => Vec::new(),
        };
        let mut readings: Vec<Reading> =
            kept.into_iter().map(|console| Reading::begin(console, starts)).collect();
        match self.power_on(vm).await {
            Ok(()) => {}
            Err(QemuError::EndedSoon { said, .. }) => {
                let ended = Some(format!("its QEMU ended: {said}"));
                return Ok(Booting { ended, watched: began.elapsed(), ..Booting::default() });
            }
            Err(e) => return Err(e.into()),
        }
        let machine = self.fleet.find(vm).ok_or(QemuError::NotRunning { vm })?;
        if !starts {
            let (argv, cwd) = process::started_with(machine.qmp.peer());
            readings =
                consoles(&argv, &cwd).into_iter().map(|c| Reading::begin(c, false)).collect();
        }
        let mut settling = Settling::default();
        let mut agent = String::new();
        let mut booting = Booting::default();
        loop {
            lease.check()?;
            let left = check.patience.saturating_sub(began.elapsed());
            booting.sign =
                self.look(&machine, check, &mut readings, &mut settling, &mut agent, left).await;
            if booting.sign.is_none() {
                booting.ended = self.ended(&machine).await;
            }
            booting.watched = began.elapsed();
            let blind = check.text.is_some() && readings.is_empty();
            if booting.sign.is_some()
                || booting.ended.is_some()
                || blind
                || booting.watched >= check.patience
            {
                break;
            }
            tokio::time::sleep(LOOK.min(check.patience - booting.watched)).await;
        }
        if booting.sign.is_none() {
            booting.in_vain = in_vain(&machine, check, &readings, &agent);
            booting.console = readings.iter().flat_map(|r| r.said.last()).collect();
            booting.picture = screen::keep(&machine).await;
        }
        Ok(booting)
    }

    /// One look at everything that counts.
    async fn look(
        &self,
        machine: &Arc<Machine>,
        check: &BootCheck,
        readings: &mut [Reading],
        settling: &mut Settling,
        agent: &mut String,
        left: Duration,
    ) -> Option<Sign> {
        let wanted = check.text.as_deref();
        for reading in readings {
            reading.read(machine, wanted).await;
            if let Some(line) = reading.said.sign() {
                return Some(Sign::Console(line.to_owned()));
            }
        }
        if wanted.is_some() {
            return None;
        }
        if let Some(socket) = machine.agent_socket() {
            let whole = Duration::from_secs(left.as_secs().max(1));
            match ping(&socket, self.config.guest_agent.min(whole)).await {
                Ok(()) => return Some(Sign::GuestAgent),
                Err(reason) => *agent = reason,
            }
        }
        if check.screen
            && let Ok(Some(picture)) = screen::look(machine, &self.scratch).await
            && let Some((width, height)) = settling.take(picture, Instant::now())
        {
            return Some(Sign::Screen { width, height });
        }
        None
    }

    /// How it ended, or stopped for good, if it did.
    async fn ended(&self, machine: &Machine) -> Option<String> {
        if machine.qmp.is_closed() {
            let log = machine.qmp.socket().with_extension("log");
            return Some(format!("its QEMU ended: {}", process::last_line(&log)));
        }
        match machine.run_state().await.ok()?.as_str() {
            "shutdown" => Some("the guest turned it off".into()),
            "guest-panicked" => Some("the guest panicked".into()),
            "internal-error" => Some("QEMU stopped it for an internal error".into()),
            "io-error" => Some("QEMU stopped it, since a disk could not be read or written".into()),
            _ => None,
        }
    }
}

async fn ping(socket: &Path, patience: Duration) -> Result<(), String> {
    let mut agent = GuestAgent::connect(socket, patience).await?;
    agent.execute("guest-ping", patience).await.map(drop)
}

/// What was looked at, and what could not be.
fn in_vain(machine: &Machine, check: &BootCheck, readings: &[Reading], agent: &str) -> Vec<String> {
    let mut told = Vec::new();
    let unread = "no serial console that QEMU keeps (give its character device a logfile)";
    match &check.text {
        Some(text) if readings.is_empty() => {
            told.push(format!("the text {text:?} cannot be looked for: it has {unread}"));
            return told;
        }
        Some(text) => {
            told.push(format!("the text {text:?} is on none of its serial consoles"));
            return told;
        }
        None if readings.is_empty() => told.push(format!("it has {unread}")),
        None => told.push("no login prompt is on its serial console".into()),
    }
    told.push(match machine.agent_socket() {
        Some(_) => format!("its guest agent {agent}"),
        None => "it has no guest agent socket".into(),
    });
    if check.screen {
        told.push("its screen settled on no picture but firmware's".into());
    }
    told
}
