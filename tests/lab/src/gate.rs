//! Open source files of agents: counted reads, paused reads, and who is in the way of a merge.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use outrider_wmi::lab::wire::Refusal;
use uuid::Uuid;

use crate::config::CsvConfig;
use crate::control::{FaultKind, FileBytes};
use crate::model::State;

/// FaultState of a redirected CSV, and the longest read that it answers at once.
const REDIRECTED: u32 = 1;
const REDIRECTED_PIECE: u64 = 64 << 10;

/// A file that an agent holds open.
#[derive(Debug, Clone)]
pub(crate) struct OpenFile {
    pub(crate) host: String,
    pub(crate) vm: Option<Uuid>,
    pub(crate) path: PathBuf,
}

/// Pauses reads of one VM's files when its budget is used up.
#[derive(Debug)]
pub(crate) struct Gate {
    pub(crate) id: u64,
    pub(crate) vm: Uuid,
    pub(crate) host: Option<String>,
    pub(crate) left: u64,
    /// Open files whose reader waits here.
    pub(crate) blocked: BTreeSet<u64>,
}

impl Gate {
    fn concerns(&self, file: &OpenFile) -> bool {
        file.vm == Some(self.vm) && self.host.as_ref().is_none_or(|h| *h == file.host)
    }
}

impl State {
    /// Opens a file for an agent, unless the hypervisor writes to it or is about to merge it.
    pub(crate) fn open_file(&mut self, host: &str, path: &Path) -> Result<u64, Refusal> {
        let sharing = || Refusal::Sharing { path: path.display().to_string() };
        let name = path.to_string_lossy().into_owned();
        let of = self.vm_of_file(path).map(|vm| vm.id);
        let busy = |k: &FaultKind| match k {
            FaultKind::FileBusy { ends_with } => name.ends_with(ends_with.as_str()).then_some(()),
            _ => None,
        };
        if self.strike(of, Some(host), busy).is_some() {
            return Err(sharing());
        }
        let vm = self.vm_of_file(path);
        if vm.is_some_and(|vm| vm.writes(path) || vm.merging(path)) {
            return Err(sharing());
        }
        let vm = vm.map(|vm| vm.id);
        let id = self.next();
        let file = OpenFile { host: host.to_owned(), vm, path: path.to_owned() };
        self.open_files.insert(id, file);
        Ok(id)
    }

    pub(crate) fn close_file(&mut self, id: u64) {
        self.open_files.remove(&id);
        self.paused_reads.remove(&id);
        for gate in &mut self.gates {
            gate.blocked.remove(&id);
        }
    }

    /// How many of `wanted` bytes may be read now; nothing while a gate is in the way. What is granted is counted.
    pub(crate) fn grant(&mut self, id: u64, wanted: u64) -> Option<u64> {
        let file = self.open_files.get(&id)?;
        if let Some(csv) = self.paused_csv(file).map(str::to_owned) {
            self.paused_reads.insert(id, csv);
            return None;
        }
        self.paused_reads.remove(&id);
        let file = self.open_files.get(&id)?;
        // Over the cluster's network reads come in small pieces.
        let redirected = self
            .csv_of(&file.path)
            .is_some_and(|csv| self.around.csvs.get(&csv.name).copied() == Some(REDIRECTED));
        let wanted = if redirected { wanted.min(REDIRECTED_PIECE) } else { wanted };
        let gates = || self.gates.iter().filter(|g| g.concerns(file));
        let granted = gates().map(|g| g.left).min().map_or(wanted, |left| left.min(wanted));
        if granted == 0 {
            for gate in self.gates.iter_mut().filter(|g| g.concerns(file) && g.left == 0) {
                gate.blocked.insert(id);
            }
            return None;
        }
        for gate in self.gates.iter_mut().filter(|g| g.concerns(file)) {
            gate.left -= granted;
            gate.blocked.remove(&id);
        }
        let key = (file.host.clone(), file.path.clone());
        let count = self.bytes_read.entry(key).or_insert_with(|| FileBytes {
            host: file.host.clone(),
            vm: file.vm,
            path: file.path.clone(),
            bytes: 0,
        });
        count.bytes += granted;
        Some(granted)
    }

    /// Whether a reader that found the gate closed should ask again.
    pub(crate) fn may_ask_again(&self, id: u64) -> bool {
        let Some(file) = self.open_files.get(&id) else { return true };
        // One that came through a gate is noted at the paused volume before it waits there.
        let stands = self.paused_csv(file).is_some() && self.paused_reads.contains_key(&id);
        !stands && self.gates.iter().all(|g| g.left > 0 || !g.concerns(file))
    }

    /// The code that a read of this file fails with, if a fault says so.
    pub(crate) fn failing_read(&mut self, id: u64) -> Option<u32> {
        let file = self.open_files.get(&id)?;
        let (host, vm) = (file.host.clone(), file.vm);
        let on = self.csv_of(&file.path)?.name.clone();
        self.strike(vm, Some(&host), |k| match k {
            FaultKind::CsvFails { csv, code } if *csv == on => Some(*code),
            _ => None,
        })
    }

    fn csv_of(&self, path: &Path) -> Option<&CsvConfig> {
        self.csvs.iter().find(|csv| path.starts_with(&csv.path))
    }

    /// The paused CSV that a file is on.
    fn paused_csv(&self, file: &OpenFile) -> Option<&str> {
        let on = self.csv_of(&file.path)?.name.as_str();
        let paused = |k: &FaultKind| matches!(k, FaultKind::CsvPaused { csv } if csv == on);
        self.ails(file.vm, Some(&file.host), paused).then_some(on)
    }

    /// Agents that hold this file open.
    pub(crate) fn readers_of<'a>(&'a self, path: &'a Path) -> impl Iterator<Item = &'a OpenFile> {
        self.open_files.values().filter(move |f| f.path == path)
    }
}
