//! VMs and where they run.

use outrider_proto::ids::{PlacementEpoch, VmIncarnation, VmKey, VmRole};
use serde::{Deserialize, Serialize};

use super::facts::Disk;
use super::{Outcome, Refusal, State};

/// A VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Vm {
    /// Label; any Unicode.
    pub(crate) name: String,
    /// Hypervisor's word: running, off, saved, paused, other.
    pub(crate) state: String,
    pub(crate) generation: u32,
    pub(crate) config_version: String,
    pub(crate) disks: Vec<Disk>,
    pub(crate) clustered: bool,
    /// Where it runs; none before follow was sure.
    pub(crate) host: Option<String>,
    /// Grows by one at every move.
    pub(crate) placement: PlacementEpoch,
    /// Grows whenever its disks may have changed behind change tracking.
    pub(crate) incarnation: VmIncarnation,
    /// Another realm has the same VM, and had it first: shown, not followed.
    pub(crate) duplicate: bool,
    /// No host has it since then.
    pub(crate) gone_since_ms: Option<u64>,
    pub(crate) first_seen_ms: u64,
}

/// Facts of a VM, as an agent reported them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sighting {
    pub(crate) vm: VmKey,
    pub(crate) name: String,
    pub(crate) state: String,
    pub(crate) generation: u32,
    pub(crate) config_version: String,
    pub(crate) disks: Vec<Disk>,
    pub(crate) clustered: bool,
}

impl Vm {
    /// Whether the sighting tells nothing new.
    pub(crate) fn shows(&self, s: &Sighting) -> bool {
        (
            &self.name,
            &self.state,
            self.generation,
            &self.config_version,
            &self.disks,
            self.clustered,
        ) == (&s.name, &s.state, s.generation, &s.config_version, &s.disks, s.clustered)
    }

    /// Whether work can be given to its host.
    pub(crate) fn is_workable(&self) -> bool {
        self.host.is_some() && !self.duplicate && self.gone_since_ms.is_none()
    }
}

/// Whether this is the VM itself: what names and patterns mean when nothing else is said.
pub(crate) fn is_primary(vm: &VmKey) -> bool {
    vm.role == VmRole::Primary
}

/// Whether a VM of this key has a place and may be given work. A test failover is thrown away after the test.
pub(crate) fn is_placed(vm: &VmKey) -> bool {
    vm.role != VmRole::TestReplica
}

impl State {
    pub(super) fn vm_seen(&mut self, s: Sighting, now: u64) -> Outcome {
        let vm = self.vms.entry(s.vm).or_insert_with(|| Vm {
            name: String::new(),
            state: String::new(),
            generation: 0,
            config_version: String::new(),
            disks: Vec::new(),
            clustered: false,
            host: None,
            placement: PlacementEpoch(0),
            incarnation: VmIncarnation(1),
            duplicate: false,
            gone_since_ms: None,
            first_seen_ms: now,
        });
        vm.name = s.name;
        vm.state = s.state;
        vm.generation = s.generation;
        vm.config_version = s.config_version;
        vm.disks = s.disks;
        vm.clustered = s.clustered;
        Outcome::Done
    }

    /// Ends the lease of a job that followed the VM: it is leased again to the new host, as the same job.
    pub(super) fn vm_placed(&mut self, key: &VmKey, host: &str, now: u64) -> Outcome {
        let Some(vm) = self.vms.get_mut(key) else {
            return Refusal::UnknownVm(key.clone()).into();
        };
        vm.gone_since_ms = None;
        vm.duplicate = false;
        // What it was owed when it was last seen, it is owed again.
        for duty in self.duties.values_mut().filter(|duty| duty.vm == *key) {
            duty.resting_since_ms = None;
        }
        if vm.host.as_deref() == Some(host) {
            return Outcome::Done;
        }
        let from = vm.host.replace(host.to_owned());
        vm.placement = vm.placement.next();
        // A move off a dead host is a crash, whatever the order in which we hear of the two.
        if from.is_some_and(|from| self.hosts.get(&from).is_some_and(|h| !h.up)) {
            self.tracking_unproven(key, now);
        }
        self.jobs.vm_moved(key, now);
        Outcome::Done
    }

    pub(super) fn vm_duplicate(&mut self, key: &VmKey, duplicate: bool) -> Outcome {
        match self.vms.get_mut(key) {
            Some(vm) => {
                vm.duplicate = duplicate;
                Outcome::Done
            }
            None => Refusal::UnknownVm(key.clone()).into(),
        }
    }

    /// The VM came into another role on its host (a failover): whoever wrote to its disks meanwhile did so behind the
    /// change tracking of the former one. Its points stay its own.
    pub(super) fn role_left(&mut self, key: &VmKey, now: u64) -> Outcome {
        let Some(vm) = self.vms.get_mut(key) else {
            return Refusal::UnknownVm(key.clone()).into();
        };
        vm.gone_since_ms.get_or_insert(now);
        vm.incarnation = vm.incarnation.next();
        self.bases.remove(key);
        Outcome::Done
    }

    /// Keeps everything but the hope to reach it: points are kept by their own rule.
    pub(super) fn vm_gone(&mut self, key: &VmKey, now: u64) -> Outcome {
        match self.vms.get_mut(key) {
            Some(vm) => {
                vm.gone_since_ms.get_or_insert(now);
                Outcome::Done
            }
            None => Refusal::UnknownVm(key.clone()).into(),
        }
    }
}
