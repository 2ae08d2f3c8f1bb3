//! Protection groups and their policies.

use std::collections::BTreeSet;

use outrider_proto::ids::{GroupId, VmKey};
use serde::{Deserialize, Serialize};

use super::facts::Consistency;
use super::jobs::NewJob;
use super::vms::is_primary;
use super::{Outcome, Refusal, State};

/// VMs with one policy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Group {
    pub(crate) name: String,
    /// Named members.
    pub(crate) vms: BTreeSet<VmKey>,
    /// Members by name, also ones that appear later: `*` any text, `?` one character.
    pub(crate) patterns: Vec<String>,
    pub(crate) policy: Policy,
    pub(crate) created_ms: u64,
    /// None: only when asked.
    pub(crate) next_run_ms: Option<u64>,
    /// Runs of a VM left out because its last one was still running.
    pub(crate) skipped_runs: u64,
}

impl Group {
    /// Whether the next run is so far away that only a wrong clock can have set it. Clocks that are an hour apart are no reason.
    pub(crate) fn is_beyond_reason(&self, next_run_ms: u64, now_ms: u64) -> bool {
        const HOUR_MS: u64 = 3_600_000;
        let farthest = self.policy.every_ms.saturating_mul(2).saturating_add(HOUR_MS);
        next_run_ms > now_ms.saturating_add(farthest)
    }
}

/// What a group wants.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Policy {
    /// 0: only when asked.
    pub(crate) every_ms: u64,
    pub(crate) wanted: Consistency,
    pub(crate) minimum: Consistency,
    /// 0: the domain's.
    pub(crate) chunk_size: u32,
    pub(crate) require_all_disks: bool,
    /// A running VM may be saved for a moment where nothing better works.
    #[serde(default)]
    pub(crate) allow_offline: bool,
    /// Guests are not brought to rest.
    #[serde(default)]
    pub(crate) no_quiesce: bool,
    /// Writers in guests may truncate their logs.
    #[serde(default)]
    pub(crate) truncate_logs: bool,
    /// Everything is read each time.
    #[serde(default)]
    pub(crate) no_change_tracking: bool,
    /// Page and swap files are left out.
    #[serde(default)]
    pub(crate) skip_page_files: bool,
    /// User checkpoints are not kept, only what they add up to.
    #[serde(default)]
    pub(crate) flat_checkpoints: bool,
    /// Commands by the names that hosts give them; empty: none.
    #[serde(default)]
    pub(crate) before_command: String,
    #[serde(default)]
    pub(crate) after_command: String,
    /// A command before that fails ends the run.
    #[serde(default)]
    pub(crate) command_failure_fails: bool,
    /// Within this time after a host crash everything is read and compared; 0: at the next run.
    #[serde(default = "week")]
    pub(crate) check_within_ms: u64,
}

fn week() -> u64 {
    7 * 24 * 60 * 60 * 1000
}

impl Default for Policy {
    /// For VMs in no group that are backed up because somebody asked.
    fn default() -> Self {
        Self {
            every_ms: 0,
            wanted: Consistency::Application,
            minimum: Consistency::Crash,
            chunk_size: 0,
            require_all_disks: true,
            allow_offline: false,
            no_quiesce: false,
            truncate_logs: false,
            no_change_tracking: false,
            skip_page_files: false,
            flat_checkpoints: false,
            before_command: String::new(),
            after_command: String::new(),
            command_failure_fails: false,
            check_within_ms: week(),
        }
    }
}

/// A group to be created.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct NewGroup {
    pub(crate) id: GroupId,
    pub(crate) name: String,
    pub(crate) vms: BTreeSet<VmKey>,
    pub(crate) patterns: Vec<String>,
    pub(crate) policy: Policy,
    pub(crate) created_ms: u64,
}

impl Group {
    /// Whether the group holds the VM.
    pub(crate) fn holds(&self, key: &VmKey, name: &str) -> bool {
        self.vms.contains(key)
            || is_primary(key) && self.patterns.iter().any(|pattern| matches(pattern, name))
    }
}

impl State {
    /// The group of a VM: the one that names it, else the oldest whose pattern fits.
    pub(crate) fn group_of(&self, key: &VmKey) -> Option<(GroupId, &Group)> {
        let name = &self.vms.get(key)?.name;
        self.groups
            .iter()
            .filter(|(_, g)| g.holds(key, name))
            .min_by_key(|(id, g)| (!g.vms.contains(key), g.created_ms, **id))
            .map(|(id, g)| (*id, g))
    }

    /// The VMs of a group, as of now.
    pub(crate) fn members(&self, id: GroupId) -> Vec<VmKey> {
        self.vms
            .keys()
            .filter(|key| self.group_of(key).is_some_and(|(group, _)| group == id))
            .cloned()
            .collect()
    }

    pub(super) fn create_group(&mut self, new: NewGroup) -> Outcome {
        if self.groups.contains_key(&new.id) {
            return Outcome::Group(new.id);
        }
        if self.groups.values().any(|g| g.name == new.name) {
            return Refusal::NameTaken(new.name).into();
        }
        for vm in &new.vms {
            if !self.vms.contains_key(vm) {
                return Refusal::UnknownVm(vm.clone()).into();
            }
            if let Some(other) = self.groups.values().find(|g| g.vms.contains(vm)) {
                return Refusal::VmTaken { vm: vm.clone(), group: other.name.clone() }.into();
            }
        }
        let next_run_ms =
            (new.policy.every_ms > 0).then(|| new.created_ms.saturating_add(new.policy.every_ms));
        let group = Group {
            name: new.name,
            vms: new.vms,
            patterns: new.patterns,
            policy: new.policy,
            created_ms: new.created_ms,
            next_run_ms,
            skipped_runs: 0,
        };
        self.groups.insert(new.id, group);
        Outcome::Group(new.id)
    }

    /// The schedule goes on from the last run: another interval changes when the next one comes.
    pub(super) fn edit_group(&mut self, id: GroupId, policy: Policy, now: u64) -> Outcome {
        let Some(group) = self.groups.get_mut(&id) else {
            return Refusal::UnknownGroup(id).into();
        };
        if policy.every_ms != group.policy.every_ms {
            group.next_run_ms = (policy.every_ms > 0).then(|| now.saturating_add(policy.every_ms));
        }
        group.policy = policy;
        Outcome::Group(id)
    }

    pub(super) fn run_group(
        &mut self,
        id: GroupId,
        jobs: Vec<NewJob>,
        skipped: u64,
        next_run_ms: u64,
        now: u64,
    ) -> Outcome {
        // Two leaders may both decide on one run; the second one finds it done.
        match self.groups.get_mut(&id) {
            None => return Refusal::UnknownGroup(id).into(),
            Some(group)
                if group
                    .next_run_ms
                    .is_none_or(|at| at >= next_run_ms && !group.is_beyond_reason(at, now)) =>
            {
                return Outcome::Done;
            }
            Some(group) => {
                group.next_run_ms = Some(next_run_ms);
                group.skipped_runs += skipped;
            }
        }
        let mut created = Vec::new();
        for job in jobs {
            match self.create_job(job, now) {
                Outcome::Jobs(ids) => created.extend(ids),
                _ => {
                    if let Some(group) = self.groups.get_mut(&id) {
                        group.skipped_runs += 1;
                    }
                }
            }
        }
        Outcome::Jobs(created)
    }
}

/// `*` stands for any text, `?` for one character; letters of both cases are the same.
pub(crate) fn matches(pattern: &str, name: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().flat_map(char::to_lowercase).collect();
    let name: Vec<char> = name.chars().flat_map(char::to_lowercase).collect();
    let (mut p, mut n) = (0, 0);
    // Where the last star was, and how much of the name it has taken.
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        if pattern.get(p) == Some(&'*') {
            star = Some((p, n));
            p += 1;
        } else if pattern.get(p).is_some_and(|c| *c == '?' || *c == name[n]) {
            p += 1;
            n += 1;
        } else if let Some((at, taken)) = star {
            star = Some((at, taken + 1));
            p = at + 1;
            n = taken + 1;
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}
